#!/usr/bin/env python3
"""Print the cost model's tables (docs/performance.md): `python benchmarks/cost_model.py`. Seconds; measures nothing."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ptlab.benchmarks.cost_tables import all_tables


def main() -> int:
    print("\n\n".join(f"## {title}\n\n{table}" for title, table in all_tables().items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
