"""`ptlab keys create | list | revoke`: the API keys of a data directory, also while a server runs on it (it notices within a second)."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from ptlab import local
from ptlab.backend.access import Access
from ptlab.backend.store import KeyRow, Store, store_file
from ptlab.errors import NotFoundError

T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ptlab keys`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="create|list|revoke")
    create_parser = actions.add_parser("create", help="make a key and print it, once")
    create_parser.add_argument("name", help="whose key it is; what is made with it belongs to this name")
    list_parser = actions.add_parser("list", help="print names, ids and dates of all keys; not the keys themselves")
    revoke_parser = actions.add_parser("revoke", help="let nobody in with a key any more")
    revoke_parser.add_argument("key", metavar="NAME|ID", help="as `ptlab keys list` prints it")
    for action in (create_parser, list_parser, revoke_parser):
        where = "the data directory of `ptlab serve` (default: its default, $PTLAB_DATA_DIR or ~/.local/share/ptlab)"
        action.add_argument("--data-dir", type=Path, metavar="DIR", help=where)


def main(args: argparse.Namespace) -> int:
    """Run what `add_arguments` parsed; returns the exit code. Raises: PtlabError."""
    data_dir: Path = (args.data_dir or local.data_dir()).expanduser()
    if args.action == "create":
        return create(data_dir, args.name)
    if args.action == "revoke":
        return revoke(data_dir, args.key)
    return list_all(data_dir)


def create(data_dir: Path, name: str) -> int:
    """Make a key and print it with how to use it. It cannot be printed again."""
    key = _with_access(data_dir, lambda access: access.create_key(name))
    print(f"A new API key for {name}; it is not shown again:\n\n    export TINKER_API_KEY={key}\n")
    print("From now on the server of this data directory lets nobody in without a key.")
    return 0


def list_all(data_dir: Path) -> int:
    """One line per key."""
    keys = _with_access(data_dir, lambda access: access.list_keys()) if store_file(data_dir).exists() else []
    if not keys:
        print(f'no keys in {data_dir}: every caller is the same one, "local"')
        return 0
    width = max(len(key.name) for key in keys)
    for key in keys:
        print(f"{key.name:<{width}}  {key.key_id}  created {_date(key.created)}  {_state(key)}")
    return 0


def revoke(data_dir: Path, key_id_or_name: str) -> int:
    """Revoke the key in use under this name or id. Raises: NotFoundError."""
    if not store_file(data_dir).exists():
        raise NotFoundError(f"no keys in {data_dir}; was another data directory meant?")
    revoked = _with_access(data_dir, lambda access: access.revoke_key(key_id_or_name))
    print(f"revoked {revoked.key_id} of {revoked.name}; what was made with it stays, and belongs to the next key of this name")
    return 0


def _with_access(data_dir: Path, action: Callable[[Access], Awaitable[T]]) -> T:
    async def run(store: Store) -> T:
        return await action(Access(store))

    store = Store.open(store_file(data_dir), beside_server=True)
    try:
        return asyncio.run(run(store))
    finally:
        store.close()


def _state(key: KeyRow) -> str:
    return "in use" if key.revoked is None else f"revoked {_date(key.revoked)}"


def _date(unix_s: float) -> str:
    return f"{datetime.fromtimestamp(unix_s, UTC):%Y-%m-%d %H:%M} UTC"
