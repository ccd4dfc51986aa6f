"""Programs as plain processes with limits, where bubblewrap cannot be had. Weaker: `missing` says what it does not hold here.

What it has: resource limits; as root a user number of its own per run; a folder of its own; no environment; by Landlock no file but the
system's read-only, the interpreter and its folder, and no signal to others (kernel 6.12); by seccomp no sockets, no tracing, no leaving
the process group, so that killing the group at the end reaches everything.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ptlab.errors import SandboxError
from ptlab.sandbox.interpreter import (
    BOOTSTRAP,
    ENVIRONMENT,
    NOBODY,
    PYTHON_FLAGS,
    SYSTEM_FOLDERS,
    USERS_PER_POOL,
    Interpreter,
    bootstrap_request,
    refused_calls,
    spare_users,
    users_command,
)
from ptlab.sandbox.processes import outcome_of, run_command
from ptlab.sandbox.programs import Limits, Program, RunOutcome

NOT_HELD = {
    "no_new_privs": "set-uid programs can be started",
    "landlock": "files that the user may read or write are open to it (Landlock is not in this kernel)",
    "signals": "processes of the same user can be signalled (Landlock holds that from kernel 6.12 on)",
    "seccomp": "the network is open, and a process that leaves its group outlives the run (no seccomp filter)",
}
ALWAYS_MISSING = ("it shares the host's kernel view: process numbers, host name, mounts; many small files can fill the disk",)


class LimitedProcess:
    """Raises: SandboxError if we are root and cannot become another user."""

    name = "process"

    def __init__(self, interpreter: Interpreter, limits: Limits) -> None:
        self.limits = limits
        self.interpreter = interpreter
        self.filter = refused_calls(sockets=True, sessions=True)
        self.readable = [*SYSTEM_FOLDERS, "/etc/ld.so.cache", *interpreter.extra_folders]
        self.python = [interpreter.path, *PYTHON_FLAGS, "-c", BOOTSTRAP]
        self.is_root = os.getuid() == 0
        self.first_user = spare_users() if self.is_root else None
        self.run_number = itertools.count()
        users_command(NOBODY)
        self.missing: Sequence[str] = ALWAYS_MISSING

    def run(self, program: Program) -> RunOutcome:
        """Blocks. Raises: SandboxError if no process could be started."""
        limits = program.limits or self.limits
        user = NOBODY if self.first_user is None else self.first_user + next(self.run_number) % USERS_PER_POOL
        folder = tempfile.mkdtemp(prefix="ptlab-sandbox-")
        try:
            if self.is_root:
                os.chown(folder, user, user)
            # As another user only its own processes count; as ourselves all that we have running do.
            max_processes = limits.max_processes + (
                0 if self.first_user is not None else _threads_of(user if self.is_root else os.getuid())
            )
            ready = os.pipe()
            stdin = bootstrap_request(
                program, limits, self.interpreter, max_processes=max_processes, ready_fd=ready[1], lock=(self.readable, self.filter)
            )
            environment = {**ENVIRONMENT, "HOME": folder}
            command = [*users_command(user), *self.python]
            run = run_command(command, stdin=stdin, limits=limits, environment=environment, folder=folder, ready=ready)
        finally:
            _remove(folder)
        if not run.ready:
            raise SandboxError(
                f"sandbox: {self.python[0]} could not be started: {run.stderr.decode('utf-8', 'replace').strip()[:500] or run.returncode}; "
                "set sandbox.python to a Python that an unprivileged user can start"
            )
        self.missing = (*(NOT_HELD[name] for name in run.ready.decode().split()[1:]), *ALWAYS_MISSING)
        killed_by = -run.returncode if run.returncode < 0 else None
        return outcome_of(run, limits, exit_code=run.returncode if killed_by is None else None, killed_by=killed_by)

    def close(self) -> None:
        """Nothing is kept between runs."""


def _threads_of(user: int) -> int:
    """Threads that the kernel counts against this user's limit now."""
    count = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                lines = (entry / "status").read_text(encoding="ascii", errors="replace").splitlines()
            except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
                continue
            values = dict(line.split(":", 1) for line in lines if ":" in line)
            if int(values["Uid"].split()[0]) == user:
                count += int(values["Threads"])
    return count


def _remove(folder: str) -> None:
    """Also where the program locked its folders or nested them thousands deep, which defeats shutil.rmtree."""
    try:
        shutil.rmtree(folder)
    except (OSError, RecursionError):
        for command in (["chmod", "-R", "u+rwx", folder], ["rm", "-rf", "--one-file-system", folder]):
            subprocess.run(command, check=False, capture_output=True)
        if os.path.lexists(folder):
            raise SandboxError(f"sandbox: {folder} cannot be removed; look at it and remove it by hand") from None
