"""The penalty on leaving a reference: its value by hand, what it leaves alone, and what it refuses."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from ptlab.errors import EngineError, InvalidRequestError
from ptlab.rl import datums
from ptlab.rl.kl_penalty import add_kl_penalty
from ptlab.rl.types import Trajectory, TrajectoryGroup, Transition
from ptlab.types import ModelInput


def trajectory(observation: list[int], action: list[int], logprobs: list[float]) -> Trajectory:
    turn = Transition(
        observation=ModelInput.from_ints(observation), action=action, sampling_logprobs_T=logprobs, policy_version=0, stop_reason="stop",
        reward=0.0, episode_done=True,
    )  # fmt: skip
    return Trajectory(transitions=[turn], stop_reason="done")


def group(*trajectories: Trajectory) -> TrajectoryGroup:
    nothing = [0.0] * len(trajectories)
    return TrajectoryGroup(trajectories_G=trajectories, final_rewards_G=nothing, metrics_G=[{} for _ in trajectories])


class Reference:
    """log p of a token is minus a hundredth of its id."""

    def __init__(self, short: int = 0) -> None:
        self.short = short

    async def compute_logprobs(self, prompt: ModelInput) -> list[float | None]:
        tokens = prompt.to_ints()
        return [None, *(-token / 100 for token in tokens[1:])][: len(tokens) - self.short]


def penalised(data, coef: float = 2.0, reference: Reference | None = None):
    return asyncio.run(add_kl_penalty(data, reference or Reference(), coef))


def test_each_sampled_token_pays_for_its_distance_from_the_reference_around_the_mean():
    attempts = group(trajectory([5, 6], [10, 20], [-0.5, -0.2]), trajectory([5, 6], [30], [-1.0]))
    data = datums.group_to_datums(attempts, [1.0, -1.0], mark_sampled=True)
    paid, metrics = penalised(data)
    away = np.array([-0.5 + 0.10, -0.2 + 0.20, -1.0 + 0.30])  # log q - log p_ref of the three sampled tokens
    wanted = np.array([1.0, 1.0, -1.0]) - 2.0 * (away - away.mean())
    np.testing.assert_allclose(paid[0].loss_fn_inputs["advantages"].to_numpy(), [0.0, *wanted[:2]], atol=1e-6)
    np.testing.assert_allclose(paid[1].loss_fn_inputs["advantages"].to_numpy(), [0.0, wanted[2]], atol=1e-6)
    assert metrics["kl/policy_reference_nats"] == pytest.approx(away.mean())
    assert metrics["kl/advantage_std"] == pytest.approx(2.0 * away.std())
    for datum, before in zip(paid, data, strict=True):
        assert set(datum.loss_fn_inputs) == {"target_tokens", "logprobs", "advantages"}
        assert datum.model_input == before.model_input
        assert (datum.loss_fn_inputs["logprobs"].to_numpy() == before.loss_fn_inputs["logprobs"].to_numpy()).all()


def test_attempts_that_agree_are_kept_because_the_penalty_differs_between_their_tokens():
    agreed = group(trajectory([5], [10], [-0.5]), trajectory([5], [30], [-0.5]))
    assert datums.group_to_datums(agreed, [0.0, 0.0]) == []
    paid, _ = penalised(datums.group_to_datums(agreed, [0.0, 0.0], mark_sampled=True), coef=1.0)
    assert [datum.loss_fn_inputs["advantages"].to_numpy()[-1] for datum in paid] == pytest.approx([0.1, -0.1])


def test_a_sampled_token_of_probability_one_pays_too():
    """Its log-probability is 0.0, like that of a prompt token: only the mark tells them apart."""
    sure = group(trajectory([5], [10], [0.0]), trajectory([5], [30], [0.0]))
    paid, _ = penalised(datums.group_to_datums(sure, [0.0, 0.0], mark_sampled=True), coef=1.0)
    assert [datum.loss_fn_inputs["advantages"].to_numpy()[-1] for datum in paid] == pytest.approx([0.1, -0.1])


def test_unmarked_datums_and_a_reference_that_scores_too_little_are_refused():
    attempts = group(trajectory([5], [10, 11], [-0.5, -0.5]))
    with pytest.raises(InvalidRequestError, match="mark_sampled=True"):
        penalised(datums.group_to_datums(attempts, [1.0]))
    with pytest.raises(EngineError, match="scored 1 of 2 tokens"):
        penalised(datums.group_to_datums(attempts, [1.0], mark_sampled=True), reference=Reference(short=1))
    assert penalised([]) == ([], {})
