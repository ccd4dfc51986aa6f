"""RunConfig: what every run has, whatever its recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml
from pydantic import Field, model_validator

from ptlab.config.sections import CheckpointConfig, EnginesConfig, LoggingConfig, LoraSection, ModelConfig, OptimConfig
from ptlab.config.yaml12 import Yaml12Dumper
from ptlab.section import Section


class RunConfig(Section):
    """Everything that decides a run's result, and where it is written. Each recipe has a class of its own below this one."""

    recipe: str
    """Which loop of ptlab.recipes runs."""
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
    """Name of the run directory: letters, digits, '.', '_', '-'. Default: the config file's name."""
    seed: int = Field(default=0, ge=0)
    """Seeds data order, sampling and (unless lora.seed is set) the LoRA initialisation."""
    steps: int = Field(default=30, ge=1)
    """Training steps."""
    run_dir: str = Field(default="runs", min_length=1)
    """Folder that holds the run directories."""
    model: ModelConfig = ModelConfig()
    """The frozen base model."""
    lora: LoraSection = LoraSection()
    """The weights that train."""
    optim: OptimConfig = OptimConfig()
    """How gradients become weights."""
    engines: EnginesConfig = EnginesConfig()
    """What computes, and with which settings."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the state is saved."""
    logging: LoggingConfig = LoggingConfig()
    """What is written beside metrics.jsonl."""

    @model_validator(mode="after")
    def _warm_up_ends(self) -> RunConfig:
        if self.optim.warmup_steps > self.steps:
            raise ValueError(f"optim.warmup_steps is {self.optim.warmup_steps}, steps is {self.steps}; the warm-up must end within the run")
        return self

    @property
    def directory(self) -> Path:
        """Where this run is written."""
        return Path(self.run_dir) / self.name

    def files(self) -> Mapping[str, str | None]:
        """Dotted key -> local file that must exist before anything is loaded; None = not set."""
        return {}

    def warnings(self) -> list[str]:
        """Settings that run but bias what is learnt; one sentence each."""
        return []

    def to_yaml(self) -> str:
        """Every field, defaults included; load_config reads it back to an equal config."""
        return yaml.dump(self.model_dump(), Dumper=Yaml12Dumper, sort_keys=False, allow_unicode=True)
