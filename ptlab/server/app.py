"""The HTTP face of a backend: the Tinker protocol below /api/v1, OpenAI's below /v1, and /metrics.

A route reads a body, makes one call of the backend (or of backend/requests.py, where the answer comes later), and writes the answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TextIO

from fastapi import APIRouter, FastAPI

from ptlab.backend.access import Access
from ptlab.backend.backend import Backend
from ptlab.backend.requests import Requests
from ptlab.server import errors
from ptlab.server.completions import Completions
from ptlab.server.context import Context
from ptlab.server.limits import BodyLimit, OpenRequestsLimit
from ptlab.server.routes import catalog, downloads, futures, sampling, service, training
from ptlab.server.settings import ServeSettings
from ptlab.server.signed_urls import SignedUrls
from ptlab.server.timeline import Timeline
from ptlab.server.trace import Trace


def create_app(
    backend: Backend,
    requests: Requests,
    access: Access,
    settings: ServeSettings,
    timeline: Timeline,
    extra_routers: Sequence[APIRouter] = (),
    trace: TextIO | None = None,
) -> FastAPI:
    """The app. It serves on the loop that the backend belongs to.

    Args:
        timeline: what the operations of `requests` write to.
        extra_routers: routes beside the Tinker protocol.
        trace: where a line per request is written.
    """
    app = FastAPI(title="ptlab", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.context = Context(
        backend=backend,
        requests=requests,
        access=access,
        settings=settings,
        timeline=timeline,
        completions=Completions(requests),
        urls=SignedUrls(settings.url_lifetime_s),
        stopping=asyncio.Event(),
    )
    for module in (futures, sampling, training, service, catalog, downloads):  # the busiest first: routes are tried in order
        app.include_router(module.router, prefix="/api/v1")
    for router in extra_routers:
        app.include_router(router)
    errors.install(app)
    # the last one added sees a request first
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(OpenRequestsLimit, max_open=settings.max_open_requests)
    if trace is not None:
        app.add_middleware(Trace, stream=trace)
    return app
