"""Numbers found by hand and by counting, and what an interval must never do."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptlab.errors import InvalidRequestError
from ptlab.rl.statistics import accuracy_interval, mean_pass_at_k, pass_at_k, powers_of_two, wilson_interval


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [(10, 3, 1, 0.3), (5, 2, 2, 0.7), (4, 1, 2, 0.5), (8, 0, 8, 0.0), (8, 1, 8, 1.0), (8, 7, 2, 1.0), (1, 1, 1, 1.0)],
)
def test_pass_at_k_by_hand(n, c, k, expected):
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-15)


@given(st.integers(1, 7), st.data())
def test_pass_at_k_counts_the_subsets_that_hold_a_right_attempt(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = list(itertools.combinations(range(n), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(min(subset) < c for subset in subsets) / len(subsets), abs=1e-12)


def test_pass_at_k_is_unbiased_where_the_plain_formula_is_not():
    p, n, k = 0.3, 5, 4
    weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    truth = 1 - (1 - p) ** k
    assert sum(w * pass_at_k(n, c, k) for c, w in enumerate(weights)) == pytest.approx(truth, abs=1e-12)
    assert sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(weights)) < truth - 0.02


def test_pass_at_k_with_large_counts_stays_exact():
    assert pass_at_k(100_000, 1, 50_000) == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5), (0, 0, 1)])
def test_pass_at_k_refuses_what_has_no_answer(n, c, k):
    with pytest.raises(InvalidRequestError):
        pass_at_k(n, c, k)


def test_the_ks_that_are_shown():
    assert [powers_of_two(n) for n in (0, 1, 2, 3, 8, 10)] == [[], [1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 10]]


def test_mean_pass_at_k_leaves_out_problems_with_too_few_attempts():
    assert mean_pass_at_k([2, 0, 1], [4, 4, 1], 2) == pytest.approx((5 / 6 + 0) / 2)
    assert mean_pass_at_k([1], [1], 2) == 0.0


def test_wilson_by_hand():
    low, high = wilson_interval(8, 10)  # (0.8 + 0.19207 -+ 1.95996 sqrt(0.016 + 0.0096036)) / 1.384146
    assert low == pytest.approx(0.490162, abs=1e-6) and high == pytest.approx(0.943318, abs=1e-6)


def test_wilson_solves_its_equation():
    """Its ends are the p0 at which the observed share is just z standard errors of p0 away."""
    z = 1.959963984540054
    for p0 in wilson_interval(37, 250):
        assert abs(37 / 250 - p0) == pytest.approx(z * math.sqrt(p0 * (1 - p0) / 250), rel=1e-9)


def test_wilson_at_the_edges():
    low, high = wilson_interval(0, 20)
    assert low == 0.0 and high == pytest.approx(1.959963984540054**2 / (20 + 1.959963984540054**2))
    assert wilson_interval(20, 20)[1] == 1.0 and wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(10, 20, 0.99)[0] < wilson_interval(10, 20)[0]
    for bad in ((21, 20, 0.95), (-1, 20, 0.95), (1, 20, 1.0)):
        with pytest.raises(InvalidRequestError):
            wilson_interval(*bad)


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(8, 8)), min_size=1, max_size=30))
def test_an_interval_holds_the_accuracy_and_is_between_that_of_problems_and_that_of_attempts(counts):
    right_P, tries_P = [c for c, _ in counts], [n for _, n in counts]
    low, high = accuracy_interval(right_P, tries_P)
    p = sum(right_P) / sum(tries_P)
    assert 0 <= low <= p <= high <= 1
    widest, narrowest = wilson_interval(p * len(counts), len(counts)), wilson_interval(p * sum(tries_P), sum(tries_P))
    if len(counts) > 1:
        assert narrowest[1] - narrowest[0] - 1e-12 <= high - low <= widest[1] - widest[0] + 1e-12


def test_attempts_that_always_agree_say_no_more_than_one():
    one = accuracy_interval([1] * 30 + [0] * 70, [1] * 100)
    eight = accuracy_interval([8] * 30 + [0] * 70, [8] * 100)
    assert one == wilson_interval(30, 100)
    assert eight == pytest.approx(one, abs=0.002)  # not that of 800 tries, which is a third as wide
    assert accuracy_interval([4] * 100, [8] * 100) == wilson_interval(400, 800)  # and evenly split problems say as much as can be


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Problems of different difficulty, 4 attempts each: the naive interval of all attempts fails this."""
    rng = random.Random(0)
    covered = naive = 0
    for _ in range(400):
        right_P = [sum(rng.random() < (0.95 if rng_p < 0.5 else 0.05) for _ in range(4)) for rng_p in (rng.random() for _ in range(60))]
        low, high = accuracy_interval(right_P, [4] * 60)
        covered += low <= 0.5 <= high
        low, high = wilson_interval(sum(right_P), 240)
        naive += low <= 0.5 <= high
    assert covered / 400 > 0.92 and naive / 400 < 0.85
