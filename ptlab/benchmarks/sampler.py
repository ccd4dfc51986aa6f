"""Tokens a second of two samplers on the same bursts of requests, in turns.

A burst is `requests` prompts sent at once, each answered by `answer_tokens` tokens, or about as many if `ragged` (nothing ends an answer
early). CPU-seconds are those of this process, so the samplers must run in it; they are what compares on a machine that others use too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from ptlab.benchmarks.models import count_parameters, model_directory, write_adapter
from ptlab.benchmarks.tables import markdown_table
from ptlab.engines.protocols import AdapterRef, SampleCall, Sampler
from ptlab.errors import EngineError
from ptlab.types import ModelInput, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is asked of each sampler."""

    request_counts: Sequence[int] = (1, 16, 64, 256)
    prompt_tokens: int = 32
    answer_tokens: int = 64
    ragged: bool = False
    """Answers have lengths of their own, evenly from a quarter to seven quarters of answer_tokens."""
    repeats: int = 3

    def lengths(self, requests: int) -> list[int]:
        """Tokens of each answer of a burst; the same in every burst of as many requests."""
        if not self.ragged:
            return [self.answer_tokens] * requests
        low, high = self.answer_tokens // 4, self.answer_tokens * 7 // 4
        return [int(length) for length in np.random.default_rng(requests).integers(low, high + 1, requests)]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerTiming:
    """Medians over the repeats of one kind of burst on one sampler."""

    model: str
    adapter: bool
    requests: int
    sampler: str
    tokens: int
    """Sampled tokens of one burst."""
    wall_s: float
    cpu_s: float


async def compare_on_models(
    names: Sequence[str], load: Load, rank: int, root: Path, progress: Callable[[str], object]
) -> list[SamplerTiming]:
    """vLLM ("vLLM") and the torch sampler ("torch"), float32, both in this process, on models by name (see models.py).

    Args:
        root: where random models and adapters are written.
    """
    from ptlab.engines.torch_sampler import TorchSampler
    from ptlab.engines.vllm_sampler import VllmSampler

    timings = []
    for name in names:
        path = model_directory(name, root)
        adapter = AdapterRef(name="adapter@1", version=1, path=write_adapter(path, rank, root / f"{path.name}-adapter"))
        vllm = VllmSampler(str(path), dtype="float32", mode="inproc", max_lora_rank=rank)
        samplers: dict[str, Sampler] = {"vLLM": vllm, "torch": TorchSampler(str(path), dtype="float32", device="cpu")}
        label = f"{name} ({count_parameters(path) / 1e6:.2f} M)"
        timings += await time_samplers(label, samplers, adapter, load, progress)
        for sampler in samplers.values():
            await sampler.close()
    return timings


async def time_samplers(
    model: str, samplers: Mapping[str, Sampler], adapter: AdapterRef, load: Load, progress: Callable[[str], object]
) -> list[SamplerTiming]:
    """Every sampler on every kind of burst, with the base model and with `adapter`. Closes no sampler.

    Each kind begins with one burst per sampler that is not counted; then they take turns.
    Raises: EngineError if a sampler answers with another number of tokens than asked for.
    """
    for sampler in samplers.values():
        await sampler.load_adapter(adapter)
    timings: list[SamplerTiming] = []
    for ref in (None, adapter):
        for requests in load.request_counts:
            taken: dict[str, list[tuple[float, float]]] = {name: [] for name in samplers}
            for turn in range(load.repeats + 1):
                for name, sampler in samplers.items():
                    times = await _burst(sampler, requests, ref, load, seed=turn)
                    if turn:
                        taken[name].append(times)
            for name, times_R in taken.items():
                wall_s, cpu_s = (median(values) for values in zip(*times_R, strict=True))
                timings.append(
                    SamplerTiming(
                        model=model, adapter=ref is not None, requests=requests, sampler=name, tokens=sum(load.lengths(requests)),
                        wall_s=wall_s, cpu_s=cpu_s,
                    )
                )  # fmt: skip
            progress(f"{model}, {'adapter' if ref else 'base'}, {requests} requests: {_in_short(timings[-len(samplers) :])}")
    return timings


async def _burst(sampler: Sampler, requests: int, adapter: AdapterRef | None, load: Load, seed: int) -> tuple[float, float]:
    """(wall seconds, CPU-seconds of this process) of one burst of random prompts."""
    prompts = np.random.default_rng(seed).integers(3, sampler.info.vocab_size, (requests, load.prompt_tokens)).tolist()
    lengths = load.lengths(requests)
    calls = [
        SampleCall(prompt=ModelInput.from_ints(prompt), num_samples=1, params=SamplingParams(max_tokens=length, stop=[]), adapter=adapter)
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    wall, cpu = time.perf_counter(), time.process_time()
    responses = await asyncio.gather(*(sampler.sample(call) for call in calls))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    tokens = sum(len(response.sequences[0].tokens) for response in responses)
    if tokens != sum(lengths):
        raise EngineError(f"{tokens} tokens came back, {sum(lengths)} were asked for", operation="benchmark")
    return wall, cpu


def _in_short(timings: Sequence[SamplerTiming]) -> str:
    return ", ".join(f"{t.sampler} {t.tokens / t.wall_s:,.0f} tok/s, {t.tokens / t.cpu_s:,.0f} tok/CPU-s" for t in timings)


def sampler_table(timings: Sequence[SamplerTiming], first: str, second: str) -> str:
    """`first` against `second`: one row for each kind of burst; a ratio above 1 says that `first` is faster."""
    by_key = {(t.model, t.adapter, t.requests, t.sampler): t for t in timings}
    rows: list[list[object]] = []
    for t in timings:
        if t.sampler != first:
            continue
        other = by_key[t.model, t.adapter, t.requests, second]
        wall, cpu = other.wall_s / t.wall_s, other.cpu_s / t.cpu_s
        rates = [other.tokens / other.wall_s, t.tokens / t.wall_s, other.tokens / other.cpu_s, t.tokens / t.cpu_s]
        rows.append([t.model, "adapter" if t.adapter else "base", t.requests, *rates, f"{wall:.2f}", f"**{cpu:.2f}**"])
    header = ["model", "weights", "requests"]
    header += [f"{name} {unit}" for unit in ("tok/s", "tok/CPU-s") for name in (second, first)]
    return markdown_table([*header, "ratio wall", "ratio CPU"], rows)
