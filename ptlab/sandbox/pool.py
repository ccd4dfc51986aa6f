"""N programs at once, however many are asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from ptlab.sandbox.programs import Program, RunOutcome


class Runner(Protocol):
    """Runs one program and waits for it; called from several threads."""

    name: str
    missing: Sequence[str]
    """What it does not hold on this machine, in words."""

    def run(self, program: Program) -> RunOutcome:
        """Raises: SandboxError if the sandbox itself failed."""

    def close(self) -> None: ...


class SandboxPool:
    """A Sandbox: `workers` programs run, the rest wait in the order they came, without a process of their own.

    A run that is cancelled while it waits never starts; one that has begun ends by itself within its limits.
    """

    def __init__(self, runner: Runner, *, workers: int) -> None:
        self.runner = runner
        self.workers = workers
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix=f"sandbox-{runner.name}")

    async def run(self, program: Program) -> RunOutcome:
        """Raises: SandboxError if the sandbox itself failed."""
        return await asyncio.wrap_future(self._executor.submit(self.runner.run, program))

    def close(self) -> None:
        """Waits for what runs; what has not begun is cancelled."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        self.runner.close()
