"""The texts of ptlab/tiny-code and the rows of its smoke config."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from ptlab.envs.code_data import problem_of, show
from ptlab.rewards.code_tests import CodeTestConfig, extract_code, run_tests
from ptlab.sandbox import SandboxConfig, open_sandbox
from ptlab.tiny_models.code import DEFAULT_MIXTURE, _tests, answer, draw_task, example, rows, write_rows


def test_the_packaged_rows_are_these(tmp_path: Path) -> None:
    write_rows(tmp_path)
    for name in ("code_train.jsonl", "code_test.jsonl"):
        assert (Path("configs/smoke/data") / name).read_text() == (tmp_path / name).read_text()


def test_nothing_held_out_is_trained_on() -> None:
    held_out = {row["prompt"] for row in rows(held_out=True, count=60)}
    rng = Random(0)
    seen = {example(rng, mixture=DEFAULT_MIXTURE, clean=False).turns[0].text for _ in range(4000)}
    assert len(held_out) == 60 and not held_out & seen and not held_out & {row["prompt"] for row in rows(held_out=False, count=500)}
    assert len({question.split("returns")[1] for question in held_out}) > 30


def test_the_question_is_what_the_environment_asks() -> None:
    (row,) = rows(held_out=True, count=1)
    assert show(problem_of("here", row), instructions=False) == row["prompt"]


def test_the_slips_come_as_often_as_the_mixture_says() -> None:
    rng = Random(1)
    counts: Counter[str] = Counter()
    for _ in range(3000):
        task = draw_task(rng, held_out=False)
        code = extract_code(answer(task, rng, mixture=DEFAULT_MIXTURE))
        if code is None:
            counts["no fence"] += 1
            continue
        try:
            compile(code, "x", "exec")
        except SyntaxError:
            counts["syntax"] += 1
            continue
        counts["right" if code == task.code(task.fill(task.kind.right)) else "wrong"] += 1
    shares = {name: count / 3000 for name, count in counts.items()}
    mixture = DEFAULT_MIXTURE
    assert abs(shares["no fence"] - mixture.no_fence) < 0.03
    assert abs(shares["syntax"] - (1 - mixture.no_fence) * mixture.syntax) < 0.03
    assert abs(shares["right"] - (1 - mixture.no_fence) * (1 - mixture.syntax) * (1 - mixture.wrong)) < 0.03


def test_right_programs_pass_and_wrong_ones_fail() -> None:
    """In the sandbox: rows of many kinds, with their own program and with one that returns something else."""
    chosen = rows(held_out=True, count=60)[::5]
    pool = open_sandbox(SandboxConfig(workers=2))

    async def passes(row: dict[str, Any], code: str) -> bool:
        return (await run_tests(code, problem_of("here", row).tests, pool, CodeTestConfig())).all_passed

    async def verdicts() -> list[bool]:
        changed = [(row, row["code"].replace("return ", "return not ")) for row in chosen]
        return await asyncio.gather(*[passes(row, code) for row, code in [*((row, row["code"]) for row in chosen), *changed]])

    found = asyncio.run(verdicts())
    pool.close()
    assert found == [True] * len(chosen) + [False] * len(chosen)


def test_every_wrong_program_fails_a_test_of_its_row() -> None:
    """As the rows are drawn; here for the answers of the mixture, evaluated without a sandbox."""
    rng = Random(2)
    for _ in range(100):
        task = draw_task(rng, held_out=False)
        tests = _tests(task, rng)
        for wrong in task.kind.wrong:
            space: dict[str, Any] = {}
            exec(task.code(task.fill(wrong)), space)
            assert not all(_holds(test, space) for test in tests), (task, wrong)


def _holds(test: str, space: dict[str, Any]) -> bool:
    try:
        exec(test, space)
    except (AssertionError, TypeError, ValueError, IndexError):
        return False
    return True
