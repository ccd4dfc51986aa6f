"""GSM8K: grade-school word problems (Cobbe et al. 2021, arXiv:2110.14168). Rows: question, answer ("... #### 18")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from ptlab.envs.math_problems import Problem, ProblemSection, problems_in, text_field
from ptlab.envs.rows import rows_of
from ptlab.errors import ConfigError, InvalidRequestError
from ptlab.rewards.math_answer import gsm8k_gold


class Gsm8kConfig(ProblemSection):
    kind: Literal["gsm8k"] = "gsm8k"
    """Grade-school word problems with a boxed number as the answer: 7473 to train, 1319 held out."""
    hub_name: str = Field(default="openai/gsm8k", min_length=1)
    """Data set on the Hugging Face hub, used when no paths are set."""

    @property
    def tag(self) -> str:
        return self.kind

    def load(self) -> tuple[list[Problem], list[Problem]]:
        return self._split(self.train_path, "train"), self._split(self.test_path, "test")

    def _split(self, path: str | None, split: str) -> list[Problem]:
        return problems_in(rows_of(path, hub_name=self.hub_name, subset="main", split=split), question="question", answer=_answer)


def _answer(where: str, row: Mapping[str, Any]) -> str:
    """What follows the last "####", or the whole field if it is one line that is the answer itself."""
    solution = text_field(where, row, "answer").strip()
    if "\n" not in solution and "####" not in solution:
        return solution
    try:
        return gsm8k_gold(solution)
    except InvalidRequestError as err:
        raise ConfigError(f"{where}: {err.message}, or be one line that is the answer itself") from err
