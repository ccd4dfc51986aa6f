"""What a run is: a config class per recipe, read from YAML plus `--set` overrides.

Frozen, strict about types, unknown keys refused: a config that loads is one that can run, before a GPU is touched. YAML says only what
differs from the defaults. An environment's section stands in the environment's own file (envs/).
"""

from ptlab.config.distill import OnPolicyDistillConfig, PromptDistillConfig
from ptlab.config.loading import load_config
from ptlab.config.offline import OfflineConfig
from ptlab.config.preference import DpoConfig, RewardModelConfig
from ptlab.config.recipes import CONFIGS
from ptlab.config.rl import EvalConfig, GroupCentredConfig, KlConfig, RlConfig, RlOptimConfig, RolloutConfig
from ptlab.config.run import RunConfig
from ptlab.config.sections import (
    CheckpointConfig,
    DType,
    EnginesConfig,
    LoggingConfig,
    LoraSection,
    LossConfig,
    ModelConfig,
    OptimConfig,
    PeftTrainerConfig,
    SamplerConfig,
    TorchSamplerConfig,
    VllmSamplerConfig,
)
from ptlab.config.sft import SftConfig
from ptlab.config.yaml12 import parse_yaml

__all__ = [
    "CONFIGS",
    "CheckpointConfig",
    "DType",
    "DpoConfig",
    "EnginesConfig",
    "EvalConfig",
    "GroupCentredConfig",
    "KlConfig",
    "LoggingConfig",
    "LoraSection",
    "LossConfig",
    "ModelConfig",
    "OfflineConfig",
    "OnPolicyDistillConfig",
    "OptimConfig",
    "PeftTrainerConfig",
    "PromptDistillConfig",
    "RewardModelConfig",
    "RlConfig",
    "RlOptimConfig",
    "RolloutConfig",
    "RunConfig",
    "SamplerConfig",
    "SftConfig",
    "TorchSamplerConfig",
    "VllmSamplerConfig",
    "load_config",
    "parse_yaml",
]
