"""OnPolicyDistillConfig and PromptDistillConfig: learn from another model, or from oneself with a prompt.

recipes/on_policy_distill.py, recipes/prompt_distill.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from ptlab.config.rl import EvalConfig, RolloutConfig
from ptlab.config.run import RunConfig
from ptlab.config.sections import LossConfig
from ptlab.envs.addition import AdditionConfig
from ptlab.envs.table import EnvConfig
from ptlab.losses import LOSSES
from ptlab.section import Section


class TeacherConfig(Section):
    base_model: str | None = None
    """Base model of the teacher, with the student's tokenizer; None = the student's base model."""
    path: str | None = None
    """Adapter of the teacher: a tinker:// path or a checkpoint directory; None = the base model as it is."""


class OnPolicyDistillConfig(RunConfig):
    """Everything that decides the result of on-policy distillation."""

    recipe: Literal["on_policy_distill"] = "on_policy_distill"
    """The student samples, the teacher scores its tokens, the student trains."""
    teacher: TeacherConfig
    """Who is imitated."""
    kl_coef: float = Field(default=1.0, gt=0)
    """Advantage of a token = -kl_coef x (log q of the student - log p of the teacher), centred over the batch."""
    env: EnvConfig = AdditionConfig()
    """Where the prompts come from; its rewards are measured, not trained on."""
    rollout: RolloutConfig = RolloutConfig()
    """How the student's answers are drawn."""
    loss: LossConfig = LossConfig()
    """What forward_backward computes."""
    eval: EvalConfig = EvalConfig()
    """When and how held-out accuracy is measured."""

    @model_validator(mode="after")
    def _can_learn(self) -> OnPolicyDistillConfig:
        if "advantages" not in LOSSES[self.loss.name].inputs:
            usable = ", ".join(name for name, loss in LOSSES.items() if "advantages" in loss.inputs)
            raise ValueError(f"loss {self.loss.name!r} takes no advantages, so no teacher reaches it; usable: {usable}")
        if self.teacher.base_model is None and self.teacher.path is None:
            raise ValueError("teacher.base_model and teacher.path are both missing: the student would be its own teacher; set one")
        if self.rollout.max_steps_off_policy:
            raise ValueError(f"rollout.max_steps_off_policy is {self.rollout.max_steps_off_policy}; this recipe samples on-policy: 0")
        return self

    def files(self) -> Mapping[str, str | None]:
        return {f"env.{key}": path for key, path in self.env.files().items()}


class PrefixMessage(Section):
    role: Literal["system", "user", "assistant"]
    """Who says it."""
    content: str = Field(min_length=1)
    """The text."""


class PromptDistillConfig(RunConfig):
    """Everything that decides the result of prompt distillation."""

    recipe: Literal["prompt_distill"] = "prompt_distill"
    """The teacher answers under a prompt, the student learns to answer so without it."""
    prefix: list[PrefixMessage] = Field(min_length=1)
    """What only the teacher reads before each question: a system prompt, worked examples."""
    teacher: TeacherConfig = TeacherConfig()
    """Who answers; usually the student's own base model."""
    keep: Literal["all", "right"] = "all"
    """"right": learn only from answers that the environment calls correct."""
    env: EnvConfig = AdditionConfig()
    """Where the questions come from, one turn each; groups_per_step x group_size answers are one step's data."""
    rollout: RolloutConfig = RolloutConfig()
    """How answers are drawn."""
    eval: EvalConfig = EvalConfig()
    """When and how the student's held-out accuracy is measured, without the prefix."""

    def files(self) -> Mapping[str, str | None]:
        return {f"env.{key}": path for key, path in self.env.files().items()}
