"""Every number worked out by hand from two small groups."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ptlab.rl import diagnostics
from ptlab.rl.datums import group_to_datums
from ptlab.rl.types import RolloutError, Trajectory, TrajectoryGroup, Transition
from ptlab.types import ForwardBackwardOutput, ModelInput, OptimStepResponse, TensorData


def attempt(reward: float, *, correct: float, tokens: int = 2, stop: str = "stop", version: int | None = 3, **metrics: float) -> Trajectory:
    turn = Transition(
        observation=ModelInput.from_ints([1, 2]),
        action=list(range(10, 10 + tokens)),
        sampling_logprobs_T=[-0.5] * tokens,
        policy_version=version,
        stop_reason=stop,
        reward=reward,
        episode_done=True,
        metrics={"correct": correct, "format": 1.0, **metrics},
        logs={"response": "text"},
    )
    return Trajectory(transitions=[turn], stop_reason="done")


def group(*trajectories: Trajectory, errors: int = 0, tag: str = "sums") -> TrajectoryGroup:
    return TrajectoryGroup(
        trajectories_G=trajectories,
        final_rewards_G=[0.0] * len(trajectories),
        metrics_G=[{}] * len(trajectories),
        errors=[RolloutError(error_type="ValueError", error_message="x")] * errors,
        tags=[tag],
    )


MIXED = group(attempt(1.0, correct=1), attempt(0.0, correct=0, tokens=4, stop="length", slips=6))
ALL_RIGHT = group(attempt(1.0, correct=1), attempt(1.0, correct=1), errors=1)


def output(*logprobs: list[float]) -> ForwardBackwardOutput:
    return ForwardBackwardOutput(
        loss_fn_output_type="ArrayRecord",
        loss_fn_outputs=[{"logprobs": TensorData.from_numpy(np.array(row, dtype=np.float32))} for row in logprobs],
        metrics={"loss:sum": -3.0, "ratio:mean": 1.25},
    )


def test_rewards_answers_and_groups():
    got = diagnostics.summarise([MIXED, ALL_RIGHT], [], None, num_updates=3)
    assert got["reward/mean"] == 0.75 and got["reward/std"] == pytest.approx(math.sqrt(0.1875))
    assert (got["train/accuracy"], got["train/format"], got["env/slips"]) == (0.75, 1.0, 6.0)  # slips: of those that report it
    assert (got["answer/tokens_mean"], got["answer/tokens_max"], got["answer/tokens_sum"]) == (2.5, 4.0, 10.0)
    assert (got["answer/cut_off_frac"], got["answer/limited_frac"], got["policy/entropy_nats"]) == (0.25, 0.0, 0.5)
    assert (got["groups/total"], got["groups/skipped"], got["groups/all_right"], got["groups/all_wrong"]) == (2, 1, 1, 0)
    assert (got["rollout/env_errors"], got["batch/skipped"], got["batch/datums"]) == (1, 1, 0)
    assert "gap/ratio_mean" not in got


def test_gap_is_measured_on_the_sampled_tokens_only():
    data_D = group_to_datums(MIXED, [0.5, -0.5])
    assert [datum.model_input.length for datum in data_D] == [3, 5]
    log2 = math.log(2)
    # position 0 predicts a prompt token: whatever the trainer says there must not count
    got = diagnostics.gap_metrics(data_D, output([-50.0, -0.5, -0.5 + log2], [-50.0, -0.5, -0.5, -0.5, -0.5]))
    assert got["gap/kl_sampler_trainer_nats"] == pytest.approx(-log2 / 6, rel=1e-6)
    assert got["gap/kl_k3_nats"] == pytest.approx((2 - 1 - log2) / 6, rel=1e-6)
    assert got["gap/ratio_mean"] == pytest.approx(7 / 6, rel=1e-6)
    assert (got["gap/ratio_max"], got["gap/ratio_min"], got["gap/max_nats"]) == pytest.approx((2.0, 1.0, log2), rel=1e-6)


def test_gap_reads_the_weights_where_a_datum_has_them():
    data_D = group_to_datums(MIXED, [0.0, -0.5], loss="dro")  # the first trajectory has advantage 0 everywhere
    got = diagnostics.gap_metrics(data_D, output([-50.0, -1.5, -1.5], [-50.0, -0.5, -0.5, -0.5, -0.5]))
    assert got["gap/kl_sampler_trainer_nats"] == pytest.approx(2 / 6)


def test_loss_and_optimizer_metrics_get_area_names():
    data_D = group_to_datums(MIXED, [0.5, -0.5])
    got = diagnostics.summarise([MIXED], data_D, output([0.0] * 3, [0.0] * 5), num_updates=3)
    assert (got["loss/sum"], got["loss/ratio_mean"], got["batch/datums"], got["batch/tokens"]) == (-3.0, 1.25, 2, 8)
    assert got["batch/skipped"] == 0
    assert diagnostics.optim_metrics(OptimStepResponse(metrics={"grad_norm:mean": 2.0})) == {"optim/grad_norm": 2.0}
    assert diagnostics.optim_metrics(OptimStepResponse(metrics=None)) == {}


def test_staleness_counts_optimizer_steps_and_is_absent_when_unknown():
    old = group(attempt(1.0, correct=1, version=1), attempt(0.0, correct=0, version=3))
    assert diagnostics.staleness_metrics([old], 3) == {"policy/staleness_mean_steps": 1.0, "policy/staleness_max_steps": 2.0}
    assert diagnostics.newest_version([old]) == 3
    unknown = group(attempt(1.0, correct=1, version=None))
    assert diagnostics.staleness_metrics([unknown], 3) == {} and diagnostics.newest_version([unknown]) is None


def test_accuracy_counts_broken_attempts_as_wrong():
    assert diagnostics.accuracy([MIXED, ALL_RIGHT]) == 3 / 5
    assert diagnostics.accuracy([]) == 0.0


def test_tags_are_told_apart_only_where_there_are_several():
    assert "reward/sums/mean" not in diagnostics.reward_metrics([MIXED])
    got = diagnostics.reward_metrics([MIXED, group(attempt(0.25, correct=0), tag="words")])
    assert (got["reward/sums/mean"], got["reward/words/mean"]) == (0.5, 0.25)


def test_nothing_sampled_at_all_is_reported_without_a_fault():
    empty = Trajectory(transitions=[], stop_reason="timeout")
    got = diagnostics.summarise([group(empty)], [], None, num_updates=None)
    assert got["answer/tokens_sum"] == 0.0 and got["reward/mean"] == 0.0
    assert [row["prompt"] for row in diagnostics.transcript_rows([group(empty)], "train", str)] == [""]


def test_transcripts_show_the_first_attempt_of_each_group():
    rows = list(diagnostics.transcript_rows([MIXED, ALL_RIGHT], "eval", str))
    assert [(row["split"], row["prompt"], row["response"], row["reward"], row["tokens"]) for row in rows] == [
        ("eval", "[1, 2]", "text", 1.0, 2),
        ("eval", "[1, 2]", "text", 1.0, 2),
    ]
