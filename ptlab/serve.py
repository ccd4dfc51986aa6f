"""`ptlab serve`: one server for the official Tinker SDK. The composition root of the HTTP face, as local.py is of the in-process one."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import resource
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from ptlab import local
from ptlab.config import EnginesConfig, PeftTrainerConfig, TorchSamplerConfig, VllmSamplerConfig
from ptlab.engines.protocols import Engines
from ptlab.errors import ConfigError, InvalidRequestError
from ptlab.server.assembly import assembled
from ptlab.server.listen import address, bind, listen
from ptlab.server.settings import ServeSettings

EXAMPLE_KEY = "tml-local"
"""The SDK wants a key that begins so, also where none is looked at."""
OPEN_FILES = 65536
SWITCH_INTERVAL_S = 0.0005
"""How long a thread of an engine may keep Python from the event loop that answers clients. At Python's own 5 ms the scheduler of vLLM in
the same process delays every request by that much, and a batch of requests fills slowly (docs/LOG.md)."""
OWN_OPTIONS = ("host", "port", "data_dir", "public_url", "seed", "strict_losses", "trace")


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ptlab serve`."""
    defaults = ServeSettings(data_dir=Path())
    model = "base model to serve: a hub id, or ID=DIRECTORY for weights that lie there (clients use ID); may be repeated"
    parser.add_argument("--model", action="append", required=True, metavar="ID[=DIRECTORY]", help=model)
    parser.add_argument("--host", default=defaults.host, help="address to listen on (default: %(default)s); any other needs API keys")
    parser.add_argument("--port", type=int, default=defaults.port, help="port (default: %(default)s; 0 = any free one)")
    data_dir = "where checkpoints, runs, requests and keys lie (default: $PTLAB_DATA_DIR or ~/.local/share/ptlab)"
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help=data_dir)
    parser.add_argument("--public-url", metavar="URL", help="how clients reach this server, where a proxy stands before it")
    parser.add_argument("--sampler", choices=["vllm", "torch"], help="who draws answers (default: vllm if it is installed)")
    parser.add_argument("--max-lora-rank", type=int, default=local.DEFAULT_MAX_LORA_RANK, metavar="N", help="default: %(default)s")
    parser.add_argument("--max-loras", type=int, metavar="N", help="adapter versions in one batch of vLLM (default: 4)")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="compute type (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="draws and first adapter weights for which clients give no seed follow from this one")
    strict = "refuse losses of the hosted service whose formula is not public (stable_reinforce) instead of using ptlab's own"
    parser.add_argument("--strict-losses", action="store_true", help=strict)
    parser.add_argument("--trace", type=Path, metavar="FILE", help="append one JSON line per HTTP request")
    limit = "another limit or time of ServeSettings, e.g. --set max_datums=256; may be repeated"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=limit)


def run(args: argparse.Namespace) -> int:
    """`ptlab serve` with parsed arguments; returns the exit code. Raises: ConfigError."""
    settings = _settings(args)
    models = dict(_model(text) for text in args.model)
    if len(models) < len(args.model):
        raise ConfigError(f"--model names a model twice: {', '.join(args.model)}")
    return serve(settings, models, _engines(args), max_lora_rank=args.max_lora_rank)


def serve(
    settings: ServeSettings,
    models: Mapping[str, str | None],
    engines: EnginesConfig,
    *,
    max_lora_rank: int = local.DEFAULT_MAX_LORA_RANK,
    unembed: Literal["auto", "require"] = "auto",
) -> int:
    """Serve until SIGTERM or Ctrl-C; returns 0 once models are parked on the disk.

    Args:
        models: name that clients use -> directory of the weights; None = the name is a hub id, or one of ptlab's tiny models.
        max_lora_rank: largest rank the sampler serves.
    Raises: ConfigError if the address is taken or needs keys, a model cannot be loaded, or another server uses the data directory.
    """
    _allow_many_connections()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    paths = {name: path for name, path in models.items() if path is not None}
    first = next(iter(models))

    def open_engines(name: str) -> Engines:
        if name not in models:
            raise InvalidRequestError(f"{name} is not served here; this server has {', '.join(models)}")
        return local.open_engines(name, local.resolve_model(name, paths), engines, max_lora_rank, own_process=name != first)

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        listening = False

        def on_signal() -> None:
            if stop.is_set() or not listening:
                task.cancel()  # asked twice, or while models are being opened
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        with bind(settings.host, settings.port) as bound:
            keys = not _is_loopback(settings.host)
            async with assembled(
                settings, open_engines, list(models), require_keys=keys, unembed=unembed, max_lora_rank=max_lora_rank
            ) as app:
                listening, has_keys = True, await app.state.context.access.has_keys()
                await listen(app, bound, stop, lambda: _greet(models, bound, has_keys))
                print("stopping: models go to the disk", file=sys.stderr, flush=True)

    try:
        asyncio.run(main())
    except asyncio.CancelledError:
        print("stopped at once; what was in flight is done again at the next start", file=sys.stderr)
    return 0


def _greet(models: Mapping[str, str | None], bound: socket.socket, keys: bool) -> None:
    print(f"serving {', '.join(models)}; in the environment of your script:", flush=True)
    print(f"  export TINKER_BASE_URL={address(bound)}", flush=True)
    hint = "<a key made with `ptlab keys create NAME`>" if keys else f"{EXAMPLE_KEY}    # any that begins with tml-: no keys were created"
    print(f"  export TINKER_API_KEY={hint}", flush=True)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name: where it points to may change


def _allow_many_connections() -> None:
    """Every waiting result holds a connection, and the usual 1024 files are not enough for one client with 2000 samples in flight."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _settings(args: argparse.Namespace) -> ServeSettings:
    given: dict[str, Any] = {}
    for text in args.set:
        key, equals, value = text.partition("=")
        known = sorted(set(ServeSettings.model_fields) - set(OWN_OPTIONS))
        if not equals or key not in known:
            raise ConfigError(f"--set {text}: it must be KEY=VALUE with one of {', '.join(known)}")
        given[key] = value
    given |= {
        "host": args.host,
        "port": args.port,
        "data_dir": (args.data_dir or local.data_dir()).expanduser(),
        "public_url": args.public_url,
        "seed": args.seed,
        "strict_losses": args.strict_losses,
        "trace": args.trace,
    }
    try:
        return ServeSettings.model_validate(given)
    except ValidationError as err:
        first = err.errors()[0]
        raise ConfigError(f"{'.'.join(map(str, first['loc']))} = {first['input']!r}: {first['msg']}") from err


def _engines(args: argparse.Namespace) -> EnginesConfig:
    sampler = local.default_engines().sampler if args.sampler is None else None
    kind = args.sampler or (sampler.kind if sampler else "vllm")
    if kind == "torch":
        return EnginesConfig(trainer=PeftTrainerConfig(dtype=args.dtype), sampler=TorchSamplerConfig())
    more = {} if args.max_loras is None else {"max_loras": args.max_loras}
    return EnginesConfig(trainer=PeftTrainerConfig(dtype=args.dtype), sampler=VllmSamplerConfig(**more))


def _model(text: str) -> tuple[str, str | None]:
    name, equals, path = text.partition("=")
    if not name or (equals and not Path(path).expanduser().is_dir()):
        raise ConfigError(f"--model {text}: {path!r} is not a directory; it must be ID, or ID=DIRECTORY with weights and tokenizer")
    return name, str(Path(path).expanduser()) if equals else None
