#!/usr/bin/env python3
"""Where the time of a weight sync goes: `python scripts/benchmark_sync.py [--samplers vllm torch] [--ranks 8 32] [--out benchmarks]`.

Through the real backend, versions on the RAM disk; writes sync.md and sync.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two threads on busy cores spin at their barriers

from ptlab.benchmarks.models import model_directory
from ptlab.benchmarks.sync import SyncTiming, as_rows, sync_table, time_syncs
from ptlab.benchmarks.tables import write_jsonl
from ptlab.cli import guarded
from ptlab.config import EnginesConfig
from ptlab.local import open_engines
from ptlab.provenance import provenance


async def measure(args: argparse.Namespace, root: Path) -> list[SyncTiming]:
    timings: list[SyncTiming] = []
    for path, name in ((model_directory(name, root), name) for name in args.models):
        for kind in args.samplers:
            config = EnginesConfig.model_validate({"sampler": {"kind": kind}})
            engines = partial(open_engines, path=str(path), config=config, max_lora_rank=max(args.ranks))
            timings += await time_syncs(name, path, engines, kind, args.ranks, args.repeats, root / kind / path.name, print)
    return timings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["ptlab/quickstart", "small", "medium"], help="names or directories")
    parser.add_argument("--samplers", nargs="+", choices=["vllm", "torch"], default=["vllm", "torch"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--repeats", type=int, default=7, help="syncs of each kind; medians are reported")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="directory for the results")
    args = parser.parse_args()

    def run() -> int:
        with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as root:
            timings = asyncio.run(measure(args, Path(root)))
        write_jsonl(args.out / "sync.jsonl", provenance(), as_rows(timings))
        (args.out / "sync.md").write_text(table := sync_table(timings) + "\n", encoding="utf-8")
        print(table)
        return 0

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())
