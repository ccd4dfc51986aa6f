"""Every pass meets every row once, and a step meets the same rows whoever asks, and when."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptlab.errors import InvalidRequestError
from ptlab.rl.epochs import TokenBatches, epoch_order, rows_of_step


@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 5))
def test_the_stream_of_batches_is_pass_after_pass(num_rows, per_step, seed):
    stream = [row for step in range(12) for row in rows_of_step(num_rows, per_step, seed=seed, step=step)]
    for epoch in range(len(stream) // num_rows):
        assert sorted(stream[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))
    assert stream[:num_rows] == epoch_order(num_rows, seed=seed, epoch=0)[: len(stream)]


def test_passes_and_seeds_differ():
    orders = {tuple(epoch_order(20, seed=seed, epoch=epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


@given(st.lists(st.integers(1, 9), min_size=1, max_size=10), st.integers(1, 20))
def test_token_batches_fill_up_and_follow_the_same_stream(tokens_N, per_step):
    batches = TokenBatches(tokens_N, per_step, seed=3)
    steps = [batches.rows_of_step(step) for step in range(15)]
    stream = [row for rows in steps for row in rows]
    assert stream == [rows_of_step(len(tokens_N), 1, seed=3, step=position)[0] for position in range(len(stream))]
    for rows, after in itertools.pairwise(steps):
        used = sum(tokens_N[row] for row in rows)
        assert used <= per_step or len(rows) == 1
        assert used + tokens_N[after[0]] > per_step  # the next one did not fit


def test_a_resumed_run_finds_its_place_without_the_steps_before():
    tokens_N = [5, 1, 7, 2, 2, 9, 4]
    whole = TokenBatches(tokens_N, 10, seed=1)
    steps = [whole.rows_of_step(step) for step in range(9)]
    assert TokenBatches(tokens_N, 10, seed=1).rows_of_step(8) == steps[8]
    assert whole.rows_of_step(2) == steps[2]


def test_nothing_to_draw_from_is_refused():
    for make in (lambda: rows_of_step(0, 1, seed=0, step=0), lambda: TokenBatches([], 1, seed=0), lambda: TokenBatches([1], 0, seed=0)):
        with pytest.raises(InvalidRequestError):
            make()
