"""The texts of ptlab/tiny-words: right, mixed and held out as they should be; and the shipped rows."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from random import Random

from ptlab.engines.pretrain import train_tokenizer
from ptlab.envs.hendrycks_math import HendrycksMathConfig
from ptlab.envs.math_problems import QUESTION_SUFFIX
from ptlab.rewards.math_answer import extract_boxed
from ptlab.tiny_models import word_problems
from ptlab.tiny_models.word_problems import DEFAULT_MIXTURE, draw_problem, example, tokenizer_texts, words_model

DATA = Path(__file__).parents[2] / "configs/smoke/data"


def solve(question: str) -> int:
    """From the words alone, in a second way."""
    a, b, c = map(int, re.findall(r"\d+", question))
    if "buys" in question:
        return a + b - c
    if "gives" in question:
        return a - b + c
    return a + b + c


def drawn(count: int, *, clean: bool) -> list[tuple[str, str]]:
    rng = Random(1)
    examples = [example(rng, mixture=DEFAULT_MIXTURE, clean=clean) for _ in range(count)]
    assert all([turn.role for turn in one.turns] == ["user", "assistant"] for one in examples)
    assert all([turn.learned for turn in one.turns] == [False, True] for one in examples)
    return [(one.turns[0].text, one.turns[1].text) for one in examples]


def test_a_clean_answer_does_both_steps_and_is_right():
    for question, answer in drawn(500, clean=True):
        assert question.endswith(QUESTION_SUFFIX)
        assert extract_boxed(answer) == str(solve(question))
        match = re.fullmatch(r"(\d+)([+-])(\d+)=(\d+)\. (\d+)([+-])(\d+)=(\d+)\. \\boxed\{(\d+)\}", answer)
        assert match is not None and match[4] == match[5] and match[8] == match[9]
        assert eval(f"{match[1]}{match[2]}{match[3]}") == int(match[4])  # the pattern holds digits and signs only


def test_the_mixture_is_mostly_wrong():
    answers = drawn(4000, clean=False)
    steps = Counter(answer.count("=") for _, answer in answers)
    assert abs(steps[0] / 4000 - 0.50) < 0.03 and abs(steps[1] / 4000 - 0.30) < 0.03 and abs(steps[2] / 4000 - 0.20) < 0.03
    right = Counter(answer.count("=") for question, answer in answers if extract_boxed(answer) == str(solve(question)))
    assert abs(right[0] / steps[0] - 0.10) < 0.03 and right[1] == 0 and 0.85 < right[2] / steps[2] < 0.95


def test_a_tenth_is_held_out_and_appears_in_no_example():
    rng = Random(2)
    held = sum(draw_problem(rng, held_out=False).is_held_out for _ in range(500))
    assert held == 0
    assert all(draw_problem(rng, held_out=True).is_held_out for _ in range(100))
    keys = [(signs, a, b, c) for signs, _ in word_problems._KINDS for a in range(10, 20) for b in range(2, 10) for c in range(2, 10)]
    share = sum(word_problems.WordProblem("", a, signs, b, c).is_held_out for signs, a, b, c in keys) / len(keys)
    assert abs(share - 0.1) < 0.02


def test_the_shipped_rows_are_those_that_the_command_writes_and_the_math_loader_reads_them(tmp_path):
    word_problems.write_rows(tmp_path)
    for name in ("train", "test"):
        file = f"word_problems_{name}.jsonl"
        assert (DATA / file).read_bytes() == (tmp_path / file).read_bytes(), f"{file}: write it again (see the module's first lines)"
    paths = {"train_path": str(DATA / "word_problems_train.jsonl"), "test_path": str(DATA / "word_problems_test.jsonl")}
    train, test = HendrycksMathConfig(**paths).load()
    assert (len(train), len(test)) == (800, 200)
    assert all(problem.answer == str(solve(problem.question)) for problem in (*train, *test))
    keys = [
        {(problem.question.split(". ")[1].split()[1], *re.findall(r"\d+", problem.question)) for problem in part} for part in (train, test)
    ]
    assert len(keys[1]) > 100 and not keys[0] & keys[1]  # "buys", "gives" or "brings", and the numbers


def test_the_vocabulary_can_be_filled_and_a_question_is_short():
    model = words_model()
    tokenizer = train_tokenizer(tokenizer_texts(), model.shape.vocab_size)
    longest = max(len(tokenizer.encode(question)) + len(tokenizer.encode(answer)) for question, answer in drawn(300, clean=True))
    assert longest < 110
