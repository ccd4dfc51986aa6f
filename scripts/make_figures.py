#!/usr/bin/env python3
"""Draw the pictures of docs/visual-summary.md: `python scripts/make_figures.py [pictures ...]`, from docs/data into docs/images.

The data are made again by `--keep runs/x runs/y` (metrics of finished runs) and `--sample` (one group of attempts of the base model).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ptlab.cli import guarded
from ptlab.config import load_config
from ptlab.figures import records, table

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="*", help="e.g. clip_shapes.png (default: all)")
    parser.add_argument("--data", type=Path, default=ROOT / "docs" / "data", help="folder of runs.jsonl and group.json")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images", help="folder for the PNG files")
    parser.add_argument("--keep", nargs="+", type=Path, metavar="RUN", help="first take over the metrics of these run directories")
    parser.add_argument("--sample", type=int, metavar="INDEX", help="first sample this group of the quickstart's first step")
    args = parser.parse_args()

    def draw() -> int:
        if args.keep:
            records.keep_runs(args.keep, args.data / table.RUNS_FILE)
        if args.sample is not None:
            sample_group(args.data / table.GROUP_FILE, args.sample)
        for path in table.draw_all(args.data, args.out, args.pictures):
            print(path)
        return 0

    return guarded(draw)


def sample_group(path: Path, index: int) -> None:
    """Ask the untrained model, on the torch sampler."""
    from ptlab import local

    with tempfile.TemporaryDirectory() as run_dir:
        config = load_config(ROOT / "configs" / "quickstart.yaml", ["engines.sampler.kind=torch", f"run_dir={run_dir}"])
        with local.open_service(config) as service:
            records.write_group(asyncio.run(records.record_group(config, service.client, index)), path)


if __name__ == "__main__":
    sys.exit(main())
