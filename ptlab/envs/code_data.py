"""Rows of programming data sets as problems with tests. Which form a row has, its fields say:

- `test_list` (asserts), `code`, `test_imports`: google-research-datasets/mbpp
- `prompt`, `test` (defines check(candidate)), `entry_point`: openai_humaneval
- `tests` or `input_output`, {"inputs": [...], "outputs": [...], "fn_name": ...?}: BAAI/TACO, APPS, PrimeIntellect
- `tests`, `test_cases` or `public_test_cases`, [{"input", "output", "testtype" or "type"?, "fn_name"?}]: Codeforces, LiveCodeBench,
  DeepCoder, PrimeIntellect (there within `verification_info`)

The last two are read from stdin and print, or with a fn_name are functions. Values may be JSON in a string, as the hub stores them. The
question is `problem`, `question`, `question_content`, `prompt`, `text` or `description`; `starter_code` is kept; `metadata.func_name`
(LiveCodeBench) is a fn_name.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptlab.errors import ConfigError, InvalidRequestError
from ptlab.rewards.code_tests import AssertTests, CallTests, CodeTests, StdinTests, assert_tests, check_function_tests

logger = logging.getLogger(__name__)
QUESTION_FIELDS = ("problem", "question", "question_content", "prompt", "text", "description")
TEST_FIELDS = ("tests", "input_output", "test_cases", "public_test_cases", "verification_info")
PREAMBLE = (
    "import bisect, collections, functools, heapq, itertools, math, operator, random, re, string\n"
    "from typing import *\nfrom collections import *\nfrom functools import *\nfrom itertools import *\n"
    "from heapq import *\nfrom bisect import *\nfrom math import *\n"
)
"""What LeetCode and LiveCodeBench give to every solution; only problems with such starter code get it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeProblem:
    """What to write and how it is tested."""

    question: str
    tests: CodeTests
    starter: str = ""
    """Code that the problem gives: shown, and kept in front of the reply's where both together compile."""
    preamble: str = ""
    """Imports that the problem takes for granted; not shown."""
    example: str = ""
    """A test to show, where the question alone does not say what the function is called."""
    where: str = ""
    """File and line, or row of the data set."""


class UnusableRow(Exception):
    """A row of a known form without a test that can be run."""


def problems_of(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> list[CodeProblem]:
    """The problems of rows. Those without a usable test are left out and counted in a warning.

    Raises: ConfigError for a row of no known form.
    """
    problems: list[CodeProblem] = []
    unusable: list[str] = []
    for where, row in rows:
        try:
            problems.append(problem_of(where, row))
        except (UnusableRow, InvalidRequestError) as err:
            unusable.append(f"{where}: {err}")
    if unusable:
        logger.warning("%d problems without a usable test are left out; the first is %s", len(unusable), unusable[0][:300])
    return problems


def problem_of(where: str, row: Mapping[str, Any]) -> CodeProblem:
    """Raises: ConfigError for a row of no known form; UnusableRow, InvalidRequestError for tests that cannot be run."""
    if "test_list" in row:
        asserts = [str(line) for line in row["test_list"]]
        setup = "\n".join([*row.get("test_imports", []), str(row.get("test_setup_code", ""))])
        tests = assert_tests(asserts, setup=setup, reference=str(row.get("code", "")))
        return CodeProblem(question=_question(where, row), tests=tests, example=asserts[0], where=where)
    if "entry_point" in row and "test" in row:
        prompt = _text(where, row, "prompt")
        checks = check_function_tests(_text(where, row, "test"), setup=prompt, entry_point=_text(where, row, "entry_point"))
        return CodeProblem(question="Complete this function.", tests=checks, starter=prompt, where=where)
    field = next((name for name in TEST_FIELDS if row.get(name) is not None), None)
    if field is None:
        raise ConfigError(
            f"{where}: no tests found; needed one of test_list, entry_point with test, {', '.join(TEST_FIELDS)}; "
            f"the row has {', '.join(row) or 'no fields'}"
        )
    held = _parsed(where, row[field])
    if isinstance(held, Mapping) and "test_cases" in held:  # PrimeIntellect's verification_info
        held = _parsed(where, held["test_cases"])
    starter = str(row.get("starter_code") or "")
    metadata = _parsed(where, row.get("metadata") or {})
    name = metadata.get("func_name") if isinstance(metadata, Mapping) else None
    io_tests = _columns(held, name) if isinstance(held, Mapping) else _cases(held, name)
    return CodeProblem(
        question=_question(where, row),
        tests=io_tests,
        starter=starter,
        preamble=PREAMBLE if starter.strip() and isinstance(io_tests, CallTests) else "",
        where=where,
    )


def show(problem: CodeProblem, *, instructions: bool) -> str:
    """The question as the model reads it.

    Args:
        instructions: say how the program talks and where to put it; without, the question and the starter code alone.
    """
    parts = [problem.question.strip()]
    if problem.starter.strip():
        lead = "" if isinstance(problem.tests, AssertTests) else "Start from this code.\n"
        parts.append(f"{lead}```python\n{problem.starter.rstrip()}\n```")
    if not instructions:
        return "\n\n".join(parts)
    if problem.example:
        parts.append(f"It is tested like this: {problem.example.strip()}")
    if isinstance(problem.tests, StdinTests):
        parts.append("Write a Python program that reads from standard input and prints to standard output.")
    elif isinstance(problem.tests, CallTests) and not problem.starter.strip():
        parts.append(f"Write a Python function {problem.tests.fn_name} that returns the answer.")
    parts.append("Put the complete code in a ```python block.")
    return "\n\n".join(parts)


def _columns(held: Mapping[str, Any], name: str | None) -> CodeTests:
    """{"inputs", "outputs", "fn_name"?}"""
    inputs, outputs = held.get("inputs"), held.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs) or not inputs:
        raise UnusableRow("needed lists `inputs` and `outputs` of the same length, at least 1")
    return _tests(held.get("fn_name") or name, inputs, outputs)


def _cases(held: Any, name: str | None) -> CodeTests:
    """[{"input", "output", "testtype" or "type"?, "fn_name"?}]"""
    if not isinstance(held, list) or not held or not all(isinstance(case, Mapping) and {"input", "output"} <= set(case) for case in held):
        raise UnusableRow("needed a list of tests with `input` and `output`")
    kinds = {case.get("testtype") or case.get("type") or "stdin" for case in held}
    named = [case.get("fn_name") or (case.get("metadata") or {}).get("func_name") for case in held]
    names = {str(function) for function in named if function is not None}
    inputs, outputs = [case["input"] for case in held], [case["output"] for case in held]
    if kinds <= {"stdin", "stdin_stdout"} and not names:
        return _tests(None, inputs, outputs)
    fn_name = next(iter(names), name)
    if len(kinds) > 1 or len(names) > 1 or fn_name is None:
        raise UnusableRow(
            f"tests of kinds {sorted(kinds)} for functions {sorted(names) or 'without a name'}; needed one kind and one function"
        )
    return _tests(str(fn_name), inputs, outputs)


def _tests(fn_name: str | None, inputs: Sequence[Any], outputs: Sequence[Any]) -> CodeTests:
    if fn_name is None:
        return StdinTests(inputs_N=[_lines(text) for text in inputs], outputs_N=[_lines(text) for text in outputs])
    return CallTests(fn_name=fn_name, args_N=[_arguments(text) for text in inputs], results_N=[_value(value) for value in outputs])


def _lines(text: Any) -> str:
    """TACO has lists of lines here and there."""
    return "\n".join(str(line) for line in text) if isinstance(text, list) else str(text)


def _arguments(given: Any) -> list[Any]:
    """LiveCodeBench: one JSON value a line; the others: a list of arguments."""
    if isinstance(given, str):
        try:
            return [json.loads(line) for line in given.split("\n") if line.strip()]
        except (ValueError, RecursionError) as err:
            raise UnusableRow(f"arguments are not JSON: {err}") from err
    if not isinstance(given, list):
        raise UnusableRow(f"arguments are {type(given).__name__}, needed a list")
    return given


def _value(given: Any) -> Any:
    """A result; LiveCodeBench writes it as JSON in a string, and a string that is no JSON is itself."""
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except (ValueError, RecursionError):
        return given


def _question(where: str, row: Mapping[str, Any]) -> str:
    for name in QUESTION_FIELDS:
        if isinstance(row.get(name), str) and row[name].strip():
            return str(row[name])
    raise ConfigError(f"{where}: no question found; needed a text in one of {', '.join(QUESTION_FIELDS)}; the row has {', '.join(row)}")


def _text(where: str, row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f'{where}: needed a text in the field "{name}", found {str(value)[:60]!r}')
    return value


def _parsed(where: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as err:
        raise UnusableRow(f"tests are not JSON: {err}") from err
