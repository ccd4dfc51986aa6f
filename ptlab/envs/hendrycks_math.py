"""MATH: competition problems (Hendrycks et al. 2021, arXiv:2103.03874), measured on MATH-500 (Lightman et al. 2023, arXiv:2305.20050).

As is usual since then, both splits of the data set are trained on, less the 500 test problems: 12,000. Rows: problem, and `answer`
or a `solution` whose last box is the answer; level ("Level 5" or 5) and type.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from ptlab.envs.math_problems import Problem, ProblemSection, optional_text, problems_in, text_field, without
from ptlab.envs.rows import rows_of
from ptlab.rewards.math_answer import extract_boxed

Subject = Literal["algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra", "precalculus"]
SUBJECTS: tuple[Subject, ...] = get_args(Subject)
MATH_500 = "HuggingFaceH4/MATH-500"


class HendrycksMathConfig(ProblemSection):
    kind: Literal["math"] = "math"
    """Competition problems with boxed answers: 12,000 to train, MATH-500 held out."""
    hub_name: str = Field(default="EleutherAI/hendrycks_math", min_length=1)
    """Data set on the Hugging Face hub, used when no paths are set."""
    test_hub_name: str = Field(default=MATH_500, min_length=1)
    """The same for the held-out problems, which are never trained on."""
    subjects: list[Subject] = Field(default=list(SUBJECTS), min_length=1)
    """Subjects of the hub data set to train on; a local file is used whole."""
    min_level: int = Field(default=1, ge=1, le=5)
    """Train on problems of this level or harder."""
    max_level: int = Field(default=5, ge=1, le=5)
    """Train on problems of this level or easier. Problems without a known level are left out only if one of the two is set."""

    @model_validator(mode="after")
    def _some_level(self) -> HendrycksMathConfig:
        if self.min_level > self.max_level:
            raise ValueError(f"min_level is {self.min_level}, max_level is {self.max_level}; no problem has both")
        return self

    @property
    def tag(self) -> str:
        return self.kind

    def load(self) -> tuple[list[Problem], list[Problem]]:
        test = load_math_test(self.test_path, self.test_hub_name)
        rows = ((where, row) for where, row in self._train_rows() if self._has_level(row))
        return without(problems_in(rows, question="problem", answer=math_answer), test), test

    def _train_rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        if self.train_path is not None:
            yield from rows_of(self.train_path, hub_name=self.hub_name, split="train")
            return
        for subset in self.subjects:
            for split in ("train", "test"):
                yield from rows_of(None, hub_name=self.hub_name, subset=subset, split=split)

    def _has_level(self, row: Mapping[str, Any]) -> bool:
        if (self.min_level, self.max_level) == (1, 5):
            return True
        level = re.search(r"[1-5]$", str(row.get("level")))
        return level is not None and self.min_level <= int(level[0]) <= self.max_level


def load_math_test(path: str | None, hub_name: str) -> list[Problem]:
    """The held-out problems, of MATH-500 unless named otherwise. Raises: ConfigError."""
    return problems_in(rows_of(path, hub_name=hub_name, split="test"), question="problem", answer=math_answer)


def math_answer(where: str, row: Mapping[str, Any]) -> str | None:
    """The field `answer` where there is one, else what the solution boxes last. Raises: ConfigError if the row has neither field."""
    return optional_text(where, row, "answer") if "answer" in row else extract_boxed(text_field(where, row, "solution"))
