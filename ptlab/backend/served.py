"""One base model being served: its engines, the thread its trainer works on, and the weight sync between them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeVar

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

    def servable(self, lora: LoraConfig, unembed: Literal["auto", "require"]) -> LoraConfig:
        """The adapter that is created when `lora` is asked for: without the output head where the sampler cannot serve one.

        Raises: InvalidRequestError if the rank is beyond the sampler, or the head is required and cannot be served.
        """
        can = self.engines.sampler.capabilities
        if can.max_lora_rank is not None and lora.rank > can.max_lora_rank:
            raise InvalidRequestError(
                f"LoRA rank is {lora.rank}; the sampler of {self.info.name} was started for ranks up to {can.max_lora_rank} "
                f"(engines.sampler.max_lora_rank)"
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
