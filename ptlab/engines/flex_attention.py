"""The same attention as tree_attention.py on a GPU: torch's flex_attention, compiled once, one Triton kernel forward and one backward.

Which 128 x 128 blocks of the [T, T] square have anything to see is worked out here from the segments, without ever making the square:
key k is seen by the queries k .. until[k] - 1, so that block (i, j), j < i, has something to see if the largest `until` of j lies beyond
the first query of i, and nothing to hide if its smallest lies beyond the last. torch's create_block_mask would make all T x T.

Cost: 2 D FLOPs forward and 5 D backward per query head and pair of a visited block; for the mask one int64 per token and 8 bytes a block.

How it stays one compilation (20 .. 60 s on a GPU, in the first step) per model and type:
- The stream is filled up to whole blocks, and handed over as [heads, blocks, 128, head_dim]. Then the compiler knows that its length is a
  multiple of 128: no bounds are checked in the kernels, and pytorch issue 153799 (NaN in gradients of other lengths) cannot occur.
- Two blocks at least: one would be a special case to the compiler.
- The BlockMask is made inside the compiled function. Made outside it is an object whose lengths are guarded, compiled again for each
  (pytorch pull request 189952).
- `ROWS_GUARANTEED_SAFE` stays off: a row may see nothing in the first blocks that its block visits, although it always sees itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ptlab.engines.buffers import Buffers
from ptlab.engines.prefix_tree import Segment
from ptlab.engines.tree_attention import Attention, AttentionSaved, TreeAttention

BLOCK = 128
"""Tokens: flex_attention's own block size."""


def attention_for(segments: Sequence[Segment], num_tokens: int, device: torch.device, buffers: Buffers) -> Attention:
    """The fastest exact attention on this device."""
    if device.type == "cuda":
        return FlexTreeAttention(segments, num_tokens, device)
    return TreeAttention(segments, num_tokens, device, buffers)


class FlexTreeAttention:
    """Made once per micro-batch for all layers. `compiler` is torch.compile's backend; tests on a CPU take another."""

    def __init__(self, segments: Sequence[Segment], num_tokens: int, device: torch.device, compiler: str = "inductor") -> None:
        self._tokens = num_tokens
        self._blocks = max(2, -(-num_tokens // BLOCK))
        until_T = np.full(self._blocks * BLOCK, self._blocks * BLOCK, np.int64)  # what fills up sees only itself and is seen by itself
        for segment in segments:
            until_T[segment.start : segment.start + segment.length] = segment.end
        some_BB, all_BB = visible_blocks(until_T)
        self._mask = [torch.from_numpy(until_T).to(device, torch.int32)]
        for visited_BB in (some_BB & ~all_BB, all_BB):
            for lists_BB in (visited_BB, visited_BB.T):  # keys of each query block; queries of each key block
                self._mask += (torch.from_numpy(x).to(device)[None, None] for x in block_lists(lists_BB))
        for x in self._mask:
            for dim in range(x.dim()):
                if x.shape[dim] > 1:
                    torch._dynamo.maybe_mark_dynamic(x, dim)
        self._compiler = compiler

    def forward(
        self, q_TQD: Tensor, k_TGD: Tensor, v_TGD: Tensor, scale: float, out: Tensor | None = None, owner: str | None = None
    ) -> tuple[Tensor, AttentionSaved]:
        """As TreeAttention.forward. What is saved holds a graph of this one operation."""
        q, k, v = (self._whole_blocks(x).requires_grad_() for x in (q_TQD, k_TGD, v_TGD))
        with torch.enable_grad():
            out_HBND = compiled(scale, self._compiler)(q, k, v, *self._mask)
        saved = AttentionSaved(q, k, v, scale, out_HBND, None, [])
        out_TQD = self._tokens_first(out_HBND.detach())
        if out is None:
            return out_TQD, saved
        return out.copy_(out_TQD), saved

    def backward(self, saved: AttentionSaved, dout_TQD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As TreeAttention.backward; once per forward."""
        inputs = saved.q_TQD, saved.k_TGD, saved.v_TGD
        dq, dk, dv = torch.autograd.grad(saved.out_TQD, inputs, self._whole_blocks(dout_TQD))
        return self._tokens_first(dq), self._tokens_first(dk), self._tokens_first(dv)

    def _whole_blocks(self, x_THD: Tensor) -> Tensor:
        """[heads, blocks, 128, head_dim]: a copy, 0 behind the stream."""
        tokens, heads, head_dim = x_THD.shape
        whole = x_THD.new_zeros(heads, self._blocks * BLOCK, head_dim)
        whole[:, :tokens] = x_THD.detach().transpose(0, 1)
        whole = whole.view(heads, self._blocks, BLOCK, head_dim)
        torch._dynamo.maybe_mark_dynamic(whole, 1)
        return whole

    def _tokens_first(self, x_HBND: Tensor) -> Tensor:
        return x_HBND.reshape(x_HBND.shape[0], -1, x_HBND.shape[-1])[:, : self._tokens].transpose(0, 1)


@cache
def compiled(scale: float, compiler: str) -> Callable[..., Tensor]:
    """flex_attention with the tree's mask. One function per scale: a number that changes would become an input of the graph."""

    def attend(
        q_HBND: Tensor, k_HBND: Tensor, v_HBND: Tensor, until_T: Tensor,
        kv_count: Tensor, kv_index: Tensor, q_count: Tensor, q_index: Tensor,
        full_kv_count: Tensor, full_kv_index: Tensor, full_q_count: Tensor, full_q_index: Tensor,
    ) -> Tensor:  # fmt: skip
        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & (query < until_T[key])

        query, key, value = (x.flatten(1, 2)[None] for x in (q_HBND, k_HBND, v_HBND))
        mask = BlockMask(
            seq_lengths=(query.shape[2], query.shape[2]),
            kv_num_blocks=kv_count, kv_indices=kv_index, full_kv_num_blocks=full_kv_count, full_kv_indices=full_kv_index,
            q_num_blocks=q_count, q_indices=q_index, full_q_num_blocks=full_q_count, full_q_indices=full_q_index,
            BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=sees,
        )  # fmt: skip
        gqa = query.shape[1] != key.shape[1]
        out = flex_attention(query, key, value, block_mask=mask, scale=scale, enable_gqa=gqa, kernel_options={"BACKEND": "TRITON"})
        return out[0].view(q_HBND.shape)

    return torch.compile(attend, backend=compiler, fullgraph=True)


def visible_blocks(until_T: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """[query block, key block]: whether any query sees any key, and whether every query sees every key."""
    until_BN = until_T.reshape(-1, BLOCK)
    first_B = np.arange(len(until_BN)) * BLOCK
    before_BB = np.tri(len(until_BN), k=-1, dtype=np.bool_)
    some_BB = before_BB & (until_BN.max(1)[None, :] > first_B[:, None]) | np.eye(len(until_BN), dtype=np.bool_)
    all_BB = before_BB & (until_BN.min(1)[None, :] >= first_B[:, None] + BLOCK)
    return some_BB, all_BB


def block_lists(visited_RC: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """How many columns each row has, and which, first in each row of [R, C]; behind them the others."""
    return visited_RC.sum(1, dtype=np.int32), np.argsort(~visited_RC, axis=1, kind="stable").astype(np.int32)
