"""Groups and data sets for environments whose problems are made, not loaded: what the games share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ptlab.envs.message_env import EnvFromMessageEnv, MessageEnv
from ptlab.renderers import Renderer
from ptlab.rl.types import Env, EnvGroupBuilder, RLDataset


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempts(EnvGroupBuilder):
    """`group_size` attempts at one problem, independent of each other.

    Args:
        make: attempt index -> its environment, a new one each time.
    """

    make: Callable[[int], MessageEnv]
    group_size: int
    renderer: Renderer
    tag: str

    async def make_envs(self) -> Sequence[Env]:
        return [EnvFromMessageEnv(self.make(index), self.renderer) for index in range(self.group_size)]

    def logging_tags(self) -> list[str]:
        return [self.tag]


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeDataset(RLDataset):
    """Problems made step by step.

    Args:
        builders_at: step -> its groups; a pure function.
        num_batches: what counts as one pass.
    """

    builders_at: Callable[[int], Sequence[EnvGroupBuilder]]
    num_batches: int

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        return self.builders_at(index)

    def __len__(self) -> int:
        return self.num_batches
