"""Supervised fine-tuning on real engines and a tiny random transformer; what a step weighs, and which conversations it holds."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path

import numpy as np
import pytest

from ptlab import runlog
from ptlab.config import SftConfig
from ptlab.errors import ConfigError
from ptlab.local import open_service
from ptlab.recipes import sft
from ptlab.runlog import RunLog
from ptlab.types import Datum, ModelInput, TensorData


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr(runlog, "draw_curves", lambda *args, **kwargs: None)  # a second each, and not the question here


def config_for(directory: Path, **changes) -> SftConfig:
    sections = {
        "name": "run",
        "run_dir": str(directory),
        "steps": 4,
        "model": {"name": "tiny", "renderer": "chatml"},
        "lora": {"rank": 8},
        "data": {"kind": "sums", "num_train": 12, "num_test": 5},
        "batch": {"conversations": 4},
        "optim": {"learning_rate": 0.01, "schedule": "cosine"},
        "engines": {"sampler": {"kind": "torch"}},
        "eval": {"every": 2},
        "checkpoint": {"every": 2},
    }
    return SftConfig.model_validate(sections | changes)


def train(directory: Path, model_dir: Path, *, resume: bool = False, stop_at: int | None = None, **changes) -> list[dict[str, float]]:
    config = config_for(directory, **changes)
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(model_dir)})})
    with RunLog.open(config, resume=resume, echo=lambda line: None) as log, open_service(config) as service:
        asyncio.run(sft.run(config, service.client, log))
    return [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]


def without_clock(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if not key.startswith(("time/", "sync/"))} for row in rows]


def test_the_likelihood_of_held_out_conversations_rises(tmp_path, tiny_qwen3_dir):
    rows = train(tmp_path, tiny_qwen3_dir, steps=12, eval={"every": 6}, checkpoint={"every": 0})
    scores = [row["eval/nll"] for row in rows if "eval/nll" in row]
    assert len(scores) == 3 and scores[0] > scores[1] > scores[2] and scores[2] < 0.7 * scores[0]
    assert all(row["eval/perplexity"] == pytest.approx(math.exp(row["eval/nll"])) for row in rows if "eval/nll" in row)
    assert [row["data/epoch"] for row in rows[:4]] == pytest.approx([4 / 12, 8 / 12, 1.0, 16 / 12])
    assert all(row["batch/conversations"] == 4 and row["batch/trained_tokens"] < row["batch/tokens"] for row in rows[:-1])


@pytest.mark.parametrize("batch", [{"conversations": 4}, {"tokens": 200}])
def test_a_resumed_run_is_the_unbroken_one(tmp_path, tiny_qwen3_dir, monkeypatch, batch):
    whole = train(tmp_path / "a", tiny_qwen3_dir, batch=batch)
    scored = sft.nll_metrics
    num_scored = 0

    async def dies_at_the_end(training_client, test_D):
        nonlocal num_scored
        num_scored += 1
        if num_scored == 3:
            raise KeyboardInterrupt
        return await scored(training_client, test_D)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sft, "nll_metrics", dies_at_the_end)
        train(tmp_path / "b", tiny_qwen3_dir, batch=batch)
    resumed = train(tmp_path / "b", tiny_qwen3_dir, batch=batch, resume=True)
    for row, other in zip(without_clock(resumed), without_clock(whole), strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-7)


def test_a_task_can_be_asked_beside_the_likelihood(tmp_path, tiny_qwen3_dir):
    changes = {"env": {"kind": "addition", "num_test": 3}, "rollout": {"max_tokens": 4}, "every": 1}
    rows = train(tmp_path, tiny_qwen3_dir, steps=1, eval=changes)
    assert all({"eval/nll", "eval/accuracy", "eval/accuracy_greedy"} <= row.keys() for row in rows)


def test_a_batch_that_max_length_leaves_nothing_of_is_skipped(tmp_path, tiny_qwen3_dir):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "x " * length, "completion": "Ones: 1+2=3."} for length in (2, 120)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"kind": "conversations", "train_path": str(path), "test_path": str(path)}
    seen = train(tmp_path, tiny_qwen3_dir, data=data, max_length=40, steps=2, batch={"conversations": 1}, eval={"every": 0})
    assert sorted(row["batch/skipped"] for row in seen) == [0.0, 1.0]
    [skipped] = [row for row in seen if row["batch/skipped"]]
    assert "train/nll" not in skipped and skipped["batch/trained_tokens"] == 0


# ------------------------------------------------------------------------------------------------------------ without a model


def datum(*weights: float) -> Datum:
    inputs = {
        "target_tokens": TensorData.from_numpy(np.arange(len(weights))),
        "weights": TensorData.from_numpy(np.asarray(weights, np.float32)),
    }
    return Datum(model_input=ModelInput.from_ints(list(range(len(weights)))), loss_fn_inputs=inputs)


def test_every_trained_token_of_a_step_weighs_the_same_and_all_weigh_one():
    scaled = [item.loss_fn_inputs["weights"].to_numpy() for item in sft.token_mean([datum(0, 1, 1), datum(0, 0, 1, 1, 1, 1, 1, 1)])]
    assert scaled[0].tolist() == [0.0, 0.125, 0.125] and scaled[1].tolist() == [0.0, 0.0] + [0.125] * 6
    assert sum(weights.sum() for weights in scaled) == 1.0 and scaled[0].dtype == np.float32


def test_the_score_is_the_mean_over_tokens_not_over_conversations():
    class Trainer:
        async def forward(self, data, loss_fn):
            assert loss_fn == "cross_entropy"
            logprobs = [np.asarray([-9.0, -1.0], np.float32), np.asarray([-9.0, -2.0, -2.0, -2.0], np.float32)]
            return type("Output", (), {"loss_fn_outputs": [{"logprobs": TensorData.from_numpy(item)} for item in logprobs]})()

    metrics = asyncio.run(sft.nll_metrics(Trainer(), [datum(0, 1), datum(0, 1, 1, 1)]))
    assert metrics == {"eval/nll": pytest.approx(7 / 4), "eval/perplexity": pytest.approx(math.exp(7 / 4))}


def write_rows(path: Path, count: int) -> str:
    path.write_text("".join(json.dumps({"prompt": f"q{index}", "completion": "a"}) + "\n" for index in range(count)))
    return str(path)


def test_held_out_conversations_are_never_trained_on(tmp_path):
    path, other = write_rows(tmp_path / "a.jsonl", 10), write_rows(tmp_path / "b.jsonl", 3)
    data = {"kind": "conversations", "train_path": path, "num_test": 4}
    train_rows, test_rows = sft.load(config_for(tmp_path, data=data))
    assert [len(train_rows), len(test_rows)] == [6, 4] and not {where for where, _ in train_rows} & {where for where, _ in test_rows}
    train_rows, test_rows = sft.load(config_for(tmp_path, data=data | {"num_train": 2}))
    assert [where.rsplit(":", 1)[1] for where, _ in train_rows] == ["1", "2"] and len(test_rows) == 4
    train_rows, test_rows = sft.load(config_for(tmp_path, data=data | {"test_path": other, "num_test": 2}))
    assert len(train_rows) == 10 and [where.rsplit(":", 1)[0] for where, _ in test_rows] == [other, other]
    with pytest.raises(ConfigError, match=r"10 conversations, of which data\.num_test would hold out 10"):
        sft.load(config_for(tmp_path, data=data | {"num_test": 10}))


def test_what_a_config_refuses(tmp_path):
    with pytest.raises(ValueError, match="set one of the two"):
        config_for(tmp_path, batch={"tokens": 100, "conversations": 2})
    with pytest.raises(ValueError, match="test_path is set but train_path is not"):
        config_for(tmp_path, data={"kind": "conversations", "test_path": "x"})
    assert config_for(tmp_path, data={"kind": "conversations", "train_path": "x"}).files()["data.train_path"] == "x"
