"""Rewards for programs: run the tests of a problem on the code of a reply, in a sandbox, and pay for what came out.

What decides is never in the tested code's hands (code_judge.py): outputs and results are compared here, asserts are evaluated in a process
that never runs that code, and expected results never enter its process. So ending early, printing the expected words, a lying __eq__,
patched builtins, exit functions or a rewritten file all end as failed tests. What remains possible: docs/recipes/code.md.
"""

from __future__ import annotations

import ast
import builtins
import math
import secrets
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from pydantic import Field

from ptlab.errors import EnvError, InvalidRequestError
from ptlab.rewards import code_values
from ptlab.rewards.code_outputs import same_output, same_value
from ptlab.rewards.code_text import extract_code
from ptlab.sandbox import Limits, Program, RunOutcome, Sandbox
from ptlab.section import Section

__all__ = [
    "AssertTests", "CallTests", "CodeGrade", "CodeRewardConfig", "CodeTestConfig", "CodeTests", "StdinTests",
    "assert_tests", "check_function_tests", "code_reward", "extract_code", "run_tests",
]  # fmt: skip

RECORD = "__record__"
FILES_BYTES = 16 * 2**20
"""What a program may write, besides its input."""
START_S = 2.0
"""For the sandbox itself, on top of what the tests may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StdinTests:
    """A program that reads an input and prints its answer."""

    inputs_N: Sequence[str]
    outputs_N: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallTests:
    """A function, or method of class Solution, with arguments and results that JSON can hold."""

    fn_name: str
    args_N: Sequence[Sequence[Any]]
    results_N: Sequence[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class AssertTests:
    """Python statements that fail by raising. Made by `assert_tests` or `check_function_tests`."""

    setup: str
    """Run first, without the tested code: imports and helpers of the problem."""
    names: Sequence[str]
    """Names that stand for functions of the tested code."""
    sources_N: Sequence[str]
    parts_N: Sequence[int]
    """Asserts within each that are counted one by one; 0 = it counts as one test."""


CodeTests = StdinTests | CallTests | AssertTests


class CodeTestConfig(Section):
    """How the tests of one attempt are run."""

    max_tests: int = Field(default=15, ge=1)
    """Most tests per attempt; of more, so many are drawn anew for each problem and step."""
    seconds_per_test: float = Field(default=6.0, gt=0)
    """Wall clock of one test (and of loading the program). After a test that takes longer the rest is not run."""
    seconds_total: float = Field(default=30.0, gt=0)
    """Wall clock of all tests of one attempt."""
    memory_bytes: int = Field(default=512 * 2**20, ge=64 * 2**20)
    """Address space of each process."""
    output_bytes: int = Field(default=2**20, ge=1)
    """Most output of one test, and longest result of a call."""
    max_processes: int = Field(default=16, ge=4)
    """Processes and threads at once; two are the judge's and the program's own."""


class CodeRewardConfig(Section):
    """What an attempt is paid: all_passed if every test passed; no_program if there is no program or it does not compile; else
    syntax + tests x share of tests passed, + crash (once) if any test ended in an error or ran out of time."""

    syntax: float = 0.2
    """The program compiles."""
    tests: float = 0.6
    """Times the share of tests that passed."""
    all_passed: float = 1.0
    """Instead of all other terms."""
    crash: float = -0.5
    """A test raised, the program died, or time or output ran over."""
    no_program: float = -0.5
    """Must not lie above syntax + crash, or failing to write a program is taught."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeGrade:
    """What came of one attempt."""

    compiled: bool = False
    num_passed: int = 0
    num_tests: int
    """All that were to be run, also those that were not after the first that ran out of time."""
    error: bool = False
    """A test raised, or the program died."""
    timeout: bool = False
    message: str = ""
    """What went wrong first, for people; by the program's own words where it raised."""

    @property
    def share(self) -> float:
        """Passed tests of all, 0 .. 1."""
        return self.num_passed / self.num_tests

    @property
    def all_passed(self) -> bool:
        return self.compiled and self.num_passed == self.num_tests


def code_reward(grade: CodeGrade | None, terms: CodeRewardConfig) -> float:
    """See CodeRewardConfig. None: there was no program in the reply."""
    if grade is None or not grade.compiled:
        return terms.no_program
    if grade.all_passed:
        return terms.all_passed
    return terms.syntax + terms.tests * grade.share + (terms.crash if grade.error or grade.timeout else 0.0)


def assert_tests(asserts: Sequence[str], *, setup: str = "", reference: str = "") -> AssertTests:
    """Statements as MBPP has them (`assert f(1) == 2`), each a test. Every name that is neither a builtin nor made by `setup` or the
    statements themselves is taken for a function of the tested code.

    Args:
        reference: code that passes. What it defines is tested even where it has a builtin's name (MBPP has such a `sum`); what it imports
            the asserts may use.

    Raises: InvalidRequestError if something is not Python, or no name is left to test.
    """
    trees = [_parsed(source, "assert") for source in asserts]
    body = _parsed(reference, "reference").body
    defined = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    setup += "".join(f"\n{ast.unparse(node)}" for node in body if isinstance(node, ast.Import | ast.ImportFrom))
    known = (set(dir(builtins)) | _made_names(_parsed(setup, "setup"))) - defined
    names = sorted({name for tree in trees for name in _used_names(tree) - _made_names(tree) - known})
    if not names:
        raise InvalidRequestError(f"asserts {list(asserts)!r}: they use no function of the tested program")
    return AssertTests(setup=setup, names=names, sources_N=list(asserts), parts_N=[0] * len(asserts))


def check_function_tests(test: str, *, setup: str, entry_point: str) -> AssertTests:
    """HumanEval's form: `test` defines check(candidate), whose asserts are counted one by one. An assert of a constant is dropped.

    Args:
        setup: the problem's own code (imports, helpers, a stub of the function); its helpers may be used by the tests.
    Raises: InvalidRequestError if that is not what it defines.
    """
    tree = _parsed(test, "test")
    _parsed(setup, "prompt")
    if not any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in tree.body):
        raise InvalidRequestError(f"test of {entry_point}: it defines no function check(candidate)")
    counted = _AssertsToRecords()
    source = ast.unparse(ast.fix_missing_locations(counted.visit(tree)))
    if not counted.number:
        raise InvalidRequestError(f"test of {entry_point}: check has no assert that could fail")
    return AssertTests(
        setup=setup, names=[entry_point], sources_N=[f"{source}\ncheck({entry_point})\n"], parts_N=[counted.number]
    )  # fmt: skip


async def run_tests(
    code: str, tests: CodeTests, sandbox: Sandbox, settings: CodeTestConfig, *, starter: str = "", preamble: str = "", seed: int = 0
) -> CodeGrade:
    """Run the code's tests, at most settings.max_tests of them, in one sandboxed run.

    Args:
        starter: code that the problem gives: put before the code if both together compile (so imports and helpers are kept, and a reply
            that only goes on from it is complete), else left out.
        preamble: imports put before everything.
        seed: which tests are drawn where there are too many.

    Raises: SandboxError if the sandbox failed; EnvError if the problem's own tests cannot be run at all.
    """
    drawn = _drawn(tests, settings.max_tests, seed)
    sources = [f"{starter}\n\n{code}", code, f"{starter}{code}"] if starter else [code]
    word = secrets.token_hex(16)
    program = _program([preamble + source for source in sources], drawn, settings, word)
    outcome = await sandbox.run(program)
    return _grade(outcome, drawn, word)


def _judge_source() -> str:
    """Both files of the judge as one text; what one imports of the other is already there."""
    values, judge = ((Path(__file__).parent / name).read_text(encoding="utf-8") for name in ("code_values.py", "code_judge.py"))
    lines = [line for line in judge.splitlines() if not line.startswith(("from __future__", "from ptlab."))]
    return values + "\n".join(lines) + "\n_main()\n"


JUDGE_SOURCE = _judge_source()


def _program(sources: Sequence[str], tests: CodeTests, settings: CodeTestConfig, word: str) -> Program:
    about = {
        "mode": {StdinTests: "stdin", CallTests: "calls", AssertTests: "asserts"}[type(tests)],
        "sources": list(sources),
        "call_s": settings.seconds_per_test,
        "total_s": settings.seconds_total,
        "output_bytes": settings.output_bytes,
    }
    match tests:
        case StdinTests():
            secret: dict[str, Any] = {"tests": list(tests.inputs_N)}
            num_tests = len(tests.inputs_N)
        case CallTests():
            secret = {"tests": [[tests.fn_name, list(args)] for args in tests.args_N]}
            num_tests = len(tests.args_N)
        case AssertTests():
            secret = {"tests": list(tests.sources_N), "setup": tests.setup, "names": list(tests.names)}
            num_tests = len(tests.sources_N)
    longest_input = max(map(len, tests.inputs_N)) if isinstance(tests, StdinTests) else 0
    try:
        stdin = b"".join(code_values.frame(code_values.encode(part)) for part in (about, {**secret, "word": word}))
    except ValueError as err:
        raise EnvError(f"tests of a problem: {err}; they cannot be sent to the sandbox, drop the problem") from err
    return Program(
        source=JUDGE_SOURCE,
        trusted=True,
        stdin=stdin,
        limits=Limits(
            cpu_s=math.ceil(settings.seconds_total),
            wall_s=settings.seconds_total + START_S,
            memory_bytes=settings.memory_bytes,
            output_bytes=num_tests * (6 * settings.output_bytes + 4096),  # escaped, a byte that is no UTF-8 takes six
            file_size_bytes=FILES_BYTES + 4 * longest_input,
            max_processes=settings.max_processes,
        ),
    )


def _grade(outcome: RunOutcome, tests: CodeTests, word: str) -> CodeGrade:
    """Put the judge's lines together. What is missing from them failed."""
    parts_N = tests.parts_N if isinstance(tests, AssertTests) else [0] * len(_first_of(tests))
    total = sum(max(parts, 1) for parts in parts_N)
    grade = CodeGrade(
        num_tests=total, timeout=outcome.status == "timeout", message=f"the judge ended: {outcome.status} {outcome.stderr[-300:]}"
    )
    lines = [said for line in outcome.stdout.splitlines() if (said := _line(line, word)) is not None]
    seen: set[int] = set()
    for said in lines:
        match said:
            case ["compiled", problem]:
                grade = replace(grade, compiled=problem is None, message=str(problem or ""))
            case ["loaded", problem]:
                grade = replace(grade, message=grade.message or str(problem or ""))
            case ["broken", why]:
                raise EnvError(f"the problem's own tests cannot be run: {why}; drop the problem")
            case ["test", int(number), str(result), value] if number in range(len(parts_N)) and number not in seen:
                seen.add(number)
                passed, total_here, why = _verdict(tests, number, result, value)
                grade = replace(
                    grade,
                    num_passed=grade.num_passed + passed,
                    num_tests=grade.num_tests + max(0, total_here - max(parts_N[number], 1)),
                    error=grade.error or result in ("raised", "output_limit") or result.startswith("died"),
                    timeout=grade.timeout or result == "timeout",
                    message=grade.message or why,
                )
    if grade.compiled and len(seen) < len(parts_N) and not grade.timeout:
        grade = replace(grade, error=True, message=grade.message or "the program ended before its last test")
    return grade


def _verdict(tests: CodeTests, number: int, result: str, value: Any) -> tuple[int, int, str]:
    """(tests passed, tests there were, what went wrong)"""
    match tests, value:
        case StdinTests(), [str(output), why]:
            right = result == "returned" and same_output(output, tests.outputs_N[number])
            return int(right), 1, "" if right else f"test {number}: {why or result if result != 'returned' else 'wrong output'}"
        case CallTests(), _:
            right = result == "returned" and same_value(value, tests.results_N[number])
            said = "wrong result" if result == "returned" else f"{result}: {value}" if result == "raised" else result
            return int(right), 1, "" if right else f"test {number}: {said}"
        case AssertTests(), [int(right_parts), int(recorded), *why] if tests.parts_N[number]:
            whole = result == "passed" and right_parts == recorded
            # An assert in a loop is recorded many times. One that was never reached, or an end before the last, is not a pass.
            total = max(recorded + (result != "passed"), tests.parts_N[number], 1)
            return (
                (total if whole and recorded else min(right_parts, total - 1)),
                total,
                "" if whole else f"{result}: {(why or [''])[0] or ''}",
            )
        case AssertTests(), [_, _, *why]:
            return int(result == "passed"), 1, "" if result == "passed" else f"test {number}: {(why or [''])[0] or result}"
    return 0, 1, f"test {number}: {result}"


def _line(line: str, word: str) -> list[Any] | None:
    """One line of the judge, without its word; None for anything else."""
    try:
        said = code_values.decode(line.encode("ascii").decode("unicode_escape"))
    except (ValueError, RecursionError):
        return None
    return said[1:] if isinstance(said, list) and said and said[0] == word else None


def _drawn(tests: CodeTests, most: int, seed: int) -> CodeTests:
    """At most so many of the tests, in their order."""
    number = len(_first_of(tests))
    if not number:
        raise InvalidRequestError("code tests: there are none; drop the problem")
    chosen = range(number) if number <= most else sorted(Random(seed).sample(range(number), most))
    match tests:
        case StdinTests():
            return replace(tests, inputs_N=[tests.inputs_N[i] for i in chosen], outputs_N=[tests.outputs_N[i] for i in chosen])
        case CallTests():
            return replace(tests, args_N=[tests.args_N[i] for i in chosen], results_N=[tests.results_N[i] for i in chosen])
        case AssertTests():
            return replace(tests, sources_N=[tests.sources_N[i] for i in chosen], parts_N=[tests.parts_N[i] for i in chosen])


def _first_of(tests: CodeTests) -> Sequence[Any]:
    match tests:
        case StdinTests():
            return tests.inputs_N
        case CallTests():
            return tests.args_N
        case AssertTests():
            return tests.sources_N


def _parsed(source: str, what: str) -> ast.Module:
    """Of the data set's own code, which is trusted as far as its form goes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # their escape sequences are not our users' affair
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as err:
        raise InvalidRequestError(f"{what} is not Python: {err}: {source[:200]!r}") from err


def _used_names(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def _made_names(tree: ast.AST) -> set[str]:
    """Names that this code binds anywhere: assigned, imported, defined, arguments."""
    made: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                made.add(name)
            case ast.alias(name=name, asname=other):
                made.add((other or name).partition(".")[0])
    return made


class _AssertsToRecords(ast.NodeTransformer):
    """`assert X` becomes `__record__(lambda: X)`."""

    def __init__(self) -> None:
        self.number = 0

    def visit_Assert(self, node: ast.Assert) -> ast.stmt:
        if isinstance(node.test, ast.Constant):
            return ast.Pass()
        self.number += 1
        nothing = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
        call = ast.Call(func=ast.Name(id=RECORD, ctx=ast.Load()), args=[ast.Lambda(args=nothing, body=node.test)], keywords=[])
        return ast.Expr(call)
