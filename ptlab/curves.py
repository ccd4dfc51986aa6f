"""curves.png: a run at a glance. Four panels over the training step: reward, accuracy, answer length, and where the time went."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ptlab.report import phase_seconds

# Okabe and Ito's palette: distinct for colour-blind readers and in print (jfly.uni-koeln.de/color).
_BLUE, _ORANGE, _GREEN = "#0072B2", "#D55E00", "#009E73"
_PHASE_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")


_LEARNS_BY = {
    "reward/mean": ("Training reward", "reward"),
    "train/nll": ("Training loss", "nats per trained token"),
    "loss/dpo": ("Training loss", "DPO, nats per pair"),
    "loss/bradley_terry": ("Training loss", "Bradley-Terry, nats per pair"),
}
"""What rises or falls as a recipe learns: the first of these that a run has."""


def draw_curves(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Draw the rows of metrics.jsonl into a PNG. Metrics that no row has leave their panel empty, with a word saying so.

    The file is replaced whole: a reader never sees half a picture.
    """
    from matplotlib.figure import Figure  # half a second to import, and only runs draw

    figure = Figure(figsize=(10, 6.4), dpi=110, layout="constrained")  # no pyplot: no display, no global state
    figure.suptitle(title)
    (reward, accuracy), (length, seconds) = figure.subplots(2, 2)

    learns_by = next((key for key in _LEARNS_BY if any(row.get(key) is not None for row in rows)), "reward/mean")
    _line(reward, rows, learns_by, "mean of the step", _BLUE)
    _finish(reward, *_LEARNS_BY[learns_by])

    _line(accuracy, rows, "train/accuracy", "training attempts", "#AAAAAA")
    _line(accuracy, rows, "eval/accuracy", "held out, temperature 1", _BLUE, marker="o")
    _line(accuracy, rows, "eval/accuracy_greedy", "held out, greedy", _ORANGE, marker="s")
    accuracy.set_ylim(-0.03, 1.03)
    _finish(accuracy, "Accuracy", "fraction right")

    _line(length, rows, "answer/tokens_mean", "mean answer", _GREEN)
    length.set_ylim(bottom=0)
    _finish(length, "Answer length", "tokens")

    _time_split(seconds, rows)
    _finish(seconds, "Time per step", "seconds")

    save_png(figure, path)


def draw_comparison(runs: Mapping[str, Sequence[Mapping[str, Any]]], keys: Sequence[str], path: Path) -> None:
    """One panel per metric key, one line per run (by its name), into a PNG that is replaced whole."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(keys), 3.4), dpi=110, layout="constrained")
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        for number, (name, rows) in enumerate(runs.items()):
            _line(axes, rows, key, name, _PHASE_COLOURS[number % len(_PHASE_COLOURS)], marker="o")
        _finish(axes, key, "")
    save_png(figure, path)


def save_png(figure: Any, path: Path) -> None:
    """Write a matplotlib figure whole, without the version that would make equal pictures differ."""
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png", metadata={"Software": None})
    os.replace(temporary, path)


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    seen = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in seen], [value for _, value in seen]


def _line(axes: Any, rows: Sequence[Mapping[str, Any]], key: str, label: str, colour: str, marker: str | None = None) -> None:
    steps, values = _points(rows, key)
    if steps:
        marker = marker or ("." if len(steps) < 3 else None)
        axes.plot(steps, values, label=label, color=colour, marker=marker, markersize=4.5, linewidth=1.6)


def _time_split(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    splits = [(row["step"], phase_seconds(row)) for row in rows]
    phases = list(dict.fromkeys(phase for _, split in splits for phase in split))
    steps = [step for step, _ in splits]
    below = [0.0] * len(steps)
    for index, phase in enumerate(phases):
        heights = [split.get(phase, 0.0) for _, split in splits]
        axes.bar(steps, heights, bottom=below, width=0.9, label=phase, color=_PHASE_COLOURS[index % len(_PHASE_COLOURS)])
        below = [b + h for b, h in zip(below, heights, strict=True)]


def _finish(axes: Any, title: str, unit: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("training step")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    num_curves = len(axes.get_legend_handles_labels()[1])
    if num_curves > 1:  # a single curve is named by the title
        axes.legend(fontsize=8, framealpha=0.85)
    elif num_curves == 0:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="#777777")
