"""A `ptlab serve` process of the tests' own: started on a free port, waited for, killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from tests.cookbook.make_workdir import BASE, INSTRUCT


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Server:
    """`ptlab serve` with the two models of `workdir`; its output is appended to `log`, its requests to `log`.trace. `port` stays the
    same over restarts."""

    def __init__(
        self, workdir: Path, data_dir: Path, log: Path, *, seed: int = 0, arguments: tuple[str, ...] = ("--sampler=torch",)
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        models = [f"--model={name}={workdir / name}" for name in (INSTRUCT, BASE)]
        settings = ["--data-dir", str(data_dir), "--port", str(self.port), "--seed", str(seed), "--trace", f"{log}.trace", *arguments]
        self.command = [sys.executable, "-m", "ptlab.cli", "serve", *models, *settings]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *, within_s: float = 300.0) -> None:
        """Start the process and wait until /healthz answers. Raises: RuntimeError with the log's end if it dies or is too slow."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(self.command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        deadline = time.monotonic() + within_s
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                status = self.process.poll()
                self.stop()
                end = self.log.read_text(errors="replace")[-3000:]
                raise RuntimeError(f"{' '.join(self.command)}: {'ended with ' + str(status) if status is not None else 'slow'}\n{end}")
            time.sleep(0.3)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/healthz", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def kill(self) -> None:
        """kill -9, as a power cut would; returns once the process is gone."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """Ask it to end, and kill it if it has not after 20 s. Does nothing if it is not running."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.kill()

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
