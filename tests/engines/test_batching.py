"""Every datum once, budgets kept, padding where no real token sees it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptlab.engines import batching, prefix_tree
from ptlab.engines.batching import pad, plan_micro_batches, plan_shared_micro_batches
from ptlab.engines.prefix_tree import IntArray, build_stream, find_paths


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


token_rows = st.lists(
    st.builds(
        lambda first, rest: np.array(first + rest, dtype=np.int64),
        st.sampled_from([[], [1, 1, 2], [0, 1, 0, 1, 0]]),
        st.lists(st.integers(0, 2), min_size=1, max_size=7),
    ),
    max_size=30,
)


def stream_tokens(rows: list[IntArray], group: list[int]) -> int:
    return len(build_stream([rows[i] for i in group]).tokens_T)


@given(token_rows, st.integers(1, 60), st.sampled_from([1, 2, 3, 8]))
def test_every_row_stands_in_one_stream_within_the_budget(rows: list[IntArray], max_tokens: int, min_shared: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_tree, "MIN_SHARED", min_shared)
        patch.setattr(batching, "MIN_SHARED", min_shared)
        groups = plan_shared_micro_batches(rows, max_tokens)
        assert sorted(i for group in groups for i in group) == list(range(len(rows)))
        sizes = [stream_tokens(rows, group) for group in groups]
        for group, size in zip(groups, sizes, strict=True):
            assert size <= max_tokens or len(find_paths([rows[i] for i in group]).members_P) == 1
        assert sizes == sorted(sizes, reverse=True)
        assert groups == plan_shared_micro_batches(rows, max_tokens)


def samples(groups: int, of_each: int, prompt: int, completion: int) -> list[IntArray]:
    """Problem after problem: `of_each` random completions of a random prompt."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(groups):
        shared = rng.integers(0, 50_000, prompt)
        rows += [np.concatenate((shared, rng.integers(0, 50_000, completion))) for _ in range(of_each)]
    return rows


def problems(groups: list[list[int]], of_each: int) -> list[set[int]]:
    return [{i // of_each for i in group} for group in groups]


def test_a_budget_counts_unique_tokens() -> None:
    rows = samples(8, 8, prompt=80, completion=100)  # 880 unique tokens a problem, 1,440 with every prompt
    together = plan_shared_micro_batches(rows, 1760)
    assert [stream_tokens(rows, group) for group in together] == [1760] * 4
    assert all(len(pair) == 2 for pair in problems(together, 8))


def test_samples_of_a_problem_stay_together_where_that_wastes_little() -> None:
    rows = samples(8, 8, prompt=80, completion=100)
    for budget in (1_999, 2_300):  # room for one to five samples more, but not for eight: leave it empty
        assert all(len(p) == 2 for p in problems(plan_shared_micro_batches(rows, budget), 8))
    groups = plan_shared_micro_batches(rows, 1_700)  # one problem would fill half: cut the second
    assert len(groups[0]) == 8 + 7 and stream_tokens(rows, groups[0]) == 880 + 780


def test_of_two_levels_the_outer_is_cut_rather_than_the_inner() -> None:
    """Two system prompts of 50, below each two problems of 50, below each four samples of 25: 200 + 4 * 100 + 50 unique tokens in all."""
    rng = np.random.default_rng(0)
    rows = []
    for system in (rng.integers(0, 50_000, 50) for _ in range(2)):
        for problem in (rng.integers(0, 50_000, 50) for _ in range(2)):
            rows += [np.concatenate((system, problem, rng.integers(0, 50_000, 25))) for _ in range(4)]
    groups = plan_shared_micro_batches(rows, 225)  # a problem: 50 + 50 + 100 = 200; one sample more would fit not at all
    assert sorted(map(sorted, groups)) == [list(range(i, i + 4)) for i in range(0, 16, 4)]
    groups = plan_shared_micro_batches(rows, 440)  # both problems below a system prompt: 350; a third would pay 50 + 50 again
    assert sorted(map(sorted, groups)) == [list(range(8)), list(range(8, 16))]


def test_common_pieces_too_short_to_share_are_counted_in_every_row() -> None:
    """All begin with the same 8 tokens, five go on together for 6 more (too few for a node): 8 + 5 + 5 * (6 + 5) = 68 tokens, not 44."""
    rows = [np.array([1] * 8 + [9] * 5)] + [np.array([1] * 8 + [2] * 6 + [i] * 5) for i in range(3, 8)]
    assert stream_tokens(rows, list(range(6))) == 68
    groups = plan_shared_micro_batches(rows, 50)
    assert [stream_tokens(rows, group) for group in groups] == [8 + 5 + 3 * 11, 14 + 2 * 5]  # in the second nobody leaves at 8


def test_a_common_token_is_no_reason_to_end_early() -> None:
    rows = [np.array([first] + [i] * 9) for i, first in enumerate((0, 1, 2, 3, 3, 3))]
    assert plan_shared_micro_batches(rows, 40) == [[0, 1, 2, 3], [4, 5]]


def test_a_row_beyond_the_budget_stands_alone_but_for_what_is_part_of_it() -> None:
    long = np.arange(100)
    rows = [np.array([7, 7]), long[:30], long, long, np.array([8])]
    assert plan_shared_micro_batches(rows, 10) == [[1, 2, 3], [0, 4]]


def test_no_rows_make_no_micro_batch() -> None:
    assert plan_shared_micro_batches([], 10) == []
