"""States of a model and sizes, beside what routes/test_metrics.py shows of the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from ptlab.backend.records import Model
from ptlab.backend.requests import Requests
from ptlab.backend.served import ServedModel
from ptlab.errors import EngineError
from ptlab.server.status import _size, resident_bytes, state_of
from ptlab.types import LoraConfig


class Busy:
    """Requests of which some are in use."""

    def __init__(self, *model_ids: str) -> None:
        self._model_ids = model_ids

    def is_using(self, model_id: str) -> bool:
        return model_id in self._model_ids


def model(**changes: Any) -> Model:
    made = Model("m", "base", LoraConfig(rank=1))
    if changes.pop("created", True):
        made.created.set()
    for name, value in changes.items():
        setattr(made, name, value)
    return made


LIVE = cast(ServedModel, object())


@pytest.mark.parametrize(
    ("changes", "busy", "state"),
    [
        ({"created": False}, ["m"], "creating"),
        ({"served": LIVE}, [], "idle"),
        ({"served": LIVE}, ["other"], "idle"),
        ({"served": LIVE}, ["m"], "running"),
        ({}, [], "parked"),
        ({}, ["m"], "running"),
        ({"failure": EngineError("x")}, ["m"], "failed"),
    ],
)
def test_states_of_a_model(changes: dict[str, Any], busy: list[str], state: str) -> None:
    assert state_of(model(**changes), cast(Requests, Busy(*busy))) == state


def test_the_stores_size_counts_its_journal_and_is_zero_without_a_file(tmp_path: Path) -> None:
    store = tmp_path / "store.sqlite"
    assert _size(store) == 0
    store.write_bytes(b"x" * 10)
    (tmp_path / "store.sqlite-wal").write_bytes(b"x" * 5)
    (tmp_path / "other").write_bytes(b"x" * 100)
    assert _size(store) == 15


def test_memory_grows_with_what_is_held() -> None:
    before = resident_bytes()
    held = bytearray(b"x") * (64 * 2**20)
    assert resident_bytes() - before > 32 * 2**20
    del held
