"""One base model being served: its engines, the thread its trainer works on, and the weight sync between them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ptlab.backend.weight_sync import WeightSync
from ptlab.engines.protocols import BaseModelInfo, Engines
from ptlab.errors import EngineError, PtlabError

T = TypeVar("T")


class ServedModel:
    """Engines of one base model. `open` makes one; `close` ends its thread and its sampler."""

    def __init__(self, engines: Engines, on_metrics: Callable[[Mapping[str, float]], None]) -> None:
        self.engines = engines
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ptlab-trainer")
        self.sync = WeightSync(engines.trainer, engines.sampler, self.run_in_trainer, on_metrics)

    @classmethod
    async def open(cls, make: Callable[[], Engines], on_metrics: Callable[[Mapping[str, float]], None]) -> ServedModel:
        """Load the engines (in a thread: it can take minutes) and measure how far they agree on the base model."""
        served = cls(await asyncio.to_thread(make), on_metrics)
        try:
            await served.sync.calibrate()
        except BaseException:
            await served.close()
            raise
        return served

    @property
    def info(self) -> BaseModelInfo:
        return self.engines.trainer.info

    async def run_in_trainer(self, work: Callable[[], T], /) -> T:
        """Run blocking work on the trainer's one thread, after all that was asked before. Unexpected errors become EngineError."""

        def guarded() -> T:
            try:
                return work()
            except PtlabError:
                raise
            except Exception as err:
                raise EngineError(
                    f"the trainer of {self.info.name} failed: {type(err).__name__}: {err}", engine="trainer", operation=work.__qualname__
                ) from err

        return await asyncio.get_running_loop().run_in_executor(self._thread, guarded)

    async def close(self) -> None:
        await self.engines.sampler.close()
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)
