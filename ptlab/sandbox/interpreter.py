"""Which Python runs the untrusted programs, as which user, and what it must be able to read."""

from __future__ import annotations

import marshal
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ptlab.errors import SandboxError
from ptlab.sandbox import bootstrap, seccomp
from ptlab.sandbox.programs import Limits, Program

NOBODY = 65534
SYSTEM_FOLDERS = ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/sbin")
PYTHON_FLAGS = ("-S", "-s", "-B")  # no site-packages, no user site, no .pyc files; the environment is ours anyway
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LC_ALL": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # the same program prints its sets in the same order every time
    "PYTHONUTF8": "1",
}
BOOTSTRAP = Path(bootstrap.__file__).read_text(encoding="utf-8") + "\n_main()\n"
FIRST_FREE_UID, LAST_FREE_UID = 1_879_048_192, 2_147_352_575  # between systemd's container and foreign ranges: nobody's
USERS_PER_POOL = 2**20


@dataclass(frozen=True, slots=True)
class Interpreter:
    """A Python that an unprivileged user can start."""

    path: str
    """Real path, no links."""
    prefix: str
    """Folder that holds its standard library; may lie within a system folder."""
    same_version: bool
    """Whether it runs what this process compiles."""

    @property
    def extra_folders(self) -> tuple[str, ...]:
        """What it needs outside the system folders."""
        return () if self.prefix.startswith("/usr") else (self.prefix,)


def find_interpreter(wanted: str | None) -> Interpreter:
    """The wanted one; with None this process's own, or the system's where another user cannot reach our own (say, under /root).

    Raises: SandboxError if there is none.
    """
    own = (os.path.realpath(sys.executable), sys.base_prefix)
    tried: list[str] = []
    for path in [wanted] if wanted is not None else [own[0], "/usr/local/bin/python3", "/usr/bin/python3"]:
        real = os.path.realpath(path)
        prefix = own[1] if real == own[0] else str(Path(real).parent.parent)
        if os.access(real, os.X_OK) and (os.getuid() != 0 or _all_may_reach(real)):
            return Interpreter(real, os.path.realpath(prefix), _version_of(real) == sys.version_info[:2])
        tried.append(path)
    raise SandboxError(
        f"sandbox: no Python that an unprivileged user can start (tried {', '.join(tried)}; a folder on the way may be closed to others); "
        "install python3 under /usr or set sandbox.python to the path of one"
    )


def users_command(uid: int) -> list[str]:
    """What stands before a command that is to run as this user; empty if we are not root.

    Raises: SandboxError if we are root and cannot become another.
    """
    if os.getuid() != 0:
        return []
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise SandboxError("sandbox: running as root, and there is no setpriv to become another user; install util-linux, or run as a user")
    return [setpriv, f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--no-new-privs"]


def spare_users() -> int | None:
    """First of USERS_PER_POOL numbers that are no user's, for one user per run; None if this user namespace has no such numbers."""
    for line in Path("/proc/self/uid_map").read_text(encoding="ascii").splitlines():
        inside, _, count = (int(part) for part in line.split())
        if inside <= FIRST_FREE_UID and inside + count > LAST_FREE_UID:
            return random.SystemRandom().randrange(FIRST_FREE_UID, LAST_FREE_UID - USERS_PER_POOL)
    return None


def bootstrap_request(
    program: Program,
    limits: Limits,
    interpreter: Interpreter,
    *,
    max_processes: int,
    ready_fd: int,
    lock: tuple[list[str], bytes | None] | None,
) -> bytes:
    """What the bootstrap reads from stdin; the program's own stdin follows."""
    request = {
        "code": _compiled(program.source) if program.trusted and interpreter.same_version else None,
        "source": "" if program.trusted and interpreter.same_version else program.source,
        "files": dict(program.files),
        "limits": {
            "CPU": limits.cpu_s,
            "AS": limits.memory_bytes,
            "FSIZE": limits.file_size_bytes,
            "NPROC": max_processes,
            "NOFILE": limits.max_open_files,
            "CORE": 0,
        },
        "ready_fd": ready_fd,
        "lock": lock,
    }
    text = repr(request).encode("utf-8", "surrogatepass")
    return f"{len(text):012d}".encode() + text + program.stdin


def refused_calls(*, sockets: bool, sessions: bool) -> bytes | None:
    """The seccomp filter for this machine, if there is one."""
    return seccomp.filter_program(sockets=sockets, sessions=sessions)


@lru_cache(maxsize=8)
def _compiled(source: str) -> bytes:
    """As the interpreter of the same version loads it."""
    return marshal.dumps(compile(source, "program.py", "exec"))


def _version_of(path: str) -> tuple[int, ...]:
    """(3, 11). Raises: SandboxError if it is no Python that starts."""
    asked = subprocess.run(
        [path, *PYTHON_FLAGS, "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True, check=False
    )
    if asked.returncode or not asked.stdout.strip():
        raise SandboxError(f"sandbox.python: {path} does not start as a Python: {asked.stderr.strip()[:300] or asked.returncode}")
    return tuple(int(part) for part in asked.stdout.split())


def _all_may_reach(path: str) -> bool:
    """Whether every folder on the way is open to all, and the file may be executed by all."""
    return os.stat(path).st_mode & 0o005 == 0o005 and all(folder.stat().st_mode & 0o001 for folder in Path(path).parents)
