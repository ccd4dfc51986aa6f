"""APIFuture: the answer to a request that is already on its way."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Generator
from typing import Any, TypeVar

T = TypeVar("T")


class APIFuture(concurrent.futures.Future[T]):
    """The result of an operation, to be had by `.result()` from any thread or by `await` from any event loop, as often as wanted.

    It is a `concurrent.futures.Future` too, so `concurrent.futures.wait`, `as_completed` and callbacks take it.
    A timeout ends the waiting only. Cancelling it, or the task that awaits it, cancels the operation.

    Args:
        source: the future of the running operation; this one takes its outcome, and cancels it when cancelled.
        convert: makes the result of this future from that of source; an exception it raises becomes the outcome.
        owner: the thread that carries out the operation. `.result()` there would wait for itself, and is refused.
        cancels_source: False = cancelling this future gives up the wait, and the operation goes on.
    """

    def __init__(
        self,
        source: concurrent.futures.Future[Any],
        *,
        convert: Callable[[Any], T] | None = None,
        owner: threading.Thread | None = None,
        cancels_source: bool = True,
    ) -> None:
        super().__init__()
        self._owner = owner
        self._convert = convert
        self._announced_cancel = False
        self._source: concurrent.futures.Future[Any] | None = source if cancels_source else None
        source.add_done_callback(_Link(self))

    def result(self, timeout: float | None = None) -> T:
        """Wait for the result. Inside a running event loop that loop stands still meanwhile; `await` does not have this effect.

        Raises: what the operation raised; TimeoutError after `timeout` seconds, the operation goes on;
            concurrent.futures.CancelledError if it was cancelled.
        """
        if self._owner is threading.current_thread() and not self.done():
            raise RuntimeError(
                "result() was called on the thread that produces the result (in a done-callback?), so it would wait for ever; "
                "await the future, or call result() on a thread of your own"
            )
        return super().result(timeout)

    async def result_async(self, timeout: float | None = None) -> T:
        """As `await`. Raises: TimeoutError after `timeout` seconds, the operation goes on."""
        if not self.done():
            loop = asyncio.get_running_loop()
            finished = asyncio.Event()

            def wake(_: concurrent.futures.Future[T]) -> None:
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits there any more
                    loop.call_soon_threadsafe(finished.set)

            self.add_done_callback(wake)
            try:
                async with asyncio.timeout(timeout):
                    await finished.wait()
            except asyncio.CancelledError:
                self.cancel()
                raise
        if self.cancelled():
            raise asyncio.CancelledError
        return super().result()

    def __await__(self) -> Generator[Any, None, T]:
        return self.result_async().__await__()

    async def coroutine(self) -> T:
        """This future as a coroutine, for what takes no other awaitable, like `asyncio.create_task`."""
        return await self

    def future(self) -> concurrent.futures.Future[T]:
        """The `concurrent.futures.Future` of the operation: this object."""
        return self

    def cancel(self) -> bool:
        """Cancel the operation. Returns: False if it had finished before."""
        source = self._source
        if not super().cancel():
            return False
        with self._condition:
            announce, self._announced_cancel = not self._announced_cancel, True
        if announce:
            self.set_running_or_notify_cancel()  # concurrent.futures.wait counts a cancelled future as done only after this
        if source is not None:
            source.cancel()
        return True

    def _take(self, source: concurrent.futures.Future[Any]) -> None:
        """Take the outcome of source; without effect if this future was cancelled before."""
        self._source = None
        if source.cancelled():
            self.cancel()
            return
        error = source.exception()
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            if error is not None:
                self.set_exception(error)
                return
            try:
                value = source.result() if self._convert is None else self._convert(source.result())
            except Exception as err:  # not swallowed: it is the outcome
                self.set_exception(err)
            else:
                self.set_result(value)


class _Link:
    """A done-callback that lets go of its target once it has run: futures keep their callbacks for ever, and with a cycle between two
    futures their results (and the sampling sessions behind them) would wait for the garbage collector."""

    def __init__(self, target: APIFuture[Any]) -> None:
        self._target: APIFuture[Any] | None = target

    def __call__(self, source: concurrent.futures.Future[Any]) -> None:
        target, self._target = self._target, None
        if target is not None:
            target._take(source)
