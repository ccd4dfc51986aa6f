"""RlConfig: reinforcement learning, recipes/rl.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from ptlab.config.run import RunConfig
from ptlab.config.sections import LossConfig, OptimConfig
from ptlab.envs.addition import AdditionConfig
from ptlab.envs.table import EnvConfig
from ptlab.losses import LOSSES
from ptlab.rl.rollout_correction import CorrectionConfig, NoCorrectionConfig
from ptlab.section import Section


class RolloutConfig(Section):
    max_tokens: int = Field(default=64, ge=1)
    """Longest single answer, tokens."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature while training; log-probabilities are exact for the losses at 1.0 only."""
    top_k: int = Field(default=-1, ge=-1)
    """Sample among the k likeliest tokens; -1 or 0 = all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample among the likeliest tokens that hold this mass; 1.0 = all."""
    max_turns: int | None = Field(default=None, ge=1)
    """Most answers per attempt; None = until the environment ends it."""
    max_trajectory_tokens: int | None = Field(default=None, ge=2)
    """Most tokens per attempt, questions and answers together; None = what the model's context holds."""
    timeout_s: float | None = Field(default=None, gt=0)
    """Most seconds per attempt, sampling and environment; None = no limit. What it cuts off depends on the machine's speed."""
    max_steps_off_policy: int = Field(default=0, ge=0)
    """Sample that many steps ahead, while earlier steps train; 0 = sample, train, sample, train. A step then trains on answers of weights
    up to so many steps old, and the loss weighs them by the log-probabilities they were sampled with. See docs/quickstart.md."""


class GroupCentredConfig(Section):
    kind: Literal["group_centred"] = "group_centred"
    """advantage = reward - mean reward of the group."""


class EvalConfig(Section):
    every: int = Field(default=10, ge=0)
    """Evaluate before every n-th step and after the last; 0 = never."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of eval/accuracy (eval/accuracy_greedy is at 0)."""
    greedy: bool = True
    """Also report eval/accuracy_greedy."""
    attempts: int = Field(default=1, ge=1)
    """Attempts at each held-out problem at `temperature`; n of them give eval/pass@k for k = 1, 2, 4, ... up to n."""


class RlOptimConfig(OptimConfig):
    updates_per_batch: int = Field(default=1, ge=1)
    """Optimizer steps per batch: its datums are dealt into so many minibatches, each trained on once. From the second on the weights are
    no longer those that sampled; take a loss that stands that (docs/losses.md, docs/loss-benchmark.md)."""


class KlConfig(Section):
    """A penalty on leaving a reference model, in the reward, token by token."""

    coef: float = Field(default=0.0, ge=0)
    """Advantage of a token -= coef x (log p of the policy - log p of the reference), centred over the batch; 0 = off."""
    reference: str | None = None
    """tinker:// path of the reference's weights; None = the base model."""


class RlConfig(RunConfig):
    """Everything that decides the result of a reinforcement learning run."""

    recipe: Literal["rl"] = "rl"
    """Sample, grade, train, sync."""
    env: EnvConfig = AdditionConfig()
    """The task."""
    rollout: RolloutConfig = RolloutConfig()
    """How answers are drawn while training."""
    loss: LossConfig = LossConfig()
    """What forward_backward computes."""
    optim: RlOptimConfig = RlOptimConfig()
    """How gradients become weights."""
    correction: CorrectionConfig = NoCorrectionConfig()
    """What a batch is worth that older weights, or another engine, sampled (rl/rollout_correction.py)."""
    advantage: GroupCentredConfig = GroupCentredConfig()
    """How rewards become advantages."""
    kl: KlConfig = KlConfig()
    """A penalty on leaving the reference model."""
    eval: EvalConfig = EvalConfig()
    """When and how held-out accuracy is measured."""

    @model_validator(mode="after")
    def _can_learn(self) -> RlConfig:
        if "advantages" not in LOSSES[self.loss.name].inputs:
            usable = ", ".join(name for name, loss in LOSSES.items() if "advantages" in loss.inputs)
            raise ValueError(f"loss {self.loss.name!r} takes no advantages, so recipe 'rl' cannot train with it; usable: {usable}")
        if self.advantage.kind == "group_centred" and self.env.group_size < 2 and not self.kl.coef:
            raise ValueError(
                f"env.group_size is {self.env.group_size}, advantage.kind 'group_centred' needs at least 2: "
                "an attempt alone in its group has advantage 0 and nothing trains"
            )
        return self

    def files(self) -> Mapping[str, str | None]:
        return {f"env.{key}": path for key, path in self.env.files().items()}

    def warnings(self) -> list[str]:
        """Settings that run but bias what is learnt; one sentence each."""
        rollout = self.rollout
        found = [
            text
            for value, neutral, text in (
                (rollout.temperature, (1.0,), f"rollout.temperature is {rollout.temperature}"),
                (rollout.top_k, (-1, 0), f"rollout.top_k is {rollout.top_k}"),
                (rollout.top_p, (1.0,), f"rollout.top_p is {rollout.top_p}"),
            )
            if value not in neutral
        ]
        reason = "the sampler's log-probabilities are then of a changed distribution, the trainer's are at temperature 1: ratios are biased"
        return [f"{text}: {reason}" for text in found]
