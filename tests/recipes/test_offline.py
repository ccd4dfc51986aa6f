"""Training on a file: on real engines and a tiny random transformer, and what the file's rewards become."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path

import pytest

from ptlab import runlog
from ptlab.config import OfflineConfig, RlConfig
from ptlab.errors import ConfigError
from ptlab.local import open_service
from ptlab.recipes import held_out, offline
from ptlab.recipes.collect import collect
from ptlab.rl import rollout
from ptlab.rl.rollout_file import read_rollouts
from ptlab.rl.types import Trajectory, TrajectoryGroup, Transition
from ptlab.runlog import RunLog
from ptlab.types import ModelInput

ENV = {"kind": "addition", "groups_per_step": 3, "group_size": 4, "num_test": 3, "reward": "random"}


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr(runlog, "draw_curves", lambda *args, **kwargs: None)  # a second each, and not the question here


def common(model_dir: Path) -> dict[str, object]:
    return {
        "name": "run",
        "model": {"name": "tiny", "path": str(model_dir), "renderer": "chatml"},
        "lora": {"rank": 4},
        "rollout": {"max_tokens": 6},
        "engines": {"sampler": {"kind": "torch"}},
    }


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory, tiny_qwen3_dir) -> Path:
    directory = tmp_path_factory.mktemp("collected")
    config = RlConfig.model_validate(common(tiny_qwen3_dir) | {"run_dir": str(directory), "env": ENV})
    path = directory / "r.jsonl"
    with open_service(config) as service:
        asyncio.run(collect(config, service.client, path, num_rollouts=30, report=lambda line: None))
    return path


def train(directory: Path, model_dir: Path, path: Path | None, *, resume: bool = False, **changes) -> list[dict[str, float]]:
    sections = {
        "run_dir": str(directory),
        "steps": 4,
        "data": {"path": None if path is None else str(path), "groups_per_step": 2},
        "optim": {"learning_rate": 0.01, "schedule": "linear"},
        "eval": {"every": 2},
        "checkpoint": {"every": 2},
    }
    config = OfflineConfig.model_validate(common(model_dir) | sections | changes)
    with RunLog.open(config, resume=resume, echo=lambda line: None) as log, open_service(config) as service:
        asyncio.run(offline.run(config, service.client, log))
    return [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]


def without_clock(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if not key.startswith(("time/", "sync/"))} for row in rows]


def test_collecting_goes_group_by_group_and_is_the_same_every_time(rollouts, tiny_qwen3_dir, tmp_path):
    file = read_rollouts(rollouts)
    assert [len(group.trajectories_G) for group in file.groups] == [4] * 8  # 30 attempts are 8 groups of 4
    assert file.header.env["kind"] == "addition" and file.header.rollout["max_tokens"] == 6 and file.header.weights is None
    prompts = {tuple(group.trajectories_G[0].transitions[0].observation.to_ints()) for group in file.groups}
    assert len(prompts) == 8
    config = RlConfig.model_validate(common(tiny_qwen3_dir) | {"run_dir": str(tmp_path), "env": ENV})
    with open_service(config) as service:
        partial = tmp_path / "again.jsonl.partial"
        partial.write_bytes(b"".join(rollouts.read_bytes().splitlines(keepends=True)[:19]))  # killed in the fifth group
        asyncio.run(collect(config, service.client, tmp_path / "again.jsonl", num_rollouts=30, report=lambda line: None))
    rows, again = ([json.loads(line) for line in path.read_text().splitlines()] for path in (rollouts, tmp_path / "again.jsonl"))
    assert rows[0] == again[0] and len(rows) == len(again)
    for row, other in zip(rows[1:-1], again[1:-1], strict=True):
        assert [turn["action"] for turn in row["turns"]] == [turn["action"] for turn in other["turns"]]
        assert row["turns"][0]["observation"] == other["turns"][0]["observation"] and row["reward"] == other["reward"]


def test_a_resumed_run_is_the_unbroken_one_and_samples_for_evaluation_only(rollouts, tiny_qwen3_dir, tmp_path, monkeypatch):
    asked: list[int] = []
    real = rollout.run_groups

    async def counted(builders_P, *args, **kwargs):
        asked.append(len(builders_P))
        return await real(builders_P, *args, **kwargs)

    monkeypatch.setattr("ptlab.rl.evaluation.run_groups", counted)
    monkeypatch.setattr("ptlab.recipes.collect.run_groups", None)
    whole = train(tmp_path / "a", tiny_qwen3_dir, rollouts)
    assert [row["step"] for row in whole] == [0, 1, 2, 3, 4] and asked == [3] * 6  # greedy and not, three times
    assert all("gap/kl_sampler_trainer_nats" in row and "loss/sum" in row for row in whole[:4])
    assert abs(whole[0]["gap/kl_k3_nats"]) < 1e-6 < whole[3]["gap/kl_k3_nats"]  # it leaves who sampled

    with monkeypatch.context() as patch:
        kept = held_out.HeldOut.of_trainer
        calls: list[int] = []

        async def dies(self, training_client, log, step):
            calls.append(step)
            if step == 4:
                raise KeyboardInterrupt
            return await kept(self, training_client, log, step)

        patch.setattr(held_out.HeldOut, "of_trainer", dies)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "b", tiny_qwen3_dir, rollouts)
    resumed = train(tmp_path / "b", tiny_qwen3_dir, rollouts, resume=True)
    for row, other in zip(without_clock(resumed), without_clock(whole), strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("loss", ["importance_sampling", "ppo", "cispo", "gspo", "cross_entropy", "stable_reinforce"])
def test_every_loss_trains_on_a_file(rollouts, tiny_qwen3_dir, tmp_path, loss):
    rows = train(tmp_path, tiny_qwen3_dir, rollouts, loss={"name": loss}, eval={"every": 0}, steps=2)
    assert len(rows) == 2 and all(row["batch/datums"] > 0 and row["optim/grad_norm"] > 0 for row in rows)


def test_without_a_file_one_is_collected_and_found_again(tiny_qwen3_dir, tmp_path, monkeypatch):
    changes = {"env": ENV, "data": {"num_rollouts": 12, "groups_per_step": 2}, "eval": {"every": 0}, "steps": 1}
    first = train(tmp_path, tiny_qwen3_dir, None, **changes)
    [path] = tmp_path.glob("rollouts-*.jsonl")
    monkeypatch.setattr(offline, "collect", None)
    (tmp_path / "run" / "config.yaml").unlink()
    assert without_clock(train(tmp_path, tiny_qwen3_dir, None, **changes)) == without_clock(first)
    assert read_rollouts(path).num_trajectories == 12


# ------------------------------------------------------------------------------------------------------------ without a model


def group(*rewards: float) -> TrajectoryGroup:
    trajectories = [
        Trajectory(
            transitions=[
                Transition(
                    observation=ModelInput.from_ints([1, 2]),
                    action=[3 + index, 9],
                    sampling_logprobs_T=[-0.5, -0.25],
                    policy_version=0,
                    stop_reason="stop",
                    reward=reward,
                    episode_done=True,
                )
            ],
            stop_reason="done",
        )
        for index, reward in enumerate(rewards)
    ]
    return TrajectoryGroup(trajectories_G=trajectories, final_rewards_G=[0.0] * len(rewards), metrics_G=[{}] * len(rewards))


def config_of(**changes) -> OfflineConfig:
    return OfflineConfig.model_validate({"name": "run", "data": {"path": "r.jsonl"}} | changes)


def graded(groups, **changes):
    return offline.graded_groups(groups, config_of(**changes), Path("r.jsonl"))


def test_advantages_are_rewards_above_their_group_or_above_the_file():
    groups = [group(1.0, 0.0), group(1.0, 1.0), group(0.0, 0.0, 0.0, 1.0)]
    assert [item.advantages_G for item in graded(groups)] == [[0.5, -0.5], [-0.25, -0.25, -0.25, 0.75]]  # agreeing groups teach nothing
    by_file = graded(groups, data={"path": "r.jsonl", "baseline": "file_mean"})
    assert [item.advantages_G for item in by_file] == [[0.5, -0.5], [0.5, 0.5], [-0.5, -0.5, -0.5, 0.5]]
    with pytest.raises(ConfigError, match="baseline=file_mean"):
        graded([group(1.0, 1.0), group(0.0, 0.0)])


def test_cross_entropy_imitates_what_is_above_the_baseline():
    [item] = graded([group(1.0, 0.0)], loss={"name": "cross_entropy"})
    [datum] = offline.offline_datums(item, "cross_entropy")
    assert datum.model_input.to_ints() == [1, 2, 3] and set(datum.loss_fn_inputs) == {"target_tokens", "weights"}
    assert datum.loss_fn_inputs["weights"].to_numpy().tolist() == [0.0, 1.0, 1.0]
    assert len(offline.offline_datums(item, "dro")) == 2
    below = {"path": "r.jsonl", "baseline": "file_mean"}
    assert len(graded([group(0.0, 0.0), group(1.0, 1.0)], data=below, loss={"name": "cross_entropy"})) == 1


def test_the_control_deals_the_same_rewards_to_others():
    rewards_P = [[float(i + j) for j in range(3)] for i in range(0, 30, 3)]
    dealt = offline.dealt_anew(rewards_P, seed=1)
    assert [len(row) for row in dealt] == [3] * 10 and dealt != rewards_P and dealt == offline.dealt_anew(rewards_P, seed=1)
    assert sorted(itertools.chain(*dealt)) == sorted(itertools.chain(*rewards_P))
    assert dealt != offline.dealt_anew(rewards_P, seed=2)
    groups = [group(*(float(i % 2) for i in range(4))) for _ in range(10)]
    control = graded(groups, data={"path": "r.jsonl", "shuffle_rewards": True})
    assert any(list(item.rewards_G) != item.group.rewards_G for item in control)


def test_a_file_of_another_model_or_task_is_refused(rollouts):
    header = read_rollouts(rollouts).header
    with pytest.raises(ConfigError, match="was sampled from 'tiny'"):
        offline.check_model(config_of(), header, rollouts)
    assert offline.env_of(header, rollouts).num_test == 3
    with pytest.raises(ConfigError, match="env 'chess' is not one of this version"):
        offline.env_of(header.model_copy(update={"env": {"kind": "chess"}}), rollouts)


def test_a_config_needs_a_file_or_a_task():
    for data, message in (({}, "data.path and env are both missing"), ({"path": "r.jsonl"}, None)):
        if message is None:
            assert config_of(data=data).loss.name == "dro"
        else:
            with pytest.raises(ValueError, match=message):
                config_of(data=data)
