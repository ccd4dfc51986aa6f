"""How the kernels are made, kept, and done without. What they compute: test_row_ops.py."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ptlab.engines import row_kernels


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PTLAB_CACHE", str(tmp_path))
    row_kernels.load.cache_clear()
    yield
    monkeypatch.undo()
    row_kernels.load.cache_clear()


def test_they_are_compiled_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if row_kernels.load() is None:
        pytest.skip("no C++ compiler here")
    (library,) = (tmp_path / "kernels").iterdir()
    made = library.stat().st_mtime_ns
    row_kernels.load.cache_clear()
    assert row_kernels.load() is not None
    assert library.stat().st_mtime_ns == made
    monkeypatch.setattr(row_kernels, "FLAGS", row_kernels.FLAGS.replace("-O3", "-O2"))
    row_kernels.load.cache_clear()
    assert row_kernels.load() is not None
    assert len(list((tmp_path / "kernels").iterdir())) == 2  # other flags are another library


def test_without_a_compiler_operators_do_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_kernels.shutil, "which", lambda name: None)
    assert row_kernels.load() is None
    assert not row_kernels.can_run(torch.zeros(2, 3))


def test_a_compiler_that_fails_is_reported_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if row_kernels.load() is None:
        pytest.skip("no C++ compiler here")
    broken = tmp_path / "broken.cpp"
    broken.write_text("this is not C++", encoding="utf-8")
    monkeypatch.setattr(row_kernels, "SOURCE", broken)
    row_kernels.load.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert row_kernels.load() is None
    assert "cannot be compiled, training is slower without them" in caplog.text and "broken.cpp" in caplog.text
    assert len(list((tmp_path / "kernels").iterdir())) == 1  # the first one


def test_what_a_kernel_cannot_take_is_left_to_operators() -> None:
    rows = torch.zeros(4, 6)
    if row_kernels.load() is None:
        pytest.skip("no C++ compiler here")
    assert row_kernels.can_run(rows, rows[:, :3])  # any stride between rows
    assert not row_kernels.can_run(rows.T)
    assert not row_kernels.can_run(torch.zeros(4, 6, 2)[:, :, 0])
    assert not row_kernels.can_run(rows.half())
    assert not row_kernels.can_run(rows, rows.bfloat16())
    assert not row_kernels.can_run(rows.to("meta"))
