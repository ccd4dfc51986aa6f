"""What every route may use, made once by create_app."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends
from starlette.requests import HTTPConnection

from ptlab.backend.access import Access
from ptlab.backend.backend import Backend
from ptlab.backend.requests import Requests
from ptlab.server.completions import Completions
from ptlab.server.settings import ServeSettings
from ptlab.server.signed_urls import SignedUrls
from ptlab.server.timeline import Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    backend: Backend
    requests: Requests
    access: Access
    settings: ServeSettings
    timeline: Timeline
    completions: Completions
    urls: SignedUrls
    stopping: asyncio.Event
    """Set when the server begins to stop: who waits for a result is told "not yet"."""


async def context_of(connection: HTTPConnection) -> Context:
    """The context of the app that serves this request. (async: FastAPI runs plain functions in threads.)"""
    context = connection.app.state.context
    assert isinstance(context, Context)
    return context


Here = Annotated[Context, Depends(context_of)]
