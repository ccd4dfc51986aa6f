"""Results of the loss benchmark: one line of JSON per run, their tables, and what in these is more than noise.

All runs are compared at one token budget, the sampled tokens that even the shortest run reached, and at one budget of CPU-seconds, by
linear interpolation between evaluations. "area" is the mean accuracy on the way to the token budget: how fast a variant learned, and, as
it comes from several evaluations, the steadier number of the two.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist, fmean, median, stdev, variance
from typing import Any

import numpy as np

from ptlab.benchmarks.loss_curves import Curve
from ptlab.benchmarks.tables import markdown_table, write_jsonl
from ptlab.errors import ConfigError

BASELINE = ("importance_sampling", "none")
"""Loss and correction that the others of a setting are compared with."""
CONFIDENCE = 0.99
"""Of one comparison. 0.95 would call two of forty alike ones different."""


@dataclass(frozen=True, slots=True)
class Variant:
    """What differs between two runs of one seed."""

    loss: str
    correction: str
    """"none", or a name for what rl/rollout_correction.py does ("TIS", "MIS")."""
    updates: int
    """Optimizer steps per batch, one on each of as many minibatches."""
    ahead: int
    """Steps that a batch is sampled ahead."""

    @property
    def name(self) -> str:
        return f"{self.loss}-{self.correction}-u{self.updates}-a{self.ahead}".lower()

    @property
    def label(self) -> str:
        return self.loss if self.correction == "none" else f"{self.loss} + {self.correction}"

    @property
    def setting(self) -> tuple[int, int]:
        return self.updates, self.ahead


@dataclass(frozen=True, slots=True)
class Result:
    """One run."""

    variant: Variant
    seed: int
    curve: Curve


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Where all runs are compared."""

    tokens: float
    cpu_s: float

    @classmethod
    def of(cls, results: Sequence[Result]) -> Budget:
        """What every run reached."""
        return cls(tokens=min(r.curve.tokens[-1] for r in results), cpu_s=min(r.curve.cpu_s[-1] for r in results))


def write_results(path: Path, about: Mapping[str, Any], results: Sequence[Result]) -> None:
    """`about` in the first line, then a line per run."""
    write_jsonl(path, about, [asdict(r.variant) | {"seed": r.seed} | asdict(r.curve) for r in results])


def read_results(path: Path) -> tuple[dict[str, Any], list[Result]]:
    """What write_results wrote. Raises: ConfigError if it holds no run."""
    first, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    variant, curve = Variant.__dataclass_fields__, Curve.__dataclass_fields__
    results = [
        Result(Variant(**{key: line[key] for key in variant}), line["seed"], Curve(**{key: line[key] for key in curve})) for line in lines
    ]
    if not results:
        raise ConfigError(f"{path}: no runs in it")
    return first["about"], results


# ----------------------------------------------------------------------------------------------------------- numbers of a run


def accuracy_at(xs: Sequence[float], accuracy: Sequence[float], x: float) -> float:
    """The accuracy at `x` tokens or seconds, between two evaluations on the straight line through them."""
    return float(np.interp(x, xs, accuracy))


def area(curve: Curve, tokens: float) -> float:
    """Mean accuracy over the first `tokens` tokens: the area under the curve, by trapezoids, over its width."""
    inside = [(x, y) for x, y in zip(curve.tokens, curve.accuracy, strict=True) if x < tokens]
    xs, ys = zip(*inside, (tokens, accuracy_at(curve.tokens, curve.accuracy, tokens)), strict=True)
    return float(np.trapezoid(ys, xs)) / tokens


def typical(curve: Curve, name: str) -> float:
    """Median over the training steps that have this metric; NaN without any."""
    values = [value for value in curve.steps.get(name, ()) if value is not None]
    return median(values) if values else math.nan


def average(curve: Curve, name: str) -> float:
    """Mean over the training steps that have this metric; NaN without any."""
    values = [value for value in curve.steps.get(name, ()) if value is not None]
    return fmean(values) if values else math.nan


# ------------------------------------------------------------------------------------------------------------------ comparison


def noise(groups: Sequence[Sequence[float]]) -> float:
    """The least difference of two variants' means that is more than noise: the two-sided quantile of CONFIDENCE times the standard error
    of a difference, with the variance over the seeds pooled over all variants of a setting. NaN if no variant has two runs.

    Pooled, because the spread of three seeds is itself mostly noise; so a variant that is truly less steady than the others is judged by
    their steadiness.
    """
    repeated = [group for group in groups if len(group) > 1]
    if not repeated:
        return math.nan
    freedom = sum(len(group) - 1 for group in repeated)
    pooled = sum(variance(group) * (len(group) - 1) for group in repeated) / freedom
    return NormalDist().inv_cdf(0.5 + CONFIDENCE / 2) * math.sqrt(2 * pooled / min(len(group) for group in groups))


def mark(difference: float, least: float) -> str:
    """` +` or ` -` where a difference to the baseline is more than noise."""
    return (" **+**" if difference > 0 else " **-**") if abs(difference) > least else ""


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds."""
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def tables(results: Sequence[Result]) -> str:
    """A table per setting, with a line before it that says what its numbers are worth."""
    budget = Budget.of(results)
    settings = list(dict.fromkeys(r.variant.setting for r in results))
    return "\n\n".join(_table(setting, [r for r in results if r.variant.setting == setting], budget) for setting in settings)


HEADER = (
    "loss", "accuracy at the token budget", "area", "accuracy at the CPU budget", "CPU-s to the token budget", "wall-s",
    "gradient norm", "ratio, least", "ratio, most", "k3 x 1000, nats", "clipped", "truncated or masked",
)  # fmt: skip


def _table(setting: tuple[int, int], results: Sequence[Result], budget: Budget) -> str:
    updates, ahead = setting
    groups: dict[Variant, list[Curve]] = {}
    for result in results:
        groups.setdefault(result.variant, []).append(result.curve)
    columns = {
        "end": {v: [accuracy_at(c.tokens, c.accuracy, budget.tokens) for c in curves] for v, curves in groups.items()},
        "area": {v: [area(c, budget.tokens) for c in curves] for v, curves in groups.items()},
        "cpu": {v: [accuracy_at(c.cpu_s, c.accuracy, budget.cpu_s) for c in curves] for v, curves in groups.items()},
    }
    least = {name: noise(list(columns[name].values())) for name in ("end", "area")}  # "cpu" has the clock's noise as well: not judged
    baseline = next((v for v in groups if (v.loss, v.correction) == BASELINE), None)
    rows = []
    for variant, curves in groups.items():
        cells = [variant.label]
        for name, column in columns.items():
            difference = fmean(column[variant]) - fmean(column[baseline]) if baseline else 0.0
            cells.append(spread(column[variant]) + (mark(difference, least[name]) if name in least else ""))
        cells += [
            f"{fmean(float(np.interp(budget.tokens, c.tokens, c.cpu_s)) for c in curves):.1f}",
            f"{fmean(float(np.interp(budget.tokens, c.tokens, c.wall_s)) for c in curves):.1f}",
            _number(fmean(typical(c, "grad_norm") for c in curves)),
            _number(fmean(typical(c, "ratio_min") for c in curves)),
            _number(fmean(typical(c, "ratio_max") for c in curves)),
            _number(1000 * fmean(average(c, "kl_k3") for c in curves)),
            _share(fmean(average(c, "clipped") for c in curves)),
            _share(fmean(average(c, "truncated" if variant.correction == "TIS" else "masked") for c in curves)),
        ]
        rows.append(cells)
    seeds = max(len(curves) for curves in groups.values())
    bounds = ", ".join("-" if math.isnan(value) else f"{value:.3f}" for value in least.values())
    title = (
        f"**{updates} update{'s' if updates > 1 else ''} per batch, {ahead} steps off-policy** ({seeds} seed{'s' if seeds > 1 else ''}; "
        f"budgets: {budget.tokens:,.0f} sampled tokens, {budget.cpu_s:.1f} CPU-s; more than noise: {bounds})"
    )
    return f"{title}\n\n{markdown_table(HEADER, rows)}"


def _number(value: float) -> str:
    """Three digits; a ratio's last bits are 0."""
    return "-" if math.isnan(value) else f"{value if abs(value) > 1e-6 else 0.0:.3g}"


def _share(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f} %"


def first_gradients(results: Sequence[Result]) -> float:
    """The largest relative difference of a loss's first gradient norm to that of importance_sampling with the same seed, with one update
    on-policy. All ratios are 1 there, so every loss has the same gradient; NaN if that setting is not among the results."""
    norms = {(r.variant.loss, r.seed): r.curve.steps["grad_norm"][0] for r in results if r.variant.setting == (1, 0)}
    pairs = [(norm, norms[BASELINE[0], seed]) for (_, seed), norm in norms.items() if (BASELINE[0], seed) in norms]
    return max((abs(norm / other - 1) for norm, other in pairs if norm and other), default=math.nan)


def report(results: Sequence[Result]) -> str:
    """The tables, and the check that the comparison is fair."""
    return (
        f"{tables(results)}\n\nCheck: at the first step of 1 update, 0 steps off-policy, all losses have one gradient; "
        f"their norms differ by {first_gradients(results):.1e} at most."
    )
