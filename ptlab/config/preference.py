"""RewardModelConfig and DpoConfig: learning from comparisons of two replies, recipes/preference.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from ptlab.config.run import RunConfig
from ptlab.envs.preference_data import MadePreferencesConfig, PreferenceDataConfig
from ptlab.section import Section


class PairEvalConfig(Section):
    every: int = Field(default=10, ge=0)
    """Measure the held-out comparisons before every n-th step and after the last; 0 = never."""


class PairsConfig(RunConfig):
    """What both recipes have."""

    data: PreferenceDataConfig = MadePreferencesConfig()
    """The comparisons."""
    pairs_per_step: int = Field(default=32, ge=1)
    """Comparisons per training step; each is two datums."""
    max_length: int = Field(default=1024, ge=2)
    """Leave out comparisons with more tokens in one of their conversations than this."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of the labels believed to be the wrong way round; 0 = trust them."""
    eval: PairEvalConfig = PairEvalConfig()
    """When held-out comparisons are measured."""

    def files(self) -> Mapping[str, str | None]:
        return {f"data.{key}": path for key, path in self.data.files().items()}


class RewardModelConfig(PairsConfig):
    """A reward model: one score per reply, by Bradley-Terry."""

    recipe: Literal["reward_model"] = "reward_model"
    """Score chosen above rejected."""


class DpoConfig(PairsConfig):
    """Direct preference optimisation: the policy itself is trained on the comparisons."""

    recipe: Literal["dpo"] = "dpo"
    """Raise chosen above rejected, measured against the base model."""
    beta: float = Field(default=0.1, gt=0)
    """How much a nat of moving away from the base model is worth; small = far away."""
    form: Literal["logistic", "squared"] = "logistic"
    """Of the margin: "logistic" is DPO, "squared" is IPO (pulls it to 1 / (2 beta), which noisy labels cannot push to infinity)."""

    @model_validator(mode="after")
    def _smoothing_has_a_place(self) -> DpoConfig:
        if self.form == "squared" and self.label_smoothing:
            raise ValueError(f"label_smoothing is {self.label_smoothing}, form is 'squared', which has no such term; set one of the two")
        return self
