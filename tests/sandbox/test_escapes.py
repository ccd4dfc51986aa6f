"""Programs that try to get out, to outlast their limits, or to harm the host. Each ends within its limits and the host is as it was."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

import pytest

from ptlab.sandbox import Limits, Program, RunOutcome, SandboxPool


def run(
    pool: SandboxPool, source: str, *, stdin: bytes = b"", limits: Limits | None = None, files: Mapping[str, bytes] | None = None
) -> RunOutcome:
    return asyncio.run(pool.run(Program(source=source, stdin=stdin, limits=limits, files=files or {})))


def processes_with(marker: str) -> list[str]:
    """Command lines on the host that hold the marker, zombies aside."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and entry.name != str(os.getpid()):
            try:
                line = (entry / "cmdline").read_bytes().decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if marker in line:
                found.append(line)
    return found


def gone_soon(marker: str) -> bool:
    """Whether no process with the marker is left after at most two seconds; the kernel takes a moment to end a namespace."""
    deadline = time.monotonic() + 2
    while processes_with(marker) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not processes_with(marker)


def test_ordinary_program(pool: SandboxPool) -> None:
    outcome = run(
        pool,
        "import sys, data\nprint(sys.stdin.read(), data.x, open('t.txt').read())",
        stdin="é€".encode(),
        files={"data.py": b"x = 3", "t.txt": b"hi"},
    )
    assert (outcome.status, outcome.stdout, outcome.stderr, outcome.exit_code) == ("ok", "é€ 3 hi\n", "", 0)


def test_exit_codes_and_exceptions(pool: SandboxPool) -> None:
    assert (run(pool, "import sys; sys.exit(7)").status, run(pool, "raise SystemExit").status) == ("error", "ok")
    outcome = run(pool, "def f():\n    return 1 / 0\nf()")
    assert (outcome.status, outcome.exit_code) == ("error", 1)
    assert "line 2, in f" in outcome.stderr and "ZeroDivisionError" in outcome.stderr and "_main" not in outcome.stderr
    killed = run(pool, "import os; os.kill(os.getpid(), 11)")
    assert (killed.status, killed.signal, killed.exit_code) == ("killed", 11, None)


def test_fork_bomb_meets_the_process_limit(pool: SandboxPool) -> None:
    started = time.monotonic()
    outcome = run(pool, "import os\nwhile True:\n    os.fork()", limits=Limits(cpu_s=1, wall_s=3.0, max_processes=8))
    assert outcome.status in ("error", "timeout", "output_limit") and time.monotonic() - started < 6
    assert run(pool, "print(1)").stdout == "1\n"  # the next one can still start


def test_threads_count_as_processes(pool: SandboxPool) -> None:
    source = "import threading, time\nfor i in range(100):\n    threading.Thread(target=time.sleep, args=(0.2,)).start()\nprint('all')"
    outcome = run(pool, source, limits=Limits(cpu_s=1, wall_s=3.0, max_processes=8))
    assert outcome.status == "error" and "can't start new thread" in outcome.stderr


def test_ten_gigabytes(pool: SandboxPool) -> None:
    outcome = run(pool, "x = bytearray(10 * 2**30)")
    assert (outcome.status, outcome.exit_code) == ("memory", 1)


def test_output_without_end(pool: SandboxPool) -> None:
    outcome = run(pool, "while True:\n    print('x' * 1000)")
    assert (outcome.status, outcome.truncated, len(outcome.stdout)) == ("output_limit", True, 100_000)
    assert run(pool, "import sys\nwhile True:\n    sys.stderr.write('x' * 1000)").status == "output_limit"
    just_over = run(pool, "print('x' * 100_000)")  # 100,001 bytes, and it ended by itself
    assert (just_over.status, run(pool, "print('x' * 99_999)").status) == ("output_limit", "ok")


def test_sleeping_and_spinning_past_the_limits(pool: SandboxPool) -> None:
    sleeps = run(pool, "import time; print('begun', flush=True); time.sleep(60)", limits=Limits(wall_s=0.7))
    assert (sleeps.status, sleeps.stdout) == ("timeout", "begun\n") and sleeps.seconds < 2
    assert run(pool, "while True: pass").status == "timeout"  # by CPU time, before the wall's 3 s


def test_signals_that_are_ignored(pool: SandboxPool) -> None:
    source = (
        "import signal, resource\n"
        "for s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
        "try: resource.setrlimit(resource.RLIMIT_CPU, (100, 100))\nexcept (OSError, ValueError): print('held', flush=True)\n"
        "while True: pass"
    )
    outcome = run(pool, source)
    assert (outcome.status, outcome.stdout) == ("timeout", "held\n") and outcome.seconds < 4


def test_home_files_and_environment(pool: SandboxPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("hidden")
    for folder in (tmp_path, *tmp_path.parents):  # as open as can be: not the file's mode must hold it
        if folder != Path("/") and folder.owner() == tmp_path.owner() and str(folder) != "/tmp":
            folder.chmod(0o755)
    secret.chmod(0o666)
    monkeypatch.setenv("PTLAB_SECRET", "hidden")
    source = (
        "import os, sys\n"
        "print(sorted(os.environ))\n"
        f"for path in ({str(secret)!r}, '/root/.bashrc', '/etc/passwd', '/etc/shadow', '/proc/1/environ', '/proc/self/mem',\n"
        "    f'/proc/{os.getppid()}/environ'):\n"
        "    for mode in ('r', 'a'):\n"
        "        try: open(path, mode).read(1); print('OPEN', path)\n"
        "        except OSError: pass\n"
        f"for path in ('/root', '/home', '/work', '/var', '/proc', {str(tmp_path)!r}):\n"
        "    try: print('LIST', path, os.listdir(path))\n"
        "    except OSError: pass\n"
    )
    outcome = run(pool, source)
    assert outcome.status == "ok", outcome.stderr
    assert "hidden" not in outcome.stdout and "PTLAB" not in outcome.stdout
    assert "OPEN" not in outcome.stdout and "LIST" not in outcome.stdout
    assert secret.read_text() == "hidden"


def test_writing_outside_its_folder(pool: SandboxPool) -> None:
    name = f"ptlab-escape-{uuid.uuid4().hex}"
    folders = ["/tmp", "/var/tmp", "/dev/shm", "/", "/usr/lib", "/usr/local/lib", "/home", os.getcwd()]
    source = (
        "import os\n"
        f"for folder in {folders!r}:\n"
        f"    try: open(os.path.join(folder, {name!r}), 'w').write('x'); print('WROTE', folder)\n"
        "    except OSError: pass\n"
        "open('own.txt', 'w').write('x' * 100)\n"
        "print(len(open('own.txt').read()))"
    )
    outcome = run(pool, source)
    assert outcome.stdout.splitlines()[-1:] == ["100"], outcome.stderr
    assert not [folder for folder in folders if os.path.exists(os.path.join(folder, name))]  # its own /tmp is not the host's


def test_file_size(pool: SandboxPool) -> None:
    outcome = run(pool, "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nopen('big', 'wb').write(b'x' * (5 * 2**20))")
    assert outcome.status == "error" and "OSError" in outcome.stderr


def test_links_to_the_outside(pool: SandboxPool, tmp_path: Path) -> None:
    target = tmp_path / "target.txt"
    target.write_text("kept")
    source = (
        "import os\n"
        f"os.symlink({str(target)!r}, 'link')\nos.symlink('/', 'root')\n"
        "for path in ('link', 'root/etc/passwd', 'root/root/.bashrc'):\n"
        "    for mode in ('r', 'w'):\n"
        "        try: open(path, mode).close(); print('OPEN', path, mode)\n"
        "        except OSError: pass\n"
        f"try: os.link({str(target)!r}, 'hard'); print('LINKED')\n"
        "except OSError: pass\n"
    )
    outcome = run(pool, source)
    assert (outcome.status, outcome.stdout) == ("ok", ""), outcome
    assert target.read_text() == "kept"  # neither written through, nor removed with the program's folder


def test_folders_that_are_hard_to_remove(pool: SandboxPool) -> None:
    """Locked, and nested deeper than Python recurses: nothing is left of them."""
    before = set(os.listdir("/tmp"))
    source = (
        "import os\nos.mkdir('locked'); open('locked/f', 'w').close(); os.chmod('locked', 0)\n"
        "for i in range(1200):\n    os.mkdir('d'); os.chdir('d')"
    )
    assert run(pool, source).status == "ok"
    assert [name for name in set(os.listdir("/tmp")) - before if name.startswith("ptlab-sandbox-")] == []


def test_network(pool: SandboxPool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        source = (
            "import socket\n"
            f"places = (socket.AF_INET, ('127.0.0.1', {port})), (socket.AF_INET, ('1.1.1.1', 53)), (socket.AF_UNIX, '/run/x.sock')\n"
            "for family, address in places:\n"
            "    try: socket.socket(family).connect(address); print('CONNECTED', address)\n"
            "    except OSError: pass\n"
            "a, b = socket.socketpair(); a.send(b'x'); print(b.recv(1))\n"
        )
        outcome = run(pool, source)
        server.settimeout(0.05)
        with pytest.raises(TimeoutError):
            server.accept()
    assert (outcome.status, outcome.stdout) == ("ok", "b'x'\n"), outcome


def test_killing_others(pool: SandboxPool) -> None:
    """Neither its parents nor, by -1, whoever else: this process goes on and so does a process of its own user."""
    source = (
        "import os, signal\n"
        f"for pid in (os.getppid(), {os.getpid()}, {os.getppid()}, -1):\n"
        "    for number in (signal.SIGTERM, signal.SIGKILL):\n"
        "        try: os.kill(pid, number)\n"
        "        except OSError: pass\n"
        "print('done')"
    )
    got: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        outcome = run(pool, source)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert got == []
    assert outcome.status in ("ok", "killed", "error")  # -1 and, in its namespace, its parent are itself


def test_daemon_left_behind(pool: SandboxPool) -> None:
    """Double fork, own session where it can, streams closed: it does not outlive the run and does not hold it up."""
    marker = uuid.uuid4().hex
    source = (
        "import os, sys\n"
        "def daemon():\n"
        "    if os.fork(): os._exit(0)\n"
        "    for step in (os.setsid, lambda: os.setpgid(0, 0)):\n"
        "        try: step()\n"
        "        except OSError: pass\n"
        "    if os.fork(): os._exit(0)\n"
        f"    os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(60)', {marker!r}])\n"
        "if os.fork() == 0: daemon()\n"
        "import time; time.sleep(0.2); print('parent ends')"
    )
    outcome = run(pool, source)
    assert (outcome.status, outcome.stdout) == ("ok", "parent ends\n") and outcome.seconds < 2.5
    assert gone_soon(marker)


def test_background_process_that_keeps_the_streams(pool: SandboxPool) -> None:
    """The run ends with its main process, not with whoever holds stdout."""
    outcome = run(pool, "import os, time\nif os.fork() == 0:\n    time.sleep(60)\nprint('ended')")
    assert (outcome.status, outcome.stdout) == ("ok", "ended\n") and outcome.seconds < 2


def test_calls_that_are_refused(pool: SandboxPool) -> None:
    """ptrace, mount, unshare (user namespaces), keyctl, bpf, perf, userfaultfd, setns; and clone with CLONE_NEWUSER."""
    source = (
        "import ctypes, platform\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "numbers = {'x86_64': (101, 165, 272, 250, 321, 298, 323, 308),\n"
        "           'aarch64': (117, 40, 97, 219, 280, 241, 282, 268)}[platform.machine()]\n"
        "for number in numbers:\n"
        "    result = libc.syscall(number, 0x10000000, 0, 0, 0, 0)\n"
        "    if (result, ctypes.get_errno()) != (-1, 1): print('ALLOWED', number, result, ctypes.get_errno())\n"
        "clone = {'x86_64': 56, 'aarch64': 220}[platform.machine()]\n"
        "result = libc.syscall(clone, 0x10000000 | 17, 0, 0, 0, 0)\n"
        "print('clone', result, ctypes.get_errno())\n"
    )
    outcome = run(pool, source)
    assert (outcome.status, outcome.stdout) == ("ok", "clone -1 1\n"), outcome


def test_no_privileges(pool: SandboxPool) -> None:
    source = (
        "import os\n"
        "for call in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.chroot('/'), lambda: os.nice(-5)):\n"
        "    try: call(); print('ALLOWED')\n"
        "    except OSError: pass\n"
        "print(os.getuid() != 0 and os.geteuid() != 0, os.getgroups() in ([], [os.getgid()], [65534]))"
    )
    assert run(pool, source).stdout == "True True\n"


def test_many_at_once_start_few(pool: SandboxPool) -> None:
    """Forty programs on two workers: never more than two at a time."""
    source = "import time; a = time.monotonic(); time.sleep(0.05); print(a, time.monotonic())"

    async def all_of_them() -> list[RunOutcome]:
        return await asyncio.gather(*[pool.run(Program(source=source)) for _ in range(20)])

    spans = [tuple(map(float, outcome.stdout.split())) for outcome in asyncio.run(all_of_them())]
    assert max(sum(begin <= moment < end for begin, end in spans) for moment, _ in spans) <= pool.workers


def test_same_order_of_sets_every_time(pool: SandboxPool) -> None:
    source = "print({str(i) for i in range(50)})"
    assert run(pool, source).stdout == run(pool, source).stdout
