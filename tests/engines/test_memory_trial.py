"""The trial on a real trainer (CPU) with a meter of the test's own: what it runs, what it calls out of memory, what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from ptlab.engines.memory_costs import Recompute
from ptlab.engines.memory_plan import MicroBatch
from ptlab.engines.memory_trial import cuda_peak_bytes, worst_case_trial
from ptlab.engines.peft_trainer import PeftTrainer
from ptlab.errors import EngineError
from ptlab.losses import LossCall
from ptlab.types import Datum, ForwardBackwardOutput, LoraConfig


class AdjustedTrainer(PeftTrainer):
    """Notes what it is asked to do; `limit` is the size above which it behaves as if memory ran out."""

    recompute: Recompute = "nothing"

    def __init__(self, path: Path, limit: int = 10**9) -> None:
        super().__init__(str(path), name="tiny")
        self.limit, self.lengths = limit, list[list[int]]()

    def set_micro_batch(self, tokens: int, *, recompute: Recompute) -> None:
        super().set_micro_batch(tokens, recompute=recompute)
        self.recompute: Recompute = recompute

    def forward_backward(self, model_id: str, data: Sequence[Datum], loss: LossCall) -> ForwardBackwardOutput:
        self.lengths.append([datum.model_input.length for datum in data])
        if sum(self.lengths[-1]) > self.limit:
            if len(data) == 1:
                raise EngineError("does not fit") from torch.OutOfMemoryError("CUDA out of memory")
            self._max_tokens //= 2
        return super().forward_backward(model_id, data, loss)


def meter(work: Callable[[], None]) -> int:
    work()
    return 12345


def test_it_fills_the_micro_batch_with_long_rows_and_leaves_nothing(tiny_qwen3_dir: Path) -> None:
    trainer = AdjustedTrainer(tiny_qwen3_dir)
    trial = worst_case_trial(trainer, longest_tokens=40, lora=LoraConfig(rank=4, seed=0), meter=meter)
    assert trial(MicroBatch(tokens=128, recompute="layers")) == 12345
    assert trial(MicroBatch(tokens=40, recompute="nothing")) == 12345
    assert trainer.lengths == [[32, 32, 32, 32], [40]]
    assert (trainer.tokens_per_micro_batch, trainer.recompute) == (40, "nothing")
    trainer.create_adapter("memory-trial", LoraConfig(rank=4, seed=0))  # its own is gone


def test_out_of_memory_is_none_also_where_the_trainer_coped(tiny_qwen3_dir: Path) -> None:
    trainer = AdjustedTrainer(tiny_qwen3_dir, limit=100)
    trial = worst_case_trial(trainer, longest_tokens=40, lora=LoraConfig(rank=4, seed=0), meter=meter)
    assert trial(MicroBatch(tokens=120, recompute="nothing")) is None  # halved inside the trainer, which answers
    assert trial(MicroBatch(tokens=80, recompute="nothing")) == 12345
    alone = worst_case_trial(trainer, longest_tokens=120, lora=LoraConfig(rank=4, seed=0), meter=meter)
    assert alone(MicroBatch(tokens=120, recompute="nothing")) is None
    trainer.create_adapter("memory-trial", LoraConfig(rank=4, seed=0))


def test_other_failures_are_not_called_out_of_memory(tiny_qwen3_dir: Path) -> None:
    trainer = AdjustedTrainer(tiny_qwen3_dir)
    trial = worst_case_trial(trainer, longest_tokens=10_000, lora=LoraConfig(rank=0), meter=meter)
    with pytest.raises(ValueError, match="rank"):
        trial(MicroBatch(tokens=10_000, recompute="nothing"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_peak_on_a_gpu_counts_what_was_freed_again() -> None:
    def work() -> None:
        torch.empty(2**28, dtype=torch.uint8, device="cuda")

    assert 2**28 <= cuda_peak_bytes(work) < 2**28 + 2**26
