#!/usr/bin/env python3
"""How the trainer's cost grows: `python benchmarks/scaling.py [--sweeps samples prompt adapters vocabulary] [--dtype float32]`.

Prints a table a sweep and, last, one line each that says whether the cost is linear in unique tokens and flat in adapters.
About five CPU-minutes. Writes scaling.jsonl below --out.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two threads on busy cores spin at their barriers

from ptlab.benchmarks.scaling import SWEEPS, as_rows, run_sweeps, sweep_table, verdicts
from ptlab.benchmarks.tables import write_jsonl
from ptlab.cli import guarded
from ptlab.provenance import provenance


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=5, help="passes at each point; medians are reported")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="directory for the results")
    args = parser.parse_args()

    def run() -> int:
        with tempfile.TemporaryDirectory() as root:
            costs = run_sweeps(args.sweeps, Path(root), args.dtype, args.repeats, lambda line: print(line, file=sys.stderr, flush=True))
        write_jsonl(args.out / "scaling.jsonl", provenance() | {"dtype": args.dtype}, as_rows(costs))
        for sweep in args.sweeps:
            print(sweep_table([c for c in costs if c.sweep == sweep]), end="\n\n")
        print("\n".join(verdicts(costs)))
        return 0

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())
