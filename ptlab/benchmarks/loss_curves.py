"""What a run of the loss benchmark cost and reached, read off its rows of metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from statistics import fmean
from typing import Any

CPU_SECONDS = "cpu/process_s"
"""What a row of these runs holds beside the recipe's metrics: CPU-seconds of the process since the run began, all threads."""

STEP_METRICS = {
    "reward": "reward/mean",
    "grad_norm": "optim/grad_norm",
    "ratio_max": "gap/ratio_max",
    "ratio_min": "gap/ratio_min",
    "kl_k3": "gap/kl_k3_nats",
    "clipped": "loss/clip_fraction_mean",
    "truncated": "correction/truncated_frac",
    "masked": "correction/masked_frac",
}
"""What is kept of every training step: short name -> metric. Ratios and k3 are those of trainer and sampler, per token, over all updates
of the batch, whatever ratio the loss itself looks at; `clipped` is of that one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One run. The first four have an entry per evaluation, `steps` one per training step."""

    tokens: Sequence[int]
    """Sampled so far."""
    cpu_s: Sequence[float]
    """Spent so far on sampling, training and syncing; evaluations are left out."""
    wall_s: Sequence[float]
    """The same on the wall clock."""
    accuracy: Sequence[float]
    """On the held-out problems, at the sampling temperature."""
    steps: Mapping[str, Sequence[float | None]]
    """By STEP_METRICS; None where a step has none (nothing to learn from)."""


def curve_of(rows: Sequence[Mapping[str, Any]]) -> Curve:
    """Row s, if it was evaluated, holds the accuracy of the weights after s steps: what was spent by then is the sum of the rows before.

    The first row's CPU-seconds also hold the opening of the run, so it counts as the mean of the others.
    """
    steps = [row for row in rows if "time/rollout_s" in row]  # the last row is an evaluation only
    walls = [row["time/step_s"] - row.get("time/eval_s", 0.0) for row in steps]
    grown = [after[CPU_SECONDS] - before[CPU_SECONDS] for before, after in pairwise(steps)]
    cpus = [spent * wall / row["time/step_s"] for spent, wall, row in zip(grown, walls[1:], steps[1:], strict=True)]
    cpus = [fmean(cpus) if cpus else math.nan, *cpus]
    tokens = [row["answer/tokens_sum"] for row in steps]
    evaluated = [row for row in rows if "eval/accuracy" in row]
    at = [row["step"] for row in evaluated]
    return Curve(
        tokens=[int(value) for value in _sums_at(tokens, at)],
        cpu_s=_sums_at(cpus, at),
        wall_s=_sums_at(walls, at),
        accuracy=[row["eval/accuracy"] for row in evaluated],
        steps={name: [_short(row.get(key)) for row in steps] for name, key in STEP_METRICS.items() if any(key in row for row in steps)},
    )


def _sums_at(values: Sequence[float], at: Sequence[int]) -> list[float]:
    sums = list(accumulate(values, initial=0.0))
    return [round(sums[step], 3) for step in at]


def _short(value: float | None) -> float | None:
    """Four digits are more than the table and the figure show."""
    return None if value is None else float(f"{value:.4g}")
