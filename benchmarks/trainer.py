#!/usr/bin/env python3
"""ptlab's trainer against TRL's GRPOTrainer, on the CPU: `python benchmarks/trainer.py --against trl` (make bench-trainer).

Both train on the same sequences with the same model, adapter, loss and AdamW numbers (ptlab/benchmarks/work_items.py), each in a
process and environment of its own, one thread, steps in turns. A step is forward, backward and AdamW on the whole batch; time is CPU
time, median of --repeats after one step that is not counted; that first step's loss and gradient norm must agree or no time is quoted.

TRL runs in its fastest setting: no activation checkpointing, the micro-batch that was fastest here (--tune tries again), and without
the second forward pass by which it gets old log-probabilities (benchmarks/trl_worker.py; --second-forward measures that one too).
The last lines are a table of ratios, TRL / ptlab: above 1, ptlab is faster or smaller.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two threads on busy cores spin at their barriers

from benchmarks.worker_process import WorkerProcess
from ptlab.benchmarks.against import OURS, SHORT, Measurement, absolute_table, check_parity, ratio_table
from ptlab.benchmarks.tables import markdown_table, write_jsonl
from ptlab.benchmarks.work_items import VARIANTS, WorkItem, read_sequences, write_work_item
from ptlab.cli import guarded
from ptlab.errors import ConfigError, EngineError
from ptlab.provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
COMPARED = ("small", "unshared", "vocab", "medium", "long", "vocab150k")
FEWER_STEPS = {"long": 3, "vocab150k": 2}
"""Where a step of TRL's takes a minute."""
MICRO_BATCHES = {"vocab150k": (1, 2, 4, 8), "long": (1, 2)}
"""What --tune tries; for the others 4, 8, 16 and 32 sequences."""
FASTEST_MICRO_BATCH = {"small": 8, "unshared": 8, "vocab": 4, "medium": 8, "long": 1, "vocab150k": 4, "tiny": 4}
"""TRL's, found by --tune; differences between 4 and 16 are of the order of the noise, memory is not."""
MEMORY_VARIANT = "vocab150k"
SECOND_FORWARD = "TRL, second forward"


class Bench:
    """Starts workers for one work item in one type, and asks them in turns."""

    def __init__(self, variant: str, item: WorkItem, dtype: str, trl_python: Path) -> None:
        self.variant, self.item, self.dtype, self.trl_python = variant, item, dtype, trl_python
        self.num_tokens = read_sequences(item.sequences).num_tokens

    def start(self, script: str, *options: object, python: Path | str = sys.executable) -> WorkerProcess:
        files = (self.item.model, self.item.adapter, self.item.sequences)
        return WorkerProcess([str(part) for part in (python, ROOT / "benchmarks" / script, *files, "--dtype", self.dtype, *options)])

    def ours(self) -> WorkerProcess:
        return self.start("ptlab_worker.py")

    def trl(self, micro_batch: int, *, old_logprobs: str = "given") -> WorkerProcess:
        options = ("--micro-batch", micro_batch, "--old-logprobs", old_logprobs)
        return self.start("trl_worker.py", *options, python=self.trl_python)

    def measurement(self, system: str, worker: WorkerProcess, steps: Sequence[dict[str, Any]]) -> Measurement:
        """From all steps of a worker, of which the first is not counted."""
        return Measurement(
            variant=self.variant,
            dtype=self.dtype,
            system=system,
            num_tokens=self.num_tokens,
            cpu_s=[step["cpu_s"] for step in steps[1:]],
            loss=steps[0]["loss"],
            grad_norm=steps[0]["grad_norm"],
            peak_mb=max(step["peak_mb"] for step in steps),
            rest_mb=worker.about["rest_mb"],
        )

    def compare(self, workers: dict[str, WorkerProcess], repeats: int, reference: Measurement | None) -> list[Measurement]:
        """Raises: EngineError before the second step if the systems do not compute the same."""
        steps = {system: [worker.ask("step")] for system, worker in workers.items()}
        first = [self.measurement(system, workers[system], taken) for system, taken in steps.items()]
        for measured in first:
            check_parity(measured, reference or first[0])
        for _ in range(repeats):
            for system, worker in workers.items():
                steps[system].append(worker.ask("step"))
        return [self.measurement(system, workers[system], taken) for system, taken in steps.items()]

    def memory_note(self, ours: Measurement) -> str:
        """A step of ptlab's beside what the model's own forward pass keeps for the same tokens."""
        with self.start("forward_worker.py") as worker:
            kept = worker.ask("step")["kept_mb"]
        step, logits = ours.peak_mb - ours.rest_mb, 4e-6 * self.num_tokens * VARIANTS[self.variant].shape.vocab_size
        return (
            f"{self.variant}, {SHORT[self.dtype]}: a step of {OURS} takes {step:.0f} MB above the loaded model, the activations of the "
            f"model's own forward pass {kept:.0f} MB: {step / kept:.2f}x (tokens x vocabulary in float32 would be {logits:.0f} MB)"
        )

    def tune(self, sizes: Sequence[int], repeats: int) -> int:
        """TRL's fastest micro-batch, its workers in turns."""
        with ExitStack() as stack:
            workers = {size: stack.enter_context(self.trl(size)) for size in sizes}
            steps = {size: [worker.ask("step")] for size, worker in workers.items()}
            for _ in range(repeats):
                for size, worker in workers.items():
                    steps[size].append(worker.ask("step"))
        cpu_s = {size: median(step["cpu_s"] for step in taken[1:]) for size, taken in steps.items()}
        rows = [[size, f"{cpu_s[size]:.2f}", f"{max(step['peak_mb'] for step in taken):.0f}"] for size, taken in steps.items()]
        print(f"TRL, {self.variant}, {SHORT[self.dtype]}\n" + markdown_table(["micro-batch", "CPU-s", "peak MB"], rows), flush=True)
        return min(cpu_s, key=lambda size: cpu_s[size])


def measure(args: argparse.Namespace, root: Path) -> tuple[list[Measurement], list[str], list[str]]:
    """All measurements, for what was refused the reason, and how the memory of a step compares with a plain forward pass."""
    measurements: list[Measurement] = []
    refused: list[str] = []
    notes: list[str] = []
    for variant in args.variants:
        item = write_work_item(VARIANTS[variant], root)
        reference: Measurement | None = None
        for dtype in args.dtypes:
            bench = Bench(variant, item, dtype, args.trl_python)
            repeats = min(args.repeats, FEWER_STEPS.get(variant, args.repeats))
            size = args.micro_batch or FASTEST_MICRO_BATCH[variant]
            if args.tune:
                size = bench.tune(MICRO_BATCHES.get(variant, (4, 8, 16, 32)), repeats)
            try:
                with ExitStack() as stack:
                    workers = {OURS: stack.enter_context(bench.ours())}
                    workers |= {"TRL": stack.enter_context(bench.trl(size))}
                    if args.second_forward:
                        workers |= {SECOND_FORWARD: stack.enter_context(bench.trl(size, old_logprobs="recomputed"))}
                    taken = bench.compare(workers, repeats, reference)
            except EngineError as err:
                refused.append(str(err))
                print(f"refused: {err}", file=sys.stderr, flush=True)
                continue
            reference = reference or taken[0]
            measurements += taken
            if variant == MEMORY_VARIANT:
                notes.append(bench.memory_note(taken[0]))
            ratio = taken[1].median_cpu_s / taken[0].median_cpu_s
            print(f"{variant}, {SHORT[dtype]}: {ratio:.2f}x ({', '.join(f'{m.system} {m.median_cpu_s:.2f} s' for m in taken)})", flush=True)
    return measurements, refused, notes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", choices=["trl"], default="trl")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(COMPARED))
    parser.add_argument("--dtypes", nargs="+", choices=list(SHORT), default=list(SHORT), help="float32 first: bfloat16 is held against it")
    parser.add_argument("--repeats", type=int, default=5, help=f"counted steps; fewer where a step takes a minute: {FEWER_STEPS}")
    parser.add_argument("--quick", action="store_true", help="one step on a tiny model: does it run?")
    parser.add_argument("--second-forward", action="store_true", help="also TRL as it is where a sampler's log-probabilities exist")
    parser.add_argument("--micro-batch", type=int, help=f"sequences in one forward pass of TRL; default {FASTEST_MICRO_BATCH}")
    parser.add_argument("--tune", action="store_true", help="try TRL's micro-batches first and take the fastest")
    parser.add_argument("--trl-python", type=Path, default=ROOT / ".venv-trl" / "bin" / "python", help="of the environment with TRL")
    parser.add_argument("--out", type=Path, help="JSONL file for the results")
    args = parser.parse_args()
    if args.quick:
        args.variants, args.repeats = ["tiny"], 1

    def run() -> int:
        if not args.trl_python.exists():
            raise ConfigError(f"{args.trl_python} does not exist; make it: scripts/setup_trl_venv.sh (or make bench-trainer)")
        about = provenance()
        print(f"{about['hardware']['cpu']}, one thread, torch {about['versions']['torch']}, commit {about['git']}", flush=True)
        with tempfile.TemporaryDirectory() as root:
            measurements, refused, notes = measure(args, Path(root))
        if args.out is not None:
            write_jsonl(args.out, about, [asdict(m) for m in measurements])
        references = {m.variant: m for m in reversed(measurements) if m.system == OURS and m.dtype == args.dtypes[0]}
        print("\n" + absolute_table(measurements, references))
        print("\npeak MB: largest resident set of the process during any step; above rest: less that of the loaded model before the first")
        for line in notes:
            print(line)
        for reason in refused:
            print(f"refused: {reason}")
        print("\n" + ratio_table(measurements))
        return 1 if refused else 0

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())
