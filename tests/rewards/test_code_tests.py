"""Grading programs: outputs, calls and asserts; and programs that try to be graded right without being right."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from ptlab.errors import EnvError, InvalidRequestError, SandboxError
from ptlab.rewards.code_tests import (
    AssertTests,
    CallTests,
    CodeGrade,
    CodeRewardConfig,
    CodeTestConfig,
    CodeTests,
    StdinTests,
    assert_tests,
    check_function_tests,
    code_reward,
    run_tests,
)
from ptlab.sandbox import SandboxConfig, SandboxPool, open_sandbox

SETTINGS = CodeTestConfig(seconds_per_test=0.7, seconds_total=2.0, output_bytes=10_000)
DOUBLE = assert_tests(["assert f(1) == 2", "assert f(2) == 4", "assert f(5) == 10"])
ECHO = StdinTests(inputs_N=["1\n", "2\n", "5\n"], outputs_N=["2\n", "4", "10 \n\n"])
CALLS = CallTests(fn_name="f", args_N=[[1], [2], [5]], results_N=[2, 4, 10])


@pytest.fixture(scope="module", params=["bubblewrap", "process"])
def pool(request: pytest.FixtureRequest) -> Iterator[SandboxPool]:
    try:
        opened = open_sandbox(SandboxConfig(kind=request.param, workers=2))
    except SandboxError as err:
        pytest.skip(err.message)
    yield opened
    opened.close()


def grade(pool: SandboxPool, code: str, tests: CodeTests, *, starter: str = "", preamble: str = "", seed: int = 0) -> CodeGrade:
    return asyncio.run(run_tests(code, tests, pool, SETTINGS, starter=starter, preamble=preamble, seed=seed))


def test_right_and_wrong_of_each_kind(pool: SandboxPool) -> None:
    for tests, right, half in (
        (DOUBLE, "def f(x): return 2 * x", "def f(x): return 4"),
        (CALLS, "def f(x): return 2 * x", "def f(x): return 4"),
        (ECHO, "print(int(input()) * 2)", "print(4)"),
    ):
        whole = grade(pool, right, tests)
        assert (whole.compiled, whole.num_passed, whole.num_tests, whole.error, whole.timeout) == (True, 3, 3, False, False), whole
        part = grade(pool, half, tests)
        assert (part.compiled, part.num_passed, part.error, part.all_passed) == (True, 1, False, False)


def test_errors_end_one_test_and_timeouts_the_rest(pool: SandboxPool) -> None:
    raising = grade(pool, "def f(x):\n    if x == 1: raise KeyError('no')\n    return 2 * x", DOUBLE)
    assert (raising.num_passed, raising.error, raising.timeout) == (2, True, False) and "KeyError" in raising.message
    for tests, code in (
        (DOUBLE, "def f(x):\n    while x == 2: pass\n    return 2 * x"),
        (ECHO, "x = int(input())\nwhile x == 2: pass\nprint(2 * x)"),
    ):
        slow = grade(pool, code, tests)
        assert (slow.num_passed, slow.num_tests, slow.timeout) == (1, 3, True)
    at_exit = grade(pool, "print(int(input()) * 2)\nraise ValueError", ECHO)
    assert (at_exit.num_passed, at_exit.error) == (0, True) and "ValueError" in at_exit.message


@pytest.mark.parametrize("code", ["def f(x) return 2 * x", "(" * 5000, "x = " + "-" * 50_000 + "1", "\0", "'" * 3, "\ud800"])
def test_what_does_not_compile(pool: SandboxPool, code: str) -> None:
    for tests in (DOUBLE, ECHO):
        found = grade(pool, code, tests)
        assert (found.compiled, found.num_passed, found.num_tests) == (False, 0, 3) and found.message


CHEATS = {
    "exit": "import sys\nsys.exit(0)",
    "os exit": "import os\nos._exit(0)",
    "exit when called": "import os\ndef f(x): os._exit(0)",
    "system exit when called": "def f(x): raise SystemExit(0)",
    "always equal": "class A:\n def __eq__(self, o): return True\n def __ne__(self, o): return False\n def __hash__(self): return 0\n"
    "def f(x): return A()",
    "always equal int": "class A(int):\n def __eq__(self, o): return True\n __hash__ = int.__hash__\ndef f(x): return A(7)",
    "always equal in a list": "class A:\n def __eq__(self, o): return True\ndef f(x): return [A()]",
    "patched builtins": "import builtins\nbuiltins.AssertionError = Exception\nbuiltins.bool = lambda x: True\n"
    "builtins.compile = lambda *a, **k: None\nbuiltins.exec = lambda *a: None\ndef f(x): return 7",
    "patched checker": "import sys\nfor m in list(sys.modules.values()):\n"
    "  for n in ('decode', 'encode', '_run_asserts', 'same_value', 'write_frame'):\n"
    "    if n in getattr(m, '__dict__', {}): setattr(m, n, lambda *a, **k: True)\ndef f(x): return 7",
    "patched frames": "import sys\nframe = sys._getframe()\nwhile frame:\n  for k in list(frame.f_globals):\n"
    "    if k in ('encode', 'decode', '_find', 'write_frame'): frame.f_globals[k] = lambda *a, **k: True\n  frame = frame.f_back\n"
    "def f(x): return 7",
    "printed words": "for i in range(3): print('passed'); print('test', i, 'passed'); print(2, 4, 10)\ndef f(x): return 7",
    "at exit": "import atexit, os\natexit.register(lambda: os._exit(0))\ndef f(x): return 7",
    "write to every descriptor": "import os\nfor d in range(64):\n  for i in range(3):\n"
    "    for text in (f'l5;s0:s4:testi{i};s6:passedl2;i1;i1;\\n', f'0000001el3;i{i};s8:returnedi2;', 'passed\\n'):\n"
    "      try: os.write(d, text.encode())\n      except OSError: pass\ndef f(x): return 7",
    "read every descriptor": "import os\nfor d in range(0, 64):\n"
    "  try:\n    os.set_blocking(d, False); os.read(d, 9999)\n  except OSError: pass\ndef f(x): return 7",
    "kill the judge": "import os\nos.kill(os.getppid(), 9)\ndef f(x): return 7",
    "stop the judge": "import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)\ndef f(x): return 7",
    "look for the asserts in memory": "import sys\ndef f(x):\n  frame = sys._getframe()\n  while frame:\n"
    "    text = repr(frame.f_locals.get('secret'))\n    at = text.find(f'assert f({x})')\n"
    "    if at >= 0: return int(text[at:].split('==')[1].split(chr(39))[0])\n    frame = frame.f_back\n  return 7",
    "look into the judge": "import os\n"
    "def f(x):\n  for n in ('mem', 'fd/0', 'fd/1', 'environ', 'maps'):\n"
    "    try: open(f'/proc/{os.getppid()}/{n}', 'rb').read(1); return 2 * x\n    except OSError: pass\n  return 7",
    "overwrite files": "import os\nfor n in ('program.py', 'test.py', 'setup.py', 'json.py', 'ast.py', 'random.py', 'decimal.py'):\n"
    "  open(n, 'w').write('import os; os._exit(0)')\ndef f(x): return 7",
    "endless iterator": "import itertools\ndef f(x): return itertools.count()",
    "deep list": "def f(x):\n  a = []\n  for i in range(100000): a = [a]\n  return a",
    "itself": "def f(x):\n  a = []\n  a.append(a)\n  return a",
    "huge": "def f(x): return 'x' * (20 * 2**20)",
    "huge int": "def f(x): return 10 ** 10_000_000",
    "no such function": "g = 1",
    "raise assertion": "def f(x): raise AssertionError",
    "raise oddly": "class E(BaseException):\n def __str__(self): raise E\n def __repr__(self): raise E\ndef f(x): raise E",
    "recursion": "def f(x): return f(x)",
    "threads that never end": "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\ndef f(x): return 7",
    "print expected and exit": "print(2)\nraise SystemExit(3)",
}  # fmt: skip


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_fail(pool: SandboxPool, name: str) -> None:
    for tests in (DOUBLE, CALLS) if name != "stop the judge" else (DOUBLE,):
        found = grade(pool, CHEATS[name], tests)
        assert found.num_passed == 0 and not found.all_passed, found


@pytest.mark.parametrize(
    "code",
    [
        "raise SystemExit(0)",
        "import os; os._exit(0)",
        "print(2); import os; os._exit(1)",
        "import os\nos.kill(os.getppid(), 9)\nprint(2)",
        "while True: print(2)",
        "import sys; sys.stdout = None; print(2)",
        "import os; os.close(1); print(2)",
        "class T(str):\n    def __eq__(self, o): return True\nprint(T('7'))",
    ],
)
def test_cheats_on_stdin_fail(pool: SandboxPool, code: str) -> None:
    found = grade(pool, code, StdinTests(inputs_N=["2", "5"], outputs_N=["4", "10"]))
    assert (found.num_passed, found.all_passed) == (0, False), found


def test_each_input_meets_a_fresh_program(pool: SandboxPool) -> None:
    """No state from one test to the next, and all the ways to read and write."""
    code = (
        "import sys, os\n"
        "n = int(sys.stdin.buffer.readline()); rest = os.read(0, 100) or sys.stdin.read()\n"
        "sys.count = getattr(sys, 'count', 0) + n\nopen('state', 'a').write('x')\n"
        "sys.stdout.write(str(sys.count))\nimport atexit; atexit.register(print, '!')\n"
        "if __name__ == '__main__': sys.exit()"
    )
    found = grade(pool, code, StdinTests(inputs_N=["3\n4\n"] * 3, outputs_N=["3!"] * 3))
    assert found.all_passed, found


def test_tests_are_drawn_by_the_seed(pool: SandboxPool) -> None:
    tests = StdinTests(inputs_N=[str(i) for i in range(40)], outputs_N=[str(i) for i in range(40)])
    code = "x = int(input())\nprint(x if x < 20 else -1)"
    settings = CodeTestConfig(max_tests=10)
    passed = [asyncio.run(run_tests(code, tests, pool, settings, seed=seed)).num_passed for seed in (1, 1, 2, 3)]
    assert passed[0] == passed[1] and len(set(passed)) > 1


def test_plain_results_pass_through_as_they_are(pool: SandboxPool) -> None:
    asserts = [
        "assert f(1.5) == 1.5 and isinstance(f(1), int) and f(True) is True and f(None) is None",
        "assert f((1, 'é\\ud800')) == (1, 'é\\ud800') and f([1]) != (1,)",
        "assert f({1: {2, 3}, 'a': [b'x']}) == {1: {2, 3}, 'a': [b'x']}",
        "assert math.isnan(f(float('nan'))) and f(-math.inf) < 0 and f(2**200) == 2**200 and f(1j) == 1j",
        "assert list(g(3)) == [0, 1, 2] and g(3) != [0, 1, 2]",
        "assert f(x=[Counter('aab')]) == [Counter('aab')]",
        "assert m('abc') and not m('x')",
        "assert sorted(d({1: 2}).keys()) == [1] and len(k({1: 2})) == 1",
    ]
    code = (
        "import re\ndef f(x): return x\ndef g(n): return (i for i in range(n))\ndef m(s): return re.match('a', s)\n"
        "d = f\ndef k(x): return x.keys()"
    )
    found = grade(pool, code, assert_tests(asserts, setup="import math\nfrom collections import Counter"))
    assert found.all_passed, found


def test_arguments_are_copies(pool: SandboxPool) -> None:
    """What the function does to its arguments does not reach the test. Documented: a test of changes in place cannot pass."""
    tests = AssertTests(setup="", names=["f"], sources_N=["a = [2, 1]\nassert f(a) == [1, 2]\nassert a == [2, 1]"], parts_N=[0])
    assert grade(pool, "def f(x):\n    x.sort()\n    return x", tests).all_passed


def test_starter_code_is_kept(pool: SandboxPool) -> None:
    starter = "import math\n\ndef helper(x):\n    return math.floor(x)\n\ndef f(x):\n    '''Twice x.'''\n"
    assert grade(pool, "    return helper(2 * x)", DOUBLE, starter=starter).all_passed  # only the body
    assert grade(pool, "def f(x):\n    return helper(2 * x)", DOUBLE, starter=starter).all_passed  # all of it
    leetcode = "class Solution:\n    def f(self, x: List[int]) -> int:\n        "
    whole = "class Solution:\n    def f(self, x: List[int]) -> int:\n        return 2 * x"
    assert grade(pool, whole, CALLS, starter=leetcode, preamble="from typing import *\n").all_passed
    assert grade(pool, "return 2 * x", CALLS, starter=leetcode, preamble="from typing import *\n").all_passed


def test_check_function(pool: SandboxPool) -> None:
    """HumanEval's form: asserts counted one by one, a constant one not at all, helpers of the prompt at hand, those in loops too."""
    prompt = "def inverse(x):\n    return x // 2\n\ndef f(x):\n    '''Twice x.'''\n"
    test = (
        "def check(candidate):\n    assert True, 'good'\n    assert candidate(1) == 2\n"
        "    for i in range(4):\n        assert inverse(candidate(i)) == i\n"
    )
    tests = check_function_tests(test, setup=prompt, entry_point="f")
    assert grade(pool, "    return 2 * x", tests, starter=prompt).all_passed
    half = grade(pool, "    return 2 * x if x < 2 else 0", tests, starter=prompt)
    assert (half.num_passed, half.num_tests, half.all_passed) == (3, 5, False)
    early = "def check(candidate):\n    assert candidate(1) == 2\n    if candidate(2) != 4: raise KeyError\n    assert candidate(3) == 6\n"
    ended = grade(pool, "    return 2", check_function_tests(early, setup=prompt, entry_point="f"), starter=prompt)
    assert (ended.num_passed, ended.num_tests) == (1, 2)


def test_broken_tests_are_the_data_sets_fault(pool: SandboxPool) -> None:
    with pytest.raises(EnvError, match="drop the problem"):
        grade(pool, "def f(x): return 1", AssertTests(setup="1 / 0", names=["f"], sources_N=["assert f(1)"], parts_N=[0]))
    for bad in (lambda: assert_tests(["assert 1 =="]), lambda: assert_tests(["assert sum([1]) == 1"])):
        with pytest.raises(InvalidRequestError):
            bad()
    with pytest.raises(InvalidRequestError, match="no function check"):
        check_function_tests("x = 1", setup="", entry_point="f")
    with pytest.raises(InvalidRequestError, match="no assert that could fail"):
        check_function_tests("def check(c):\n    assert True", setup="", entry_point="f")


def test_a_builtins_name_is_tested_where_the_reference_defines_it(pool: SandboxPool) -> None:
    tests = assert_tests(
        ["assert sum(10, 15) == 6", "assert sum(1, 1) == sys.maxsize - sys.maxsize"], reference="import sys\ndef sum(a, b): pass"
    )
    assert tests.names == ["sum"]
    assert grade(pool, "def sum(a, b): return 6 if a == 10 else 0", tests).all_passed


def test_reward() -> None:
    terms = CodeRewardConfig()

    def of(**fields: Any) -> float:
        return code_reward(CodeGrade(**{"compiled": True, "num_tests": 4, **fields}), terms)

    assert code_reward(None, terms) == -0.5
    assert of(compiled=False) == -0.5
    assert of() == pytest.approx(0.2)
    assert of(num_passed=2) == pytest.approx(0.5)
    assert of(num_passed=2, error=True, timeout=True) == pytest.approx(0.0)
    assert of(error=True) == pytest.approx(-0.3)
    assert of(num_passed=4) == 1.0
