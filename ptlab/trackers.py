"""TensorBoard and Weights & Biases beside metrics.jsonl: only what the config asks for, and their packages are needed only then."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ptlab.config import RunConfig
from ptlab.errors import ConfigError


class Tracker(Protocol):
    """Takes the rows of a run, in order."""

    def write(self, step: int, metrics: Mapping[str, Any]) -> None: ...

    def replay(self, step: int, metrics: Mapping[str, Any]) -> None:
        """A row from before a resume."""
        ...

    def close(self) -> None: ...


def check_trackers(config: RunConfig) -> None:
    """Raises: ConfigError if the package of a configured tracker is not installed."""
    wanted = [("tensorboard", config.logging.tensorboard, "false"), ("wandb", config.logging.wandb is not None, "null")]
    for package, is_wanted, off in wanted:
        if is_wanted and importlib.util.find_spec(package) is None:
            way_out = f"pip install {package}, or --set logging.{package}={off}"
            raise ConfigError(f"logging.{package}: needs the package {package}, which is not installed; {way_out}")


def open_trackers(config: RunConfig, directory: Path) -> list[Tracker]:
    """The configured trackers; check_trackers has passed."""
    trackers: list[Tracker] = []
    if config.logging.tensorboard:
        trackers.append(TensorBoardTracker(directory / "tensorboard"))
    if config.logging.wandb is not None:
        trackers.append(WandbTracker(config, directory))
    return trackers


class TensorBoardTracker:
    """Event files in <run>/tensorboard, written afresh by every process: a resume replays the rows it keeps."""

    def __init__(self, directory: Path) -> None:
        from tensorboard.summary import Writer

        shutil.rmtree(directory, ignore_errors=True)
        self._writer = Writer(str(directory))

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        for key, value in metrics.items():
            if value is not None:
                self._writer.add_scalar(key, float(value), step)
        self._writer.flush()

    replay = write

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """One W&B run per run directory; a resume continues it by its id."""

    def __init__(self, config: RunConfig, directory: Path) -> None:
        import wandb

        id_file = directory / "wandb_id.txt"
        run_id = id_file.read_text(encoding="utf-8").strip() if id_file.exists() else None
        self._run = wandb.init(
            project=config.logging.wandb, name=config.name, id=run_id, resume="allow", dir=str(directory), config=config.model_dump()
        )
        id_file.write_text(self._run.id + "\n", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._run.log(dict(metrics), step=step)

    def replay(self, step: int, metrics: Mapping[str, Any]) -> None:
        """W&B keeps what the run logged before."""

    def close(self) -> None:
        self._run.finish()
