"""An environment's section of a config, and what it gets to make its task from.

A new environment is one file with a section like this one, and one line in envs/table.py (docs/tutorials/your_first_env.md):

    class ReverseConfig(EnvSection):
        kind: Literal["reverse"] = "reverse"
        longest: int = Field(default=6, ge=2)

        async def make_task(self, setting: TaskSetting) -> Task: ...
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pydantic import Field

from ptlab.renderers import Renderer
from ptlab.rl.types import Task
from ptlab.section import Section

if TYPE_CHECKING:
    from ptlab.client.sampling import SamplingClient


class OtherModels(Protocol):
    """Where an environment gets models besides the one that trains: an answerer, a judge, an opponent, a reward model."""

    async def open(self, *, base_model: str | None = None, model_path: str | None = None) -> tuple[SamplingClient, Renderer]:
        """A client that never changes, and how messages become its tokens.

        Args:
            base_model: a base model without an adapter. Neither argument: the base model of the run.
            model_path: weights for sampling ("tinker://...") on the run's base model or on `base_model`; or a directory of this machine,
                where the run itself computes there: a run directory (its newest weights), a directory of such weights, PEFT layout.
        Raises: NotFoundError, CheckpointError if there are no such weights.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSetting:
    """What a run tells the environment it trains on."""

    renderer: Renderer
    """Of the model that trains."""
    seed: int
    """The run's; problems and everything drawn must follow from it."""
    models: OtherModels
    test_attempts: int = 1
    """Attempts at each held-out problem: the group size of Task.test_P."""


class EnvSection(Section, ABC):
    """What every environment's section has: problems per step, attempts per problem, test problems."""

    groups_per_step: int = Field(default=16, ge=1)
    """Problems per training step (P)."""
    group_size: int = Field(default=8, ge=1)
    """Attempts at each problem (G)."""
    num_test: int = Field(default=250, ge=1)
    """Held-out problems that an evaluation asks."""

    @abstractmethod
    async def make_task(self, setting: TaskSetting) -> Task:
        """Training data set and held-out problems. Raises: ConfigError for data that is missing or not of the right form."""

    def files(self) -> Mapping[str, str | None]:
        """Key -> local file that must exist before anything is loaded; None = not set."""
        return {}
