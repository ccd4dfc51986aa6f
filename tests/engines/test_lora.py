"""Which layers the flags mean on different architectures."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from ptlab.engines.lora import LoraTargets
from ptlab.engines.protocols import lora_alpha
from ptlab.errors import InvalidRequestError
from ptlab.types import LoraConfig


def flags(**on: bool) -> LoraConfig:
    return LoraConfig(**{"rank": 4, "train_attn": False, "train_mlp": False, "train_unembed": False} | on)


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=8, n_layer=1, n_head=2, n_positions=16))


def test_names_shared_by_attention_and_mlp_are_written_out_in_full() -> None:
    targets = LoraTargets.of(gpt2())
    assert targets.select(flags(train_attn=True)) == ["transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"]
    assert targets.select(flags(train_attn=True, train_mlp=True)) == ["c_attn", "c_fc", "c_proj"]
    assert targets.select(flags(train_unembed=True)) == ["lm_head"]
    assert targets.transposed


def test_the_router_of_a_mixture_of_experts_is_not_trained() -> None:
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            moe_intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            mlp_only_layers=[0],
        )
    )
    targets = LoraTargets.of(model)
    assert not any(path.endswith((".gate", ".router")) for path in targets.mlp)
    assert "model.layers.0.mlp.down_proj" in targets.mlp


def test_a_flag_without_layers_is_refused() -> None:
    bare = LoraTargets(attn=frozenset({"a.q"}), mlp=frozenset(), unembed=frozenset(), others=frozenset(), transposed=False)
    with pytest.raises(InvalidRequestError, match="train_mlp is set, but this model has no linear layer"):
        bare.select(flags(train_attn=True, train_mlp=True))


def test_alpha_is_the_same_at_every_rank() -> None:
    assert [lora_alpha(rank) for rank in (1, 8, 128)] == [32, 32, 32]
