"""`/metrics` for Prometheus and `/api/v1/status` for `ptlab top`."""

from __future__ import annotations

import ipaddress
from typing import Final

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from ptlab.server.auth import Owner, owner_of
from ptlab.server.context import Here
from ptlab.server.meters import Meters
from ptlab.server.status import server_state, status_of_owner

FORWARDED: Final = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-real-ip")
"""A proxy's marks: behind one every caller seems to come from its address."""


def create_metrics_router(meters: Meters) -> APIRouter:
    """The routes; everything else they ask stands in the app's context."""
    router = APIRouter(tags=["operation"])

    @router.get("/metrics")
    async def metrics(request: Request, here: Here) -> Response:
        """Needs no key from this machine itself, and a key from anywhere else."""
        if not is_local(request):
            await owner_of(request, here)
        state = await server_state(here.backend, here.requests, here.settings.data_dir)
        return Response(meters.render(state), media_type=CONTENT_TYPE_LATEST)

    @router.get("/api/v1/status")
    async def status(here: Here, owner: Owner) -> Response:
        told = await status_of_owner(owner, here.backend, here.requests, meters, here.settings.data_dir)
        return Response(told.model_dump_json(), media_type="application/json")

    return router


def is_local(request: Request) -> bool:
    """Whether the caller is a program on this machine, and no proxy that speaks for somebody else."""
    if request.client is None or any(name in request.headers for name in FORWARDED):
        return False
    try:
        return ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False
