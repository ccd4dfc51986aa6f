"""The order of one model's requests: strictly by seq_id, one at a time, waiting for gaps, and each at most once.

A client numbers its requests 0 (creation), 1, 2, 3 ... They may arrive in any order and more than once (a network retries). Here each
runs when every smaller number has finished, whether it succeeded or failed, and a repeated number gets the first answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ptlab.errors import OrderError

T = TypeVar("T")
Operation = Callable[[], Awaitable[Any]]


@dataclass(slots=True)
class _Entry:
    fingerprint: str
    answer: asyncio.Future[Any]
    operation: Operation | None  # None once it has been started


@dataclass(slots=True)
class Sequencer:
    """Runs the operations of one model. Belongs to one event loop.

    Args:
        remember: how many finished answers are kept for requests that come again.
    """

    remember: int = 256
    _next: int = 0
    _running: asyncio.Task[None] | None = None
    _entries: dict[int, _Entry] = field(default_factory=dict)
    _passed_over: set[int] = field(default_factory=set)
    _exclusive: asyncio.Lock = field(default_factory=asyncio.Lock)

    @classmethod
    def after(cls, last: int, finished: Iterable[int]) -> Sequencer:
        """A sequencer that goes on where an earlier process stopped: all numbers up to `last`, and these, have had their turn."""
        sequencer = cls(_next=last + 1)
        sequencer.pass_over(finished)
        return sequencer

    @property
    def next_seq_id(self) -> int:
        """The number whose turn it is, or that is being waited for."""
        return self._next

    @property
    def gap(self) -> list[int]:
        """The numbers that have not come although requests wait for them; empty while something runs."""
        waiting = [n for n in self._entries if n >= self._next]
        if self._running is not None or not waiting:
            return []
        return [n for n in range(self._next, min(waiting)) if n not in self._passed_over]

    async def run(self, seq_id: int, fingerprint: str, operation: Operation) -> Any:
        """The operation's result, once its turn has come. Cancelling the caller does not cancel the operation: it is part of the order.

        Raises: OrderError if seq_id was used for another request, or so long ago that its answer is no longer kept.
        """
        entry = self._entries.get(seq_id)
        if entry is None:
            if seq_id < self._next or seq_id in self._passed_over:
                raise OrderError(
                    f"seq_id {seq_id} was answered long ago (now at {self._next}) and its answer is no longer kept; use a new seq_id"
                )
            answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            answer.add_done_callback(_retrieved)
            entry = self._entries[seq_id] = _Entry(fingerprint, answer, operation)
            self._start_next()
        elif entry.fingerprint != fingerprint:
            raise OrderError(
                f"seq_id {seq_id} was used before for {entry.fingerprint}, now for {fingerprint}; every request needs its own seq_id"
            )
        return await asyncio.shield(entry.answer)

    async def between(self, operation: Callable[[int], Awaitable[T]]) -> T:
        """Run something while no request runs; told the highest number that has had its turn (-1 = none)."""
        async with self._exclusive:
            return await operation(self._next - 1)

    def pass_over(self, seq_ids: Iterable[int]) -> None:
        """Numbers that will not come, or have had their turn in an earlier process: nobody waits for them."""
        self._passed_over.update(n for n in seq_ids if n >= self._next and n not in self._entries)
        if self._running is None:
            self._start_next()

    def _start_next(self) -> None:
        while self._next in self._passed_over:
            self._passed_over.remove(self._next)
            self._next += 1
        if self._running is None and self._next in self._entries:
            self._running = asyncio.create_task(self._run_one(self._entries[self._next]))

    async def _run_one(self, entry: _Entry) -> None:
        operation, entry.operation = entry.operation, None
        assert operation is not None
        async with self._exclusive:
            try:
                entry.answer.set_result(await operation())
            except asyncio.CancelledError:
                entry.answer.cancel()
                raise
            except Exception as err:  # not swallowed: it is the answer
                entry.answer.set_exception(err)
            finally:
                self._entries.pop(self._next - self.remember, None)
                self._next += 1
        self._running = None
        self._start_next()


def _retrieved(answer: asyncio.Future[Any]) -> None:
    """Mark a failure as seen: a caller that went away must not cause a warning about it."""
    if not answer.cancelled():
        answer.exception()
