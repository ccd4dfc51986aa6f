"""What a route does with a body before, and with a value after, its one call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from fastapi import Request, Response
from pydantic import BaseModel

from ptlab.errors import InvalidRequestError
from ptlab.server.bodies import decode_body
from ptlab.server.body_values import Body
from ptlab.server.operations import off_loop
from ptlab.server.settings import ServeSettings
from ptlab.server.unpacking import decompress_zstd
from ptlab.server.wire import encode_json

BodyT = TypeVar("BodyT", bound=Body)


async def read_body(request: Request, settings: ServeSettings) -> bytes:
    """The bytes of a request, decompressed. Raises: TooLargeError; InvalidRequestError for an encoding other than zstd."""
    body = await request.body()
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding == "zstd":
        return await off_loop(len(body), lambda: decompress_zstd(body, settings.max_decompressed_bytes))
    if encoding not in ("identity", ""):
        raise InvalidRequestError(f"content-encoding {encoding!r} is not served; send the body as it is, or compressed with zstd")
    return body


async def read_json(request: Request, settings: ServeSettings, kind: type[BodyT]) -> BodyT:
    return (await read_json_bytes(request, settings, kind))[0]


async def read_json_bytes(request: Request, settings: ServeSettings, kind: type[BodyT]) -> tuple[BodyT, bytes]:
    """(the body, its bytes: what is stored). Raises: InvalidRequestError naming the field that is wrong."""
    body = await read_body(request, settings)
    return await off_loop(len(body), lambda: decode_body(kind, body)), body


def answer(value: BaseModel | Mapping[str, Any], status: int = 200) -> Response:
    return Response(encode_json(value), status, media_type="application/json")


def nothing() -> Response:
    return Response(status_code=204)
