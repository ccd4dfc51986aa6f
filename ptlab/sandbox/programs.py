"""What is run in a sandbox, under which limits, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from pydantic import Field

from ptlab.errors import InvalidRequestError
from ptlab.section import Section

RunStatus = Literal["ok", "error", "timeout", "memory", "output_limit", "killed"]


class Limits(Section):
    """What a program may use. Beyond any of these it ends, and its outcome says which."""

    cpu_s: int = Field(default=10, ge=1)
    """CPU seconds of each process (the kernel counts whole ones)."""
    wall_s: float = Field(default=15.0, gt=0)
    """Seconds from the start until everything is killed."""
    memory_bytes: int = Field(default=512 * 2**20, ge=64 * 2**20)
    """Address space of each process; all of them together can hold max_processes times as much."""
    output_bytes: int = Field(default=2**20, ge=1)
    """Most bytes read from stdout, and from stderr; what would write more is killed."""
    file_size_bytes: int = Field(default=16 * 2**20, ge=0)
    """Largest file; under bubblewrap also all files together."""
    max_processes: int = Field(default=16, ge=1)
    """Processes and threads at once."""
    max_open_files: int = Field(default=64, ge=16)
    """File descriptors per process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A Python program. It runs as __main__ in an empty folder of its own, with no site-packages and no environment."""

    source: str
    trusted: bool = False
    """The source is ptlab's own: it is compiled here, once, instead of in every run."""
    stdin: bytes = b""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Name -> content, put into its folder; plain names only."""
    limits: Limits | None = None
    """None = those of the sandbox."""

    def __post_init__(self) -> None:
        for name in self.files:
            if "/" in name or "\0" in name or name in ("", ".", ".."):
                raise InvalidRequestError(f"program file {name!r}: not a plain file name; files lie side by side in the program's folder")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOutcome:
    """What a program did. Everything here but `seconds` is under its control: judge the text, never trust it."""

    status: RunStatus
    """ok: ended with exit code 0; error: with another; timeout: wall or CPU limit (the latter told by the
    kernel's kill after that long); memory: ended by MemoryError; output_limit: wrote too
    much; killed: died of another signal."""
    stdout: str
    """UTF-8, wrong bytes replaced."""
    stderr: str
    exit_code: int | None
    """None if a signal or a limit ended it."""
    signal: int | None
    """What killed it, where that is known."""
    seconds: float
    """Wall clock, start of the sandbox included."""
    truncated: bool = False
    """Whether stdout or stderr was cut at output_bytes."""


class Sandbox(Protocol):
    """Runs untrusted programs, a few at a time; the other calls wait."""

    async def run(self, program: Program) -> RunOutcome:
        """Raises: SandboxError if the sandbox itself failed; whatever the program does is an outcome."""
