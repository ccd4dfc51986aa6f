"""A benchmark's system under test in a process of its own: JSON lines in and out, CPU-seconds and peak memory of each step.

A process for each system and variant: TRL has its own environment, and the resident set of one run cannot hide that of another. Only
the standard library: the worker of another trainer imports this without ptlab.

    parent:  with WorkerProcess([python, "benchmarks/trl_worker.py", ...]) as worker: worker.ask("step")
    child:   for command in commands(): answer({...})

Peak memory is the kernel's VmHWM (largest resident set), reset before each step: weights, libraries and allocator included, nothing
subtracted. `rest_mb` is the resident set of the loaded model before its first step.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

LOG_LINES = 30


class WorkerFailed(Exception):
    """A worker ended before it answered; the message ends with the last lines it wrote."""


# ---------------------------------------------------------------------------------------------------------------- parent


class WorkerProcess:
    """One worker; one question at a time. Everything it prints lies in a log that is shown when it fails."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self.command = [str(part) for part in command]
        one_thread = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  close() does
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **one_thread, **(env or {})},
        )
        self.about = self._read()
        """What the worker says of itself once it is ready."""

    def ask(self, command: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._log.seek(0)
            tail = self._log.read().decode(errors="replace").splitlines()[-LOG_LINES:]
            self.close()
            raise WorkerFailed(f"{' '.join(self.command)} ended with status {status} before it answered:\n" + "\n".join(tail))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """The worker sees the end of its input and stops; one that does not is killed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


# ----------------------------------------------------------------------------------------------------------------- child


class Channel:
    """The worker's end. Takes over standard output at once, so that a library that prints cannot spoil an answer."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def answer(self, values: Mapping[str, Any]) -> None:
        self._answers.write(json.dumps(values) + "\n")
        self._answers.flush()

    def commands(self) -> Iterator[str]:
        for line in iter(sys.stdin.readline, ""):
            yield line.strip()


def resident_mb() -> float:
    return _status_mb("VmRSS")


def _status_mb(key: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError(f"/proc/self/status has no {key}")


@dataclass(slots=True)
class Meter:
    """CPU-seconds of this process and its largest resident set between start() and stop()."""

    begun: float = 0.0

    def start(self) -> None:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM := VmRSS
        self.begun = time.process_time()

    def stop(self) -> dict[str, float]:
        return {"cpu_s": time.process_time() - self.begun, "peak_mb": _status_mb("VmHWM")}
