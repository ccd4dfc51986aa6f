"""What all pictures share: size, colours, labels at the end of a line instead of a legend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ptlab.curves import save_png

# Okabe and Ito's palette: distinct for colour-blind readers; the three used most also differ in lightness, so grey print keeps them apart.
BLUE, ORANGE, GREEN, PURPLE, SKY, BLACK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000", "#777777"
DOTS_PER_INCH = 110
"""Of every picture: 7 inches are 770 pixels, about the width of a page of the documentation."""


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure, inches; no pyplot, so no display and no global state."""
    from matplotlib.figure import Figure  # half a second to import

    return Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")


def save(figure: Any, path: Path) -> Path:
    """Write the PNG whole, as ptlab.curves does; returns `path`."""
    save_png(figure, path)
    return path


def finish(axes: Any, *, title: str = "", x: str = "", y: str = "") -> None:
    """Title, axis labels, a light grid, no box."""
    axes.set_title(title, fontsize=10.5, loc="left")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)


def label_ends(axes: Any, ends: Mapping[str, tuple[float, float, str]], *, gap: float) -> None:
    """Write each name right of its line's end, moved up or down where two would touch; call it when the limits of y stand.

    Args:
        ends: name -> (x, y, colour) of the last point.
        gap: least distance of two labels, in units of y.
    """
    heights = spread([y for _, y, _ in ends.values()], gap, highest=axes.get_ylim()[1])
    for (name, (x, _, colour)), height in zip(ends.items(), heights, strict=True):
        axes.annotate(
            name, (x, height), xytext=(5, 0), textcoords="offset points", color=colour, fontsize=8.5, va="center", annotation_clip=False
        )


def spread(values: Sequence[float], gap: float, *, highest: float) -> list[float]:
    """The values, moved so that neighbours are `gap` apart: those too near form a block around their mean, at most at `highest`; the
    others stay. Order is kept (equals: as given)."""
    blocks: list[list[int]] = []
    for index in sorted(range(len(values)), key=lambda index: values[index]):
        blocks.append([index])
        while len(blocks) > 1 and _places(blocks[-1], values, gap, highest)[0] - _places(blocks[-2], values, gap, highest)[-1] < gap:
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    places = {index: place for block in blocks for index, place in zip(block, _places(block, values, gap, highest), strict=True)}
    return [places[index] for index in range(len(values))]


def _places(block: Sequence[int], values: Sequence[float], gap: float, highest: float) -> list[float]:
    """Heights of a block's labels, lowest first."""
    length = gap * (len(block) - 1)
    lowest = min(fmean(values[index] for index in block) - length / 2, highest - length)
    return [lowest + gap * place for place in range(len(block))]
