"""Make the quickstart's base model, once more or elsewhere: `python scripts/make_quickstart_model.py --seed 1 --out /tmp/model`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from ptlab.quickstart import QuickstartRecipe, ensure_quickstart_model, make_quickstart_model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="pretraining seed (default 0)")
    parser.add_argument("--out", type=Path, default=None, help="new directory to write to (default: the cache, made only if missing)")
    arguments = parser.parse_args()

    wall, cpu = time.perf_counter(), time.process_time()
    if arguments.out is None:
        directory = ensure_quickstart_model(arguments.seed)
    elif arguments.out.exists():
        print(f"--out {arguments.out} exists already; name a new directory or remove it", file=sys.stderr)
        return 2
    else:
        directory = arguments.out
        make_quickstart_model(directory, arguments.seed, QuickstartRecipe(), print)
    print(f"{directory}  ({time.perf_counter() - wall:.1f} s wall, {time.process_time() - cpu:.1f} CPU-s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
