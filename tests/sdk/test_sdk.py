"""The unmodified SDKs, in their own venvs, against a real server: every public method, and docs/compatibility.md is what they say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts import make_compatibility
from tests.sdk import harness

Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def lines_of(server: harness.Server) -> Callable[[str], Lines]:
    """Runs all programs with an SDK, once; gives their lines."""
    known: dict[str, Lines] = {}

    def run(version: str) -> Lines:
        if version not in known:
            known[version] = harness.run_program("suite", version=version, url=server.url, directory=server.directory)
        return known[version]

    return run


@pytest.mark.parametrize("program", harness.PROGRAMS)
@pytest.mark.parametrize("version", harness.VERSIONS)
def test_program(program: str, version: str, lines_of: Callable[[str], Lines]) -> None:
    own = [line for line in lines_of(version) if line.get("program") == program]
    failed = {f"{line['check']}: {line['detail']}" for line in own if line["status"] == "failed"}
    assert own and not failed, "\n".join(sorted(failed))


@pytest.mark.parametrize("version", harness.VERSIONS)
def test_every_public_method_was_looked_at(version: str, lines_of: Callable[[str], Lines]) -> None:
    lines = lines_of(version)
    public = {line["method"] for line in lines if line["status"] == "public"}
    seen = {line["method"] for line in lines if line["status"] != "public"}
    assert len(public) > 80
    assert public - seen == set()


def test_the_table_in_the_docs_is_what_the_programs_say(lines_of: Callable[[str], Lines]) -> None:
    lines = {version: lines_of(version) for version in harness.VERSIONS}
    assert make_compatibility.differences(lines) == [], "run scripts/make_compatibility.py and look at what changed"


def test_the_server_logged_no_exception(server: harness.Server, lines_of: Callable[[str], Lines]) -> None:
    lines_of(harness.VERSIONS[0])
    assert "Traceback" not in server.tail(100_000)


@pytest.mark.parametrize("version", harness.VERSIONS)
def test_keys_do_not_see_each_other(version: str, tmp_path: Path, model_directory: Path) -> None:
    (tmp_path / "Qwen").symlink_to(model_directory / "Qwen")
    owner, stranger = (harness.create_key(tmp_path, name) for name in ("owner", "stranger"))
    server = harness.Server(directory=tmp_path).start()
    try:
        arguments = {"version": version, "url": server.url, "directory": tmp_path, "arguments": [stranger], "key": owner}
        lines = harness.run_program("isolation", **arguments)
    finally:
        server.stop()
    assert {line["status"] for line in lines} == {"works"}, [line for line in lines if line["status"] != "works"]


def test_the_programs_cannot_see_ptlab() -> None:
    for path in harness.PROGRAMS_DIR.glob("*.py"):
        code = path.read_text()
        assert "import ptlab" not in code and "from ptlab" not in code, path.name
