r"""Rewards for mathematics: find the boxed answer, decide whether it is right, pay for it.

The files below this one: `answer_text` (spelling, units, lists), `latex_answer` (text -> tree), `answer_values` (tree -> number) and
`answer_equality` (lists, sets, intervals, equations, words). What counts as equal is decided and listed in `answer_equality`.

A hostile answer is a wrong answer: never an exception and never a hang. The bound holds in any thread and needs no worker process;
`answer_values` says why. Equal strings and plain numbers, nearly all of GSM8K, take no arithmetic beyond one Fraction.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from ptlab.errors import InvalidRequestError
from ptlab.rewards.answer_equality import same_answer
from ptlab.rewards.answer_text import MAX_ANSWER_CHARS, comparison_key, normalise
from ptlab.rewards.answer_values import Undecidable, WorkLimit

__all__ = ["MathReward", "extract_boxed", "grade_answer", "gsm8k_gold", "math_reward", "normalise"]

BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
UNBRACED = re.compile(r"[^\s$]{1,2000}")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
PLAIN_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3}){1,20}|\d{1,60})(?:\.\d{0,60})?")


@dataclass(frozen=True, slots=True)
class MathReward:
    """reward: what the policy is paid. correct: 1.0 if the boxed answer is right. boxed: 1.0 if there is a boxed answer at all."""

    reward: float
    correct: float
    boxed: float


def math_reward(response_text: str, truth: str, *, format_coef: float = 0.1, timeout_s: float = 1.0) -> MathReward:
    """reward = correct + format_coef * (boxed - 1): right 1.0, wrong but boxed 0.0, not boxed -format_coef."""
    given = extract_boxed(response_text)
    boxed = float(given is not None)
    correct = float(given is not None and grade_answer(given, truth, timeout_s=timeout_s))
    return MathReward(reward=correct + format_coef * (boxed - 1.0), correct=correct, boxed=boxed)


def extract_boxed(text: str) -> str | None:
    r"""Content of the last \boxed{...} or \fbox{...}, braces balanced (\{ and \} do not count); also "\boxed 5".

    None if there is no box or the last one is not closed: a response that was cut off has not answered. Linear in the text.
    """
    start = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))
    while start >= 0:
        match = BOX.match(text, start)
        if match is not None:
            return _box_content(text, match.end())
        start = max(text.rfind(r"\boxed", 0, start), text.rfind(r"\fbox", 0, start))  # \boxedsomething is another command
    return None


def grade_answer(given: str, truth: str, *, timeout_s: float = 1.0) -> bool:
    """Whether `given` is the same answer as `truth`, for any strings at all.

    timeout_s: CPU seconds of the calling thread. Past them, as past every other limit (characters, depth, digits), the answer is wrong.
    """
    if len(given) > MAX_ANSWER_CHARS or len(truth) > MAX_ANSWER_CHARS:
        return given == truth
    given_number, truth_number = _plain_number(given), _plain_number(truth)
    if given_number is not None and truth_number is not None:
        return given_number == truth_number
    given, truth = normalise(given), normalise(truth)
    if comparison_key(given) == comparison_key(truth):
        return given != ""
    try:
        return same_answer(given, truth, WorkLimit(timeout_s))
    except (Undecidable, RecursionError):  # RecursionError: the caller's own stack was nearly full; depth is bounded here
        return False


def gsm8k_gold(answer_field: str) -> str:
    """The number after the last "####" of a GSM8K answer, without thousands commas ("70000").

    Raises: InvalidRequestError if the row has no such line.
    """
    _, mark, gold = answer_field.rpartition("####")
    if not mark or not gold.strip():
        raise InvalidRequestError(f"GSM8K row: the answer field ends in {answer_field[-40:]!r}; it needs a last line '#### <number>'")
    return gold.strip().replace(",", "")


def _box_content(text: str, start: int) -> str | None:
    if not text.startswith("{", start):
        match = UNBRACED.match(text, start)
        return match[0] if match else None
    depth = 0
    for match in BRACE.finditer(text, start):
        if match[0] == "{":
            depth += 1
        elif match[0] == "}":
            depth -= 1
            if depth == 0:
                return text[start + 1 : match.start()].strip()
    return None


def _plain_number(text: str) -> Fraction | None:
    """The value of "1,234.50", "$18" or "-7."; None for every other form."""
    text = text.strip().removeprefix("$").removesuffix("$")
    if PLAIN_NUMBER.fullmatch(text) is None:
        return None
    return Fraction(text.replace(",", "").removesuffix("."))
