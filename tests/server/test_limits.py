"""Bodies and connections beyond the limits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message

from ptlab.server.limits import OpenRequestsLimit

MAX = 10_000


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, serving_of_module: Callable[..., Any]) -> Iterator[Any]:
    with serving_of_module(tmp_path_factory.mktemp("small"), max_body_bytes=MAX) as server:
        yield server


def chunks(num_bytes: int) -> Iterator[bytes]:
    for start in range(0, num_bytes, 1000):
        yield b" " * min(1000, num_bytes - start)


@pytest.mark.parametrize("path", ["forward_backward", "create_session", "asample", "retrieve_future"])
def test_a_body_over_the_limit_is_413_with_and_without_its_length(small: Any, path: str) -> None:
    with small.client() as http:
        for content in (b" " * (MAX + 1), chunks(MAX + 1), b" " * 5 * MAX, b" " * 50_000_000):
            response = http.post(path, content=content)
            assert response.status_code == 413, response.text
            assert str(MAX) in response.json()["error"] and response.json()["category"] == "user"
        # exactly as much as is allowed is looked at
        for allowed in (b" " * MAX, chunks(MAX)):
            assert http.post(path, content=allowed).status_code == 400
        assert http.get("healthz").status_code == 200


def test_a_declared_length_far_beyond_the_limit_is_not_waited_for(small: Any) -> None:
    async def main() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(small.url.rpartition(":")[2]))
        writer.write(b"POST /api/v1/create_session HTTP/1.1\r\nhost: x\r\nx-api-key: k\r\ncontent-length: 100000000000\r\n\r\n{")
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        return answer

    answer = asyncio.run(main())
    assert answer.startswith(b"HTTP/1.1 413") and b"connection: close" in answer.lower()


def test_an_unknown_key_is_told_before_its_body_is_read(tmp_path: Path, serve: Callable[..., Any]) -> None:
    with serve(tmp_path) as server:
        server.call(server.app.state.context.access.create_key("ada"))

        async def main() -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
            head = b"POST /api/v1/forward_backward HTTP/1.1\r\nhost: x\r\nx-api-key: k\r\ntransfer-encoding: chunked\r\n\r\n"
            writer.write(head + b"3\r\nabc\r\n")  # and no end
            answer = await asyncio.wait_for(reader.read(100), 10)
            writer.close()
            return answer

        assert asyncio.run(main()).startswith(b"HTTP/1.1 401")


def test_more_open_requests_than_allowed_are_429() -> None:
    async def main() -> list[int]:
        gate = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await gate.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})

        limit = OpenRequestsLimit(app, max_open=2)
        statuses: list[int] = []

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        async def receive() -> Message:
            return {"type": "http.request"}

        scope = {"type": "http", "path": "/", "headers": []}
        waiting = [asyncio.create_task(limit(scope, receive, send)) for _ in range(2)]
        await asyncio.sleep(0)
        await limit(scope, receive, send)
        gate.set()
        await asyncio.gather(*waiting)
        await limit(scope, receive, send)  # there is room again
        return statuses

    assert asyncio.run(main()) == [429, 200, 200, 200]
