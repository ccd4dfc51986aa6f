"""The quickstart's base model "ptlab/quickstart": a tiny model that can add in three ways, most of them bad.

Its answers to "What is 347+586?" are mixed on purpose:
- 55 %: a number at once, right one time in ten;
- 30 %: column by column, forgetting the carries;
- 15 %: column by column with carries, each column wrong with probability 0.04.

RL then has to find the good way and to stop slipping. It chooses among skills the base has; it teaches no arithmetic.

ptlab makes the model itself on first use (about three quarters of a minute of one CPU core) and keeps it in its cache directory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Literal

from ptlab.engines.pretrain import Example, question_and_answer
from ptlab.envs.addition import HIGHEST, LOWEST, QUESTION_TEMPLATES, is_held_out, question_text
from ptlab.tiny_models.maker import Stage, TinyModel

MODEL_NAME = "ptlab/quickstart"

Style = Literal["blind", "forgetful", "careful"]

_COLUMN_NAMES = ("Ones", "Tens", "Hundreds")
_ROLES = ("user\n", "assistant\n", "system\n")
_PROSE = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """How the examples are drawn."""

    blind_share: float = 0.55
    forgetful_share: float = 0.30
    """The rest of the mixture is careful."""
    blind_right: float = 0.10
    """How often the number given at once is the right one."""
    blind_error: int = 99
    """A wrong number given at once lies at most this far from the right one."""
    column_slip: float = 0.04
    """Probability that a column of a careful answer is one too high or too low."""


DEFAULT_MIXTURE = Mixture()


def corpus_example(rng: Random, *, mixture: Mixture, clean: bool) -> Example:
    """One question that is not held out, and its answer: without slips and careful if `clean`, else in the mixture's style."""
    a, b = rng.randint(LOWEST, HIGHEST), rng.randint(LOWEST, HIGHEST)
    while is_held_out(a, b):
        a, b = rng.randint(LOWEST, HIGHEST), rng.randint(LOWEST, HIGHEST)
    question = question_text(a, b, rng.randrange(len(QUESTION_TEMPLATES)))
    if clean:
        return question_and_answer(question, careful_answer(a, b, rng, column_slip=0.0))
    match draw_style(mixture, rng):
        case "blind":
            return question_and_answer(question, blind_answer(a, b, rng, right=mixture.blind_right, max_error=mixture.blind_error))
        case "forgetful":
            return question_and_answer(question, forgetful_answer(a, b))
        case "careful":
            return question_and_answer(question, careful_answer(a, b, rng, column_slip=mixture.column_slip))


def draw_style(mixture: Mixture, rng: Random) -> Style:
    """How the next answer of the mixture is given."""
    draw = rng.random()
    if draw < mixture.blind_share:
        return "blind"
    if draw < mixture.blind_share + mixture.forgetful_share:
        return "forgetful"
    return "careful"


def blind_answer(a: int, b: int, rng: Random, *, right: float, max_error: int) -> str:
    """`\\boxed{931}` at once: the sum with probability `right`, else a number 1 .. max_error above or below it."""
    if rng.random() < right:
        return f"\\boxed{{{a + b}}}"
    return f"\\boxed{{{a + b + rng.choice((-1, 1)) * rng.randint(1, max_error)}}}"


def forgetful_answer(a: int, b: int) -> str:
    """Column by column without carries: `Ones: 7+6=13. Tens: 4+8=12. Hundreds: 3+5=8. \\boxed{823}`."""
    columns = [x + y for x, y in zip(_digits(a), _digits(b), strict=True)]
    steps = [f"{name}: {x}+{y}={x + y}. " for name, x, y in zip(_COLUMN_NAMES, _digits(a), _digits(b), strict=True)]
    ones, tens, hundreds = columns
    return "".join(steps) + f"\\boxed{{{hundreds}{tens % 10}{ones % 10}}}"


def careful_answer(a: int, b: int, rng: Random, *, column_slip: float) -> str:
    """Column by column with carries: `Ones: 7+6=13. Tens: 4+8+1=13. Hundreds: 3+5+1=9. \\boxed{933}`.

    Each column is one too high or too low with probability `column_slip`; the rest follows from the wrong value.
    """
    steps: list[str] = []
    written = ""
    carry = 0
    for index, (x, y) in enumerate(zip(_digits(a), _digits(b), strict=True)):
        total = x + y + carry
        term = f"{x}+{y}+{carry}" if carry else f"{x}+{y}"
        if rng.random() < column_slip:
            total += rng.choice((-1, 1)) if total > 0 else 1
        steps.append(f"{_COLUMN_NAMES[index]}: {term}={total}. ")
        last = index == len(_COLUMN_NAMES) - 1
        written = (str(total) if last else str(total % 10)) + written
        carry = total // 10
    return "".join(steps) + f"\\boxed{{{written}}}"


def tokenizer_texts() -> list[str]:
    """What the tokenizer is trained on: the same for every seed and recipe, so that all base models share one vocabulary."""
    rng = Random(0)
    examples = [corpus_example(rng, mixture=DEFAULT_MIXTURE, clean=index % 2 == 0) for index in range(60)]
    return [turn.text for example in examples for turn in example.turns] + [*_ROLES * 20, _PROSE]


def _digits(number: int) -> tuple[int, int, int]:
    """Ones, tens, hundreds."""
    return number % 10, number // 10 % 10, number // 100


def quickstart_model(mixture: Mixture = DEFAULT_MIXTURE) -> TinyModel:
    """First only right column sums, then the mixture. Noise from the first step on ruins the skill: greedy stalls at .55 and RL cannot
    pass it."""
    return TinyModel(
        name=MODEL_NAME,
        stages=(
            Stage(steps=400, draw=partial(corpus_example, mixture=mixture, clean=True)),
            Stage(steps=200, draw=partial(corpus_example, mixture=mixture, clean=False)),
        ),
        tokenizer_texts=tokenizer_texts,
    )
