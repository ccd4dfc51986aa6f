"""Conversations that ptlab writes itself: three-digit sums with careful answers, for supervised fine-tuning without a download.

user: Compute 347+586.    assistant: Ones: 7+6=13. Tens: 4+8+1=13. Hundreds: 3+5+1=9. \\boxed{933}
"""

from __future__ import annotations

import random

from ptlab.envs.addition import test_problems, training_problem
from ptlab.envs.conversations import Conversation
from ptlab.rl.seeds import stable_seed

_COLUMNS = ("Ones", "Tens", "Hundreds")


def careful_sum(a: int, b: int) -> str:
    """The sum of two three-digit numbers column by column, with carries."""
    steps: list[str] = []
    digits: list[str] = []
    carry = 0
    for name, x, y in zip(_COLUMNS, reversed(f"{a:03d}"), reversed(f"{b:03d}"), strict=True):
        term = f"{x}+{y}+{carry}" if carry else f"{x}+{y}"
        total = int(x) + int(y) + carry
        steps.append(f"{name}: {term}={total}.")
        digits.append(str(total) if name == _COLUMNS[-1] else str(total % 10))
        carry = total // 10
    return f"{' '.join(steps)} \\boxed{{{''.join(reversed(digits))}}}"


def made_sums(num_train: int, num_test: int, *, seed: int, shuffled: bool = False) -> tuple[list[Conversation], list[Conversation]]:
    """Training and held-out conversations: training problems of the addition task, and its test problems.

    Args:
        shuffled: each training question has another's answer (the negative control); the held-out ones stay right.
    """
    questions = [training_problem(seed, 0, index)[0] for index in range(num_train)]
    answers = [_answer_to(question) for question in questions]
    if shuffled:
        random.Random(stable_seed(seed, "shuffled_answers")).shuffle(answers)
    train = [_conversation(question, answer) for question, answer in zip(questions, answers, strict=True)]
    return train, [_conversation(question, _answer_to(question)) for question, _ in test_problems(num_test)]


def _answer_to(question: str) -> str:
    """The numbers stand in the question as "347+586"."""
    left, right = question.split("+")
    return careful_sum(int(left[-3:]), int(right[:3]))


def _conversation(question: str, answer: str) -> Conversation:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
