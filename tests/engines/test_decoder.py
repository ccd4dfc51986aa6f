"""The decoder by hand against transformers' own modules and autograd: values, gradients, sharing, tiles, recomputation, families."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from ptlab.engines import decoder_layer
from ptlab.engines import lora as lora_files
from ptlab.engines.buffers import Buffers
from ptlab.engines.decoder import Decoder, can_decode
from ptlab.engines.lora_layers import LoraLayers, LoraWeights
from ptlab.engines.memory_costs import Recompute
from ptlab.engines.prefix_tree import IntArray, build_stream
from ptlab.types import LoraConfig

SHAPE: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "initializer_range": 0.15,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "qwen3": Qwen3Config(**SHAPE, tie_word_embeddings=True),
    "llama": LlamaConfig(**SHAPE, attention_bias=True, rope_parameters=LLAMA3_ROPE),  # the output projection has a bias too
    "qwen2": Qwen2Config(**{**SHAPE, "head_dim": 8}),  # q, k, v have one
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
}
ALL_LINEARS = {"train_unembed": False}


@pytest.fixture(autouse=True)
def dirty_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads a buffer before writing it gets NaN."""
    take = Buffers.take
    monkeypatch.setattr(Buffers, "take", lambda self, *a, **k: take(self, *a, **k).fill_(float("nan")))


def make(family: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CONFIGS[family], dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)  # as made they are all ones and zeros
    return model.to(dtype).eval().requires_grad_(False)


def adapter(model: Any, rank: int = 4, seed: int = 0, layers: LoraLayers | None = None, **flags: bool) -> tuple[LoraLayers, LoraWeights]:
    untouched = type(model)(model.config)  # the layers of one that has adapters already go by other names
    config = lora_files.peft_config(lora_files.LoraTargets.of(untouched), LoraConfig(rank=rank, **{**ALL_LINEARS, **flags}), "x")
    layers = layers or LoraLayers(model)
    weights = layers.make(config)
    lora_files.initialise(weights.parameters, seed)
    with torch.no_grad():
        for name, parameter in weights.parameters.items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.02)
    return layers, weights


def two_problems(seed: int = 0) -> list[IntArray]:
    """Three levels of common prefixes, a row that is another's beginning, equal rows, and one that shares nothing."""
    rng = np.random.default_rng(seed)
    prompt, turn, other = rng.integers(0, 300, 12), rng.integers(0, 300, 9), rng.integers(0, 300, 10)
    deep = np.concatenate([prompt, turn])
    tails = [np.concatenate([start, rng.integers(0, 300, n)]) for start, n in ((deep, 5), (deep, 1), (prompt, 7), (other, 3), (other, 8))]
    return [*tails, deep, tails[0].copy(), rng.integers(0, 300, 13)]


def autograd(
    model: Any, layers: LoraLayers, weights: LoraWeights, rows: list[IntArray], slopes_D: list[Tensor]
) -> tuple[list[Tensor], Any]:
    """Hidden states per row, and the gradients of sum(hidden * slopes): each row alone, transformers' modules, autograd."""
    with layers.using(weights):
        hidden_D = [model.base_model(input_ids=torch.from_numpy(row)[None], use_cache=False).last_hidden_state[0] for row in rows]
    total = torch.stack([(hidden.float() * slopes).sum() for hidden, slopes in zip(hidden_D, slopes_D, strict=True)]).sum()
    gradients = torch.autograd.grad(total, list(weights.parameters.values()))
    return [hidden.detach() for hidden in hidden_D], dict(zip(weights.parameters, gradients, strict=True))


def by_hand(
    decoder: Decoder, rows: list[IntArray], slopes_D: list[Tensor], *, share: bool = True
) -> tuple[list[Tensor], dict[str, Tensor]]:
    stream = build_stream(rows, share=share)
    places_U = torch.randperm(len(stream.tokens_T), generator=torch.Generator().manual_seed(1))
    hidden_UH = decoder.forward(stream, places_U, keep=True)
    hidden_TH, d_TH = torch.empty_like(hidden_UH), torch.zeros(hidden_UH.shape)
    hidden_TH[places_U] = hidden_UH
    for places, slopes in zip(stream.places_D, slopes_D, strict=True):
        d_TH.index_add_(0, torch.from_numpy(places), slopes)
    gradients: dict[str, Tensor] = {}
    decoder.backward(d_TH[places_U].to(hidden_UH.dtype), gradients)
    return [hidden_TH[torch.from_numpy(places)] for places in stream.places_D], gradients


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def slopes_of(rows: Sequence[IntArray]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(len(row), SHAPE["hidden_size"], generator=generator) for row in rows]


def same(found: tuple[list[Tensor], dict[str, Tensor]], expected: tuple[list[Tensor], Any], tolerance: float) -> None:
    for ours, theirs in zip(found[0], expected[0], strict=True):
        assert relative(ours, theirs) < tolerance
    assert found[1].keys() == {name for name, gradient in expected[1].items() if gradient is not None}
    for name, gradient in found[1].items():
        assert relative(gradient, expected[1][name]) < tolerance, name


@pytest.mark.parametrize("recompute", ["nothing", "mlp", "layers"])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", CONFIGS)
def test_values_and_gradients_are_the_models_own(family: str, share: bool, recompute: Recompute, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_layer, "TILE_ROWS", 11)  # the stream has 68 or 150 tokens
    model, rows = make(family), two_problems()
    layers, weights = adapter(model)
    expected = autograd(model, layers, weights, rows, slopes_of(rows))
    decoder = Decoder(model)
    decoder.recompute = recompute
    decoder.use(weights)
    assert len(build_stream(rows, share=share).tokens_T) == (68 if share else sum(map(len, rows)))
    same(by_hand(decoder, rows, slopes_of(rows), share=share), expected, 1e-5)


@pytest.mark.parametrize("flags", [{"train_attn": False}, {"train_mlp": False}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_on_a_part_of_the_layers(flags: dict[str, bool], dtype: torch.dtype) -> None:
    model, rows = make("qwen3", dtype), two_problems()
    layers, weights = adapter(model, **flags)
    expected = autograd(model, layers, weights, rows, slopes_of(rows))
    decoder = Decoder(model)
    decoder.use(weights)
    same(by_hand(decoder, rows, slopes_of(rows)), expected, 1e-5 if dtype == torch.float32 else 0.06)


def test_nothing_is_computed_below_the_lowest_adapted_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = make("qwen3"), two_problems()
    layers = LoraLayers(model)
    config = lora_files.peft_config(lora_files.LoraTargets.of(model), LoraConfig(rank=4, **ALL_LINEARS), "x")
    config.target_modules = {"model.layers.1.mlp.up_proj", "model.layers.2.self_attn.k_proj"}
    weights = layers.make(config)
    lora_files.initialise(weights.parameters, 0)
    with torch.no_grad():
        for parameter in weights.parameters.values():
            parameter.add_(0.01)
    expected = autograd(model, layers, weights, rows, slopes_of(rows))
    went_back: list[Any] = []
    backward = decoder_layer.DecoderLayer.backward
    monkeypatch.setattr(
        decoder_layer.DecoderLayer, "backward", lambda self, *a, **k: (went_back.append(k["further"]), backward(self, *a, **k))[1]
    )
    decoder = Decoder(model)
    decoder.use(weights)
    same(by_hand(decoder, rows, slopes_of(rows)), expected, 1e-5)
    assert went_back == [True, False]  # layer 2, layer 1; layer 0 not at all


def test_bfloat16_is_no_worse_than_the_models_own() -> None:
    """Both against float32: our error may be at most 1.2 times that of transformers' modules in bfloat16 with adapters in float32."""
    rows = two_problems()
    exact_model, model = make("qwen3"), make("qwen3", torch.bfloat16)
    exact = autograd(exact_model, *adapter(exact_model), rows, slopes_of(rows))
    layers, weights = adapter(model)
    naive = autograd(model, layers, weights, rows, slopes_of(rows))
    decoder = Decoder(model)
    decoder.use(weights)
    ours = by_hand(decoder, rows, slopes_of(rows))

    def error(found: Any) -> float:
        return relative(torch.cat([found[1][name].flatten() for name in exact[1]]), torch.cat([g.flatten() for g in exact[1].values()]))

    assert error(ours) < 1.2 * error(naive)
    assert relative(torch.cat(ours[0]), torch.cat(exact[0])) < 1.2 * relative(torch.cat(naive[0]), torch.cat(exact[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_of_several_ranks_take_turns_and_the_model_goes_on_working(dtype: torch.dtype) -> None:
    model, rows = make("qwen3", dtype), two_problems()[:3]
    untouched = make("qwen3", dtype)
    decoder = Decoder(model)
    stream = build_stream(rows)
    everywhere = torch.arange(len(stream.tokens_T))
    layers = LoraLayers(model)
    base_TH = decoder.forward(stream, everywhere, keep=False).clone()
    for rank, seed in ((2, 1), (8, 2), (4, 3)):
        _, weights = adapter(model, rank, seed, layers)
        twin = make("qwen3", dtype)
        expected = autograd(twin, *adapter(twin, rank, seed), rows, slopes_of(rows))
        decoder.use(weights)
        same(by_hand(decoder, rows, slopes_of(rows)), expected, 1e-5 if dtype == torch.float32 else 0.06)
        with torch.no_grad():
            next(iter(weights.parameters.values())).add_(1.0)  # seen only after the next `use`
    decoder.use(None)
    assert torch.equal(decoder.forward(stream, everywhere, keep=False), base_TH)
    ids = torch.from_numpy(rows[0])[None]
    assert torch.equal(model(input_ids=ids).logits, untouched(input_ids=ids).logits)
    for name, parameter in untouched.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name.replace("proj.", "proj.base_layer.")]), name


def test_what_is_not_computed_is_not_claimed() -> None:
    assert all(can_decode(make(family)) for family in CONFIGS)
    for change in (
        {"model_type": "gemma2"},
        {"hidden_act": "gelu"},
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ):
        model = make("llama")
        for key, value in change.items():
            if key == "model_type":
                type(model.config).model_type, before = value, type(model.config).model_type
                assert not can_decode(model)
                type(model.config).model_type = before
            else:
                setattr(model.config, key, value)
                assert not can_decode(model), change
    model = make("mistral")
    model.config.sliding_window = 64
    assert not can_decode(model)
