"""OfflineConfig: reinforcement learning from a file of rollouts, recipes/offline.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from ptlab.config.rl import EvalConfig, RolloutConfig
from ptlab.config.run import RunConfig
from ptlab.config.sections import LossConfig
from ptlab.envs.table import EnvConfig
from ptlab.section import Section


class RolloutDataConfig(Section):
    path: str | None = None
    """Rollouts that scripts/collect.py wrote, relative to the working directory; None = sample num_rollouts from the base model first, into
    run_dir/rollouts-....jsonl, which later runs with the same model, env, rollout and seed find there."""
    num_rollouts: int = Field(default=4000, ge=1)
    """How many to sample where there is no path; rounded up to whole groups."""
    groups_per_step: int = Field(default=16, ge=1)
    """Groups of the file per training step."""
    baseline: Literal["group_mean", "file_mean"] = "group_mean"
    """What a reward is compared with: the mean of its group, or of the whole file."""
    shuffle_rewards: bool = False
    """Deal the rewards of the file out anew, at random: the negative control, which must not learn."""


class OfflineConfig(RunConfig):
    """Everything that decides the result of training on a file of rollouts."""

    recipe: Literal["offline"] = "offline"
    """Train on rollouts that were sampled once; no new ones but for evaluation."""
    data: RolloutDataConfig = RolloutDataConfig()
    """What to train on."""
    loss: LossConfig = LossConfig(name="dro")
    """What forward_backward computes: dro (beta in loss.config), or importance_sampling, ppo, cispo, gspo, stable_reinforce; cross_entropy
    imitates the rollouts above the baseline and ignores the rest."""
    env: EnvConfig | None = None
    """What an evaluation asks; None = the env that the file was collected on. Needed where there is no data.path."""
    rollout: RolloutConfig | None = None
    """How an evaluation samples; None = as the file was. Where there is no data.path also how its rollouts are sampled."""
    eval: EvalConfig = EvalConfig()
    """When and how held-out accuracy is measured."""

    @model_validator(mode="after")
    def _loss_reads_the_file(self) -> OfflineConfig:
        if self.loss.name == "custom":
            raise ValueError("loss 'custom' cannot be named in a config; recipe 'offline' takes dro, importance_sampling, ppo, cispo, ...")
        if self.data.path is None and self.env is None:
            raise ValueError("data.path and env are both missing; name a file of rollouts, or the env to sample them on")
        return self

    def files(self) -> Mapping[str, str | None]:
        env_files = {} if self.env is None else {f"env.{key}": path for key, path in self.env.files().items()}
        return {"data.path": self.data.path, **env_files}
