"""Norms, rotation and SwiGLU, by kernels and by operators, against transformers' own modules and autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from ptlab.engines import row_kernels, row_ops

TYPES = [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)]  # relative L2; bfloat16 has 8 bits


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture(autouse=True, params=["kernels", "two threads", "operators"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    if request.param == "operators":
        monkeypatch.setattr(row_kernels, "load", lambda: None)
        monkeypatch.setattr(row_ops, "BLOCK_ELEMENTS", 100)  # several blocks, the last one shorter
    elif row_kernels.load() is None:
        pytest.skip("no C++ compiler here: the kernels are not used")
    elif request.param == "two threads":
        monkeypatch.setattr(row_kernels, "ROWS_WORTH_A_THREAD", 8)
        torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norm_module(width: int) -> Qwen3RMSNorm:
    module = Qwen3RMSNorm(width, eps=1e-3).requires_grad_(False)
    module.weight.copy_(normal(width, seed=9))
    return module


def test_blocks_cover_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_ops, "BLOCK_ELEMENTS", 100)
    rows = [r for part in row_ops.row_blocks(torch.empty(23, 4, 2)) for r in range(part.start, part.stop)]
    assert rows == list(range(23))
    assert list(row_ops.row_blocks(torch.empty(0, 8))) == []
    assert [part.stop - part.start for part in row_ops.row_blocks(torch.empty(3, 1000))] == [1, 1, 1]  # wider than a block


@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
def test_rms_norm_and_its_gradient(dtype: torch.dtype, tolerance: float) -> None:
    x, d_out, before = normal(23, 16, dtype=dtype), normal(23, 16, dtype=dtype, seed=1), normal(23, 16, dtype=dtype, seed=2)
    module = norm_module(16)
    leaf = x.float().clone().requires_grad_()
    expected = module(leaf)
    (gradient,) = torch.autograd.grad(expected, leaf, d_out.float())

    wide = torch.zeros(23, 20, dtype=dtype)
    row_ops.rms_norm(x, module.weight, 1e-3, out=wide[:, :16])
    assert relative(wide[:, :16], expected.detach()) < tolerance
    assert (wide[:, 16:] == 0).all()
    total = before.clone()
    row_ops.rms_norm_backward(x, module.weight, 1e-3, d_out, add_to=total)
    assert relative(total, before.float() + gradient) < tolerance


@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
def test_heads_are_normed_and_rotated(dtype: torch.dtype, tolerance: float, with_norm: bool) -> None:
    x, d_out = normal(23, 3, 8, dtype=dtype), normal(23, 3, 8, dtype=dtype, seed=1)
    angles = normal(23, 4, seed=2)
    cos, sin = torch.cat((angles, angles), 1).cos() * 1.1, torch.cat((angles, angles), 1).sin() * 1.1  # 1.1: yarn scales both
    module = norm_module(8) if with_norm else None
    leaf = x.float().clone().requires_grad_()
    normed = leaf if module is None else module(leaf)
    expected = apply_rotary_pos_emb(normed[None].transpose(1, 2), normed[None].transpose(1, 2), cos[None], sin[None])[0].transpose(1, 2)[0]
    (gradient,) = torch.autograd.grad(expected, leaf, d_out.float())
    weight, eps = (None, 0.0) if module is None else (module.weight.expand(3, -1).contiguous(), 1e-3)

    out = torch.empty_like(x) if with_norm else x.clone()  # without a norm in place, as the decoder does
    tables = cos, sin
    row_ops.position_heads(x if with_norm else out, weight, eps, *tables, out=out)
    assert relative(out, expected.detach()) < tolerance
    dx = torch.empty_like(x)
    row_ops.position_heads_backward(x, weight, eps, *tables, d_out, dx)
    assert relative(dx, gradient) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
def test_swiglu_and_its_gradient(dtype: torch.dtype, tolerance: float) -> None:
    gate_up, d_act = normal(23, 12, dtype=dtype), normal(23, 6, dtype=dtype, seed=1)
    leaf = gate_up.float().clone().requires_grad_()
    expected = torch.nn.functional.silu(leaf[:, :6]) * leaf[:, 6:]
    (gradient,) = torch.autograd.grad(expected, leaf, d_act.float())

    out, again = torch.empty(2, 23, 6, dtype=dtype)
    row_ops.swiglu(gate_up, out=out)
    assert relative(out, expected.detach()) < tolerance
    row_ops.swiglu_backward(gate_up, d_act, again)
    assert relative(again, out) < tolerance
    assert relative(gate_up, gradient) < tolerance


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden(value: float) -> None:
    gate_up, act = normal(9, 8), torch.empty(9, 4)
    gate_up[4, 1] = value
    row_ops.swiglu(gate_up, out=act)
    assert not act[4].isfinite().all() and act[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()
    x, out = normal(9, 8, dtype=torch.bfloat16), torch.empty(9, 8, dtype=torch.bfloat16)
    x[2, 3] = value
    row_ops.rms_norm(x, torch.ones(8), 1e-6, out=out)
    assert not out[2].isfinite().all() and out[3].isfinite().all()


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # of torch.compile itself, on import
def test_the_formulas_can_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA every formula goes through torch.compile. Here without code generation: what would not see the GPU's own compiler fail."""
    compiled = {}

    def compile_without_code(formula: Callable[..., None], on: Tensor) -> Callable[..., None]:
        compiled.setdefault(formula, torch.compile(formula, dynamic=True, fullgraph=True, backend="aot_eager"))
        return compiled[formula]

    monkeypatch.setattr(row_kernels, "load", lambda: None)
    monkeypatch.setattr(row_ops, "_run", compile_without_code)
    monkeypatch.setattr(row_ops, "BLOCK_ELEMENTS", 2**20)
    for tokens in (7, 9):
        gate_up, act, again = normal(tokens, 12), torch.empty(tokens, 6), torch.empty(tokens, 6)
        expected = torch.nn.functional.silu(gate_up[:, :6]) * gate_up[:, 6:]
        row_ops.swiglu(gate_up, out=act)
        row_ops.swiglu_backward(gate_up, normal(tokens, 6), again)
        assert relative(act, expected) < 1e-6
        assert relative(again, expected) < 1e-6
        x, heads, angles = normal(tokens, 16), normal(tokens, 3, 8), torch.ones(tokens, 8)
        normed = torch.empty_like(x)
        row_ops.rms_norm(x, torch.ones(16), 0.0, out=normed)
        torch.testing.assert_close(normed.square().mean(-1), torch.ones(tokens))
        row_ops.rms_norm_backward(normal(tokens, 16), torch.ones(16), 1e-3, normed, add_to=x)
        ready = torch.empty_like(heads)
        row_ops.position_heads(heads, torch.ones(3, 8), 1e-3, angles, angles, out=ready)
        row_ops.position_heads_backward(heads, torch.ones(3, 8), 1e-3, angles, angles, ready, torch.empty_like(ready))
    assert len(compiled) == 6
