"""However a call's work is laid out, its numbers are the same: packed, shared, in chunks, recomputed, alone, padded; every loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ptlab.engines import decoder_layer, head_pass, peft_trainer, prefix_tree
from ptlab.engines.body import DecoderBody, PaddedBody
from ptlab.engines.peft_trainer import PeftTrainer
from ptlab.losses import LOSSES, resolve_loss
from ptlab.types import AdamParams, Datum, LoraConfig, ModelInput

Way = Callable[[pytest.MonkeyPatch], dict[str, Any]]
"""Changes what it must, and returns arguments for the trainer."""


def no_sharing(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setattr(prefix_tree, "MIN_SHARED", 10**6)
    return {}


def chunks(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setattr(decoder_layer, "TILE_ROWS", 13)
    patch.setitem(head_pass.CHUNK_ROWS, "cpu", 7)
    return {}


def padded(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setattr(peft_trainer, "can_decode", lambda model: False)
    return {}


WAYS: dict[str, Way] = {
    "packed, not shared": no_sharing,
    "in chunks": chunks,
    "padded": padded,
    "a group cut in two": lambda patch: {"tokens_per_micro_batch": 60},
    "each datum alone": lambda patch: {"tokens_per_micro_batch": 1},
    "recomputed": lambda patch: {"recompute": "layers"},
    "gate and up recomputed": lambda patch: {"recompute": "mlp"},
}


def batch(loss: str) -> list[Datum]:
    """Two prompts with three samples each, one of them with a second turn that two samples share, and one row that shares nothing."""
    rng = np.random.default_rng(5)
    first, second = rng.integers(3, 500, 18), rng.integers(3, 500, 11)
    turn = np.concatenate([first, rng.integers(3, 500, 9)])
    starts = [turn, turn, first, second, second, second, rng.integers(3, 500, 4)]
    data = []
    for start, length in zip(starts, (7, 3, 12, 5, 9, 1, 10), strict=True):
        tokens = np.concatenate([start, rng.integers(3, 500, length)])
        learns = np.arange(len(tokens) - 1) >= len(start) - 1
        inputs: dict[str, Any] = {"target_tokens": tokens[1:]}
        if loss == "cross_entropy":
            inputs["weights"] = np.where(learns, rng.normal(size=len(learns)), 0.0)
        else:
            inputs |= {"logprobs": np.where(learns, rng.normal(-6.0, 0.4, len(learns)), 0.0), "advantages": learns * rng.normal()}
        if loss == "gspo":
            inputs["sequence_ratio_mask"] = learns.astype(np.float32)
        if loss == "dro":
            inputs["weights"] = learns.astype(np.float32)
        data.append(Datum(model_input=ModelInput.from_ints(tokens[:-1].tolist()), loss_fn_inputs=inputs))
    return data


def run(directory: Path, loss: str, **arguments: Any) -> tuple[PeftTrainer, float, list[Tensor], Tensor]:
    """Loss, log-probabilities per datum, and all gradients one behind the other, of an adapter on every target whose B is not zero."""
    trainer = PeftTrainer(str(directory), name="tiny", **{"device": "cpu", **arguments})
    trainer.create_adapter("m", LoraConfig(rank=4, seed=1))
    with torch.no_grad():
        for parameter in trainer._adapters["m"].parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)).to(parameter.device) * 0.03)
    config = {"clip_low_threshold": 0.2, "clip_high_threshold": 5.0} if loss == "gspo" else None  # the default leaves nothing to compare
    output = trainer.forward_backward("m", batch(loss), resolve_loss(loss, config))
    logprobs_D = [torch.from_numpy(o["logprobs"].to_numpy()) for o in output.loss_fn_outputs]
    gradients = trainer._adapters["m"].gradients
    flat = torch.cat([gradients[name].flatten() for name in trainer._adapters["m"].parameters])
    trainer.optim_step("m", AdamParams(learning_rate=1e-3))
    return trainer, output.metrics["loss:sum"], logprobs_D, flat


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_way_gives_the_same_numbers(tiny_qwen3_dir: Path, loss: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, value, logprobs_D, gradient = run(tiny_qwen3_dir, loss)
    assert isinstance(trainer._body, DecoderBody)
    assert trainer._body.lay_out([np.asarray(d.model_input.to_ints()) for d in batch(loss)]).num_places < 120  # of 190 tokens
    assert gradient.norm() > 0
    other, other_value, other_logprobs_D, other_gradient = run(tiny_qwen3_dir, loss, **WAYS[way](monkeypatch))
    assert isinstance(other._body, PaddedBody if way == "padded" else DecoderBody)
    assert other_value == pytest.approx(value, rel=1e-5)
    assert (other_gradient - gradient).norm() < 1e-5 * gradient.norm()
    for ours, theirs in zip(logprobs_D, other_logprobs_D, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("loss", LOSSES)
def test_a_gpu_gives_the_numbers_of_the_cpu(tiny_qwen3_dir: Path, loss: str) -> None:
    """Through flex_attention and the compiled formulas, which no test without a GPU can run."""
    _, value, _, gradient = run(tiny_qwen3_dir, loss)
    trainer, other_value, _, other_gradient = run(tiny_qwen3_dir, loss, device="cuda", dtype="float32")
    assert isinstance(trainer._body, DecoderBody)
    assert other_value == pytest.approx(value, rel=1e-4)
    assert (other_gradient.cpu() - gradient).norm() < 1e-3 * gradient.norm()  # TF32 is off; other orders of sums
