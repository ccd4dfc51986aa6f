"""The quickstart task: three-digit addition, and which pairs nobody may train on.

Pure: no randomness but hashing, no state. The same (seed, step, index) gives the same problem on every machine and Python
version, so a resumed run sees what the unbroken one would have seen.

A tenth of all pairs is held out of pretraining and of RL prompts and is what evaluation asks. The choice is a real hash: a
linear rule such as (a + 3 * b) % 10 == 0 ties the held-out pairs to certain last digits, and evaluation then measures a skill
that was never taught. It ignores the order of the two numbers: 586+347 must not be the training twin of a held-out 347+586.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

from ptlab.envs.env_section import EnvSection, TaskSetting
from ptlab.envs.math_problems import Problem, ProblemDataset, ProblemFormat, test_builders
from ptlab.errors import InvalidRequestError
from ptlab.rl.seeds import stable_seed
from ptlab.rl.types import Task

LOWEST, HIGHEST = 100, 999

QUESTION_TEMPLATES = ("What is {a}+{b}?", "Compute {a}+{b}.", "{a}+{b}=?")

MAX_TEST_PROBLEMS = 10_000  # about 40,500 unordered pairs are held out; more than this would spend minutes of hashing


def is_held_out(a: int, b: int) -> bool:
    """Whether this pair is reserved for evaluation (a tenth of all pairs; the same for (a, b) and (b, a))."""
    low, high = sorted((a, b))
    return _hash64("held-out", low, high) % 10 == 0


def question_text(a: int, b: int, template_index: int) -> str:
    """The question in one of the QUESTION_TEMPLATES; `template_index` counts round and round."""
    return QUESTION_TEMPLATES[template_index % len(QUESTION_TEMPLATES)].format(a=a, b=b)


def training_problem(seed: int, step: int, index: int) -> tuple[str, str]:
    """Question and answer ("Compute 347+586.", "933") of problem `index` of training step `step`; never a held-out pair."""
    attempt = 0
    while True:
        a, b, template_index = _draw("train", seed, step, index, attempt)
        if not is_held_out(a, b):
            return question_text(a, b, template_index), str(a + b)
        attempt += 1


def test_problems(n: int) -> list[tuple[str, str]]:
    """The first `n` of one fixed list of held-out questions and answers; all pairs differ, in any order of the two numbers.

    Raises: InvalidRequestError if n is negative or above MAX_TEST_PROBLEMS.
    """
    if not 0 <= n <= MAX_TEST_PROBLEMS:
        raise InvalidRequestError(f"addition test problems: n is {n}; give a number from 0 to {MAX_TEST_PROBLEMS}")
    problems: list[tuple[str, str]] = []
    seen: set[tuple[int, int]] = set()
    attempt = 0
    while len(problems) < n:
        a, b, template_index = _draw("test", attempt)
        attempt += 1
        pair = (min(a, b), max(a, b))
        if pair in seen or not is_held_out(a, b):
            continue
        seen.add(pair)
        problems.append((question_text(a, b, template_index), str(a + b)))
    return problems


def _draw(*key: str | int) -> tuple[int, int, int]:
    """Two numbers in LOWEST..HIGHEST and a template index, by hash of the key (the bias of % on 64 bits is below 1e-15)."""
    width = HIGHEST - LOWEST + 1
    return LOWEST + _hash64("a", *key) % width, LOWEST + _hash64("b", *key) % width, _hash64("template", *key) % len(QUESTION_TEMPLATES)


def _hash64(*key: str | int) -> int:
    text = "/".join(str(part) for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


class AdditionConfig(EnvSection):
    kind: Literal["addition"] = "addition"
    """Three-digit sums; made from the seed, nothing to download. Reward 1.0 if the boxed sum is right, else 0.0."""
    reward: Literal["correct", "random"] = "correct"
    """"random" pays by coin toss: the negative control, which must not learn."""

    async def make_task(self, setting: TaskSetting) -> Task:
        form = ProblemFormat(suffix="", format_coef=0.0)

        def problems_at(step: int) -> Sequence[Problem]:
            return [Problem(*training_problem(setting.seed, step, index)) for index in range(self.groups_per_step)]

        train = ProblemDataset(
            problems_at=problems_at,
            num_batches=(HIGHEST - LOWEST + 1) ** 2 // self.groups_per_step,
            group_size=self.group_size,
            renderer=setting.renderer,
            form=form,
            coin_seed=stable_seed(setting.seed, "coin") if self.reward == "random" else None,
            tag="addition",
        )
        held_out = [Problem(*pair) for pair in test_problems(self.num_test)]
        return Task(train=train, test_P=test_builders(held_out, setting.renderer, form, "addition", attempts=setting.test_attempts))
