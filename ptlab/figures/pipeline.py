"""One training step as a diagram: who hands what to whom, in the names of the code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptlab.figures.paper import BLACK, BLUE, GREEN, ORANGE, new_figure, save

Box = tuple[float, float, str, str, str]
"""Left edge, lower edge, heading, text below it, colour; widths and heights are WIDTH and HEIGHT."""
WIDTH, HEIGHT = 2.7, 1.35
_ENV, _SAMPLER, _TRAINER = GREEN, BLUE, ORANGE
BOXES: Sequence[Box] = (
    (0.0, 2.6, "1  problems", "RLDataset.get_batch(step)\nP builders, one a problem", _ENV),
    (3.4, 2.6, "2  attempts", "rollout.run_groups\nP x G, all at once", _SAMPLER),
    (6.8, 2.6, "3  rewards", "Env.step -> StepResult\none number an attempt", _ENV),
    (6.8, 0.0, "4  advantages, datums", "group_centred(rewards_G)\ngroup_to_datums(...)", _TRAINER),
    (3.4, 0.0, "5  train", "forward_backward(data_D)\noptim_step(adam)", _TRAINER),
    (0.0, 0.0, "6  sync", "new version -> sampler,\nverified or refused", _SAMPLER),
)
ARROWS = (
    ("right", 2.7, 3.275, "prompts"),
    ("right", 6.1, 3.275, "tokens,\nlog q"),
    ("down", 8.15, 2.6, "trajectories\nwith rewards"),
    ("left", 6.8, 0.675, "data_D"),
    ("left", 3.4, 0.675, "weights"),
)


def draw_pipeline(path: Path) -> Path:
    """The loop of recipes/rl.py."""
    figure = new_figure(9.2, 4.0)
    axes = figure.subplots()
    axes.set_xlim(-0.15, 9.65)
    axes.set_ylim(-0.55, 4.3)
    axes.set_aspect("equal")
    axes.axis("off")
    for box in BOXES:
        _draw_box(axes, box)
    for direction, x, y, text in ARROWS:
        _draw_arrow(axes, direction, x, y, text)
    # sync hands the sampler its new weights: from box 6 up and over to box 2
    axes.annotate("", xy=(3.9, 2.6), xytext=(1.35, 1.35), arrowprops={"arrowstyle": "-|>", "color": BLACK, "linewidth": 1.4})
    axes.text(2.35, 2.05, "sampling_client\nof this version", fontsize=8, ha="right", va="center")
    for x, text, colour in ((0.0, "environment: yours", _ENV), (3.4, "sampler", _SAMPLER), (6.8, "algorithm and trainer", _TRAINER)):
        axes.text(x, -0.4, f"\u25a0 {text}", color=colour, fontsize=9, va="center")
    return save(figure, path)


def _draw_box(axes: Any, box: Box) -> None:
    from matplotlib.patches import FancyBboxPatch

    x, y, heading, text, colour = box
    shape = FancyBboxPatch(
        (x, y), WIDTH, HEIGHT, boxstyle="round,pad=0,rounding_size=0.12", facecolor="white", edgecolor=colour, linewidth=2
    )
    axes.add_patch(shape)
    axes.text(x + 0.14, y + HEIGHT - 0.27, heading, fontsize=10, weight="bold", color=colour, va="center")
    axes.text(x + 0.14, y + 0.5, text, fontsize=7.8, family="monospace", va="center", linespacing=1.5)


def _draw_arrow(axes: Any, direction: str, x: float, y: float, text: str) -> None:
    """An arrow across the gap between two boxes that begins at (x, y)."""
    gap = {"right": (0.7, 0.0), "left": (-0.7, 0.0), "down": (0.0, -1.25)}[direction]
    axes.annotate("", xy=(x + gap[0], y + gap[1]), xytext=(x, y), arrowprops={"arrowstyle": "-|>", "color": BLACK, "linewidth": 1.4})
    if direction == "down":
        axes.text(x + 0.12, y + gap[1] / 2, text, fontsize=8, va="center")
    else:
        axes.text(x + gap[0] / 2, y + 0.14, text, fontsize=8, ha="center", va="bottom")
