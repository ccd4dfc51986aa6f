"""The next token of every row of a batch, given the cache: two ways, behind one call.

    ModelStep     transformers' own forward pass
    DecoderStep   Llama- and Qwen-shaped models: decoder.py's layers on one token a row, the adapter merged into the weights (float32) or
                  part of the same product (bfloat16)

Cost of a step: 2 N FLOPs a row, reading the weights and the cache once; for small models on a CPU it is the number of operators, of which
DecoderStep has about a third (docs/LOG.md). In float32 it keeps the merged weights: as much memory again as the base model's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from ptlab.engines.decode_attention import decode_attention
from ptlab.engines.decoder import Decoder
from ptlab.engines.head_pass import OutputHead, head_path
from ptlab.engines.lora_layers import LoraWeights
from ptlab.engines.tree_attention import AttentionSaved


class DecodeStep(Protocol):
    def use(self, weights: LoraWeights | None) -> None:
        """Compute with this adapter from now on, as its numbers are now; None = the base model."""
        ...

    def __call__(self, tokens_B: Tensor, positions_B: Tensor, mask_BW: Tensor | None, cache: Any) -> Tensor:
        """Logits [B, V] after one more token per row, which is added to the cache. mask_BW is 0 on padding; None = no padding."""
        ...


class ModelStep:
    """See DecodeStep. The adapter is the one that the model's layers compute with anyway."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def use(self, weights: LoraWeights | None) -> None: ...

    def __call__(self, tokens_B: Tensor, positions_B: Tensor, mask_BW: Tensor | None, cache: Any) -> Tensor:
        logits: Tensor = self._model(
            input_ids=tokens_B[:, None],
            attention_mask=mask_BW,
            position_ids=positions_B[:, None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1]


class DecoderStep:
    """See DecodeStep. Shares the model's weights."""

    def __init__(self, model: Any) -> None:
        self._decoder, self._head = Decoder(model, apart=True), OutputHead.of(model, None)
        self._head_path = head_path(model)

    def use(self, weights: LoraWeights | None) -> None:
        self._decoder.use(weights)
        self._head = replace(self._head, lora=None if weights is None else weights.layers.get(self._head_path))

    def __call__(self, tokens_B: Tensor, positions_B: Tensor, mask_BW: Tensor | None, cache: Any) -> Tensor:
        visible = None if mask_BW is None else (mask_BW != 0)[:, None, None, :]
        attentions = [_Cached(layer, visible) for layer in cache.layers]
        return self._head.logits(self._decoder.step(tokens_B, positions_B, attentions))


@dataclass(frozen=True, slots=True)
class _Cached:
    """Attention of one token per row to the cache of one layer (tree_attention.Attention)."""

    layer: Any
    visible: Tensor | None

    def forward(
        self, q_TQD: Tensor, k_TGD: Tensor, v_TGD: Tensor, scale: float, out: Tensor | None = None, owner: str | None = None
    ) -> tuple[Tensor, AttentionSaved]:
        keys, values = self.layer.update(k_TGD[:, :, None], v_TGD[:, :, None])
        found, _ = decode_attention(None, q_TQD[:, :, None], keys, values, self.visible, scaling=scale)
        out_TQD = found[:, 0] if out is None else out.copy_(found[:, 0])
        return out_TQD, AttentionSaved(q_TQD, k_TGD, v_TGD, scale, out_TQD, None, [])

    def backward(self, saved: AttentionSaved, dout_TQD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError("a sampler has no backward pass")
