"""A log of HTTP requests for whoever looks for the difference between two servers: one JSON line a request."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import TextIO

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Trace:
    """ASGI middleware: appends {"time", "method", "path", "sdk_method", "status", "ms", "request_bytes", "response_bytes"} to a text file.

    Neither keys nor bodies are written.
    """

    def __init__(self, app: ASGIApp, stream: TextIO) -> None:
        self._app = app
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status, sizes = 0, {"request_bytes": 0, "response_bytes": 0}

        async def counted_receive() -> Message:
            message = await receive()
            sizes["request_bytes"] += len(message.get("body", b""))
            return message

        async def counted_send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            sizes["response_bytes"] += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, counted_receive, counted_send)
        finally:
            headers = dict(scope["headers"])
            line = {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "method": scope["method"],
                "path": scope["path"],
                "sdk_method": headers.get(b"x-sdk-method", b"").decode("latin-1"),
                "status": status,  # 0 = the client went away
                "ms": round((time.perf_counter() - started) * 1000, 2),
                **sizes,
            }
            self._stream.write(json.dumps(line) + "\n")
