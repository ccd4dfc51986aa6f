"""Polaris-53K: hard competition problems filtered for RL (An et al. 2025, hkunlp.github.io/blog/2025/Polaris), measured on MATH-500.

Rows: problem, answer, difficulty ("3/8": the share of 8 attempts that the authors' reference model solved).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Literal

from pydantic import Field, model_validator

from ptlab.envs.hendrycks_math import MATH_500, load_math_test, math_answer
from ptlab.envs.math_problems import Problem, ProblemSection, problems_in, without
from ptlab.envs.rows import rows_of
from ptlab.errors import ConfigError


class PolarisConfig(ProblemSection):
    kind: Literal["polaris"] = "polaris"
    """53,291 hard competition problems; MATH-500 held out."""
    hub_name: str = Field(default="POLARIS-Project/Polaris-Dataset-53K", min_length=1)
    """Data set on the Hugging Face hub, used when no paths are set."""
    test_hub_name: str = Field(default=MATH_500, min_length=1)
    """The same for the held-out problems (fields problem, answer), which are never trained on."""
    min_difficulty: float = Field(default=0.0, ge=0, le=1)
    """Train on rows whose `difficulty`, read as a fraction ("3/8" = 0.375), is at least this."""
    max_difficulty: float = Field(default=1.0, ge=0, le=1)
    """Train on rows whose `difficulty` is at most this."""

    @model_validator(mode="after")
    def _some_difficulty(self) -> PolarisConfig:
        if self.min_difficulty > self.max_difficulty:
            raise ValueError(f"min_difficulty is {self.min_difficulty}, max_difficulty is {self.max_difficulty}; no problem has both")
        return self

    @property
    def tag(self) -> str:
        return self.kind

    def load(self) -> tuple[list[Problem], list[Problem]]:
        test = load_math_test(self.test_path, self.test_hub_name)
        rows = rows_of(self.train_path, hub_name=self.hub_name, split="train")
        wanted = ((where, row) for where, row in rows if self._wanted(where, row))
        return without(problems_in(wanted, question="problem", answer=math_answer), test), test

    def _wanted(self, where: str, row: Mapping[str, Any]) -> bool:
        if (self.min_difficulty, self.max_difficulty) == (0.0, 1.0):
            return True
        value = row.get("difficulty")
        if not isinstance(value, str) or not re.fullmatch(r"\d{1,3}/[1-9]\d{0,2}", value):
            raise ConfigError(f'{where}: "difficulty" is {str(value)[:40]!r}; min_difficulty and max_difficulty need a share such as "3/8"')
        return self.min_difficulty <= Fraction(value) <= self.max_difficulty
