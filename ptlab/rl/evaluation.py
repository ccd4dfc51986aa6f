"""Accuracy on held-out problems, at the sampling temperature and greedily. The same seeds at every evaluation of a run, so that two
evaluations differ by the weights and by nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ptlab.rl import diagnostics
from ptlab.rl.rollout import RolloutSettings, run_groups
from ptlab.rl.types import EnvGroupBuilder, TrajectoryGroup

if TYPE_CHECKING:
    from ptlab.client.sampling import SamplingClient


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What came out of one evaluation."""

    metrics: dict[str, float]
    """eval/accuracy, and eval/accuracy_greedy where asked for; the tokens per answer of each."""
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
    """Every test problem once as `settings` say, and once greedily if `greedy`."""
    groups_P = await run_groups(test_P, sampling_client, settings, seed=(seed, "eval"))
    metrics = {"eval/accuracy": diagnostics.accuracy(groups_P), "eval/tokens_mean": mean_tokens(groups_P)}
    greedy_P: list[TrajectoryGroup] = []
    if greedy:
        greedy_P = await run_groups(test_P, sampling_client, greedy_settings(settings), seed=(seed, "eval_greedy"))
        metrics |= {"eval/accuracy_greedy": diagnostics.accuracy(greedy_P), "eval/tokens_mean_greedy": mean_tokens(greedy_P)}
    return Evaluation(metrics=metrics, groups_P=groups_P, greedy_P=greedy_P)


def greedy_settings(settings: RolloutSettings) -> RolloutSettings:
    return replace(settings, temperature=0.0, top_k=-1, top_p=1.0)


def mean_tokens(groups_P: Sequence[TrajectoryGroup]) -> float:
    """Sampled tokens per attempt."""
    lengths = [trajectory.num_sampled_tokens for group in groups_P for trajectory in group.trajectories_G]
    return sum(lengths) / len(lengths) if lengths else 0.0
