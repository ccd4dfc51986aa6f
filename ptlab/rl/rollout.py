"""Run P x G attempts at once: observe, sample, step, until the environment ends the attempt or a limit does.

Every sampling request carries a seed made from where it stands in the run (seeds.stable_seed), so a resumed run draws what the
unbroken one would have drawn. An environment that raises costs its own trajectory; a sampler that fails costs the step, because its
answers cannot be trusted to be those of this policy.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from ptlab.errors import EngineError, EnvError
from ptlab.rl.seeds import stable_seed
from ptlab.rl.types import (
    Env,
    EnvGroupBuilder,
    Metrics,
    Observation,
    RolloutError,
    StepResult,
    StopCondition,
    Trajectory,
    TrajectoryGroup,
    TrajectoryStop,
    Transition,
)
from ptlab.types import SampledSequence, SamplingParams

if TYPE_CHECKING:
    from ptlab.client.sampling import SamplingClient

T = TypeVar("T")
OPEN_TOGETHER_S = 10.0
"""How long the attempts of a group wait for each other's first observation, in order to sample their first actions in one request."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSettings:
    """How actions are drawn, and what cuts a trajectory off."""

    max_tokens: int
    """Most tokens per action."""
    temperature: float = 1.0
    """0 = greedy."""
    top_k: int = -1
    top_p: float = 1.0
    max_turns: int | None = None
    """Most actions per trajectory; None = until the environment ends it."""
    max_trajectory_tokens: int | None = None
    """Most tokens of observation and action together, at most what the model's context holds; the last action is cut to what is left.
    None = no limit here, and a prompt that does not fit fails the step."""
    timeout_s: float | None = None
    """Wall clock per trajectory, sampling and environment. What it cuts off depends on the machine's speed, so a resumed run may differ."""


async def run_groups(
    builders_P: Sequence[EnvGroupBuilder], sampling_client: SamplingClient, settings: RolloutSettings, *, seed: tuple[int | str, ...]
) -> list[TrajectoryGroup]:
    """One TrajectoryGroup per builder, in order; all attempts of all groups are in flight at once.

    Args:
        seed: what tells this call from all others of the run, e.g. (run seed, "train", step).

    Raises: what the sampler raises; EnvError if not a single trajectory came through (that is a broken environment, not a broken attempt).
    """
    groups_P = await _gather([run_group(builder, sampling_client, settings, seed=(*seed, p)) for p, builder in enumerate(builders_P)])
    errors = [error for group in groups_P for error in group.errors]
    if errors and not any(group.trajectories_G for group in groups_P):
        first = errors[0]
        raise EnvError(f"every one of {len(errors)} attempts was lost; the first: {first.error_message}")
    return groups_P


async def run_group(
    builder: EnvGroupBuilder, sampling_client: SamplingClient, settings: RolloutSettings, *, seed: tuple[int | str, ...]
) -> TrajectoryGroup:
    """All attempts at one problem.

    If the attempts begin with the same observation (the usual case) their first actions are one request for G samples, whose prompt
    is read once; later turns, and attempts that begin differently, are a request each.
    """
    try:
        return await _run_group(builder, sampling_client, settings, seed)
    except EnvError as err:
        logger.warning("group lost: %s", err, exc_info=err)
        return TrajectoryGroup(
            trajectories_G=[], final_rewards_G=[], metrics_G=[], errors=[_rollout_error(err)], tags=builder.logging_tags()
        )
    finally:
        await _cleanup(builder)


async def _run_group(
    builder: EnvGroupBuilder, sampling_client: SamplingClient, settings: RolloutSettings, seed: tuple[int | str, ...]
) -> TrajectoryGroup:
    envs_G = await _of_env(builder.make_envs(), f"{type(builder).__name__}.make_envs")
    attempts_G = [_Attempt(env, settings, (*seed, index)) for index, env in enumerate(envs_G)]
    opening_G = [asyncio.create_task(attempt.open()) for attempt in attempts_G]
    try:
        if not builder.attempts_depend() and await _all_opened(opening_G, builder):
            await _share_first_action([attempt for attempt in attempts_G if attempt.error is None], sampling_client, seed)
        await _gather([attempt.run(opening, sampling_client) for attempt, opening in zip(attempts_G, opening_G, strict=True)])
    finally:
        for opening in opening_G:
            opening.cancel()
    through_G = [attempt for attempt in attempts_G if attempt.error is None]
    trajectories_G = [attempt.trajectory() for attempt in through_G]
    group_rewards_G = await _group_rewards(builder, trajectories_G, [attempt.env for attempt in through_G])
    return TrajectoryGroup(
        trajectories_G=trajectories_G,
        final_rewards_G=[reward for reward, _ in group_rewards_G],
        metrics_G=[metrics for _, metrics in group_rewards_G],
        errors=[_rollout_error(attempt.error) for attempt in attempts_G if attempt.error is not None],
        tags=builder.logging_tags(),
    )


async def _all_opened(opening_G: Sequence[asyncio.Task[None]], builder: EnvGroupBuilder) -> bool:
    """Whether all first observations are there. An environment that waits for another's move would be waited for in vain."""
    if not opening_G:
        return True
    _, waiting = await asyncio.wait(opening_G, timeout=OPEN_TOGETHER_S)
    if waiting:
        logger.warning(
            "%s: %d of %d first observations are not there after %.0f s; their attempts start one by one. If the environments of a group "
            "wait for one another, override attempts_depend()",
            type(builder).__name__, len(waiting), len(opening_G), OPEN_TOGETHER_S,
        )  # fmt: skip
    return not waiting


@dataclass(slots=True)
class _Attempt:
    """One environment on its way; an EnvError ends in `error`, a sampler's error goes on up."""

    env: Env
    settings: RolloutSettings
    seed: tuple[int | str, ...]
    observation: Observation = field(default_factory=Observation.empty)
    stop: StopCondition = None
    transitions: list[Transition] = field(default_factory=list)
    stop_reason: TrajectoryStop | None = None
    error: EnvError | None = None
    deadline_s: float | None = None
    """On the event loop's clock."""

    async def open(self) -> None:
        if self.settings.timeout_s is not None:
            self.deadline_s = asyncio.get_running_loop().time() + self.settings.timeout_s
        await self._guarded(self._open())

    async def run(self, opening: asyncio.Task[None], sampling_client: SamplingClient) -> None:
        """From where it stands to its end; `opening` is open(), on its way or done."""
        await opening
        await self._guarded(self._run(sampling_client))
        name = f"{type(self.env).__name__}.close"
        try:
            await _of_env(self.env.close(), name)
        except EnvError as err:  # nothing is lost by it
            logger.warning("%s", err, exc_info=err)

    async def take(self, sequence: SampledSequence) -> None:
        """Give the environment an action that was sampled for it."""
        await self._guarded(self._take(sequence))

    @property
    def is_open(self) -> bool:
        return self.error is None and self.stop_reason is None

    @property
    def max_tokens(self) -> int:
        """Tokens that the next action may have; below 1: there is no room for another."""
        limit = self.settings.max_trajectory_tokens
        return self.settings.max_tokens if limit is None else min(self.settings.max_tokens, limit - self.observation.length)

    def trajectory(self) -> Trajectory:
        assert self.stop_reason is not None, "trajectory() before the attempt ended"
        return Trajectory(transitions=self.transitions, stop_reason=self.stop_reason)

    async def _open(self) -> None:
        self.observation, self.stop = await _of_env(self.env.initial_observation(), f"{type(self.env).__name__}.initial_observation")
        if self.max_tokens < 1:
            self.stop_reason = "max_tokens"

    async def _run(self, sampling_client: SamplingClient) -> None:
        while self.is_open:
            seed = stable_seed(*self.seed, len(self.transitions))
            [sequence] = await _sample(sampling_client, self.observation, 1, self.settings, self.max_tokens, self.stop, seed)
            await self._take(sequence)

    async def _take(self, sequence: SampledSequence) -> None:
        name = f"{type(self.env).__name__}.step"
        result = await _of_env(self.env.step(list(sequence.tokens), extra={"stop_reason": sequence.stop_reason}), name)
        if not math.isfinite(result.reward):
            raise EnvError(f"{name}: reward is {result.reward}; a finite number is needed (a bad answer is a low reward)")
        self.transitions.append(_transition(self.observation, sequence, result))
        self.observation, self.stop = result.next_observation, result.next_stop_condition
        if result.episode_done:
            self.stop_reason = "done"
        elif self.settings.max_turns is not None and len(self.transitions) >= self.settings.max_turns:
            self.stop_reason = "max_turns"
        elif self.max_tokens < 1:
            self.stop_reason = "max_tokens"

    async def _guarded(self, work: Coroutine[None, None, None]) -> None:
        try:
            async with asyncio.timeout_at(self.deadline_s) as timeout:
                await work
        except TimeoutError:
            if not timeout.expired():  # the sampler's own, not our deadline
                raise
            self.stop_reason = "timeout"
        except EnvError as err:
            logger.warning("trajectory lost: %s", err, exc_info=err)
            self.error = err


async def _share_first_action(attempts_G: Sequence[_Attempt], sampling_client: SamplingClient, seed: tuple[int | str, ...]) -> None:
    """Sample the first action of all attempts in one request, if they are several and look at the same thing."""
    open_G = [attempt for attempt in attempts_G if attempt.is_open]
    if len(open_G) < 2 or len(open_G) < len(attempts_G):
        return
    first = open_G[0]
    if any(attempt.observation != first.observation or attempt.stop != first.stop for attempt in open_G[1:]):
        return
    request_seed = stable_seed(*seed, "group")
    try:
        async with asyncio.timeout_at(first.deadline_s) as timeout:
            sequences_G = await _sample(
                sampling_client, first.observation, len(open_G), first.settings, first.max_tokens, first.stop, request_seed
            )
    except TimeoutError:
        if not timeout.expired():
            raise
        for attempt in open_G:
            attempt.stop_reason = "timeout"
        return
    await _gather([attempt.take(sequence) for attempt, sequence in zip(open_G, sequences_G, strict=True)])


async def _sample(
    sampling_client: SamplingClient,
    observation: Observation,
    num_samples: int,
    settings: RolloutSettings,
    max_tokens: int,
    stop: StopCondition,
    seed: int,
) -> list[SampledSequence]:
    params = SamplingParams(
        max_tokens=max_tokens, seed=seed, stop=stop, temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p
    )
    response = await sampling_client.sample(prompt=observation, num_samples=num_samples, sampling_params=params)
    if len(response.sequences) != num_samples:
        raise EngineError(f"asked for {num_samples} samples, got {len(response.sequences)}", engine="sampler", operation="sample")
    return list(response.sequences)


def _transition(observation: Observation, sequence: SampledSequence, result: StepResult) -> Transition:
    if sequence.logprobs is None:
        raise EngineError("a sampled sequence has no logprobs; training needs one per token", engine="sampler", operation="sample")
    return Transition(
        observation=observation,
        action=sequence.tokens,
        sampling_logprobs_T=sequence.logprobs,
        policy_version=sequence.policy_version,
        stop_reason=sequence.stop_reason,
        reward=float(result.reward),
        episode_done=result.episode_done,
        metrics=result.metrics,
        logs=result.logs,
    )


async def _group_rewards(builder: EnvGroupBuilder, trajectories_G: list[Trajectory], envs_G: Sequence[Env]) -> list[tuple[float, Metrics]]:
    if not trajectories_G:
        return []
    name = f"{type(builder).__name__}.compute_group_rewards"
    rewards_G = await _of_env(builder.compute_group_rewards(trajectories_G, envs_G), name)
    if len(rewards_G) != len(trajectories_G) or not all(math.isfinite(reward) for reward, _ in rewards_G):
        raise EnvError(f"{name}: returned {[reward for reward, _ in rewards_G]}, needed {len(trajectories_G)} finite rewards")
    return rewards_G


async def _of_env(work: Awaitable[T], name: str) -> T:
    """The result of an environment's method; whatever it raises becomes an EnvError that names the method."""
    try:
        return await work
    except Exception as err:
        raise EnvError(f"{name}: {type(err).__name__}: {err}") from err


async def _cleanup(builder: EnvGroupBuilder) -> None:
    """What the group leaves behind is no reason to lose its trajectories: a failure is logged."""
    try:
        await _of_env(builder.cleanup(), f"{type(builder).__name__}.cleanup")
    except EnvError as err:
        logger.warning("%s", err, exc_info=err)


def _rollout_error(err: EnvError) -> RolloutError:
    cause = err.__cause__ or err
    return RolloutError(error_type=type(cause).__name__, error_message=err.message)


async def _gather(work: Sequence[Coroutine[None, None, T]]) -> list[T]:
    """All results in order; the first error cancels the rest and comes out as itself (a TaskGroup would wrap it)."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
