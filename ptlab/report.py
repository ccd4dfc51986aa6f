"""What a run says on the terminal: one line per step, one table at the end. Pure functions from rows of metrics to text."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Number = float | int | bool | None
_LOSSES = {"nll ": "train/nll", "dpo ": "loss/dpo", "bradley-terry ": "loss/bradley_terry"}
"""Of recipes whose loss falls as they learn; a policy gradient's says nothing."""
_WIDTH = 100
_MAX_SAMPLES = 3


def progress_line(step: int, steps: int, metrics: Mapping[str, Number]) -> str:
    """Reward, accuracy, tokens per second of sampling, and seconds per phase.

    A row of step == steps is the evaluation after the last training step.
    """
    parts = [f"step {step + 1:>{len(str(steps))}}/{steps}" if step < steps else "after the last step"]
    parts += _values(metrics, {"reward ": "reward/mean", "acc ": "train/accuracy", **_LOSSES, "kl ": "kl/policy_reference_nats"})
    if evals := _values(metrics, {"": "eval/accuracy", "greedy ": "eval/accuracy_greedy", "nll ": "eval/nll"}):
        parts.append(f"eval {' '.join(evals)}")
    if metrics.get("batch/skipped"):
        parts.append("no update: every group agreed")
    elif (skipped := metrics.get("groups/skipped")) is not None and (total := metrics.get("groups/total")) is not None:
        parts.append(f"groups skipped {skipped:.0f}/{total:.0f}")
    if (speed := metrics.get("time/tokens_per_second")) is not None:
        parts.append(f"{speed:,.0f} tok/s")
    phases = [f"{phase} {seconds:.1f}" for phase, seconds in phase_seconds(metrics).items()]
    if phases:
        parts.append(f"{' + '.join(phases)} s")
    return " | ".join(parts)


def _values(metrics: Mapping[str, Number], keys: Mapping[str, str]) -> list[str]:
    return [f"{label}{value:.3f}" for label, key in keys.items() if (value := metrics.get(key)) is not None]


def phase_seconds(metrics: Mapping[str, Number]) -> dict[str, float]:
    """Seconds of each phase of a step (`time/<phase>_s`), in the order of the row. They add up to time/step_s; time/rollout_s is no phase:
    it may have begun in an earlier step."""
    return {
        key.removeprefix("time/").removesuffix("_s"): float(value)
        for key, value in metrics.items()
        if key.startswith("time/") and key.endswith("_s") and key not in ("time/step_s", "time/rollout_s") and value is not None
    }


def final_report(directory: Path, rows: Sequence[Mapping[str, Any]], transcripts: Sequence[Mapping[str, Any]], elapsed_s: float) -> str:
    """First and last value of the metrics a user watches, then the same prompts answered before and after."""
    lines = ["", f"{directory}: {sum('optim/learning_rate' in row for row in rows)} training steps, {elapsed_s:.0f} s in this process", ""]
    lines += _metric_table(rows)
    lines += _before_and_after(transcripts)
    lines += [f"{directory}/metrics.jsonl  transcripts.jsonl  curves.png  config.yaml  run.json"]
    return "\n".join(lines)


def _metric_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = ("eval/accuracy", "eval/accuracy_greedy", "eval/nll", "reward/mean", "train/accuracy", *_LOSSES.values(), "answer/tokens_mean")
    table = []
    for key in keys:
        seen = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if seen:
            (first_step, first), (last_step, last) = seen[0], seen[-1]
            table.append(f"  {key:<22} {first:>9.3f} {last:>9.3f}    steps {first_step} and {last_step}")
    return [f"  {'':<22} {'before':>9} {'after':>9}", *table, ""] if table else []


def _before_and_after(transcripts: Sequence[Mapping[str, Any]]) -> list[str]:
    first: dict[str, Mapping[str, Any]] = {}
    last: dict[str, Mapping[str, Any]] = {}
    for row in transcripts:
        if row.get("split") == "eval":
            first.setdefault(row["prompt"], row)
            last[row["prompt"]] = row
    pairs = [(first[prompt], last[prompt]) for prompt in first if first[prompt]["step"] < last[prompt]["step"]]
    lines = []
    for before, after in pairs[:_MAX_SAMPLES]:
        lines.append(_short(before["prompt"], 200, indent="  "))
        lines += [
            _short(f"{when} (step {row['step']}, reward {row['reward']:g}): {row['response']}", 300, indent="    ")
            for when, row in (("before", before), ("after", after))
        ]
        lines.append("")
    return lines


def _short(text: str, max_chars: int, *, indent: str) -> str:
    """One paragraph on lines of at most 100 characters, control characters shown as escapes, cut after max_chars."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))
    shown = shown if len(shown) <= max_chars else shown[: max_chars - 1] + "…"
    return textwrap.fill(shown, _WIDTH, initial_indent=indent, subsequent_indent=indent + "  ")
