"""The filter program, run here by a small interpreter of classic BPF: what the kernel would do with each call."""

from __future__ import annotations

import errno
import struct

import pytest

from ptlab.sandbox.seccomp import ALWAYS, SESSIONS, SOCKETS, filter_program

ALLOW, KILL, REFUSE, MISSING = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS


def verdict(program: bytes, *, call: int, arch: int, argument: int = 0) -> int:
    data = struct.pack("=IIQQ", call, arch, 0, argument)
    instructions = list(struct.iter_unpack("=HBBI", program))
    at, held = 0, 0
    while True:
        code, if_true, if_false, value = instructions[at]
        at += 1
        if code == 0x20:
            (held,) = struct.unpack_from("=I", data, value)
        elif code == 0x06:
            return int(value)
        else:
            met = {0x15: held == value, 0x35: held >= value, 0x45: bool(held & value)}[code]
            at += if_true if met else if_false


@pytest.mark.parametrize(
    ("machine", "arch", "column", "clone", "read"), [("x86_64", 0xC000003E, 0, 56, 0), ("aarch64", 0xC00000B7, 1, 220, 63)]
)
def test_verdicts(machine: str, arch: int, column: int, clone: int, read: int) -> None:
    plain, strict = (filter_program(machine=machine, sockets=more, sessions=more) for more in (False, True))
    assert plain is not None and strict is not None
    for program in (plain, strict):
        assert {verdict(program, call=numbers[column], arch=arch) for numbers in ALWAYS.values()} == {REFUSE}
        assert verdict(program, call=read, arch=arch) == ALLOW
        assert verdict(program, call=435, arch=arch) == MISSING  # clone3
        assert verdict(program, call=clone, arch=arch, argument=17) == ALLOW  # fork: SIGCHLD alone
        assert verdict(program, call=clone, arch=arch, argument=0x3D0F00) == ALLOW  # a thread
        assert verdict(program, call=clone, arch=arch, argument=0x10000011) == REFUSE  # CLONE_NEWUSER
        assert verdict(program, call=read, arch=0x40000003) == KILL  # i386
    for numbers in (*SOCKETS.values(), *SESSIONS.values()):
        assert (verdict(plain, call=numbers[column], arch=arch), verdict(strict, call=numbers[column], arch=arch)) == (ALLOW, REFUSE)


def test_x32_calls_are_killed() -> None:
    program = filter_program(machine="x86_64")
    assert program is not None and verdict(program, call=0x40000000, arch=0xC000003E) == KILL


def test_unknown_machine_has_no_filter() -> None:
    assert filter_program(machine="riscv64") is None
