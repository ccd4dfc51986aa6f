"""The two ways from tokens to hidden states agree, and the trainer takes the one that fits."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from ptlab.engines import decoder_layer
from ptlab.engines import lora as lora_files
from ptlab.engines.body import Body, DecoderBody, PaddedBody
from ptlab.engines.lora_layers import LoraLayers
from ptlab.engines.memory_costs import Recompute
from ptlab.engines.peft_trainer import PeftTrainer
from ptlab.losses import resolve_loss
from ptlab.types import AdamParams, Datum, LoraConfig, ModelInput

RNG = np.random.default_rng(0)
PROMPT = RNG.integers(0, 500, 11)
ROWS = [np.concatenate([PROMPT, RNG.integers(0, 500, n)]) for n in (6, 2, 9)] + [RNG.integers(0, 500, 5)]


def per_row(body: Body, rows: list[Any]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Hidden states row by row, and gradients for slopes that hang on the row and position alone."""
    layout = body.lay_out(rows)
    places_U = torch.arange(layout.num_places).flip(0)
    hidden_UH = body.forward(layout, places_U, keep=True).clone()
    d_UH = torch.zeros_like(hidden_UH)
    for number, places in enumerate(layout.places_D):
        slopes = torch.randn(len(places), hidden_UH.shape[1], generator=torch.Generator().manual_seed(number))
        d_UH.index_add_(0, layout.num_places - 1 - torch.from_numpy(places), slopes)
    gradients: dict[str, Tensor] = {}
    body.backward(d_UH, gradients)
    return [hidden_UH[layout.num_places - 1 - torch.from_numpy(places)] for places in layout.places_D], gradients


@pytest.mark.parametrize("recompute", ["nothing", "mlp", "layers"])
def test_decoder_and_padded_rows_agree(tiny_qwen3_dir: Path, recompute: Recompute) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen3_dir, dtype=torch.float32).eval().requires_grad_(False)
    bodies: list[Body] = [DecoderBody(model)]
    targets = lora_files.LoraTargets.of(model)
    layers = LoraLayers(model)
    weights = layers.make(lora_files.peft_config(targets, LoraConfig(rank=4, train_unembed=False), "x"))
    lora_files.initialise(weights.parameters, 0)
    with torch.no_grad():
        for parameter in weights.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    bodies.append(PaddedBody(model, layers))
    found = []
    for body in bodies:
        body.set_recompute(recompute)
        body.use(weights)
        found.append(per_row(body, ROWS))
        body.free()
    for ours, theirs in zip(*(hidden_D for hidden_D, _ in found), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        assert (gradient - found[1][1][name]).norm() < 1e-5 * gradient.norm(), name


def test_shared_tokens_count_once_for_the_decoder(tiny_qwen3_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen3_dir, dtype=torch.float32).eval().requires_grad_(False)
    decoder, padded = DecoderBody(model), PaddedBody(model, LoraLayers(model))
    assert decoder.lay_out(ROWS).num_places == 11 + 6 + 2 + 9 + 5
    assert padded.lay_out(ROWS).num_places == sum(map(len, ROWS))
    assert [sorted(group) for group in decoder.plan(ROWS, 33)] == [[0, 1, 2, 3]]
    assert [sorted(group) for group in padded.plan(ROWS, 40)] == [[0, 2], [1, 3]]  # longest first: 2 x 20, 2 x 13


def data(rows: list[Any]) -> list[Datum]:
    inputs = [{"target_tokens": row[1:], "weights": np.ones(len(row) - 1)} for row in rows]
    return [Datum(model_input=ModelInput.from_ints(row[:-1].tolist()), loss_fn_inputs=i) for row, i in zip(rows, inputs, strict=True)]


def test_a_model_of_another_kind_is_trained_by_its_own_modules(tmp_path: Path) -> None:
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=16, n_layer=2, n_head=2, n_positions=64)).save_pretrained(tmp_path)
    rows = ROWS
    trainer = PeftTrainer(str(tmp_path), name="gpt2", tokens_per_micro_batch=40)
    trainer.create_adapter("m", LoraConfig(rank=4, seed=0, train_unembed=False))
    trainer.forward_backward("m", data(rows), resolve_loss("cross_entropy"))
    trainer.optim_step("m", AdamParams(learning_rate=0.05))  # B is no longer zero
    output = trainer.forward_backward("m", data(rows), resolve_loss("cross_entropy"))
    adapter = trainer._adapters["m"]
    with trainer._layers.using(adapter.weights):
        total = torch.zeros(())
        for row in rows:
            logits = trainer._base(input_ids=torch.from_numpy(row[:-1])[None]).logits[0]
            total = total + torch.nn.functional.cross_entropy(logits, torch.from_numpy(row[1:]), reduction="sum")
        gradients = torch.autograd.grad(total, list(adapter.parameters.values()))
    assert isinstance(trainer._body, PaddedBody)
    assert output.metrics["loss:sum"] == pytest.approx(total.item(), rel=1e-5)
    for name, expected in zip(adapter.parameters, gradients, strict=True):
        found = adapter.gradients[name]
        assert (found - expected).norm() <= 1e-4 * expected.norm(), name


def test_a_decoder_that_disagrees_with_the_model_is_not_used(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = decoder_layer.swiglu
    monkeypatch.setattr(decoder_layer, "swiglu", lambda gate_up, out: (right(gate_up, out), out.mul_(1.1))[0])
    with caplog.at_level(logging.WARNING):
        trainer = PeftTrainer(str(tiny_llama_dir), name="tiny")
    assert isinstance(trainer._body, PaddedBody)
    assert "the decoder cannot be used, training goes on by the model's own modules, slower: log-probabilities differ" in caplog.text
    monkeypatch.undo()
    assert isinstance(PeftTrainer(str(tiny_llama_dir), name="tiny")._body, DecoderBody)
