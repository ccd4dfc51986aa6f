"""Questions with one right answer, boxed: GSM8K, the quickstart's addition, and any list of Problems.

Reward of an attempt: correct + format_coef x (format - 1). format is 1 when the reply has a \\boxed{} and came to its own end. With the
usual coefficient 0.1: right 1.0, wrong but boxed 0.0, not boxed -0.1, right but cut off at the token limit 0.9.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ptlab.envs import addition
from ptlab.envs.message_env import EnvFromMessageEnv, MessageEnv, MessageStep
from ptlab.errors import ConfigError, InvalidRequestError
from ptlab.renderers import Message, Renderer, text_of
from ptlab.rewards.math_answer import gsm8k_gold, math_reward
from ptlab.rl.seeds import stable_seed
from ptlab.rl.types import Env, EnvGroupBuilder, RLDataset, Task

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


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemGroupBuilder(EnvGroupBuilder):
    """`group_size` attempts at one problem."""

    problem: Problem
    group_size: int
    renderer: Renderer
    form: ProblemFormat
    coin_seed: int | None = None
    tag: str = "problems"

    async def make_envs(self) -> Sequence[Env]:
        coins_G = [None if self.coin_seed is None else stable_seed(self.coin_seed, index) for index in range(self.group_size)]
        return [EnvFromMessageEnv(ProblemEnv(self.problem, self.form, coin_seed=coin), self.renderer) for coin in coins_G]

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

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        return [
            ProblemGroupBuilder(
                problem=problem,
                group_size=self.group_size,
                renderer=self.renderer,
                form=self.form,
                coin_seed=None if self.coin_seed is None else stable_seed(self.coin_seed, index, number),
                tag=self.tag,
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


def addition_task(
    renderer: Renderer, *, groups_per_step: int, group_size: int, num_test: int, seed: int, reward: Literal["correct", "random"]
) -> Task:
    """The quickstart: reward 1.0 if the boxed sum is right, else 0.0. reward "random" is the negative control: it must not learn."""
    form = ProblemFormat(suffix="", format_coef=0.0)

    def problems_at(step: int) -> Sequence[Problem]:
        return [Problem(*addition.training_problem(seed, step, index)) for index in range(groups_per_step)]

    train = ProblemDataset(
        problems_at=problems_at,
        num_batches=(addition.HIGHEST - addition.LOWEST + 1) ** 2 // groups_per_step,
        group_size=group_size,
        renderer=renderer,
        form=form,
        coin_seed=stable_seed(seed, "coin") if reward == "random" else None,
        tag="addition",
    )
    test_problems = [Problem(*pair) for pair in addition.test_problems(num_test)]
    return Task(train=train, test_P=_test_builders(test_problems, renderer, form, "addition"))


def gsm8k_task(
    renderer: Renderer,
    *,
    groups_per_step: int,
    group_size: int,
    num_test: int,
    seed: int,
    train_path: str | None = None,
    test_path: str | None = None,
    hub_name: str = "openai/gsm8k",
    few_shot: bool = True,
    format_coef: float = 0.1,
) -> Task:
    """Grade-school word problems, from local JSONL where paths are given, else from the hub.

    Raises: ConfigError if a file or data set is missing, empty, or has a row without question and answer.
    """
    train_problems = load_problems(train_path, hub_name=hub_name, split="train")
    test_problems = load_problems(test_path, hub_name=hub_name, split="test")[:num_test]
    form = ProblemFormat(prefix=FEW_SHOT if few_shot else (), format_coef=format_coef)
    train = ProblemDataset(
        problems_at=shuffled(train_problems, groups_per_step, seed),
        num_batches=-(-len(train_problems) // groups_per_step),
        group_size=group_size,
        renderer=renderer,
        form=form,
        tag="gsm8k",
    )
    return Task(train=train, test_P=_test_builders(test_problems, renderer, form, "gsm8k"))


def load_problems(path: str | None, *, hub_name: str, split: Literal["train", "test"]) -> list[Problem]:
    """Problems of a local JSONL file, or with path None of a split of a hub data set: rows of `question` and `answer`, the answer as a
    GSM8K solution ("... #### 18") or as one line that is the answer itself.

    Raises: ConfigError, naming the file and line or the data set.
    """
    rows = _jsonl_rows(Path(path)) if path is not None else _hub_rows(hub_name, split)
    problems = [_problem_of_row(where, row) for where, row in rows]
    if not problems:
        raise ConfigError(f"{path or hub_name}: no problems found; needed at least one row with question and answer")
    return problems


def _test_builders(problems: Sequence[Problem], renderer: Renderer, form: ProblemFormat, tag: str) -> list[EnvGroupBuilder]:
    return [ProblemGroupBuilder(problem=problem, group_size=1, renderer=renderer, form=form, tag=tag) for problem in problems]


def _order(n: int, seed: int, epoch: int) -> list[int]:
    order = list(range(n))
    random.Random(stable_seed(seed, "order", epoch)).shuffle(order)
    return order


def _problem_of_row(where: str, row: Any) -> Problem:
    if not isinstance(row, dict) or not isinstance(row.get("question"), str) or not isinstance(row.get("answer"), str):
        raise ConfigError(f'{where}: needed an object with the texts "question" and "answer", found {str(row)[:80]}')
    solution = row["answer"].strip()
    if solution and "\n" not in solution and "####" not in solution:
        return Problem(row["question"], solution)
    try:
        return Problem(row["question"], gsm8k_gold(solution))
    except InvalidRequestError as err:
        raise ConfigError(f"{where}: {err.message}, or be one line that is the answer itself") from err


def _jsonl_rows(path: Path) -> Iterable[tuple[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: JSON text may hold U+2028
    except OSError as err:
        raise ConfigError(f"{path}: cannot read the problems: {err.strerror}; needed JSONL with question and answer") from err
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", json.loads(line)
        except json.JSONDecodeError as err:
            raise ConfigError(f"{path}:{number}: not JSON: {err}") from err


def _hub_rows(hub_name: str, split: str) -> Iterable[tuple[str, Any]]:
    import datasets  # one second to import; local files do not need it

    try:
        rows = datasets.load_dataset(hub_name, "main", split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as err:
        raise ConfigError(
            f"data set {hub_name!r} ({split}): cannot be loaded from the hub: {str(err).splitlines()[0]}; "
            "with no network, set env.train_path and env.test_path to local JSONL files"
        ) from err
    return [(f"{hub_name}/{split}[{index}]", row) for index, row in enumerate(rows)]
