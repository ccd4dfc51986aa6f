"""The marker and the server that the tests of the real SDKs share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sdk import harness


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = harness.missing_venvs()
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.sdk)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the tiny model as Qwen/Qwen3-8B."""
    return harness.make_model_directory(tmp_path_factory.mktemp("sdk"))


@pytest.fixture(scope="session")
def server(model_directory: Path) -> Iterator[harness.Server]:
    """One server for all programs; its log is shown when a test fails to talk to it."""
    running = harness.Server(directory=model_directory).start()
    yield running
    running.stop()
