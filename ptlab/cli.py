"""`ptlab train | eval | serve | keys | top | doctor`. scripts/train.py is the first of them.

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
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec

from ptlab.config import load_config
from ptlab.errors import ConfigError, PtlabError

EXIT_FAILED, EXIT_USER, EXIT_INTERRUPTED = 1, 2, 130


COMMANDS = {
    "train": "run a recipe from a config file",
    "eval": "measure a model or checkpoint on a config's held-out problems",
    "serve": "serve the Tinker API to the official SDK",
    "keys": "API keys of a server",
    "top": "sessions, queues and speed of a running server",
    "doctor": "print versions, hardware and the sampler, and say what is missing, slow or at odds",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="ptlab", description="Tinker on your own machine.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    parsers = {name: commands.add_parser(name, help=text, description=text) for name, text in COMMANDS.items()}
    chosen = given[0] if given and given[0] in COMMANDS else ""
    return guarded(lambda: _command(chosen, parsers)(parser, given))


def _command(name: str, parsers: Mapping[str, argparse.ArgumentParser]) -> Callable[[argparse.ArgumentParser, list[str]], int]:
    """Parse and run one command. What a command needs is imported for that command only: some of it takes seconds."""
    run: Callable[[argparse.Namespace], int]
    match name:
        case "train":
            add_train_arguments(parsers[name])
            run = train
        case "serve":
            _need_server_extra()
            from ptlab import serve

            serve.add_serve_arguments(parsers[name])
            run = serve.run
        case "eval":
            from ptlab import evaluate

            evaluate.add_arguments(parsers[name])
            run = evaluate.main
        case "keys":
            from ptlab import keys

            keys.add_arguments(parsers[name])
            run = keys.main
        case "top":
            from ptlab import top

            top.add_arguments(parsers[name])
            run = top.main
        case _:
            return lambda parser, given: doctor(parser.parse_args(given))
    return lambda parser, given: run(parser.parse_args(given))


def _need_server_extra() -> None:
    missing = [name for name in ("fastapi", "uvicorn", "google.protobuf", "zstandard", "prometheus_client") if not _found(name)]
    if missing:
        raise ConfigError(f"ptlab serve needs {', '.join(missing)}: pip install 'ptlab[server]' (in a checkout: make setup)")


def _found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ptlab train` and scripts/train.py."""
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML config, e.g. configs/quickstart.yaml")
    example = "override one key, e.g. --set optim.learning_rate=4e-5; may be repeated"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=example)
    parser.add_argument("--name", help="name of the run directory (default: the config's)")
    url = "train on this server (ptlab serve, or hosted Tinker; key: TINKER_API_KEY) instead of engines in this process"
    parser.add_argument("--base-url", metavar="URL", help=url)
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue the run of this name from its last checkpoint")
    existing.add_argument("--overwrite", action="store_true", help="delete an earlier run of this name, its checkpoints too")


def train(args: argparse.Namespace) -> int:
    """Load the config, open the run directory and the engines, run the recipe."""
    overrides = [*args.set, *([f"name={json.dumps(args.name)}"] if args.name is not None else [])]
    config = load_config(args.config, overrides)
    for warning in config.warnings():
        print(f"warning: {warning}", file=sys.stderr)
    from ptlab.runlog import RunLog  # what is imported from here on takes seconds; a mistake in the config is told before

    with RunLog.open(config, resume=args.resume, overwrite=args.overwrite) as log:
        from ptlab import local
        from ptlab.recipes import table

        with local.open_remote(config, args.base_url) if args.base_url else local.open_service(config) as service:
            result = asyncio.run(table.run(config, service.client, log, side_metrics=service.metrics.take))
    if result.status == "interrupted":
        print(f"stopped after {result.step} steps, checkpoint {result.checkpoint}; continue with --resume", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def doctor(args: argparse.Namespace) -> int:
    """Versions, hardware, sampler, and what does not fit. Exit code 1 if the quickstart cannot run."""
    del args
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


if __name__ == "__main__":
    sys.exit(main())
