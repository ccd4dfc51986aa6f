"""What the values of a rollout add up to."""

from __future__ import annotations

import asyncio

import pytest

from ptlab.rl.types import EnvGroupBuilder, Trajectory, TrajectoryGroup, Transition
from ptlab.types import ModelInput


def turn(reward: float, tokens: int) -> Transition:
    return Transition(
        observation=ModelInput.from_ints([1]),
        action=[2] * tokens,
        sampling_logprobs_T=[-1.0] * tokens,
        policy_version=None,
        stop_reason="stop",
        reward=reward,
        episode_done=False,
    )


def test_a_trajectory_earns_its_steps_and_its_share_of_the_group():
    one = Trajectory(transitions=[turn(0.5, 3), turn(0.25, 2)], stop_reason="done")
    two = Trajectory(transitions=[], stop_reason="timeout")
    group = TrajectoryGroup(trajectories_G=[one, two], final_rewards_G=[1.0, -1.0], metrics_G=[{}, {}])
    assert group.rewards_G == group.get_total_rewards() == [1.75, -1.0]
    assert (one.num_sampled_tokens, two.num_sampled_tokens) == (5, 0)


def test_lists_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="1 trajectories, 0 final rewards and 1 metrics"):
        TrajectoryGroup(trajectories_G=[Trajectory(transitions=[], stop_reason="done")], final_rewards_G=[], metrics_G=[{}])


def test_a_builder_pays_nothing_on_top_unless_it_says_so():
    class Builder(EnvGroupBuilder):
        async def make_envs(self):
            return []

    empty = Trajectory(transitions=[], stop_reason="done")
    assert asyncio.run(Builder().compute_group_rewards([empty, empty], [])) == [(0.0, {}), (0.0, {})]
    assert Builder().logging_tags() == []
