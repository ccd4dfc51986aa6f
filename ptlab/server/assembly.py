"""A whole server from its settings: store, backend, requests, routes; and its end, after which the next one goes on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, TextIO

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from ptlab.backend.access import Access
from ptlab.backend.backend import Backend
from ptlab.backend.maintenance import Maintenance, Times
from ptlab.backend.requests import RequestLimits, Requests
from ptlab.backend.store import Store, store_file
from ptlab.engines.protocols import Engines
from ptlab.errors import ConfigError, PtlabError
from ptlab.server.app import create_app
from ptlab.server.meters import Meters
from ptlab.server.operations import Operations, read_journal
from ptlab.server.routes.metrics import create_metrics_router
from ptlab.server.routes.openai import OpenAILimits, create_openai_router
from ptlab.server.settings import ServeSettings
from ptlab.server.timeline import Timeline

logger = logging.getLogger(__name__)


@asynccontextmanager
async def assembled(
    settings: ServeSettings,
    open_engines: Callable[[str], Engines],
    base_models: Sequence[str],
    *,
    require_keys: bool = False,
    unembed: Literal["auto", "require"] = "auto",
    max_lora_rank: int | None = None,
) -> AsyncIterator[FastAPI]:
    """The app on the running loop, ready to serve: every base model is open, and what the last server left goes on.

    At the end models are parked on the disk, and the engines are closed.

    Args:
        open_engines: makes the engines of a base model by name (blocking).
        max_lora_rank: largest rank of a new adapter; None = any the sampler takes.
        require_keys: refuse to start as long as anybody may do everything.
    Raises: ConfigError if another server uses the data directory, a base model cannot be opened, or keys are required and there are none.
    """
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    store = await asyncio.to_thread(Store.open, store_file(settings.data_dir))
    access, meters, timeline = Access(store), Meters(CollectorRegistry()), Timeline()
    backend = Backend(
        data_dir=settings.data_dir,
        scratch_dir=settings.data_dir / "scratch",
        open_engines=open_engines,
        on_metrics=meters.on_metrics,
        base_models=base_models,
        unembed=unembed,
        max_lora_rank=max_lora_rank,
        store=store,
        read_journal=read_journal,
        seed=settings.seed,
        strict_losses=settings.strict_losses,
    )
    try:
        if require_keys and not await access.has_keys():
            raise ConfigError(
                f"{settings.host} can be reached by others, and no API key exists: `ptlab keys create NAME --data-dir {settings.data_dir}` "
                "makes one; or serve on 127.0.0.1"
            )
        operations = Operations(backend, access, settings, timeline, meters)
        limits = RequestLimits(
            max_pending=settings.max_pending,
            max_pending_per_owner=settings.max_pending_per_key,
            max_pending_bytes=settings.max_pending_bytes,
            max_ahead=settings.max_requests_ahead,
        )
        requests = Requests(backend, store, operations.execute, limits, on_finished=meters.request_finished)
        await backend.restore()
        for name in base_models:
            await backend.served.get(name)
        openai = create_openai_router(
            backend,
            access,
            on_finished=meters.request_finished,
            on_sampled=partial(meters.count_tokens, "sampled"),
            limits=OpenAILimits(most_new_tokens=settings.max_new_tokens, idle_s=settings.sampler_idle_s),
        )
        routers = [openai, create_metrics_router(meters)]
        with _trace(settings.trace) as trace:
            app = create_app(backend, requests, access, settings, timeline, routers, trace)
            await requests.recover()
            maintenance = asyncio.create_task(Maintenance(backend, requests, _times(settings)).run(app.state.context.stopping))
            try:
                yield app
            finally:
                app.state.context.stopping.set()
                await maintenance
                await _park_all(backend, settings.shutdown_grace_s)
                await requests.close()
    finally:
        await backend.close()


@contextmanager
def _trace(file: Path | None) -> Iterator[TextIO | None]:
    """The file to trace requests to, if one is wanted. Raises: ConfigError."""
    if file is None:
        yield None
        return
    try:
        stream = file.open("a", encoding="utf-8", buffering=1)
    except OSError as err:
        raise ConfigError(f"cannot write the trace to {file}: {err.strerror}") from err
    with stream:
        yield stream


async def _park_all(backend: Backend, within_s: float) -> None:
    """Move every model to the disk; one that does not make it is run again from its journal by the next server."""

    async def park() -> None:
        for model_id, model in list(backend.models.by_id.items()):
            if model.served is not None:
                await backend.models.park(model_id)

    try:
        await asyncio.wait_for(park(), within_s)
    except (PtlabError, OSError, TimeoutError) as err:
        logger.warning("not every model could be parked (%s: %s); the next start does their last requests again", type(err).__name__, err)


def _times(settings: ServeSettings) -> Times:
    return Times(
        every=settings.maintenance_every_s,
        park_after=settings.park_after_s,
        unload_sampler_after=settings.sampler_idle_s,
        gap_timeout=settings.gap_timeout_s,
        keep_fetched=settings.result_grace_s,
        keep_sequences=settings.sequence_memory_s,
        lost_session=settings.session_timeout_s,
    )
