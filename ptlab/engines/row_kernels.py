"""row_kernels.cpp, compiled for this machine the first time it is needed (about a second) and kept in the cache directory.

Where no C++ compiler is found the formulas run as torch operators instead: right, and about half as fast. Which of the two runs is a
property of the machine, so a resumed run computes what the unbroken one would have.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("row_kernels.cpp")
FLAGS = "-std=c++17 -O3 -march=native -mprefer-vector-width=512 -fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math"
MOST_HEAD_DIM = 1024
"""Of the buffers in the source."""
ROWS_WORTH_A_THREAD = 64
_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
logger = logging.getLogger(__name__)


@cache
def load() -> ctypes.CDLL | None:
    """The library; None where it cannot be made: another system than Linux on x86-64, or no compiler."""
    compiler = shutil.which("g++")
    if platform.system() != "Linux" or platform.machine() != "x86_64" or compiler is None:
        return None
    command = [compiler, *FLAGS.split(), "-shared", "-fPIC", str(SOURCE)]
    library = _cache_dir() / f"row_kernels-{_fingerprint(command)}.so"
    try:
        if not library.is_file():
            library.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
                made = Path(scratch) / library.name
                _run([*command, "-o", str(made), "-lmvec", "-lm"])
                made.replace(library)  # whole or not at all, also with several processes at it
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.CalledProcessError) as err:
        said = err.stderr if isinstance(err, subprocess.CalledProcessError) else err
        logger.warning("the CPU kernels cannot be compiled, training is slower without them: %s", said)
        return None


def _run(command: list[str]) -> str:
    """What it prints. A process without PATH has found the compiler in the default places; the compiler looks there for its linker, too."""
    environment = {**os.environ, "PATH": os.environ.get("PATH", os.defpath)}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def _cache_dir() -> Path:
    """Beside the models that ptlab makes (tiny_models.maker.default_cache_dir)."""
    own = os.environ.get("PTLAB_CACHE")
    cache_home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(own).expanduser() / "kernels" if own else Path(cache_home).expanduser() / "ptlab" / "kernels"


def _fingerprint(command: list[str]) -> str:
    """Of the source, the command, the compiler, and what this processor can do (-march=native)."""
    version = _run([command[0], "--version"])
    flags = next((line for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if line.startswith("flags")), "")
    return hashlib.sha256("\n".join([SOURCE.read_text(encoding="utf-8"), *command, version, flags]).encode()).hexdigest()[:16]


def can_run(*tensors: Tensor) -> bool:
    """Whether a kernel takes these: on the CPU, one of its types, rows of one run of numbers."""
    first = tensors[0]
    return (
        first.device.type == "cpu"
        and first.dtype in _TYPES
        and all(x.dtype == first.dtype and _is_rows(x) for x in tensors)
        and load() is not None
    )


def _is_rows(x: Tensor) -> bool:
    """One run of numbers per row: [T, ..., H] with any stride between rows only."""
    expected = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


Argument = Tensor | tuple[Tensor | None] | float
"""Rows [T, ...]: their address and the stride between them. In a tuple: the same for all rows, its address alone. A number: itself."""


def run(name: str, arguments: list[Argument], sizes: list[int]) -> None:
    """Call the kernel of that name for the type of its first argument. With several torch threads the rows are dealt out among them."""
    library, first = load(), arguments[0]
    assert library is not None and isinstance(first, Tensor), "ask can_run first"
    function, rows = library[f"{name}_{_TYPES[first.dtype]}"], first.shape[0]
    parts = max(1, min(torch.get_num_threads(), rows // ROWS_WORTH_A_THREAD))
    edges = [rows * i // parts for i in range(parts + 1)]
    calls = [_arguments(arguments, begin, end, sizes) for begin, end in pairwise(edges)]
    if parts == 1:
        function(*calls[0])
    else:
        list(_threads(parts).map(lambda call: function(*call), calls))  # ctypes lets go of the interpreter meanwhile


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="ptlab-rows")


def _arguments(arguments: list[Argument], begin: int, end: int, sizes: list[int]) -> list[object]:
    found: list[object] = []
    for x in arguments:
        if isinstance(x, Tensor):
            found += [ctypes.c_void_p(x.data_ptr() + begin * x.stride(0) * x.element_size()), ctypes.c_int64(x.stride(0))]
        elif isinstance(x, tuple):
            found.append(ctypes.c_void_p(None if x[0] is None else x[0].data_ptr()))
        else:
            found.append(ctypes.c_float(x))
    return [*found, ctypes.c_int64(end - begin), *(ctypes.c_int64(size) for size in sizes)]
