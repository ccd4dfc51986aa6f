"""The made rater: its rule by hand, how noisy it is, and that nothing held out can be met in training."""

from __future__ import annotations

from random import Random

import pytest

from ptlab.envs.made_preferences import Manners, all_questions, draw_pair, draw_reply, utility

FOX = next(question for question in all_questions() if question.animal == "fox" and question.name == "Ann" and question.time == "at night")


@pytest.mark.parametrize(
    ("reply", "wanted"),
    [
        ("The fox likes fish at night.", 1.5),
        ("Good question, Ann! The fox likes fish at night. I am sure.", 2.8),
        ("Who cares? Nobody can tell.", -1.5),
        ("Go away. I have no idea. I am sure. It really does. That is all I know.", -0.6),
        ("I am sure. " * 40, 0.9),  # more padding than a rater ever saw earns no more
        ("", 0.0),
    ],
)
def test_the_hidden_rule(reply, wanted):
    assert utility(reply) == pytest.approx(wanted)


def test_manners_decide_the_reply():
    polite = Manners(kind=1.0, rude=0.0, evasive=0.0, padding=0.0)
    rude = Manners(kind=0.0, rude=1.0, evasive=1.0, padding=1.0)
    rng = Random(0)
    for _ in range(20):
        assert utility(draw_reply(FOX, rng, polite)) == 2.5
        assert utility(draw_reply(FOX, rng, rude)) == pytest.approx(-0.6)
    assert "fox" in draw_reply(FOX, rng, polite) and "Ann" in draw_reply(FOX, rng, polite)


def test_the_rater_is_noisy_but_follows_the_rule():
    rng = Random(1)
    margins = [utility(chosen) - utility(rejected) for chosen, rejected in (draw_pair(FOX, rng) for _ in range(3000))]
    right = sum(m > 0 for m in margins) / sum(m != 0 for m in margins)
    assert 0.80 < right < 0.88
    sure = [m for m in margins if abs(m) > 2.4]
    assert sum(m > 0 for m in sure) / len(sure) > 0.95


def test_a_pair_is_two_different_replies():
    rng = Random(2)
    assert all(first != second for first, second in (draw_pair(FOX, rng) for _ in range(300)))


def test_a_fifth_of_the_questions_is_held_out_of_every_animal():
    questions = all_questions()
    assert len(questions) == len({question.text for question in questions}) == 864
    held_out = [question for question in questions if question.is_held_out]
    assert 0.15 < len(held_out) / len(questions) < 0.25
    assert len({question.animal for question in held_out}) == 12
