"""What a server is doing, as `GET /api/v1/status` tells it: the caller's own sessions and models, and the load of the whole server."""

from __future__ import annotations

import asyncio
import resource
import time
from collections import Counter
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ptlab.backend.backend import Backend
from ptlab.backend.records import Model, Session
from ptlab.backend.requests import Requests
from ptlab.backend.store import store_file
from ptlab.server.meters import Meters, ServerState

MOST_SESSIONS = 50
"""Sessions listed, those heard of last first; the totals count all."""


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, protected_namespaces=())


class ModelStatus(_Value):
    model_id: str
    base_model: str
    rank: int
    state: str
    """creating, running (a request waits or runs), idle, parked (on the disk) or failed."""
    step: int
    idle_s: float


class SessionStatus(_Value):
    session_id: str
    name: str | None
    """As the client named it."""
    silent_s: float
    """Since its last sign of life."""
    num_samplers: int
    models: list[ModelStatus]


class LoadStatus(_Value):
    """Of the whole server, all callers together."""

    up_s: float
    base_models: list[str]
    num_sessions: int
    models: dict[str, int]
    """By state."""
    num_samplers: int
    waiting: dict[str, int]
    """Requests that wait or run, by kind."""
    tokens_per_s: dict[str, float]
    num_syncs: int
    sync_latency_s: float | None
    """Of the last weight sync; None before the first."""
    sync_verify_gap_nats: float | None
    memory_bytes: int
    """Resident memory of the server's process."""
    store_bytes: int


class Status(_Value):
    owner: str
    sessions: list[SessionStatus]
    num_sessions: int
    """The caller's, of which at most MOST_SESSIONS are listed."""
    load: LoadStatus


async def status_of_owner(owner: str, backend: Backend, requests: Requests, meters: Meters, data_dir: Path) -> Status:
    """What this caller may see."""
    mine = sorted((session for session in backend.live_sessions() if session.owner == owner), key=lambda s: s.last_seen, reverse=True)
    state = await server_state(backend, requests, data_dir)
    return Status(
        owner=owner,
        sessions=[_session(session, backend, requests) for session in mine[:MOST_SESSIONS]],
        num_sessions=len(mine),
        load=LoadStatus(
            up_s=meters.up_s,
            base_models=[m.model_name for m in (await backend.catalog.get_server_capabilities()).supported_models if m.model_name],
            num_sessions=state.sessions,
            models=dict(state.models),
            num_samplers=state.samplers,
            waiting=dict(state.waiting),
            tokens_per_s={str(kind): rate for kind, rate in meters.tokens_per_s().items()},
            num_syncs=meters.num_syncs,
            sync_latency_s=meters.last_sync.get("sync/latency_s"),
            sync_verify_gap_nats=meters.last_sync.get("sync/verify_gap"),
            memory_bytes=resident_bytes(),
            store_bytes=state.store_bytes,
        ),
    )


async def server_state(backend: Backend, requests: Requests, data_dir: Path) -> ServerState:
    rows = await backend.store.counts()
    return ServerState(
        waiting=requests.pending_by_kind(),
        sessions=len(backend.live_sessions()),
        models=dict(Counter(state_of(model, requests) for model in backend.models.by_id.values())),
        samplers=rows["samplers"],
        store_rows=rows,
        store_bytes=await asyncio.to_thread(_size, store_file(data_dir)),
    )


def state_of(model: Model, requests: Requests) -> str:
    if model.failure is not None:
        return "failed"
    if not model.created.is_set():
        return "creating"
    if requests.is_using(model.model_id):
        return "running"
    return "parked" if model.parked else "idle"


def _session(session: Session, backend: Backend, requests: Requests) -> SessionStatus:
    models = [backend.models.by_id[model_id] for model_id in session.model_ids]
    return SessionStatus(
        session_id=session.session_id,
        name=session.display_name,
        silent_s=max(0.0, time.time() - session.last_seen),
        num_samplers=len(backend.sampling.ids_of(session.session_id)),
        models=[
            ModelStatus(
                model_id=model.model_id,
                base_model=model.base_model,
                rank=model.lora.rank,
                state=state_of(model, requests),
                step=model.step,
                idle_s=max(0.0, time.monotonic() - model.last_used),
            )
            for model in models
        ],
    )


def _size(store: Path) -> int:
    """Bytes of the store's file and its journal; 0 for a store in memory."""
    return sum(file.stat().st_size for file in store.parent.glob(f"{store.name}*"))


def resident_bytes() -> int:
    """Resident memory of this process; where the system does not say (macOS), the most it ever was."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
