"""Tools that a model may call: a calculator, and Python in a sandbox; and how a chat template announces them.

A tool's trouble with what the model asked (an unreadable expression, a program that fails) is a ToolError, whose text the model reads. An
exception of another kind means that the tool broke.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

from ptlab.rewards.answer_text import MAX_ANSWER_CHARS, normalise
from ptlab.rewards.answer_values import Undecidable, WorkLimit, approximate, exact_value
from ptlab.rewards.latex_answer import Unreadable, read
from ptlab.sandbox import Limits, Program, Sandbox

MAX_RESULT_DIGITS = 200


class ToolError(Exception):
    """The call cannot be carried out; the message is what the model reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSpec:
    """What a model is told of a tool: a function with one text argument."""

    name: str
    description: str
    argument: str
    argument_description: str

    def to_json(self) -> dict[str, Any]:
        """In the form of OpenAI's API, which chat templates take."""
        argument = {"type": "string", "description": self.argument_description}
        parameters = {"type": "object", "properties": {self.argument: argument}, "required": [self.argument]}
        return {"type": "function", "function": {"name": self.name, "description": self.description, "parameters": parameters}}


class Tool(Protocol):
    """One tool; used by many attempts at once."""

    @property
    def spec(self) -> ToolSpec: ...

    async def call(self, argument: str) -> str:
        """The result as text. Raises: ToolError for what the model got wrong."""


def tools_prompt(specs: Sequence[ToolSpec], *, system: str = "") -> str:
    """The system message that announces tools, letter for letter as Qwen3's chat template writes it."""
    lines = "".join("\n" + json.dumps(spec.to_json(), ensure_ascii=False) for spec in specs)
    return (
        (system + "\n\n" if system else "")
        + "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        + f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>{lines}\n</tools>\n\n"
        + "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
        + '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )


class Calculator:
    """Arithmetic without eval: the bounded reader and arithmetic of the grader (rewards/latex_answer.py, answer_values.py)."""

    spec = ToolSpec(
        name="calculator",
        description="Evaluates one arithmetic expression with + - * / ^ ( ) ! sqrt sin cos tan ln log exp pi e.",
        argument="expression",
        argument_description="For example: (17*23-4)/5",
    )

    async def call(self, argument: str) -> str:
        if len(argument) > MAX_ANSWER_CHARS:
            raise ToolError(f"the expression has {len(argument)} characters; at most {MAX_ANSWER_CHARS} are read")
        limit = WorkLimit(1.0)
        try:
            node = read(normalise(argument))
            exact = exact_value(node, limit)
            return decimal_text(exact) if exact is not None else approximate(node, limit, digits=12)
        except Unreadable as err:
            raise ToolError(f"cannot read the expression: {err}") from err
        except Undecidable as err:
            raise ToolError(f"no value: {err}") from err


def decimal_text(value: Fraction) -> str:
    """18, 0.125, or to 12 digits 0.333333333333. Raises: ToolError beyond MAX_RESULT_DIGITS digits."""
    whole = value.numerator // value.denominator
    if abs(whole) >= 10**MAX_RESULT_DIGITS:
        raise ToolError(f"the result has more than {MAX_RESULT_DIGITS} digits")
    for places in range(13):
        scaled = value * 10**places
        if scaled.denominator == 1:
            digits = f"{abs(scaled.numerator):0{places + 1}d}"
            text = digits if places == 0 else f"{digits[:-places]}.{digits[-places:]}"
            return "-" + text if value < 0 else text
    return f"{value.numerator / value.denominator:.12g}"


class PythonTool:
    """A program in a sandbox; the result is what it printed, or the end of its error message.

    Args:
        max_chars: of the result; more is cut in the middle.
    """

    spec = ToolSpec(
        name="python",
        description="Runs a Python 3 program (standard library only, no network, no state between calls) and returns what it prints.",
        argument="code",
        argument_description="The whole program; print what you want to see.",
    )

    def __init__(self, sandbox: Sandbox, *, limits: Limits | None = None, max_chars: int = 2000) -> None:
        self.sandbox = sandbox
        self.limits = limits
        self.max_chars = max_chars

    async def call(self, argument: str) -> str:
        """Raises: ToolError if the program failed; SandboxError if the sandbox did."""
        outcome = await self.sandbox.run(Program(source=argument, limits=self.limits))
        printed = clipped(outcome.stdout.rstrip("\n"), self.max_chars)
        if outcome.status == "ok":
            return printed or "(nothing was printed)"
        problem = (
            outcome.stderr.strip()[-500:] if outcome.status == "error" else f"the program ended with {outcome.status.replace('_', ' ')}"
        )
        raise ToolError("\n".join(part for part in (printed, problem) if part))


def clipped(text: str, max_chars: int) -> str:
    """The text, or its beginning and end with a note between them."""
    if len(text) <= max_chars:
        return text
    half = max_chars // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[len(text) - half :]}"


def argument_of(spec: ToolSpec, arguments: Mapping[str, Any]) -> str:
    """The one argument out of a call's object. Raises: ToolError."""
    value = arguments.get(spec.argument)
    if not isinstance(value, str) or set(arguments) != {spec.argument}:
        given = ", ".join(arguments) or "none"
        raise ToolError(f'{spec.name} needs one argument, the text "{spec.argument}"; given: {given}')
    return value
