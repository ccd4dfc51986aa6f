"""Frozen linear layers that read the same input, computed as one, with what the adapter in use adds to them; backward by hand.

q, k and v (gate and up) are stacked: one product instead of three. The frozen weights get no gradient, and none of their inputs is kept
for one. T tokens, `in` and `out` features, R = the ranks of the stacked adapters together:

    float32    W + s B A is formed for each product (r out in: r / T of its cost), so that adapters cost nothing forward or
               backward but their own gradients: 2 T (in out) forward, 2 T (in out) + 4 T R (in + out) backward.
    bfloat16   the sum would round small updates away. Instead [x, x A'] [W, s B]' forward and [dy, dy s B] [W; A] backward: each again
               one product, R wider, over buffers with R spare columns; no pass over the outputs is added.

Deviation from PEFT in bfloat16: A and B are rounded to bfloat16 as a sampler's are, instead of casting the inputs up to float32. The
masters stay float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ptlab.engines.buffers import Buffers
from ptlab.engines.lora_layers import LowRank

Gradients = dict[str, Tensor]
"""dL/d(LoRA matrix), float32, by PEFT's names (`<path>.lora_A.weight`)."""


class FusedLinear:
    """The layers' weights become views of one matrix, so that the model they belong to goes on working, without a second copy."""

    def __init__(self, layers: Sequence[tuple[str, nn.Linear]], role: str, buffers: Buffers, *, apart: bool) -> None:
        """
        Args:
            role: what it is in its layer; two of one role are never in use at once.
            apart: keep the merged weight from `use` to `use`: as much memory again as the frozen weights, and no merging for each product.
        """
        self.paths = [path for path, _ in layers]
        self._linears = [linear for _, linear in layers]
        first = self._linears[0].weight
        self.in_features, self.dtype = first.shape[1], first.dtype
        self._rows: list[slice] = []
        for linear in self._linears:
            start = self._rows[-1].stop if self._rows else 0
            self._rows.append(slice(start, start + linear.weight.shape[0]))
        self.out_features = self._rows[-1].stop
        self._apart, self._prepared = apart, False
        self._role, self._buffers = (self.paths[0] if apart else role), buffers
        self._merges = self.dtype == torch.float32
        self._spare = 0
        """Rows and columns of _matrix beyond the frozen weights."""
        self._matrix = self._stack(0)
        self._weight = self._matrix
        biases = [linear.bias for linear in self._linears]
        self.bias: Tensor | None = None if biases[0] is None else torch.cat([b.detach() for b in biases if b is not None])
        self._parts: list[tuple[int, LowRank, slice]] = []
        """Of each adapted layer: its number, its adapter, and its columns among the R."""
        self._rank = 0
        self._a_RI: Tensor | None = None
        """All A, one above the other (float32)."""

    def _stack(self, spare: int) -> Tensor:
        """[[W, 0], [0, 0]] with the layers' weights moved into it."""
        weight = self._linears[0].weight
        matrix = torch.zeros(self.out_features + spare, self.in_features + spare, dtype=weight.dtype, device=weight.device)
        for rows, linear in zip(self._rows, self._linears, strict=True):
            matrix[rows, : self.in_features] = linear.weight.detach()
            linear.weight.data = matrix[rows, : self.in_features]
        return matrix

    # -- the adapter in use

    def use(self, adapters: Sequence[LowRank | None]) -> None:
        """Compute with these from now on, one per layer, as their numbers are now; to be called again when they have changed."""
        self._parts, self._rank, self._prepared = [], 0, False
        for number, adapter in enumerate(adapters):
            if adapter is not None:
                rank = adapter.a_RI.shape[0]
                self._parts.append((number, adapter, slice(self._rank, self._rank + rank)))
                self._rank += rank
        if not self._rank:
            return
        if self._merges:
            self._a_RI = torch.cat([adapter.a_RI.detach() for _, adapter, _ in self._parts])
            return
        if self._rank > self._spare:
            self._spare = self._rank
            self._matrix = self._stack(self._spare)
        with torch.no_grad():
            self._matrix[: self.out_features, self.in_features :].zero_()
            for number, adapter, columns in self._parts:
                self._b_in_matrix(number, columns).copy_(adapter.b_OR * adapter.scale)
                self._a_in_matrix(columns).copy_(adapter.a_RI)

    @property
    def adapted(self) -> bool:
        return bool(self._parts)

    @property
    def spare(self) -> int:
        """Columns that a buffer for x or for dy has behind its own in bfloat16 (0 in float32)."""
        return 0 if self._merges else self._rank

    def _b_in_matrix(self, number: int, columns: slice) -> Tensor:
        return self._matrix[self._rows[number], self.in_features + columns.start : self.in_features + columns.stop]

    def _a_in_matrix(self, columns: slice) -> Tensor:
        return self._matrix[self.out_features + columns.start : self.out_features + columns.stop, : self.in_features]

    def prepare(self) -> None:
        """Make the weight that the next calls multiply with: W + s B A, in memory that all layers of this role share (not if `apart`)."""
        if self._apart and self._prepared:
            return
        self._prepared = True
        frozen = self._matrix[: self.out_features, : self.in_features]
        if not (self._merges and self._parts):
            self._weight = frozen
            return
        self._weight = self._buffers.take(f"merged {self._role}", self.out_features, self.in_features, dtype=self.dtype)
        adapted = {number: adapter for number, adapter, _ in self._parts}
        for number, rows in enumerate(self._rows):
            if number in adapted:
                lora = adapted[number]
                torch.addmm(frozen[rows], lora.b_OR.detach(), lora.a_RI.detach(), alpha=lora.scale, out=self._weight[rows])
            else:
                self._weight[rows] = frozen[rows]

    # -- forward

    def forward(self, x: Tensor, out: Tensor, add: Tensor | None = None) -> None:
        """out = (W + s B A) x + bias, and + add if given (the residual stream). After `prepare`.

        Shapes: x [T, in + spare], of which this fills the spare columns; out [T, out] (may be wider in memory), add [T, out].
        """
        weight = self._weight
        if self.spare:
            self.fill_spare(x)
            weight = self._matrix[: self.out_features, : self.in_features + self._rank]
        base = add if add is not None else self.bias
        if base is None:
            torch.mm(x, weight.t(), out=out)
        else:
            torch.addmm(base, x, weight.t(), out=out)
            if add is not None and self.bias is not None:
                out += self.bias

    def fill_spare(self, x: Tensor) -> None:
        """Write x A' into the spare columns of x."""
        rank = slice(self.out_features, self.out_features + self._rank)
        x[:, self.in_features :].zero_()  # oneDNN may read them for a width that is no multiple of 32, times 0: old numbers must be finite
        torch.mm(x[:, : self.in_features], self._matrix[rank, : self.in_features].t(), out=x[:, self.in_features :])

    # -- backward

    def input_gradient(self, dy: Tensor, out: Tensor | None) -> None:
        """out = dL/dx; None where nobody below learns. Shapes: dy [T, out + spare], of which this fills the spare columns; out [T, in]."""
        if self.spare:
            b_OR = self._matrix[: self.out_features, self.in_features : self.in_features + self._rank]
            dy[:, self.out_features :].zero_()  # as in fill_spare
            torch.mm(dy[:, : self.out_features], b_OR, out=dy[:, self.out_features :])
            if out is not None:
                torch.mm(dy, self._matrix[: self.out_features + self._rank, : self.in_features], out=out)
        elif out is not None:
            torch.mm(dy, self._weight, out=out)

    def weight_gradients(self, x: Tensor, dy: Tensor, gradients: Gradients) -> None:
        """gradients += those of A and B. x and dy as above; their spare columns are filled (forward, input_gradient)."""
        if not self._parts:
            return
        if self.spare:
            x_a, dy_b = x[:, self.in_features :], dy[:, self.out_features :]
        else:
            assert self._a_RI is not None
            x_a = self._buffers.take("x_a", x.shape[0], self._rank, dtype=self.dtype)
            dy_b = self._buffers.take("dy_b", x.shape[0], self._rank, dtype=self.dtype)
            torch.mm(x, self._a_RI.t(), out=x_a)
            for number, lora, columns in self._parts:
                torch.mm(dy[:, self._rows[number]], lora.b_OR.detach() * lora.scale, out=dy_b[:, columns])
        d_a = torch.mm(dy_b.t(), x[:, : self.in_features])
        for number, lora, columns in self._parts:
            dy_part, x_a_part = dy[:, self._rows[number]], x_a[:, columns]
            # the same product; which way round is fast depends on the library behind the type: 3x in float32, 1.3x in bfloat16
            d_b = torch.mm(dy_part.t(), x_a_part) if self.spare else torch.mm(x_a_part.t(), dy_part).t()
            name = self.paths[number]
            for side, gradient in (("A", d_a[columns].float()), ("B", d_b.float() * lora.scale)):
                key = f"{name}.lora_{side}.weight"
                if key in gradients:
                    gradients[key] += gradient
                else:
                    gradients[key] = gradient.clone(memory_format=torch.contiguous_format)
