"""The parts of a decoder layer that treat every token by itself: RMS norm, rotary embedding, SwiGLU; forward, and backward by hand.

Cost: no products, only passes over memory. On the CPU one pass each, by row_kernels.cpp, where it can be compiled; else torch operators
over blocks of rows whose temporaries stay in the second-level cache. Results go into buffers that the caller keeps (`out`), because
touching fresh memory costs more than the arithmetic (docs/LOG.md). On CUDA `torch.compile` makes one kernel of each formula.

The results are those of transformers' Llama and Qwen modules; norms and rotations are computed in float32 and rounded once, where
transformers rounds to the compute type in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

from ptlab.engines import row_kernels

BLOCK_ELEMENTS = 2**16
"""Numbers of one operand in a block: 256 KiB in float32, a few of which fit into a core's second-level cache."""


def row_blocks(rows_TW: Tensor) -> Iterator[slice]:
    """Slices over the first dimension; one for all of it on CUDA."""
    total = rows_TW.shape[0]
    step = max(1, total if rows_TW.is_cuda else BLOCK_ELEMENTS // max(1, rows_TW[:1].numel()))
    return (slice(start, min(start + step, total)) for start in range(0, total, step))


@cache
def _compiled(formula: Callable[..., None]) -> Callable[..., None]:
    return torch.compile(formula, dynamic=True)


def _run(formula: Callable[..., None], on: Tensor) -> Callable[..., None]:
    return _compiled(formula) if on.is_cuda else formula


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a * b, returned. torch.compile takes no `out` that is a part of something; it makes one pass of the two anyway."""
    return out.copy_(a * b) if torch.compiler.is_compiling() else torch.mul(a, b, out=out)


# ---------------------------------------------------------------------------------------------------------------- RMS norm


def _inverse_rms(x32: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean of squares + eps) over the last dimension, which stays with size 1."""
    norm: Tensor = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
    return norm.square().div(x32.shape[-1]).add(eps).rsqrt()


def _norm_gradient(x32: Tensor, eps: float, d_unit: Tensor) -> Tensor:
    """dL/dx, in the memory of d_unit = dL/d(x / rms(x))."""
    inverse = _inverse_rms(x32, eps)
    along = (x32 * d_unit).sum(dim=-1, keepdim=True).mul_(inverse.pow(3)).div_(x32.shape[-1])
    return d_unit.mul_(inverse).addcmul_(x32, along, value=-1.0)


def _rms_norm(x: Tensor, weight_H: Tensor, eps: float, out: Tensor) -> None:
    x32 = x.float()
    out.copy_((x32 * _inverse_rms(x32, eps)).mul_(weight_H))


def _rms_norm_backward(x: Tensor, weight_H: Tensor, eps: float, d_out: Tensor, add_to: Tensor) -> None:
    add_to.add_(_norm_gradient(x.float(), eps, d_out.float() * weight_H).to(add_to.dtype))


def rms_norm(x: Tensor, weight_H: Tensor, eps: float, out: Tensor) -> None:
    """out = x / rms(x) * weight over the last dimension, in float32. Shapes: x and out [T, ..., H]; weight float32."""
    if row_kernels.can_run(x, out) and x.dim() == 2:
        return row_kernels.run("rms_norm", [x, (weight_H,), eps, out], [x.shape[1]])
    formula = _run(_rms_norm, x)
    for rows in row_blocks(x):
        formula(x[rows], weight_H, eps, out[rows])


def rms_norm_backward(x: Tensor, weight_H: Tensor, eps: float, d_out: Tensor, add_to: Tensor) -> None:
    """add_to += dL/dx, given x and dL/d(norm of x). The weight is frozen."""
    if row_kernels.can_run(x, d_out, add_to) and x.dim() == 2:
        return row_kernels.run("rms_norm_backward", [x, (weight_H,), eps, d_out, add_to], [x.shape[1]])
    formula = _run(_rms_norm_backward, x)
    for rows in row_blocks(x):
        formula(x[rows], weight_H, eps, d_out[rows], add_to[rows])


# ----------------------------------------------------------------------------------------- heads: norm and rotary embedding


def _rotate_into(x32: Tensor, cos_TD: Tensor, sin_TD: Tensor, sign: float, out32: Tensor) -> None:
    half = x32.shape[-1] // 2
    first, second = x32[..., :half], x32[..., half:]
    cos, sin = cos_TD[:, None, :half], sin_TD[:, None, :half]
    _product(first, cos, out32[..., :half]).addcmul_(second, sin, value=-sign)
    _product(second, cos, out32[..., half:]).addcmul_(first, sin, value=sign)


def _position_heads(x: Tensor, weight_QD: Tensor | None, eps: float, cos_TD: Tensor, sin_TD: Tensor, out: Tensor) -> None:
    x32 = x.float()
    if weight_QD is not None:
        x32 = (x32 * _inverse_rms(x32, eps)).mul_(weight_QD)
    rotated = out if weight_QD is not None and out.dtype == torch.float32 else torch.empty_like(x32)
    _rotate_into(x32, cos_TD, sin_TD, 1.0, rotated)
    if rotated is not out:
        out.copy_(rotated)


def _position_heads_backward(
    x: Tensor, weight_QD: Tensor | None, eps: float, cos_TD: Tensor, sin_TD: Tensor, d_out: Tensor, dx: Tensor
) -> None:
    d32 = d_out.float()
    d_normed = torch.empty_like(d32)
    _rotate_into(d32, cos_TD, sin_TD, -1.0, d_normed)
    if weight_QD is None:
        dx.copy_(d_normed)
        return
    dx.copy_(_norm_gradient(x.float(), eps, d_normed.mul_(weight_QD)))


def position_heads(x: Tensor, weight_QD: Tensor | None, eps: float, cos_TD: Tensor, sin_TD: Tensor, out: Tensor) -> None:
    """Queries or keys made ready: RMS norm over each head (Qwen3; weight None = none), then the rotary position embedding.

    Shapes: x and out [T, heads, D], out may be x itself if there is no norm; cos and sin float32 [T, D], the second half as the first.
    """
    if row_kernels.can_run(x, out) and x.shape[2] <= row_kernels.MOST_HEAD_DIM:
        return row_kernels.run("position_heads", [x, (weight_QD,), eps, cos_TD, sin_TD, out], [*x.shape[1:]])
    formula = _run(_position_heads, x)
    for rows in row_blocks(x):
        formula(x[rows], weight_QD, eps, cos_TD[rows], sin_TD[rows], out[rows])


def position_heads_backward(
    x: Tensor, weight_QD: Tensor | None, eps: float, cos_TD: Tensor, sin_TD: Tensor, d_out: Tensor, dx: Tensor
) -> None:
    """dx = dL/dx. The rotation's transpose is the rotation back; x is read only where there is a norm."""
    if row_kernels.can_run(x, d_out, dx) and x.shape[2] <= row_kernels.MOST_HEAD_DIM:
        return row_kernels.run("position_heads_backward", [x, (weight_QD,), eps, cos_TD, sin_TD, d_out, dx], [*x.shape[1:]])
    formula = _run(_position_heads_backward, d_out)
    for rows in row_blocks(d_out):
        formula(x[rows], weight_QD, eps, cos_TD[rows], sin_TD[rows], d_out[rows], dx[rows])


# ------------------------------------------------------------------------------------------------------------------ SwiGLU


def _swiglu(gate_up: Tensor, out: Tensor) -> None:
    gate, up = gate_up.chunk(2, dim=-1)
    _product(torch.nn.functional.silu(gate), up, out)


def _swiglu_backward(gate_up: Tensor, d_act: Tensor, act: Tensor) -> None:
    gate, up = gate_up.chunk(2, dim=-1)
    silu = torch.nn.functional.silu(gate)
    _product(silu, up, act)
    d_silu = d_act * up
    _product(d_act, silu, up)
    gate.copy_(torch.ops.aten.silu_backward(d_silu, gate))


def swiglu(gate_up: Tensor, out: Tensor) -> None:
    """out = silu(gate) * up. Shapes: gate_up [T, 2 I], gate first; out [T, I]."""
    if row_kernels.can_run(gate_up, out):
        return row_kernels.run("swiglu", [gate_up, out], [out.shape[1]])
    formula = _run(_swiglu, gate_up)
    for rows in row_blocks(gate_up):
        formula(gate_up[rows], out[rows])


def swiglu_backward(gate_up: Tensor, d_act: Tensor, act: Tensor) -> None:
    """gate_up becomes dL/d(gate_up); `act` [T, I] is filled with silu(gate) * up again, which the down projection's adapter needs.

    Shapes: gate_up [T, 2 I], d_act = dL/d(act) [T, I].
    """
    if row_kernels.can_run(gate_up, d_act, act):
        return row_kernels.run("swiglu_backward", [gate_up, d_act, act], [d_act.shape[1]])
    formula = _run(_swiglu_backward, gate_up)
    for rows in row_blocks(gate_up):
        formula(gate_up[rows], d_act[rows], act[rows])
