"""Accuracy on held-out problems, at the sampling temperature and greedily. The same seeds at every evaluation of a run, so that two
evaluations differ by the weights and by nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ptlab.rl import diagnostics
from ptlab.rl.rollout import RolloutSettings, run_groups
from ptlab.rl.statistics import mean_pass_at_k, powers_of_two
from ptlab.rl.types import Env, EnvGroupBuilder, Metrics, Trajectory, TrajectoryGroup

if TYPE_CHECKING:
    from ptlab.client.sampling import SamplingClient


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What came out of one evaluation."""

    metrics: dict[str, float]
    """What `summary` and `pass_at_ks` say of the first, and `summary` of the greedy attempts (with _greedy behind each name)."""
    groups_P: Sequence[TrajectoryGroup]
    """The attempts at the sampling temperature."""
    greedy_P: Sequence[TrajectoryGroup]
    """The greedy attempts; empty if not asked for."""


async def evaluate(
    test_P: Sequence[EnvGroupBuilder],
    sampling_client: SamplingClient,
    settings: RolloutSettings,
    *,
    seed: int,
    greedy: bool = True,
) -> Evaluation:
    """Every test problem as often as its group is large, as `settings` say, and once more greedily if `greedy`."""
    groups_P = await run_groups(test_P, sampling_client, settings, seed=(seed, "eval"))
    metrics = summary(groups_P) | pass_at_ks(groups_P)
    greedy_P: list[TrajectoryGroup] = []
    if greedy:
        once_P = [builder if builder.attempts_depend() else OneAttempt(builder) for builder in test_P]
        greedy_P = await run_groups(once_P, sampling_client, greedy_settings(settings), seed=(seed, "eval_greedy"))
        metrics |= {f"{name}_greedy": value for name, value in summary(greedy_P).items()}
    return Evaluation(metrics=metrics, groups_P=groups_P, greedy_P=greedy_P)


class OneAttempt(EnvGroupBuilder):
    """The first environment of another builder's group: greedy attempts are all the same."""

    def __init__(self, builder: EnvGroupBuilder) -> None:
        self._builder = builder

    async def make_envs(self) -> Sequence[Env]:
        return (await self._builder.make_envs())[:1]

    async def compute_group_rewards(self, trajectory_group: list[Trajectory], env_group: Sequence[Env]) -> list[tuple[float, Metrics]]:
        return await self._builder.compute_group_rewards(trajectory_group, env_group)

    async def cleanup(self) -> None:
        await self._builder.cleanup()

    def logging_tags(self) -> list[str]:
        return self._builder.logging_tags()


def summary(groups_P: Sequence[TrajectoryGroup]) -> dict[str, float]:
    """eval/accuracy, eval/tokens_mean, and what environments report beside `correct` and `format` as eval/<name>; where the problems are
    of several kinds (logging_tags), each kind's own as eval/<tag>/<name>."""
    metrics = _summary("eval", groups_P)
    tags = sorted({tag for group in groups_P for tag in group.tags})
    for tag in tags if len(tags) > 1 else ():
        metrics |= _summary(f"eval/{tag}", [group for group in groups_P if tag in group.tags])
    return metrics


def pass_at_ks(groups_P: Sequence[TrajectoryGroup]) -> dict[str, float]:
    """eval/pass@k for k = 1, 2, 4, ... up to the attempts at each problem, mean over problems; nothing if each was tried once."""
    num_attempts = min((len(group.trajectories_G) + len(group.errors) for group in groups_P), default=0)
    if num_attempts < 2:
        return {}
    right_P = [diagnostics.num_correct(group) for group in groups_P]
    sizes_P = [len(group.trajectories_G) + len(group.errors) for group in groups_P]
    return {f"eval/pass@{k}": mean_pass_at_k(right_P, sizes_P, k) for k in powers_of_two(num_attempts)}


def _summary(area: str, groups_P: Sequence[TrajectoryGroup]) -> dict[str, float]:
    reported = diagnostics.reported_means(groups_P)
    others = {f"{area}/{name}": value for name, value in reported.items() if name not in ("correct", "format")}
    return {f"{area}/accuracy": diagnostics.accuracy(groups_P), f"{area}/tokens_mean": mean_tokens(groups_P)} | others


def greedy_settings(settings: RolloutSettings) -> RolloutSettings:
    return replace(settings, temperature=0.0, top_k=-1, top_p=1.0)


def mean_tokens(groups_P: Sequence[TrajectoryGroup]) -> float:
    """Sampled tokens per attempt."""
    lengths = [trajectory.num_sampled_tokens for group in groups_P for trajectory in group.trajectories_G]
    return sum(lengths) / len(lengths) if lengths else 0.0
