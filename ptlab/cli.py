"""`ptlab train | doctor`. scripts/train.py is the first of them.

Exit codes: 0 done; 2 the user's mistake, one sentence on stderr; 130 Ctrl-C, after a valid checkpoint; 1 anything of ptlab's own that
failed (set PTLAB_TRACEBACK=1 to see where).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from ptlab.config import config_warnings, load_config
from ptlab.errors import PtlabError

EXIT_FAILED, EXIT_USER, EXIT_INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    parser = argparse.ArgumentParser(prog="ptlab", description="Tinker on your own machine.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="train|doctor")
    add_train_arguments(commands.add_parser("train", help="run a recipe from a config file"))
    commands.add_parser("doctor", help="print versions, hardware and the sampler, and say what is missing, slow or at odds")
    args = parser.parse_args(argv)
    return guarded(lambda: train(args) if args.command == "train" else doctor())


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ptlab train` and scripts/train.py."""
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML config, e.g. configs/quickstart.yaml")
    example = "override one key, e.g. --set optim.learning_rate=4e-5; may be repeated"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=example)
    parser.add_argument("--name", help="name of the run directory (default: the config's)")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue the run of this name from its last checkpoint")
    existing.add_argument("--overwrite", action="store_true", help="delete an earlier run of this name, its checkpoints too")


def train(args: argparse.Namespace) -> int:
    """Load the config, open the run directory and the engines, run the recipe."""
    overrides = [*args.set, *([f"name={json.dumps(args.name)}"] if args.name is not None else [])]
    config = load_config(args.config, overrides)
    for warning in config_warnings(config):
        print(f"warning: {warning}", file=sys.stderr)
    from ptlab.runlog import RunLog  # what is imported from here on takes seconds; a mistake in the config is told before

    with RunLog.open(config, resume=args.resume, overwrite=args.overwrite) as log:
        from ptlab import local
        from ptlab.recipes import rl

        with local.open_service(config) as service:
            result = asyncio.run(rl.run(config, service.client, log, side_metrics=service.metrics.take))
    if result.status == "interrupted":
        print(f"stopped after {result.step} steps, checkpoint {result.checkpoint}; continue with --resume", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def doctor() -> int:
    """Versions, hardware, sampler, and what does not fit. Exit code 1 if the quickstart cannot run."""
    from ptlab import doctor as checkup

    return checkup.main()


def guarded(command: Callable[[], int]) -> int:
    """Run a command; turn what a user can cause into a sentence and an exit code."""
    try:
        return command()
    except KeyboardInterrupt:
        print("interrupted before a checkpoint could be written; --resume continues from the last one", file=sys.stderr)
        return EXIT_INTERRUPTED
    except PtlabError as err:
        if os.environ.get("PTLAB_TRACEBACK"):
            traceback.print_exc()
        print(f"error: {err.message}", file=sys.stderr)
        return EXIT_USER if err.category == "user" else EXIT_FAILED
