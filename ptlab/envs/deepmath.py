"""DeepMath-103K: hard, decontaminated problems with checkable answers (He et al. 2025, arXiv:2504.11456), measured on MATH-500.

Rows: question, final_answer, difficulty (a number, about 5 to 9), topic ("Mathematics -> Algebra -> ..."); the hub's rows also hold three
long solutions, which are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from ptlab.envs.hendrycks_math import MATH_500, load_math_test
from ptlab.envs.math_problems import Problem, ProblemSection, optional_text, problems_in, text_field, without
from ptlab.envs.rows import rows_of
from ptlab.errors import ConfigError


class DeepMathConfig(ProblemSection):
    kind: Literal["deepmath"] = "deepmath"
    """103,110 hard problems; MATH-500 held out."""
    hub_name: str = Field(default="zwhe99/DeepMath-103K", min_length=1)
    """Data set on the Hugging Face hub, used when no paths are set."""
    test_hub_name: str = Field(default=MATH_500, min_length=1)
    """The same for the held-out problems (fields problem, answer), which are never trained on."""
    min_difficulty: float | None = None
    """Train on rows of at least this difficulty; None = all."""
    max_difficulty: float | None = None
    """Train on rows of at most this difficulty; None = all."""
    topic: str | None = Field(default=None, min_length=1)
    """Train on rows whose topic holds this text, such as "Algebra"; None = all."""

    @property
    def tag(self) -> str:
        return self.kind

    def load(self) -> tuple[list[Problem], list[Problem]]:
        test = load_math_test(self.test_path, self.test_hub_name)
        columns = ("question", "final_answer", "difficulty", "topic")
        rows = rows_of(self.train_path, hub_name=self.hub_name, split="train", columns=columns)
        wanted = ((where, row) for where, row in rows if self._wanted(where, row))
        return without(problems_in(wanted, question="question", answer=_final_answer), test), test

    def _wanted(self, where: str, row: Mapping[str, Any]) -> bool:
        if self.topic is not None and self.topic.casefold() not in text_field(where, row, "topic").casefold():
            return False
        if self.min_difficulty is None and self.max_difficulty is None:
            return True
        value = row.get("difficulty")
        if not isinstance(value, int | float):
            raise ConfigError(f'{where}: "difficulty" is {str(value)[:40]!r}; min_difficulty and max_difficulty need a number')
        return (self.min_difficulty is None or value >= self.min_difficulty) and (
            self.max_difficulty is None or value <= self.max_difficulty
        )


def _final_answer(where: str, row: Mapping[str, Any]) -> str | None:
    return optional_text(where, row, "final_answer")
