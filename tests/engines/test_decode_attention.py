from __future__ import annotations

from typing import Any

import pytest
import torch

from ptlab.engines.decode_attention import decode_attention


class Module:
    """What transformers' sdpa attention reads of its module."""

    num_key_value_groups = 3
    is_causal = True


def inputs(queries: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, queries, 8, generator=generator, dtype=torch.float64)
    key, value = (torch.randn(2, 2, 5, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    return query, key, value


def by_hand(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """Head by head: query head h reads key head h // 3."""
    out = torch.zeros(2, query.shape[2], 6, 8, dtype=torch.float64)
    for row in range(2):
        for head in range(6):
            scores = query[row, head] @ key[row, head // 3].T * scale
            weights = torch.softmax(scores.masked_fill(~mask[row, 0], -torch.inf), -1)
            out[row, :, head] = weights @ value[row, head // 3]
    return out


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("scaling", [None, 0.5])
def test_agrees_with_attention_by_hand(queries: int, scaling: float | None) -> None:
    query, key, value = inputs(queries)
    mask = torch.ones(2, 1, queries, 5, dtype=torch.bool)
    mask[1, :, :, :2] = False  # left padding
    got, _ = decode_attention(Module(), query, key, value, mask, scaling=scaling)
    want = by_hand(query, key, value, mask, 8**-0.5 if scaling is None else scaling)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)  # the softmax is float32
    if queries == 1:
        unmasked, _ = decode_attention(Module(), query, key, value, None, scaling=scaling)
        torch.testing.assert_close(unmasked[0], got[0], atol=1e-6, rtol=0)
        assert (unmasked[1] - got[1]).abs().max() > 1e-2


def test_a_row_that_is_all_padding_stays_finite() -> None:
    """Its keys and values go into the cache; NaN there would reach every later token of the row, masked or not."""
    query, key, value = inputs(1)
    got, _ = decode_attention(Module(), query, key, value, torch.zeros(2, 1, 1, 5, dtype=torch.bool))
    assert torch.isfinite(got).all()
