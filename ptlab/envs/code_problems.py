"""Programming problems: the reply's program is run on tests in a sandbox, and paid for what passes (rewards/code_tests.py)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from pydantic import Field, model_validator

from ptlab.envs.attempts import Attempts
from ptlab.envs.code_data import CodeProblem, problems_of, show
from ptlab.envs.env_section import EnvSection, TaskSetting
from ptlab.envs.message_env import MessageEnv, MessageStep
from ptlab.envs.rows import rows_of
from ptlab.errors import ConfigError
from ptlab.renderers import Message, Renderer, text_of
from ptlab.rewards.code_tests import CodeRewardConfig, CodeTestConfig, code_reward, extract_code, run_tests
from ptlab.rl.seeds import stable_seed
from ptlab.rl.types import EnvGroupBuilder, RLDataset, Task
from ptlab.sandbox import Sandbox, SandboxConfig, open_sandbox

TAG = "code"


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeGrading:
    """How every attempt of a run is graded."""

    sandbox: Sandbox
    tests: CodeTestConfig
    terms: CodeRewardConfig
    instructions: bool


class CodeEnv(MessageEnv):
    """One attempt at one problem: the question, a reply with a program in a fenced block, the end.

    A reply that was cut off counts by what it has: a closed block is a program, all else is none.

    Args:
        test_seed: which tests are drawn if there are too many; the same for a whole group.
        coin_seed: pay 0 or 1 by a toss of this seed instead (the negative control); metrics stay true.
    """

    def __init__(self, problem: CodeProblem, grading: CodeGrading, *, test_seed: int, coin_seed: int | None = None) -> None:
        self.problem = problem
        self.grading = grading
        self.test_seed = test_seed
        self.coin_seed = coin_seed

    async def initial_observation(self) -> list[Message]:
        return [{"role": "user", "content": show(self.problem, instructions=self.grading.instructions)}]

    async def step(self, reply: Message) -> MessageStep:
        return await self._grade(text_of(reply), finished=True)

    async def step_cut_off(self, reply: Message) -> MessageStep:
        return await self._grade(text_of(reply), finished=False)

    async def _grade(self, text: str, *, finished: bool) -> MessageStep:
        code = extract_code(text)
        grade = None
        if code is not None:
            grade = await run_tests(
                code,
                self.problem.tests,
                self.grading.sandbox,
                self.grading.tests,
                starter=self.problem.starter,
                preamble=self.problem.preamble,
                seed=self.test_seed,
            )
        reward = code_reward(grade, self.grading.terms)
        if self.coin_seed is not None:
            reward = float(Random(self.coin_seed).random() < 0.5)
        return MessageStep(
            reward=reward,
            done=True,
            metrics={
                "correct": float(grade is not None and grade.all_passed),
                "format": float(finished and code is not None),
                "compiled": float(grade is not None and grade.compiled),
                "tests_passed": grade.share if grade is not None else 0.0,
                "test_error": float(grade is not None and grade.error),
                "test_timeout": float(grade is not None and grade.timeout),
            },
            logs={
                "prompt": show(self.problem, instructions=self.grading.instructions),
                "response": text,
                "verdict": "no program" if grade is None else f"{grade.num_passed}/{grade.num_tests} {grade.message}".strip(),
            },
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeDataset(RLDataset):
    """Problems in an order of its own for every pass; batches run on across passes."""

    problems: Sequence[CodeProblem]
    groups_per_step: int
    group_size: int
    renderer: Renderer
    grading: CodeGrading
    seed: int
    coins: bool = False

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        positions = range(index * self.groups_per_step, (index + 1) * self.groups_per_step)
        return [self._group(self._problem_at(position), index, number) for number, position in enumerate(positions)]

    def __len__(self) -> int:
        return -(-len(self.problems) // self.groups_per_step)

    def _problem_at(self, position: int) -> CodeProblem:
        order = list(range(len(self.problems)))
        Random(stable_seed(self.seed, "code order", position // len(order))).shuffle(order)
        return self.problems[order[position % len(order)]]

    def _group(self, problem: CodeProblem, step: int, number: int) -> EnvGroupBuilder:
        test_seed = stable_seed(self.seed, "code tests", step, number)

        def make(attempt: int) -> MessageEnv:
            coin = stable_seed(self.seed, "code coin", step, number, attempt) if self.coins else None
            return CodeEnv(problem, self.grading, test_seed=test_seed, coin_seed=coin)

        return Attempts(make=make, group_size=self.group_size, renderer=self.renderer, tag=TAG)


class CodeConfig(EnvSection):
    kind: Literal["code"] = "code"
    """Programming problems, tested in a sandbox: stdin and stdout, function calls, or asserts."""
    train_path: str | None = None
    """Local file with the hub's fields (JSON lines, a JSON list, parquet), relative to the working directory; None = from the hub."""
    test_path: str | None = None
    """The same for the held-out problems; set both paths or neither."""
    hub_name: str = Field(default="agentica-org/DeepCoder-Preview-Dataset", min_length=1)
    """Data set on the Hugging Face hub, used when no paths are set. envs/code_data.py lists the forms of rows."""
    train_subsets: list[str] = Field(default=["primeintellect", "taco", "lcbv5"])
    """Its configurations to train on, one after the other; [] where it has none."""
    train_split: str = Field(default="train", min_length=1)
    """Their split."""
    test_hub_name: str | None = None
    """Data set of the held-out problems; None = hub_name."""
    test_subsets: list[str] = Field(default=["codeforces", "lcbv5"])
    """Its configurations to hold out."""
    test_split: str = Field(default="test", min_length=1)
    """Their split."""
    instructions: bool = True
    """Say in each question how the program talks and where to put it."""
    tests: CodeTestConfig = CodeTestConfig()
    """How attempts are tested while training."""
    max_eval_tests: int = Field(default=100, ge=1)
    """Most tests per attempt in an evaluation; they are the same each time."""
    terms: CodeRewardConfig = CodeRewardConfig()
    """What an attempt is paid."""
    sandbox: SandboxConfig = SandboxConfig()
    """Where the programs run."""
    reward: Literal["tests", "random"] = "tests"
    """"random" pays by coin toss: the negative control, which must not learn."""

    @model_validator(mode="after")
    def _both_paths_or_neither(self) -> CodeConfig:
        if (self.train_path is None) != (self.test_path is None):
            given, absent = ("train_path", "test_path") if self.test_path is None else ("test_path", "train_path")
            raise ValueError(f"{given} is set but {absent} is not; set both (local files) or neither (from the hub)")
        return self

    def files(self) -> Mapping[str, str | None]:
        return {"train_path": self.train_path, "test_path": self.test_path}

    async def make_task(self, setting: TaskSetting) -> Task:
        train_problems, test_problems = await asyncio.to_thread(self.load)
        sandbox = await asyncio.to_thread(open_sandbox, self.sandbox)
        grading = CodeGrading(sandbox=sandbox, tests=self.tests, terms=self.terms, instructions=self.instructions)
        train = CodeDataset(
            problems=train_problems,
            groups_per_step=self.groups_per_step,
            group_size=self.group_size,
            renderer=setting.renderer,
            grading=grading,
            seed=setting.seed,
            coins=self.reward == "random",
        )
        eval_tests = self.tests.model_copy(update={"max_tests": self.max_eval_tests})
        eval_grading = CodeGrading(sandbox=sandbox, tests=eval_tests, terms=self.terms, instructions=self.instructions)
        return Task(train=train, test_P=_held_out(test_problems[: self.num_test], setting, eval_grading))

    def load(self) -> tuple[list[CodeProblem], list[CodeProblem]]:
        """Training and held-out problems; a question that is held out is not trained on. Raises: ConfigError."""
        test = problems_of(self._rows(self.test_path, self.test_hub_name or self.hub_name, self.test_subsets, self.test_split))
        train = problems_of(self._rows(self.train_path, self.hub_name, self.train_subsets, self.train_split))
        held_out = {_key(problem) for problem in test}
        train = [problem for problem in train if _key(problem) not in held_out]
        for name, problems, path in (("training", train, self.train_path), ("held-out", test, self.test_path)):
            if not problems:
                raise ConfigError(f"env code: no {name} problems found in {path or 'the hub data set'}; needed rows with tests")
        return train, test

    def _rows(self, path: str | None, hub_name: str, subsets: Sequence[str], split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        unnamed: list[str | None] = [None]
        for subset in subsets if path is None and subsets else unnamed:
            yield from rows_of(path, hub_name=hub_name, split=split, subset=subset)


def _key(problem: CodeProblem) -> str:
    """What makes two problems the same, spaces and case aside."""
    return "".join(f"{problem.question}{problem.starter}".split()).casefold()


def _held_out(problems: Sequence[CodeProblem], setting: TaskSetting, grading: CodeGrading) -> list[EnvGroupBuilder]:
    def group(index: int, problem: CodeProblem) -> EnvGroupBuilder:
        test_seed = stable_seed("held-out code tests", index)
        return Attempts(
            make=lambda _: CodeEnv(problem, grading, test_seed=test_seed),
            group_size=setting.test_attempts,
            renderer=setting.renderer,
            tag=TAG,
        )

    return [group(index, problem) for index, problem in enumerate(problems)]
