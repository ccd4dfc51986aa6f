"""The second table of graded pairs, by kind of answer, and MATH-500's gold answers in many spellings."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ptlab.rewards.math_answer import grade_answer
from scripts.compare_math_verify import MATH_500, VARIANTS

PAIRS = [json.loads(line) for line in (Path(__file__).parent / "graded_pairs.jsonl").read_text(encoding="utf-8").split("\n") if line]
KINDS = frozenset([
    "set", "interval", "matrix", "units", "currency", "percent", "mixed", "degrees", "base", "choice", "text", "tuple", "plusminus",
    "algebra", "numbers", "form", "ratio", "adversarial",
])  # fmt: skip


def test_the_table_is_large_and_has_right_and_wrong_pairs_of_every_kind():
    assert len(PAIRS) >= 350 and len({(pair["given"], pair["truth"]) for pair in PAIRS}) == len(PAIRS)
    right, wrong = (Counter(pair["kind"] for pair in PAIRS if pair["right"] is verdict) for verdict in (True, False))
    assert set(right) == set(wrong) == KINDS
    assert sum(right.values()) >= 200 and sum(wrong.values()) >= 120


@pytest.mark.parametrize("pair", PAIRS, ids=[f"{pair['kind']}, {pair['why']}: {pair['given']} ~ {pair['truth']}" for pair in PAIRS])
def test_a_pair_is_graded_as_the_table_says_both_ways(pair: dict[str, Any]):
    assert grade_answer(pair["given"], pair["truth"]) is pair["right"]
    assert grade_answer(pair["truth"], pair["given"]) is pair["right"]


@pytest.fixture(scope="module")
def golds() -> list[str]:
    if not MATH_500.exists():
        pytest.skip(f"{MATH_500} is absent: the real rows are not part of the project")
    return [json.loads(line)["answer"] for line in MATH_500.read_text(encoding="utf-8").split("\n") if line]


def test_math_500_in_every_spelling_is_right(golds):
    """At least 20 spellings of 500 answers; each must apply to some answers, and all together take seconds."""
    assert len(golds) == 500 and len(VARIANTS) >= 20
    started = time.process_time()
    for name, spell in VARIANTS.items():
        assert sum(spell(gold) != gold for gold in golds) >= 4, f"{name} changes nothing"
        assert [gold for gold in golds if not grade_answer(spell(gold), gold)] == [], name
    assert time.process_time() - started < 30


def test_the_answer_of_the_next_problem_is_wrong_in_every_spelling(golds):
    """What a grader that accepts everything would not pass; the few neighbours with equal answers are left out."""
    for name, spell in VARIANTS.items():
        passed = [(gold, other) for gold, other in itertools.pairwise(golds) if grade_answer(spell(other), gold)]
        assert all(grade_answer(other, gold) for gold, other in passed), name
        assert len(passed) <= 12, name
