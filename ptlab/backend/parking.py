"""Trainable models on disk while nobody uses them, and after a crash: the newest snapshot, and what has been asked since.

A snapshot holds adapter, optimizer and unapplied gradients as they were after request `seq_id`. What came later stands in the journal
(backend/store.py) and is run again on top of it, once each: that is why an optimizer step is never lost and never applied twice.

    <root>/<model_id>/parked/<seq_id>-<nanoseconds>/snapshot.json + the files of Trainer.save_state
"""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ptlab.backend.checkpoints import checked, fsync, sha256
from ptlab.errors import CheckpointError

SNAPSHOT = "snapshot.json"


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    seq_id: int
    step: int
    files: dict[str, str]  # name -> SHA-256


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Where the state of a model lies, and what it includes."""

    directory: Path
    seq_id: int
    """The last request whose effect is in it."""
    step: int
    """Optimizer steps behind it."""


class Parking:
    """The snapshots below one directory. Blocking; one writer per model."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def _place(self, model_id: str) -> Path:
        return self._root / checked(model_id, "model id") / "parked"

    def write(self, model_id: str, seq_id: int, step: int, fill: Callable[[Path], None]) -> Snapshot:
        """Save a model's state, whole or not at all; older snapshots go once the new one is on the disk."""
        place = self._place(model_id)
        place.mkdir(parents=True, exist_ok=True)
        temporary = place / f".new-{uuid.uuid4().hex[:8]}"
        temporary.mkdir()
        try:
            fill(temporary)
            facts = _Facts(seq_id=seq_id, step=step, files={file.name: sha256(file) for file in sorted(temporary.iterdir())})
            (temporary / SNAPSHOT).write_text(facts.model_dump_json() + "\n")
            for file in [*temporary.iterdir(), temporary]:
                fsync(file)
            final = place / f"{seq_id}-{time.time_ns()}"
            temporary.rename(final)
            fsync(place)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)  # the first error is the one to report
            raise
        for other in place.iterdir():
            if other.name.startswith(".") or _order(other) < _order(final):
                shutil.rmtree(other, ignore_errors=True)  # what stays is older than the newest, or unfinished: never read
        return Snapshot(final, seq_id, step)

    def newest_seq_id(self, model_id: str) -> int:
        """The last request that a snapshot includes; 0 = creation, also without any snapshot."""
        newest = self._newest(model_id)
        return 0 if newest is None else _order(newest)[0]

    def _newest(self, model_id: str) -> Path | None:
        place = self._place(model_id)
        return max((entry for entry in place.iterdir() if entry.name[0] != "."), key=_order, default=None) if place.exists() else None

    def newest(self, model_id: str) -> Snapshot | None:
        """Raises: CheckpointError if its files are damaged."""
        directory = self._newest(model_id)
        if directory is None:
            return None
        facts = _Facts.model_validate(json.loads((directory / SNAPSHOT).read_bytes()))
        damaged = [name for name, digest in facts.files.items() if not (directory / name).exists() or sha256(directory / name) != digest]
        if damaged:
            raise CheckpointError(
                f"{directory}: {damaged} differ from their checksums in {SNAPSHOT}; this model cannot go on, use a checkpoint"
            )
        return Snapshot(directory, facts.seq_id, facts.step)


def _order(directory: Path) -> tuple[int, int]:
    seq_id, written = directory.name.split("-")
    return int(seq_id), int(written)


@dataclass(slots=True)
class ReplayCost:
    """Decides when a model deserves a new snapshot: replaying must stay short, and writing snapshots must stay cheap."""

    shortest_s: float = 30.0
    """Work that may always be lost to a replay."""
    share: float = 0.05
    """Of the time spent computing, at most this much goes into snapshots."""
    _since_s: float = 0.0
    _snapshot_s: float = 0.0

    def add(self, seconds: float) -> None:
        """Work done that a restart would have to do again."""
        self._since_s += seconds

    @property
    def due(self) -> bool:
        return self._since_s > max(self.shortest_s, self._snapshot_s / self.share)

    def saved(self, began: float) -> None:
        """A snapshot was written; `began` is its time.perf_counter()."""
        self._since_s, self._snapshot_s = 0.0, time.perf_counter() - began
