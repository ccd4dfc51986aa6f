from __future__ import annotations

import re
from collections import Counter
from functools import partial
from random import Random

import pytest

from ptlab.engines.pretrain import Example, train_tokenizer
from ptlab.envs.addition import is_held_out
from ptlab.tiny_models.quickstart import (
    DEFAULT_MIXTURE,
    blind_answer,
    careful_answer,
    corpus_example,
    forgetful_answer,
    quickstart_model,
    tokenizer_texts,
)

mixture_example = partial(corpus_example, mixture=DEFAULT_MIXTURE, clean=False)


def texts(example: Example) -> tuple[str, str]:
    question, answer = example.turns
    assert (question.role, question.learned, answer.role, answer.learned) == ("user", False, "assistant", True)
    return question.text, answer.text


def numbers_in(question: str) -> tuple[int, int]:
    a, b = re.findall(r"\d+", question)
    return int(a), int(b)


def test_the_three_answers_to_347_plus_586():
    rng = Random(0)
    assert careful_answer(347, 586, rng, column_slip=0.0) == "Ones: 7+6=13. Tens: 4+8+1=13. Hundreds: 3+5+1=9. \\boxed{933}"
    assert forgetful_answer(347, 586) == "Ones: 7+6=13. Tens: 4+8=12. Hundreds: 3+5=8. \\boxed{823}"
    assert blind_answer(347, 586, rng, right=1.0, max_error=9) == "\\boxed{933}"
    wrong = {int(blind_answer(347, 586, rng, right=0.0, max_error=2)[7:-1]) for _ in range(100)}
    assert wrong == {931, 932, 934, 935}


def test_a_careful_answer_without_slips_is_right_for_every_kind_of_carry():
    rng = Random(0)
    for a, b in ((100, 100), (999, 999), (505, 495), (199, 801), (950, 149), (123, 456)):
        assert careful_answer(a, b, rng, column_slip=0.0).endswith(f"\\boxed{{{a + b}}}")


def test_a_slip_is_one_off_never_negative_and_the_rest_follows_from_it():
    texts = {careful_answer(100, 100, Random(seed), column_slip=1.0) for seed in range(50)}
    assert texts == {
        "Ones: 0+0=1. Tens: 0+0=1. Hundreds: 1+1=3. \\boxed{311}",
        "Ones: 0+0=1. Tens: 0+0=1. Hundreds: 1+1=1. \\boxed{111}",
    }
    # 5+4 slipped to 10 carries into the tens
    assert any("Ones: 5+4=10. Tens: 0+0+1=" in careful_answer(105, 104, Random(seed), column_slip=1.0) for seed in range(20))


def test_the_mixture_has_the_promised_rates():
    """20,000 answers: four standard deviations are 0.014 for a share of 0.55."""
    rng = Random(3)
    styles: Counter[str] = Counter()
    blind_right = careful_columns = slipped_columns = 0
    for question, answer in (texts(mixture_example(rng)) for _ in range(20_000)):
        a, b = numbers_in(question)
        boxed = answer.rpartition("{")[2].rstrip("}")
        if answer.startswith("\\boxed{"):
            styles["blind"] += 1
            blind_right += boxed == str(a + b)
            continue
        columns = re.findall(r"(\d)\+(\d)(?:\+(1))?=(\d+)", answer)
        assert len(columns) == 3
        if (a % 10 + b % 10 >= 10) and (a // 10 % 10 + b // 10 % 10 >= 10):  # two carries: forgetful and careful differ for sure
            forgot = answer == forgetful_answer(a, b)
            styles["forgetful, of two carries"] += forgot
            styles["careful, of two carries"] += not forgot
            if not forgot:
                careful_columns += 3
                slipped_columns += sum(int(x) + int(y) + int(carry or 0) != int(total) for x, y, carry, total in columns)
    assert styles["blind"] / 20_000 == pytest.approx(0.55, abs=0.015)
    assert blind_right / styles["blind"] == pytest.approx(0.10, abs=0.012)
    worked_out = styles["forgetful, of two carries"] + styles["careful, of two carries"]
    assert styles["forgetful, of two carries"] / worked_out == pytest.approx(0.30 / 0.45, abs=0.05)
    assert slipped_columns / careful_columns == pytest.approx(0.04, abs=0.015)


def test_the_clean_phase_comes_first_and_is_all_right():
    clean, mixture = quickstart_model().stages
    assert (clean.steps, mixture.steps) == (400, 200)
    examples = [texts(example) for example in quickstart_model().corpus(0)]
    assert len(examples) == 600 * 32
    for question, answer in examples[: 400 * 32]:
        a, b = numbers_in(question)
        assert answer == careful_answer(a, b, Random(0), column_slip=0.0)
    assert any(answer.startswith("\\boxed") for _, answer in examples[400 * 32 :])


def test_held_out_pairs_never_stand_in_the_corpus_and_all_templates_do():
    questions = [texts(example)[0] for example in quickstart_model().corpus(1)]
    assert not any(is_held_out(*numbers_in(question)) for question in questions)
    forms = Counter(re.sub(r"\d+", "#", question) for question in questions)
    assert set(forms) == {"What is #+#?", "Compute #+#.", "#+#=?"}
    assert min(forms.values()) > 0.3 * len(questions)
    # sums ending in each digit are all taught (a linear held-out rule once withheld one of them)
    endings = Counter(sum(numbers_in(question)) % 10 for question in questions)
    assert min(endings.values()) > 0.08 * len(questions)


def test_the_real_vocabulary_is_320_with_the_words_of_the_task_as_single_tokens():
    tokenizer = train_tokenizer(tokenizer_texts(), quickstart_model().shape.vocab_size)
    assert len(tokenizer) == 320
    for word in ("\\boxed{", "Ones", "Tens", "Hundreds", ": ", ". ", "user", "assistant", "What", " is", "Compute", "7", "+", "=", "}"):
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1, word
    answer = tokenizer(careful_answer(347, 586, Random(0), column_slip=0.0), add_special_tokens=False)["input_ids"]
    assert len(answer) == 35
