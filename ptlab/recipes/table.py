"""Which loop runs which config. A new recipe is a file here, a file in config/, and one line in each table."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ptlab.config import (
    DpoConfig,
    OfflineConfig,
    OnPolicyDistillConfig,
    PromptDistillConfig,
    RewardModelConfig,
    RlConfig,
    RunConfig,
    SftConfig,
)
from ptlab.errors import ConfigError
from ptlab.recipes import offline, on_policy_distill, preference, prompt_distill, rl, sft
from ptlab.recipes.training import RunResult
from ptlab.runlog import RunLog

if TYPE_CHECKING:
    from ptlab.client.service import ServiceClient


async def run(
    config: RunConfig, service_client: ServiceClient, log: RunLog, *, side_metrics: Callable[[], dict[str, float]] = dict
) -> RunResult:
    """Run the recipe of this config; see the `run` of each."""
    match config:
        case RlConfig():
            return await rl.run(config, service_client, log, side_metrics=side_metrics)
        case SftConfig():
            return await sft.run(config, service_client, log, side_metrics=side_metrics)
        case OfflineConfig():
            return await offline.run(config, service_client, log, side_metrics=side_metrics)
        case OnPolicyDistillConfig():
            return await on_policy_distill.run(config, service_client, log, side_metrics=side_metrics)
        case PromptDistillConfig():
            return await prompt_distill.run(config, service_client, log, side_metrics=side_metrics)
        case RewardModelConfig() | DpoConfig():
            return await preference.run(config, service_client, log, side_metrics=side_metrics)
    raise ConfigError(f"recipe {config.recipe!r} has a config but no loop; add it to ptlab/recipes/table.py")
