"""Start a command, feed it, read it within bounds, and leave no process of it behind."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ptlab.errors import SandboxError
from ptlab.sandbox.programs import Limits, RunOutcome, RunStatus

CHUNK_BYTES = 1 << 16
Cut = Literal["timeout", "output_limit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RawRun:
    """What the command did."""

    stdout: bytes
    stderr: bytes
    returncode: int
    """As subprocess: negative = killed by that signal."""
    cut: Cut | None
    """The limit that made us kill it."""
    seconds: float
    ready: bytes
    """What was written to the ready descriptor: nothing = the program never began."""


def run_command(
    command: Sequence[str], *, stdin: bytes, limits: Limits, environment: Mapping[str, str], folder: str, ready: tuple[int, int],
    pass_fds: Sequence[int] = (),
) -> RawRun:  # fmt: skip
    """Run until it ends or a limit of wall clock or output does; then kill its process group, whoever is left in it.

    Args:
        stdin: all of it; what is not read is dropped.
        ready: a pipe; the write end is inherited, both ends are closed here.
        pass_fds: descriptors that are inherited besides; they stay open here.
    """
    started = time.monotonic()
    ready_read, ready_write = ready
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(environment), cwd=folder,
            start_new_session=True, pass_fds=[ready_write, *pass_fds],
        )  # fmt: skip
    except OSError as err:
        os.close(ready_read)
        raise SandboxError(f"sandbox: {command[0]} could not be started: {err}; is the machine out of processes or memory?") from err
    finally:
        os.close(ready_write)
    pidfd = os.pidfd_open(process.pid)
    try:
        stdout, stderr, cut = _talk(process, pidfd, stdin, limits.output_bytes, started + limits.wall_s)
    finally:
        _kill_group(process.pid)  # before it is reaped: until then its number cannot be another's
        _, status = os.waitpid(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        os.close(pidfd)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        os.set_blocking(ready_read, False)
        ready_text = _read_some(ready_read, 4096) or b""
        os.close(ready_read)
    return RawRun(
        stdout=stdout, stderr=stderr, returncode=process.returncode, cut=cut, seconds=time.monotonic() - started,
        ready=ready_text,
    )  # fmt: skip


def outcome_of(run: RawRun, limits: Limits, *, exit_code: int | None, killed_by: int | None) -> RunOutcome:
    """Status from what is known from outside; only `memory` is by the program's word."""
    stderr = run.stderr.decode("utf-8", "replace")
    return RunOutcome(
        status=_status(run, limits, exit_code, killed_by, stderr),
        stdout=run.stdout.decode("utf-8", "replace"),
        stderr=stderr,
        exit_code=None if run.cut else exit_code,
        signal=signal.SIGKILL if run.cut else killed_by,
        seconds=run.seconds,
        truncated=run.cut == "output_limit",
    )


def _status(run: RawRun, limits: Limits, exit_code: int | None, killed_by: int | None, stderr: str) -> RunStatus:
    if run.cut is not None:
        return run.cut
    if killed_by is not None:
        out_of_time = killed_by == signal.SIGXCPU or (killed_by == signal.SIGKILL and run.seconds >= 0.9 * limits.cpu_s)
        return "timeout" if out_of_time else "killed"
    if exit_code == 0:
        return "ok"
    last_line = stderr.rstrip().rpartition("\n")[2]
    return "memory" if last_line.startswith("MemoryError") else "error"


def _talk(
    process: subprocess.Popen[bytes], pidfd: int, stdin: bytes, output_bytes: int, deadline: float
) -> tuple[bytes, bytes, Cut | None]:
    """Feed and read until the process ends, too much was written, or the deadline passed."""
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    outputs: dict[int, bytearray] = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    to_write = memoryview(stdin)
    cut: Cut | None = None
    with selectors.DefaultSelector() as selector:
        selector.register(pidfd, selectors.EVENT_READ)
        for descriptor in outputs:
            os.set_blocking(descriptor, False)
            selector.register(descriptor, selectors.EVENT_READ)
        os.set_blocking(process.stdin.fileno(), False)
        selector.register(process.stdin, selectors.EVENT_WRITE)
        running = True
        while running and cut is None:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                cut = "timeout"
                break
            for key, _ in selector.select(left_s):
                if key.fd == pidfd:
                    running = False
                elif key.fd in outputs:
                    data = _read_some(key.fd, CHUNK_BYTES)
                    if data == b"":
                        selector.unregister(key.fd)
                    outputs[key.fd] += data or b""
                    if len(outputs[key.fd]) > output_bytes:
                        cut = "output_limit"
                else:
                    to_write = _feed(process, to_write)
                    if not to_write:
                        selector.unregister(process.stdin)
                        process.stdin.close()
    for descriptor, held in outputs.items() if cut is None else ():  # what it wrote just before it ended
        while len(held) <= output_bytes and (data := _read_some(descriptor, CHUNK_BYTES)):
            held += data
        cut = "output_limit" if len(held) > output_bytes else cut
    stdout, stderr = (bytes(held[:output_bytes]) for held in outputs.values())
    return stdout, stderr, cut


def _feed(process: subprocess.Popen[bytes], to_write: memoryview) -> memoryview:
    assert process.stdin is not None
    try:
        return to_write[os.write(process.stdin.fileno(), to_write[:CHUNK_BYTES]) :]
    except BlockingIOError:
        return to_write
    except BrokenPipeError:  # it does not read its stdin; that is its right
        return to_write[:0]


def _read_some(descriptor: int, size: int) -> bytes | None:
    """b"" at the end, None if there is nothing yet."""
    try:
        return os.read(descriptor, size)
    except BlockingIOError:
        return None


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
    except PermissionError:  # all that is left runs as another user by now: only a set-uid program could, and those are refused
        return
