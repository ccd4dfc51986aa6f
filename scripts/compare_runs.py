#!/usr/bin/env python3
"""One figure from several runs: `python scripts/compare_runs.py runs/a runs/b --out figure.png [--keys eval/accuracy ...]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ptlab.cli import guarded
from ptlab.curves import draw_comparison
from ptlab.runlog import read_metrics


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories, each a line named by its folder")
    parser.add_argument("--out", required=True, type=Path, help="PNG file to write")
    parser.add_argument("--keys", nargs="+", default=["eval/accuracy", "eval/accuracy_greedy"], help="metrics, one panel each")
    args = parser.parse_args()

    def draw() -> int:
        draw_comparison({run.name: read_metrics(run) for run in args.runs}, args.keys, args.out)
        return 0

    return guarded(draw)


if __name__ == "__main__":
    sys.exit(main())
