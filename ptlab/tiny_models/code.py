r"""The base model "ptlab/tiny-code": one-line Python functions, which it mostly gets wrong.

"Write a function f of a and b that returns the larger of a and b." is answered with a fenced block such as

    ```python
    def f(a, b):
     return max(a, b)
    ```

where, each for itself, with the probabilities of Mixture, the fence is missing (no program), the colon or a bracket is (a syntax error), or
the expression is another one (a wrong program). About a quarter of its answers pass, and its likeliest one is wrong. RL has to make each
of the three slips rarer.

A tenth of all problems, by hash of kind, names and constant, is in no example the model is made from and in no training row; the test rows
are drawn from it.

    python -m ptlab.tiny_models.code configs/smoke/data      # writes the rows that configs/smoke/code.yaml reads, in MBPP's fields
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from ptlab.engines.pretrain import Example, ModelShape, question_and_answer
from ptlab.tiny_models.maker import Stage, TinyModel

MODEL_NAME = "ptlab/tiny-code"
NUM_TRAIN, NUM_TEST = 500, 60
TESTS_PER_PROBLEM = 5

FUNCTION_NAMES = ("f", "g", "h", "solve")
ARGUMENT_NAMES = (("a", "b"), ("x", "y"), ("m", "n"), ("p", "q"))
_ROLES = ("user\n", "assistant\n", "system\n")


@dataclass(frozen=True, slots=True)
class Kind:
    """A family of functions. {a} and {b} are the arguments, {k} a constant."""

    text: str
    right: str
    wrong: tuple[str, str]
    inputs: str
    """One letter per argument: i number, l list of numbers, s text."""


KINDS = (
    Kind("the larger of {a} and {b}", "max({a}, {b})", ("min({a}, {b})", "{a}"), "ii"),
    Kind("the smaller of {a} and {b}", "min({a}, {b})", ("max({a}, {b})", "{b}"), "ii"),
    Kind("the sum of {a} and {b}", "{a} + {b}", ("{a} - {b}", "{a} * {b}"), "ii"),
    Kind("{a} minus {b}", "{a} - {b}", ("{b} - {a}", "{a} + {b}"), "ii"),
    Kind("the distance of {a} and {b}", "abs({a} - {b})", ("{a} - {b}", "abs({a} + {b})"), "ii"),
    Kind("{a} plus {k}", "{a} + {k}", ("{a} - {k}", "{k} * {a}"), "i"),
    Kind("{k} times {a}", "{k} * {a}", ("{k} + {a}", "{a} ** {k}"), "i"),
    Kind("the square of {a} plus {k}", "{a} * {a} + {k}", ("{a} + {k}", "{a} * {k}"), "i"),
    Kind("the remainder of {a} divided by {k}", "{a} % {k}", ("{a} // {k}", "{k} % {a}"), "i"),
    Kind("whether {a} is greater than {k}", "{a} > {k}", ("{a} < {k}", "{k} > {a}"), "i"),
    Kind("the last element of {a}", "{a}[-1]", ("{a}[0]", "{a}[1]"), "l"),
    Kind("the sum of the list {a}", "sum({a})", ("len({a})", "max({a})"), "l"),
    Kind("how often {k} is in {a}", "{a}.count({k})", ("{a}.index({k})", "{k} in {a}"), "l"),
    Kind("the text {a} reversed", "{a}[::-1]", ("{a}[::1]", "reversed({a})"), "s"),
)


@dataclass(frozen=True, slots=True)
class Task:
    """One function to write."""

    kind: Kind
    name: str
    arguments: tuple[str, str]
    k: int

    @property
    def question(self) -> str:
        given = " and ".join(self.arguments[: len(self.kind.inputs)])
        return f"Write a function {self.name} of {given} that returns {self.fill(self.kind.text)}."

    @property
    def is_held_out(self) -> bool:
        """Whether it is reserved for the test."""
        digest = hashlib.blake2b(self.question.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % 10 == 0

    def fill(self, template: str) -> str:
        a, b = self.arguments
        return template.format(a=a, b=b, k=self.k)

    def code(self, expression: str) -> str:
        given = ", ".join(self.arguments[: len(self.kind.inputs)])
        return f"def {self.name}({given}):\n return {expression}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """How often each slip is made; independent of each other."""

    no_fence: float = 0.15
    syntax: float = 0.3
    wrong: float = 0.6
    first_wrong: float = 0.8
    """How often a wrong expression is the first of its kind's two: likelier than the right one, so that the greedy answer is wrong."""


DEFAULT_MIXTURE = Mixture()


def draw_task(rng: Random, *, held_out: bool) -> Task:
    """A task of any kind, constant 2-9."""
    while True:
        task = Task(rng.choice(KINDS), rng.choice(FUNCTION_NAMES), rng.choice(ARGUMENT_NAMES), rng.randint(2, 9))
        if task.is_held_out == held_out:
            return task


def example(rng: Random, *, mixture: Mixture, clean: bool) -> Example:
    """A task that is not held out, and its answer: right if `clean`, else with the mixture's slips."""
    task = draw_task(rng, held_out=False)
    return question_and_answer(task.question, answer(task, rng, mixture=Mixture(no_fence=0.0, syntax=0.0, wrong=0.0) if clean else mixture))


def answer(task: Task, rng: Random, *, mixture: Mixture) -> str:
    """A reply with the slips that are drawn."""
    wrong, syntax, no_fence = (rng.random() < share for share in (mixture.wrong, mixture.syntax, mixture.no_fence))
    slip = task.kind.wrong[0 if rng.random() < mixture.first_wrong else 1]
    code = task.code(task.fill(slip if wrong else task.kind.right))
    if syntax:
        code = code.replace("):\n", rng.choice((")\n", ":\n")), 1)
    return code if no_fence else f"```python\n{code}\n```"


def tokenizer_texts() -> list[str]:
    """What the tokenizer is trained on; the same for every seed."""
    rng = Random(0)
    examples = [example(rng, mixture=DEFAULT_MIXTURE, clean=index % 2 == 0) for index in range(120)]
    return [turn.text for one in examples for turn in one.turns] + [*_ROLES * 20]


def code_model(mixture: Mixture = DEFAULT_MIXTURE) -> TinyModel:
    """First only right programs, then the mixture."""
    return TinyModel(
        name=MODEL_NAME,
        stages=(
            Stage(steps=180, draw=partial(example, mixture=mixture, clean=True)),
            Stage(steps=140, draw=partial(example, mixture=mixture, clean=False)),
        ),
        tokenizer_texts=tokenizer_texts,
        shape=ModelShape(vocab_size=352),
    )


def rows(*, held_out: bool, count: int) -> list[dict[str, Any]]:
    """Rows in the fields of MBPP; no question twice, the same list every time. Every wrong program of a kind fails one of the tests."""
    rng = Random("test" if held_out else "train")
    found: dict[str, dict[str, Any]] = {}
    while len(found) < count:
        task = draw_task(rng, held_out=held_out)
        code = task.code(task.fill(task.kind.right))
        found.setdefault(task.question, {"prompt": task.question, "code": code, "test_list": _tests(task, rng)})
    return list(found.values())


def _tests(task: Task, rng: Random) -> list[str]:
    """Drawn again until every wrong expression fails one of them."""
    while True:
        inputs = [[_value(letter, task, rng) for letter in task.kind.inputs] for _ in range(TESTS_PER_PROBLEM)]
        results = [_result(task, task.kind.right, values) for values in inputs]
        wrong_too = [[_result(task, wrong, values) for values in inputs] for wrong in task.kind.wrong]
        if results not in wrong_too:
            break
    return [f"assert {task.name}({', '.join(map(repr, values))}) == {result!r}" for values, result in zip(inputs, results, strict=True)]


def _result(task: Task, expression: str, values: Sequence[Any]) -> Any:
    """Of an expression of KINDS; None where it raises."""
    try:
        return eval(task.fill(expression), {}, dict(zip(task.arguments, values, strict=False)))
    except (TypeError, ValueError, IndexError):
        return None


def _value(letter: str, task: Task, rng: Random) -> Any:
    match letter:
        case "i":
            return task.k * rng.randint(1, 9) if rng.random() < 0.5 else rng.randint(1, 40)
        case "l":
            return [rng.choice((task.k, rng.randint(1, 20))) for _ in range(rng.randint(3, 6))]
        case _:
            return "".join(rng.choice("abcdef") for _ in range(rng.randint(2, 6)))


def write_rows(directory: Path) -> None:
    """code_train.jsonl and code_test.jsonl."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, held_out, count in (("train", False, NUM_TRAIN), ("test", True, NUM_TEST)):
        lines = [json.dumps(row) for row in rows(held_out=held_out, count=count)]
        (directory / f"code_{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_rows(Path(sys.argv[1]))
