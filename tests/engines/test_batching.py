"""Every datum once, budgets kept, padding where no real token sees it."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from ptlab.engines.batching import pad, plan_micro_batches


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 120))
def test_every_datum_stands_in_one_group_within_the_budget(lengths: list[int], max_tokens: int) -> None:
    groups = plan_micro_batches(lengths, max_tokens)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= max_tokens


def test_longest_first_and_neighbours_of_a_length_together() -> None:
    assert plan_micro_batches([2, 9, 3, 10, 2], max_tokens=20) == [[3, 1], [2, 0, 4]]


def test_pad_puts_zeros_on_the_right_and_points_at_the_real_tokens() -> None:
    batch = pad([[5, 6, 7], [8]], torch.device("cpu"))
    assert batch.input_ids_BL.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.input_ids_BL.flatten()[batch.flat_index_T].tolist() == [5, 6, 7, 8]
    assert batch.lengths == [3, 1]
