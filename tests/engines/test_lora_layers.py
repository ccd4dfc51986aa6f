"""Adapters outside the model against plain PEFT, and what is in use when."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from ptlab.engines.lora_layers import LoraLayers, LoraWeights

TOKENS = torch.tensor([[5, 9, 2, 40, 7], [8, 1, 1, 3, 11]])


def gpt2() -> Any:
    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=8, n_layer=2, n_head=2, n_positions=16)).eval()


def filled(weights: LoraWeights, seed: int) -> LoraWeights:
    generator = torch.Generator().manual_seed(seed)
    for parameter in weights.parameters.values():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return weights


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # of plain PEFT, about merging
@pytest.mark.parametrize(
    ("arch", "config"),
    [
        ("qwen3", {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "down_proj", "lm_head"]}),
        ("qwen3", {"r": 3, "lora_alpha": 8, "target_modules": ["v_proj", "up_proj"], "rank_pattern": {"layers.1.mlp.up_proj": 5}}),
        ("qwen3", {"r": 4, "target_modules": r".*layers\.1\..*o_proj", "alpha_pattern": {"o_proj": 6}, "use_rslora": True}),
        ("qwen3", {"r": 2, "target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1], "exclude_modules": ["k_proj"]}),
        ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),  # Conv1D: the weight lies the other way round
    ],
)
def test_values_and_gradients_are_pefts(tiny_qwen3_dir: Path, arch: str, config: dict[str, Any]) -> None:
    def base() -> Any:
        return gpt2() if arch == "gpt2" else AutoModelForCausalLM.from_pretrained(tiny_qwen3_dir, dtype=torch.float32).eval()

    lora = peft.LoraConfig(lora_dropout=0.0, bias="none", task_type="CAUSAL_LM", **config)
    model = base().requires_grad_(False)
    layers = LoraLayers(model)
    weights = filled(layers.make(lora), seed=3)
    plain = peft.get_peft_model(base(), lora)
    theirs = {n.removeprefix("base_model.model.").replace(".default.", "."): p for n, p in plain.named_parameters() if ".lora_" in n}
    assert {n: p.shape for n, p in theirs.items()} == {n: p.shape for n, p in weights.parameters.items()}
    assert list(theirs) == list(weights.parameters)  # the order too: the gradient norm is summed in it
    for name, parameter in theirs.items():
        parameter.data.copy_(weights.parameters[name].data)
    with layers.using(weights):
        logits_BTV = model(input_ids=TOKENS).logits
    expected_BTV = plain(input_ids=TOKENS).logits
    assert torch.equal(logits_BTV, expected_BTV)
    assert not torch.allclose(logits_BTV, model(input_ids=TOKENS).logits, atol=1e-3), "the test could not tell the adapter from the base"
    logits_BTV.square().sum().backward()
    expected_BTV.square().sum().backward()
    for name, parameter in theirs.items():
        assert torch.equal(weights.parameters[name].grad, parameter.grad), name


def test_uses_nest_and_adapters_stay_apart(tiny_qwen3_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen3_dir, dtype=torch.bfloat16).eval().requires_grad_(False)
    before = model(input_ids=TOKENS).logits
    layers = LoraLayers(model)
    wide = filled(layers.make(peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"])), seed=1)
    narrow = filled(layers.make(peft.LoraConfig(r=2, target_modules=["k_proj"])), seed=2)

    def logits() -> torch.Tensor:
        found: torch.Tensor = model(input_ids=TOKENS).logits
        return found

    with layers.using(wide):
        first = logits()
        with layers.using(narrow):
            assert layers.held().keys() == narrow.parameters.keys()
            second = logits()
            with pytest.raises(ZeroDivisionError), layers.using(None):
                assert torch.equal(logits(), before)
                _ = 1 // 0
            assert torch.equal(logits(), second)
        late = layers.make(peft.LoraConfig(r=2, target_modules=["gate_proj"]))  # changes layers of the model in the middle
        assert torch.equal(logits(), first)
        assert all(layers.held()[name] is parameter for name, parameter in wide.parameters.items())
    assert torch.equal(logits(), before) and layers.held() == {}
    assert not torch.equal(first, second) and not torch.equal(first, before) and not torch.equal(second, before)
    assert {p.dtype for p in (*wide.parameters.values(), *late.parameters.values())} == {torch.float32}
    assert first.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight  # still tied, and still the base's

    gone = weakref.ref(next(iter(wide.parameters.values())))
    del wide, first  # its graph holds the matrices as well
    gc.collect()
    assert gone() is None, "the model must not keep an adapter that nobody holds"


def test_targets_that_are_not_there_give_an_empty_adapter(tiny_qwen3_dir: Path) -> None:
    layers = LoraLayers(AutoModelForCausalLM.from_pretrained(tiny_qwen3_dir))
    assert layers.make(peft.LoraConfig(r=4, target_modules=["z_proj", "embed_tokens"])).parameters == {}
