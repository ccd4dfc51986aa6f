"""Which datums share a forward pass, and how their tokens lie in memory.

Datums are sorted by length and cut into micro-batches whose padded size (rows x longest) stays within a token budget, so a row is
padded only to neighbours of about its own length. Padding stands on the right: under causal attention no real token can see it,
so no attention mask is needed and the fast causal kernel runs. Cost of a micro-batch: rows x longest tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PaddedTokens:
    """One micro-batch of inputs.

    Shapes: input_ids_BL int64, right-padded with 0; flat_index_T int64 picks the T real tokens, row after row, out of the
    flattened [B * L] positions; `lengths` says how many of them belong to each row.
    """

    input_ids_BL: Tensor
    flat_index_T: Tensor
    lengths: list[int]


def plan_micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of `lengths` in groups of at most `max_tokens` padded tokens, longest first; a longer datum stands alone.

    Longest first, so that the largest allocation happens at once and later ones fit into it.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    for i in order:
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def pad(rows: Sequence[Sequence[int]], device: torch.device) -> PaddedTokens:
    """Right-pad token rows (none empty) into one tensor on `device`."""
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    input_ids_BL = torch.zeros(len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):
        input_ids_BL[i, : lengths[i]] = torch.as_tensor(row, dtype=torch.int64)
    flat_index_T = torch.cat([torch.arange(i * longest, i * longest + n) for i, n in enumerate(lengths)])
    return PaddedTokens(input_ids_BL.to(device), flat_index_T.to(device), lengths)
