"""Where the time of a weight sync goes, through the real backend: train a step, publish, and read the `sync/*` metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from ptlab.backend.backend import Backend
from ptlab.benchmarks.models import count_parameters, random_datum
from ptlab.benchmarks.tables import markdown_table
from ptlab.engines.protocols import Engines
from ptlab.types import AdamParams, LoraConfig

MEASURED = ("capture", "write", "load", "verify")
PARTS = (*MEASURED, "other", "latency")
DATUM_TOKENS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncTiming:
    """Medians over the repeats for one model, rank and sampler; milliseconds of wall time unless said otherwise."""

    model: str
    num_parameters: int
    rank: int
    adapter_bytes: int
    sampler: str
    parts_ms: dict[str, float]
    """By PARTS: capture = the trainer's probe log-probabilities, write = the adapter's files, load, verify = the sampler's probe, other =
    what is in none of these (threads, renames, checks); latency = all of it, from the call to a sampler that may be used."""
    cpu_ms: float
    """CPU time of this process over the whole sync."""
    verify_gap_nats: float
    """Largest of the repeats."""


async def time_syncs(
    model: str,
    path: Path,
    open_engines: Callable[[str], Engines],
    sampler: str,
    ranks: Sequence[int],
    repeats: int,
    directory: Path,
    progress: Callable[[str], object],
) -> list[SyncTiming]:
    """Syncs of adapters of several ranks, one after the other, each step with new weights and the version before released.

    Args:
        path: the model's directory, to count its parameters.
        sampler: what to call the sampler of `open_engines`.
        directory: for the backend's checkpoints and scratch versions; on a RAM disk to measure what a run does.
    """
    metrics: dict[str, float] = {}
    opened: list[Engines] = []

    def open_once(name: str) -> Engines:
        opened.append(open_engines(name))
        return opened[0]

    scratch = directory / "scratch"
    backend = Backend(data_dir=directory / "data", scratch_dir=scratch, open_engines=open_once, on_metrics=metrics.update)
    timings = []
    try:
        session = await backend.create_session()
        for index, rank in enumerate(ranks):
            lora = LoraConfig(rank=rank, seed=0)
            model_id = await backend.create_model(session_id=session, model_seq_id=index, base_model=model, lora=lora)
            taken = []
            for turn in range(repeats + 1):  # the first is not counted
                await _train(backend, model_id, 3 * turn + 1, opened[0].trainer.info.vocab_size)
                version, begun_cpu = f"{session}:sample:{index * 1000 + turn}", time.process_time()
                await backend.save_weights_for_ephemeral_sampler(model_id=model_id, seq_id=3 * turn + 3, sampling_session_id=version)
                if turn:
                    other_s = metrics["sync/latency_s"] - sum(metrics[f"sync/{part}_s"] for part in MEASURED)
                    taken.append(metrics | {"sync/other_s": other_s, "cpu": time.process_time() - begun_cpu})
                adapter_bytes = sum(file.stat().st_size for file in scratch.rglob("adapter_model.safetensors"))
                await backend.sampling.release_sampling_session(version)
            timings.append(
                SyncTiming(
                    model=model,
                    num_parameters=count_parameters(path),
                    rank=rank,
                    adapter_bytes=adapter_bytes,
                    sampler=sampler,
                    parts_ms={part: 1000 * median(times[f"sync/{part}_s"] for times in taken) for part in PARTS},
                    cpu_ms=1000 * median(times["cpu"] for times in taken),
                    verify_gap_nats=max(times["sync/verify_gap"] for times in taken),
                )
            )
            progress(f"{model}, rank {rank}, {sampler}: {timings[-1].parts_ms['latency']:.0f} ms")
    finally:
        await backend.close()
    return timings


async def _train(backend: Backend, model_id: str, seq_id: int, vocab_size: int) -> None:
    """One optimizer step, two seq_ids."""
    data = [random_datum(vocab_size, DATUM_TOKENS, seed=seq_id)]
    await backend.forward_backward(model_id=model_id, seq_id=seq_id, data=data, loss_fn="cross_entropy")
    await backend.optim_step(model_id=model_id, seq_id=seq_id + 1, adam=AdamParams(learning_rate=1e-3))


def sync_table(timings: Sequence[SyncTiming]) -> str:
    """One row for each model, rank and sampler; each part is a median of its own, so a row need not add up."""
    rows: list[list[object]] = []
    for t in timings:
        sizes = [f"{t.num_parameters / 1e6:.2f} M", t.rank, f"{t.adapter_bytes / 1e6:.2f}"]
        rows.append([t.model, *sizes, t.sampler, *(t.parts_ms[part] for part in PARTS), t.cpu_ms, f"{t.verify_gap_nats:.1e}"])
    header = ["model", "parameters", "rank", "adapter MB", "sampler", *(f"{part} ms" for part in PARTS)]
    return markdown_table([*header, "CPU ms", "largest gap, nats"], rows)


def as_rows(timings: Sequence[SyncTiming]) -> list[Mapping[str, object]]:
    """For JSON lines: the parts as fields of their own."""
    rows = [asdict(timing) for timing in timings]
    return [row | {f"{part}_ms": ms for part, ms in row.pop("parts_ms").items()} for row in rows]
