"""How the recipe speaks to its clients, seen from fake ones, and how it reads the config."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ptlab.config import RunConfig
from ptlab.errors import ConfigError
from ptlab.recipes import rl
from ptlab.rl.types import RLDataset, Task
from ptlab.runlog import RunLog


class EmptyDataset(RLDataset):
    def get_batch(self, index):
        return []

    def __len__(self):
        return 1


def config_for(directory: Path, **sections: Any) -> RunConfig:
    run = {"name": "run", "run_dir": str(directory / "runs"), "model": {"name": "m", "renderer": "none"}}
    return RunConfig.model_validate(run | sections)


def test_both_training_requests_are_queued_before_either_is_awaited(tmp_path, monkeypatch):
    """Fake clients: what is called, and in which order it is waited for."""
    events: list[str] = []

    class Stop(Exception):
        pass

    @dataclass
    class Pending:
        name: str
        value: Any = None

        def __await__(self):
            events.append(f"await {self.name}")
            if self.name == "optim_step":
                raise Stop
            yield from ()
            return self.value

    class Training:
        def forward_backward(self, data, loss_fn, loss_fn_config=None):
            events.append("forward_backward")
            return Pending("forward_backward")

        def optim_step(self, params):
            events.append("optim_step")
            return Pending("optim_step")

        def get_tokenizer(self):
            return None

        def save_weights_and_get_sampling_client(self):
            return Pending("sampling_client", self)

    class Service:
        def create_lora_training_client(self, **kwargs):
            return Pending("training_client", Training())

    monkeypatch.setattr(rl, "get_renderer", lambda name, tokenizer: None)
    monkeypatch.setattr(rl, "make_task", lambda config, renderer: Task(train=EmptyDataset(), test_P=[]))
    monkeypatch.setattr(rl.datums, "group_to_datums", lambda group, advantages, loss: ["datum"])
    monkeypatch.setattr(rl, "group_centred", lambda rewards: rewards)
    groups = [type("Group", (), {"rewards_G": []})()]

    async def one_group(*args, **kwargs):
        return groups

    monkeypatch.setattr(rl.rollout, "run_groups", one_group)
    monkeypatch.setattr(rl.diagnostics, "newest_version", lambda groups: 0)
    config = config_for(tmp_path, eval={"every": 0})
    with RunLog.open(config, echo=lambda line: None) as log, pytest.raises(Stop):
        asyncio.run(rl.run(config, Service(), log))
    assert events[2:] == ["forward_backward", "optim_step", "await forward_backward", "await optim_step"]


def test_the_task_follows_the_config(tmp_path):
    env = {"kind": "addition", "groups_per_step": 3, "group_size": 5, "num_test": 7, "reward": "random"}
    addition = rl.make_task(config_for(tmp_path, env=env), None)
    assert len(addition.train.get_batch(0)) == 3 and len(addition.test_P) == 7
    [builder, *_] = addition.train.get_batch(0)
    assert builder.group_size == 5 and builder.coin_seed is not None
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "q", "answer": "1"}\n')
    local = {"kind": "gsm8k", "train_path": str(path), "test_path": str(path), "groups_per_step": 2, "format_coef": 0.25, "few_shot": True}
    [builder, *_] = rl.make_task(config_for(tmp_path, env=local), None).train.get_batch(0)
    assert builder.form.format_coef == 0.25 and len(builder.form.prefix) == 2
    with pytest.raises(ConfigError):
        rl.make_task(config_for(tmp_path, env={**local, "train_path": str(tmp_path / "gone.jsonl")}), None)
