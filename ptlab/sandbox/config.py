"""The `sandbox` section of a config, and opening what it asks for."""

from __future__ import annotations

import logging
import os
import sys
from typing import Literal

from pydantic import Field, model_validator

from ptlab.errors import SandboxError
from ptlab.sandbox.bubblewrap import Bubblewrap
from ptlab.sandbox.interpreter import find_interpreter
from ptlab.sandbox.limited_process import LimitedProcess
from ptlab.sandbox.pool import Runner, SandboxPool
from ptlab.sandbox.programs import Limits, Program
from ptlab.sandbox.sandbox_fusion import SandboxFusion
from ptlab.section import Section

logger = logging.getLogger(__name__)
TRIAL_WORD = "the sandbox works"


class SandboxConfig(Section):
    """Where untrusted programs run."""

    kind: Literal["auto", "bubblewrap", "process", "sandbox_fusion"] = "auto"
    """auto: bubblewrap if a trial run works here, else process with a warning; sandbox_fusion: a SandboxFusion server."""
    url: str | None = None
    """Of the SandboxFusion server, e.g. http://127.0.0.1:8080."""
    workers: int | None = Field(default=None, ge=1, le=1024)
    """Programs at once; None = one per CPU (64 for a server)."""
    python: str | None = None
    """Python for the programs; None = the one that runs ptlab, or the system's. It gets no site-packages."""
    limits: Limits = Limits()
    """Of one program, unless the task sets others."""

    @model_validator(mode="after")
    def _url_fits_kind(self) -> SandboxConfig:
        if (self.kind == "sandbox_fusion") != (self.url is not None):
            raise ValueError(
                f"sandbox.kind is {self.kind!r} and sandbox.url is {self.url!r}; kind sandbox_fusion needs a url, the others have none"
            )
        return self


def open_sandbox(config: SandboxConfig) -> SandboxPool:
    """A pool that has just run a trial program; close it, or leave it to the end of the process.

    Raises: SandboxError, saying what is missing, if the trial failed (kind auto: if both kinds did).
    """
    if config.kind == "sandbox_fusion":
        assert config.url is not None
        return SandboxPool(_tried(SandboxFusion(config.url, config.limits)), workers=config.workers or 64)
    if sys.platform != "linux":
        raise SandboxError(
            f"sandbox.kind {config.kind} needs Linux, this is {sys.platform}; use sandbox.kind sandbox_fusion with a server's url"
        )
    workers = config.workers or len(os.sched_getaffinity(0))
    interpreter = find_interpreter(config.python)
    if config.kind != "process":
        try:
            return SandboxPool(_tried(Bubblewrap(interpreter, config.limits)), workers=workers)
        except SandboxError as err:
            if config.kind == "bubblewrap":
                raise
            reason = err.message
        logger.warning("no bubblewrap here, programs run as limited processes (docs/sandbox.md). Reason: %s", reason)
    runner = _tried(LimitedProcess(interpreter, config.limits))
    logger.warning("the process sandbox does not hold: %s", "; ".join(runner.missing))
    return SandboxPool(runner, workers=workers)


def _tried(runner: Runner) -> Runner:
    """The runner, after it ran a program that reads stdin and writes a file. Raises: SandboxError if that failed."""
    source = "import sys\nopen('x', 'w').write(sys.stdin.read())\nprint(open('x').read())"
    outcome = runner.run(Program(source=source, stdin=TRIAL_WORD.encode()))
    if outcome.status != "ok" or outcome.stdout.strip() != TRIAL_WORD:
        raise SandboxError(
            f"sandbox {runner.name}: the trial program ended with {outcome.status}: {outcome.stderr.strip()[-500:] or outcome.stdout!r}"
        )
    return runner
