"""What stands between tokens and the last hidden states: the two ways to compute it, behind one contract.

DecoderBody   Llama- and Qwen-shaped models: a stream of unique tokens, forward and backward by hand (decoder.py)
PaddedBody    every other causal LM of transformers: rows of about one length padded to the longest, autograd
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ptlab.engines.batching import pad, plan_micro_batches, plan_shared_micro_batches
from ptlab.engines.decoder import Decoder
from ptlab.engines.fused_linear import Gradients
from ptlab.engines.lora_layers import LoraLayers, LoraWeights
from ptlab.engines.memory_costs import Recompute
from ptlab.engines.prefix_tree import IntArray, TokenStream, build_stream


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tokens of some rows stand."""

    num_places: int
    places_D: list[IntArray]
    """Per row and token: its place, 0 .. num_places - 1. Tokens of different rows may share one."""
    source: Any
    """What the body that made it needs to compute it."""


class Body(Protocol):
    """One base model's layers. One micro-batch at a time: `backward` belongs to the `forward` before it."""

    def plan(self, rows: Sequence[IntArray], max_tokens: int) -> list[list[int]]:
        """Indices of the rows that are computed together, so that no group is larger than `max_tokens` (a longer row stands alone)."""
        ...

    def lay_out(self, rows: Sequence[IntArray]) -> Layout: ...

    def use(self, weights: LoraWeights | None) -> None:
        """Compute with this adapter as it is now; None = the base model."""
        ...

    def forward(self, layout: Layout, places_U: Tensor, *, keep: bool) -> Tensor:
        """Last hidden states of these places (int64, each once): [U, H] in the compute type, detached; good until the next `forward`."""
        ...

    def backward(self, d_hidden_UH: Tensor, gradients: Gradients) -> None:
        """gradients += those of the adapter in use, after a `forward` with `keep`."""
        ...

    def set_recompute(self, what: Recompute) -> None:
        """Activations that the backward pass computes again."""
        ...

    def free(self) -> None:
        """Give back what is kept between calls."""
        ...


class DecoderBody:
    """See Body."""

    def __init__(self, model: Any) -> None:
        self._decoder = Decoder(model)

    def plan(self, rows: Sequence[IntArray], max_tokens: int) -> list[list[int]]:
        return plan_shared_micro_batches(rows, max_tokens)

    def lay_out(self, rows: Sequence[IntArray]) -> Layout:
        stream = build_stream(rows)
        return Layout(len(stream.tokens_T), stream.places_D, stream)

    def use(self, weights: LoraWeights | None) -> None:
        self._decoder.use(weights)

    def forward(self, layout: Layout, places_U: Tensor, *, keep: bool) -> Tensor:
        stream: TokenStream = layout.source
        return self._decoder.forward(stream, places_U, keep=keep)

    def backward(self, d_hidden_UH: Tensor, gradients: Gradients) -> None:
        self._decoder.backward(d_hidden_UH, gradients)

    def set_recompute(self, what: Recompute) -> None:
        self._decoder.recompute = what

    def free(self) -> None:
        self._decoder.free()


class PaddedBody:
    """See Body. Cost: rows x longest tokens; right padding needs no mask under causal attention."""

    def __init__(self, model: Any, layers: LoraLayers) -> None:
        self._model, self._layers = model, layers
        self._weights: LoraWeights | None = None
        self._hidden_UH: Tensor | None = None

    def plan(self, rows: Sequence[IntArray], max_tokens: int) -> list[list[int]]:
        return plan_micro_batches([len(row) for row in rows], max_tokens)

    def lay_out(self, rows: Sequence[IntArray]) -> Layout:
        ends = np.cumsum([len(row) for row in rows])
        return Layout(int(ends[-1]), [np.arange(end - len(row), end) for row, end in zip(rows, ends, strict=True)], rows)

    def use(self, weights: LoraWeights | None) -> None:
        self._weights = weights

    def forward(self, layout: Layout, places_U: Tensor, *, keep: bool) -> Tensor:
        batch = pad(layout.source, self._model.device)
        with self._layers.using(self._weights), torch.set_grad_enabled(keep):
            hidden_BLH = self._model.base_model(input_ids=batch.input_ids_BL, use_cache=False).last_hidden_state
            self._hidden_UH = hidden_BLH.flatten(0, 1)[batch.flat_index_T[places_U]]
        return self._hidden_UH.detach()

    def backward(self, d_hidden_UH: Tensor, gradients: Gradients) -> None:
        assert self._weights is not None and self._hidden_UH is not None, "backward without forward"
        if not self._hidden_UH.requires_grad:  # an adapter on the output head alone
            return
        parameters = self._weights.parameters
        with self._layers.using(self._weights):  # recomputation runs the layers again
            found = torch.autograd.grad(self._hidden_UH, list(parameters.values()), d_hidden_UH, allow_unused=True)
        self._hidden_UH = None
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                gradients[name] = gradients[name].add_(gradient) if name in gradients else gradient

    def set_recompute(self, what: Recompute) -> None:
        on = what != "nothing"  # transformers knows layers only
        self._model.train(on)  # transformers checkpoints in train mode only; nothing random may come with it
        if not on:
            self._model.gradient_checkpointing_disable()
            return
        self._model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._model.enable_input_require_grads()
        for module in self._model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self._model.config.attention_dropout = 0.0

    def free(self) -> None:
        self._hidden_UH = None
