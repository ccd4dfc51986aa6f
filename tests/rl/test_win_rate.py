"""Win rates on comparisons whose truth is known: by quality, by length, by both."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ptlab.errors import InvalidRequestError
from ptlab.rl.win_rate import length_controlled_win_rate, win_rate


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def drawn(theta, phi, n=20_000, shift=1.0, seed=0):
    """Comparisons after the model that is fitted: (wins, length differences)."""
    rng = np.random.default_rng(seed)
    differences = rng.normal(10 * shift, 10, size=n)
    chances = sigmoid(theta + phi * np.tanh(differences / differences.std()))
    return (rng.random(n) < chances).astype(float), differences


def test_rate_and_error_by_hand():
    found = win_rate([1, 0, 1, 1, 0.5], [10, 10, 10, 10, 10], [8, 8, 8, 8, 8])
    assert found.rate == pytest.approx(0.7)
    assert found.standard_error == pytest.approx(math.sqrt(0.16 / 5))
    assert found.length_difference == 2.0
    assert found.length_controlled == pytest.approx(0.7)  # all differences alike: nothing can be said about length


def test_wins_by_length_alone_are_no_wins():
    wins, differences = drawn(theta=0.0, phi=2.0)
    assert wins.mean() > 0.68
    assert length_controlled_win_rate(wins, differences) == pytest.approx(0.5, abs=0.02)


def test_wins_by_quality_stay():
    wins, differences = drawn(theta=1.0, phi=0.0)
    assert length_controlled_win_rate(wins, differences) == pytest.approx(sigmoid(1.0), abs=0.02)


def test_short_replies_that_lose_by_length_are_lifted():
    wins, differences = drawn(theta=0.8, phi=1.5, shift=-1.0)
    assert wins.mean() < 0.6
    assert length_controlled_win_rate(wins, differences) == pytest.approx(sigmoid(0.8), abs=0.02)


def test_the_other_way_round_it_is_the_other_rate():
    wins, differences = drawn(theta=0.7, phi=1.0, n=500)
    there = length_controlled_win_rate(wins, differences)
    assert length_controlled_win_rate(1 - wins, -differences) == pytest.approx(1 - there, abs=1e-9)


def test_soft_wins_are_fitted_too():
    differences = np.linspace(-20, 20, 101)
    chances = sigmoid(0.4 + 1.3 * np.tanh(differences / differences.std()))
    assert length_controlled_win_rate(chances, differences) == pytest.approx(sigmoid(0.4), abs=1e-3)


@pytest.mark.parametrize(("outcome", "low", "high"), [(1.0, 0.99, 1.0), (0.0, 0.0, 0.01)])
def test_all_won_or_all_lost_stays_finite(outcome, low, high):
    assert low <= length_controlled_win_rate(np.full(40, outcome), np.arange(40.0)) <= high


def test_wins_that_follow_the_sign_of_the_difference_exactly_stay_finite():
    differences = np.concatenate([np.full(50, -3.0), np.full(50, 3.0)])
    assert length_controlled_win_rate((differences > 0).astype(float), differences) == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("wins", [[], [1.0], [1.0, 2.0], [float("nan"), 0.0]])
def test_what_is_no_comparison_is_refused(wins):
    with pytest.raises(InvalidRequestError, match="win rate"):
        win_rate(wins, [3, 4], [3, 4])
