"""Results of accepted requests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Final, TypeVar

from fastapi import APIRouter, Request, Response
from starlette.background import BackgroundTask

from ptlab.server.auth import Owner
from ptlab.server.bodies import CancelFutureBody, RetrieveFutureBody, RetrieveFuturesBody
from ptlab.server.context import Context, Here
from ptlab.server.intake import answer, nothing, read_json

router = APIRouter()
T = TypeVar("T")
MEDIA_TYPES: Final = {"json": "application/json", "proto": "application/x-protobuf"}


@router.post("/retrieve_future")
async def retrieve_future(request: Request, here: Here, owner: Owner) -> Response:
    """The result; or 408 if there is none after a while, which the SDK asks again without a word."""
    body = await read_json(request, here.settings, RetrieveFutureBody)
    result = await unless_left(request, here, here.requests.wait(body.request_id, owner, here.settings.long_poll_s))
    if result is None:
        return answer({"queue_state": "active"}, 408)
    if body.allow_metadata_only and len(result.payload) > here.settings.inline_result_bytes:
        return answer({"status": "complete_metadata", "response_payload_size": len(result.payload)})
    # a failed request is a result too: 200, and the body says so
    return Response(result.payload, media_type=MEDIA_TYPES[result.kind], background=BackgroundTask(here.requests.fetched, body.request_id))


@router.post("/retrieve_futures")
async def retrieve_futures(request: Request, here: Here, owner: Owner) -> Response:
    """Which of a sampling client's requests are ready."""
    body = await read_json(request, here.settings, RetrieveFuturesBody)
    await here.access.check_sampler(owner, body.target.sampling_session_id)
    timeout_s = here.settings.long_poll_s if body.timeout is None else min(body.timeout, here.settings.long_poll_s)
    ready = await unless_left(request, here, here.completions.since(owner, body, timeout_s))
    return answer(ready or {"completions": [], "cursor": body.prev_cursor})


@router.post("/cancel_future")
async def cancel_future(request: Request, here: Here, owner: Owner) -> Response:
    body = await read_json(request, here.settings, CancelFutureBody)
    await here.requests.cancel(body.request_id, owner)
    return nothing()


async def unless_left(request: Request, here: Context, waiting: Awaitable[T]) -> T | None:
    """What is waited for; None as soon as the client has gone, or the server is stopping."""
    wanted = asyncio.ensure_future(waiting)
    others = [asyncio.ensure_future(_left(request)), asyncio.ensure_future(here.stopping.wait())]
    try:
        await asyncio.wait([wanted, *others], return_when=asyncio.FIRST_COMPLETED)
        return wanted.result() if wanted.done() else None
    finally:
        for task in (wanted, *others):
            task.cancel()


async def _left(request: Request) -> None:
    """Returns when the client closes its connection; its body has been read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
