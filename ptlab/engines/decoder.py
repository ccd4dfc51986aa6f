"""The body of a Llama- or Qwen-shaped model over a stream of unique tokens: embedding, layers, last norm; backward without autograd.

Cost: each distinct token once (prefix_tree.py), no padding, no gradient for frozen weights, nothing at all below the lowest layer that has
an adapter. Memory per token: what decoder_layer.Kept lists for every layer, less with `recompute` (memory_costs.kept_bytes_per_token). On
the CPU the memory is kept from call to call (buffers.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ptlab.engines.buffers import Buffers
from ptlab.engines.decoder_layer import ANY, DecoderLayer, Kept, Stream, norm_of, widest_spare
from ptlab.engines.flex_attention import attention_for
from ptlab.engines.fused_linear import Gradients
from ptlab.engines.lora_layers import LoraWeights
from ptlab.engines.memory_costs import Recompute
from ptlab.engines.prefix_tree import Segment, TokenStream
from ptlab.engines.row_ops import rms_norm, rms_norm_backward
from ptlab.engines.tree_attention import Attention

FAMILIES = {"llama": False, "mistral": False, "qwen2": False, "qwen3": True}
"""model_type of the models this file computes -> whether queries and keys are normalised."""
STEADY_ROPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings that depend on the position alone, not on the length of what is computed."""


def can_decode(model: Any) -> bool:
    """Whether `Decoder` computes this transformers causal LM: its family, SwiGLU, full causal attention in every layer."""
    config = model.config
    if config.model_type not in FAMILIES:
        return False
    values = config.to_dict()
    windows = values.get("use_sliding_window", config.model_type == "mistral") and values.get("sliding_window") is not None
    sliding = any(kind != "full_attention" for kind in values.get("layer_types") or ())
    rope = (values.get("rope_parameters") or {}).get("rope_type", "default")
    return not windows and not sliding and not values.get("mlp_bias") and values["hidden_act"] == "silu" and rope in STEADY_ROPES


class Decoder:
    """Not thread-safe. One micro-batch at a time: `backward` belongs to the `forward` before it."""

    def __init__(self, model: Any, *, apart: bool = False) -> None:
        """apart: see FusedLinear."""
        body = model.base_model
        self._embedding, self._rotary = body.embed_tokens.weight, body.rotary_emb
        self.device: torch.device = self._embedding.device
        self._dtype, self._hidden = self._embedding.dtype, int(self._embedding.shape[1])
        self._buffers = Buffers(self.device)
        qk_norm = FAMILIES[model.config.model_type]
        self._layers = [
            DecoderLayer(layer, f"{model.base_model_prefix}.layers.{i}", qk_norm=qk_norm, buffers=self._buffers, apart=apart)
            for i, layer in enumerate(body.layers)
        ]
        self._norm = norm_of(body.norm)
        self.recompute: Recompute = "nothing"
        self._stream: Stream | None = None
        self._xs: list[Tensor] = []
        self._kept: list[Kept] = []
        self._rows_U: Tensor | None = None
        self._last_UH: Tensor | None = None

    def use(self, weights: LoraWeights | None) -> None:
        """Compute with this adapter as it is now; None = the base model. To be called again when its numbers have changed."""
        adapters = {} if weights is None else weights.layers
        for layer in self._layers:
            layer.use(adapters)

    def free(self) -> None:
        """Give back the memory that is kept between calls."""
        self._stream, self._rows_U, self._last_UH, self._xs, self._kept = None, None, None, [], []
        self._buffers.clear()

    def _whole_rows(self, tokens: int) -> int:
        """Tokens rounded up: for each new number of rows oneDNN makes a bfloat16 product anew, 10 ms a time (docs/LOG.md)."""
        if self.device.type != "cpu" or self._dtype == torch.float32:
            return tokens
        step = 128 if tokens > 512 else 32
        return -(-tokens // step) * step

    @torch.no_grad()
    def forward(self, stream: TokenStream, rows_U: Tensor, *, keep: bool) -> Tensor:
        """Hidden states after the last norm, of the places rows_U [U] (int64, each at most once) of the stream: [U, H], compute type.

        Args:
            keep: `backward` will follow.
        """
        total = len(stream.tokens_T)
        padded = self._whole_rows(total)
        segments: list[Segment] = [*stream.segments]
        if padded > total:
            segments.append(Segment(start=total, length=padded - total, offset=0, end=padded))
        tokens_T, positions_T = torch.zeros(2, padded, dtype=torch.int64)
        tokens_T[:total], positions_T[:total] = torch.from_numpy(stream.tokens_T), torch.from_numpy(stream.positions_T)

        keep = keep and any(layer.adapted for layer in self._layers)
        every = keep and self.recompute != "layers"
        self._xs, self._kept = [], []
        x_TH = self._take("x 0", padded, self._hidden)
        torch.index_select(self._embedding, 0, tokens_T.to(self.device), out=x_TH)
        tables = self._rotary_tables(x_TH, positions_T.to(self.device))
        shared = self._stream = Stream(attention_for(segments, padded, self.device, self._buffers), *tables)
        for i, layer in enumerate(self._layers):
            out_TH = self._take(f"x {i + 1 if keep else (i + 1) % 2}", padded, self._hidden)
            kept = layer.forward(x_TH, out_TH, shared, owner=str(i) if every else ANY, keep_gate_up=self.recompute != "mlp")
            if keep:
                self._xs.append(x_TH)
            if every:
                self._kept.append(kept)
            x_TH = out_TH
        self._rows_U = rows_U
        self._last_UH = last_UH = self._take("last", len(rows_U), self._hidden)
        torch.index_select(x_TH, 0, rows_U, out=last_UH)
        hidden_UH = self._take("hidden", len(rows_U), self._hidden)
        rms_norm(last_UH, *self._norm, out=hidden_UH)
        return hidden_UH

    @torch.no_grad()
    def step(self, tokens_B: Tensor, positions_B: Tensor, attentions: Sequence[Attention]) -> Tensor:
        """One token a row, for samplers: hidden states after the last norm, [B, H], good until the next call.

        Args:
            attentions: one per layer; each has seen the rows' earlier tokens.
        """
        rows = len(tokens_B)
        x_BH = self._take("x 0", rows, self._hidden)
        torch.index_select(self._embedding, 0, tokens_B, out=x_BH)
        tables = self._rotary_tables(x_BH, positions_B)
        for i, (layer, attention) in enumerate(zip(self._layers, attentions, strict=True)):
            out_BH = self._take(f"x {(i + 1) % 2}", rows, self._hidden)
            layer.forward(x_BH, out_BH, Stream(attention, *tables), owner=ANY)
            x_BH = out_BH
        hidden_BH = self._take("hidden", rows, self._hidden)
        rms_norm(x_BH, *self._norm, out=hidden_BH)
        return hidden_BH

    @torch.no_grad()
    def backward(self, d_hidden_UH: Tensor, gradients: Gradients) -> None:
        """gradients += the adapters', given dL/d(what `forward` returned). Shapes: d_hidden_UH [U, H] in the compute type."""
        learning = [i for i, layer in enumerate(self._layers) if layer.adapted]
        if not learning:
            return
        assert self._stream is not None and self._rows_U is not None and self._last_UH is not None, "backward without forward"
        padded = self._xs[0].shape[0]
        d_last_UH = self._take("hidden", len(self._rows_U), self._hidden)
        d_last_UH.zero_()
        rms_norm_backward(self._last_UH, *self._norm, d_hidden_UH, add_to=d_last_UH)
        d_TH = self._take("d_x", padded, self._hidden + widest_spare(self._layers))
        d_TH.zero_()
        d_TH[self._rows_U, : self._hidden] = d_last_UH
        scratch_TH = self._take("recomputed", padded, self._hidden) if self.recompute == "layers" else None
        for i in range(len(self._layers) - 1, learning[0] - 1, -1):
            layer = self._layers[i]
            kept = self._kept.pop() if scratch_TH is None else layer.forward(self._xs[i], scratch_TH, self._stream, owner=ANY)
            layer.backward(d_TH, self._stream, kept, gradients, further=i > learning[0])

    def _rotary_tables(self, x_TH: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._rotary(x_TH, positions_T[None])
        return cos[0].float(), sin[0].float()

    def _take(self, name: str, tokens: int, width: int) -> Tensor:
        return self._buffers.take(name, tokens, width, dtype=self._dtype)
