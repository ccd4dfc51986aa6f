#!/usr/bin/env python3
"""Losses on equal terms: `python scripts/benchmark_losses.py --quick` (minutes, two CPU cores) or `--full` (GSM8K, one GPU, days).

Every variant of benchmarks/loss_variants.py, every seed, through the RL recipe; writes loss-benchmark.jsonl, .md and .png into --out. The
same command goes on after an interruption: finished runs in --runs are taken as they are. docs/loss-benchmark.md tells what came out.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two threads on busy cores spin at their barriers

from benchmarks.loss_figure import draw_losses
from benchmarks.loss_variants import FULL, QUICK, measure
from ptlab.benchmarks.loss_results import read_results, report, write_results
from ptlab.cli import guarded
from ptlab.provenance import provenance


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--quick", action="store_const", dest="plan", const=QUICK, help="the quickstart task")
    what.add_argument("--full", action="store_const", dest="plan", const=FULL, help="GSM8K")
    what.add_argument("--again", type=Path, metavar="FILE", help="run nothing: tables and picture of a loss-benchmark.jsonl")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder for the run directories, below <plan>-losses")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for the results")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of all runs alike, e.g. optim.learning_rate=3e-3")
    args = parser.parse_args()

    def run() -> int:
        began = time.perf_counter()
        if args.again:
            about, results = read_results(args.again)
        else:
            results = measure(args.plan, args.runs / f"{args.plan.name}-losses", args.set, lambda line: print(line, flush=True))
            spent = {"wall_s": round(time.perf_counter() - began), "cpu_s": round(sum(os.times()[:4]))}  # of this call, with its processes
            about = provenance() | {"plan": args.plan.name, "set": args.set} | spent
            write_results(args.out / "loss-benchmark.jsonl", about, results)
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "loss-benchmark.md").write_text(report(results) + "\n", encoding="utf-8")
        draw_losses(results, args.out / "loss-benchmark.png")
        print(f"{report(results)}\n\n{args.out}/loss-benchmark.md, .png: {len(results)} runs, {time.perf_counter() - began:.0f} s")
        return 0

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())
