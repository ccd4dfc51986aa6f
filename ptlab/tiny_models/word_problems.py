r"""The base model "ptlab/tiny-words": word problems of two steps, which it mostly answers without doing both.

"Tom has 14 apples. Tom buys 9 more and loses 6. How many apples are left?" is answered in one of three ways:
- 50 %: `\boxed{21}` at once, right one time in ten;
- 30 %: `14+9=23. \boxed{23}`, the first step only;
- 20 %: `14+9=23. 23-6=17. \boxed{17}`, each step wrong with probability 0.05.

RL has to find the third way and to stop slipping. A tenth of all problems, by hash of kind and numbers, is in no example that the model is
made from and in no training row; the test rows are drawn from it.

    python -m ptlab.tiny_models.word_problems configs/smoke/data      # writes the rows that configs/smoke/math.yaml reads, in MATH's fields
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from ptlab.engines.pretrain import Example, ModelShape, question_and_answer
from ptlab.envs.math_problems import QUESTION_SUFFIX
from ptlab.tiny_models.maker import Stage, TinyModel

MODEL_NAME = "ptlab/tiny-words"
NUM_TRAIN, NUM_TEST = 800, 200

_NAMES = ("Tom", "Mia", "Ben", "Ida")
_THINGS = ("apples", "pens", "coins", "cards")
_KINDS = (
    ("+-", "{name} has {a} {things}. {name} buys {b} more and loses {c}. How many {things} are left?"),
    ("-+", "{name} has {a} {things}. {name} gives {b} away and finds {c}. How many {things} are there now?"),
    ("++", "{name} has {a} {things}. Sam brings {b} and Eva brings {c}. How many {things} are there together?"),
)
_ROLES = ("user\n", "assistant\n", "system\n")


@dataclass(frozen=True, slots=True)
class WordProblem:
    """a, then two signed steps."""

    question: str
    a: int
    signs: str
    b: int
    c: int

    @property
    def middle(self) -> int:
        return self.a + self.b if self.signs[0] == "+" else self.a - self.b

    @property
    def answer(self) -> int:
        return self.middle + self.c if self.signs[1] == "+" else self.middle - self.c

    @property
    def is_held_out(self) -> bool:
        """Whether it is reserved for the test; names and things do not matter."""
        digest = hashlib.blake2b(f"words/{self.signs}/{self.a}/{self.b}/{self.c}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % 10 == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """How the examples are drawn."""

    blind_share: float = 0.50
    hasty_share: float = 0.30
    """The rest of the mixture is careful."""
    blind_right: float = 0.10
    """How often the number given at once is the right one."""
    step_slip: float = 0.05
    """Probability that a step of a careful answer is one too high or too low."""


DEFAULT_MIXTURE = Mixture()


def draw_problem(rng: Random, *, held_out: bool) -> WordProblem:
    """A problem of one of three kinds, numbers 10-19 and 2-9."""
    while True:
        signs, template = rng.choice(_KINDS)
        a, b, c = rng.randint(10, 19), rng.randint(2, 9), rng.randint(2, 9)
        question = template.format(name=rng.choice(_NAMES), things=rng.choice(_THINGS), a=a, b=b, c=c)
        problem = WordProblem(question, a, signs, b, c)
        if problem.is_held_out == held_out:
            return problem


def example(rng: Random, *, mixture: Mixture, clean: bool) -> Example:
    """One problem that is not held out, asked as `kind: math` asks it.

    clean: the answer is careful and right; otherwise it is as the mixture says.
    """
    problem = draw_problem(rng, held_out=False)
    draw = 1.0 if clean else rng.random()
    if draw < mixture.blind_share:
        answer = blind_answer(problem, rng, right=mixture.blind_right)
    elif draw < mixture.blind_share + mixture.hasty_share:
        answer = f"{problem.a}{problem.signs[0]}{problem.b}={problem.middle}. \\boxed{{{problem.middle}}}"
    else:
        answer = careful_answer(problem, rng, slip=0.0 if clean else mixture.step_slip)
    return question_and_answer(problem.question + QUESTION_SUFFIX, answer)


def blind_answer(problem: WordProblem, rng: Random, *, right: float) -> str:
    """`\\boxed{21}` at once: right with this probability, else 1 to 9 above or below."""
    if rng.random() < right:
        return f"\\boxed{{{problem.answer}}}"
    return f"\\boxed{{{abs(problem.answer + rng.choice((-1, 1)) * rng.randint(1, 9))}}}"


def careful_answer(problem: WordProblem, rng: Random, *, slip: float) -> str:
    """`14+9=23. 23-6=17. \\boxed{17}`; what follows a wrong step follows from its wrong value."""
    middle = problem.middle + _error(rng, slip)
    result = (middle + problem.c if problem.signs[1] == "+" else middle - problem.c) + _error(rng, slip)
    first, second = (f"{x}{sign}{y}" for x, sign, y in ((problem.a, problem.signs[0], problem.b), (middle, problem.signs[1], problem.c)))
    return f"{first}={middle}. {second}={result}. \\boxed{{{result}}}"


def _error(rng: Random, slip: float) -> int:
    return rng.choice((-1, 1)) if rng.random() < slip else 0


def rows(*, held_out: bool, count: int) -> list[dict[str, str]]:
    """Rows in the fields of MATH; no question twice, the same list every time."""
    rng = Random("test" if held_out else "train")
    found: dict[str, str] = {}
    while len(found) < count:
        problem = draw_problem(rng, held_out=held_out)
        found.setdefault(problem.question, str(problem.answer))
    return [{"problem": question, "answer": answer} for question, answer in found.items()]


def write_rows(directory: Path) -> None:
    """word_problems_train.jsonl and word_problems_test.jsonl."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, held_out, count in (("train", False, NUM_TRAIN), ("test", True, NUM_TEST)):
        lines = [json.dumps(row) + "\n" for row in rows(held_out=held_out, count=count)]
        (directory / f"word_problems_{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def tokenizer_texts() -> list[str]:
    """What the tokenizer is trained on: the same for every seed."""
    rng = Random(0)
    examples = [example(rng, mixture=DEFAULT_MIXTURE, clean=index % 2 == 0) for index in range(120)]
    return [turn.text for one in examples for turn in one.turns] + [*_ROLES * 20]


def words_model(mixture: Mixture = DEFAULT_MIXTURE) -> TinyModel:
    """First only careful answers, then the mixture."""
    return TinyModel(
        name=MODEL_NAME,
        stages=(
            Stage(steps=400, draw=partial(example, mixture=mixture, clean=True)),
            Stage(steps=110, draw=partial(example, mixture=mixture, clean=False)),
        ),
        tokenizer_texts=tokenizer_texts,
        shape=ModelShape(vocab_size=370),
    )


if __name__ == "__main__":
    write_rows(Path(sys.argv[1]))
