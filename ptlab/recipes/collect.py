"""Sample once, keep it: the rollouts of a config's task into a file that recipes/offline.py trains on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ptlab.config import RlConfig
from ptlab.envs.env_section import TaskSetting
from ptlab.recipes.held_out import rollout_settings
from ptlab.recipes.models import ServiceModels, run_renderer
from ptlab.rl import diagnostics
from ptlab.rl.rollout import run_groups
from ptlab.rl.rollout_file import RolloutHeader, RolloutWriter

if TYPE_CHECKING:
    from ptlab.client.service import ServiceClient


async def collect(
    config: RlConfig,
    service_client: ServiceClient,
    path: Path,
    *,
    num_rollouts: int,
    weights: str | None = None,
    overwrite: bool = False,
    report: Callable[[str], object] = print,
) -> None:
    """`num_rollouts` attempts (rounded up to whole groups) at the config's training problems into `path`, as training step 0, 1, ...
    of the config would meet them. A collection that was cut off goes on where it stopped.

    Args:
        weights: who samples: a tinker:// path or a checkpoint directory; None = the base model.
    Raises: ConfigError if the file exists or holds other rollouts; EngineError and its kin.
    """
    base = await service_client.create_sampling_client(base_model=config.model.name)
    renderer = run_renderer(config.model, base.get_tokenizer())
    models = ServiceModels(service_client, config.model, renderer)
    sampling_client = base if weights is None else (await models.open(model_path=weights))[0]
    task = await config.env.make_task(TaskSetting(renderer=renderer, seed=config.seed, models=models))
    settings = rollout_settings(config.rollout, await models.context_length())
    header = header_of(config, num_rollouts=num_rollouts, weights=weights)
    per_step = config.env.groups_per_step
    with RolloutWriter(path, header, batch=per_step, overwrite=overwrite) as writer:
        while writer.groups_done < header.num_groups:
            step = writer.groups_done // per_step
            builders_P = task.train.get_batch(step)[: header.num_groups - writer.groups_done]
            groups_P = await run_groups(builders_P, sampling_client, settings, seed=(config.seed, "collect", step))
            writer.append(groups_P)
            rewards = diagnostics.reward_metrics(groups_P)
            report(f"{writer.groups_done}/{header.num_groups} groups, reward {rewards.get('reward/mean', 0.0):.3f}")
        writer.finish()
    report(f"{path}: {writer.num_trajectories} rollouts of {header.num_groups} groups")


def header_of(config: RlConfig, *, num_rollouts: int, weights: str | None = None) -> RolloutHeader:
    """What a file collected like this says of itself."""
    return RolloutHeader(
        model=config.model.name,
        weights=weights,
        renderer=config.model.renderer,
        env=config.env.model_dump(),
        rollout=config.rollout.model_dump(),
        seed=config.seed,
        num_groups=-(-num_rollouts // config.env.group_size),
    )
