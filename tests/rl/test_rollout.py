"""Rollouts against a sampler that answers from a script: what is in flight, which seeds are used, what cuts an attempt off, and that a
broken environment costs its own trajectory only."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from ptlab.errors import EngineError, EnvError
from ptlab.rl.rollout import RolloutSettings, run_groups
from ptlab.rl.types import Env, EnvGroupBuilder, Metrics, StepResult, Trajectory
from ptlab.types import ModelInput, SampledSequence, SampleResponse, SamplingParams

SETTINGS = RolloutSettings(max_tokens=4, max_turns=3)


@dataclass
class ScriptedClient:
    """Draw i of a request is [seed mod 97 + i, 99]: a function of the seed, as a sampler's is. Knows how many requests overlapped."""

    delay_s: float = 0.0
    calls: list[tuple[list[int], int, SamplingParams]] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    fails: bool = False
    stop_reason: str = "stop"

    async def sample(self, prompt: ModelInput, num_samples: int, sampling_params: SamplingParams) -> SampleResponse:
        self.calls.append((prompt.to_ints(), num_samples, sampling_params))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        await asyncio.sleep(self.delay_s)
        self.in_flight -= 1
        if self.fails:
            raise EngineError("the sampler broke")
        seed = sampling_params.seed
        assert seed is not None
        drawn = [[seed % 97 + i, 99] for i in range(num_samples)]
        about = {"stop_reason": self.stop_reason, "sequence_id": "s", "policy_version": 7}
        return SampleResponse(sequences=[SampledSequence.from_lists(tokens, [-0.5, -0.25], **about) for tokens in drawn])


@dataclass
class CountingEnv(Env):
    """Ends after `turns` turns, pays 1.0 for each; the next observation is all so far plus token 50."""

    prompt: list[int]
    turns: int = 1
    breaks: str = ""
    reward: float = 1.0
    delay_s: float = 0.0
    seen: list[tuple[list[int], str | None]] = field(default_factory=list)

    async def initial_observation(self):
        if self.breaks == "initial_observation":
            raise ValueError("no such problem")
        return ModelInput.from_ints(self.prompt), [99]

    async def step(self, action, *, extra=None):
        await asyncio.sleep(self.delay_s)
        if self.breaks == "step":
            raise ValueError("bad table")
        self.seen.append((action, (extra or {}).get("stop_reason")))
        self.prompt = [*self.prompt, *action, 50]
        return StepResult(
            reward=self.reward,
            episode_done=len(self.seen) >= self.turns,
            next_observation=ModelInput.from_ints(self.prompt),
            next_stop_condition=[99],
            metrics={"turn": len(self.seen)},
        )


@dataclass
class Builder(EnvGroupBuilder):
    make: Callable[[], Sequence[Env]]
    group_rewards: Callable[[int], list[tuple[float, Metrics]]] | None = None
    cleaned: int = 0
    cleanup_breaks: bool = False

    async def make_envs(self):
        return self.make()

    async def compute_group_rewards(self, trajectory_group: list[Trajectory], env_group: Sequence[Env]):
        assert len(trajectory_group) == len(env_group)
        return self.group_rewards(len(trajectory_group)) if self.group_rewards else [(0.0, {}) for _ in trajectory_group]

    async def cleanup(self):
        self.cleaned += 1
        if self.cleanup_breaks:
            raise OSError("container is gone")


def roll(builders, client, settings=SETTINGS, seed=(0, "train", 0)):
    return asyncio.run(run_groups(builders, client, settings, seed=seed))


def same_prompt(turns=1, n=3, **kwargs) -> Builder:
    return Builder(lambda: [CountingEnv([1, 2], turns=turns, **kwargs) for _ in range(n)])


def test_attempts_that_begin_alike_are_one_request_for_g_samples():
    client = ScriptedClient()
    [group] = roll([same_prompt(n=3)], client)
    assert [(prompt, n) for prompt, n, _ in client.calls] == [([1, 2], 3)]
    params = client.calls[0][2]
    assert (params.max_tokens, params.stop, params.temperature, params.top_k, params.top_p) == (4, [99], 1.0, -1, 1.0)
    first = params.seed % 97
    assert [list(t.transitions[0].action) for t in group.trajectories_G] == [[first, 99], [first + 1, 99], [first + 2, 99]]
    transition = group.trajectories_G[0].transitions[0]
    assert (list(transition.sampling_logprobs_T), transition.policy_version, transition.stop_reason) == ([-0.5, -0.25], 7, "stop")
    assert transition.observation.to_ints() == [1, 2]
    assert group.rewards_G == [1.0, 1.0, 1.0]


def test_attempts_that_begin_differently_are_a_request_each():
    client = ScriptedClient()
    roll([Builder(lambda: [CountingEnv([1]), CountingEnv([2])])], client)
    assert sorted((prompt, n) for prompt, n, _ in client.calls) == [([1], 1), ([2], 1)]
    assert len({params.seed for _, _, params in client.calls}) == 2


def test_all_attempts_of_all_groups_are_in_flight_at_once():
    client = ScriptedClient(delay_s=0.05)
    roll([Builder(lambda: [CountingEnv([1]), CountingEnv([2]), CountingEnv([3])]) for _ in range(4)], client)
    assert client.most_in_flight == 12


def test_later_turns_continue_each_attempt_with_its_own_seed():
    client = ScriptedClient()
    [group] = roll([same_prompt(turns=3, n=2)], client)
    assert [n for _, n, _ in client.calls] == [2, 1, 1, 1, 1]
    assert len({params.seed for _, _, params in client.calls}) == 5
    for trajectory in group.trajectories_G:
        first, second, third = trajectory.transitions
        assert second.observation.to_ints() == [1, 2, *first.action, 50]
        assert third.observation.to_ints() == [1, 2, *first.action, 50, *second.action, 50]
        assert trajectory.stop_reason == "done"
    assert group.rewards_G == [3.0, 3.0]


def test_the_same_place_in_a_run_draws_the_same_tokens_and_another_place_others():
    def tokens(seed):
        groups = roll([same_prompt(turns=3) for _ in range(2)], ScriptedClient(), seed=seed)
        return [[list(turn.action) for turn in t.transitions] for group in groups for t in group.trajectories_G]

    assert tokens((0, "train", 5)) == tokens((0, "train", 5))
    assert tokens((0, "train", 5)) != tokens((0, "train", 6))
    assert tokens((0, "train", 5)) != tokens((1, "train", 5))
    first, second = tokens((0, "train", 5))[:3], tokens((0, "train", 5))[3:]
    assert first != second  # two problems of one step


def test_limits_cut_an_attempt_off_and_say_which():
    [group] = roll([same_prompt(turns=9, n=1)], ScriptedClient())
    assert (group.trajectories_G[0].stop_reason, len(group.trajectories_G[0].transitions)) == ("max_turns", 3)
    client = ScriptedClient()
    tight = RolloutSettings(max_tokens=4, max_turns=9, max_trajectory_tokens=7)  # [1, 2] + 2 + [50] = 5, room for 2; then 8
    [group] = roll([same_prompt(turns=9, n=1)], client, tight)
    assert [params.max_tokens for _, _, params in client.calls] == [4, 2]
    assert (group.trajectories_G[0].stop_reason, group.rewards_G) == ("max_tokens", [2.0])
    [group] = roll([same_prompt()], client, RolloutSettings(max_tokens=4, max_trajectory_tokens=2))
    assert [(t.stop_reason, list(t.transitions)) for t in group.trajectories_G] == [("max_tokens", [])] * 3
    assert len(client.calls) == 2  # a prompt without room for an answer is not sampled


@pytest.mark.parametrize("slow", ["client", "env"])
def test_the_time_limit_ends_an_attempt_without_an_error(slow):
    client = ScriptedClient(delay_s=5.0 if slow == "client" else 0.0)
    builder = same_prompt(n=2, delay_s=5.0 if slow == "env" else 0.0)
    [group] = roll([builder], client, RolloutSettings(max_tokens=4, timeout_s=0.05))
    assert [(t.stop_reason, list(t.transitions)) for t in group.trajectories_G] == [("timeout", [])] * 2
    assert group.rewards_G == [0.0, 0.0]


def test_the_env_hears_that_an_answer_was_cut_off():
    env = CountingEnv([1])
    roll([Builder(lambda: [env])], ScriptedClient(stop_reason="length"))
    assert env.seen[0][1] == "length"


@pytest.mark.parametrize("where", ["initial_observation", "step"])
def test_an_env_that_raises_costs_its_own_trajectory(where, caplog):
    builder = Builder(lambda: [CountingEnv([1, 2]), CountingEnv([1, 2], breaks=where), CountingEnv([1, 2])])
    broken, whole = roll([builder, same_prompt()], ScriptedClient())
    assert len(broken.trajectories_G) == 2 and broken.rewards_G == [1.0, 1.0]
    [error] = broken.errors
    assert error.error_type == "ValueError" and f"CountingEnv.{where}" in error.error_message
    assert len(whole.trajectories_G) == 3 and whole.errors == []
    assert "trajectory lost" in caplog.text


def test_a_reward_that_is_no_number_is_a_broken_env():
    [group, _] = roll([same_prompt(n=1, reward=math.nan), same_prompt()], ScriptedClient())
    assert group.trajectories_G == [] and "reward is nan" in group.errors[0].error_message


def test_group_rewards_add_to_step_rewards_of_those_that_came_through():
    builder = Builder(
        lambda: [CountingEnv([1]), CountingEnv([2], breaks="step"), CountingEnv([3])],
        group_rewards=lambda n: [(float(i), {"rank": i}) for i in range(n)],
    )
    [group] = roll([builder], ScriptedClient())
    assert group.rewards_G == [1.0, 2.0]
    assert [dict(m) for m in group.metrics_G] == [{"rank": 0}, {"rank": 1}]


@pytest.mark.parametrize("bad", [[], [(math.inf, {})] * 3])
def test_a_builder_that_breaks_costs_its_group(bad):
    lost, whole = roll([Builder(lambda: [CountingEnv([1])] * 3, group_rewards=lambda n: bad), same_prompt()], ScriptedClient())
    assert lost.trajectories_G == [] and len(lost.errors) == 1
    assert len(whole.trajectories_G) == 3


def test_cleanup_runs_once_whatever_happens_and_may_fail():
    def broken() -> Sequence[Env]:
        raise OSError("no sandbox")

    builders = [same_prompt(), Builder(broken), Builder(lambda: [CountingEnv([1])], cleanup_breaks=True)]
    groups = roll(builders, ScriptedClient())
    assert [len(group.trajectories_G) for group in groups] == [3, 0, 1]
    assert [builder.cleaned for builder in builders] == [1, 1, 1]


def test_when_every_attempt_breaks_the_step_fails_and_says_why():
    with pytest.raises(EnvError, match=r"every one of 6 attempts was lost; the first: CountingEnv\.step: ValueError: bad table"):
        roll([same_prompt(breaks="step"), same_prompt(breaks="step")], ScriptedClient())


class SlowToOpen(CountingEnv):
    async def initial_observation(self):
        await asyncio.sleep(30)
        return await super().initial_observation()


def test_a_sampler_that_fails_fails_the_step_and_leaves_nothing_running():
    async def main() -> set[asyncio.Task[object]]:
        before, start = asyncio.all_tasks(), time.monotonic()
        with pytest.raises(EngineError, match="the sampler broke"):
            await run_groups([same_prompt(), Builder(lambda: [SlowToOpen([1])])], ScriptedClient(fails=True), SETTINGS, seed=(0,))
        assert time.monotonic() - start < 10  # cancelled, not waited for
        return asyncio.all_tasks() - before

    assert asyncio.run(main()) == set()


@dataclass
class PlayerEnv(Env):
    """One of two players: waits for the other's move before its own, as in a game."""

    moved: list[asyncio.Event]
    number: int
    closed: list[int]

    async def initial_observation(self):
        if self.number:
            await self.moved[0].wait()
        return ModelInput.from_ints([self.number + 1]), [99]

    async def step(self, action, *, extra=None):
        self.moved[self.number].set()
        if not self.number:
            await self.moved[1].wait()
        nothing = ModelInput.empty()
        return StepResult(reward=1.0, episode_done=True, next_observation=nothing, next_stop_condition=None)

    async def close(self):
        self.closed.append(self.number)


@dataclass
class GameBuilder(EnvGroupBuilder):
    depend: bool
    closed: list[int] = field(default_factory=list)

    async def make_envs(self):
        moved = [asyncio.Event(), asyncio.Event()]
        return [PlayerEnv(moved, number, self.closed) for number in (0, 1)]

    def attempts_depend(self):
        return self.depend


def test_players_of_a_game_wait_for_each_other_without_a_deadlock(monkeypatch, caplog):
    for depend in (True, False):  # False: an environment that does not say so is found out
        monkeypatch.setattr("ptlab.rl.rollout.OPEN_TOGETHER_S", 60.0 if depend else 0.05)
        builder = GameBuilder(depend)
        [group] = asyncio.run(asyncio.wait_for(run_groups([builder], ScriptedClient(), SETTINGS, seed=(0, "game")), 10))
        assert group.rewards_G == [1.0, 1.0] and sorted(builder.closed) == [0, 1]
    assert caplog.text.count("override attempts_depend()") == 1


def test_every_attempt_is_closed_however_it_ended():
    closed: list[str] = []

    class Closing(CountingEnv):
        async def close(self):
            closed.append(self.breaks)
            if self.breaks == "close":
                raise OSError("cannot close")

    envs = [Closing([1], breaks=how) for how in ("", "initial_observation", "step", "close")] + [Closing([1], turns=9, breaks="limit")]
    [group] = asyncio.run(run_groups([Builder(lambda: envs)], ScriptedClient(), SETTINGS, seed=(0, "x")))
    assert sorted(closed) == ["", "close", "initial_observation", "limit", "step"]
    assert len(group.trajectories_G) == 3 and len(group.errors) == 2  # a failing close() costs nothing
    assert group.trajectories_G[-1].stop_reason == "max_turns"


def test_without_a_limit_the_environment_alone_ends_an_attempt():
    settings = RolloutSettings(max_tokens=4)
    [group] = asyncio.run(run_groups([Builder(lambda: [CountingEnv([1], turns=40)])], ScriptedClient(), settings, seed=(0, "x")))
    assert len(group.trajectories_G[0].transitions) == 40
