"""Which recipes there are, by the config each takes. A new one is a file here, a file in recipes/, and one line in each table."""

from __future__ import annotations

from collections.abc import Mapping

from ptlab.config.distill import OnPolicyDistillConfig, PromptDistillConfig
from ptlab.config.offline import OfflineConfig
from ptlab.config.preference import DpoConfig, RewardModelConfig
from ptlab.config.rl import RlConfig
from ptlab.config.run import RunConfig
from ptlab.config.sft import SftConfig

CONFIGS: Mapping[str, type[RunConfig]] = {
    "rl": RlConfig,
    "sft": SftConfig,
    "reward_model": RewardModelConfig,
    "dpo": DpoConfig,
    "offline": OfflineConfig,
    "on_policy_distill": OnPolicyDistillConfig,
    "prompt_distill": PromptDistillConfig,
}
"""`recipe:` of a config file -> its class."""
