"""Questions with one right answer, boxed: what addition.py, gsm8k.py, hendrycks_math.py and their kin share.

Reward of an attempt: correct + format_coef x (format - 1). format is 1 when the reply has a \\boxed{} and came to its own end. With the
usual coefficient 0.1: right 1.0, wrong but boxed 0.0, not boxed -0.1, right but cut off at the token limit 0.9.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import unicodedata
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field, model_validator

from ptlab.envs.env_section import EnvSection, TaskSetting
from ptlab.envs.message_env import EnvFromMessageEnv, MessageEnv, MessageStep
from ptlab.errors import ConfigError
from ptlab.renderers import Message, Renderer, text_of
from ptlab.rewards.math_answer import math_reward
from ptlab.rl.seeds import stable_seed
from ptlab.rl.types import Env, EnvGroupBuilder, RLDataset, Task

logger = logging.getLogger(__name__)

QUESTION_SUFFIX = " Write your answer in \\boxed{} format."

FEW_SHOT: Sequence[Message] = (
    {"role": "user", "content": "How many r's are in strawberry?" + QUESTION_SUFFIX},
    {
        "role": "assistant",
        "content": "Let's spell the word out and number all the letters: 1) s 2) t 3) r 4) a 5) w 6) b 7) e 8) r 9) r 10) y. "
        "We have r's at positions 3, 8, and 9. \\boxed{3}",
    },
)
"""The cookbook's worked example (Apache-2.0), word for word, so that curves can be compared."""


@dataclass(frozen=True, slots=True)
class Problem:
    question: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemFormat:
    """How a problem is asked and what a reply in the wrong form costs."""

    prefix: Sequence[Message] = ()
    """Messages before the question."""
    suffix: str = QUESTION_SUFFIX
    """Put directly behind the question."""
    format_coef: float = 0.1


class ProblemEnv(MessageEnv):
    """One attempt at one problem: one question, one reply, the end.

    Args:
        coin_seed: pay 0 or 1 by a toss of this seed instead of for the answer (the negative control); metrics stay true.
    """

    def __init__(self, problem: Problem, form: ProblemFormat, *, coin_seed: int | None = None) -> None:
        self.problem = problem
        self.form = form
        self.coin_seed = coin_seed

    async def initial_observation(self) -> list[Message]:
        return [*self.form.prefix, {"role": "user", "content": self.problem.question + self.form.suffix}]

    async def step(self, reply: Message) -> MessageStep:
        return await self._grade(reply, finished=True)

    async def step_cut_off(self, reply: Message) -> MessageStep:
        return await self._grade(reply, finished=False)

    async def _grade(self, reply: Message, *, finished: bool) -> MessageStep:
        graded = await asyncio.to_thread(math_reward, text_of(reply), self.problem.answer, format_coef=self.form.format_coef)
        well_formed = finished and graded.boxed
        reward = float(graded.correct) + self.form.format_coef * (float(well_formed) - 1.0)
        if self.coin_seed is not None:
            reward = float(random.Random(self.coin_seed).random() < 0.5)
        return MessageStep(
            reward=reward,
            done=True,
            metrics={"correct": float(graded.correct), "format": float(well_formed)},
            logs={"prompt": self.problem.question, "response": text_of(reply), "answer": self.problem.answer},
        )


AttemptMaker = Callable[[Problem, ProblemFormat, int | None], MessageEnv]
"""(problem, form, seed of the coin or None) -> one attempt."""


def plain_attempt(problem: Problem, form: ProblemFormat, coin_seed: int | None) -> MessageEnv:
    return ProblemEnv(problem, form, coin_seed=coin_seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemGroupBuilder(EnvGroupBuilder):
    """`group_size` attempts at one problem."""

    problem: Problem
    group_size: int
    renderer: Renderer
    form: ProblemFormat
    coin_seed: int | None = None
    tag: str = "problems"
    attempt: AttemptMaker = plain_attempt

    async def make_envs(self) -> Sequence[Env]:
        coins_G = [None if self.coin_seed is None else stable_seed(self.coin_seed, index) for index in range(self.group_size)]
        return [EnvFromMessageEnv(self.attempt(self.problem, self.form, coin), self.renderer) for coin in coins_G]

    def logging_tags(self) -> list[str]:
        return [self.tag]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemDataset(RLDataset):
    """Problems by step, each as a group builder.

    Args:
        problems_at: the P problems of a step; a pure function of it (`shuffled`, or one that makes problems).
        num_batches: steps until every problem was met once.
        coin_seed: random rewards, see ProblemEnv.
    """

    problems_at: Callable[[int], Sequence[Problem]]
    num_batches: int
    group_size: int
    renderer: Renderer
    form: ProblemFormat = field(default_factory=ProblemFormat)
    coin_seed: int | None = None
    tag: str = "problems"
    attempt: AttemptMaker = plain_attempt

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        return [
            ProblemGroupBuilder(
                problem=problem,
                group_size=self.group_size,
                renderer=self.renderer,
                form=self.form,
                coin_seed=None if self.coin_seed is None else stable_seed(self.coin_seed, index, number),
                tag=self.tag,
                attempt=self.attempt,
            )
            for number, problem in enumerate(self.problems_at(index))
        ]

    def __len__(self) -> int:
        return self.num_batches


def shuffled(problems: Sequence[Problem], groups_per_step: int, seed: int) -> Callable[[int], Sequence[Problem]]:
    """Step -> its problems: every pass goes through all problems once, in an order of its own; batches run on across passes."""

    def problems_at(step: int) -> Sequence[Problem]:
        positions = range(step * groups_per_step, (step + 1) * groups_per_step)
        orders = {epoch: _order(len(problems), seed, epoch) for epoch in {position // len(problems) for position in positions}}
        return [problems[orders[position // len(problems)][position % len(problems)]] for position in positions]

    return problems_at


def test_builders(
    problems: Sequence[Problem],
    renderer: Renderer,
    form: ProblemFormat,
    tag: str,
    *,
    attempts: int = 1,
    attempt: AttemptMaker = plain_attempt,
) -> list[EnvGroupBuilder]:
    """Held-out problems, each with its own group of `attempts`."""
    return [
        ProblemGroupBuilder(problem=problem, group_size=attempts, renderer=renderer, form=form, tag=tag, attempt=attempt)
        for problem in problems
    ]


def _order(n: int, seed: int, epoch: int) -> list[int]:
    order = list(range(n))
    random.Random(stable_seed(seed, "order", epoch)).shuffle(order)
    return order


class ProblemSection(EnvSection):
    """Config of a data set of problems with boxed answers; a subclass says where its problems come from and how a row is read."""

    train_path: str | None = None
    """Local file with the hub's fields (JSON lines, a JSON list, parquet), relative to the working directory; None = from the hub."""
    test_path: str | None = None
    """The same for the held-out problems; set both paths or neither."""
    few_shot: bool = True
    """Put the strawberry example before each question."""
    suffix: str = QUESTION_SUFFIX
    """Put directly behind each question."""
    format_coef: float = Field(default=0.1, ge=0)
    """reward = correct + format_coef x (boxed - 1)."""
    reward: Literal["correct", "random"] = "correct"
    """"random" pays by coin toss: the negative control, which must not learn."""

    @property
    @abstractmethod
    def tag(self) -> str:
        """Names the rewards of this data set among those of others."""

    @abstractmethod
    def load(self) -> tuple[list[Problem], list[Problem]]:
        """Training and held-out problems. Raises: ConfigError."""

    def attempt_maker(self) -> AttemptMaker:
        """How an attempt at a problem is made; called once per task. Raises: what opening its tools raises."""
        return plain_attempt

    @model_validator(mode="after")
    def _both_paths_or_neither(self) -> ProblemSection:
        if (self.train_path is None) != (self.test_path is None):
            given, absent = ("train_path", "test_path") if self.test_path is None else ("test_path", "train_path")
            raise ValueError(f"{given} is set but {absent} is not; set both (local files) or neither (from the hub)")
        return self

    def files(self) -> Mapping[str, str | None]:
        return {"train_path": self.train_path, "test_path": self.test_path}

    async def make_task(self, setting: TaskSetting) -> Task:
        train_problems, test_problems = await asyncio.to_thread(self.load)
        for name, problems in (("training", train_problems), ("held-out", test_problems)):
            if not problems:
                source = self.train_path if name == "training" else self.test_path
                raise ConfigError(f"env {self.tag}: no {name} problems found in {source or 'the hub data set'} with these settings")
        form = ProblemFormat(prefix=FEW_SHOT if self.few_shot else (), suffix=self.suffix, format_coef=self.format_coef)
        attempt = await asyncio.to_thread(self.attempt_maker)
        train = ProblemDataset(
            problems_at=shuffled(train_problems, self.groups_per_step, setting.seed),
            num_batches=-(-len(train_problems) // self.groups_per_step),
            group_size=self.group_size,
            renderer=setting.renderer,
            form=form,
            coin_seed=stable_seed(setting.seed, "coin") if self.reward == "random" else None,
            tag=self.tag,
            attempt=attempt,
        )
        held_out = test_problems[: self.num_test]
        test_P = test_builders(held_out, setting.renderer, form, self.tag, attempts=setting.test_attempts, attempt=attempt)
        return Task(train=train, test_P=test_P)


def problems_in(
    rows: Iterable[tuple[str, Mapping[str, Any]]], *, question: str, answer: Callable[[str, Mapping[str, Any]], str | None]
) -> list[Problem]:
    """The problems of the rows of a data set.

    Args:
        question: the field that holds it.
        answer: (where the row stands, row) -> the right answer, None if the row has none. Such rows are left out and counted in a warning.

    Raises: ConfigError if a row has no text in the field `question`, and what `answer` raises.
    """
    problems, num_without = list[Problem](), 0
    first = ""
    for where, row in rows:
        gold = answer(where, row)
        if gold is None or not gold.strip():
            num_without, first = num_without + 1, first or where
            continue
        problems.append(Problem(text_field(where, row, question), gold.strip()))
    if num_without:
        logger.warning("%d problems without an answer are left out; the first is %s", num_without, first)
    return problems


def text_field(where: str, row: Mapping[str, Any], name: str) -> str:
    """The row's text of this name. Raises: ConfigError."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(
            f'{where}: needed a text in the field "{name}", found {str(value)[:60]!r}; the row has {", ".join(row) or "no fields"}'
        )
    return value


def optional_text(where: str, row: Mapping[str, Any], name: str) -> str | None:
    """The same, or None where the field is there and empty. Raises: ConfigError if it is absent or no text."""
    value = row.get(name, 0)
    return None if value is None or (isinstance(value, str) and not value.strip()) else text_field(where, row, name)


def without(problems: Sequence[Problem], held_out: Sequence[Problem]) -> list[Problem]:
    """The problems whose question is not among those held out, spelling aside (spaces, dollar signs, case, Unicode forms)."""
    known = {_question_key(problem.question) for problem in held_out}
    return [problem for problem in problems if _question_key(problem.question) not in known]


_SAYS_NOTHING = re.compile(r"\\\\|\\[,;!:\s]|\\(?:left|right|displaystyle)(?![A-Za-z])|[\s$.]")


def _question_key(question: str) -> str:
    return _SAYS_NOTHING.sub("", unicodedata.normalize("NFKC", question)).casefold()
