"""Formulas against hand-computed numbers, and against what PyTorch really keeps on a model of this size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, MixtralConfig, Qwen3Config

from ptlab.engines.memory_costs import (
    ModelShape,
    Recompute,
    kept_bytes_per_token,
    kv_bytes_per_token,
    lora_parameters,
    lora_slot_bytes,
    lora_state_bytes,
)
from ptlab.engines.peft_trainer import PeftTrainer
from ptlab.errors import ConfigError
from ptlab.types import LoraConfig


def qwen3_config(hidden: int, inner: int, layers: int, heads: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151936, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, tie_word_embeddings=True,
    )  # fmt: skip


QWEN3_06B = qwen3_config(1024, 3072, 28, 16)
QWEN3_4B = qwen3_config(2560, 9728, 36, 32)
LLAMA_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    max_position_embeddings=131072, tie_word_embeddings=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "parameters", "kv_bytes"),
    [
        # 151936*1024 + 28*(1024*2048*2 + 1024*1024*2 + 3*1024*3072 + 2*1024 + 2*128) + 1024; 2 * 28 layers * 8 heads * 128 * 2 bytes
        (QWEN3_06B, 596_049_920, 114_688),
        (QWEN3_4B, 4_022_468_096, 147_456),
        (LLAMA_8B, 8_030_261_248, 131_072),  # no head_dim in the config: 4096 / 32; the published count of Llama-3.1-8B
    ],
)
def test_parameters_and_kv_bytes_of_known_models(config: Any, parameters: int, kv_bytes: int) -> None:
    shape = ModelShape.of(config)
    assert shape.num_parameters == pytest.approx(parameters, rel=0.02)
    assert shape.num_parameters == parameters
    assert kv_bytes_per_token(shape, 2) == kv_bytes
    assert kv_bytes_per_token(shape, 4) == 2 * kv_bytes


def test_a_counted_number_of_parameters_wins() -> None:
    assert ModelShape.of(QWEN3_06B, 123).num_parameters == 123


def test_a_mixture_of_experts_must_be_counted() -> None:
    config = MixtralConfig()
    with pytest.raises(ConfigError, match=r"mixture of experts \(num_local_experts = 8\).*num_parameters"):
        ModelShape.of(config)
    assert ModelShape.of(config, 46_700_000_000).num_parameters == 46_700_000_000


def test_lora_bytes_by_hand() -> None:
    shape = ModelShape.of(LLAMA_8B)
    # rank 32, a layer: q, o 2*(4096+4096), k, v 2*(4096+1024), gate, up, down 3*(4096+14336) = 81,920; head 4096+128256
    parameters = 32 * (32 * 81_920 + 132_352)
    assert lora_parameters(shape, 32) == parameters == 88_121_344
    assert lora_state_bytes(shape, 32) == 16 * parameters
    assert lora_slot_bytes(shape, 32, 2) == 2 * (parameters + 32 * 132_352)


@pytest.mark.parametrize("recompute", ["nothing", "mlp", "layers"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_kept_bytes_are_what_the_decoder_keeps(
    family: str, dtype: str, recompute: Recompute, tiny_qwen3_dir: Path, tiny_llama_dir: Path
) -> None:
    """By the storages that are alive between forward and backward and belong to one layer: sees a tensor kept twice, or forgotten here."""
    rank, tokens = 8, 192  # a whole number of rows for bfloat16 too
    trainer = PeftTrainer(str(tiny_qwen3_dir if family == "qwen3" else tiny_llama_dir), name="tiny", dtype=dtype, recompute=recompute)
    trainer.create_adapter("m", LoraConfig(rank=rank, seed=0))
    body: Any = trainer._body
    body.use(trainer._adapters["m"].weights)
    body.free()
    body.forward(body.lay_out([np.arange(tokens)]), torch.arange(tokens), keep=True)
    decoder = body._decoder
    kept = [
        t
        for k in decoder._kept
        for t in (k.qkv_raw, k.attended_TQ, k.middle_TH, k.gate_up, k.attention.q_TQD, k.attention.k_TGD)
        if t is not None
    ]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*decoder._xs, *kept)}
    shape = ModelShape.of(trainer._base.config)
    element_bytes = 4 if dtype == "float32" else 2
    assert sum(storages.values()) / tokens == shape.num_layers * kept_bytes_per_token(shape, rank, element_bytes, recompute)
    assert shape.num_parameters == pytest.approx(trainer.num_parameters, rel=0.001)
