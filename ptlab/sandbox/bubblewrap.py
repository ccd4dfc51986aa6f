"""Programs in namespaces of their own, by bubblewrap (https://github.com/containers/bubblewrap).

They see /usr read-only, the interpreter, /dev/null, zero, random and urandom, and an empty /tmp of their own in memory; no /proc, no
network but a dead loopback, no other process, no environment. A seccomp filter refuses calls they have no use for.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Sequence

from ptlab.errors import SandboxError
from ptlab.sandbox.interpreter import (
    BOOTSTRAP,
    ENVIRONMENT,
    NOBODY,
    PYTHON_FLAGS,
    SYSTEM_FOLDERS,
    Interpreter,
    bootstrap_request,
    refused_calls,
    users_command,
)
from ptlab.sandbox.processes import outcome_of, run_command
from ptlab.sandbox.programs import Limits, Program, RunOutcome

DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


class Bubblewrap:
    """Raises: SandboxError if there is no bwrap. Whether it works here only a run can tell."""

    name = "bubblewrap"

    def __init__(self, interpreter: Interpreter, limits: Limits) -> None:
        bwrap = shutil.which("bwrap")
        if bwrap is None:
            raise SandboxError("sandbox: bwrap is not installed (Debian, Ubuntu: apt-get install bubblewrap)")
        self.limits = limits
        self.interpreter = interpreter
        self.filter = refused_calls(sockets=False, sessions=False)
        self.missing: Sequence[str] = () if self.filter is not None else ("a seccomp filter (none is known for this processor)",)
        namespaces = ["--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
        identity = ["--uid", str(NOBODY), "--gid", str(NOBODY), "--hostname", "sandbox"]
        self.command = [*users_command(NOBODY), bwrap, *namespaces, *identity, "--die-with-parent", "--clearenv"]
        for name, value in {**ENVIRONMENT, "HOME": "/tmp"}.items():
            self.command += ["--setenv", name, value]
        for folder in SYSTEM_FOLDERS:
            if os.path.islink(folder):
                self.command += ["--symlink", os.readlink(folder), folder]
            elif os.path.isdir(folder):
                self.command += ["--ro-bind", folder, folder]
        for folder in interpreter.extra_folders:
            self.command += ["--ro-bind", folder, folder]
        for device in DEVICES:
            self.command += ["--dev-bind", device, device]
        self.python = [interpreter.path, *PYTHON_FLAGS, "-c", BOOTSTRAP]

    def run(self, program: Program) -> RunOutcome:
        """Blocks. Raises: SandboxError if bwrap could not make the sandbox."""
        limits = program.limits or self.limits
        ready_read, ready_write = os.pipe()
        filter_fds = [] if self.filter is None else [_filled_pipe(self.filter)]
        command = [
            *self.command,
            "--size",
            str(max(limits.file_size_bytes, 4096)),
            "--tmpfs",
            "/tmp",
            "--remount-ro",
            "/",
            "--chdir",
            "/tmp",
        ]
        for descriptor in filter_fds:
            command += ["--seccomp", str(descriptor)]
        stdin = bootstrap_request(program, limits, self.interpreter, max_processes=limits.max_processes, ready_fd=ready_write, lock=None)
        try:
            run = run_command(
                [*command, "--", *self.python], stdin=stdin, limits=limits, environment={}, folder="/", ready=(ready_read, ready_write),
                pass_fds=filter_fds,
            )  # fmt: skip
        finally:
            for descriptor in filter_fds:
                os.close(descriptor)
        if not run.ready:
            said = run.stderr.decode("utf-8", "replace").strip()[:500] or f"exit code {run.returncode}"
            raise SandboxError(
                f"sandbox: bwrap could not start a program: {said}; it needs unprivileged user namespaces, which many containers refuse; "
                "allow them, or set sandbox.kind to process"
            )
        killed_by = (
            -run.returncode if run.returncode < 0 else run.returncode - 128 if run.returncode > 128 else None
        )  # bwrap's way to say it
        if killed_by is not None and killed_by not in {int(known) for known in signal.Signals}:
            killed_by = None
        return outcome_of(run, limits, exit_code=run.returncode if killed_by is None else None, killed_by=killed_by)

    def close(self) -> None:
        """Nothing is kept between runs."""


def _filled_pipe(content: bytes) -> int:
    """Read end of a pipe that holds the content; it must fit into a pipe (64 KiB)."""
    read_end, write_end = os.pipe()
    os.write(write_end, content)
    os.close(write_end)
    return read_end
