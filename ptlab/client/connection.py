"""The way from a client to the backend in the same process: one event loop on a daemon thread, and the session on it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import logging
import threading
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn, TypeVar

from ptlab.client.refusals import refuse_to_pickle
from ptlab.errors import InvalidRequestError
from ptlab.futures import APIFuture

if TYPE_CHECKING:
    from ptlab.backend.backend import Backend

T = TypeVar("T")
SessionStatus = Literal["success", "errored", "interrupted"]
CLOSE_TIMEOUT_S: Final = 10.0

logger = logging.getLogger(__name__)


class BackendConnection:
    """A backend and the event loop it runs on. Thread-safe; several service clients may share one.

    Args:
        backend: its coroutines run on the loop that this object starts, and nowhere else.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._loop = asyncio.new_event_loop()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="ptlab-backend", daemon=True)
        self._thread.start()

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def thread(self) -> threading.Thread:
        """The backend's thread; waiting for a result there would wait for ever."""
        return self._thread

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> APIFuture[T]:
        """Run a coroutine on the backend's loop. Coroutines start in the order they were submitted.

        Raises: InvalidRequestError after close().
        """
        if self._closed:
            coroutine.close()
            raise InvalidRequestError("this connection to the backend is closed; make a new ServiceClient")
        return APIFuture(asyncio.run_coroutine_threadsafe(coroutine, self._loop), owner=self._thread)

    def submit_and_log(self, coroutine: Coroutine[Any, Any, None], what: str) -> None:
        """Run something that nobody waits for; a failure goes to the log. After close() there is nothing left to do."""
        if self._closed:
            coroutine.close()
            return

        def report(future: concurrent.futures.Future[None]) -> None:
            if not future.cancelled() and (error := future.exception()) is not None:
                logger.warning("%s failed: %s", what, error, exc_info=error)

        self.submit(coroutine).add_done_callback(report)

    def close(self) -> None:
        """Cancel what still runs and end the thread. The backend itself is closed by whoever made it, before this. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        if self._thread is not threading.current_thread():
            self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()

    def __reduce__(self) -> NoReturn:
        refuse_to_pickle("a client")


class Session:
    """What the clients made by one ServiceClient share. Nothing happens before the first use of `session_id`."""

    def __init__(
        self,
        open_connection: Callable[[], BackendConnection],
        *,
        user_metadata: Mapping[str, str] | None,
        project_id: str | None,
        display_name: str | None,
    ) -> None:
        self._open_connection = open_connection
        self._user_metadata = None if user_metadata is None else dict(user_metadata)
        self._project_id = project_id
        self._display_name = display_name
        self._lock = threading.RLock()
        self._connection: BackendConnection | None = None
        self._session_id: str | None = None
        self._closing: APIFuture[None] | None = None
        self._model_numbers = itertools.count()
        self._sampler_numbers = itertools.count()

    @property
    def connection(self) -> BackendConnection:
        with self._lock:
            if self._connection is None:
                self._connection = self._open_connection()
            return self._connection

    @property
    def session_id(self) -> str:
        """Creates the session at first use. Raises: InvalidRequestError after close()."""
        with self._lock:
            if self._closing is not None:
                raise InvalidRequestError("this ServiceClient is closed; make a new one")
            if self._session_id is None:
                created = self.connection.submit(
                    self.connection.backend.create_session(
                        user_metadata=self._user_metadata, project_id=self._project_id, display_name=self._display_name
                    )
                )
                self._session_id = created.result()
            return self._session_id

    def next_model(self) -> int:
        """The model_seq_id of a new model, 0, 1, 2 ...: its id is f"{session_id}:train:{model_seq_id}"."""
        return next(self._model_numbers)

    def next_sampler_id(self) -> str:
        return f"{self.session_id}:sample:{next(self._sampler_numbers)}"

    def close(self, status: SessionStatus, detail: str | None) -> APIFuture[None]:
        """Tell the backend how it ended. The first call counts; without a session there is nothing to tell."""
        with self._lock:
            if self._closing is None:
                if self._session_id is None or self.connection.closed:
                    nothing: concurrent.futures.Future[None] = concurrent.futures.Future()
                    nothing.set_result(None)
                    self._closing = APIFuture(nothing)
                else:
                    finish = self.connection.backend.finish_session(self._session_id, status=status, detail=detail)
                    self._closing = self.connection.submit(finish)
            return self._closing


async def settled(future: concurrent.futures.Future[Any]) -> None:
    """Wait on the backend's loop until a future is over, however it ends. Being cancelled meanwhile does not cancel it."""
    if future.done():
        return
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    future.add_done_callback(lambda _: loop.call_soon_threadsafe(over.set))
    await over.wait()
