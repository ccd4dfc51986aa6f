"""The stream holds every row, each query sees its own row's beginning and nothing else, and nothing shared is laid out twice."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ptlab.engines import prefix_tree
from ptlab.engines.prefix_tree import IntArray, Segment, TokenStream, build_stream, count_tokens, find_paths

# few tokens, so that rows begin alike, contain one another and are equal; often with a common beginning
alphabet = st.integers(0, 2)
rows_of_tokens = st.lists(
    st.builds(lambda first, rest: first + rest, st.sampled_from([[], [1, 1], [1, 1, 2], [0, 1, 0, 1, 0]]), st.lists(alphabet, max_size=7)),
    max_size=12,
)
SHORTEST = [1, 2, 3, 8]


def visible_until(stream: TokenStream) -> IntArray:
    """Per place the end of its segment's subtree: the query at q sees the key at k exactly if k <= q < visible_until[k]."""
    return np.repeat([s.end for s in stream.segments], [s.length for s in stream.segments]).astype(np.int64)


def arrays(rows: Sequence[Sequence[int]]) -> list[IntArray]:
    return [np.array(row, dtype=np.int64) for row in rows]


def reference_tokens(rows: Sequence[Sequence[int]], min_shared: int) -> int:
    """Length of the stream, from the definition: walk down while all agree; rows that end in the middle of another's path do not count."""

    def below(tails: set[tuple[int, ...]]) -> int:
        tails = {t for t in tails if not any(len(u) > len(t) and u[: len(t)] == t for u in tails)}
        if len(tails) < 2:
            return sum(map(len, tails))
        common = 0
        while len({t[common] for t in tails}) == 1:
            common += 1
        own = common if common >= min_shared else 0
        heads = {t[common] for t in tails}
        return own + sum(below({t[own:] for t in tails if t[common] == head}) for head in heads)

    return below({tuple(row) for row in rows})


def check_stream(stream: TokenStream, rows: Sequence[Sequence[int]]) -> None:
    """All that attention and losses rely on."""
    assert len(stream.places_D) == len(rows)
    assert stream.tokens_T.dtype == stream.positions_T.dtype == np.int64
    until_T = visible_until(stream)
    stream_T = np.arange(len(stream.tokens_T))
    for row, places in zip(rows, stream.places_D, strict=True):
        assert stream.tokens_T[places].tolist() == list(row)
        assert stream.positions_T[places].tolist() == list(range(len(row)))
        for j, q in enumerate(places.tolist()):
            assert np.flatnonzero((stream_T <= q) & (q < until_T)).tolist() == places[: j + 1].tolist()
    start = 0
    for i, segment in enumerate(stream.segments):  # preorder: one after the other, children inside their parent's end
        assert segment.start == start and segment.length >= 1
        start += segment.length
        inside = [s for s in stream.segments[i + 1 :] if s.start < segment.end]
        assert segment.end == max([start, *(s.start + s.length for s in inside)])
        assert all(s.end <= segment.end and s.offset >= segment.offset + segment.length for s in inside)
        assert stream.positions_T[segment.start] == segment.offset
    assert start == len(stream.tokens_T) == len(until_T)
    read = np.concatenate([*stream.places_D, np.empty(0, dtype=np.int64)])
    assert set(read.tolist()) == set(stream_T.tolist())  # nothing is computed that no row asks for


@given(rows_of_tokens, st.sampled_from(SHORTEST))
@example([[], []], 1)
@example([[0] * 3, [0] * 2 + [1], [0] + [1] * 9, [0] + [1] * 8 + [2]], 2)
def test_any_rows_against_the_definition(rows: list[list[int]], min_shared: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_tree, "MIN_SHARED", min_shared)
        stream = build_stream(arrays(rows))
        paths = find_paths(arrays(rows))
        assert count_tokens(paths.lengths_P, paths.common_P) == len(stream.tokens_T)
    check_stream(stream, rows)
    assert len(stream.tokens_T) == reference_tokens(rows, min_shared)
    for segment in stream.segments:
        continued = segment.end > segment.start + segment.length
        assert segment.length >= min_shared or not continued


@given(rows_of_tokens)
def test_down_to_one_token_it_is_the_radix_tree(rows: list[list[int]]) -> None:
    prefixes = {tuple(row[:n]) for row in rows for n in range(1, len(row) + 1)}
    children: dict[tuple[int, ...], int] = {}
    for prefix in prefixes:
        children[prefix[:-1]] = children.get(prefix[:-1], 0) + 1
    starts = sum(1 for prefix in prefixes if prefix[:-1] == () or children[prefix[:-1]] > 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_tree, "MIN_SHARED", 1)
        stream = build_stream(arrays(rows))
    assert len(stream.tokens_T) == len(prefixes)  # every distinct beginning once
    assert len(stream.segments) == starts  # cut where rows go on differently and nowhere else


@given(rows_of_tokens)
def test_unshared_rows_stand_one_after_the_other(rows: list[list[int]]) -> None:
    stream = build_stream(arrays(rows), share=False)
    check_stream(stream, rows)
    assert stream.tokens_T.tolist() == [token for row in rows for token in row]
    assert [s.length for s in stream.segments] == [len(row) for row in rows if row]


@given(rows_of_tokens)
def test_the_order_of_the_rows_does_not_change_the_stream(rows: list[list[int]]) -> None:
    order = np.random.default_rng(len(rows)).permutation(len(rows)).tolist()
    stream, other = build_stream(arrays(rows)), build_stream(arrays([rows[i] for i in order]))
    assert stream.tokens_T.tolist() == other.tokens_T.tolist() and stream.segments == other.segments
    for place, i in enumerate(order):
        assert other.places_D[place].tolist() == stream.places_D[i].tolist()


def test_the_drawing_in_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_tree, "MIN_SHARED", 1)
    stream = build_stream(arrays([[1, 2, 3, 4], [1, 2, 5], [1]]))
    assert stream.tokens_T.tolist() == [1, 2, 3, 4, 5]
    assert stream.positions_T.tolist() == [0, 1, 2, 3, 2]
    assert stream.segments == [Segment(0, 2, 0, 5), Segment(2, 2, 2, 4), Segment(4, 1, 2, 5)]
    assert [p.tolist() for p in stream.places_D] == [[0, 1, 2, 3], [0, 1, 4], [0]]
    assert visible_until(stream).tolist() == [5, 5, 4, 4, 5]


def test_three_levels_share_each_level_once() -> None:
    """A system prompt of 20, two problems of 10, three attempts of 9 with a second turn of 12 in two ways: 2-way, 3-way, 2-way."""
    system = list(range(100, 120))
    rows = []
    for problem in range(2):
        for attempt in range(3):
            for turn in range(2):
                rows.append(system + [problem] * 10 + [10 + attempt] * 9 + [20 + turn] * 12)
    stream = build_stream(arrays(rows))
    check_stream(stream, rows)
    assert len(stream.tokens_T) == 20 + 2 * 10 + 6 * 9 + 12 * 12 == 238
    assert [s.offset for s in stream.segments] == [0] + ([20] + [30, 39, 39] * 3) * 2
    assert stream.segments[0].end == 238 and stream.segments[1].end == 20 + 109


def test_samples_of_a_prompt() -> None:
    """16 x (200 + 256) tokens of random text: the prompt once."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 50_000, 200)
    rows = [np.concatenate((prompt, rng.integers(0, 50_000, 256))) for _ in range(16)]
    stream = build_stream(rows)
    assert len(stream.tokens_T) == 200 + 16 * 256
    assert [s.length for s in stream.segments] == [200] + [256] * 16


def test_a_lone_first_token_is_no_root() -> None:
    rows = [[1, *range(10 * i, 10 * i + 10)] for i in range(5)]
    stream = build_stream(arrays(rows))
    assert len(stream.segments) == 5 and all(s.length == 11 and s.end == s.start + 11 for s in stream.segments)


def test_a_common_piece_of_min_shared_tokens_is_shared_and_one_less_is_not() -> None:
    for common, tokens in ((8, 8 + 2 * 5), (7, 2 * (7 + 5))):
        assert len(build_stream(arrays([[9] * common + [1] * 5, [9] * common + [2] * 5])).tokens_T) == tokens


def test_equal_rows_and_beginnings_are_shared_however_short() -> None:
    """They cost nothing: no new segment, no new tokens."""
    rows = [[5], [5], [5, 6], [7], [5, 6, 7], [5]]
    stream = build_stream(arrays(rows))
    check_stream(stream, rows)
    assert [s.length for s in stream.segments] == [3, 1]


def test_a_long_trajectory_whose_turns_are_its_beginnings_is_one_segment() -> None:
    row = list(range(500))
    rows = [row[:n] for n in (500, 10, 70, 300)]
    stream = build_stream(arrays(rows))
    assert stream.segments == [Segment(0, 500, 0, 500)]
    assert [len(p) for p in stream.places_D] == [500, 10, 70, 300]


def test_a_chain_of_branches_as_deep_as_there_are_rows() -> None:
    """Deeper than Python's recursion limit; row n leaves the trunk after 8 n tokens."""
    trunk = np.arange(1, 12_001)
    rows = [np.concatenate((trunk[: 8 * n], [0])) for n in range(1, 1500)]
    stream = build_stream(rows)
    assert len(stream.tokens_T) == 8 * 1499 + 1499
    assert stream.segments[0] == Segment(0, 8, 0, len(stream.tokens_T))
    for n in (1, 700, 1499):
        assert stream.tokens_T[stream.places_D[n - 1]].tolist() == rows[n - 1].tolist()


def test_rows_sort_as_numbers_up_to_the_largest_token_id() -> None:
    """Bytes of 255 and 256 sort the other way round in little-endian; a vocabulary of 2**31 and more fits."""
    rows = arrays([[256], [255], [2**32 - 1], [70_000]])
    assert build_stream(rows).tokens_T.tolist() == [255, 256, 70_000, 2**32 - 1]


def test_nothing_makes_an_empty_stream() -> None:
    for rows in ([], [[]]):
        stream = build_stream(arrays(rows))
        assert stream.tokens_T.tolist() == [] and stream.segments == [] and visible_until(stream).tolist() == []
