"""The whole loop on the real backend and clients, with engines that are a unigram model: what is learnt, skipped, logged and resumed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ptlab import runlog
from ptlab.backend.backend import Backend
from ptlab.client.connection import BackendConnection
from ptlab.client.service import ServiceClient
from ptlab.config import RlConfig
from ptlab.engines.protocols import Engines
from ptlab.engines.scripted import ScriptedSampler, ScriptedTrainer, base_logits
from ptlab.envs.addition import AdditionConfig
from ptlab.envs.env_section import TaskSetting
from ptlab.errors import EngineError
from ptlab.recipes import rl
from ptlab.rl import rollout
from ptlab.rl.advantages import group_centred
from ptlab.rl.types import Env, EnvGroupBuilder, RLDataset, StepResult, Task
from ptlab.runlog import RunLog
from ptlab.types import ModelInput

WANTED = 3


class Tokenizer:
    def decode(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))


@dataclass
class WantedTokenEnv(Env):
    """Pays the share of sampled tokens that are WANTED."""

    builder: UnigramBuilder

    async def initial_observation(self):
        return ModelInput.from_ints([0, 1]), None

    async def step(self, action, *, extra=None):
        self.builder.on_step(self.builder.step)
        share = action.count(WANTED) / len(action)
        return StepResult(
            reward=1.0 if self.builder.constant else share,
            episode_done=True,
            next_observation=ModelInput.empty(),
            next_stop_condition=None,
            metrics={"correct": float(share > 0.5)},
        )


@dataclass
class UnigramBuilder(EnvGroupBuilder):
    step: int = 0
    group_size: int = 1
    constant: bool = False
    on_step: Callable[[int], None] = lambda step: None

    async def make_envs(self):
        return [WantedTokenEnv(self) for _ in range(self.group_size)]


@dataclass
class UnigramDataset(RLDataset):
    constant_at: frozenset[int] = frozenset()
    on_step: Callable[[int], None] = lambda step: None
    asked: list[int] = field(default_factory=list)

    def get_batch(self, index):
        self.asked.append(index)
        return [UnigramBuilder(step=index, group_size=8, constant=index in self.constant_at, on_step=self.on_step) for _ in range(4)]

    def __len__(self):
        return 10


def config_for(directory: Path, **changes: Any) -> RlConfig:
    sections = {
        "name": "run",
        "run_dir": str(directory / "runs"),
        "steps": 4,
        "model": {"name": "m", "renderer": "none"},
        "rollout": {"max_tokens": 4},
        "optim": {"learning_rate": 0.3, "schedule": "linear"},
        "eval": {"every": 2},
        "checkpoint": {"every": 2},
    }
    return RlConfig.model_validate(sections | changes)


@contextmanager
def service(directory: Path, sampler: ScriptedSampler | None = None) -> Iterator[ServiceClient]:
    backend = Backend(
        data_dir=directory / "data",
        scratch_dir=directory / "scratch",
        open_engines=lambda name: Engines(trainer=ScriptedTrainer(), sampler=sampler or ScriptedSampler(), tokenizer=Tokenizer()),
        on_metrics=lambda metrics: None,
        base_models=["m"],
    )
    connection = BackendConnection(backend)
    try:
        yield ServiceClient(connection=connection)
    finally:
        connection.submit(backend.close()).result()
        connection.close()


def use_task(monkeypatch: pytest.MonkeyPatch, task: Task) -> None:
    async def make_task(self: AdditionConfig, setting: TaskSetting) -> Task:
        return task

    monkeypatch.setattr(AdditionConfig, "make_task", make_task)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Run the recipe in a fresh process's worth of backend; returns the rows of metrics.jsonl."""
    monkeypatch.setattr(runlog, "draw_curves", lambda *args, **kwargs: None)  # a second each, and not the question here

    def run(dataset: UnigramDataset, *, folder: str = "a", resume: bool = False, sampler: ScriptedSampler | None = None, **changes: Any):
        directory = tmp_path / folder
        monkeypatch.setattr(rl, "run_renderer", lambda model, tokenizer: None)
        use_task(monkeypatch, Task(train=dataset, test_P=[UnigramBuilder() for _ in range(5)]))
        config = config_for(directory, **changes)
        with RunLog.open(config, resume=resume, echo=lambda line: None) as log, service(directory, sampler) as client:
            asyncio.run(and_nothing_is_left(rl.run(config, client, log)))
        return rows(directory)

    return run


async def and_nothing_is_left(work: Coroutine[Any, Any, Any]) -> None:
    [result] = await asyncio.gather(work, return_exceptions=True)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    if isinstance(result, BaseException):
        raise result


def rows(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "runs" / "run" / "metrics.jsonl").read_text().splitlines()]


def without_time(metrics: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in metrics]


@pytest.mark.parametrize("loss", ["importance_sampling", "ppo", "cispo", "dro", "gspo"])
def test_three_steps_raise_the_reward_and_a_wrong_sign_lowers_it(train, monkeypatch, loss):
    settings = {"loss": {"name": loss}, "steps": 3, "optim": {"learning_rate": 0.3}}
    right = train(UnigramDataset(), folder="right", **settings)
    monkeypatch.setattr(rl, "group_centred", lambda rewards_G: [-a for a in group_centred(rewards_G)])
    wrong = train(UnigramDataset(), folder="wrong", **settings)
    assert right[0]["reward/mean"] == wrong[0]["reward/mean"]  # the same first samples
    assert right[2]["reward/mean"] > right[0]["reward/mean"] + 0.05
    assert wrong[2]["reward/mean"] < wrong[0]["reward/mean"] - 0.05


def test_a_row_tells_what_happened_in_its_step(train):
    first, *_, last = train(UnigramDataset())
    assert first["step"] == 0 and last["step"] == 4
    assert (first["groups/total"], first["batch/skipped"], first["answer/tokens_mean"]) == (4, 0, 4.0)
    assert first["optim/learning_rate"] == pytest.approx(0.3) and first["policy/staleness_max_steps"] == 0
    assert abs(first["gap/kl_sampler_trainer_nats"]) < 1e-6 and first["gap/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    evaluated = {"eval/accuracy", "eval/accuracy_greedy", "eval/tokens_mean", "eval/tokens_mean_greedy", "time/eval_s", "time/step_s"}
    assert evaluated | {"reward/std", "loss/sum", "time/sample_s", "time/train_s", "time/sync_s"} <= set(first)
    assert first["time/tokens_per_second"] > 0
    assert set(last) == {"step"} | evaluated


def test_sampler_and_trainer_stay_together_over_the_steps(train):
    metrics = train(UnigramDataset())[:-1]
    assert [row["policy/staleness_max_steps"] for row in metrics] == [0.0] * 4
    assert all(abs(row["gap/max_nats"]) < 1e-5 for row in metrics)
    assert [row["optim/learning_rate"] for row in metrics] == pytest.approx([0.3, 0.225, 0.15, 0.075])


def test_a_batch_where_every_group_agrees_takes_no_step_and_says_so(train):
    metrics = train(UnigramDataset(constant_at=frozenset({1})))
    assert [row["batch/skipped"] for row in metrics[:-1]] == [0, 1, 0, 0]
    assert (metrics[1]["groups/skipped"], metrics[1]["groups/total"]) == (4, 4)
    assert "loss/sum" not in metrics[1] and "time/train_s" not in metrics[1]
    assert metrics[2]["policy/staleness_max_steps"] == 0


def test_without_datums_the_optimizer_is_left_alone(train, monkeypatch):
    def optim_step(self, model_id, adam):
        raise AssertionError("AdamW would decay the weights and advance its moments")

    monkeypatch.setattr(ScriptedTrainer, "optim_step", optim_step)
    metrics = train(UnigramDataset(constant_at=frozenset(range(4))))
    assert [row["batch/skipped"] for row in metrics[:-1]] == [1] * 4


def crash_at(step: int) -> Callable[[int], None]:
    def check(now: int) -> None:
        if now == step:
            raise SystemExit(f"crash in step {now}")

    return check


def test_a_crashed_run_resumes_and_repeats_what_the_unbroken_one_did(train):
    settings = {"steps": 6, "checkpoint": {"every": 2}, "eval": {"every": 3}, "optim": {"learning_rate": 0.1, "updates_per_batch": 2}}
    whole = train(UnigramDataset(constant_at=frozenset({1})), folder="whole", **settings)
    with pytest.raises(SystemExit):
        train(UnigramDataset(constant_at=frozenset({1}), on_step=crash_at(5)), folder="broken", **settings)
    dataset = UnigramDataset(constant_at=frozenset({1}))
    resumed = train(dataset, folder="broken", resume=True, **settings)
    assert dataset.asked == [4, 5]  # from the checkpoint of step 4, not from the crash
    assert without_time(resumed) == without_time(whole)
    assert len(whole) == 7


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_from_which_the_run_goes_on(train, tmp_path, number):
    whole = train(UnigramDataset(), folder="whole")

    def interrupt(step: int) -> None:
        if step == 1 and not sent:
            sent.append(step)
            os.kill(os.getpid(), number)

    sent: list[int] = []
    before = signal.getsignal(signal.SIGTERM)
    stopped = train(UnigramDataset(on_step=interrupt), folder="stopped", checkpoint={"every": 0})
    assert len(stopped) in (1, 2)
    assert signal.getsignal(signal.SIGTERM) == before
    states = [json.loads(line) for line in (tmp_path / "stopped" / "runs" / "run" / "checkpoints.jsonl").read_text().splitlines()]
    assert [state["step"] for state in states] in ([1], [2])
    resumed = train(UnigramDataset(), folder="stopped", resume=True, checkpoint={"every": 0})
    assert without_time(resumed) == without_time(whole)


def test_a_signal_while_training_ends_the_run_after_that_step(train, tmp_path, monkeypatch):
    whole = train(UnigramDataset(), folder="whole")
    forward_backward, calls = ScriptedTrainer.forward_backward, []

    def interrupting(self, model_id, data, loss):
        calls.append(model_id)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        return forward_backward(self, model_id, data, loss)

    monkeypatch.setattr(ScriptedTrainer, "forward_backward", interrupting)
    assert len(train(UnigramDataset(), folder="stopped", checkpoint={"every": 0})) == 2
    states = [json.loads(line) for line in (tmp_path / "stopped" / "runs" / "run" / "checkpoints.jsonl").read_text().splitlines()]
    assert [state["step"] for state in states] == [2]
    resumed = train(UnigramDataset(), folder="stopped", resume=True, checkpoint={"every": 0})
    assert without_time(resumed) == without_time(whole)


def ahead(steps: int) -> dict[str, dict[str, int]]:
    return {"rollout": {"max_tokens": 4, "max_steps_off_policy": steps}}


@pytest.mark.parametrize(("k", "ages"), [(0, [0, 0, 0, 0, 0]), (1, [0, 1, 1, 1, 1]), (2, [0, 1, 2, 2, 2]), (9, [0, 1, 2, 3, 4])])
def test_a_batch_is_trained_on_at_most_k_steps_after_its_weights(train, k, ages):
    *metrics, last = train(UnigramDataset(), steps=5, **ahead(k))
    assert [row["policy/staleness_max_steps"] for row in metrics] == ages
    assert [row["policy/staleness_mean_steps"] for row in metrics] == ages  # a batch is of one version
    assert [row["gap/max_nats"] > 1e-3 for row in metrics] == [age > 0 for age in ages]
    assert (metrics[0]["eval/accuracy_greedy"], last["eval/accuracy_greedy"]) == (0.0, 1.0)  # and it learns


@pytest.mark.parametrize(("k", "ages"), [(0, [0, 0, 0, 0]), (1, [0, 4, 4, 4])])
def test_four_updates_per_batch_are_four_steps_of_the_optimizer(train, k, ages):
    *metrics, last = train(UnigramDataset(), optim={"learning_rate": 0.1, "updates_per_batch": 4}, **ahead(k))
    assert [row["optim/updates"] for row in metrics] == [4.0] * 4
    assert [row["policy/staleness_max_steps"] for row in metrics] == ages  # of the batch as its first update finds it
    assert all(row["gap/max_nats"] > 1e-3 for row in metrics)  # the later minibatches meet weights that did not sample them
    assert (metrics[0]["eval/accuracy_greedy"], last["eval/accuracy_greedy"]) == (0.0, 1.0)


def test_a_corrected_batch_is_compared_with_the_trainer_by_its_loss_and_with_the_sampler_by_the_gap(train):
    stale = train(UnigramDataset(), correction={"kind": "truncate", "high": 1.1}, **ahead(1))[1]
    assert stale["loss/ratio_max"] == pytest.approx(1.0, abs=1e-6) and stale["gap/max_nats"] > 1e-3
    assert stale["correction/ratio_max"] == pytest.approx(stale["gap/ratio_max"], rel=1e-4) and stale["correction/truncated_frac"] > 0


def test_a_batch_that_took_no_step_ages_nobody(train):
    metrics = train(UnigramDataset(constant_at=frozenset({1})), **ahead(1))[:-1]
    assert [row["policy/staleness_max_steps"] for row in metrics] == [0, 1, 0, 1]


def test_the_importance_weights_use_the_log_probabilities_of_the_version_that_sampled(train, monkeypatch):
    forward_backward, batches = ScriptedTrainer.forward_backward, []

    def noting(self, model_id, data, loss):
        batches.append(data)
        return forward_backward(self, model_id, data, loss)

    monkeypatch.setattr(ScriptedTrainer, "forward_backward", noting)
    train(UnigramDataset(), steps=3, **ahead(1))
    base_logprobs_V = base_logits(8).log_softmax(0).numpy()
    gaps = []
    for data in batches:
        targets, logprobs, advantages = (
            np.concatenate([d.loss_fn_inputs[name].to_numpy() for d in data]) for name in ("target_tokens", "logprobs", "advantages")
        )
        gaps.append(np.abs(logprobs - base_logprobs_V[targets])[advantages != 0].max())
    assert gaps[0] < 1e-6 and gaps[1] < 1e-6 and gaps[2] > 1e-3  # steps 0 and 1 train on draws of version 0, step 2 on version 1's


def test_without_a_step_ahead_nothing_is_sampled_while_training(train, monkeypatch):
    events: list[str] = []
    run_groups, optim_step = rollout.run_groups, ScriptedTrainer.optim_step

    async def noting(builders_P, client, settings, *, seed):
        events.append(f"sample {seed[-1]}")
        groups_P = await run_groups(builders_P, client, settings, seed=seed)
        events.append(f"sampled {seed[-1]}")
        return groups_P

    def training(self, model_id, adam):
        events.append("train")
        return optim_step(self, model_id, adam)

    monkeypatch.setattr(rollout, "run_groups", noting)
    monkeypatch.setattr(ScriptedTrainer, "optim_step", training)
    train(UnigramDataset(), steps=3)
    assert events == [event for s in range(3) for event in (f"sample {s}", f"sampled {s}", "train")]


def test_sampling_ahead_goes_on_while_the_trainer_works(train, monkeypatch):
    """Batch 1 begins to be sampled only when step 0 is training, and step 0 trains until batch 1 is there."""
    training, sampled, met = threading.Event(), threading.Event(), []
    run_groups, forward_backward = rollout.run_groups, ScriptedTrainer.forward_backward

    async def slow_sampling(builders_P, client, settings, *, seed):
        if seed[-1] == 1:
            met.append(await asyncio.to_thread(training.wait, 20))
        groups_P = await run_groups(builders_P, client, settings, seed=seed)
        if seed[-1] == 1:
            sampled.set()
        return groups_P

    def slow_training(self, model_id, data, loss):
        training.set()
        met.append(sampled.wait(20))
        return forward_backward(self, model_id, data, loss)

    monkeypatch.setattr(rollout, "run_groups", slow_sampling)
    monkeypatch.setattr(ScriptedTrainer, "forward_backward", slow_training)
    metrics = train(UnigramDataset(), steps=2, **ahead(1))
    assert met == [True] * 3
    assert metrics[1]["policy/staleness_max_steps"] == 1


def test_a_failure_ahead_ends_the_run_in_the_step_that_needs_the_batch(train, tmp_path, monkeypatch):
    run_groups, failed = rollout.run_groups, []

    async def failing(builders_P, client, settings, *, seed):
        if seed[-1] == 2:
            failed.append(True)
            raise EngineError("out of memory")
        return await run_groups(builders_P, client, settings, seed=seed)

    monkeypatch.setattr(rollout, "run_groups", failing)
    with pytest.raises(EngineError, match="out of memory"):
        train(UnigramDataset(), steps=6, checkpoint={"every": 1}, **ahead(3))
    assert len(rows(tmp_path / "a")) == 2 and failed == [True]  # steps 0 and 1 were not touched, their checkpoints neither
    monkeypatch.undo()


def test_a_run_that_sampled_ahead_resumes_with_fresh_samples(train):
    settings = {"steps": 6, "checkpoint": {"every": 2}, **ahead(1)}
    whole = train(UnigramDataset(), folder="whole", **settings)
    with pytest.raises(SystemExit):
        train(UnigramDataset(on_step=crash_at(5)), folder="broken", **settings)
    dataset = UnigramDataset()
    resumed = train(dataset, folder="broken", resume=True, **settings)
    assert dataset.asked == [4, 5]
    assert without_time(resumed)[:4] == without_time(whole)[:4]
    assert [row["policy/staleness_max_steps"] for row in resumed[:-1]] == [0, 1, 1, 1, 0, 1]


def test_a_signal_abandons_what_was_sampled_ahead(train, tmp_path):
    def interrupt(step: int) -> None:
        if step == 3 and not sent:
            sent.append(step)
            os.kill(os.getpid(), signal.SIGINT)

    sent: list[int] = []
    done = len(train(UnigramDataset(on_step=interrupt), folder="stopped", **ahead(2)))
    assert done in (1, 2)  # batch 3 is drawn while step 1 waits or trains
    assert [row["step"] for row in train(UnigramDataset(), folder="stopped", resume=True, **ahead(2))] == [0, 1, 2, 3, 4]


def test_a_finished_run_can_be_resumed_to_more_steps(train):
    settings = {"optim": {"learning_rate": 0.3}}
    whole = train(UnigramDataset(), folder="whole", steps=4, **settings)
    train(UnigramDataset(), folder="short", steps=2, **settings)
    assert without_time(train(UnigramDataset(), folder="short", resume=True, steps=4, **settings)) == without_time(whole)


def test_eval_and_checkpoints_can_be_switched_off(train, tmp_path):
    metrics = train(UnigramDataset(), eval={"every": 0}, checkpoint={"every": 0})
    assert len(metrics) == 4 and not any("eval/accuracy" in row for row in metrics)
    states = [json.loads(line) for line in (tmp_path / "a" / "runs" / "run" / "checkpoints.jsonl").read_text().splitlines()]
    assert [(state["step"], state["kind"]) for state in states] == [(4, "state"), (4, "sampler")]
    assert states[1]["path"].endswith("/sampler_weights/final")


def test_transcripts_ask_the_same_questions_before_and_after(train, tmp_path):
    train(UnigramDataset())
    transcripts = [json.loads(line) for line in (tmp_path / "a" / "runs" / "run" / "transcripts.jsonl").read_text().splitlines()]
    evals = [row for row in transcripts if row["split"] == "eval"]
    assert {row["step"] for row in evals} == {0, 2, 4}
    assert evals[0]["response"] == "7 7 7 7"  # greedy: the base's likeliest token
    assert evals[-1]["response"] == "3 3 3 3"
    assert {row["split"] for row in transcripts} == {"train", "eval"}


def test_a_sampler_that_fails_ends_the_run_with_its_error(train):
    class Broken(ScriptedSampler):
        async def sample(self, call):
            if call.num_samples == 8:
                raise EngineError("out of memory")
            return await super().sample(call)

    with pytest.raises(EngineError, match="out of memory"):
        train(UnigramDataset(), sampler=Broken())


def test_side_metrics_join_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(runlog, "draw_curves", lambda *args, **kwargs: None)
    monkeypatch.setattr(rl, "run_renderer", lambda model, tokenizer: None)
    use_task(monkeypatch, Task(train=UnigramDataset(), test_P=[UnigramBuilder()]))
    config = config_for(tmp_path, steps=1)
    with RunLog.open(config, echo=lambda line: None) as log, service(tmp_path) as client:
        asyncio.run(rl.run(config, client, log, side_metrics=lambda: {"sync/version": 1.0}))
    assert [row["sync/version"] for row in rows(tmp_path)] == [1.0, 1.0]
