"""Pictures of the quickstart's runs: what learning looks like, and what the learning rate and the group size change."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptlab.figures.paper import BLUE, GREEN, GREY, ORANGE, PURPLE, finish, label_ends, new_figure, save
from ptlab.figures.records import Run

BASE, CONTROL = "docs-lr-1e-3", "docs-control"
LEARNING_RATES = ("docs-lr-3e-4", BASE, "docs-lr-3e-3", "docs-lr-1e-2")
GROUP_SIZES = ("docs-group-4", BASE, "docs-group-16")
GREEDY, AT_ONE = "eval/accuracy_greedy", "eval/accuracy"


def draw_learning(runs: Mapping[str, Run], path: Path) -> Path:
    """Accuracy of the quickstart and its control; answer length and groups that taught nothing."""
    figure = new_figure(11, 3.7)
    accuracy, length, groups = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    ends = {}
    for name, run, key, colour, style, marker in (
        ("greedy", BASE, GREEDY, ORANGE, "-", "s"),
        ("temperature 1", BASE, AT_ONE, BLUE, "-", "o"),
        ("control, temp. 1", CONTROL, AT_ONE, GREY, "--", "o"),
        ("control, greedy", CONTROL, GREEDY, GREY, ":", "s"),
    ):
        ends[name] = _line(accuracy, runs[run], key, colour, style, marker)
    _steps(accuracy, room=11)
    accuracy.set_ylim(-0.03, 1.03)
    label_ends(accuracy, ends, gap=0.065)
    finish(accuracy, title="Right answers to held-out problems", x="training step", y="share")

    ends = {name: _line(length, runs[run], "answer/tokens_mean", colour, style) for name, run, colour, style in _PAIR}
    _steps(length, room=11)
    length.set_ylim(bottom=0)
    label_ends(length, ends, gap=3)
    finish(length, title="Length of an answer", x="training step", y="tokens")

    ends = {name: _line(groups, runs[run], "groups/skipped", colour, style) for name, run, colour, style in _PAIR}
    _steps(groups, room=11)
    groups.set_ylim(-0.4, 16.4)
    label_ends(groups, ends, gap=1)
    finish(groups, title="Groups that agree (of 16)", x="training step", y="groups skipped")
    return save(figure, path)


def draw_learning_rates(runs: Mapping[str, Run], path: Path) -> Path:
    """Four learning rates: accuracy at temperature 1 and greedy, and the size of the gradient, which shows the break."""
    styles = dict(zip(LEARNING_RATES, ((GREEN, ":", "^"), (BLUE, "-", "o"), (PURPLE, "-.", "D"), (ORANGE, "--", "s")), strict=True))
    figure = new_figure(11, 3.7)
    panels = (
        (AT_ONE, "Held out, temperature 1", "share right"),
        (GREEDY, "Held out, greedy", "share right"),
        ("optim/grad_norm", "Length of the gradient", "optim/grad_norm"),
    )
    for axes, (key, title, unit) in zip(figure.subplots(1, 3), panels, strict=True):
        ends = {}
        for name, (colour, style, marker) in styles.items():
            rate = runs[name].config["optim.learning_rate"]
            ends[f"{rate:.0e}".replace("e-0", "e-")] = _line(axes, runs[name], key, colour, style, marker if "eval" in key else None)
        _steps(axes, room=6)
        axes.set_ylim(*((-0.03, 1.03) if "eval" in key else (0, None)))
        label_ends(axes, ends, gap=0.065 * axes.get_ylim()[1])
        finish(axes, title=title, x="training step", y=unit)
    return save(figure, path)


def draw_group_sizes(runs: Mapping[str, Run], path: Path) -> Path:
    """128 attempts a step, dealt to many problems with few attempts or to few with many."""
    styles = dict(zip(GROUP_SIZES, ((GREEN, ":", "^"), (BLUE, "-", "o"), (ORANGE, "--", "s")), strict=True))
    figure = new_figure(8.5, 3.7)
    accuracy, skipped = figure.subplots(1, 2)
    ends, skipped_ends = {}, {}
    for name, (colour, style, marker) in styles.items():
        size, groups = runs[name].config["env.group_size"], runs[name].config["env.groups_per_step"]
        ends[f"{groups} x {size}"] = _line(accuracy, runs[name], AT_ONE, colour, style, marker)
        steps, counts = runs[name].points("groups/skipped")
        shares = [100 * count / groups for count in counts]
        skipped.plot(steps, shares, color=colour, linestyle=style, linewidth=1.8)
        skipped_ends[f"{groups} x {size}"] = (steps[-1], shares[-1], colour)
    accuracy.set_ylim(-0.03, 1.03)
    label_ends(accuracy, ends, gap=0.065)
    skipped.set_ylim(-3, 103)
    label_ends(skipped, skipped_ends, gap=6)
    for axes in (accuracy, skipped):
        _steps(axes, room=8)
    finish(accuracy, title="Held out, temperature 1 (problems x attempts)", x="training step", y="share right")
    finish(skipped, title="Groups that agree and teach nothing", x="training step", y="percent of the step's groups")
    return save(figure, path)


_PAIR = (("quickstart", BASE, BLUE, "-"), ("control", CONTROL, GREY, "--"))


def _line(axes: Any, run: Run, key: str, colour: str, style: str, marker: str | None = None) -> tuple[float, float, str]:
    """Draw one metric of a run; returns its last point and colour, for the label."""
    steps, values = run.points(key)
    axes.plot(steps, values, color=colour, linestyle=style, marker=marker, markersize=4, linewidth=1.8)
    return steps[-1], values[-1], colour


def _steps(axes: Any, *, room: float) -> None:
    """Steps 0 to 30 with room for the labels to the right of the last."""
    axes.set_xlim(-0.8, 30 + room)
    axes.set_xticks([0, 10, 20, 30])
