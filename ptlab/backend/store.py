"""The store's durable facts: sessions, models, samplers, requests with their answers, sampled sequences, keys, custom losses.

Every write is in the file (committed, synced) before its coroutine returns. Opening happens outside a loop; after that the store
belongs to one asyncio loop at a time.
"""

from __future__ import annotations

import dataclasses
import json
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptlab.backend.database import Database
from ptlab.backend.store_rows import (
    KEYS,
    LOSSES,
    MIGRATIONS,
    MODELS,
    REQUESTS,
    SAMPLERS,
    SEQUENCES,
    SESSIONS,
    AnswerKind,
    KeyRow,
    LossRow,
    ModelRow,
    RequestRow,
    SamplerRow,
    SequenceRow,
    SessionRow,
    State,
    body_digest,
)
from ptlab.errors import InvalidRequestError, NotFoundError, StoreError

__all__ = [
    "KeyRow",
    "LossRow",
    "ModelRow",
    "RequestRow",
    "SamplerRow",
    "SequenceRow",
    "SessionRow",
    "Store",
    "StoreError",
    "body_digest",
    "store_file",
]

REMEMBER_EXPIRED_S = 7 * 86400.0
"""How long an expired request is still known, so that a late poll hears "expired" instead of "unknown"."""
DELETE_AT_ONCE = 500
"""Rows that one write of an expiry deletes."""


def store_file(data_dir: Path) -> Path:
    """Where the store of a data directory lies."""
    return data_dir / "store.sqlite"


class Store:
    """Typed reads and writes. Row types: ptlab/backend/store_rows.py.

    Every method may raise StoreError (the disk is full, the file is damaged, the store is closed); nothing was written then.
    Cancelling a coroutine that waits for a write does not take the write back.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    @classmethod
    def open(cls, path: Path | None, *, beside_server: bool = False, lock_wait_s: float = 3.0) -> Store:
        """The store in `path`, made or brought to this schema if need be; None = in memory, gone when closed.

        Args:
            beside_server: also open it while another process serves from it (`ptlab keys`): short writes only.
            lock_wait_s: how long to wait for a process that is just ending.
        Raises: ConfigError if another live process holds it (its pid is named), the schema is newer, or the file cannot be used.
        """
        return cls(Database.open(path, MIGRATIONS, beside_owner=beside_server, lock_wait_s=lock_wait_s))

    def close(self) -> None:
        """Finish what is queued, then close the file. Blocking; a second call does nothing."""
        self._database.close()

    # Sessions

    async def add_session(self, row: SessionRow) -> SessionRow:
        """Returns the row with its ordinal."""

        def work(connection: sqlite3.Connection) -> SessionRow:
            return dataclasses.replace(row, ordinal=SESSIONS.insert(connection, row, without=["ordinal"]))

        return await self._database.write("add_session", work)

    async def set_session(self, session_id: str, **changes: Any) -> None:
        """Raises: NotFoundError."""
        await self._database.write("set_session", lambda connection: SESSIONS.update(connection, session_id, changes))

    async def session(self, session_id: str) -> SessionRow | None:
        return await self._database.read("session", lambda connection: SESSIONS.get(connection, session_id))

    async def sessions(self) -> list[SessionRow]:
        """All, in the order they were made."""
        return await self._database.read("sessions", lambda connection: SESSIONS.select(connection, "ORDER BY ordinal"))

    # Models

    async def add_model(self, row: ModelRow) -> None:
        await self._database.write("add_model", lambda connection: MODELS.insert(connection, row))

    async def set_model(self, model_id: str, **changes: Any) -> None:
        """Raises: NotFoundError."""
        await self._database.write("set_model", lambda connection: MODELS.update(connection, model_id, changes))

    async def model(self, model_id: str) -> ModelRow | None:
        return await self._database.read("model", lambda connection: MODELS.get(connection, model_id))

    async def models(self) -> list[ModelRow]:
        """All, in the order they were made."""
        return await self._database.read("models", lambda connection: MODELS.select(connection, "ORDER BY created, rowid"))

    # Samplers

    async def add_sampler(self, row: SamplerRow) -> None:
        await self._database.write("add_sampler", lambda connection: SAMPLERS.insert(connection, row))

    async def set_sampler(self, sampling_session_id: str, **changes: Any) -> None:
        """Raises: NotFoundError."""
        await self._database.write("set_sampler", lambda connection: SAMPLERS.update(connection, sampling_session_id, changes))

    async def remove_samplers(self, sampling_session_ids: Sequence[str]) -> None:
        """Ids that are not there are passed over."""
        wanted = json.dumps(list(sampling_session_ids))

        def work(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM samplers WHERE sampling_session_id IN (SELECT value FROM json_each(?))", [wanted])

        await self._database.write("remove_samplers", work)

    async def sampler(self, sampling_session_id: str) -> SamplerRow | None:
        return await self._database.read("sampler", lambda connection: SAMPLERS.get(connection, sampling_session_id))

    async def samplers(self) -> list[SamplerRow]:
        """All, in the order they were made."""
        return await self._database.read("samplers", lambda connection: SAMPLERS.select(connection, "ORDER BY created, rowid"))

    async def next_client_counter(self, sampling_session_id: str) -> int:
        """1, 2, 3, ...; no number is given twice. Raises: NotFoundError."""

        def work(connection: sqlite3.Connection) -> int:
            row = SAMPLERS.get(connection, sampling_session_id)
            if row is None:
                raise SAMPLERS.not_found(sampling_session_id)
            SAMPLERS.update(connection, sampling_session_id, {"client_counter": row.client_counter + 1})
            return row.client_counter + 1

        return await self._database.write("next_client_counter", work)

    # Requests

    async def accept(self, row: RequestRow) -> RequestRow:
        """Store a pending request; if (scope, seq_id) was accepted before, the stored row comes back unchanged.

        The caller tells by `request_id` which it is, and by `body_sha256` whether a repeated request is the same.
        """
        body = row.body
        if body is None or row.state != "pending":
            raise ValueError(f"request {row.request_id} is accepted with a body and pending, not with body={body!r}, state={row.state!r}")

        def work(connection: sqlite3.Connection) -> RequestRow:
            stored = REQUESTS.select(connection, "WHERE scope = ? AND seq_id = ?", [row.scope, row.seq_id])
            if stored:
                return stored[0]
            new = dataclasses.replace(row, body_sha256=row.body_sha256 or body_digest(body))
            number = REQUESTS.insert(connection, new, without=["body", "answer"])
            connection.execute("INSERT INTO request_bodies (number, body) VALUES (?, ?)", [number, body])
            return new

        return await self._database.write("accept", work, size_bytes=len(body))

    async def finish(
        self,
        request_id: str,
        *,
        state: State,
        answer_kind: AnswerKind,
        answer: bytes,
        category: str | None = None,
        seconds: float = 0.0,
        finished: float | None = None,
    ) -> bool:
        """Keep the answer of a pending request; the body of a request without a model goes, nothing replays it.

        Returns False, changing nothing, if it has an answer already: what a client may have read never changes.
        Args: finished: unix seconds; None = now. Raises: NotFoundError.
        """
        when = time.time() if finished is None else finished
        changes = {"state": state, "answer_kind": answer_kind, "category": category, "seconds": seconds, "finished": when}

        def work(connection: sqlite3.Connection) -> bool:
            found = connection.execute("SELECT number, state, model_id FROM requests WHERE request_id = ?", [request_id]).fetchone()
            if found is None:
                raise REQUESTS.not_found(request_id)
            number, before, model_id = found
            if before != "pending":
                return False
            REQUESTS.update(connection, request_id, changes)
            connection.execute("INSERT INTO request_answers (number, answered, answer) VALUES (?, ?, ?)", [number, when, answer])
            if model_id is None:
                connection.execute("DELETE FROM request_bodies WHERE number = ?", [number])
            return True

        return await self._database.write("finish", work, size_bytes=len(answer))

    async def fetched(self, request_id: str, when: float) -> None:
        """Note that a client took the answer. Raises: NotFoundError."""
        await self._database.write("fetched", lambda connection: REQUESTS.update(connection, request_id, {"fetched": when}))

    async def request(self, request_id: str) -> RequestRow | None:
        return await self._database.read("request", lambda connection: REQUESTS.get(connection, request_id))

    async def pending(self) -> list[RequestRow]:
        """Everything accepted and not answered, in the order it was accepted."""
        return await self._database.read(
            "pending", lambda connection: REQUESTS.select(connection, "WHERE state = 'pending' ORDER BY created, number")
        )

    async def journal(self, model_id: str, after_seq: int) -> list[RequestRow]:
        """Requests of a model in any state with seq_id > after_seq, by seq_id: what a replay from a saved state runs again."""
        clause = "WHERE model_id = ? AND seq_id > ? ORDER BY seq_id, number"
        return await self._database.read("journal", lambda connection: REQUESTS.select(connection, clause, [model_id, after_seq]))

    async def finished_seq_ids(self, model_id: str, after_seq: int) -> list[int]:
        """Numbers of the journal that have an answer: what a start needs of it, without reading bodies and answers."""
        query = "SELECT seq_id FROM requests WHERE model_id = ? AND seq_id > ? AND state <> 'pending' ORDER BY seq_id"
        return await self._database.read(
            "finished_seq_ids", lambda connection: [row[0] for row in connection.execute(query, [model_id, after_seq])]
        )

    async def drop_bodies(self, model_id: str, up_to_seq: int) -> None:
        """No replay goes back before `up_to_seq` (inclusive) any more. Bodies of pending requests stay."""

        def work(connection: sqlite3.Connection) -> None:
            chosen = "SELECT number FROM requests WHERE model_id = ? AND seq_id <= ? AND state <> 'pending'"
            connection.execute(f"DELETE FROM request_bodies WHERE number IN ({chosen})", [model_id, up_to_seq])

        await self._database.write("drop_bodies", work)

    async def expire_requests(self, *, finished_before: float, forget_before: float | None = None) -> int:
        """Drop the answers of requests that finished before a moment; pending requests are never touched.

        An expired request stays known without its answer until `forget_before` (None: a week earlier than `finished_before`), and a
        request of a model as long as a replay may need its body. Returns how many answers were dropped.
        """
        forget = finished_before - REMEMBER_EXPIRED_S if forget_before is None else forget_before
        old = "number IN (SELECT number FROM request_answers WHERE answered < ? LIMIT ?)"
        dropped = await self._delete("expire_requests", "request_answers", old, finished_before)
        unneeded = (
            "SELECT number FROM requests WHERE state <> 'pending' AND finished < ?"
            " AND NOT EXISTS (SELECT 1 FROM request_bodies WHERE request_bodies.number = requests.number)"
            " AND NOT EXISTS (SELECT 1 FROM request_answers WHERE request_answers.number = requests.number) LIMIT ?"
        )
        await self._delete("expire_requests", "requests", f"number IN ({unneeded})", forget)
        return dropped

    # Sampled sequences

    async def add_sequences(self, rows: Sequence[SequenceRow]) -> None:
        """All or none. A sequence_id that is there already is replaced: its sample was run again after a restart."""

        def work(connection: sqlite3.Connection) -> None:
            for row in rows:
                SEQUENCES.insert(connection, row, replace=True)

        size_bytes = sum(len(row.prompt_tokens) + len(row.tokens) + len(row.logprobs) for row in rows)
        await self._database.write("add_sequences", work, size_bytes=size_bytes)

    async def sequence(self, sequence_ids: Sequence[str]) -> dict[str, SequenceRow]:
        """Those that are known, by id."""
        wanted = json.dumps(list(sequence_ids))
        clause = "WHERE sequence_id IN (SELECT value FROM json_each(?))"
        rows = await self._database.read("sequence", lambda connection: SEQUENCES.select(connection, clause, [wanted]))
        return {row.sequence_id: row for row in rows}

    async def expire_sequences(self, created_before: float) -> int:
        """Returns how many were dropped."""
        old = "sequence_id IN (SELECT sequence_id FROM sequences WHERE created < ? LIMIT ?)"
        return await self._delete("expire_sequences", "sequences", old, created_before)

    async def _delete(self, operation: str, table: str, condition: str, before: float) -> int:
        """Delete a few rows at a time, so that other writes get between. `condition` has two marks: a time and a number of rows."""
        statement = f"DELETE FROM {table} WHERE {condition}"
        total = 0
        while True:
            deleted = await self._database.write(
                operation, lambda connection: connection.execute(statement, [before, DELETE_AT_ONCE]).rowcount
            )
            total += deleted
            if deleted < DELETE_AT_ONCE:
                return total

    # Custom losses

    async def add_loss(self, row: LossRow) -> None:
        """One that is there already is replaced: its upload was run again after a restart."""
        await self._database.write("add_loss", lambda connection: LOSSES.insert(connection, row, replace=True))

    async def loss(self, loss_id: str) -> LossRow | None:
        return await self._database.read("loss", lambda connection: LOSSES.get(connection, loss_id))

    # Keys

    async def add_key(self, row: KeyRow) -> None:
        """Raises: InvalidRequestError if a key of this name is in use."""

        def work(connection: sqlite3.Connection) -> None:
            if KEYS.select(connection, "WHERE name = ? AND revoked IS NULL", [row.name]):
                raise InvalidRequestError(f"a key named {row.name!r} is in use; choose another name, or revoke it first")
            KEYS.insert(connection, row)

        await self._database.write("add_key", work)

    async def keys(self) -> list[KeyRow]:
        """All, revoked ones too, in the order they were made."""
        return await self._database.read("keys", lambda connection: KEYS.select(connection, "ORDER BY created, rowid"))

    async def revoke_key(self, key_id_or_name: str, when: float | None = None) -> KeyRow:
        """Revoke the key in use under this id or name. Returns it. Args: when: None = now. Raises: NotFoundError."""

        def work(connection: sqlite3.Connection) -> KeyRow:
            clause = "WHERE (key_id = ? OR name = ?) AND revoked IS NULL ORDER BY key_id = ? DESC"
            live = KEYS.select(connection, clause, [key_id_or_name] * 3)
            if not live:
                raise NotFoundError(f"no key in use has the id or name {key_id_or_name!r}; `ptlab keys list` shows them")
            revoked = dataclasses.replace(live[0], revoked=time.time() if when is None else when)
            KEYS.update(connection, revoked.key_id, {"revoked": revoked.revoked})
            return revoked

        return await self._database.write("revoke_key", work)

    async def counts(self) -> dict[str, int]:
        """Rows by kind, for metrics: sessions that go on, models, samplers, requests by state, sequences, keys in use, losses."""
        queries = {
            "sessions": "SELECT COUNT(*) FROM sessions WHERE finished IS NULL",
            "models": "SELECT COUNT(*) FROM models",
            "samplers": "SELECT COUNT(*) FROM samplers",
            "requests_pending": "SELECT COUNT(*) FROM requests WHERE state = 'pending'",
            "requests_done": "SELECT COUNT(*) FROM requests WHERE state = 'done'",
            "requests_failed": "SELECT COUNT(*) FROM requests WHERE state = 'failed'",
            "sequences": "SELECT COUNT(*) FROM sequences",
            "keys": "SELECT COUNT(*) FROM keys WHERE revoked IS NULL",
            "losses": "SELECT COUNT(*) FROM losses",
        }

        def work(connection: sqlite3.Connection) -> dict[str, int]:
            statement = "SELECT " + ", ".join(f"({query})" for query in queries.values())
            return dict(zip(queries, connection.execute(statement).fetchone(), strict=True))

        return await self._database.read("counts", work)
