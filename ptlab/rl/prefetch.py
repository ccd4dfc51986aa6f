"""Sampling ahead: the batches of the next steps are drawn while this step trains.

With `ahead` = 1, and v the number of optimizer steps behind the weights that sample:

    step                     0                1                2
    trains on                batch 0, v = 0   batch 1, v = 0   batch 2, v = 1
    meanwhile in flight      batch 1, v = 0   batch 2, v = 1   batch 3, v = 2

A batch is started with the newest weights there are, `ahead` steps before it trains (the first ones: as early as can be), so it is at
most `ahead` steps old by then. It keeps its weights to its end: a sampling client never changes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TYPE_CHECKING

from ptlab.rl.types import TrajectoryGroup

if TYPE_CHECKING:
    from ptlab.client.sampling import SamplingClient

Batch = list[TrajectoryGroup]
logger = logging.getLogger(__name__)


class Prefetch:
    """The batches of steps `first` .. `end` - 1, each started up to `ahead` steps early. Leaving the context abandons those in flight.

    Args:
        sample: draws the batch of a step through a sampling client; cancelled when its batch is abandoned.
        ahead: 0 = a batch is started when it is needed.
    """

    def __init__(self, sample: Callable[[int, SamplingClient], Awaitable[Batch]], *, first: int, end: int, ahead: int) -> None:
        self._sample = sample
        self._next = first
        self._end = end
        self._ahead = ahead
        self._in_flight: dict[int, asyncio.Task[tuple[Batch, float]]] = {}

    async def take(self, step: int, sampling_client: SamplingClient) -> tuple[Batch, float]:
        """The batch of `step`, and the seconds it took from its start to its last answer. To be called for every step, in order.

        Args:
            sampling_client: holds the newest weights. All that may start on them starts first: the batch `ahead` steps from here, and
                in the first step the ones before it too.

        Raises: what sampling this batch raised; the step that started it early does not see it. Cancelling the call abandons the batch.
        """
        while self._next < min(step + self._ahead + 1, self._end):
            work = self._timed(self._next, sampling_client)
            self._in_flight[self._next] = asyncio.create_task(work, name=f"batch of step {self._next}")
            self._next += 1
        batch = await self._in_flight[step]
        del self._in_flight[step]
        return batch

    async def _timed(self, step: int, sampling_client: SamplingClient) -> tuple[Batch, float]:
        started = time.perf_counter()
        groups_P = await self._sample(step, sampling_client)
        return groups_P, time.perf_counter() - started

    async def __aenter__(self) -> Prefetch:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for task in self._in_flight.values():
            task.cancel()
        outcomes = await asyncio.gather(*self._in_flight.values(), return_exceptions=True)
        for step, outcome in zip(self._in_flight, outcomes, strict=True):
            if isinstance(outcome, Exception) and outcome is not error:
                logger.warning("the batch of step %d, abandoned now, had failed: %r", step, outcome)
