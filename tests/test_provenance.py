"""Facts about where a run came from."""

from __future__ import annotations

import subprocess
from pathlib import Path

from ptlab.provenance import git_state, hardware, package_versions


def git(directory: Path, *words: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", "-C", str(directory), *identity, *words], check=True, capture_output=True)


def test_git_state_tells_the_commit_and_whether_files_changed(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None  # no checkout
    git(tmp_path, "init", "-q")
    assert git_state(tmp_path) is None  # no commit
    (tmp_path / "a").write_text("1", encoding="utf-8")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-q", "-m", "first")
    state = git_state(tmp_path)
    assert state is not None and len(state["commit"]) == 40 and state["dirty"] is False
    (tmp_path / "untracked").touch()
    assert git_state(tmp_path) == state  # run directories and caches are no change of the code
    (tmp_path / "a").write_text("2", encoding="utf-8")
    assert git_state(tmp_path) == state | {"dirty": True}


def test_versions_and_hardware_are_plain_facts() -> None:
    versions = package_versions()
    assert versions["python"] is not None and versions["python"].startswith("3.")
    assert versions["torch"] is not None
    machine = hardware()
    assert machine["num_cpus"] >= 1 and machine["memory_bytes"] > 2**28 and machine["cpu"]
