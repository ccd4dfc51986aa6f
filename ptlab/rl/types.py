"""Environments and what comes out of them, in the words of the Tinker cookbook.

    RLDataset.get_batch(step) -> P x EnvGroupBuilder -> make_envs() -> G x Env        one problem, G attempts at it
    Env.initial_observation() -> sample -> Env.step(action) -> StepResult -> ...      one attempt, used once
    -> Transition (one turn) -> Trajectory (one attempt) -> TrajectoryGroup (one problem)

A wrong, malformed or over-long answer is a reward and a stop reason. An exception from an environment means that the environment broke;
it costs the trajectory it happened in, nothing else (rl/rollout.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypedDict

from ptlab.types import ModelInput

Observation = ModelInput
Action = list[int]
StopCondition = str | Sequence[str] | Sequence[int] | None
Metrics = Mapping[str, float | int]
Logs = Mapping[str, str | int | float]
TrajectoryStop = Literal["done", "max_turns", "max_tokens", "timeout"]


class ActionExtra(TypedDict, total=False):
    """What an environment may want to know about an action besides its tokens."""

    stop_reason: str
    """"stop": a stop sequence or end-of-sequence was sampled (it is among the tokens); "length": cut off at max_tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """The environment's answer to one action."""

    reward: float
    """For this step; a trajectory earns the sum of its steps, plus its share of the group reward."""
    episode_done: bool
    next_observation: Observation
    """All tokens before the next action, from the start of the attempt; ignored if episode_done."""
    next_stop_condition: StopCondition
    metrics: Metrics = field(default_factory=dict)
    """Averaged over trajectories into `env/<name>`. `correct` and `format` (0 or 1) become train/accuracy and train/format."""
    logs: Logs = field(default_factory=dict)
    """For transcripts; not aggregated."""


class Env(ABC):
    """One attempt at one problem. Used once: made by EnvGroupBuilder.make_envs, run to its end, thrown away."""

    @abstractmethod
    async def initial_observation(self) -> tuple[Observation, StopCondition]:
        """The prompt of the first turn, and what ends the first action."""

    @abstractmethod
    async def step(self, action: Action, *, extra: ActionExtra | None = None) -> StepResult:
        """Take the sampled tokens (stop token included) and pay for them."""

    async def close(self) -> None:
        """Called once when the attempt has ended, however it ended: an environment that others wait for tells them here."""
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """One turn: what was seen, what was sampled, what it paid."""

    observation: Observation
    action: Sequence[int]
    """T sampled tokens, the stop token included."""
    sampling_logprobs_T: Sequence[float]
    """log q of each sampled token, nats, under the sampler's temperature-scaled distribution."""
    policy_version: int | None
    """Optimizer steps behind the weights that sampled the action; None where the server does not say."""
    stop_reason: str
    """"stop" or "length", of the sampled sequence."""
    reward: float
    episode_done: bool
    metrics: Metrics = field(default_factory=dict)
    logs: Logs = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One attempt, first turn to last. No transitions at all: the time or token limit ran out before the first action."""

    transitions: Sequence[Transition]
    stop_reason: TrajectoryStop
    """"done": the environment ended it; otherwise the limit that cut it off, and its reward is what it had earned by then."""

    @property
    def num_sampled_tokens(self) -> int:
        return sum(len(transition.action) for transition in self.transitions)

    @property
    def step_reward(self) -> float:
        """Sum of the step rewards, without the group reward."""
        return sum(transition.reward for transition in self.transitions)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutError:
    """An environment that broke, as a value. One of a builder (make_envs, compute_group_rewards) stands for its whole group."""

    error_type: str
    error_message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryGroup:
    """The attempts at one problem that came through; those whose environment broke are in `errors` only."""

    trajectories_G: Sequence[Trajectory]
    final_rewards_G: Sequence[float]
    """What compute_group_rewards paid each trajectory on top of its steps."""
    metrics_G: Sequence[Metrics]
    """What compute_group_rewards reported of each trajectory."""
    errors: Sequence[RolloutError] = ()
    tags: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not len(self.trajectories_G) == len(self.final_rewards_G) == len(self.metrics_G):
            raise ValueError(
                f"TrajectoryGroup: {len(self.trajectories_G)} trajectories, {len(self.final_rewards_G)} final rewards and "
                f"{len(self.metrics_G)} metrics; one of each per trajectory is needed"
            )

    @property
    def rewards_G(self) -> list[float]:
        """Total reward per trajectory: its steps plus its share of the group reward."""
        return [t.step_reward + final for t, final in zip(self.trajectories_G, self.final_rewards_G, strict=True)]

    def get_total_rewards(self) -> list[float]:
        """`rewards_G` under the cookbook's name."""
        return self.rewards_G


class EnvGroupBuilder(ABC):
    """One problem: makes the G environments of its group and may pay them as a group."""

    @abstractmethod
    async def make_envs(self) -> Sequence[Env]: ...

    async def compute_group_rewards(self, trajectory_group: list[Trajectory], env_group: Sequence[Env]) -> list[tuple[float, Metrics]]:
        """A reward for each trajectory that needs to see the others (pairwise comparison, a game); 0.0 unless overridden.

        Gets only the trajectories whose environment did not break, with their environments, in order.
        """
        return [(0.0, {}) for _ in trajectory_group]

    async def cleanup(self) -> None:
        """Release what make_envs took. Called once after the group, also after failures."""
        return None

    def attempts_depend(self) -> bool:
        """Whether the environments of the group wait for one another (two players of a game). Their attempts then begin one by one."""
        return False

    def logging_tags(self) -> list[str]:
        """Names under which this group's rewards are averaged as well (`reward/<tag>/mean`)."""
        return []


class RLDataset(ABC):
    """Problems by step. get_batch is a pure function of the step, so that a resumed run meets the problems an unbroken one would."""

    @abstractmethod
    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]: ...

    @abstractmethod
    def __len__(self) -> int:
        """Batches until every problem was met once; get_batch goes on beyond that in a new order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What to train on and what to ask in an evaluation."""

    train: RLDataset
    test_P: Sequence[EnvGroupBuilder]
    """Held-out problems; the size of a group is how often each is tried."""
