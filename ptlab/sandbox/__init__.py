"""Run untrusted Python programs. What is prevented, and with equal weight what is not: docs/sandbox.md.

    sandbox = open_sandbox(SandboxConfig())
    outcome = await sandbox.run(Program(source="print(input()[::-1])", stdin=b"abc"))
    outcome.status, outcome.stdout          # "ok", "cba\\n"

`bubblewrap` where it works, else `limited_process`; or a server, `sandbox_fusion`. All three run the same Programs.
"""

from __future__ import annotations

from ptlab.sandbox.config import SandboxConfig, open_sandbox
from ptlab.sandbox.pool import Runner, SandboxPool
from ptlab.sandbox.programs import Limits, Program, RunOutcome, RunStatus, Sandbox

__all__ = ["Limits", "Program", "RunOutcome", "RunStatus", "Runner", "Sandbox", "SandboxConfig", "SandboxPool", "open_sandbox"]
