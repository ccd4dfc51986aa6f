"""A seccomp filter: which system calls a program in the sandbox is refused. Built by hand as a classic BPF program.

A list of refusals, not of permissions: Python needs some 80 calls and every release may need others. What is refused is what a program
has no use for and what the kernel's past holes were reached by: other processes' memory, mounts, new namespaces, kernel keys, BPF, perf,
userfaultfd, io_uring, loading kernel code. `sockets` and `sessions` refuse networking and leaving the process group besides.

Numbers: Linux arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h (aarch64).
"""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Mapping

# name -> (x86-64, aarch64)
ALWAYS: Mapping[str, tuple[int, int]] = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "syslog": (103, 116),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "personality": (135, 92),
}
SOCKETS: Mapping[str, tuple[int, int]] = {"socket": (41, 198)}
"""socketpair stays: asyncio needs it, and it leads nowhere."""
SESSIONS: Mapping[str, tuple[int, int]] = {"setsid": (112, 157), "setpgid": (109, 154)}
CLONE, CLONE3 = (56, 220), (435, 435)

NEW_NAMESPACES = 0x7E020000 | 0x80  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET and NEWTIME
AUDIT_ARCHES: Mapping[str, tuple[int, int]] = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # audit number, column above
X32_BIT = 0x40000000

LOAD, JUMP_EQUAL, JUMP_GREATER_EQUAL, JUMP_ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL_PROCESS, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
OFFSET_CALL, OFFSET_ARCH, OFFSET_FIRST_ARGUMENT = 0, 4, 16  # of struct seccomp_data; the low half on little-endian machines


def filter_program(*, sockets: bool = False, sessions: bool = False, machine: str | None = None) -> bytes | None:
    """The filter as an array of struct sock_filter, ready for bwrap --seccomp or prctl; None on a machine it has no numbers for.

    Args:
        sockets: refuse socket() too (for sandboxes without a network namespace).
        sessions: refuse setsid() and setpgid() too, so that killing the process group reaches every process.
        machine: as platform.machine() says; None = this one.
    """
    known = AUDIT_ARCHES.get(machine if machine is not None else platform.machine())
    if known is None:
        return None
    arch, column = known
    refused = [
        numbers[column] for numbers in [*ALWAYS.values(), *(SOCKETS if sockets else {}).values(), *(SESSIONS if sessions else {}).values()]
    ]
    program = [
        _instruction(LOAD, OFFSET_ARCH),
        _instruction(JUMP_EQUAL, arch, if_true=1),
        _instruction(RETURN, KILL_PROCESS),  # a call by another architecture's numbers
        _instruction(LOAD, OFFSET_CALL),
        _instruction(JUMP_GREATER_EQUAL, X32_BIT, if_false=1),
        _instruction(RETURN, KILL_PROCESS),
    ]
    for number in refused:
        program += [_instruction(JUMP_EQUAL, number, if_false=1), _instruction(RETURN, ERRNO | errno.EPERM)]
    program += [
        _instruction(JUMP_EQUAL, CLONE3[column], if_false=1),
        _instruction(RETURN, ERRNO | errno.ENOSYS),  # its flags lie in memory where a filter cannot look; libc then uses clone
        _instruction(JUMP_EQUAL, CLONE[column], if_false=3),
        _instruction(LOAD, OFFSET_FIRST_ARGUMENT),
        _instruction(JUMP_ANY_BIT, NEW_NAMESPACES & ~0x80, if_false=1),
        _instruction(RETURN, ERRNO | errno.EPERM),
        _instruction(RETURN, ALLOW),
    ]
    return b"".join(program)


def _instruction(code: int, value: int, *, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
