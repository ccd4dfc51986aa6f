"""Whether a program's output, or a function's result, is the expected one. Both are plain text and plain values by the time they get here.

The rules of the usual graders (Codeforces checkers, APPS, TACO, LiveCodeBench), strict where these differ: whitespace within and behind a
line and empty lines at the end do not count; numbers with a point or an exponent may be off by 1e-6; whole numbers and words must be the
same text. A problem that accepts several answers is graded against the one in the data.
"""

from __future__ import annotations

import math
from typing import Any

from ptlab.rewards.code_values import Opaque

TOLERANCE = 1e-6
"""Absolute or relative, whichever allows more."""
MAX_NUMBER_CHARS = 50


def same_output(given: str, expected: str) -> bool:
    """Line by line, and within a line word by word."""
    given_lines, expected_lines = _lines(given), _lines(expected)
    return len(given_lines) == len(expected_lines) and all(
        len(ours) == len(theirs) and all(map(_same_word, ours, theirs)) for ours, theirs in zip(given_lines, expected_lines, strict=True)
    )


def same_value(given: Any, expected: Any) -> bool:
    """A function's result against one read from JSON, which knows no tuples and no keys but strings. Also right: the result alone where
    the data wrap it in a list (TACO, APPS)."""
    if _same_value(given, expected):
        return True
    return isinstance(expected, list) and len(expected) == 1 and not isinstance(given, list | tuple) and _same_value(given, expected[0])


def _same_value(given: Any, expected: Any) -> bool:
    if isinstance(expected, dict):
        if not isinstance(given, dict) or len(given) != len(expected):
            return False
        by_text = {str(key): value for key, value in given.items() if isinstance(key, str | int | float)}
        return len(by_text) == len(expected) and all(
            str(key) in by_text and _same_value(by_text[str(key)], value) for key, value in expected.items()
        )
    if isinstance(expected, list | tuple):
        return isinstance(given, list | tuple) and len(given) == len(expected) and all(map(_same_value, given, expected))
    if isinstance(given, Opaque | dict | list | tuple):
        return False
    if isinstance(expected, float) or isinstance(given, float):
        return isinstance(given, int | float) and isinstance(expected, int | float) and _close(given, expected)
    return type(given) in (str, int, bool, bytes, type(None)) and bool(given == expected)


def _lines(text: str) -> list[list[str]]:
    lines = [line.split() for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _same_word(given: str, expected: str) -> bool:
    if given == expected:
        return True
    if not any(mark in expected for mark in ".eE") or max(len(given), len(expected)) > MAX_NUMBER_CHARS or "_" in given:
        return False
    try:
        return _close(float(given), float(expected))
    except ValueError:
        return False


def _close(given: float, expected: float) -> bool:
    try:
        return math.isclose(given, expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    except OverflowError:  # an int too large for a float
        return given == expected
