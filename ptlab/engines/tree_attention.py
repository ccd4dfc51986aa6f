"""Exact causal attention over a stream of unique tokens (prefix_tree.py) on the CPU: a token sees its own row's past and nothing else.

The stream is cut into tiles of up to TILE_ROWS consecutive queries that see the same keys outside the tile. In preorder those keys are
a few contiguous runs: one per ancestor (fewer where an ancestor and its first child touch), and the tile's own segment. So a tile is a
handful of matrix products over slices: no padding, no gathered copies of keys, no [T, T], and only the tile's own square needs a mask.

    stream  P P P P a a a b b b b     tile of the b's: keys PPPP and bbbb; scores [heads, 4, 8]; mask on the last 4 columns

Cost per query head and (query, key) pair of a tile, in units of 2 D FLOPs: 2 forward, 5 backward (scores again instead of kept), and one
softmax each. Pairs beyond the visible ones are half of each tile's square: 1.05 .. 1.35 times the needed ones at usual lengths.

The arithmetic is float32 whatever the type of q, k, v. In this shape bfloat16 products are no faster: oneDNN wants 30 us a call and
several ms for every new shape, and each micro-batch has new shapes; and torch's bfloat16 softmax is twice as slow. It is also more exact
than a bfloat16 kernel. Only segments of LONG tokens or more go to torch's flash kernel for CPUs, which wins there in both types: one call
per run of keys, merged by their log-sum-exp; its backward pass takes the merged one. Numbers, and what else was tried: docs/LOG.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ptlab.engines.buffers import Buffers
from ptlab.engines.prefix_tree import Segment

TILE_ROWS = 96
"""Queries. More: fewer, larger products, and more of each square wasted. 64 .. 128 differ by 5 %."""
TILE_SCORES = 1 << 18
"""Per query head: a tile with many keys has fewer rows, so that the scores stay within a few MB."""
LONG = 768
"""Tokens from which on a segment goes to the flash kernel."""
KEEP_KEYS = 4
"""Probabilities are kept for the backward pass while a query sees at most so many times head_dim keys on the average; they are then smaller
than the rest of what a layer keeps, and computing them again would be a quarter of the backward pass."""

Run = tuple[int, int]
"""Places [first, last) of the stream."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, slots=True)
class AttentionSaved:
    """What one forward leaves for its backward. Holds the caller's tensors: they must not change in between."""

    q_TQD: Tensor
    k_TGD: Tensor
    v_TGD: Tensor
    scale: float
    out_TQD: Tensor
    probs: Tensor | None
    """Of all tiles one behind the other, float32; None: to be computed again."""
    log_sums: list[Tensor]
    """Per long segment: log of the sum of exp(scores) of its rows, [1, heads, rows], float32."""


class Attention(Protocol):
    """Causal attention over one stream, its backward by hand. On the CPU `TreeAttention`, on a GPU flex_attention.FlexTreeAttention."""

    def forward(
        self, q_TQD: Tensor, k_TGD: Tensor, v_TGD: Tensor, scale: float, out: Tensor | None = None, owner: str | None = None
    ) -> tuple[Tensor, AttentionSaved]:
        """`owner`: a backward pass will follow; what is kept for it is good until the next forward pass of the same owner."""
        ...

    def backward(self, saved: AttentionSaved, dout_TQD: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries [first, last) and what they see."""

    first: int
    last: int
    runs: list[tuple[int, int, int]]
    """(place in the stream, length, column of the scores); the last one ends with the tile itself."""
    num_keys: int
    mask_NN: Tensor
    """0 or -inf on the tile's own square, its last columns; all rows see all keys before."""


@dataclass(frozen=True, slots=True)
class LongSegment:
    first: int
    last: int
    ancestors: list[Run]


class TreeAttention:
    """Made once per micro-batch for all layers. With `buffers`, scratch memory lives on from one micro-batch to the next."""

    def __init__(self, segments: Sequence[Segment], num_tokens: int, device: torch.device, buffers: Buffers | None = None) -> None:
        self._tiles, self._long = plan(segments, num_tokens)
        self._buffers = Buffers(device) if buffers is None else buffers
        self._sizes = [(tile.last - tile.first) * tile.num_keys for tile in self._tiles]
        """Scores of each tile, per query head."""
        self._most_scores = max(self._sizes, default=0)
        self._masks: dict[tuple[int, int], Tensor] = {}

    def forward(
        self, q_TQD: Tensor, k_TGD: Tensor, v_TGD: Tensor, scale: float, out: Tensor | None = None, owner: str | None = None
    ) -> tuple[Tensor, AttentionSaved]:
        """Shapes: q [T, heads, head_dim]; k, v [T, kv heads, head_dim], any strides with a contiguous last dimension; `out` like q.

        Pass `out` where its memory can be used again.
        """
        kv_heads, repeat, head_dim = _heads(q_TQD, k_TGD)
        out_GRD = self._take("out", kv_heads, len(q_TQD) * repeat, head_dim)
        kept: Tensor | None = None
        if self._tiles:
            q_GRD, k_GTD, v_GTD = self._load("q", q_TQD, kv_heads), self._load("k", k_TGD, kv_heads), self._load("v", v_TGD, kv_heads)
            scores = self._take("scores", kv_heads * repeat * self._most_scores)
            if owner is not None and sum(self._sizes) <= KEEP_KEYS * head_dim * len(q_TQD):
                kept = self._take(f"probabilities {owner}", kv_heads * repeat * sum(self._sizes))
            for tile, into in zip(self._tiles, self._places(kept, scores, kv_heads * repeat), strict=True):
                probs = self._probabilities(tile, q_GRD, k_GTD, scale, into)
                out_tile = _rows(out_GRD, tile, repeat)
                for first, length, column in tile.runs:
                    part = probs.narrow(2, column, length)
                    out_tile.baddbmm_(part, v_GTD.narrow(1, first, length), beta=1 if column else 0)
        log_sums = []
        for long in self._long:
            out_long, log_sum = _attend_long(long, q_TQD, k_TGD, v_TGD, scale)
            _by_token(out_GRD, kv_heads, repeat)[:, long.first : long.last].copy_(_by_kv_head(out_long, kv_heads))
            log_sums.append(log_sum)
        out_TQD = torch.empty(q_TQD.shape, dtype=q_TQD.dtype) if out is None else out
        _store(out_GRD, out_TQD, kv_heads)
        return out_TQD, AttentionSaved(q_TQD, k_TGD, v_TGD, scale, out_TQD, kept, log_sums)

    def backward(self, saved: AttentionSaved, dout_TQD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dL/dq, dL/dk, dL/dv, in the shapes and type of q, k, v. They lie in scratch memory: the next call overwrites them."""
        q_TQD, k_TGD, v_TGD, scale = saved.q_TQD, saved.k_TGD, saved.v_TGD, saved.scale
        kv_heads, repeat, head_dim = _heads(q_TQD, k_TGD)
        dq_GRD = self._take("dq", kv_heads, len(q_TQD) * repeat, head_dim)
        dk_GTD = self._take("dk", kv_heads, len(q_TQD), head_dim).zero_()
        dv_GTD = self._take("dv", kv_heads, len(q_TQD), head_dim).zero_()
        if self._tiles:
            q_GRD, k_GTD, v_GTD = self._load("q", q_TQD, kv_heads), self._load("k", k_TGD, kv_heads), self._load("v", v_TGD, kv_heads)
            dout_GRD = self._load("out", dout_TQD, kv_heads)
            scores = self._take("scores", kv_heads * repeat * self._most_scores)
            flat = self._take("dscores", kv_heads * repeat * self._most_scores)
            for tile, held in zip(self._tiles, self._places(saved.probs, scores, kv_heads * repeat), strict=True):
                query, dquery, dout = _rows(q_GRD, tile, repeat), _rows(dq_GRD, tile, repeat), _rows(dout_GRD, tile, repeat)
                if saved.probs is None:
                    probs = self._probabilities(tile, q_GRD, k_GTD, scale, held)
                else:
                    probs = held.view(*query.shape[:2], tile.num_keys)
                dscores = flat[: probs.numel()].view(probs.shape)
                for first, length, column in tile.runs:
                    dv_GTD.narrow(1, first, length).baddbmm_(probs.narrow(2, column, length).mT, dout)
                    torch.bmm(dout, v_GTD.narrow(1, first, length).mT, out=dscores.narrow(2, column, length))
                torch.ops.aten._softmax_backward_data.out(dscores, probs, -1, torch.float32, grad_input=dscores)
                for first, length, column in tile.runs:
                    part = dscores.narrow(2, column, length)
                    dk_GTD.narrow(1, first, length).baddbmm_(part.mT, query, alpha=scale)
                    dquery.baddbmm_(part, k_GTD.narrow(1, first, length), beta=1 if column else 0, alpha=scale)
        for long, log_sum in zip(self._long, saved.log_sums, strict=True):
            dq_long = _by_token(dq_GRD, kv_heads, repeat)[:, long.first : long.last].zero_()
            for run in [(long.first, long.last), *long.ancestors]:
                dq, dk, dv = _flash_backward(
                    _batch(dout_TQD, long.first, long.last),
                    _batch(q_TQD, long.first, long.last),
                    _batch(k_TGD, *run),
                    _batch(v_TGD, *run),
                    _batch(saved.out_TQD, long.first, long.last),
                    log_sum,
                    0.0,
                    run[0] == long.first,
                    scale=scale,
                )
                dq_long.add_(_by_kv_head(dq, kv_heads))
                dk_GTD[:, run[0] : run[1]].add_(dk[0])
                dv_GTD[:, run[0] : run[1]].add_(dv[0])
        dq_TQD, dk_TGD, dv_TGD = (
            self._buffers.take(f"attention {name} result", *like.shape, dtype=like.dtype)
            for name, like in (("dq", q_TQD), ("dk", k_TGD), ("dv", v_TGD))
        )
        for inner, result in ((dq_GRD, dq_TQD), (dk_GTD, dk_TGD), (dv_GTD, dv_TGD)):
            _store(inner, result, kv_heads)
        return dq_TQD, dk_TGD, dv_TGD

    def _places(self, kept: Tensor | None, scratch: Tensor, heads: int) -> list[Tensor]:
        """Memory for each tile's scores: its part of what is kept, or the same scratch for all."""
        if kept is None:
            return [scratch] * len(self._tiles)
        return list(torch.split(kept, [heads * size for size in self._sizes]))

    def _probabilities(self, tile: Tile, q_GRD: Tensor, k_GTD: Tensor, scale: float, flat: Tensor) -> Tensor:
        """Softmax over all keys of a tile, [kv heads, rows * heads per kv head, keys], in the memory of `flat`."""
        repeat = q_GRD.shape[1] // k_GTD.shape[1]
        query, rows = _rows(q_GRD, tile, repeat), tile.last - tile.first
        scores = flat[: query.shape[0] * query.shape[1] * tile.num_keys].view(*query.shape[:2], tile.num_keys)
        for first, length, column in tile.runs:
            scores.narrow(2, column, length).baddbmm_(query, k_GTD.narrow(1, first, length).mT, beta=0, alpha=scale)
        scores.narrow(2, tile.num_keys - rows, rows).add_(self._mask(tile, repeat))
        return torch.softmax(scores, -1, out=scores)

    def _mask(self, tile: Tile, repeat: int) -> Tensor:
        """Each row `repeat` times: the query heads of one kv head lie below each other."""
        key = id(tile.mask_NN), repeat
        if key not in self._masks:
            self._masks[key] = tile.mask_NN.repeat_interleave(repeat, 0)
        return self._masks[key]

    def _take(self, name: str, *shape: int) -> Tensor:
        return self._buffers.take(f"attention {name}", *shape, dtype=torch.float32)

    def _load(self, name: str, x_THD: Tensor, kv_heads: int) -> Tensor:
        """[kv heads, tokens * heads per kv head, head_dim] in float32: what one matrix product per kv head reads is contiguous."""
        tokens, heads, head_dim = x_THD.shape
        inner = self._take(name, kv_heads, tokens * (heads // kv_heads), head_dim)
        _by_token(inner, kv_heads, heads // kv_heads).copy_(x_THD.view(tokens, kv_heads, -1, head_dim).transpose(0, 1))
        return inner


def _heads(q_TQD: Tensor, k_TGD: Tensor) -> tuple[int, int, int]:
    """kv heads, query heads per kv head, head_dim."""
    return k_TGD.shape[1], q_TQD.shape[1] // k_TGD.shape[1], q_TQD.shape[2]


def _by_token(inner: Tensor, kv_heads: int, repeat: int) -> Tensor:
    return inner.view(kv_heads, -1, repeat, inner.shape[-1])


def _store(inner: Tensor, out_THD: Tensor, kv_heads: int) -> None:
    repeat = out_THD.shape[1] // kv_heads
    out_THD.view(len(out_THD), kv_heads, repeat, -1).copy_(_by_token(inner, kv_heads, repeat).transpose(0, 1))


def _rows(x_GRD: Tensor, tile: Tile, repeat: int) -> Tensor:
    return x_GRD.narrow(1, tile.first * repeat, (tile.last - tile.first) * repeat)


def _batch(x_THD: Tensor, first: int, last: int) -> Tensor:
    """[1, heads, rows, head_dim], what the flash kernel takes."""
    return x_THD[first:last].transpose(0, 1)[None]


def _by_kv_head(x_1QND: Tensor, kv_heads: int) -> Tensor:
    """[kv heads, rows, heads per kv head, head_dim] from what the flash kernel gives."""
    _, _, rows, head_dim = x_1QND.shape
    return x_1QND[0].view(kv_heads, -1, rows, head_dim).transpose(1, 2)


def _attend_long(long: LongSegment, q_TQD: Tensor, k_TGD: Tensor, v_TGD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [1, heads, rows, head_dim] and log-sum-exp of a long segment: its own past, then every run of ancestors merged in."""
    query = _batch(q_TQD, long.first, long.last)
    own = _batch(k_TGD, long.first, long.last), _batch(v_TGD, long.first, long.last)
    out, log_sum = _flash(query, *own, 0.0, True, scale=scale)
    for run in long.ancestors:
        more, log_more = _flash(query, _batch(k_TGD, *run), _batch(v_TGD, *run), 0.0, False, scale=scale)
        out = torch.lerp(out.float(), more.float(), torch.sigmoid(log_more - log_sum)[..., None])
        log_sum = torch.logaddexp(log_sum, log_more)
    return out, log_sum


def plan(segments: Sequence[Segment], num_tokens: int) -> tuple[list[Tile], list[LongSegment]]:
    """Who is computed with whom. Short neighbours share a tile if they see the same keys outside it: siblings, or a whole small subtree."""
    until_T = np.empty(num_tokens, np.int64)
    path: list[Segment] = []
    cuts: list[tuple[int, int, list[Run]]] = []
    long: list[LongSegment] = []
    for segment in segments:
        start, last = segment.start, segment.start + segment.length
        until_T[start:last] = segment.end
        while path and path[-1].end <= start:
            path.pop()
        ancestors = join_runs([(s.start, s.start + s.length) for s in path])
        path.append(segment)
        if segment.length >= LONG:
            long.append(LongSegment(start, last, ancestors))
            continue
        if cuts:
            first, end, outside = cuts[-1]
            if end == start and last - first <= TILE_ROWS and [(a, min(b, first)) for a, b in ancestors if a < first] == outside:
                cuts[-1] = (first, last, outside)
                continue
        rows = max(16, min(TILE_ROWS, TILE_SCORES // (segment.offset + segment.length)))
        count = -(-segment.length // rows)
        edges = [start + segment.length * i // count for i in range(count + 1)]
        cuts += [(a, b, join_runs([*ancestors, (start, a)])) for a, b in pairwise(edges)]

    tiles = []
    masks: dict[bytes, Tensor] = {}
    for first, last, outside in cuts:
        place_N = np.arange(first, last)
        visible_NN = (place_N[None, :] <= place_N[:, None]) & (place_N[:, None] < until_T[None, first:last])
        mask_NN = masks.setdefault(visible_NN.tobytes(), torch.where(torch.from_numpy(visible_NN), 0.0, float("-inf")))
        runs, column = [], 0
        for a, b in join_runs([*outside, (first, last)]):
            runs.append((a, b - a, column))
            column += b - a
        tiles.append(Tile(first, last, runs, column, mask_NN))
    return tiles, long


def join_runs(parts: Sequence[Run]) -> list[Run]:
    """Leave out empty ones and join neighbours: [(0, 3), (3, 5), (7, 7), (9, 11)] -> [(0, 5), (9, 11)]."""
    runs: list[Run] = []
    for first, last in parts:
        if first == last:
            continue
        if runs and runs[-1][1] == first:
            runs[-1] = (runs[-1][0], last)
        else:
            runs.append((first, last))
    return runs
