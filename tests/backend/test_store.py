from __future__ import annotations

import asyncio
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ptlab.backend.store import (
    DELETE_AT_ONCE,
    KeyRow,
    LossRow,
    ModelRow,
    RequestRow,
    SamplerRow,
    SequenceRow,
    SessionRow,
    Store,
    StoreError,
    body_digest,
    store_file,
)
from ptlab.backend.store_rows import SCHEMA_VERSION
from ptlab.errors import ConfigError, InvalidRequestError, NotFoundError

ROOT = Path(__file__).parents[2]


def session(session_id: str, **changes: Any) -> SessionRow:
    return SessionRow(session_id=session_id, owner="ann", created=1.5, last_seen=2.5, **changes)


def model(model_id: str, **changes: Any) -> ModelRow:
    return ModelRow(model_id=model_id, session_id="s", owner="ann", base_model="b", lora={"rank": 8, "seed": None}, created=1.0, **changes)


def sampler(sampling_session_id: str, **changes: Any) -> SamplerRow:
    row = SamplerRow(sampling_session_id=sampling_session_id, session_id="s", owner="ann", base_model="b", created=1.0, last_used=1.0)
    return replace(row, **changes)


def request(scope: str, seq_id: int, **changes: Any) -> RequestRow:
    row = RequestRow(
        request_id=f"{scope}/{seq_id}",
        kind="k",
        scope=scope,
        seq_id=seq_id,
        owner="ann",
        body=f"body {seq_id}".encode(),
        created=float(seq_id),
    )
    return replace(row, **changes)


def sequence(sequence_id: str, created: float = 1.0) -> SequenceRow:
    return SequenceRow(
        sequence_id=sequence_id, owner="ann", prompt_tokens=b"\1\0\0\0", tokens=b"", logprobs=b"\0\0\0\0", version=3, created=created
    )


def key(name: str, sha256: bytes) -> KeyRow:
    return KeyRow(key_id=f"key-{name}-{sha256.hex()}", name=name, owner=name, sha256=sha256, created=1.0)


def with_store(use: Callable[[Store], Awaitable[None]], path: Path | None = None) -> None:
    """Run `use` on a store of its own (in memory, or in `path`)."""
    store = Store.open(path)
    try:
        asyncio.run(_coroutine(use, store))
    finally:
        store.close()


async def _coroutine(use: Callable[[Store], Awaitable[None]], store: Store) -> None:
    await use(store)


async def answer(store: Store, request_id: str, **changes: Any) -> bool:
    given: dict[str, Any] = {"state": "done", "answer_kind": "json", "answer": b"{}", "finished": 100.0, **changes}
    return await store.finish(request_id, **given)


def test_every_row_comes_back_as_it_was_written(tmp_path: Path) -> None:
    rich = session(
        "s2", user_metadata={"ü": "\ud800"}, display_name="Ann's ☃", project_id="p", tags=["a", "b"], finished="success"
    )  # fmt: skip
    saved = model("m2", user_metadata={"a": "b"}, step=7, from_path="tinker://x/weights/y", with_optimizer=True, failure="no memory")
    loaded = sampler("p2", model_path="tinker://x/sampler_weights/y", version={"name": "n", "probe": None}, client_counter=4)
    loss = LossRow(loss_id="l", session_id="s", owner="ann", name="n", inputs=["w", 1], graph={"nodes": [{"op": "add"}]}, created=1.0)

    async def write(store: Store) -> None:
        assert await store.add_session(session("s1")) == session("s1", ordinal=1)
        assert await store.add_session(rich) == replace(rich, ordinal=2)
        for row in (model("m1"), saved):
            await store.add_model(row)
        for sampler_row in (sampler("p1"), loaded):
            await store.add_sampler(sampler_row)
        await store.add_sequences([sequence("q1"), sequence("q2")])
        await store.add_loss(loss)
        await store.add_key(key("ann", b"\1"))

    async def read(store: Store) -> None:
        assert await store.sessions() == [session("s1", ordinal=1), replace(rich, ordinal=2)]
        assert await store.session("s2") == replace(rich, ordinal=2)
        assert await store.models() == [model("m1"), saved]
        assert await store.model("m2") == saved
        assert await store.samplers() == [sampler("p1"), loaded]
        assert await store.sampler("p2") == loaded
        assert await store.sequence(["q2", "q9"]) == {"q2": sequence("q2")}
        assert await store.loss("l") == loss
        assert await store.keys() == [key("ann", b"\1")]
        assert [await store.session("x"), await store.model("x"), await store.sampler("x"), await store.loss("x")] == [None] * 4
        assert await store.request("x") is None
        assert await store.add_session(session("s3")) == session("s3", ordinal=3)

    with_store(write, store_file(tmp_path))
    with_store(read, store_file(tmp_path))


def test_set_changes_what_it_names_and_nothing_else() -> None:
    async def use(store: Store) -> None:
        for name in ("s1", "s2"):
            await store.add_session(session(name))
            await store.add_model(model(name))
            await store.add_sampler(sampler(name))
        await store.set_session("s2", last_seen=9.0, finished="errored", user_metadata={"n": "1"})
        await store.set_model("s2", step=3, lora={"rank": 4}, with_optimizer=True)
        await store.set_sampler("s2", last_used=8.0, version={"name": "v"})
        changed = session("s2", ordinal=2, finished="errored", user_metadata={"n": "1"})
        assert await store.sessions() == [session("s1", ordinal=1), replace(changed, last_seen=9.0)]
        assert await store.models() == [model("s1"), replace(model("s2"), step=3, lora={"rank": 4}, with_optimizer=True)]
        assert await store.samplers() == [sampler("s1"), sampler("s2", last_used=8.0, version={"name": "v"})]
        for unknown in (store.set_session("x", last_seen=1.0), store.set_model("x", step=1), store.set_sampler("x", last_used=1.0)):
            with pytest.raises(NotFoundError, match="x"):
                await unknown
        with pytest.raises(TypeError, match=r"stepp.* cannot be changed; fields are"):
            await store.set_model("s1", **{"stepp = 1; --": 1})

    with_store(use)


def test_samplers_are_removed_and_their_clients_counted() -> None:
    async def use(store: Store) -> None:
        for name in ("p1", "p2", "p3"):
            await store.add_sampler(sampler(name))
        assert sorted(await asyncio.gather(*(store.next_client_counter("p1") for _ in range(50)))) == list(range(1, 51))
        assert await store.next_client_counter("p2") == 1
        await store.remove_samplers(["p1", "p3", "p9"])
        assert [row.sampling_session_id for row in await store.samplers()] == ["p2"]
        with pytest.raises(NotFoundError, match="no sampling session p1"):
            await store.next_client_counter("p1")

    with_store(use)


def test_a_request_is_accepted_once_and_answered_once() -> None:
    async def use(store: Store) -> None:
        first = await store.accept(request("m", 1, model_id="m"))
        assert first == replace(request("m", 1, model_id="m"), body_sha256=body_digest(b"body 1"))
        assert await store.accept(request("m", 1, request_id="other", body=b"other", created=9.0)) == first
        assert await store.request("other") is None
        assert await store.accept(request("n", 1)) != first  # another scope counts for itself
        assert await store.finish("m/1", state="failed", answer_kind="json", answer=b"no", category="user", seconds=2.5, finished=7.0)
        assert not await answer(store, "m/1", answer=b"yes")
        await store.fetched("m/1", 8.0)
        answered = replace(
            first, state="failed", answer_kind="json", answer=b"no", category="user", seconds=2.5, finished=7.0, fetched=8.0
        )  # fmt: skip
        assert await store.request("m/1") == answered == await store.accept(request("m", 1))
        for unknown in (answer(store, "x"), store.fetched("x", 1.0)):
            with pytest.raises(NotFoundError, match="no request x"):
                await unknown
        with pytest.raises(ValueError, match="accepted with a body and pending"):
            await store.accept(request("m", 2, body=None))
        with pytest.raises(StoreError, match=r"UNIQUE constraint failed: requests\.request_id"):
            await store.accept(request("m", 2, request_id="m/1"))
        with pytest.raises(InvalidRequestError, match="numbers must fit 64 bits"):
            await store.accept(request("m", 2**63))
        assert (await store.accept(request("m", 2))).state == "pending"  # nothing of the failed ones stayed

    with_store(use)


def test_the_body_stays_as_long_as_something_may_run_it() -> None:
    async def use(store: Store) -> None:
        for seq_id in (1, 2, 3, 4):
            await store.accept(request("m", seq_id, model_id="m"))
            await store.accept(request("n", seq_id, model_id="n"))
        await store.accept(request("p", 1))
        for request_id in ("m/1", "m/2", "m/4", "n/1", "p/1"):
            await answer(store, request_id)
        await store.drop_bodies("m", 3)
        bodies = {name: (await store.request(name) or request("", 0)).body for name in ("m/1", "m/2", "m/3", "m/4", "n/1", "p/1")}
        assert bodies == {"m/1": None, "m/2": None, "m/3": b"body 3", "m/4": b"body 4", "n/1": b"body 1", "p/1": None}
        sample = await store.accept(request("p", 1))
        assert sample.body_sha256 == body_digest(b"body 1")  # to compare a repeated request with

    with_store(use)


def test_pending_and_journal_are_in_order() -> None:
    async def use(store: Store) -> None:
        for seq_id, created in ((3, 1.0), (1, 2.0), (2, 2.0), (4, 0.5)):
            await store.accept(request("m", seq_id, model_id="m", created=created))
        await store.accept(request("m:loss", 7, model_id="m", created=9.0))
        await store.accept(request("n", 9, model_id="n", created=0.0))
        await answer(store, "m/3", answer=b"[3]")
        assert [row.request_id for row in await store.pending()] == ["n/9", "m/4", "m/1", "m/2", "m:loss/7"]
        journal = await store.journal("m", 1)
        assert [(row.seq_id, row.state, row.answer, row.body) for row in journal] == [
            (2, "pending", None, b"body 2"),
            (3, "done", b"[3]", b"body 3"),
            (4, "pending", None, b"body 4"),
            (7, "pending", None, b"body 7"),
        ]
        assert await store.journal("m", 7) == []

    with_store(use)


def test_requests_expire_then_are_forgotten_but_never_while_they_are_needed() -> None:
    async def use(store: Store) -> None:
        for scope in ("p", "m"):
            for seq_id in (1, 2, 3):
                await store.accept(request(scope, seq_id, model_id="m" if scope == "m" else None))
                if seq_id < 3:
                    await answer(store, f"{scope}/{seq_id}", finished=float(10 * seq_id))

        async def known() -> dict[str, bytes | None]:
            rows = {f"{s}/{i}": await store.request(f"{s}/{i}") for s in ("p", "m") for i in (1, 2, 3)}
            return {name: row.answer for name, row in rows.items() if row is not None}

        assert await store.expire_requests(finished_before=10.0) == 0
        assert await store.expire_requests(finished_before=20.0) == 2
        everything = {"p/1": None, "p/2": b"{}", "p/3": None, "m/1": None, "m/2": b"{}", "m/3": None}
        assert await known() == everything  # p/1 and m/1: expired, known still
        assert (await store.accept(request("p", 1))).state == "done"  # and not run again
        assert await store.expire_requests(finished_before=15.0, forget_before=30.0) == 0
        del everything["p/1"]  # m/1 may be replayed; p/2 and m/2 have an answer that is still kept
        assert await known() == everything
        await store.drop_bodies("m", 1)
        assert await store.expire_requests(finished_before=1e9, forget_before=1e9) == 2
        assert await known() == {"p/3": None, "m/3": None, "m/2": None}
        assert [row.body for row in await store.journal("m", 0)] == [b"body 2", b"body 3"]
        assert [row.request_id for row in await store.pending()] == ["p/3", "m/3"]

    with_store(use)


def test_an_expired_request_is_remembered_for_a_week() -> None:
    async def use(store: Store) -> None:
        await store.accept(request("p", 1))
        await answer(store, "p/1", finished=1000.0)
        assert await store.expire_requests(finished_before=1001.0) == 1
        await store.expire_requests(finished_before=1000.0 + 7 * 86400)
        assert await store.request("p/1") is not None
        await store.expire_requests(finished_before=1001.0 + 7 * 86400)
        assert await store.request("p/1") is None

    with_store(use)


def test_expiry_goes_on_beyond_what_it_deletes_at_once() -> None:
    async def use(store: Store) -> None:
        count = 2 * DELETE_AT_ONCE + 3
        await store.add_sequences([sequence(f"q{i}", created=5.0) for i in range(count)])
        await store.add_sequences([sequence("new", created=6.0)])
        assert await store.expire_sequences(6.0) == count
        assert (await store.counts())["sequences"] == 1

    with_store(use)


def test_a_sequence_sampled_again_replaces_the_first() -> None:
    async def use(store: Store) -> None:
        await store.add_sequences([sequence("q")])
        await store.add_sequences([replace(sequence("q"), version=4)])
        assert (await store.sequence(["q"]))["q"].version == 4
        with pytest.raises(StoreError):
            await store.add_sequences([sequence("whole"), replace(sequence("torn"), created=float("nan"))])  # NaN is NULL to SQLite
        assert await store.sequence(["whole", "torn"]) == {}

    with_store(use)


def test_a_key_name_is_in_use_once_and_free_after_revoking() -> None:
    async def use(store: Store) -> None:
        await store.add_key(key("ann", b"\1"))
        with pytest.raises(InvalidRequestError, match="'ann' is in use"):
            await store.add_key(key("ann", b"\2"))
        assert await store.revoke_key("ann", when=5.0) == replace(key("ann", b"\1"), revoked=5.0)
        with pytest.raises(NotFoundError, match="no key in use has the id or name 'ann'"):
            await store.revoke_key("ann")
        await store.add_key(key("ann", b"\2"))
        await store.add_key(key(key("ann", b"\2").key_id, b"\3"))  # a name that is another key's id: the id wins
        assert (await store.revoke_key("key-ann-02", when=6.0)).sha256 == b"\2"
        assert [row.revoked for row in await store.keys()] == [5.0, 6.0, None]

    with_store(use)


def test_counts_say_what_is_there() -> None:
    async def use(store: Store) -> None:
        await store.add_session(session("s1"))
        await store.add_session(session("s2", finished="success"))
        await store.add_model(model("m"))
        await store.add_sampler(sampler("p"))
        for seq_id in range(6):
            await store.accept(request("p", seq_id))
        await answer(store, "p/0")
        await answer(store, "p/1", state="failed")
        await answer(store, "p/2", state="failed")
        await store.add_key(key("ann", b"\1"))
        await store.add_key(key("bob", b"\2"))
        await store.revoke_key("bob")
        assert await store.counts() == {
            "sessions": 1, "models": 1, "samplers": 1, "requests_pending": 3, "requests_done": 1, "requests_failed": 2,
            "sequences": 0, "keys": 1, "losses": 0,
        }  # fmt: skip

    with_store(use)


@pytest.mark.parametrize("in_memory", [True, False])
def test_two_hundred_coroutines_accept_at_once(tmp_path: Path, in_memory: bool) -> None:
    """Each scope gets the same numbers twice, from two coroutines: one row each, both told of the same one."""

    async def use(store: Store) -> None:
        async def client(number: int) -> list[RequestRow]:
            scope, twin = f"m{number // 2}", number % 2
            return [await store.accept(request(scope, seq_id, request_id=f"{scope}/{seq_id}/{twin}")) for seq_id in range(5)]

        accepted = await asyncio.gather(*(client(number) for number in range(200)))
        for first, second in zip(accepted[::2], accepted[1::2], strict=True):
            assert first == second
        rows = await store.pending()
        assert len(rows) == 500
        assert {row.request_id for row in rows} == {row.request_id for client_rows in accepted for row in client_rows}

        async def finisher(row: RequestRow) -> bool:
            return await answer(store, row.request_id, answer=row.request_id.encode())

        assert all(await asyncio.gather(*(finisher(row) for row in rows)))
        stored = await asyncio.gather(*(store.request(row.request_id) for row in rows))
        assert all(row is not None and row.answer == row.request_id.encode() for row in stored)

    with_store(use, None if in_memory else store_file(tmp_path))


def test_a_newer_store_is_refused(tmp_path: Path) -> None:
    Store.open(store_file(tmp_path)).close()
    with sqlite3.connect(store_file(tmp_path)) as plain:
        assert plain.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
        plain.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    plain.close()
    with pytest.raises(ConfigError, match=rf"store\.sqlite: schema version {SCHEMA_VERSION + 1}, this ptlab knows versions up to"):
        Store.open(store_file(tmp_path))


WRITER = """
import asyncio, os, sys
from pathlib import Path
from ptlab.backend.store import RequestRow, SequenceRow, Store

def said(line):                                            # unbuffered: what is on the pipe was resolved
    os.write(1, (line + "\\n").encode())

async def client(store, number):
    for seq_id in range(10**6):
        request_id = f"m{number}/{seq_id}"
        body = f"{request_id} ".encode() * (20 if number % 5 else 20_000)
        scope = f"m{number}"
        await store.accept(RequestRow(request_id=request_id, kind="k", scope=scope, seq_id=seq_id, owner="o", body=body, created=1.0))
        said(f"accepted {request_id}")
        await store.finish(request_id, state="done", answer_kind="json", answer=body[::-1])
        said(f"finished {request_id}")
        ids = [f"{request_id}:{i}" for i in range(4)]
        await store.add_sequences([
            SequenceRow(sequence_id=i, owner="o", prompt_tokens=b"", tokens=b"", logprobs=b"", version=0, created=1.0) for i in ids
        ])
        said(f"sampled {request_id}")

async def main(store):
    await asyncio.gather(*(client(store, number) for number in range(50)))

asyncio.run(main(Store.open(Path(sys.argv[1]))))
"""


@pytest.mark.parametrize("num_lines", [1, 400, 2500])
def test_killed_while_writing_everything_that_was_answered_is_there_and_nothing_is_torn(tmp_path: Path, num_lines: int) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(store_file(tmp_path))],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert child.stdout is not None
    with child.stdout:
        lines = [child.stdout.readline() for _ in range(num_lines)]
        child.send_signal(signal.SIGKILL)
        lines += child.stdout.readlines()
    assert child.wait() == -signal.SIGKILL
    resolved = {tuple(line.decode().split()) for line in lines if line.endswith(b"\n")}
    assert len(resolved) >= num_lines

    async def check(store: Store) -> None:
        def whole(connection: sqlite3.Connection) -> list[Any]:
            return connection.execute("PRAGMA integrity_check").fetchall()

        assert await store._database.read("integrity_check", whole) == [("ok",)]
        stored = {}
        for number in range(50):
            for seq_id in range(10**6):
                row = await store.request(f"m{number}/{seq_id}")
                if row is None:
                    break
                stored[row.request_id] = row
                body = f"{row.request_id} ".encode() * (20 if number % 5 else 20_000)
                assert row.body_sha256 == body_digest(body)
                assert (row.state, row.body, row.answer) in [("pending", body, None), ("done", None, body[::-1])]
                sequences = await store.sequence([f"{row.request_id}:{i}" for i in range(4)])
                assert len(sequences) in ((0, 4) if row.state == "done" else (0,))
                assert ("sampled", row.request_id) not in resolved or len(sequences) == 4
        for event, request_id in resolved:
            assert request_id in stored
            assert event == "accepted" or stored[request_id].state == "done"
        await store.accept(request("after", 1))

    with_store(check, store_file(tmp_path))


def test_rows_stay_right_under_a_random_course_of_events() -> None:
    """Against a dict: accept (also twice), finish (also twice), drop, expire in any order."""

    async def use(store: Store) -> None:
        chance = random.Random(4)
        expected: dict[tuple[str, int], RequestRow] = {}
        for moment in range(1500):
            scope, seq_id = chance.choice("mnp"), chance.randrange(12)
            known = expected.get((scope, seq_id))
            model_id = None if scope == "p" else scope
            event = chance.choice(["accept", "accept", "finish", "finish", "drop", "expire"])
            if event == "accept":
                new = request(scope, seq_id, model_id=model_id, body=b"x" * chance.randrange(9), created=float(moment))
                stored = await store.accept(new)
                expected[scope, seq_id] = known or replace(new, body_sha256=body_digest(new.body or b""))
                assert stored == expected[scope, seq_id]
            elif event == "finish" and known is not None:
                gave = await answer(store, known.request_id, answer=b"%d" % moment, finished=float(moment))
                assert gave == (known.state == "pending")
                if gave:
                    expected[scope, seq_id] = replace(
                        known, state="done", answer_kind="json", answer=b"%d" % moment, finished=float(moment),
                        body=known.body if model_id else None,
                    )  # fmt: skip
            elif event == "drop" and model_id is not None:
                await store.drop_bodies(model_id, seq_id)
                for place, row in expected.items():
                    if row.model_id == model_id and row.seq_id <= seq_id and row.state == "done":
                        expected[place] = replace(row, body=None)
            elif event == "expire" and chance.random() < 0.2:
                before, forget = moment - chance.randrange(300), moment - chance.randrange(600)
                dropped = 0
                for place, row in list(expected.items()):
                    if row.finished is not None and row.finished < before:
                        dropped += row.answer is not None
                        row = expected[place] = replace(row, answer=None)
                    if row.finished is not None and row.finished < forget and row.answer is None and row.body is None:
                        del expected[place]
                assert await store.expire_requests(finished_before=float(before), forget_before=float(forget)) == dropped
            found = {(row.scope, row.seq_id): row for name in "mnp" for row in [await store.request(f"{name}/{seq_id}")] if row is not None}
            assert found == {place: row for place, row in expected.items() if place[1] == seq_id}
        assert len({row.state for row in expected.values()}) == 2

    with_store(use)
