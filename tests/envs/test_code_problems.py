"""Rows of each form as problems, and attempts at them: what is shown, what is paid, what is the same again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ptlab.envs.code_data import CodeProblem, UnusableRow, problem_of, problems_of, show
from ptlab.envs.code_problems import CodeConfig, CodeEnv, CodeGrading
from ptlab.envs.env_section import TaskSetting
from ptlab.envs.message_env import EnvFromMessageEnv, MessageStep
from ptlab.errors import ConfigError
from ptlab.rewards.code_tests import AssertTests, CallTests, CodeRewardConfig, CodeTestConfig, StdinTests
from ptlab.sandbox import Program, RunOutcome, SandboxConfig

MBPP = {
    "prompt": "Write a function to double.",
    "code": "def twice(x): return 2 * x",
    "test_imports": [],
    "test_list": ["assert twice(2) == 4"],
}
HUMANEVAL = {
    "prompt": "def twice(x):\n    '''Double.'''\n",
    "entry_point": "twice",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
    "canonical_solution": "    return 2 * x\n",
}


class NoSandbox:
    """Counts the programs it is given; each ends the judge at once."""

    def __init__(self) -> None:
        self.programs: list[Program] = []

    async def run(self, program: Program) -> RunOutcome:
        self.programs.append(program)
        return RunOutcome(status="killed", stdout="", stderr="", exit_code=None, signal=9, seconds=0.0)


def step(problem: CodeProblem, reply: str, *, cut_off: bool = False, coin_seed: int | None = None, sandbox: Any = None) -> MessageStep:
    grading = CodeGrading(sandbox=sandbox or NoSandbox(), tests=CodeTestConfig(), terms=CodeRewardConfig(), instructions=True)
    env = CodeEnv(problem, grading, test_seed=1, coin_seed=coin_seed)
    message: Any = {"role": "assistant", "content": reply}
    return asyncio.run(env.step_cut_off(message) if cut_off else env.step(message))


@pytest.mark.parametrize(
    ("row", "inputs", "outputs"),
    [
        ({"problem": "p", "tests": '{"inputs": ["1\\n2"], "outputs": ["3"]}'}, ["1\n2"], ["3"]),  # TACO as the hub stores it
        ({"question": "p", "input_output": {"inputs": [["1", "2"]], "outputs": [["3"]]}}, ["1\n2"], ["3"]),  # lists of lines
        ({"problem": "p", "tests": '[{"input": "1", "output": "2"}, {"input": "3", "output": "4"}]'}, ["1", "3"], ["2", "4"]),  # Codeforces
        (
            {
                "prompt": "p",
                "verification_info": {"test_cases": '[{"type": "stdin_stdout", "fn_name": null, "input": "1", "output": "2"}]'},
            },
            ["1"],
            ["2"],
        ),  # PrimeIntellect
        (
            {"question_content": "p", "public_test_cases": '[{"input": "1", "output": "2", "testtype": "stdin"}]', "starter_code": ""},
            ["1"],
            ["2"],
        ),
    ],
)
def test_stdin_forms(row: dict[str, Any], inputs: list[str], outputs: list[str]) -> None:
    tests = problem_of("here", row).tests
    assert isinstance(tests, StdinTests) and (list(tests.inputs_N), list(tests.outputs_N)) == (inputs, outputs)


def test_call_forms() -> None:
    live = {
        "question_content": "Sum.",
        "starter_code": "class Solution:\n    def total(self, a: List[int], b: str) -> int:\n        ",
        "metadata": '{"func_name": "total"}',
        "public_test_cases": json.dumps([{"input": '[1, 2]\n"x"', "output": "3", "testtype": "functional"}]),
    }
    problem = problem_of("here", live)
    assert problem.tests == CallTests(fn_name="total", args_N=[[[1, 2], "x"]], results_N=[3])
    assert "from typing import *" in problem.preamble and live["starter_code"].strip() in show(problem, instructions=True)
    taco = problem_of("here", {"problem": "p", "tests": {"fn_name": "f", "inputs": [[1, [2]]], "outputs": [[3]]}})
    assert taco.tests == CallTests(fn_name="f", args_N=[[1, [2]]], results_N=[[3]]) and not taco.preamble
    assert "function f" in show(taco, instructions=True)


def test_assert_forms_and_what_is_shown() -> None:
    mbpp, human = problem_of("m", MBPP), problem_of("h", HUMANEVAL)
    assert isinstance(mbpp.tests, AssertTests) and mbpp.tests.names == ["twice"]
    assert show(mbpp, instructions=False) == "Write a function to double."
    assert "assert twice(2) == 4" in show(mbpp, instructions=True) and "```python block" in show(mbpp, instructions=True)
    assert isinstance(human.tests, AssertTests) and human.starter == HUMANEVAL["prompt"]
    assert "'''Double.'''" in show(human, instructions=True) and "candidate" not in show(human, instructions=True)


def test_rows_that_cannot_be_used(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match="no tests found"):
        problem_of("file:3", {"problem": "p"})
    with pytest.raises(ConfigError, match="no question found"):
        problem_of("file:3", {"tests": '{"inputs": ["1"], "outputs": ["1"]}'})
    bad: Sequence[Any] = (
        "not json",
        {"inputs": [], "outputs": []},
        {"inputs": ["1"], "outputs": []},
        [],
        [{"input": "1"}],
        [{"input": "1", "output": "1", "testtype": "functional"}],
        {"fn_name": "f", "inputs": [3], "outputs": [3]},
    )
    for tests in bad:
        with pytest.raises(UnusableRow):
            problem_of("here", {"problem": "p", "tests": tests})
    kept = problems_of([("a", MBPP), ("b", {**MBPP, "test_list": ["assert =="]}), ("c", {"problem": "p", "tests": []})])
    assert [problem.where for problem in kept] == ["a"] and "2 problems" in caplog.text and "b: " in caplog.text


def test_replies_without_a_program_cost_no_run() -> None:
    problem, sandbox = problem_of("m", MBPP), NoSandbox()
    for reply in ("", "def twice(x): return 2 * x", "```python\nx = 1", "```cpp\nint x;\n```", "```python\n" + "x" * 100_001 + "\n```"):
        result = step(problem, reply, sandbox=sandbox)
        assert (result.reward, result.done, result.metrics["format"], result.metrics["correct"]) == (-0.5, True, 0.0, 0.0)
    assert not sandbox.programs


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        ("```python\na\n```", "a"),
        ("```\na\n```", "a"),
        ("```py\na\n```\nso\n```Python3\nb\n```", "b"),
        ("```python\na\n```\n```\noutput\n```", "a"),
        ("```python\na\n```\n```text\nb\n```\n```python\nc", "a"),
        ("~~~python\na\n~~~", "a"),
        ("````python\n```\na\n````", "```\na"),
        ("  ```python {.x}\n    a\n  ```  ", "    a"),
        ("```python\n\n```", ""),
    ],
)
def test_which_block_is_the_program(reply: str, code: str) -> None:
    from ptlab.rewards.code_text import extract_code

    assert extract_code(reply) == code


def test_cut_off_replies_count_by_what_they_have() -> None:
    problem, sandbox = problem_of("m", MBPP), NoSandbox()
    result = step(problem, "```python\ndef twice(x): return 2 * x\n```\nNow", cut_off=True, sandbox=sandbox)
    assert len(sandbox.programs) == 1 and result.metrics["format"] == 0.0
    assert step(problem, "```python\ndef twice(", cut_off=True).reward == -0.5


def test_expected_results_do_not_reach_the_judge_for_calls_and_inputs() -> None:
    """What decides is compared here: the sandbox is given inputs only. (Asserts it is given: the judge evaluates them.)"""
    for row in (
        {"problem": "p", "tests": {"fn_name": "f", "inputs": [[1]], "outputs": [424242]}},
        {"problem": "p", "tests": {"inputs": ["1"], "outputs": ["424242"]}},
    ):
        sandbox = NoSandbox()
        step(problem_of("t", row), "```python\nx\n```", sandbox=sandbox)
        (program,) = sandbox.programs
        assert b"424242" not in program.stdin and b"67932" not in program.stdin  # hex(424242) = 0x67932


def config(tmp_path: Path, **fields: Any) -> CodeConfig:
    for name, count in (("train", 5), ("test", 3)):
        rows = [{**MBPP, "prompt": f"{name} {index}"} for index in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    paths = {f"{name}_path": str(tmp_path / f"{name}.jsonl") for name in ("train", "test")}
    return CodeConfig(**paths, groups_per_step=2, group_size=2, sandbox=SandboxConfig(kind="process", workers=1), **fields)


def task(section: CodeConfig, *, attempts: int = 1) -> Any:
    unused: Any = None  # nothing here renders or asks another model
    setting = TaskSetting(renderer=unused, seed=7, models=unused, test_attempts=attempts)
    return asyncio.run(section.make_task(setting))


def questions(builders: Sequence[Any]) -> list[str]:
    envs = [asyncio.run(builder.make_envs()) for builder in builders]
    return [env.message_env.problem.question for group in envs for env in group[:1] if isinstance(env, EnvFromMessageEnv)]


def test_the_task_of_a_config(tmp_path: Path) -> None:
    one, again = (task(config(tmp_path), attempts=4) for _ in range(2))
    assert questions(one.train.get_batch(3)) == questions(again.train.get_batch(3))
    met = [question for index in range(5) for question in questions(one.train.get_batch(index))]  # two passes of five problems
    assert sorted(met[:5]) == sorted(met[5:]) == [f"train {index}" for index in range(5)]
    assert len(one.train) == 3 and questions(one.test_P) == ["test 0", "test 1", "test 2"]
    assert len(asyncio.run(one.test_P[0].make_envs())) == 4
    first, second = asyncio.run(one.train.get_batch(0)[0].make_envs())
    assert first.message_env.test_seed == second.message_env.test_seed  # a group is compared on the same tests
    assert first.message_env.grading.tests.max_tests == 15
    assert asyncio.run(one.test_P[0].make_envs())[0].message_env.grading.tests.max_tests == 100


def test_random_reward_is_a_coin_and_metrics_stay_true(tmp_path: Path) -> None:
    made = task(config(tmp_path, reward="random"))
    envs = [env for index in range(4) for builder in made.train.get_batch(index) for env in asyncio.run(builder.make_envs())]
    coins = [env.message_env.coin_seed for env in envs]
    assert len(set(coins)) == len(coins) == 16
    paid = {step(problem_of("m", MBPP), "nothing", coin_seed=coin).reward for coin in coins}
    assert paid == {0.0, 1.0}
    assert step(problem_of("m", MBPP), "nothing", coin_seed=coins[0]).metrics["correct"] == 0.0
    assert asyncio.run(made.test_P[0].make_envs())[0].message_env.coin_seed is None


def test_held_out_questions_are_not_trained_on(tmp_path: Path) -> None:
    section = config(tmp_path)
    (tmp_path / "train.jsonl").write_text(json.dumps({**MBPP, "prompt": "TEST  1"}) + "\n" + json.dumps({**MBPP, "prompt": "other"}))
    train, test = section.load()
    assert [problem.question for problem in train] == ["other"] and len(test) == 3
    (tmp_path / "train.jsonl").write_text(json.dumps({**MBPP, "prompt": "test 1"}))
    with pytest.raises(ConfigError, match="no training problems"):
        section.load()


def test_paths_come_in_pairs() -> None:
    with pytest.raises(ValidationError, match="train_path is set but test_path is not"):
        CodeConfig(train_path="x")
    assert CodeConfig(train_path="x", test_path="y").files() == {"train_path": "x", "test_path": "y"}
