"""Opening a sandbox: what is chosen, what is said when it cannot be had."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from ptlab.errors import InvalidRequestError, SandboxError
from ptlab.sandbox import Limits, Program, SandboxConfig, open_sandbox
from ptlab.sandbox.interpreter import find_interpreter


def test_url_belongs_to_a_server() -> None:
    with pytest.raises(ValidationError, match="needs a url"):
        SandboxConfig(kind="sandbox_fusion")
    with pytest.raises(ValidationError, match="the others have none"):
        SandboxConfig(kind="process", url="http://localhost")


def test_auto_falls_back_and_says_what_it_does_not_hold(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """A bwrap that cannot make namespaces, as in many containers: found out by the trial run."""
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    for folder in (tmp_path, *tmp_path.parents):
        if folder != Path("/") and str(folder) != "/tmp" and os.access(folder, os.W_OK):
            folder.chmod(0o755)
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with caplog.at_level(logging.WARNING):
        pool = open_sandbox(SandboxConfig(workers=1))
    pool.close()
    assert pool.runner.name == "process"
    assert "No permissions to create new namespace" in caplog.text and "does not hold" in caplog.text
    with pytest.raises(SandboxError, match=r"No permissions to create new namespace.*user namespaces"):
        open_sandbox(SandboxConfig(kind="bubblewrap"))


def test_no_bwrap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(SandboxError, match=r"bwrap is not installed|no setpriv"):
        open_sandbox(SandboxConfig(kind="bubblewrap"))


def test_wrong_python() -> None:
    with pytest.raises(SandboxError, match="no Python that an unprivileged user can start"):
        find_interpreter("/nonexistent/python")
    with pytest.raises(SandboxError, match="does not start as a Python"):
        find_interpreter("/bin/false")


def test_file_names_stay_inside() -> None:
    for name in ("../x", "/etc/x", "..", ""):
        with pytest.raises(InvalidRequestError, match="plain file name"):
            Program(source="", files={name: b""})


def test_closed_pool_ends_what_waits() -> None:
    pool = open_sandbox(SandboxConfig(kind="process", workers=1, limits=Limits(wall_s=1.0)))

    async def close_early() -> list[object]:
        runs = [asyncio.ensure_future(pool.run(Program(source="import time; time.sleep(0.3)"))) for _ in range(3)]
        await asyncio.sleep(0.1)
        await asyncio.to_thread(pool.close)
        return await asyncio.gather(*runs, return_exceptions=True)

    first, *others = asyncio.run(close_early())
    assert not isinstance(first, BaseException) and all(isinstance(other, asyncio.CancelledError) for other in others)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user")
def test_as_an_ordinary_user() -> None:
    """Not root, no user of its own for the programs: they run, and the process limit counts what the user runs besides."""
    source = (
        "import asyncio, sys\n"
        "from ptlab.sandbox import *\n"
        "from ptlab.sandbox import interpreter\n"
        "interpreter.sys.executable = '/usr/bin/python3'\n"
        "pool = open_sandbox(SandboxConfig(kind='process', workers=1, limits=Limits(cpu_s=1, wall_s=3.0, max_processes=8)))\n"
        "ok = asyncio.run(pool.run(Program(source='import os; print(os.getuid())')))\n"
        "bomb = asyncio.run(pool.run(Program(source='import os\\nwhile True: os.fork()')))\n"
        "print(ok.stdout.strip(), bomb.status != 'ok', pool.runner.name)\n"
    )
    root = Path(__file__).parents[2]
    command = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups", "--inh-caps=-all", sys.executable, "-c", source]
    if subprocess.run([*command[:5], sys.executable, "-c", f"open({str(root / 'ptlab/__init__.py')!r})"], capture_output=True).returncode:
        pytest.skip("another user cannot start this Python or read this checkout")
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env={"PYTHONPATH": str(root), "PATH": os.environ["PATH"]})
    assert done.stdout.split() == ["12345", "True", "process"], done.stderr
