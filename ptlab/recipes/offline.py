"""Reinforcement learning from a file: the rollouts were sampled once, by whoever it was; what remains is to train on them.

The rewards of a group (or of the file) make the advantages, as in recipes/rl.py. The policy moves away from the one that sampled, step by
step, and nobody samples again: a loss must stand that. dro does, by pulling log p towards log q of the file (docs/losses.md,
docs/recipes/offline.md); the importance weights of the others say less and less.
"""

from __future__ import annotations

import hashlib
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from pydantic import TypeAdapter, ValidationError

from ptlab.config import RlConfig, RolloutConfig
from ptlab.config.offline import OfflineConfig
from ptlab.envs.env_section import EnvSection
from ptlab.envs.table import EnvConfig
from ptlab.errors import ConfigError
from ptlab.recipes.collect import collect, header_of
from ptlab.recipes.held_out import HeldOut
from ptlab.recipes.interrupt import StopRequestedError, stop_on_signals
from ptlab.recipes.models import run_renderer
from ptlab.recipes.training import Clock, RunResult, adam_params, finished, interrupted, open_training_client, save_checkpoint
from ptlab.rl import datums, diagnostics
from ptlab.rl.advantages import group_centred
from ptlab.rl.epochs import rows_of_step
from ptlab.rl.rollout_file import RolloutHeader, read_rollouts
from ptlab.rl.seeds import stable_seed
from ptlab.rl.types import TrajectoryGroup
from ptlab.runlog import RunLog
from ptlab.types import Datum, LossFnType, TensorData

if TYPE_CHECKING:
    from ptlab.client.service import ServiceClient


async def run(
    config: OfflineConfig, service_client: ServiceClient, log: RunLog, *, side_metrics: Callable[[], dict[str, float]] = dict
) -> RunResult:
    """Train on the file as `config` says, from the log's last checkpoint if it has one; every step leaves a row in the log.

    Row s holds the batch of step s and, where one is due, an evaluation of the weights after s steps; the row after the last step holds an
    evaluation only. SIGINT or SIGTERM ends the run with a checkpoint.

    Raises: ConfigError for a file that is torn or was sampled from another base model; EngineError and its kin.
    """
    path = await rollout_path(config, service_client)
    rollouts = read_rollouts(path)
    check_model(config, rollouts.header, path)
    groups = graded_groups(rollouts.groups, config, path)
    training_client, start = await open_training_client(config, service_client, log)
    tokenizer = training_client.get_tokenizer()
    held_out = await HeldOut.open(
        config.env or env_of(rollouts.header, path),
        config.rollout or RolloutConfig.model_validate(rollouts.header.rollout),
        config.eval,
        seed=config.seed,
        model=config.model,
        renderer=run_renderer(config.model, tokenizer),
        service_client=service_client,
        tokenizer=tokenizer,
    )
    loss_fn = cast("LossFnType", config.loss.name)  # the config knows which there are

    with stop_on_signals() as stop:
        done = start  # steps
        try:
            for step in range(start, config.steps):
                clock = Clock()
                row = {"optim/learning_rate": config.optim.learning_rate_at(step, config.steps)}
                if held_out.due(step):
                    row |= await stop.unless_requested(held_out.of_trainer(training_client, log, step))
                    clock.lap("eval")

                rows = rows_of_step(len(groups), config.data.groups_per_step, seed=config.seed, step=step)
                batch_P = [groups[index] for index in rows]
                data_D = [datum for group in batch_P for datum in offline_datums(group, config.loss.name)]

                trained = training_client.forward_backward(data_D, loss_fn, config.loss.config)  # both queued
                updated = training_client.optim_step(adam_params(config, step))  # before either is awaited
                output, optim = await trained, await updated
                clock.lap("train")

                row |= file_metrics(batch_P, data_D, epoch=(step + 1) * config.data.groups_per_step / len(groups))
                row |= {} if config.loss.name == "cross_entropy" else diagnostics.gap_metrics(data_D, output)
                row |= {f"loss/{name.replace(':', '_').removeprefix('loss_')}": value for name, value in output.metrics.items()}
                log.write(step, row | diagnostics.optim_metrics(optim) | clock.metrics() | side_metrics())
                done = step + 1
                if stop.requested:
                    raise StopRequestedError
                if config.checkpoint.every and done % config.checkpoint.every == 0 and done < config.steps:
                    await save_checkpoint(training_client, log, done)

            if config.eval.every:
                clock = Clock()
                row = await stop.unless_requested(held_out.of_trainer(training_client, log, done))
                clock.lap("eval")
                log.write(done, row | clock.metrics() | side_metrics())
        except StopRequestedError:  # nothing of the step under way has reached the trainer
            return await interrupted(training_client, log, done)

        return await finished(training_client, log, done)


async def rollout_path(config: OfflineConfig, service_client: ServiceClient) -> Path:
    """The file that the config names; without one, one collected for its model, env, rollout and seed, now or by an earlier run."""
    if config.data.path is not None:
        return Path(config.data.path)
    assert config.env is not None, "the config checks that"
    rollout = config.rollout or RolloutConfig()
    collecting = RlConfig(name=config.name, seed=config.seed, model=config.model, env=config.env, rollout=rollout)
    header = header_of(collecting, num_rollouts=config.data.num_rollouts)
    digest = hashlib.sha256(header.model_dump_json().encode()).hexdigest()[:12]
    path = Path(config.run_dir) / f"rollouts-{digest}.jsonl"
    if not path.exists():
        await collect(collecting, service_client, path, num_rollouts=config.data.num_rollouts)
    return path


@dataclass(frozen=True, slots=True, kw_only=True)
class GradedGroup:
    """A group of the file and what its trajectories are worth to the loss."""

    group: TrajectoryGroup
    rewards_G: Sequence[float]
    """The file's own, or dealt out anew for the control."""
    advantages_G: Sequence[float]


def graded_groups(groups: Sequence[TrajectoryGroup], config: OfflineConfig, path: Path) -> list[GradedGroup]:
    """The groups that teach: those with an advantage that is not 0 (cross_entropy: above 0). Raises: ConfigError if there is none."""
    data, imitates = config.data, config.loss.name == "cross_entropy"
    rewards_P = [group.rewards_G for group in groups]
    if data.shuffle_rewards:
        rewards_P = dealt_anew(rewards_P, seed=stable_seed(config.seed, "shuffle_rewards"))
    file_mean = statistics.fmean(reward for rewards_G in rewards_P for reward in rewards_G)
    graded = [
        GradedGroup(
            group=group,
            rewards_G=rewards_G,
            advantages_G=group_centred(rewards_G) if data.baseline == "group_mean" else [reward - file_mean for reward in rewards_G],
        )
        for group, rewards_G in zip(groups, rewards_P, strict=True)
    ]
    teaching = [item for item in graded if any(advantage > 0 or (advantage != 0 and not imitates) for advantage in item.advantages_G)]
    if not teaching:
        hint = "set data.baseline=file_mean, or " if data.baseline == "group_mean" else ""
        raise ConfigError(
            f"{path}: the rewards of each of its {len(groups)} groups agree, so no advantage differs from 0; {hint}collect others"
        )
    return teaching


def dealt_anew(rewards_P: Sequence[Sequence[float]], *, seed: int) -> list[list[float]]:
    """The same rewards in the same shape, in a random order over all groups."""
    dealt = [reward for rewards_G in rewards_P for reward in rewards_G]
    random.Random(seed).shuffle(dealt)
    rest = iter(dealt)
    return [[next(rest) for _ in rewards_G] for rewards_G in rewards_P]


def offline_datums(item: GradedGroup, loss: str) -> list[Datum]:
    """The datums of one group. For cross_entropy: the trajectories above the baseline, weight 1.0 on what was sampled."""
    if loss != "cross_entropy":
        return datums.group_to_datums(item.group, item.advantages_G, loss=loss)
    return [
        imitation_datum(datum)
        for trajectory, advantage in zip(item.group.trajectories_G, item.advantages_G, strict=True)
        if advantage > 0
        for datum in datums.trajectory_to_datums(trajectory, 1.0)
    ]


def imitation_datum(datum: Datum) -> Datum:
    """A datum of an advantage loss, made with advantage 1.0, for cross_entropy: 1.0 on the sampled tokens becomes their weight."""
    sampled_T = datum.loss_fn_inputs["advantages"].to_numpy().astype(np.float32)
    inputs = {"target_tokens": datum.loss_fn_inputs["target_tokens"], "weights": TensorData.from_numpy(sampled_T)}
    return Datum(model_input=datum.model_input, loss_fn_inputs=inputs)


def file_metrics(batch_P: Sequence[GradedGroup], data_D: Sequence[Datum], *, epoch: float) -> dict[str, float]:
    """data/...: of the file's rollouts, not of the policy that trains (eval/... is)."""
    rewards = [reward for item in batch_P for reward in item.rewards_G]
    return {
        "data/reward_mean": statistics.fmean(rewards),
        "data/advantage_abs_mean": statistics.fmean(math.fabs(advantage) for item in batch_P for advantage in item.advantages_G),
        "data/epoch": epoch,
        "batch/datums": float(len(data_D)),
        "batch/tokens": float(sum(datum.model_input.length for datum in data_D)),
    }


def check_model(config: OfflineConfig, header: RolloutHeader, path: Path) -> None:
    """Raises: ConfigError if the file's tokens are another model's."""
    if header.model != config.model.name:
        raise ConfigError(
            f"{path} was sampled from {header.model!r}, model.name is {config.model.name!r}: tokens and log-probabilities are "
            f"that model's; set model.name={header.model}"
        )


def env_of(header: RolloutHeader, path: Path) -> EnvSection:
    """The environment that the file was collected on. Raises: ConfigError if this version has none like it."""
    try:
        env: EnvSection = TypeAdapter(EnvConfig).validate_python(header.env)
    except ValidationError as err:
        found = err.errors(include_url=False)[0]["msg"]
        raise ConfigError(
            f"{path}: its env {header.env.get('kind')!r} is not one of this version ({found}); set env in the config"
        ) from err
    return env
