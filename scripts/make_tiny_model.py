"""Make one of ptlab's tiny base models, once more or elsewhere:

python scripts/make_tiny_model.py ptlab/quickstart --seed 1 --out /tmp/model
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ptlab.tiny_models.maker import ensure_model, make_model
from ptlab.tiny_models.table import TINY_MODELS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="ptlab/quickstart", choices=sorted(TINY_MODELS))
    parser.add_argument("--seed", type=int, default=0, help="pretraining seed (default 0)")
    parser.add_argument("--out", type=Path, default=None, help="new directory to write to (default: the cache, made only if missing)")
    arguments = parser.parse_args()

    wall, cpu = time.perf_counter(), time.process_time()
    model = TINY_MODELS[arguments.model]()
    if arguments.out is None:
        directory = ensure_model(model, arguments.seed)
    elif arguments.out.exists():
        print(f"--out {arguments.out} exists already; name a new directory or remove it", file=sys.stderr)
        return 2
    else:
        directory = arguments.out
        make_model(model, directory, arguments.seed, print)
    print(f"{directory}  ({time.perf_counter() - wall:.1f} s wall, {time.process_time() - cpu:.1f} CPU-s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
