from __future__ import annotations

import argparse
import asyncio
import re
from pathlib import Path

import pytest

from ptlab import keys
from ptlab.backend.access import Access
from ptlab.backend.store import Store, store_file
from ptlab.errors import InvalidRequestError, NotFoundError


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    keys.add_arguments(parser)
    return keys.main(parser.parse_args(arguments))


def created(capsys: pytest.CaptureFixture[str]) -> str:
    found = re.findall(r"^ +export TINKER_API_KEY=(tml-\S{43})$", capsys.readouterr().out, re.MULTILINE)
    assert len(found) == 1
    return str(found[0])


def owner_of(store: Store, key: str) -> str | None:
    return asyncio.run(Access(store).owner_of_key(key))


def test_create_prints_the_key_once_and_it_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_dir = tmp_path / "new"
    assert run("create", "ann", "--data-dir", str(data_dir)) == 0
    key = created(capsys)
    assert run("list", "--data-dir", str(data_dir)) == 0
    listed = capsys.readouterr().out
    assert re.fullmatch(r"ann  key-[0-9a-f]{8}  created \d{4}-\d\d-\d\d \d\d:\d\d UTC  in use\n", listed)
    assert key not in listed and key.encode() not in store_file(data_dir).read_bytes()
    store = Store.open(store_file(data_dir))
    assert owner_of(store, key) == "ann"
    store.close()


def test_revoke_by_name_or_id_ends_a_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("ann", "bob"):
        run("create", name, "--data-dir", str(tmp_path))
    bobs = re.findall("tml-.*", capsys.readouterr().out)[1]
    with pytest.raises(InvalidRequestError, match="'ann' is in use"):
        run("create", "ann", "--data-dir", str(tmp_path))
    assert run("revoke", "ann", "--data-dir", str(tmp_path)) == 0
    assert re.match("revoked key-[0-9a-f]{8} of ann;", capsys.readouterr().out)
    run("list", "--data-dir", str(tmp_path))
    first, second = capsys.readouterr().out.splitlines()
    assert " revoked 20" in first and second.endswith("in use")
    run("revoke", second.split()[1], "--data-dir", str(tmp_path))
    store = Store.open(store_file(tmp_path))
    assert owner_of(store, bobs) is None
    store.close()
    with pytest.raises(NotFoundError, match="no key in use has the id or name 'bob'"):
        run("revoke", "bob", "--data-dir", str(tmp_path))


def test_the_default_directory_is_the_one_that_the_server_uses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PTLAB_DATA_DIR", str(tmp_path / "d"))
    run("create", "ann")
    store = Store.open(store_file(tmp_path / "d"))
    assert owner_of(store, created(capsys)) == "ann"
    store.close()


def test_keys_are_made_while_a_server_has_the_store_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = Store.open(store_file(tmp_path))
    try:
        run("create", "ann", "--data-dir", str(tmp_path))
        assert owner_of(server, created(capsys)) == "ann"
    finally:
        server.close()


def test_a_wrong_directory_is_told_and_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list", "--data-dir", str(tmp_path / "typo")) == 0
    assert capsys.readouterr().out == f'no keys in {tmp_path / "typo"}: every caller is the same one, "local"\n'
    with pytest.raises(NotFoundError, match="was another data directory meant"):
        run("revoke", "ann", "--data-dir", str(tmp_path / "typo"))
    assert not (tmp_path / "typo").exists()
