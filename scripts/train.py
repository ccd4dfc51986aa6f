#!/usr/bin/env python3
"""Run a recipe: `python scripts/train.py --config configs/quickstart.yaml [--set key=value ...] [--name x] [--resume | --overwrite]`.

The same call as `ptlab train`; works from a checkout that was not installed, too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ptlab.cli import add_train_arguments, guarded, train


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_train_arguments(parser)
    args = parser.parse_args()
    return guarded(lambda: train(args))


if __name__ == "__main__":
    sys.exit(main())
