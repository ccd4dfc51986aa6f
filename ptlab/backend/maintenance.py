"""What a server does now and then: move what is idle to the disk, forget what was kept long enough, go on where numbers never came."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass, field

from ptlab.backend.backend import Backend
from ptlab.backend.requests import Requests
from ptlab.errors import PtlabError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds."""

    every: float = 5.0
    """Between two rounds."""
    park_after: float = 1800.0
    """A model nobody used for so long goes from the trainer to the disk."""
    unload_sampler_after: float = 1800.0
    """A version nobody sampled from for so long goes from the sampler's memory; its files stay."""
    gap_timeout: float = 600.0
    """A number that has not come in so long, although later ones have, is not waited for any more. Clients send again for 300."""
    keep_fetched: float = 3600.0
    """An answer stays so long after it was ready (a client may have lost it on the way)."""
    keep_sequences: float = 86400.0
    """Recorded sequences, for stable_reinforce."""
    lost_session: float = 7 * 86400.0
    """A session without any sign of life for so long counts as finished: its ephemeral samplers go."""


@dataclass(slots=True)
class Maintenance:
    """Belongs to the backend's event loop. `run` goes round until it is told to stop; `once` is one round."""

    backend: Backend
    requests: Requests
    times: Times
    _gaps_since: dict[str, tuple[int, float]] = field(default_factory=dict)  # model -> (number waited for, since when)

    async def run(self, stop: asyncio.Event) -> None:
        """Returns after the round under way: one cut off in the middle of a snapshot would leave the trainer to write it unguarded."""
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), self.times.every)
                return
            try:
                await self.once()
            except (PtlabError, OSError):
                logger.exception("maintenance failed; trying again in %.0f s", self.times.every)

    async def once(self) -> None:
        self._give_up_gaps()
        await self._park_idle_models()
        await self.backend.sampling.unload_idle(self.times.unload_sampler_after)
        await self._end_lost_sessions()
        self.requests.drop_unfetched()
        now, store = time.time(), self.backend.store
        await store.expire_requests(finished_before=now - self.times.keep_fetched)
        await store.expire_sequences(now - self.times.keep_sequences)

    def _give_up_gaps(self) -> None:
        now = time.monotonic()
        for model_id, model in self.backend.models.by_id.items():
            gap = model.sequencer.gap
            if not gap:
                self._gaps_since.pop(model_id, None)
                continue
            first, since = self._gaps_since.get(model_id, (-1, now))
            if first != gap[0]:
                self._gaps_since[model_id] = (gap[0], now)
            elif now - since > self.times.gap_timeout:
                logger.warning("%s: requests %d to %d never came; going on without them", model_id, gap[0], gap[-1])
                model.sequencer.pass_over(gap)

    async def _park_idle_models(self) -> None:
        now = time.monotonic()
        for model_id, model in list(self.backend.models.by_id.items()):
            if model.served is not None and now - model.last_used > self.times.park_after and not self.requests.is_using(model_id):
                await self.backend.models.park(model_id)
                logger.info("%s was idle: parked on disk", model_id)

    async def _end_lost_sessions(self) -> None:
        for session in self.backend.live_sessions():
            if time.time() - session.last_seen > self.times.lost_session:
                await self.backend.finish_session(session.session_id, status="errored", detail="no sign of life")
