"""Requests that outlive a connection, and this process: accepted at once, run in their order, their answers kept.

A remote client posts a request, gets an id, and polls. Between the two anything may break. What is promised:
- accepted means stored: a request whose id the client holds is run once, also if the server is killed before, during or after it;
- the same (scope, seq_id) with the same body is the same request, and has one answer;
- an optimizer step is applied exactly once: the memory of a killed process is gone, and models.py runs the journal again from the newest
  snapshot, answered requests without changing their answers, unanswered ones to get theirs.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ptlab.backend.backend import Backend
from ptlab.backend.store import RequestRow, Store
from ptlab.backend.store_rows import body_digest
from ptlab.errors import BusyError, GoneError, InvalidRequestError, NotFoundError, OrderError, PtlabError, StoreError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request as it came. `scope` is what its seq_id counts in: a model, a sampling session, ..."""

    kind: str
    scope: str
    seq_id: int
    owner: str
    body: bytes
    model_id: str | None = None
    """Set for requests that a model runs in order, and replays after a crash."""
    at_once: bool = False
    """It changes nothing, so it may run before the disk has it (its answer waits for that)."""
    identity: bytes = b""
    """What tells it from another request under the same number; empty = the body. The SDK's retries may differ in a field or two."""
    decoded: Any = field(default=None, compare=False, repr=False)
    """The body as values, where whoever accepted it has them already; a replay has only the body."""

    @property
    def request_id(self) -> str:
        return f"{self.scope}:{self.kind}:{self.seq_id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the client gets: a JSON or protobuf body. A failure is a JSON body {"error", "category"}."""

    kind: Literal["json", "proto"]
    payload: bytes
    failure: str | None = None
    """Category ("user", "server") of a failed request."""

    @classmethod
    def failed(cls, error: BaseException) -> Answer:
        category = error.category if isinstance(error, PtlabError) else "server"
        message = error.message if isinstance(error, PtlabError) else f"{type(error).__name__}: {error}"
        return cls(kind="json", payload=json.dumps({"error": message, "category": category}).encode(), failure=category)


@dataclass(slots=True)
class _Live:
    """A request of this process, until its answer is in the store and was fetched."""

    request: Request
    accepted: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once the request is in the store; nothing is stored of its answer before."""
    done: asyncio.Event = field(default_factory=asyncio.Event)
    answer: Answer | None = None
    task: asyncio.Task[None] | None = None
    cancelled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """How much may wait."""

    max_pending: int = 16384
    max_pending_per_owner: int = 4096
    max_pending_bytes: int = 1 << 30
    """Of bodies."""
    max_ahead: int = 100_000
    """How far a request's number may be ahead of the one whose turn it is."""


class Requests:
    """See the module text. Belongs to the backend's event loop.

    Args:
        execute: runs one request to its answer: decode, one backend coroutine, encode.
        on_finished: told kind, outcome ("ok", "user", "server") and seconds of every request that ends.
    """

    def __init__(
        self,
        backend: Backend,
        store: Store,
        execute: Callable[[Request], Awaitable[Answer]],
        limits: RequestLimits,
        on_finished: Callable[[str, str, float], None] = lambda kind, outcome, seconds: None,
    ) -> None:
        self._backend = backend
        self._store = store
        self._execute = execute
        self._limits = limits
        self._on_finished = on_finished
        self._live: dict[str, _Live] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._pending = Counter[str]()  # by owner
        self._pending_bytes = 0
        self._closing = False
        backend.models.settled = self._settled

    async def recover(self) -> None:
        """Go on with what an earlier process accepted and did not answer."""
        rows = await self._store.pending()
        for row in rows:
            self._take_up(row)
        if rows:
            logger.warning("going on with %d requests that were accepted before the last stop", len(rows))

    async def close(self) -> None:
        """Stop running requests. What has no answer stays in the store and is run by the next process."""
        self._closing = True
        for live in self._live.values():
            if live.task is not None and not live.done.is_set():  # after its answer a task may be writing a snapshot, which ends in peace
                live.task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def accept(self, request: Request) -> str:
        """Store the request and start it. Returns its id; for one that came before, the id it has.

        Raises: BusyError if too much is waiting; OrderError if its number was used for another request.
        """
        early = None
        if request.request_id not in self._live:
            self._refuse_if_far(request)
            self._refuse_if_full(request)
            if request.at_once:
                early = self._start(request)
        digest = body_digest(request.identity or request.body)
        self._count(request, +1)
        try:
            row = await self._store.accept(
                RequestRow(
                    request_id=request.request_id,
                    kind=request.kind,
                    scope=request.scope,
                    seq_id=request.seq_id,
                    owner=request.owner,
                    model_id=request.model_id,
                    body=request.body,
                    body_sha256=digest,
                    created=time.time(),
                )
            )
        except BaseException:
            self._abandon(early)
            raise
        finally:
            self._count(request, -1)
        is_same = (row.request_id, row.body_sha256) == (request.request_id, digest)
        if not is_same or row.state != "pending":  # its number was used, or it came before and has its answer
            self._abandon(early)
        if not is_same:
            raise OrderError(
                f"number {request.seq_id} of {request.scope} was used before, for a {row.kind} request with another content; "
                f"every request needs a number of its own"
            )
        if row.state == "pending":
            live = self._live.get(request.request_id) or self._start(request)  # two copies may have come at once
            live.accepted.set()
        return request.request_id

    def _abandon(self, live: _Live | None) -> None:
        """Forget a request that was started before the store had it, and will not have it."""
        if live is not None and live.task is not None:
            self._live.pop(live.request.request_id, None)
            live.task.cancel()

    def _refuse_if_far(self, request: Request) -> None:
        """A number that the numbers before it can hardly reach is a mistake, and its gap would be dear to keep."""
        known = self._backend.models.by_id.get(request.model_id or "")
        reached = known.sequencer.next_seq_id if known else 0
        if request.model_id is not None and request.seq_id > reached + self._limits.max_ahead:
            raise InvalidRequestError(
                f"number {request.seq_id} of {request.scope} is more than {self._limits.max_ahead} ahead of {reached}, "
                f"which is waited for; a model's requests are numbered 1, 2, 3 ..."
            )

    def _refuse_if_full(self, request: Request) -> None:
        if request.model_id is not None and request.model_id in self._backend.models.by_id:
            sequencer = self._backend.models.get(request.model_id).sequencer
            if request.seq_id <= sequencer.next_seq_id:
                return  # others wait for this one
        limits, waiting = self._limits, self._pending
        if waiting[request.owner] >= limits.max_pending_per_owner or waiting.total() >= limits.max_pending:
            raise BusyError(f"{waiting[request.owner]} requests of this key and {waiting.total()} in all are waiting; send it again later")
        if self._pending_bytes + len(request.body) > limits.max_pending_bytes:
            raise BusyError(f"{self._pending_bytes >> 20} MiB of requests are waiting; send it again later")

    def _count(self, request: Request, change: int) -> None:
        self._pending[request.owner] += change
        self._pending_bytes += change * len(request.body)

    def _start(self, request: Request) -> _Live:
        live = self._live[request.request_id] = _Live(request)
        self._count(request, +1)
        live.task = asyncio.create_task(self._run(live))
        self._tasks.add(live.task)
        live.task.add_done_callback(self._tasks.discard)
        return live

    def _take_up(self, row: RequestRow) -> None:
        """Start a stored request (again)."""
        assert row.body is not None  # a pending request keeps its body
        request = Request(kind=row.kind, scope=row.scope, seq_id=row.seq_id, owner=row.owner, body=row.body, model_id=row.model_id)
        self._start(request).accepted.set()

    async def _run(self, live: _Live) -> None:
        request, began = live.request, time.perf_counter()
        try:
            answer = await self._answer(live)
            await live.accepted.wait()
            if request.model_id in self._backend.models.by_id:  # one that failed before its turn must not be waited for
                self._backend.models.get(request.model_id).sequencer.pass_over([request.seq_id])
            seconds = time.perf_counter() - began
            await self._store.finish(
                request.request_id,
                state="failed" if answer.failure else "done",
                answer_kind=answer.kind,
                answer=answer.payload,
                category=answer.failure,
                seconds=seconds,
            )
            live.answer = answer
            self._on_finished(request.kind, answer.failure or "ok", seconds)
        except StoreError:  # the sequencer remembers the answer: asking again does not run it again
            logger.exception("the answer of %s could not be stored; the next poll tries again", request.request_id)
            del self._live[request.request_id]
        finally:
            self._count(request, -1)
            live.done.set()
        if request.model_id in self._backend.models.by_id:
            try:
                await self._backend.models.save_snapshot_if_due(request.model_id)
            except (PtlabError, OSError):
                logger.exception("no snapshot of %s could be written; a restart would replay more", request.model_id)

    async def _answer(self, live: _Live) -> Answer:
        try:
            return await self._execute(live.request)
        except asyncio.CancelledError:
            if not live.cancelled:
                raise  # the server stops: the request stays pending
            return Answer.failed(InvalidRequestError("cancelled by the client"))
        except PtlabError as err:
            return Answer.failed(err)
        except Exception as err:  # not swallowed: it is this request's answer, and must not take the server's other clients down
            logger.exception("%s failed", live.request.request_id)
            return Answer.failed(err)

    async def _settled(self, model_id: str) -> None:
        """Wait until every request that has had its turn on the model has its answer in the store."""
        sequencer = self._backend.models.get(model_id).sequencer
        for live in list(self._live.values()):
            if live.request.model_id == model_id and live.request.seq_id < sequencer.next_seq_id:
                await live.done.wait()

    async def wait(self, request_id: str, owner: str, timeout_s: float) -> Answer | None:
        """The answer, or None if there is none within the time.

        Raises: NotFoundError for a request that is unknown, or another owner's; GoneError for an answer no longer kept.
        """
        live = self._live.get(request_id)
        if live is not None and live.request.owner == owner:
            try:
                await asyncio.wait_for(live.done.wait(), timeout_s)
            except TimeoutError:
                return None
            if live.answer is not None:
                return live.answer
        row = await self._store.request(request_id)
        if row is None or row.owner != owner:
            raise NotFoundError(f"no request {request_id!r}")
        if row.state == "pending":
            if request_id not in self._live and not self._closing:
                self._take_up(row)
            return None
        if row.answer is None or row.answer_kind is None:
            raise GoneError(f"the answer of request {request_id} is no longer kept; it was ready at {row.finished:.0f} (unix time)")
        return Answer(kind=row.answer_kind, payload=row.answer, failure=row.category)

    async def fetched(self, request_id: str) -> None:
        """The client has the answer, most likely: from now on it lives in the store alone, for its time of grace."""
        self._live.pop(request_id, None)
        await self._store.fetched(request_id, time.time())

    async def finished_since(self, scope: str, owner: str, known: set[str], timeout_s: float) -> Mapping[str, Answer]:
        """Answers of a scope's requests that are ready and not in `known`; waits for the first one."""
        mine = {i: live for i, live in self._live.items() if live.request.scope == scope and live.request.owner == owner and i not in known}
        if mine and not any(live.done.is_set() for live in mine.values()):
            waits = [asyncio.ensure_future(live.done.wait()) for live in mine.values()]
            await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
        return {i: live.answer for i, live in mine.items() if live.answer is not None}

    async def cancel(self, request_id: str, owner: str) -> None:
        """Abort a request of a sampling session; requests of a model are part of its order and run. Unknown ones are none of the caller's
        business any more. Idempotent."""
        live = self._live.get(request_id)
        if live is None or live.request.owner != owner or live.request.model_id is not None or live.done.is_set():
            return
        live.cancelled = True
        if live.task is not None:
            live.task.cancel()

    def is_using(self, model_id: str) -> bool:
        """Whether a request of the model waits or runs."""
        return any(live.request.model_id == model_id and not live.done.is_set() for live in self._live.values())

    def pending_by_kind(self) -> dict[str, int]:
        """How many requests wait or run, for metrics."""
        return dict(Counter(live.request.kind for live in self._live.values() if not live.done.is_set()))

    def drop_unfetched(self, keep: int = 4096) -> None:
        """Answers that nobody fetches live in the store alone; here at most `keep` of them stay."""
        ready = [request_id for request_id, live in self._live.items() if live.done.is_set()]
        for request_id in ready[: max(0, len(ready) - keep)]:
            del self._live[request_id]
