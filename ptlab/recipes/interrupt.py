"""Ctrl-C and SIGTERM inside a recipe: stop where nothing is half done, so that a valid checkpoint can be left behind."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequestedError(Exception):
    """The user asked for the end while work was under way that could be abandoned."""


class StopRequest:
    """Whether the run was asked to stop, and a way to do work that such a request abandons."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    def request(self) -> None:
        self._event.set()

    async def unless_requested(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which must have no effect that a checkpoint would miss (sampling has none, training has).

        Raises: StopRequestedError at once when the stop is requested; the work is cancelled.
        """
        task = asyncio.ensure_future(work)
        stopped = asyncio.ensure_future(self._event.wait())
        try:
            await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if self.requested:
                raise StopRequestedError
            return task.result()
        finally:
            task.cancel()
            stopped.cancel()
            await asyncio.gather(task, stopped, return_exceptions=True)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """A StopRequest that the first SIGINT or SIGTERM makes; the second one ends the process as if this were not here.

    On another thread than the main one, which signals do not reach, it stays unasked.
    """
    stop, loop = StopRequest(), asyncio.get_running_loop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def first() -> None:
        sys.stderr.write("\nstopping: the step under way is dropped or finished, then a checkpoint is written (again: quit at once)\n")
        sys.stderr.flush()
        stop.request()
        for number in SIGNALS:
            loop.remove_signal_handler(number)

    for number in SIGNALS:
        loop.add_signal_handler(number, first)
    try:
        yield stop
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)
