"""One group of attempts taken apart: rewards to advantages, and one attempt as the datum that trains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ptlab.figures.paper import BLACK, BLUE, GREY, ORANGE, SKY, finish, new_figure, save

MOST_LETTERS = 58
"""Of an answer in the picture; the middle of a longer one is left out."""
NAMED_BELOW_NATS = -0.3
"""Tokens less likely than e^-0.3 = 0.74 get their probability written beside their bar."""


def draw_advantages(group: Mapping[str, Any], path: Path) -> Path:
    """Each attempt of the group: what it says, its reward, and the reward minus the group's mean."""
    attempts = group["attempts"]
    heights = list(range(len(attempts)))[::-1]
    rewards = [attempt["reward"] for attempt in attempts]
    figure = new_figure(10.5, 0.34 * len(attempts) + 1.2)
    text, reward_axes, advantage_axes = figure.subplots(1, 3, width_ratios=(1.75, 1, 1.1), sharey=True)

    text.set_xlim(0, 1)
    text.axis("off")
    text.set_title(f"Eight attempts at: {question_of(group)}", fontsize=10.5, loc="left")
    for height, attempt in zip(heights, attempts, strict=True):
        answer = "".join(attempt["pieces"]).removesuffix("<|im_end|>")
        text.text(0, height, shortened(answer, MOST_LETTERS), fontsize=8.2, family="monospace", va="center")

    mean = fmean(rewards)
    reward_axes.barh(heights, rewards, color=[BLUE if reward > mean else ORANGE for reward in rewards], height=0.55)
    reward_axes.axvline(mean, color=BLACK, linewidth=1, linestyle="--")
    reward_axes.text(mean, len(attempts) - 0.45, f" mean {mean:g}", fontsize=8.5, va="bottom", ha="left")
    for height, reward in zip(heights, rewards, strict=True):
        reward_axes.text(reward + 0.03, height, f"{reward:g}", fontsize=8.5, va="center")
    reward_axes.set_xlim(0, 1.25)
    reward_axes.set_ylim(-0.6, len(attempts) + 0.1)
    finish(reward_axes, x="reward")

    for height, attempt in zip(heights, attempts, strict=True):
        advantage = attempt["advantage"]
        colour = BLUE if advantage > 0 else ORANGE
        advantage_axes.barh(height, advantage, color=colour, height=0.55)
        ha, shift = ("left", 0.03) if advantage > 0 else ("right", -0.03)
        advantage_axes.text(advantage + shift, height, f"{advantage:+g}", fontsize=8.5, va="center", ha=ha)
    advantage_axes.axvline(0, color=BLACK, linewidth=1)
    advantage_axes.set_xlim(-1.15, 1.15)
    finish(advantage_axes, x="advantage = reward - mean")
    for axes in (reward_axes, advantage_axes):
        axes.tick_params(labelleft=False, left=False)
        axes.grid(axis="y", visible=False)
    return save(figure, path)


def draw_datum(group: Mapping[str, Any], path: Path, *, attempt: int) -> Path:
    """One attempt token by token: target_tokens as text, logprobs and advantages of the datum, position by position."""
    shown = group["attempts"][attempt]
    targets = [*group["prompt_pieces"][1:], *shown["pieces"]]
    logprobs, advantages = shown["datum"]["logprobs"], shown["datum"]["advantages"]
    num_prompt = len(group["prompt_pieces"]) - 1
    positions = list(range(len(targets)))
    colours = [GREY if position < num_prompt else BLUE for position in positions]

    figure = new_figure(12, 4.6)
    words, surprise, pushed = figure.subplots(3, 1, sharex=True, height_ratios=(1.05, 1.4, 1))
    words.set_ylim(0, 1)
    words.axis("off")
    words.set_title("target_tokens: what each position must predict", fontsize=10.5, loc="left")
    for position, piece in enumerate(targets):
        face = "#EEEEEE" if position < num_prompt else "#DDEEF8"
        words.add_patch(_box(position - 0.5, 0.0, 1.0, 1.0, face))
        words.text(position, 0.5, visible(piece), rotation=90, fontsize=7.5, family="monospace", ha="center", va="center")

    surprise.bar(positions, logprobs, color=colours, width=0.8)
    surprise.axhline(0, color=BLACK, linewidth=0.8)
    finish(surprise, title="logprobs: log q, the sampler's own, of that token (0.0 on the prompt)", y="nats")
    _name_surprising(surprise, targets, logprobs)

    pushed.bar(positions, advantages, color=colours, width=0.8)
    pushed.axhline(0, color=BLACK, linewidth=0.8)
    pushed.set_ylim(min(0.0, *advantages) * 1.25, max(0.0, *advantages) * 1.25)
    finish(pushed, title="advantages: that of the attempt on each sampled token (0.0 on the prompt)", x="position in model_input")
    for axes in (surprise, pushed):
        axes.axvspan(-0.5, num_prompt - 0.5, color=GREY, alpha=0.1, linewidth=0)
    middle = (num_prompt - 1) / 2
    pushed.text(middle, 0.5 * max(pushed.get_ylim(), key=abs), "prompt: nothing is trained", ha="center", va="center", fontsize=8.5)
    words.set_xlim(-0.6, len(targets) - 0.4)
    return save(figure, path)


def question_of(group: Mapping[str, Any]) -> str:
    """The user's message inside the ChatML prompt."""
    prompt: str = "".join(group["prompt_pieces"])
    return prompt.split("<|im_start|>user\n")[-1].split("<|im_end|>")[0].strip()


def shortened(text: str, most: int) -> str:
    """At most `most` letters: the start and the end, dots between."""
    if len(text) <= most:
        return text
    half = (most - 3) // 2
    return f"{text[: most - 3 - half]}...{text[-half:]}"


def visible(piece: str) -> str:
    """A token as it can be read in a narrow box: spaces and line ends as signs, special tokens by their name alone."""
    return piece.replace("<|", "").replace("|>", "").replace("\n", "\\n").replace(" ", "_")


def _name_surprising(axes: Any, targets: Sequence[str], logprobs: Sequence[float]) -> None:
    """Say of each token the sampler was in doubt about how likely it found it."""
    for position, (target, logprob) in enumerate(zip(targets, logprobs, strict=True)):
        if logprob < NAMED_BELOW_NATS:
            text = f'"{visible(target)}": q = {math.exp(logprob):.2f}'
            axes.annotate(text, (position + 0.5, logprob), xytext=(3, 1), textcoords="offset points", fontsize=8.5, va="bottom")


def _box(x: float, y: float, width: float, height: float, face: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, facecolor=face, edgecolor=SKY if face == "#DDEEF8" else GREY, linewidth=0.6)
