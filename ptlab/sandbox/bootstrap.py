"""The first code of every sandboxed process: takes limits and program from stdin, gives up what it can, becomes the program.

Its text is passed to `python -c`, so it needs nothing but the standard library and imports nothing that a run can do without (json alone
would double the start). Runs under any Python from 3.8 on. Nothing here is secret from the program that follows.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

READ_BITS = 0b1101  # Landlock: execute, read file, read directory
FILE_READ_BITS = 0b0101
ALL_BITS = (1 << 13) - 1
"""Rights of Landlock ABI 1; later ones are added by version."""


def _read_exactly(size: int) -> bytes:
    """Straight from descriptor 0, not one byte too many: what follows is the program's stdin."""
    parts = []
    while size:
        part = os.read(0, min(size, 1 << 20))
        if not part:
            raise SystemExit("sandbox: the request was cut off")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _set_limits(limits: Mapping[str, int]) -> None:
    import resource

    for name, value in limits.items():
        which = getattr(resource, "RLIMIT_" + name)
        _, hard = resource.getrlimit(which)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))


def _lock(readable: Sequence[str], seccomp: bytes | None) -> list[str]:
    """Without namespaces: Landlock for files, a seccomp filter for calls, no new privileges, death with the parent. Returns what failed."""
    import ctypes
    import struct

    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    failed: list[str] = []

    def prctl(*args: object) -> int:
        return int(libc.prctl(*[ctypes.c_ulong(value) if isinstance(value, int) else value for value in args]))

    prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL
    prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: processes of the same user cannot trace this one
    if prctl(38, 1, 0, 0, 0) != 0:  # PR_SET_NO_NEW_PRIVS
        failed.append("no_new_privs")
    version = libc.syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint(1))
    if version < 1:
        failed.append("landlock")
    else:
        bits = ALL_BITS | (1 << 13 if version >= 2 else 0) | (1 << 14 if version >= 3 else 0) | (1 << 15 if version >= 5 else 0)
        parts = [bits] + ([0b11] if version >= 4 else []) + ([0b11] if version >= 6 else [])  # files; TCP; signals and abstract sockets
        attributes = struct.pack(f"={len(parts)}Q", *parts)
        ruleset = libc.syscall(444, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0))
        rules = [(path, READ_BITS) for path in readable] + [(".", bits)]
        rules += [(path, FILE_READ_BITS) for path in ("/dev/urandom", "/dev/zero", "/dev/random")] + [("/dev/null", 0b0110)]
        for path, allowed in rules:
            try:
                descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            rule = struct.pack("=Qi", allowed & bits, descriptor)
            libc.syscall(445, ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint(0))
            os.close(descriptor)
        if ruleset < 0 or libc.syscall(446, ctypes.c_int(ruleset), ctypes.c_uint(0)) != 0:
            failed.append("landlock")
        elif version < 6:
            failed.append("signals")
        os.close(ruleset)
    if seccomp:
        buffer = ctypes.create_string_buffer(seccomp, len(seccomp))

        class SockFprog(ctypes.Structure):
            _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

        program = SockFprog(len(seccomp) // 8, ctypes.addressof(buffer))
        if prctl(22, 2, ctypes.byref(program), 0, 0) != 0:  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
            failed.append("seccomp")
    else:
        failed.append("seccomp")
    return failed


def _main() -> None:
    request = eval(_read_exactly(int(_read_exactly(12))))  # a literal that ptlab wrote
    for name, content in request["files"].items():
        with open(name, "wb") as file:
            file.write(content)
    failed = [] if request["lock"] is None else _lock(*request["lock"])
    _set_limits(request["limits"])
    os.write(request["ready_fd"], ("ready " + " ".join(failed)).encode())
    os.close(request["ready_fd"])
    module = type(sys)("__main__")
    module.__dict__["__file__"] = "program.py"
    sys.modules["__main__"] = module
    sys.argv[:] = ["program.py"]
    try:
        if request["code"] is None:
            exec(compile(request["source"], "program.py", "exec"), module.__dict__)
        else:
            exec(__import__("marshal").loads(request["code"]), module.__dict__)
    except SystemExit:
        raise
    except BaseException as err:
        trace = err.__traceback__
        shown = err.with_traceback(trace and trace.tb_next)  # without this file's own line
        sys.excepthook(type(shown), shown, shown.__traceback__)
        sys.exit(1)
