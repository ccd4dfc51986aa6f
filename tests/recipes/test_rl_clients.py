"""How the recipe speaks to its clients, seen from fake ones, and how it reads the config."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ptlab.config import RlConfig
from ptlab.envs.addition import AdditionConfig
from ptlab.recipes import rl
from ptlab.rl.types import RLDataset, Task
from ptlab.runlog import RunLog
from ptlab.types import GetServerCapabilitiesResponse


class EmptyDataset(RLDataset):
    def get_batch(self, index):
        return []

    def __len__(self):
        return 1


def config_for(directory: Path, **sections: Any) -> RlConfig:
    run = {"name": "run", "run_dir": str(directory / "runs"), "model": {"name": "m", "renderer": "none"}}
    return RlConfig.model_validate(run | sections)


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

        async def get_server_capabilities_async(self):
            return GetServerCapabilitiesResponse(supported_models=[])

    async def empty_task(self, setting):
        return Task(train=EmptyDataset(), test_P=[])

    monkeypatch.setattr(rl, "run_renderer", lambda model, tokenizer: None)
    monkeypatch.setattr(AdditionConfig, "make_task", empty_task)
    monkeypatch.setattr(rl.datums, "group_to_datums", lambda group, advantages, loss, mark_sampled: ["datum"])
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
