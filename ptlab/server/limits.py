"""Limits that hold before any route runs: how large a body may be, and how many requests may be open at once."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ptlab.errors import BusyError, PtlabError
from ptlab.server.errors import refusal, status_of
from ptlab.server.unpacking import TooLargeError

DRAIN_FACTOR = 4
"""A body up to this many times too large is read and thrown away before the refusal: a client that is still sending often does not
read its answer."""


class BodyLimit:
    """ASGI middleware: refuses bodies above `max_bytes` with 413, whether they say their length (Content-Length) or not (chunked).

    Nothing is buffered here; a body is counted while the route reads it.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = _declared_length(scope)
        if declared > self._max_bytes:
            if declared <= DRAIN_FACTOR * self._max_bytes:
                await _drain(receive)
            await _refuse(self._too_large(f"{declared} bytes"), scope, receive, send)
            return
        received, exceeded, answered = 0, False, False

        async def counted() -> Message:
            nonlocal received, exceeded
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._max_bytes:
                    exceeded = True
                    raise self._too_large("more than that")
            return message

        async def answer(message: Message) -> None:
            nonlocal answered
            if not exceeded:
                await send(message)
            elif not answered:  # whatever the route made of it, this is why it failed
                answered = True
                await _refuse(self._too_large("more than that"), scope, receive, send)

        await self._app(scope, counted, answer)

    def _too_large(self, found: str) -> TooLargeError:
        return TooLargeError(
            f"the request body has {found}; this server takes at most {self._max_bytes} bytes: send fewer datums at a time"
        )


class OpenRequestsLimit:
    """ASGI middleware: answers 429 beyond `max_open` requests that are being worked on or waited for."""

    def __init__(self, app: ASGIApp, max_open: int) -> None:
        self._app = app
        self._max_open = max_open
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._open >= self._max_open:
            await _refuse(BusyError(f"{self._open} requests are open, the most this server takes; try again"), scope, receive, send)
            return
        self._open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._open -= 1


def _declared_length(scope: Scope) -> int:
    """Content-Length; 0 if it is not given. The HTTP parser has refused what is no number."""
    return next((int(value) for name, value in scope["headers"] if name == b"content-length"), 0)


async def _drain(receive: Receive) -> None:
    more = True
    while more:
        message = await receive()
        more = message["type"] == "http.request" and message.get("more_body", False)


async def _refuse(error: PtlabError, scope: Scope, receive: Receive, send: Send) -> None:
    status, headers = status_of(error)
    # the rest of a body that is too large is not read
    headers = {**headers, "connection": "close"} if isinstance(error, TooLargeError) else headers
    await refusal(scope["path"], status, error.message, error.category, headers)(scope, receive, send)
