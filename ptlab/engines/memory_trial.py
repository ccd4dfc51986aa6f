"""The trial that a memory plan asks of a trainer: one worst-case micro-batch, and the memory it took."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from transformers import AutoConfig

from ptlab.engines.memory_costs import CONTEXT_BYTES, ModelShape, Recompute
from ptlab.engines.memory_plan import MemoryPlan, MicroBatch, Trial, Workload, plan_memory
from ptlab.engines.protocols import Trainer
from ptlab.losses import resolve_loss
from ptlab.types import Datum, LoraConfig, ModelInput, TensorData

TRIAL_MODEL = "memory-trial"
logger = logging.getLogger(__name__)

Meter = Callable[[Callable[[], None]], int]
"""Runs some work; returns the most memory it held above what was held before, bytes."""


class AdjustableTrainer(Trainer, Protocol):
    """A trainer whose micro-batches can be set after it was made."""

    @property
    def tokens_per_micro_batch(self) -> int:
        """As set, or less: out of memory makes it smaller."""
        ...

    def set_micro_batch(self, tokens: int, *, recompute: Recompute) -> None:
        """Tokens in one forward pass from now on, and which activations are recomputed."""
        ...


def worst_case_trial(trainer: AdjustableTrainer, *, longest_tokens: int, lora: LoraConfig, meter: Meter | None = None) -> Trial:
    """A Trial on as few and long rows as fill the micro-batch, with an adapter of its own that is gone afterwards.

    No row is padded and every position is a target, so no micro-batch of as many tokens takes more (attention that is linear in memory
    provided). The trainer is left with the settings of the last trial: set those of the plan.

    Args:
        lora: the largest adapter to expect.
        meter: None = cuda_peak_bytes.
    """
    measure = cuda_peak_bytes if meter is None else meter
    loss = resolve_loss("cross_entropy")

    def trial(batch: MicroBatch) -> int | None:
        rows = -(-batch.tokens // longest_tokens)
        data = [_datum(batch.tokens // rows, trainer.info.vocab_size, seed) for seed in range(rows)]
        trainer.create_adapter(TRIAL_MODEL, lora)
        try:
            trainer.set_micro_batch(batch.tokens, recompute=batch.recompute)
            peak = measure(lambda: _discard(trainer.forward_backward(TRIAL_MODEL, data, loss)))
        except Exception as err:
            if not isinstance(err.__cause__, torch.OutOfMemoryError):  # one row alone did not fit: the trainer's EngineError
                raise
            return None
        finally:
            trainer.remove_adapter(TRIAL_MODEL)
        return peak if trainer.tokens_per_micro_batch == batch.tokens else None  # it ran out of memory and went on with less

    return trial


def plan_for_gpu(
    trainer: AdjustableTrainer, path: str, *, num_parameters: int, lora_rank: int, lora_slots: int, gpu_memory_utilization: float | None
) -> MemoryPlan:
    """Measure, plan, and set the trainer's micro-batch. For a card that a vLLM sampler shares with the trainer.

    The sampler keeps its KV cache while the trainer works (`overlap`): requests on older versions may go on at any time. What is on the
    card already, as another base model of this server, stays there.
    Raises: ConfigError if the card is too small.
    """
    shape = ModelShape.of(AutoConfig.from_pretrained(path), num_parameters)
    element_bytes = 2 if trainer.info.dtype == "bfloat16" else 4
    torch.cuda.empty_cache()
    free_bytes, card_bytes = torch.cuda.mem_get_info()
    own_bytes = num_parameters * element_bytes + CONTEXT_BYTES
    load = Workload.of(shape, None, lora_rank=lora_rank, lora_slots=lora_slots, overlap=True)
    plan = plan_memory(
        card_bytes=card_bytes,
        taken_bytes=max(0, card_bytes - free_bytes - own_bytes),
        shape=shape,
        workload=load,
        trial=worst_case_trial(trainer, longest_tokens=load.longest_tokens, lora=LoraConfig(rank=lora_rank)),
        element_bytes=element_bytes,
        gpu_memory_utilization=gpu_memory_utilization,
    )
    logger.info("%s", plan)
    trainer.set_micro_batch(plan.micro_batch.tokens, recompute=plan.micro_batch.recompute)
    torch.cuda.empty_cache()
    return plan


def cuda_peak_bytes(work: Callable[[], None]) -> int:
    """Peak of the memory that torch reserves on the current GPU, above what tensors held before: fragments included."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    try:
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_reserved() - before
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def _datum(length: int, vocab_size: int, seed: int) -> Datum:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab_size, length + 1)
    return Datum(
        model_input=ModelInput.from_ints(tokens[:-1].tolist()),
        loss_fn_inputs={
            "target_tokens": TensorData.from_numpy(tokens[1:].astype(np.int64)),
            "weights": TensorData.from_numpy(np.ones(length, dtype=np.float32)),
        },
    )


def _discard(result: object) -> None:
    del result
