"""A real `ptlab serve` on a tiny model, and the programs of tests/sdk/programs run against it by the Python of an SDK's own venv."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS_DIR = Path(__file__).resolve().parent / "programs"
VERSIONS = ("0.38.0", "0.25.0")
"""Newest first; scripts/setup_sdk_venvs.sh makes a venv of each."""
PROGRAMS = ("service", "training", "sampling", "checkpoints", "rest", "futures", "errors")
"""What programs/suite.py runs."""
BASE_MODEL = "Qwen/Qwen3-8B"
API_KEY = "tml-conformance-suite"
START_S = 300.0
PROGRAM_S = 1500.0


def sdk_python(version: str) -> Path:
    """The interpreter of an SDK's venv; below $PTLAB_SDK_VENVS, or the repository root. It need not exist."""
    return Path(os.environ.get("PTLAB_SDK_VENVS", ROOT)) / f".venv-sdk-{version}" / "bin" / "python"


def missing_venvs() -> str | None:
    """Why the suite cannot run here, or None."""
    missing = [version for version in VERSIONS if not sdk_python(version).exists()]
    return f"no venv of tinker {' and '.join(missing)}: run scripts/setup_sdk_venvs.sh" if missing else None


def make_model_directory(directory: Path) -> Path:
    """`directory` with a tiny random model at Qwen/Qwen3-8B: from there, transformers takes the hub's name for a local path."""
    model = directory / BASE_MODEL
    model.mkdir(parents=True)
    conftest = importlib.import_module("tests.conftest")  # only here: it imports torch, and pytest
    conftest.write_tiny_model(model, family="qwen3", tied=True)
    return directory


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(kw_only=True)
class Server:
    """One `ptlab serve` process. `directory` holds the model (make_model_directory), the data directory and the log."""

    directory: Path
    options: Sequence[str] = ()
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        return self.directory / "server.log"

    def start(self) -> Server:
        """Start it, or start it again on the same port and data; returns when it answers. Raises: RuntimeError with its log."""
        command = [sys.executable, "-m", "ptlab.cli", "serve", "--model", f"{BASE_MODEL}={self.directory / BASE_MODEL}"]
        command += ["--port", str(self.port), "--data-dir", str(self.directory / "data"), "--sampler", "torch", *self.options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                if httpx.get(f"{self.url}/api/v1/healthz", timeout=5.0).status_code == 200:
                    return self
            except httpx.TransportError:
                time.sleep(0.1)
        self.kill()
        raise RuntimeError(f"{' '.join(command)}\ndid not start:\n{self.tail()}")

    def tail(self, num_lines: int = 60) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-num_lines:])

    def kill(self) -> None:
        """SIGKILL: nothing is written, nobody is told."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        self.process.terminate()
        try:
            return self.process.wait(60.0)
        except subprocess.TimeoutExpired:
            self.kill()
            return -int(signal.SIGKILL)

    def rss_bytes(self) -> int:
        """Resident memory of the server process."""
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))


def create_key(directory: Path, name: str) -> str:
    """A new API key of the server whose directory this is."""
    command = [sys.executable, "-m", "ptlab.cli", "keys", "create", name, "--data-dir", str(directory / "data")]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return next(word.removeprefix("TINKER_API_KEY=") for word in output.split() if word.startswith("TINKER_API_KEY="))


@dataclass(kw_only=True)
class Program:
    """One programs/<name>.py, run by an SDK's Python in `directory`, where Qwen/Qwen3-8B lies; ptlab cannot be imported from there."""

    name: str
    version: str
    url: str
    directory: Path
    arguments: Sequence[str] = ()
    key: str = API_KEY
    process: subprocess.Popen[str] | None = None

    @property
    def log(self) -> Path:
        """Its standard error."""
        return self.directory / f"{self.name}-{self.version}.err"

    def start(self) -> Program:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.directory),
            "TINKER_BASE_URL": self.url,
            "TINKER_API_KEY": self.key,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [str(sdk_python(self.version)), str(PROGRAMS_DIR / f"{self.name}.py"), *self.arguments]
        with self.log.open("w") as errors:
            self.process = subprocess.Popen(
                command, cwd=self.directory, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
            )
        return self

    def lines(self) -> Iterator[dict[str, Any]]:
        """The JSON lines as they are printed, to the end."""
        assert self.process is not None and self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                yield json.loads(line)

    def end(self) -> int:
        """Kill it, and what it started, if it still runs; the exit code."""
        assert self.process is not None and self.process.stdout is not None
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.stdout.close()
        return self.process.wait()

    def errors(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]


def run_program(
    name: str, *, version: str, url: str, directory: Path, arguments: Sequence[str] = (), key: str = API_KEY
) -> list[dict[str, Any]]:
    """Run a program to its end and give its lines. Raises: RuntimeError with its stderr if it printed none, or takes too long."""
    program = Program(name=name, version=version, url=url, directory=directory, arguments=arguments, key=key).start()
    late = threading.Timer(PROGRAM_S, program.end)
    late.start()
    try:
        lines = list(program.lines())
    finally:
        in_time = late.is_alive()
        late.cancel()
        late.join()
        code = program.end()
    if not in_time or not lines:
        why = f"ended with {code} and said nothing" if in_time else f"took more than {PROGRAM_S} s; it said {lines[-3:]}"
        raise RuntimeError(f"{name} under tinker {version} {why}:\n{program.errors()}")
    return lines
