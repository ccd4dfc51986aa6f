"""One base model being served: its engines, the thread its trainer works on, and the weight sync between them."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, TypeVar

from ptlab.backend.weight_sync import WeightSync
from ptlab.engines.protocols import BaseModelInfo, Engines, SampleCall
from ptlab.errors import EngineError, InvalidRequestError, PtlabError
from ptlab.types import LoraConfig

T = TypeVar("T")
logger = logging.getLogger(__name__)


class ServedModel:
    """Engines of one base model. `open` makes one; `close` ends its thread and its sampler."""

    def __init__(self, engines: Engines, on_metrics: Callable[[Mapping[str, float]], None]) -> None:
        self.engines = engines
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ptlab-trainer")
        self._urgent: deque[_UrgentJob] = deque()
        engines.trainer.between_micro_batches = self._do_urgent
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

    def scores_prompt_of(self, call: SampleCall) -> bool:
        """Whether the sampler answers rightly what the call asks about its prompt (also if it asks nothing)."""
        can = self.engines.sampler.capabilities
        if (call.target_prompt_logprobs is not None or call.prompt_alt_tokens_k) and not can.arbitrary_prompt_scores:
            return False
        return can.prompt_logprobs_with_head or not (call.wants_prompt_logprobs and self.sync.trains_head)

    def servable(self, lora: LoraConfig, unembed: Literal["auto", "require"], max_lora_rank: int | None = None) -> LoraConfig:
        """The adapter that is created when `lora` is asked for: without the output head where the sampler cannot serve one.

        Raises: InvalidRequestError if the rank is beyond the sampler, or the head is required and cannot be served.
        """
        can = self.engines.sampler.capabilities
        largest = min((rank for rank in (can.max_lora_rank, max_lora_rank) if rank is not None), default=lora.rank)
        if lora.rank > largest:
            raise InvalidRequestError(
                f"LoRA rank is {lora.rank}; {self.info.name} is served for ranks up to {largest} "
                f"(engines.sampler.max_lora_rank in a config, --max-lora-rank of ptlab serve)"
            )
        if not lora.train_unembed or can.lora_on_head:
            return lora
        if unembed == "require" or not (lora.train_attn or lora.train_mlp):
            raise InvalidRequestError(
                f"train_unembed is set, but the sampler cannot serve an adapter on the output head of {self.info.arch} models; "
                f"set train_unembed=False, or use the torch sampler (engines.sampler.kind=torch)"
            )
        logger.warning("the sampler cannot serve an adapter on the output head of %s: training without it", self.info.name)
        return lora.model_copy(update={"train_unembed": False})

    async def run_in_trainer(self, work: Callable[[], T], /, *, urgent: bool = False) -> T:
        """Run blocking work on the trainer's one thread, after all that was asked before. Unexpected errors become EngineError.

        Args:
            urgent: before what is queued, and between two micro-batches of the pass under way. For work that no queued work may change:
                scores of a version's files or of the base, creation and removal of other models. The model in the pass may be read, not
                changed (the trainer refuses).
        """
        if not urgent:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._in_order, work)
        job = _UrgentJob(partial(self._guarded, work))
        self._urgent.append(job)
        self._thread.submit(self._do_urgent)  # for when no pass is under way
        result: T = await asyncio.wrap_future(job.future)
        return result

    def wait_for_trainer(self, work: Callable[[], T], /) -> T:
        """run_in_trainer for a caller that is on another thread and may block."""
        return self._thread.submit(self._in_order, work).result()

    def _in_order(self, work: Callable[[], T]) -> T:
        self._do_urgent()
        return self._guarded(work)

    def _do_urgent(self) -> None:
        """On the trainer's thread. What comes while this runs waits for the next micro-batch, so that training goes on."""
        for _ in range(len(self._urgent)):
            self._urgent.popleft().run()  # errors go into the job's future: they must not end another tenant's pass

    def _guarded(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except PtlabError:
            raise
        except Exception as err:
            raise EngineError(
                f"the trainer of {self.info.name} failed: {type(err).__name__}: {err}", engine="trainer", operation=work.__qualname__
            ) from err

    async def close(self) -> None:
        await self.engines.sampler.close()
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)
        for job in self._urgent:
            job.future.cancel()


class _UrgentJob:
    """Work for the trainer's thread, and the future of its result."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.future: Future[Any] = Future()
        self._work = work

    def run(self) -> None:
        if self.future.set_running_or_notify_cancel():
            try:
                self.future.set_result(self._work())
            except BaseException as err:  # not swallowed: whoever waits for the result gets it
                self.future.set_exception(err)


class ServedModels:
    """The base models being served, each opened when it is first asked for. Belongs to one event loop.

    Args:
        open_engines: makes the engines of a base model by name (blocking). Raises InvalidRequestError for names it cannot serve.
    """

    def __init__(self, open_engines: Callable[[str], Engines], on_metrics: Callable[[Mapping[str, float]], None]) -> None:
        self._open_engines = open_engines
        self._on_metrics = on_metrics
        self._opening: dict[str, asyncio.Task[ServedModel]] = {}

    async def get(self, base_model: str) -> ServedModel:
        """A base model, opened once; everyone who asks meanwhile waits for the same opening."""
        task = self._opening.get(base_model)
        if task is None:
            task = asyncio.create_task(ServedModel.open(lambda: self._open_engines(base_model), self._on_metrics))
            self._opening[base_model] = task
        try:
            return await asyncio.shield(task)
        except Exception:
            if self._opening.get(base_model) is task and task.done():
                del self._opening[base_model]  # the next request may try again
            raise

    def opened(self) -> list[ServedModel]:
        return [t.result() for t in self._opening.values() if t.done() and not t.cancelled() and t.exception() is None]

    async def close(self) -> None:
        """End all engines, and those still being opened."""
        for task in self._opening.values():
            if task.done() and not task.cancelled() and task.exception() is None:
                await task.result().close()
            else:
                task.cancel()
        self._opening.clear()
