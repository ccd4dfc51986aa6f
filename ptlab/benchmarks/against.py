"""Two trainers on the same work item: what was measured, whether both computed the same, and the tables that say by how much one is faster.

No ratio without parity: in float32 the first step's loss and gradient norm must agree. bfloat16 is compared with float32 of the same
system-independent work item, and how far each system is off stands in the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from ptlab.benchmarks.tables import markdown_table
from ptlab.errors import EngineError

OURS = "ptlab"
SHORT = {"float32": "fp32", "bfloat16": "bf16"}
TOLERANCES = {"float32": (1e-5, 1e-4), "bfloat16": (5e-2, 2e-2)}
"""Largest relative difference of loss and of gradient norm: between the systems in float32, from float32's value in bfloat16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One system on one work item in one type. The loss and gradient norm are those of the first step, which is no counted one."""

    variant: str
    dtype: str
    system: str
    num_tokens: int
    cpu_s: list[float]
    """One a counted step: forward, backward and AdamW on the whole batch."""
    loss: float
    grad_norm: float
    peak_mb: float
    """Largest resident set of the process during any step: weights, libraries and all."""
    rest_mb: float
    """Resident set with model, adapter and optimizer made, before the first step."""

    @property
    def median_cpu_s(self) -> float:
        return median(self.cpu_s)


def check_parity(measured: Measurement, reference: Measurement) -> None:
    """Raises: EngineError if loss or gradient norm is further from the reference than the type of `measured` allows."""
    for name, tolerance in zip(("loss", "grad_norm"), TOLERANCES[measured.dtype], strict=True):
        gap = relative_gap(measured, reference, name)
        if not gap <= tolerance:
            ours, theirs = getattr(measured, name), getattr(reference, name)
            raise EngineError(
                f"{measured.variant}, {measured.dtype}: {name} of {measured.system} is {ours:.6g}, of {reference.system} "
                f"({reference.dtype}) {theirs:.6g}; they differ by {gap:.1e} where {tolerance:.0e} is allowed, so no time is quoted",
                operation="benchmark",
            )


def relative_gap(measured: Measurement, reference: Measurement, name: str) -> float:
    """Of "loss" or "grad_norm"."""
    wanted: float = getattr(reference, name)
    return float(abs(getattr(measured, name) - wanted) / abs(wanted))


def absolute_table(measurements: Sequence[Measurement], references: dict[str, Measurement]) -> str:
    """One row a measurement. The gaps are those of loss and gradient norm from `references`, float32 by variant."""
    rows: list[list[object]] = []
    for m in measurements:
        spread = f"{min(m.cpu_s):.2f}-{max(m.cpu_s):.2f}"
        speed = [f"{m.median_cpu_s:.2f}", spread, len(m.cpu_s), m.num_tokens / m.median_cpu_s]
        memory = [f"{m.peak_mb:.0f}", f"{m.peak_mb - m.rest_mb:.0f}"]
        gaps = [f"{relative_gap(m, references[m.variant], name):.0e}" for name in ("loss", "grad_norm")]
        sums = [f"{m.loss:.4f} ({gaps[0]})", f"{m.grad_norm:.3f} ({gaps[1]})"]
        rows.append([m.variant, SHORT[m.dtype], m.system, *speed, *memory, *sums])
    header = ["variant", "type", "system", "CPU-s", "least-most", "steps", "tokens/CPU-s", "peak MB", "above rest MB"]
    return markdown_table([*header, "loss (off fp32)", "gradient norm (off fp32)"], rows)


def ratio_table(measurements: Sequence[Measurement]) -> str:
    """How many times the CPU-seconds and the peak memory of ptlab each other system takes; the memory of the type where it gains least."""
    by_key = {(m.variant, m.dtype, m.system): m for m in measurements}
    pairs = list(dict.fromkeys((m.variant, m.system) for m in measurements if m.system != OURS))
    several = len({system for _, system in pairs}) > 1
    rows: list[list[object]] = []
    for variant, system in pairs:
        speed: list[object] = []
        memory = []
        for dtype in SHORT:
            ours, theirs = by_key.get((variant, dtype, OURS)), by_key.get((variant, dtype, system))
            if ours is None or theirs is None:
                speed.append("-")
                continue
            speed.append(f"{theirs.median_cpu_s / ours.median_cpu_s:.2f}x")
            memory.append(theirs.peak_mb / ours.peak_mb)
        rows.append([f"{variant}, {system}" if several else variant, *speed, f"{min(memory):.2f}x" if memory else "-"])
    return markdown_table(["variant", *SHORT.values(), "memory"], rows)
