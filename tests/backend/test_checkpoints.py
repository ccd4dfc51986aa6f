"""Whole or not at all: what is on disk after writes, failures, crashes and damage."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from ptlab.backend.checkpoints import CheckpointPath, Checkpoints, Manifest, expiry
from ptlab.errors import CheckpointError, InvalidRequestError, NotFoundError
from ptlab.types import LoraConfig

PATH = CheckpointPath(model_id="run:train:0", kind="weights", name="step_1")


def manifest(**changes: object) -> Manifest:
    fields: dict[str, object] = {"base_model": "m", "lora": LoraConfig(rank=4), "alpha": 32, "step": 3, "created": datetime.now(UTC)}
    return Manifest.model_validate(fields | changes)


def test_what_is_written_is_read_with_its_manifest(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    store.write(PATH, manifest(), lambda d: (d / "weights.bin").write_text("abc"))
    read, directory = Checkpoints(tmp_path).read(PATH)
    assert (read.step, read.lora.rank, read.files["weights.bin"].size_bytes) == (3, 4, 3)
    assert (directory / "weights.bin").read_text() == "abc"
    assert str(PATH) == "tinker://run:train:0/weights/step_1"
    assert CheckpointPath.parse(str(PATH)) == PATH


def test_a_failing_write_leaves_nothing(tmp_path: Path) -> None:
    def fill(directory: Path) -> None:
        (directory / "weights.bin").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        Checkpoints(tmp_path).write(PATH, manifest(), fill)
    assert list((tmp_path / "run:train:0" / "weights").iterdir()) == []


def test_a_taken_name_is_refused_and_the_old_content_kept(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    store.write(PATH, manifest(), lambda d: (d / "f").write_text("old"))
    with pytest.raises(InvalidRequestError, match="exists already; choose another name or pass overwrite=True"):
        store.write(PATH, manifest(), lambda d: (d / "f").write_text("new"))
    assert (store.directory(PATH) / "f").read_text() == "old"
    store.write(PATH, manifest(), lambda d: (d / "f").write_text("new"), overwrite=True)
    assert (store.read(PATH)[1] / "f").read_text() == "new"


@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_damage_is_found(tmp_path: Path, damage: str) -> None:
    store = Checkpoints(tmp_path)
    store.write(PATH, manifest(), lambda d: (d / "f").write_text("content"))
    file = store.directory(PATH) / "f"
    if damage == "remove":
        file.unlink()
    else:
        file.write_text("conten" if damage == "cut" else "c0ntent")
    with pytest.raises(CheckpointError, match="f is missing or differs from its checksum"):
        store.read(PATH)


def test_a_crash_between_the_two_renames_of_an_overwrite_loses_nothing(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    store.write(PATH, manifest(), lambda d: (d / "f").write_text("old"))
    directory = store.directory(PATH)
    directory.rename(directory.with_name(f".old-1234~{directory.name}"))  # as _replace does first
    assert (Checkpoints(tmp_path).read(PATH)[1] / "f").read_text() == "old"


def test_leftovers_of_a_dead_process_are_cleared_and_never_listed(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    store.write(PATH, manifest(), lambda d: (d / "f").write_text("x"))
    leftover = store.directory(PATH).with_name(".new-99999999-abcd~step_2")
    leftover.mkdir()
    (leftover / "manifest.json").write_text("{")
    assert [c.checkpoint_id for c in store.list()] == ["weights/step_1"]
    Checkpoints(tmp_path)
    assert not leftover.exists()


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "", "x" * 201, "a\0b", "a b"])
def test_a_name_cannot_leave_its_directory(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"checkpoint name|not a checkpoint path"):
        Checkpoints(tmp_path).write(PATH.model_copy(update={"name": name}), manifest(), lambda d: None)
    with pytest.raises(InvalidRequestError):
        CheckpointPath.parse(f"tinker://run/weights/{name}")


def test_a_missing_checkpoint_names_what_there_is(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    store.write(PATH, manifest(), lambda d: (d / "f").write_text("x"))
    with pytest.raises(NotFoundError, match=r"step_9.*this model has weights/step_1"):
        store.read(PATH.model_copy(update={"name": "step_9"}))


def test_time_to_live(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    store.write(PATH, manifest(), lambda d: (d / "f").write_text("x"))
    store.update(PATH, expires_at=datetime.now(UTC) + timedelta(hours=1), public=True)
    assert [c.public for c in store.list("run:train:0")] == [True]
    store.update(PATH, expires_at=datetime.now(UTC) - timedelta(seconds=1))
    with pytest.raises(NotFoundError, match="expired"):
        store.read(PATH)
    assert store.list() == [] and not store.directory(PATH).exists()
    assert expiry(None) is None
    for bad in (0, -1, 3599, 10**12):
        with pytest.raises(InvalidRequestError, match="ttl_seconds"):
            expiry(bad)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    store.write(PATH, manifest(), lambda d: (d / "f").write_text("x"))
    file = store.directory(PATH) / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        store.read(PATH)


def test_delete_and_copy(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    store.write(PATH, manifest(), lambda d: (d / "f").write_text("x"))
    copy = PATH.model_copy(update={"name": "copy"})
    store.copy(PATH, copy, expires_at=None)
    store.delete(PATH)
    assert not store.exists(PATH) and (store.read(copy)[1] / "f").read_text() == "x"
    with pytest.raises(NotFoundError, match="to delete"):
        store.delete(PATH)


def test_listing_reading_and_changing_while_others_write_and_delete(tmp_path: Path) -> None:
    """Found by scripts/fuzz_server.py: a checkpoint deleted between two looks at it was FileNotFoundError, the server's fault."""
    store = Checkpoints(tmp_path)
    versions = itertools.count()

    def save() -> None:
        text = f"version {next(versions)}"
        store.write(PATH, manifest(), lambda d: (d / "f").write_text(text), overwrite=True)

    stop = threading.Event()
    wrong: list[BaseException] = []

    def repeat(work: Callable[[], object]) -> None:
        while not stop.is_set():
            try:
                work()
            except NotFoundError:
                pass
            except BaseException as err:
                wrong.append(err)
                return

    works: list[Callable[[], object]] = [
        save,
        lambda: store.delete(PATH),
        store.list,
        lambda: store.read(PATH),
        lambda: store.update(PATH, public=True),
        lambda: store.manifest(PATH),
    ]
    threads = [threading.Thread(target=repeat, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    time.sleep(1.5)
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert [entry.name for entry in (tmp_path / "run:train:0" / "weights").iterdir()] in ([], ["step_1"])
