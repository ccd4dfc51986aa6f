"""The tools themselves, and their announcement."""

from __future__ import annotations

import asyncio
import json
import time
from fractions import Fraction
from pathlib import Path

import pytest

from ptlab.envs.tools import Calculator, PythonTool, ToolError, argument_of, clipped, decimal_text, tools_prompt
from ptlab.sandbox import Program, RunOutcome

TOKENIZER = Path(__file__).parents[3] / "shared" / "data" / "tokenizers" / "qwen3"


def calculate(expression: str) -> str:
    return asyncio.run(Calculator().call(expression))


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("47*38", "1786"),
        ("(17*23-4)/5", "77.4"),
        ("1/8", "0.125"),
        ("-1/8", "-0.125"),
        ("1/3", "0.333333333333"),
        ("2^10", "1024"),
        ("2**0.5", "1.41421356237"),
        ("sqrt(16)", "4"),
        ("3(4)", "12"),
        ("1,000 * 3", "3000"),
        ("5!", "120"),
        ("17 mod 5", None),
        ("pi", "3.14159265359"),
        ("2^200", str(2**200)),
        ("10^300", None),
        ("1/0", None),
        ("x+1", None),
        ("__import__('os').system('true')", None),
        ("9^9^9^9", None),
        ("", None),
        ("1" * 3000, None),
        ("(" * 500, None),
        ("sqrt(-1)", None),
    ],
)
def test_the_calculator_calculates_or_says_why_not(expression, result):
    started = time.process_time()
    if result is None:
        with pytest.raises(ToolError, match=r"^(cannot read the expression|no value|the expression has|the result has)"):
            calculate(expression)
    else:
        assert calculate(expression) == result
    assert time.process_time() - started < 2


def test_decimals_are_exact_where_they_end():
    for text in ("0", "7", "-7", "0.5", "-0.05", "12.000001", "100", "0.000000000001"):
        assert decimal_text(Fraction(text)) == text


class OneOutcome:
    """A sandbox whose programs all end the same way."""

    def __init__(self, **outcome) -> None:
        self.outcome = RunOutcome(
            **({"status": "ok", "stdout": "", "stderr": "", "exit_code": 0, "signal": None, "seconds": 0.1} | outcome)
        )
        self.programs: list[Program] = []

    async def run(self, program: Program) -> RunOutcome:
        self.programs.append(program)
        return self.outcome


def python(**outcome) -> str:
    return asyncio.run(PythonTool(OneOutcome(**outcome), max_chars=40).call("print(1)"))


def test_a_program_answers_with_what_it_prints():
    assert python(stdout="12\n13\n") == "12\n13"
    assert python() == "(nothing was printed)"
    long = python(stdout="a" * 500 + "b" * 500)
    assert long.startswith("a" * 20 + "\n... 960 characters left out") and long.endswith("b" * 20)


@pytest.mark.parametrize(
    ("outcome", "says"),
    [
        ({"status": "error", "stdout": "so far", "stderr": "Traceback ...\nValueError: no"}, "so far\nTraceback ...\nValueError: no"),
        ({"status": "timeout"}, "the program ended with timeout"),
        ({"status": "output_limit", "stdout": "x"}, "x\nthe program ended with output limit"),
        ({"status": "memory", "stderr": "secret of the host"}, "the program ended with memory"),
    ],
)
def test_a_program_that_fails_is_an_error_for_the_model(outcome, says):
    with pytest.raises(ToolError) as caught:
        python(**outcome)
    assert str(caught.value) == says


def test_clipped_keeps_short_texts_and_both_ends_of_long_ones():
    assert clipped("abc", 3) == "abc"
    assert clipped("abcd", 3) == "a\n... 2 characters left out ...\nd"


@pytest.mark.parametrize("arguments", [{}, {"expression": 5}, {"expression": "1", "more": "2"}, {"code": "1"}])
def test_other_arguments_are_an_error_for_the_model(arguments):
    with pytest.raises(ToolError, match=r'^calculator needs one argument, the text "expression"; given: '):
        argument_of(Calculator.spec, arguments)
    assert argument_of(Calculator.spec, {"expression": "1+1"}) == "1+1"


def test_the_announcement_is_the_templates():
    if not TOKENIZER.exists():
        pytest.skip(f"{TOKENIZER} is absent: the real tokenizer is not part of the project")
    from transformers import AutoTokenizer

    from ptlab.renderers import get_renderer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    specs = [Calculator.spec, PythonTool.spec]
    question = [{"role": "user", "content": "What is 2+2?"}]
    for system in ("", "Be brief."):
        given = [{"role": "system", "content": system}, *question] if system else question
        theirs = tokenizer.apply_chat_template(given, tools=[spec.to_json() for spec in specs], tokenize=False, add_generation_prompt=True)
        ours = [{"role": "system", "content": tools_prompt(specs, system=system)}, *question]
        prompt = get_renderer("qwen3_instruct", tokenizer).build_generation_prompt(ours)
        assert tokenizer.decode(prompt.to_ints()) == theirs
    assert json.loads(theirs.split("<tools>\n")[1].split("\n")[0])["function"]["name"] == "calculator"
