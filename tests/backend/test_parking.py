"""Snapshots of parked models: whole or not at all, the newest one, damage found."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptlab.backend.parking import Parking, ReplayCost
from ptlab.errors import CheckpointError, InvalidRequestError


def fill(text: str) -> object:
    def write(directory: Path) -> None:
        (directory / "state").write_text(text)

    return write


def test_the_newest_snapshot_is_found_and_older_ones_go(tmp_path: Path) -> None:
    parking = Parking(tmp_path)
    assert parking.newest("m") is None
    assert parking.newest_seq_id("m") == 0
    for seq_id in (9, 10, 10):  # as text "10" is smaller than "9"
        parking.write("m", seq_id, step=seq_id // 2, fill=fill(f"after {seq_id}"))  # type: ignore[arg-type]
    newest = parking.newest("m")
    assert newest is not None
    assert (newest.seq_id, newest.step, (newest.directory / "state").read_text()) == (10, 5, "after 10")
    assert parking.newest_seq_id("m") == 10
    assert len(list((tmp_path / "m" / "parked").iterdir())) == 1


def test_a_snapshot_that_fails_leaves_the_one_before(tmp_path: Path) -> None:
    parking = Parking(tmp_path)
    parking.write("m", 3, step=1, fill=fill("good"))  # type: ignore[arg-type]

    def broken(directory: Path) -> None:
        (directory / "state").write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        parking.write("m", 5, step=2, fill=broken)
    (tmp_path / "m" / "parked" / ".new-killed").mkdir()  # of a process that was killed while it wrote
    newest = parking.newest("m")
    assert newest is not None
    assert (newest.seq_id, (newest.directory / "state").read_text()) == (3, "good")


def test_damage_is_found(tmp_path: Path) -> None:
    parking = Parking(tmp_path)
    snapshot = parking.write("m", 3, step=1, fill=fill("good"))  # type: ignore[arg-type]
    (snapshot.directory / "state").write_text("goof")
    with pytest.raises(CheckpointError, match="state"):
        parking.newest("m")
    with pytest.raises(InvalidRequestError):
        parking.newest("../elsewhere")


def test_a_snapshot_is_due_when_a_replay_would_take_long_but_not_when_snapshots_are_dear() -> None:
    cost = ReplayCost(shortest_s=30.0, share=0.05)
    cost.add(29.0)
    assert not cost.due
    cost.add(2.0)
    assert cost.due
    cost.saved(began=0.0)  # perf_counter() is far from 0: it took very long
    cost.add(31.0)
    assert not cost.due
