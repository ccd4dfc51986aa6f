"""The loss benchmark in one picture: a column per setting and correction, a line per loss, the mean over the seeds in their range."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import numpy as np

from ptlab.benchmarks.loss_results import Result
from ptlab.figures.paper import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, finish, new_figure, save

COLOURS = {"importance_sampling": BLACK, "ppo": BLUE, "cispo": ORANGE, "dro": GREEN, "gspo": PURPLE}
ROWS = ("held-out accuracy", "held-out accuracy", "held-out accuracy", "gradient norm", "token ratio: most, least")
X_LABELS = ("sampled tokens, thousands", "CPU-seconds", "wall seconds", "training step", "training step")
POINTS = 60
"""Of an interpolated curve."""


def draw_losses(results: Sequence[Result], path: Path) -> Path:
    """Accuracy against tokens and seconds, gradient norm and ratios against steps, of all runs."""
    columns = list(dict.fromkeys((*r.variant.setting, r.variant.correction) for r in results))
    losses = list(dict.fromkeys(r.variant.loss for r in results))
    figure = new_figure(2.6 * len(columns) + 0.4, 11.5)
    panels = figure.subplots(len(ROWS), len(columns), sharey="row", sharex="row", squeeze=False)
    for column, (updates, ahead, correction) in enumerate(columns):
        own = [r for r in results if (*r.variant.setting, r.variant.correction) == (updates, ahead, correction)]
        for number, loss in enumerate(losses):
            runs = [r for r in own if r.variant.loss == loss]
            colour = COLOURS.get(loss, SKY)
            if runs:
                _accuracy(panels[0][column], runs, [[x / 1000 for x in r.curve.tokens] for r in runs], colour, loss)
                _accuracy(panels[1][column], runs, [r.curve.cpu_s for r in runs], colour, loss)
                _accuracy(panels[2][column], runs, [r.curve.wall_s for r in runs], colour, loss)
                _steps(panels[3][column], runs, "grad_norm", colour, number)
                _steps(panels[4][column], runs, "ratio_max", colour, number)
                _steps(panels[4][column], runs, "ratio_min", colour, number)
        plural = "s" if updates > 1 else ""
        title = f"{updates} update{plural}, {ahead} steps off" + ("" if correction == "none" else f", {correction}")
        for row, axes in enumerate(panels[:, column]):
            finish(axes, title=title if row == 0 else "", x=X_LABELS[row], y=ROWS[row] if column == 0 else "")
    for axes in (*panels[3], *panels[4]):
        axes.set_yscale("log")
    panels[0][0].legend(fontsize=8, loc="lower right", framealpha=0.85)
    return save(figure, path)


def _accuracy(axes: Any, runs: Sequence[Result], xs: Sequence[Sequence[float]], colour: str, label: str) -> None:
    """As far as all seeds reach; the band is their range."""
    grid = np.linspace(0.0, min(x[-1] for x in xs), POINTS)
    _band(axes, grid, np.stack([np.interp(grid, x, r.curve.accuracy) for x, r in zip(xs, runs, strict=True)]), colour, label)


def _steps(axes: Any, runs: Sequence[Result], name: str, colour: str, number: int) -> None:
    """A metric of the training steps, geometric mean over the seeds that have it, moved sideways a little per loss, so that equal curves do
    not hide each other."""
    by_step = zip(*(r.curve.steps.get(name, ()) for r in runs), strict=False)
    means = [(step, geometric_mean(known)) for step, values in enumerate(by_step) if (known := [value for value in values if value])]
    axes.plot([step + 0.06 * number for step, _ in means], [mean for _, mean in means], color=colour, linewidth=1.2)


def _band(axes: Any, xs: Any, values_SX: Any, colour: str, label: str) -> None:
    axes.fill_between(xs, values_SX.min(axis=0), values_SX.max(axis=0), color=colour, alpha=0.12, linewidth=0)
    axes.plot(xs, values_SX.mean(axis=0), color=colour, linewidth=1.5, label=label)
