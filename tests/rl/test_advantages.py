"""Advantages by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptlab.rl.advantages import group_centred


def test_reward_minus_group_mean():
    assert group_centred([1.0, 0.0, 0.0, 1.0]) == [0.5, -0.5, -0.5, 0.5]
    assert group_centred([3.0, 0.0, 0.0]) == [2.0, -1.0, -1.0]  # not divided by the deviation, which would give 1.41


def test_equal_rewards_give_exact_zeros():
    assert group_centred([0.1] * 6) == [0.0] * 6  # the exact sum of six times 0.1, rounded and divided by 6, is not 0.1
    assert group_centred([-0.1]) == [0.0]
    assert group_centred([]) == []


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=32))
def test_advantages_sum_to_zero_and_keep_the_order(rewards_G):
    advantages_G = group_centred(rewards_G)
    assert sum(advantages_G) == pytest.approx(0.0, abs=1e-9)
    assert all((a < b) <= (advantages_G[i] <= advantages_G[j]) for i, a in enumerate(rewards_G) for j, b in enumerate(rewards_G))
