from __future__ import annotations

import re

import pytest

from ptlab.envs import addition
from ptlab.errors import InvalidRequestError

PINNED_TRAINING = ("863+515=?", "1378")
PINNED_TEST = [("Compute 297+457.", "754"), ("What is 958+561?", "1519")]


def numbers_in(question: str) -> tuple[int, int]:
    a, b = re.findall(r"\d+", question)
    return int(a), int(b)


def test_a_tenth_is_held_out_for_every_last_digit_of_the_sum():
    """A linear rule would empty some digits and fill others."""
    pairs = [(a, b) for a in range(100, 1000, 7) for b in range(100, 1000, 3)]
    held_out = [pair for pair in pairs if addition.is_held_out(*pair)]
    assert abs(len(held_out) / len(pairs) - 0.1) < 0.005
    for digit in range(10):
        of_digit = [pair for pair in pairs if sum(pair) % 10 == digit]
        share = sum(addition.is_held_out(*pair) for pair in of_digit) / len(of_digit)
        assert abs(share - 0.1) < 0.015, f"sums ending in {digit}: {share:.3f} held out"


def test_held_out_ignores_the_order_of_the_numbers():
    assert all(addition.is_held_out(a, b) == addition.is_held_out(b, a) for a in range(100, 160) for b in range(100, 160))


def test_training_problems_are_right_in_range_and_never_held_out():
    templates = set()
    for index in range(3000):
        question, answer = addition.training_problem(0, index // 16, index % 16)
        a, b = numbers_in(question)
        assert 100 <= a <= 999
        assert 100 <= b <= 999
        assert int(answer) == a + b
        assert not addition.is_held_out(a, b)
        templates.add(re.sub(r"\d+", "#", question))
    assert templates == {"What is #+#?", "Compute #+#.", "#+#=?"}


def test_training_problems_depend_on_seed_step_and_index_and_on_nothing_else():
    first = [addition.training_problem(seed, step, index) for seed in (0, 1) for step in (0, 1) for index in range(16)]
    again = [addition.training_problem(seed, step, index) for seed in (0, 1) for step in (0, 1) for index in range(16)]
    assert first == again
    assert len(set(first)) >= 62  # 64 draws of 2.4 million questions: a chance repeat is possible, a lost key part is not


def test_the_problems_are_the_same_on_every_machine():
    """Written down once: a change of the hash would make old runs and cached models incomparable."""
    assert addition.training_problem(0, 0, 0) == PINNED_TRAINING
    assert addition.test_problems(2) == PINNED_TEST


def test_test_problems_are_held_out_distinct_right_and_a_growing_list():
    problems = addition.test_problems(500)
    pairs = [numbers_in(question) for question, _ in problems]
    assert all(addition.is_held_out(a, b) for a, b in pairs)
    assert len({frozenset(pair) if pair[0] != pair[1] else pair for pair in pairs}) == 500
    assert all(int(answer) == a + b for (a, b), (_, answer) in zip(pairs, problems, strict=True))
    assert addition.test_problems(250) == problems[:250]
    assert addition.test_problems(0) == []


@pytest.mark.parametrize("n", [-1, 10_001])
def test_an_impossible_number_of_test_problems_is_refused(n: int):
    with pytest.raises(InvalidRequestError, match=f"n is {n}; give a number from 0 to 10000"):
        addition.test_problems(n)
