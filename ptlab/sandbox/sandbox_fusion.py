"""Programs on a SandboxFusion server (https://github.com/bytedance/SandboxFusion), POST /run_code.

What the server holds is its own affair. It gets the time and memory limits; output is cut here; process and file limits it does not know.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from ptlab.errors import SandboxError
from ptlab.sandbox.programs import Limits, Program, RunOutcome, RunStatus

ATTEMPTS = 4
FIRST_PAUSE_S = 0.25


class SandboxFusion:
    """Args: url: of the server, without /run_code."""

    name = "sandbox_fusion"
    missing: Sequence[str] = ("what the server does not hold; output, file and process limits are not its own",)

    def __init__(self, url: str, limits: Limits) -> None:
        self.url = url.rstrip("/")
        self.limits = limits
        self._http = httpx.Client(limits=httpx.Limits(max_connections=None))

    def run(self, program: Program) -> RunOutcome:
        """Blocks. Raises: SandboxError if the server cannot be reached, keeps failing, or says that its sandbox broke."""
        limits = program.limits or self.limits
        body = {
            "code": program.source,
            "language": "python",
            "stdin": program.stdin.decode("utf-8"),
            "run_timeout": limits.wall_s,
            "compile_timeout": limits.wall_s,
            "memory_limit_MB": limits.memory_bytes // 2**20,
            "files": {name: base64.b64encode(content).decode("ascii") for name, content in program.files.items()},
        }
        started = time.monotonic()
        answer = self._post(body, limits)
        return self._outcome(answer, limits, time.monotonic() - started)

    def close(self) -> None:
        self._http.close()

    def _post(self, body: Mapping[str, Any], limits: Limits) -> Mapping[str, Any]:
        failure = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))
            try:
                response = self._http.post(f"{self.url}/run_code", json=body, timeout=httpx.Timeout(10.0, read=2 * limits.wall_s + 30.0))
            except httpx.TransportError as err:
                failure = f"{type(err).__name__}: {err}"
                continue
            if response.status_code >= 500:
                failure = f"HTTP {response.status_code}: {response.text[:300]}"
                continue
            return self._checked(response)
        raise SandboxError(f"sandbox_fusion at {self.url}: {ATTEMPTS} attempts failed, the last with {failure}; is the server running?")

    def _checked(self, response: httpx.Response) -> Mapping[str, Any]:
        if response.status_code != 200:
            raise SandboxError(f"sandbox_fusion at {self.url}: HTTP {response.status_code}: {response.text[:300]}")
        try:
            answer = response.json()
        except ValueError as err:
            raise SandboxError(f"sandbox_fusion at {self.url}: the answer is not JSON: {response.text[:300]!r}") from err
        if not isinstance(answer, dict) or answer.get("status") not in ("Success", "Failed"):
            found = answer.get("status") if isinstance(answer, dict) else type(answer).__name__
            message = answer.get("message", "") if isinstance(answer, dict) else ""
            raise SandboxError(f"sandbox_fusion at {self.url}: status {found!r} {message}; needed Success or Failed")
        return answer

    def _outcome(self, answer: Mapping[str, Any], limits: Limits, seconds: float) -> RunOutcome:
        result = answer.get("run_result")
        if not isinstance(result, dict):  # Python has no compile step that could fail alone
            raise SandboxError(f"sandbox_fusion at {self.url}: the answer has no run_result: {str(answer)[:300]}")
        stdout, stderr = str(result.get("stdout") or ""), str(result.get("stderr") or "")
        truncated = max(len(stdout.encode("utf-8", "replace")), len(stderr.encode("utf-8", "replace"))) > limits.output_bytes
        code = result.get("return_code")
        exit_code = code if isinstance(code, int) and code >= 0 else None
        return RunOutcome(
            status=self._status(result.get("status"), exit_code, stderr, truncated),
            stdout=stdout.encode("utf-8", "replace")[: limits.output_bytes].decode("utf-8", "replace"),
            stderr=stderr.encode("utf-8", "replace")[: limits.output_bytes].decode("utf-8", "replace"),
            exit_code=exit_code,
            signal=-code if isinstance(code, int) and code < 0 else None,
            seconds=seconds,
            truncated=truncated,
        )

    def _status(self, said: object, exit_code: int | None, stderr: str, truncated: bool) -> RunStatus:
        if said == "TimeLimitExceeded":
            return "timeout"
        if said not in ("Finished", "Error"):
            raise SandboxError(f"sandbox_fusion at {self.url}: run_result.status is {said!r}; needed Finished, Error or TimeLimitExceeded")
        if truncated:
            return "output_limit"
        if said == "Finished" and exit_code == 0:
            return "ok"
        if exit_code is None:
            return "killed"
        return "memory" if stderr.rstrip().rpartition("\n")[2].startswith("MemoryError") else "error"
