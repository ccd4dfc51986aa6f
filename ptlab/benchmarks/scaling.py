"""How the cost of one forward_backward grows: with samples per prompt, prompt length, adapters held, vocabulary.

What is claimed: the cost is linear in *unique* tokens (a prompt counts once, however many samples it has), flat in adapters, linear in the
vocabulary. Each point is a process of its own, so that no point inherits another's memory: load, one pass that is not counted, then
`repeats` passes, each of the next adapter that is held. CPU-seconds are medians; memory is the process's highest resident set during the
passes. Only the trainer's public interface is used.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ptlab.benchmarks.cost_model import train_cost
from ptlab.benchmarks.cost_tables import shape_of, variant_batch
from ptlab.benchmarks.tables import markdown_table
from ptlab.benchmarks.work_items import LORA_RANK, TOKENIZER_SIZE, VARIANTS, Variant, make_sequences
from ptlab.engines.peft_trainer import PeftTrainer
from ptlab.engines.pretrain import new_model, save_model, train_tokenizer
from ptlab.losses import resolve_loss
from ptlab.tiny_models.quickstart import tokenizer_texts
from ptlab.types import AdamParams, LoraConfig

SMALL = VARIANTS["small"].shape
SWEEPS = ("samples", "prompt", "adapters", "vocabulary")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One setting."""

    sweep: str
    value: int
    """What the sweep changes: samples per prompt, tokens of a prompt, adapters held, or vocabulary."""
    work: Variant
    adapters: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PointCost:
    """Of one forward_backward."""

    sweep: str
    value: int
    tokens: int
    """Of all input rows."""
    unique_tokens: int
    flops: float
    """As the cost model has them."""
    cpu_s: float
    rest_mb: float
    """Resident before the first pass: program, model, adapters."""
    peak_mb: float


def points(sweep: str, *, sequences: int = 32, completion: int = 64) -> list[Point]:
    """The settings of a sweep, all on the `small` body."""

    def work(samples: int, prompt: int, vocab: int = SMALL.vocab_size) -> Variant:
        return Variant(
            name=f"v{vocab}", about="", shape=replace(SMALL, vocab_size=vocab), num_prompts=sequences // samples,
            samples_per_prompt=samples, group_size=sequences, prompt_tokens=(prompt, prompt), completion_tokens=(completion, completion),
        )  # fmt: skip

    match sweep:
        case "samples":  # the same number of sequences, below fewer and fewer prompts
            return [Point(sweep=sweep, value=n, work=work(n, 128)) for n in (1, 2, 4, 8, 16, 32) if n <= sequences]
        case "prompt":
            return [Point(sweep=sweep, value=n, work=work(min(8, sequences), n)) for n in (16, 64, 128, 256, 384)]
        case "adapters":
            return [Point(sweep=sweep, value=n, work=work(min(8, sequences), 64), adapters=n) for n in (1, 2, 4, 8, 16, 32)]
        case "vocabulary":
            return [Point(sweep=sweep, value=n, work=work(min(8, sequences), 64, n)) for n in (2048, 4096, 8192, 16384, 32768, 65536)]
        case _:
            raise ValueError(f"sweep {sweep!r}: known are {', '.join(SWEEPS)}")


def write_model(work: Variant, root: Path) -> Path:
    """A random model of the work's shape below `root`, unless it lies there already."""
    directory = root / work.name
    if not directory.exists():
        tokenizer = train_tokenizer(tokenizer_texts(), TOKENIZER_SIZE)
        save_model(new_model(work.shape, tokenizer, seed=0), tokenizer, directory)
    return directory


def measure(point: Point, model: Path, dtype: str, repeats: int) -> PointCost:
    """In this process; its memory is what it was before and what the passes take."""
    trainer = PeftTrainer(str(model), name=point.work.name, dtype=dtype, device="cpu")
    names = [f"adapter-{i}" for i in range(point.adapters)]
    for i, name in enumerate(names):
        trainer.create_adapter(name, LoraConfig(rank=LORA_RANK, seed=i, train_unembed=False))
    sequences = make_sequences(point.work)
    uniform = -math.log(point.work.shape.vocab_size)
    data = replace(sequences, sampling_logprobs=[[uniform] * len(c) for c in sequences.completions]).datums()
    loss = resolve_loss("importance_sampling")
    rest_mb = _reset_peak()
    trainer.forward_backward(names[0], data, loss)
    trainer.optim_step(names[0], AdamParams(learning_rate=1e-4))
    taken = []
    for turn in range(repeats):
        begun = time.process_time()
        trainer.forward_backward(names[turn % len(names)], data, loss)
        taken.append(time.process_time() - begun)
    batch = variant_batch(point.work, share=True)
    cost = train_cost(shape_of(point.work.shape), LORA_RANK, batch, element_bytes=4, head_lora=False)
    return PointCost(
        sweep=point.sweep, value=point.value, tokens=sequences.num_tokens - len(sequences.prompts), unique_tokens=batch.tokens,
        flops=cost.flops, cpu_s=median(taken), rest_mb=rest_mb, peak_mb=_status_mb("VmHWM"),
    )  # fmt: skip


def _status_mb(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024 / 1e6


def _reset_peak() -> float:
    """MB resident now; the kernel's high-water mark starts from there."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _status_mb("VmRSS")


def run_sweeps(sweeps: Sequence[str], root: Path, dtype: str, repeats: int, progress: Callable[[str], object]) -> list[PointCost]:
    """Every point in a process of its own, one after the other."""
    costs = []
    for point in (point for sweep in sweeps for point in points(sweep)):
        model = write_model(point.work, root)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            cost = pool.submit(measure, point, model, dtype, repeats).result()
        progress(f"{cost.sweep} {cost.value}: {cost.cpu_s:.2f} CPU-s, {cost.peak_mb:.0f} MB")
        costs.append(cost)
    return costs


@dataclass(frozen=True, slots=True)
class Fit:
    """The straight line y = offset + slope x with the least sum of squares."""

    offset: float
    slope: float
    worst: float
    """The largest distance of a point from the line, as a share of the point."""
    growth: float
    """The line's value at the largest x over that at the smallest; 1.0 is flat."""


def fit_line(x: Sequence[float], y: Sequence[float]) -> Fit:
    slope, offset = (float(value) for value in np.polyfit(x, y, 1))
    worst = max(abs(offset + slope * a - b) / b for a, b in zip(x, y, strict=True))
    return Fit(offset, slope, worst, (offset + slope * max(x)) / (offset + slope * min(x)))


def sweep_table(costs: Sequence[PointCost]) -> str:
    """One sweep's points."""
    rows = [
        [c.value, c.tokens, c.unique_tokens, f"{c.cpu_s:.2f}", f"{1e6 * c.cpu_s / c.unique_tokens:.0f}", f"{c.flops / c.cpu_s / 1e9:.0f}",
         f"{c.peak_mb - c.rest_mb:.0f}", f"{c.peak_mb:.0f}"]
        for c in costs
    ]  # fmt: skip
    header = [costs[0].sweep, "tokens", "unique", "CPU-s", "us per unique token", "GFLOP/s", "pass MB", "peak MB"]
    return markdown_table(header, rows)


def verdicts(costs: Sequence[PointCost]) -> list[str]:
    """A sentence for each sweep: how well the claim's straight line fits, or how flat the cost is; and the rate, by the cost model."""
    said = []
    for sweep in (s for s in SWEEPS if any(c.sweep == s for c in costs)):
        mine = [c for c in costs if c.sweep == sweep]
        first, last, seconds = mine[0], mine[-1], [c.cpu_s for c in mine]
        if sweep == "adapters":
            fit = fit_line([c.value for c in mine], seconds)
            each_mb = (last.rest_mb - first.rest_mb) / (last.value - first.value)
            line = f"{fit.growth:.2f} times the cost with {last.value} held as with {first.value}, {each_mb:.1f} MB each"
        elif sweep == "vocabulary":
            fit = fit_line([c.value for c in mine], seconds)
            line = f"{fit.offset:.2f} s + {1e6 * fit.slope:.3g} us per word of it"
        else:
            fit = fit_line([c.unique_tokens for c in mine], seconds)
            line = f"{fit.offset:.2f} s + {1e6 * fit.slope:.3g} us per unique token"
        rates = [c.flops / c.cpu_s / 1e9 for c in mine]
        said.append(f"{sweep}: {line}, points within {100 * fit.worst:.0f} %; {min(rates):.0f} to {max(rates):.0f} GFLOP/s")
    return said


def as_rows(costs: Sequence[PointCost]) -> list[dict[str, Any]]:
    return [asdict(cost) for cost in costs]
