#!/usr/bin/env python3
"""Sample rollouts into a file: `python scripts/collect.py --config configs/quickstart.yaml --rollouts 4000 --out rollouts.jsonl`.

Train on them with recipe "offline": configs/offline_dro.yaml. A collection that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ptlab.cli import guarded
from ptlab.config import RlConfig, load_config
from ptlab.errors import ConfigError


def run(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.set)
    if not isinstance(config, RlConfig):
        raise ConfigError(f"{args.config}: recipe is {config.recipe!r}; rollouts are collected with a config of recipe 'rl'")
    from ptlab.evaluate import open_sampling_service  # seconds; a mistake in the config is told before
    from ptlab.recipes.collect import collect

    with open_sampling_service(config, args.weights, args.base_url) as service:
        work = collect(config, service.client, args.out, num_rollouts=args.rollouts, weights=args.weights, overwrite=args.overwrite)
        asyncio.run(work)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="config of recipe rl: model, env, rollout")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key; may be repeated")
    parser.add_argument("--rollouts", type=int, default=4000, help="attempts, rounded up to whole groups")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=".jsonl or .parquet")
    parser.add_argument("--weights", metavar="PATH", help="sample with this adapter (tinker:// path or directory); default: base model")
    parser.add_argument("--base-url", metavar="URL", help="sample on this server instead of engines in this process")
    parser.add_argument("--overwrite", action="store_true", help="delete an earlier file of this name")
    args = parser.parse_args()
    return guarded(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
