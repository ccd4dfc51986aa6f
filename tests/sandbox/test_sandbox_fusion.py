"""The SandboxFusion client against a real HTTP server that speaks its API and really runs the code."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from ptlab.errors import SandboxError
from ptlab.rewards.code_tests import CodeTestConfig, StdinTests, assert_tests, run_tests
from ptlab.sandbox import Limits, Program, SandboxConfig, SandboxPool, open_sandbox, sandbox_fusion


class Handler(BaseHTTPRequestHandler):
    """POST /run_code as in SandboxFusion's documentation; `answers` are given first, before code is run again."""

    answers: ClassVar[list[tuple[int, str]]] = []
    bodies: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Handler.bodies.append(body)
        status, text = Handler.answers.pop(0) if Handler.answers else (200, json.dumps(run_code(body)))
        self.send_response(status if self.path == "/run_code" else 404)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


def run_code(body: dict[str, Any]) -> dict[str, Any]:
    assert body["language"] == "python" and body["memory_limit_MB"] > 0 and body["compile_timeout"] > 0
    with tempfile.TemporaryDirectory() as folder:
        for name, content in body["files"].items():
            (Path(folder) / name).write_bytes(base64.b64decode(content))
        (Path(folder) / "main.py").write_text(body["code"], encoding="utf-8")
        started = time.monotonic()
        command = [sys.executable, "-S", "main.py"]
        try:
            done = subprocess.run(command, cwd=folder, input=body["stdin"], capture_output=True, text=True, timeout=body["run_timeout"])
        except subprocess.TimeoutExpired:
            return {"status": "Failed", "message": "", "compile_result": None, "run_result": {"status": "TimeLimitExceeded"}}
    result = {
        "status": "Finished",
        "execution_time": time.monotonic() - started,
        "return_code": done.returncode,
        "stdout": done.stdout,
        "stderr": done.stderr,
    }
    return {"status": "Success" if done.returncode == 0 else "Failed", "message": "", "compile_result": None, "run_result": result}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


@pytest.fixture
def pool(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[SandboxPool]:
    monkeypatch.setattr(sandbox_fusion, "FIRST_PAUSE_S", 0.001)
    opened = open_sandbox(SandboxConfig(kind="sandbox_fusion", url=server, workers=4, limits=Limits(wall_s=1.0, output_bytes=1000)))
    Handler.bodies.clear()
    yield opened
    opened.close()
    Handler.answers.clear()


def test_outcomes(pool: SandboxPool) -> None:
    async def outcomes() -> list[Any]:
        sources = ["print(input() + open('f').read())", "1 / 0", "import time; time.sleep(9)", "print('x' * 2000)", "raise MemoryError"]
        return await asyncio.gather(*[pool.run(Program(source=source, stdin=b"in ", files={"f": b"file"})) for source in sources])

    good, error, late, long, memory = asyncio.run(outcomes())
    assert (good.status, good.stdout, good.exit_code) == ("ok", "in file\n", 0)
    assert (error.status, error.exit_code) == ("error", 1) and "ZeroDivisionError" in error.stderr
    assert (late.status, late.exit_code) == ("timeout", None)
    assert (long.status, len(long.stdout), long.truncated) == ("output_limit", 1000, True)
    assert memory.status == "memory"


def test_busy_server_is_asked_again(pool: SandboxPool) -> None:
    Handler.answers[:] = [(503, "busy"), (502, "bad gateway")]
    assert asyncio.run(pool.run(Program(source="print(1)"))).stdout == "1\n"
    assert len(Handler.bodies) == 3


@pytest.mark.parametrize(
    ("status", "text", "said", "asked"),
    [
        (500, "down", "4 attempts failed.*HTTP 500: down", 4),
        (422, "no such field", "HTTP 422: no such field", 1),
        (200, "<html>", "not JSON", 1),
        (200, '{"status": "SandboxError", "message": "no disk"}', "SandboxError.*no disk", 1),
        (200, '{"status": "Success", "run_result": null}', "no run_result", 1),
        (200, '{"status": "Success", "run_result": {"status": "Odd"}}', "Odd", 1),
    ],
)
def test_broken_server_is_an_error(pool: SandboxPool, status: int, text: str, said: str, asked: int) -> None:
    Handler.answers[:] = [(status, text)] * asked
    with pytest.raises(SandboxError, match=said):
        asyncio.run(pool.run(Program(source="print(1)")))
    assert len(Handler.bodies) == asked


def test_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_fusion, "FIRST_PAUSE_S", 0.001)
    with pytest.raises(SandboxError, match="ConnectError"):
        open_sandbox(SandboxConfig(kind="sandbox_fusion", url="http://127.0.0.1:9"))


def test_problems_are_graded_there(pool: SandboxPool) -> None:
    """The judge runs on the server as it does here, text beyond ASCII included."""
    settings = CodeTestConfig(seconds_per_test=2.0, seconds_total=5.0)
    asserts = assert_tests(["assert f(1) == 'é\U0001f600'", "assert f(2) == 3"])
    grade = asyncio.run(run_tests("def f(x): return 'é\U0001f600'", asserts, pool, settings))
    assert (grade.compiled, grade.num_passed, grade.num_tests, grade.error) == (True, 1, 2, False)
    lines = StdinTests(inputs_N=["é", "ü"], outputs_N=["éé", "üü"])
    assert asyncio.run(run_tests("print(input() * 2)", lines, pool, settings)).all_passed
