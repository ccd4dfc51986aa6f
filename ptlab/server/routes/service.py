"""Handshake, sessions and their lives; and what only the hosted service has."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response

from ptlab.errors import GoneError, NotFoundError
from ptlab.loss_table import OWN_FORMULA_NOTICE
from ptlab.server import session_search
from ptlab.server.auth import Owner
from ptlab.server.bodies import CreateSessionBody, FinishSessionBody, HeartbeatBody, SearchSessionsBody
from ptlab.server.context import Here
from ptlab.server.errors import HostedOnlyError
from ptlab.server.intake import answer, nothing, read_json
from ptlab.server.routes.downloads import signed

router = APIRouter()
Limit = Annotated[int, Query(ge=0, le=100_000)]
Offset = Annotated[int, Query(ge=0, lt=2**31)]
AccessScope = Literal["owned", "accessible"]
"""What is published can be used by its path; lists hold what is the caller's own, in either scope."""


@router.post("/client/config")
async def client_config(here: Here, owner: Owner) -> Response:
    """Flags that tell the SDK how to speak to this server."""
    return answer(
        {
            "parallel_fwdbwd_chunks": False,
            "sample_join_sampling_session": True,
            "sample_use_retrieve_futures": False,
            "use_pyqwest_transport": True,
            "proto_compress_fwdbwd": False,
            "custom_loss_server_side": here.settings.custom_losses,
            # for SDKs before 0.25
            "proto_write_fwdbwd": True,
            "fwd_via_fwdbwd": True,
            # 0.25 to 0.36: as 0.38 does always
            "create_model_via_load_weights": True,
        }
    )


@router.post("/client/dynamic_config")
async def dynamic_config(owner: Owner) -> Response:
    return answer({"refresh_interval_sec": 300, "sample_cancel_enabled": True, "sample_cancel_max_batch_size": 64})


@router.get("/healthz")
async def healthz() -> Response:
    """Needs no key: it says nothing but that the server answers."""
    return answer({"status": "ok"})


@router.post("/telemetry")
async def telemetry(owner: Owner) -> Response:
    """Taken and forgotten; without it the SDK would log every batch as an error."""
    return answer({"status": "accepted"})


# -- sessions


@router.post("/create_session")
async def create_session(request: Request, here: Here, owner: Owner) -> Response:
    body = await read_json(request, here.settings, CreateSessionBody)
    session_id = await here.backend.create_session(
        user_metadata=body.text_metadata, project_id=body.project_id, display_name=body.display_name, owner=owner, tags=body.tags
    )
    notice = {} if here.settings.strict_losses else {"info_message": f"ptlab: {OWN_FORMULA_NOTICE}"}  # the SDK logs it, once a session
    return answer({"type": "create_session", "session_id": session_id, **notice})


@router.post("/session_heartbeat")
async def session_heartbeat(request: Request, here: Here, owner: Owner) -> Response:
    body = await read_json(request, here.settings, HeartbeatBody)
    try:
        await here.access.check_session(owner, body.session_id)
        await here.backend.heartbeat(body.session_id)
    except NotFoundError as err:
        raise GoneError(err.message) from err  # 410 ends the SDK's heartbeats; 404 would be asked again and again
    return answer({"type": "session_heartbeat"})


@router.post("/sessions/search")
async def search_sessions(request: Request, here: Here, owner: Owner) -> Response:
    query = await read_json(request, here.settings, SearchSessionsBody)
    mine = [session for session in await here.backend.store.sessions() if session.owner == owner]
    page, more = session_search.search(mine, query)
    checkpoints = await here.backend.catalog.list_user_checkpoints(2**31, 0, owner)
    return answer(
        {
            "sessions": [session_search.summary(session, checkpoints.checkpoints) for session in page],
            "next_cursor": session_search.next_cursor(page) if more else None,
        }
    )


@router.get("/sessions")
async def list_sessions(here: Here, owner: Owner, limit: Limit = 20, offset: Offset = 0, access_scope: AccessScope = "owned") -> Response:
    return answer(await here.backend.list_sessions(limit, offset, owner))


@router.get("/sessions/{session_id}")
async def get_session(session_id: str, here: Here, owner: Owner, access_scope: AccessScope = "owned") -> Response:
    await here.access.check_session(owner, session_id)
    return answer(await here.backend.get_session(session_id))


@router.post("/sessions/{session_id}/finish")
async def finish_session(session_id: str, request: Request, here: Here, owner: Owner) -> Response:
    body = await read_json(request, here.settings, FinishSessionBody)
    await here.access.check_session(owner, session_id)
    await here.backend.finish_session(session_id, status=body.reason.type, detail=body.detail)
    return nothing()


@router.get("/sessions/{session_id}/trace_export")
async def trace_export(session_id: str, request: Request, here: Here, owner: Owner) -> Response:
    await here.access.check_session(owner, session_id)
    url, _ = signed(request, here, {"trace": session_id})
    return answer({"status": "ready", "url": url})


@router.put("/sessions/{session_id}/project")
async def assign_project(session_id: str, owner: Owner) -> Response:
    raise HostedOnlyError("this server has no projects: sessions and checkpoints belong to the API key that made them")


# -- what only the hosted service has


@router.post("/auth/token")
async def auth_token(owner: Owner) -> Response:
    raise HostedOnlyError("this server gives no JWT: an API key is sent with every request")


@router.api_route("/auth/apikey/me", methods=["GET", "DELETE"])
async def api_key(owner: Owner) -> Response:
    raise HostedOnlyError("API keys are managed on the server: `ptlab keys create | list | revoke`")


@router.get("/billing/{path:path}")
async def billing(path: str, owner: Owner) -> Response:
    raise HostedOnlyError("this server writes no bills; sizes of checkpoints are in list_user_checkpoints")


@router.get("/audit")
async def audit(owner: Owner) -> Response:
    raise HostedOnlyError("this server keeps no audit log")
