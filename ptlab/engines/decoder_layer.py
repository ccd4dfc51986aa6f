"""One Llama- or Qwen-shaped decoder layer over a stream of tokens: forward, and backward by hand, read top to bottom.

Cost per token of a layer with H hidden, Q query, KV key and value width, I inner width: 2 (2 H (Q + KV) + 3 H I) FLOPs forward and as many
backward (frozen weights have no gradient of their own), plus attention (tree_attention.py) and adapters (fused_linear.py).

Kept for the backward pass per token, in the compute type: input H, middle of the residual stream H, q k v before (with q/k norm) and
after rotation, attention output Q, gate and up 2 I. Norms, the inputs of the linear layers and SwiGLU's output are computed again: passes
over memory that lies in the cache, where keeping them would cost another 2 H + I.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptlab.engines.buffers import Buffers
from ptlab.engines.fused_linear import FusedLinear, Gradients
from ptlab.engines.lora_layers import LowRank
from ptlab.engines.row_ops import position_heads, position_heads_backward, rms_norm, rms_norm_backward, swiglu, swiglu_backward
from ptlab.engines.tree_attention import Attention, AttentionSaved

TILE_ROWS = 2048
ANY = "any"
"""Owner of what nobody needs again."""


@dataclass(slots=True)
class Kept:
    """What one layer's backward pass needs of its forward pass."""

    x_TH: Tensor
    qkv_raw: Tensor
    """Before q/k norm and rotation; without q/k norm the same memory as after it, and not looked at."""
    attention: AttentionSaved
    attended_TQ: Tensor
    middle_TH: Tensor
    gate_up: Tensor | None
    """None: to be computed again from the middle."""


@dataclass(frozen=True, slots=True)
class Stream:
    """What a layer needs besides its input; in training all layers share one."""

    attention: Attention
    cos_TD: Tensor
    sin_TD: Tensor
    """float32."""


class DecoderLayer:
    """Reads a transformers layer (`self_attn` with q, k, v, o projections, `mlp` with gate, up, down, two RMS norms) and takes over its
    weights as views."""

    def __init__(self, layer: Any, path: str, *, qk_norm: bool, buffers: Buffers, apart: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp

        def linear(parent: str, module: Any, *names: str) -> FusedLinear:
            return FusedLinear([(f"{path}.{parent}.{name}", module.get_submodule(name)) for name in names], names[0], buffers, apart=apart)

        self.qkv = linear("self_attn", attention, "q_proj", "k_proj", "v_proj")
        self.o = linear("self_attn", attention, "o_proj")
        self.gate_up = linear("mlp", mlp, "gate_proj", "up_proj")
        self.down = linear("mlp", mlp, "down_proj")
        self._norms = [norm_of(norm) for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        self._head_dim, self._scaling = int(attention.head_dim), float(attention.scaling)
        self._query, self._key = int(attention.q_proj.weight.shape[0]), int(attention.k_proj.weight.shape[0])
        self._hidden, self._inner = self.qkv.in_features, self.down.in_features
        self._qk_weight: Tensor | None = None
        """Norm weights of all query heads and all key heads, [heads, head_dim]; None = no norm."""
        self._qk_eps = 0.0
        if qk_norm:
            (q_weight, self._qk_eps), (k_weight, _) = norm_of(attention.q_norm), norm_of(attention.k_norm)
            counts = (self._query // self._head_dim, self._key // self._head_dim)
            self._qk_weight = torch.cat([weight.expand(count, -1) for weight, count in zip((q_weight, k_weight), counts, strict=True)])
        self._buffers, self._dtype = buffers, self.qkv.dtype

    @property
    def adapted(self) -> bool:
        return any(linear.adapted for linear in self.linears)

    @property
    def linears(self) -> tuple[FusedLinear, ...]:
        return self.qkv, self.o, self.gate_up, self.down

    def use(self, adapters: dict[str, LowRank]) -> None:
        for linear in self.linears:
            linear.use([adapters.get(path) for path in linear.paths])

    def _take(self, name: str, tokens: int, width: int) -> Tensor:
        return self._buffers.take(name, tokens, width, dtype=self._dtype)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first_key, first_value = self._query, self._query + self._key
        return self._by_head(qkv[:, :first_key]), self._by_head(qkv[:, first_key:first_value]), self._by_head(qkv[:, first_value:])

    def _by_head(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1, self._head_dim)

    def _prepare(self) -> None:
        for linear in self.linears:
            linear.prepare()

    # -- forward

    def forward(self, x_TH: Tensor, out_TH: Tensor, stream: Stream, *, owner: str, keep_gate_up: bool = True) -> Kept:
        """out = layer(x). What is returned is good until x changes, or another forward pass of the same `owner` overwrites it."""
        tokens, hidden, inner = x_TH.shape[0], self._hidden, self._inner
        self._prepare()
        raw = self._take(f"qkv {owner}", tokens, self._query + 2 * self._key)
        qk_width = self._query + self._key
        ready = raw if self._qk_weight is None else self._take(f"qk {owner}", tokens, qk_width)
        qk, qk_ready, v = self._by_head(raw[:, :qk_width]), self._by_head(ready[:, :qk_width]), self._by_head(raw[:, qk_width:])
        for rows in tiles(x_TH):
            normed = self._take("normed", rows.stop - rows.start, hidden + self.qkv.spare)
            rms_norm(x_TH[rows], *self._norms[0], out=normed[:, :hidden])
            self.qkv.forward(normed, raw[rows])
            tables = stream.cos_TD[rows], stream.sin_TD[rows]
            position_heads(qk[rows], self._qk_weight, self._qk_eps, *tables, out=qk_ready[rows])

        q_ready, k_ready = self._by_head(ready[:, : self._query]), self._by_head(ready[:, self._query : qk_width])
        attended_TQ = self._take(f"attended {owner}", tokens, self._query)
        out = self._by_head(attended_TQ)
        _, saved = stream.attention.forward(q_ready, k_ready, v, self._scaling, out=out, owner=None if owner == ANY else owner)

        middle_TH = self._take(f"middle {owner}", tokens, hidden)
        kept_gate_up = self._take(f"gate_up {owner}", tokens, 2 * inner + self.gate_up.spare) if keep_gate_up else None
        for rows in tiles(x_TH):
            size = rows.stop - rows.start
            self.o.forward(self._with_spare(attended_TQ[rows]), middle_TH[rows], add=x_TH[rows])
            normed = self._take("normed", size, hidden + self.gate_up.spare)
            rms_norm(middle_TH[rows], *self._norms[1], out=normed[:, :hidden])
            gate_up = self._take("gate_up", size, 2 * inner) if kept_gate_up is None else kept_gate_up[rows, : 2 * inner]
            self.gate_up.forward(normed, gate_up)
            act = self._take("act", size, inner + self.down.spare)
            swiglu(gate_up, out=act[:, :inner])
            self.down.forward(act, out_TH[rows], add=middle_TH[rows])
        return Kept(x_TH, raw, saved, attended_TQ, middle_TH, kept_gate_up)

    def _with_spare(self, attended_TQ: Tensor) -> Tensor:
        if not self.o.spare:
            return attended_TQ
        wide = self._take("attended wide", attended_TQ.shape[0], self._query + self.o.spare)
        wide[:, : self._query] = attended_TQ
        return wide

    # -- backward

    def backward(self, d_TH: Tensor, stream: Stream, kept: Kept, gradients: Gradients, *, further: bool) -> None:
        """Adds the adapters' gradients to `gradients`. d_TH [T, H + spare columns] holds dL/d(out) and then, with `further`, dL/dx."""
        qkv_learns = further or self.qkv.adapted
        attention_learns = qkv_learns or self.o.adapted
        self._prepare()
        d_attended = self._take("d_attended", d_TH.shape[0], self._query)
        for rows in tiles(d_TH):
            kept_gate_up = None if kept.gate_up is None else kept.gate_up[rows]
            self._mlp_backward(d_TH[rows], kept.middle_TH[rows], kept_gate_up, gradients, further=attention_learns)
            if attention_learns:
                d_wide = d_TH[rows, : self._hidden + self.o.spare]
                self.o.input_gradient(d_wide, d_attended[rows])
                attended = self._with_spare(kept.attended_TQ[rows])
                if self.o.spare:
                    self.o.fill_spare(attended)
                self.o.weight_gradients(attended, d_wide, gradients)
        if qkv_learns:
            d_qkv_ready = stream.attention.backward(kept.attention, self._by_head(d_attended))
            for rows in tiles(d_TH):
                d_ready = tuple(part[rows] for part in d_qkv_ready)
                self._qkv_backward(d_TH[rows], d_ready, stream, rows, kept, gradients, further=further)

    def _mlp_backward(self, d_TH: Tensor, middle_TH: Tensor, gate_up: Tensor | None, gradients: Gradients, *, further: bool) -> None:
        """From dL/d(out) to dL/d(middle), in d_TH; gate_up becomes its gradient."""
        tokens, inner, hidden = d_TH.shape[0], self._inner, self._hidden
        normed = self._take("normed", tokens, hidden + self.gate_up.spare)
        rms_norm(middle_TH, *self._norms[1], out=normed[:, :hidden])
        if gate_up is None:
            gate_up = self._take("gate_up", tokens, 2 * inner + self.gate_up.spare)
            self.gate_up.forward(normed, gate_up[:, : 2 * inner])
        elif self.gate_up.spare:
            self.gate_up.fill_spare(normed)
        d_act = self._take("d_act", tokens, inner)
        d_wide = d_TH[:, : hidden + self.down.spare]
        self.down.input_gradient(d_wide, d_act)
        act = self._take("act", tokens, inner + self.down.spare)
        swiglu_backward(gate_up[:, : 2 * inner], d_act, act[:, :inner])
        if self.down.spare:
            self.down.fill_spare(act)
        self.down.weight_gradients(act, d_wide, gradients)

        d_normed = self._take("d_normed", tokens, hidden) if further else None
        self.gate_up.input_gradient(gate_up, d_normed)
        self.gate_up.weight_gradients(normed, gate_up, gradients)
        if d_normed is not None:
            rms_norm_backward(middle_TH, *self._norms[1], d_normed, add_to=d_TH[:, :hidden])

    def _qkv_backward(
        self, d_TH: Tensor, d_ready: tuple[Tensor, ...], stream: Stream, rows: slice, kept: Kept, gradients: Gradients, *, further: bool
    ) -> None:
        """From the gradients of rotated q, k and of v to dL/dx, added to d_TH."""
        tokens, width, hidden = d_TH.shape[0], self._query + 2 * self._key, self._hidden
        d_qkv = self._take("d_qkv", tokens, width + self.qkv.spare)
        d_parts, raw = self._heads(d_qkv[:, :width]), self._heads(kept.qkv_raw[rows])
        query_heads = self._query // self._head_dim
        for number, heads in enumerate((slice(0, query_heads), slice(query_heads, None))):
            weight = None if self._qk_weight is None else self._qk_weight[heads]
            tables = stream.cos_TD[rows], stream.sin_TD[rows]
            position_heads_backward(raw[number], weight, self._qk_eps, *tables, d_ready[number], d_parts[number])
        d_parts[2].copy_(d_ready[2])

        d_normed = self._take("d_normed", tokens, hidden) if further else None
        self.qkv.input_gradient(d_qkv, d_normed)
        if self.qkv.adapted:
            normed = self._take("normed", tokens, hidden + self.qkv.spare)
            rms_norm(kept.x_TH[rows], *self._norms[0], out=normed[:, :hidden])
            if self.qkv.spare:
                self.qkv.fill_spare(normed)
            self.qkv.weight_gradients(normed, d_qkv, gradients)
        if d_normed is not None:
            rms_norm_backward(kept.x_TH[rows], *self._norms[0], d_normed, add_to=d_TH[:, :hidden])


def tiles(x_TH: Tensor) -> list[slice]:
    """Rows that go through a chain of operations together, so that what lies between them stays in the cache; on CUDA all of them.

    Tiles of one size but for the last: a new number of rows costs a bfloat16 product 10 ms once (Decoder._whole_rows).
    """
    total = x_TH.shape[0]
    step = total if x_TH.is_cuda else TILE_ROWS
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]


def norm_of(module: Any) -> tuple[Tensor, float]:
    """Weight (float32) and epsilon of one of transformers' RMS norms."""
    return module.weight.detach().float(), float(module.variance_epsilon)


def widest_spare(layers: Sequence[DecoderLayer]) -> int:
    """Spare columns that the residual stream's gradient needs: those of the layers that write into the stream."""
    return max((linear.spare for layer in layers for linear in (layer.o, layer.down)), default=0)
