"""Which pictures there are. A new one is a function and one line here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ptlab.errors import ConfigError
from ptlab.figures import group, losses, pipeline, runs
from ptlab.figures.records import read_runs

RUNS_FILE, GROUP_FILE = "runs.jsonl", "group.json"
SHOWN_ATTEMPT = 5
"""Of group.json, in the token picture: one that carries and is right, beside others that forget."""

PICTURES: Mapping[str, Callable[[Path, Path], Path]] = {
    "pipeline.png": lambda data, path: pipeline.draw_pipeline(path),
    "learning.png": lambda data, path: runs.draw_learning(read_runs(data / RUNS_FILE), path),
    "advantages.png": lambda data, path: group.draw_advantages(_group(data), path),
    "datum.png": lambda data, path: group.draw_datum(_group(data), path, attempt=SHOWN_ATTEMPT),
    "clip_shapes.png": lambda data, path: losses.draw_clip_shapes(path),
    "learning_rates.png": lambda data, path: runs.draw_learning_rates(read_runs(data / RUNS_FILE), path),
    "group_sizes.png": lambda data, path: runs.draw_group_sizes(read_runs(data / RUNS_FILE), path),
}
"""File below docs/images -> fn(folder of the data, path to write)."""


def draw_all(data: Path, out: Path, names: Sequence[str] = ()) -> list[Path]:
    """Draw these pictures, all by default, and say where they are. Raises: ConfigError for an unknown name."""
    unknown = [name for name in names if name not in PICTURES]
    if unknown:
        raise ConfigError(f"no picture is called {', '.join(unknown)}; there are {', '.join(PICTURES)}")
    out.mkdir(parents=True, exist_ok=True)
    return [draw(data, out / name) for name, draw in PICTURES.items() if not names or name in names]


def _group(data: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((data / GROUP_FILE).read_text(encoding="utf-8"))
    return found
