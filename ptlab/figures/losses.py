"""The shape of each policy loss: its value and its gradient as functions of the ratio p / q, computed by ptlab.loss_formulas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptlab.figures.paper import BLACK, BLUE, GREY, ORANGE, finish, new_figure, save
from ptlab.loss_table import LOSSES

LOWEST_RATIO, HIGHEST_RATIO, NUM_POINTS = 0.2, 5.0, 481
SAMPLING_PROBABILITY = 0.15
"""q of the token that is drawn; p = ratio x q then stays below 1. Only cispo's and dro's values depend on it, no gradient by log p does."""
SHOWN_CONFIG: Mapping[str, Mapping[str, float]] = {
    "importance_sampling": {},
    "ppo": {},
    "cispo": {},
    "dro": {"beta": 0.5},  # ten times the default: at 0.05 its pull cannot be seen beside an advantage of 1
    "gspo": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},  # the default, 0.9997 and 1.0004, is one line in this picture
}
"""What differs from the losses' defaults, so that the shape can be seen."""


def token_curve(name: str, ratios_N: Tensor, advantage: float) -> tuple[Tensor, Tensor]:
    """Loss of one token and its derivative by log p, at each ratio; both [N], float64.

    For gspo the token is a sequence of its own, so its ratio is the sequence's.
    """
    spec = LOSSES[name]
    config = {**spec.defaults, **SHOWN_CONFIG[name]}
    sampling_logprob = torch.log(torch.tensor([SAMPLING_PROBABILITY], dtype=torch.float64))
    losses, gradients = [], []
    for ratio in ratios_N.double():
        target = (sampling_logprob + torch.log(ratio)).requires_grad_()
        extra = [torch.ones(1, dtype=torch.float64)] if spec.per_sequence else []
        loss = spec.fn(target, sampling_logprob, torch.tensor([advantage], dtype=torch.float64), *extra, **config)
        [gradient] = torch.autograd.grad(loss.sum(), target)
        losses.append(loss.detach())
        gradients.append(gradient)
    return torch.cat(losses), torch.cat(gradients)


def draw_clip_shapes(path: Path) -> Path:
    """Five columns, a loss each; above its value, below its gradient by log p; good token (advantage +1) and bad token (-1)."""
    ratios_N = torch.linspace(LOWEST_RATIO, HIGHEST_RATIO, NUM_POINTS, dtype=torch.float64)
    figure = new_figure(12, 5.4)
    rows = figure.subplots(2, len(SHOWN_CONFIG), sharex=True, sharey="row")
    for column, name in enumerate(SHOWN_CONFIG):
        for advantage, colour, style in ((1.0, BLUE, "-"), (-1.0, ORANGE, "--")):
            for axes, values_N in zip(rows[:, column], token_curve(name, ratios_N, advantage), strict=True):
                axes.plot(ratios_N.numpy(), values_N.numpy(), color=colour, linestyle=style, linewidth=2)
        _bounds(rows[:, column], {**LOSSES[name].defaults, **SHOWN_CONFIG[name]}, name)
        finish(rows[0, column], title=name, y="loss of the token" if column == 0 else "")
        finish(rows[1, column], x="ratio p / q", y="gradient by log p" if column == 0 else "")
    for axes in rows.flat:
        axes.axhline(0, color=GREY, linewidth=0.6)
        axes.axvline(1, color=GREY, linewidth=0.6, linestyle=":")
        axes.set_xscale("log")
        axes.set_xticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
        axes.minorticks_off()
    for axes, height, text, colour in (
        (rows[0, 0], 3.4, "bad token\nA = -1", ORANGE),
        (rows[0, 0], -3.2, "good token\nA = +1", BLUE),
        (rows[1, 0], 3.4, "above 0:\nmade rarer", ORANGE),
        (rows[1, 0], -3.4, "below 0:\nmade likelier", BLUE),
    ):
        axes.text(0.26, height, text, color=colour, fontsize=8.5, va="center")
    return save(figure, path)


def _bounds(axes_2: Sequence[Any], config: Mapping[str, float], name: str) -> None:
    """Shade what lies outside the clip bounds; name the bounds, or dro's beta, in the upper picture."""
    for axes in axes_2:
        if "clip_low_threshold" in config:
            axes.axvspan(LOWEST_RATIO, max(config["clip_low_threshold"], LOWEST_RATIO), color=BLACK, alpha=0.07, linewidth=0)
            axes.axvspan(config["clip_high_threshold"], HIGHEST_RATIO, color=BLACK, alpha=0.07, linewidth=0)
    match name:
        case "importance_sampling":
            note = "no bound"
        case "dro":
            note = f"beta {config['beta']:g}"
        case _:
            note = f"bounds {config['clip_low_threshold']:g} and {config['clip_high_threshold']:g}"
    axes_2[0].text(0.03, 0.04, note, transform=axes_2[0].transAxes, fontsize=8, color=BLACK)
