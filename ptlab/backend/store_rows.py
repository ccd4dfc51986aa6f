"""What the store keeps: one frozen row type per table, the schema, and how a row becomes columns.

Times are unix seconds (float); a JSON column holds what `json` can carry. `None` in a time column means "not yet".
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from ptlab.errors import NotFoundError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

State = Literal["pending", "done", "failed"]
AnswerKind = Literal["json", "proto"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRow:
    """A client's connection. `ordinal` counts sessions from 1 and is given by the store; 0 = not stored yet."""

    session_id: str
    ordinal: int = 0
    owner: str
    user_metadata: dict[str, Any] | None = None
    display_name: str | None = None
    project_id: str | None = None
    tags: list[str] = dataclasses.field(default_factory=list)
    created: float
    last_seen: float
    finished: str | None = None
    """How the client said it ended ("success", "errored", "interrupted"); None while it goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRow:
    """A trainable adapter. `step`: optimizer steps behind the weights last written; `failure`: why its creation failed."""

    model_id: str
    session_id: str
    owner: str
    base_model: str
    lora: dict[str, Any]
    """`LoraConfig.model_dump()`."""
    user_metadata: dict[str, Any] | None = None
    created: float
    step: int = 0
    from_path: str | None = None
    with_optimizer: bool = False
    failure: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerRow:
    """A sampling session: base model, saved weights (`model_path`) or an ephemeral save (`version` alone)."""

    sampling_session_id: str
    session_id: str
    owner: str
    base_model: str
    model_path: str | None = None
    version: dict[str, Any] | None = None
    """The adapter's name, version, path and probe; None = the base model."""
    created: float
    last_used: float
    client_counter: int = 0
    """Clones of the client that have joined; see `Store.next_client_counter`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRow:
    """A request that was accepted, and its answer. (scope, seq_id) is unique.

    `body` is None once nothing can need it, `body_sha256` stays (of the body, unless whoever accepts it says otherwise). A request that
    is not pending and whose `answer` is None has expired: it was answered, and the answer is gone.
    """

    request_id: str
    kind: str
    scope: str
    seq_id: int
    owner: str
    model_id: str | None = None
    body: bytes | None
    body_sha256: bytes = b""
    state: State = "pending"
    answer_kind: AnswerKind | None = None
    answer: bytes | None = None
    category: str | None = None
    created: float
    finished: float | None = None
    fetched: float | None = None
    """When a client last took the answer."""
    seconds: float = 0.0
    """How long the execution took."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceRow:
    """A sampled sequence. Tokens are int32, log-probabilities float32 (nats), both little-endian buffers."""

    sequence_id: str
    owner: str
    prompt_tokens: bytes
    tokens: bytes
    logprobs: bytes
    version: int
    """Optimizer steps behind the weights that sampled it."""
    created: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRow:
    """An API key; only the SHA-256 of it is kept."""

    key_id: str
    name: str
    owner: str
    sha256: bytes
    created: float
    revoked: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LossRow:
    """A custom loss: the names (and ranks) of its inputs and its graph as JSON."""

    loss_id: str
    session_id: str
    owner: str
    name: str
    inputs: list[Any]
    graph: dict[str, Any]
    created: float


def body_digest(body: bytes) -> bytes:
    """What `RequestRow.body_sha256` holds, to compare a repeated request with a stored one whose body is gone."""
    return hashlib.sha256(body).digest()


RowT = TypeVar("RowT", bound="DataclassInstance")


class Table(Generic[RowT]):
    """Writes and reads rows of one type; the columns are the row's fields under the same names.

    Args:
        key: column that names a row. what: the row in an error message ("model").
        source: what to select from, if the columns lie in several tables.
    """

    def __init__(
        self,
        name: str,
        row: type[RowT],
        *,
        key: str,
        what: str,
        json_columns: Sequence[str] = (),
        bool_columns: Sequence[str] = (),
        source: str = "",
    ) -> None:
        self.name = name
        self.columns = tuple(field.name for field in dataclasses.fields(row))
        self._row = row
        self._key = key
        self._what = what
        self._json = frozenset(json_columns)
        self._bool = frozenset(bool_columns)
        self._select = f"SELECT {', '.join(self.columns)} FROM {source or name}"

    def insert(self, connection: sqlite3.Connection, row: RowT, *, replace: bool = False, without: Sequence[str] = ()) -> int:
        """Returns the rowid. `without`: columns that the database fills. Raises: sqlite3.IntegrityError if the key is taken."""
        columns = [column for column in self.columns if column not in without]
        marks = ", ".join("?" * len(columns))
        verb = "INSERT OR REPLACE" if replace else "INSERT"
        values = [self._encode(column, _value(row, column)) for column in columns]
        cursor = connection.execute(f"{verb} INTO {self.name} ({', '.join(columns)}) VALUES ({marks})", values)
        assert cursor.lastrowid is not None  # it was an INSERT
        return cursor.lastrowid

    def update(self, connection: sqlite3.Connection, key: str, changes: Mapping[str, Any]) -> None:
        """Raises: NotFoundError if there is no such row; TypeError if a change names no field."""
        unknown = [column for column in changes if column not in self.columns]
        if unknown:
            raise TypeError(f"{self._what} {key}: {', '.join(unknown)} cannot be changed; fields are {', '.join(self.columns)}")
        if not changes:
            return
        assignments = ", ".join(f"{column} = ?" for column in changes)
        values = [self._encode(column, value) for column, value in changes.items()]
        cursor = connection.execute(f"UPDATE {self.name} SET {assignments} WHERE {self._key} = ?", [*values, key])
        if cursor.rowcount == 0:
            raise self.not_found(key)

    def select(self, connection: sqlite3.Connection, clause: str = "", parameters: Sequence[Any] = ()) -> list[RowT]:
        """Rows that `clause` (WHERE ..., ORDER BY ...) chooses."""
        found = connection.execute(f"{self._select} {clause}", parameters).fetchall()
        return [self._decode(values) for values in found]

    def get(self, connection: sqlite3.Connection, key: str) -> RowT | None:
        rows = self.select(connection, f"WHERE {self._key} = ?", [key])
        return rows[0] if rows else None

    def not_found(self, key: str) -> NotFoundError:
        return NotFoundError(f"no {self._what} {key}")

    def _encode(self, column: str, value: Any) -> Any:
        if value is not None and column in self._json:
            return json.dumps(value, separators=(",", ":"))
        return value

    def _decode(self, values: Sequence[Any]) -> RowT:
        fields: dict[str, Any] = dict(zip(self.columns, values, strict=True))
        for column in self._json:
            if fields[column] is not None:
                fields[column] = json.loads(fields[column])
        for column in self._bool:
            fields[column] = bool(fields[column])
        return self._row(**fields)


def _value(row: DataclassInstance, column: str) -> Any:
    return getattr(row, column)  # column is one of its fields


SESSIONS = Table("sessions", SessionRow, key="session_id", what="session", json_columns=["user_metadata", "tags"])
MODELS = Table("models", ModelRow, key="model_id", what="model", json_columns=["lora", "user_metadata"], bool_columns=["with_optimizer"])
SAMPLERS = Table("samplers", SamplerRow, key="sampling_session_id", what="sampling session", json_columns=["version"])
REQUESTS = Table(
    "requests",
    RequestRow,
    key="request_id",
    what="request",
    source="requests LEFT JOIN request_bodies USING (number) LEFT JOIN request_answers USING (number)",
)
SEQUENCES = Table("sequences", SequenceRow, key="sequence_id", what="sampled sequence")
KEYS = Table("keys", KeyRow, key="key_id", what="key")
LOSSES = Table("losses", LossRow, key="loss_id", what="custom loss", json_columns=["inputs", "graph"])

# One entry per schema version, never edited once released: a store of version n runs the entries from n on.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE sessions (
            ordinal INTEGER PRIMARY KEY AUTOINCREMENT, session_id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, user_metadata TEXT,
            display_name TEXT, project_id TEXT, tags TEXT NOT NULL, created REAL NOT NULL, last_seen REAL NOT NULL, finished TEXT)""",
        """CREATE TABLE models (
            model_id TEXT PRIMARY KEY, session_id TEXT NOT NULL, owner TEXT NOT NULL, base_model TEXT NOT NULL, lora TEXT NOT NULL,
            user_metadata TEXT, created REAL NOT NULL, step INTEGER NOT NULL, from_path TEXT, with_optimizer INTEGER NOT NULL,
            failure TEXT)""",
        """CREATE TABLE samplers (
            sampling_session_id TEXT PRIMARY KEY, session_id TEXT NOT NULL, owner TEXT NOT NULL, base_model TEXT NOT NULL,
            model_path TEXT, version TEXT, created REAL NOT NULL, last_used REAL NOT NULL, client_counter INTEGER NOT NULL)""",
        # Bodies and answers lie apart: SQLite writes a whole record anew when a field grows, 5 MB for a changed state.
        """CREATE TABLE requests (
            number INTEGER PRIMARY KEY, request_id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, scope TEXT NOT NULL,
            seq_id INTEGER NOT NULL, owner TEXT NOT NULL, model_id TEXT, body_sha256 BLOB NOT NULL, state TEXT NOT NULL,
            answer_kind TEXT, category TEXT, created REAL NOT NULL, finished REAL, fetched REAL, seconds REAL NOT NULL,
            UNIQUE (scope, seq_id))""",
        "CREATE TABLE request_bodies (number INTEGER PRIMARY KEY, body BLOB NOT NULL)",
        "CREATE TABLE request_answers (number INTEGER PRIMARY KEY, answered REAL NOT NULL, answer BLOB NOT NULL)",
        "CREATE INDEX request_answers_answered ON request_answers (answered)",
        "CREATE INDEX requests_of_model ON requests (model_id, seq_id) WHERE model_id IS NOT NULL",
        "CREATE INDEX requests_state ON requests (state, created)",
        "CREATE INDEX requests_finished ON requests (finished) WHERE state <> 'pending'",
        """CREATE TABLE sequences (
            sequence_id TEXT PRIMARY KEY, owner TEXT NOT NULL, prompt_tokens BLOB NOT NULL, tokens BLOB NOT NULL,
            logprobs BLOB NOT NULL, version INTEGER NOT NULL, created REAL NOT NULL)""",
        "CREATE INDEX sequences_created ON sequences (created)",
        """CREATE TABLE keys (
            key_id TEXT PRIMARY KEY, name TEXT NOT NULL, owner TEXT NOT NULL, sha256 BLOB NOT NULL UNIQUE, created REAL NOT NULL,
            revoked REAL)""",
        "CREATE UNIQUE INDEX keys_live_name ON keys (name) WHERE revoked IS NULL",
        """CREATE TABLE losses (
            loss_id TEXT PRIMARY KEY, session_id TEXT NOT NULL, owner TEXT NOT NULL, name TEXT NOT NULL, inputs TEXT NOT NULL,
            graph TEXT NOT NULL, created REAL NOT NULL)""",
    ),
)
SCHEMA_VERSION = len(MIGRATIONS)
