"""Both local sandboxes, each opened once. Bubblewrap's tests are skipped, saying why, where bwrap does not work."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ptlab.errors import SandboxError
from ptlab.sandbox import Limits, SandboxConfig, SandboxPool, open_sandbox

LIMITS = Limits(cpu_s=1, wall_s=3.0, output_bytes=100_000, memory_bytes=256 * 2**20, file_size_bytes=2**20)


@pytest.fixture(scope="session", params=["bubblewrap", "process"])
def pool(request: pytest.FixtureRequest) -> Iterator[SandboxPool]:
    try:
        opened = open_sandbox(SandboxConfig(kind=request.param, workers=2, limits=LIMITS))
    except SandboxError as err:
        pytest.skip(err.message)
    yield opened
    opened.close()
