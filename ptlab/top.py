"""`ptlab top`: what a server is doing, in a terminal. Asks GET /api/v1/status and prints it, again and again."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, TextIO

from ptlab.errors import ConfigError

DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT_S = 10.0
HOME_AND_CLEAR = "\x1b[H\x1b[J"
COLUMNS = 100
"""Where the output is no terminal."""
REASONS = {401: "it wants an API key (set TINKER_API_KEY)", 404: "it has no status; is it a `ptlab serve`?"}
ORDER = {"running": 0, "creating": 1, "idle": 2, "failed": 3, "parked": 4}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ptlab top`."""
    url = "the server (default: $TINKER_BASE_URL, else %(default)s); its key is read from $TINKER_API_KEY"
    parser.add_argument("--url", default=os.environ.get("TINKER_BASE_URL") or DEFAULT_URL, help=url)
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="between two looks (default: %(default)s)")
    parser.add_argument("--once", action="store_true", help="print once and end")


def main(args: argparse.Namespace) -> int:
    """`ptlab top` with parsed arguments; returns the exit code. Raises: ConfigError if the server does not answer at the first look."""
    return top(args.url, os.environ.get("TINKER_API_KEY"), every_s=args.every, once=args.once, out=sys.stdout)


def top(url: str, key: str | None, *, every_s: float, once: bool, out: TextIO) -> int:
    """Print until Ctrl-C, or once. A server that stops answering is waited for. Raises: ConfigError at the first look only."""
    if every_s <= 0:
        raise ConfigError(f"--every is {every_s}; it must be above 0")
    screen = page(fetch(url, key), url, _size())
    while True:
        out.write(screen if once else HOME_AND_CLEAR + screen)
        out.flush()
        if once:
            return 0
        try:
            time.sleep(every_s)
        except KeyboardInterrupt:
            out.write("\n")
            return 0
        try:
            screen = page(fetch(url, key), url, _size())
        except ConfigError as err:
            screen = f"{err.message}\n(trying again every {every_s:g} s)\n"


def fetch(url: str, key: str | None) -> dict[str, Any]:
    """The status of a server. Raises: ConfigError saying why there is none."""
    address = f"{url.rstrip('/')}/api/v1/status"
    if not address.startswith(("http://", "https://")):
        raise ConfigError(f"--url {url}: it must begin with http:// or https://")
    request = urllib.request.Request(address, headers={"X-API-Key": key} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            told = json.loads(answer.read())
    except urllib.error.HTTPError as err:
        with err:
            reason = {401: "it wants an API key (set TINKER_API_KEY)", 404: "it has no status; is it a `ptlab serve`?"}.get(
                err.code, err.reason
            )
        raise ConfigError(f"{url} answered {err.code}: {reason}") from err
    except (OSError, ValueError) as err:
        raise ConfigError(f"{url} does not answer as `ptlab serve` would: {err}") from err
    if not isinstance(told, dict) or "load" not in told:
        raise ConfigError(f"{url} answered something else than the status of a `ptlab serve`")
    return told


def page(status: Mapping[str, Any], url: str, size: tuple[int, int]) -> str:
    """The status as text that fits (columns, lines); models that run stand first, and what does not fit is counted."""
    columns, lines = size
    load = status["load"]
    rates, waiting = load["tokens_per_s"], load["waiting"]
    head = [
        f"ptlab {url}  up {duration(load['up_s'])}  {', '.join(load['base_models'])}",
        f"tokens/s  sampled {rates['sampled']:.0f}  trained {rates['trained']:.0f}    memory {size_text(load['memory_bytes'])}"
        f"  store {size_text(load['store_bytes'])}",
        "waiting   " + ("  ".join(f"{kind} {count}" for kind, count in sorted(waiting.items())) or "nothing"),
        f"sync      {_sync(load)}",
        f"server    {load['num_sessions']} sessions  {_models(load['models'])}  {load['num_samplers']} samplers",
        "",
        f"{status['owner']}: {status['num_sessions']} sessions",
        f"  {'SESSION':<12}{'NAME':<18}{'MODEL':<7}{'STATE':<10}{'STEP':>6}{'RANK':>6}{'IDLE':>8}  BASE MODEL",
    ]
    rows = _rows(status["sessions"])
    room = max(1, lines - len(head) - 2)
    shown = rows[:room]
    more = len(rows) - len(shown)
    body = [row for _, row in shown] + ([f"  ... and {more} more"] if more else [])
    return "\n".join(line[:columns] for line in [*head, *body]) + "\n"


def _rows(sessions: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """A line per model, and one per session without any; running models first, else in the server's order."""
    rows = []
    for session in sessions:
        name = f"  {printable(session['session_id'])[:10]:<12}{printable(session['name'] or '-')[:16]:<18}"
        for model in session["models"]:
            state, numbers = model["state"], f"{model['step']:>6}{model['rank']:>6}{duration(model['idle_s']):>8}"
            line = f"{model['model_id'].rpartition(':')[2]:<7}{state:<10}{numbers}  {printable(model['base_model'])}"
            rows.append((ORDER[state], name + line))
        if not session["models"]:
            samplers = f"{session['num_samplers']} samplers, silent for {duration(session['silent_s'])}"
            rows.append((ORDER["idle"], f"{name}{'-':<7}{samplers}"))
    return sorted(rows, key=lambda row: row[0])


def _sync(load: Mapping[str, Any]) -> str:
    if load["sync_latency_s"] is None:
        return "none yet"
    gap = load["sync_verify_gap_nats"]
    verified = "" if gap is None else f"  verify gap {gap:.1e} nats"
    return f"{load['num_syncs']} so far, last {load['sync_latency_s']:.2f} s{verified}"


def _models(states: Mapping[str, int]) -> str:
    counted = ", ".join(f"{count} {state}" for state, count in sorted(states.items(), key=lambda item: ORDER[item[0]]))
    return f"{sum(states.values())} models" + (f" ({counted})" if counted else "")


def printable(text: str) -> str:
    """Without what could steer a terminal: names come from other people's programs."""
    return "".join(character if character.isprintable() else "?" for character in text)


def duration(seconds: float) -> str:
    """`45s`, `12m`, `3h`, `2d`."""
    for limit, unit, name in ((60, 1, "s"), (3600, 60, "m"), (86400, 3600, "h")):
        if seconds < limit:
            return f"{int(seconds / unit)}{name}"
    return f"{int(seconds / 86400)}d"


def size_text(num_bytes: int) -> str:
    """`812 KiB`, `1.4 GiB`."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _size() -> tuple[int, int]:
    """Columns and lines of the terminal; lines without end where there is none."""
    if not sys.stdout.isatty():
        return COLUMNS, 1_000_000
    columns, lines = shutil.get_terminal_size()
    return columns, lines
