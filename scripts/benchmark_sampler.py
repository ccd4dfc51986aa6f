#!/usr/bin/env python3
"""vLLM against the torch sampler, on the CPU: `python scripts/benchmark_sampler.py [--models ptlab/quickstart small] [--out benchmarks]`.

Bursts of requests with and without an adapter, in turns, float32, one thread; writes sampler.md and sampler.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two threads on busy cores spin at their barriers

from ptlab.benchmarks.sampler import Load, compare_on_models, sampler_table
from ptlab.benchmarks.tables import write_jsonl
from ptlab.cli import guarded
from ptlab.provenance import provenance


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["ptlab/quickstart", "small"], help="names (small, medium) or directories")
    parser.add_argument("--requests", nargs="+", type=int, default=list(Load().request_counts), help="sizes of the bursts")
    parser.add_argument("--repeats", type=int, default=3, help="bursts of each kind; medians are reported")
    parser.add_argument("--ragged", action="store_true", help="answers of 16 to 112 tokens instead of 64")
    parser.add_argument("--rank", type=int, default=32, help="of the adapter")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="directory for the results")
    args = parser.parse_args()

    def run() -> int:
        with tempfile.TemporaryDirectory() as root:
            load = Load(request_counts=args.requests, repeats=args.repeats, ragged=args.ragged)
            timings = asyncio.run(compare_on_models(args.models, load, args.rank, Path(root), print))
        write_jsonl(args.out / "sampler.jsonl", provenance(), [asdict(timing) for timing in timings])
        (args.out / "sampler.md").write_text(table := sampler_table(timings, "vLLM", "torch") + "\n", encoding="utf-8")
        print(table)
        return 0

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())
