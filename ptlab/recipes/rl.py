"""Reinforcement learning with a verifiable reward: sample, grade, train, sync, again. One loop, read top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

from ptlab.config import RlConfig
from ptlab.recipes.held_out import HeldOut
from ptlab.recipes.interrupt import StopRequestedError, stop_on_signals
from ptlab.recipes.models import ServiceModels, run_renderer
from ptlab.recipes.training import Clock, RunResult, adam_params, finished, interrupted, open_training_client, save_checkpoint
from ptlab.rl import datums, diagnostics, rollout, updates
from ptlab.rl.advantages import group_centred
from ptlab.rl.kl_penalty import add_kl_penalty
from ptlab.rl.prefetch import Prefetch
from ptlab.rl.rollout_correction import corrected
from ptlab.rl.types import TrajectoryGroup
from ptlab.runlog import RunLog
from ptlab.types import Datum, ForwardBackwardOutput, LossFnType, OptimStepResponse

if TYPE_CHECKING:
    from ptlab.client.sampling import SamplingClient
    from ptlab.client.service import ServiceClient
    from ptlab.client.training import TrainingClient


async def run(
    config: RlConfig, service_client: ServiceClient, log: RunLog, *, side_metrics: Callable[[], dict[str, float]] = dict
) -> RunResult:
    """Train as `config` says, from the log's last checkpoint if it has one; every step leaves a row in the log.

    Row s holds the batch that step s trained on, how it trained, and, where one is due, an evaluation of the weights after s steps. The
    batch was sampled with these weights, or with ones up to config.rollout.max_steps_off_policy steps older. The row after the last step
    holds an evaluation only. SIGINT or SIGTERM ends the run with a checkpoint.

    Args:
        side_metrics: asked once per row for what the clients do not tell, e.g. the `sync/*` metrics of the backend in this process.
    Raises: ConfigError for a missing data set; EngineError and its kin.
    """
    training_client, start = await open_training_client(config, service_client, log)
    tokenizer = training_client.get_tokenizer()
    renderer = run_renderer(config.model, tokenizer)
    models = ServiceModels(service_client, config.model, renderer)
    held_out = await HeldOut.open(
        config.env,
        config.rollout,
        config.eval,
        seed=config.seed,
        model=config.model,
        renderer=renderer,
        service_client=service_client,
        tokenizer=tokenizer,
    )
    reference = (await models.open(model_path=config.kl.reference))[0] if config.kl.coef else None
    loss_fn = cast("LossFnType", config.loss.name)  # the config knows which there are
    sampling_client = await training_client.save_weights_and_get_sampling_client()
    num_updates = 0 if start == 0 else None  # a resumed trainer's count shows in the first samples, which are its own

    async def sample(step: int, newest: SamplingClient) -> list[TrajectoryGroup]:
        return await rollout.run_groups(held_out.task.train.get_batch(step), newest, held_out.settings, seed=(config.seed, "train", step))

    with stop_on_signals() as stop:
        done = start  # steps
        try:
            async with Prefetch(sample, first=start, end=config.steps, ahead=config.rollout.max_steps_off_policy) as batches:
                for step in range(start, config.steps):
                    clock = Clock()
                    row = {"optim/learning_rate": config.optim.learning_rate_at(step, config.steps)}
                    if held_out.due(step):
                        row |= await stop.unless_requested(held_out.of_sampler(sampling_client, log, step))
                        clock.lap("eval")

                    groups_P, rollout_s = await stop.unless_requested(batches.take(step, sampling_client))
                    clock.lap("sample")
                    data_D, kl = await stop.unless_requested(training_data(config, groups_P, reference))
                    row |= kl
                    if num_updates is None:
                        num_updates = diagnostics.newest_version(groups_P)

                    if data_D:
                        taught_D, correction = await stop.unless_requested(
                            corrected(data_D, config.correction, training_client, loss_fn, config.loss.config)
                        )
                        output, optim = await train(config, training_client, taught_D, loss_fn, step)
                        clock.lap("train")
                        sampling_client = await training_client.save_weights_and_get_sampling_client()
                        clock.lap("sync")
                        row |= diagnostics.summarise(groups_P, data_D, output, num_updates=num_updates)
                        row |= correction | diagnostics.optim_metrics(optim)
                        num_updates = None if num_updates is None else num_updates + int(row["optim/updates"])
                    else:  # every group agreed: nothing to learn from, and the sampler already holds these weights
                        row |= diagnostics.summarise(groups_P, [], None, num_updates=num_updates)

                    log.write(step, row | clock.metrics() | rollout_speed(row["answer/tokens_sum"], rollout_s) | side_metrics())
                    log.transcripts(step, diagnostics.transcript_rows(groups_P, "train", tokenizer.decode))
                    done = step + 1
                    if stop.requested:
                        raise StopRequestedError
                    if config.checkpoint.every and done % config.checkpoint.every == 0 and done < config.steps:
                        await save_checkpoint(training_client, log, done)

            if config.eval.every:
                clock = Clock()
                row = await stop.unless_requested(held_out.of_sampler(sampling_client, log, done))
                clock.lap("eval")
                log.write(done, row | clock.metrics() | side_metrics())
        except StopRequestedError:  # nothing of the step under way has reached the trainer; what is in flight is gone
            return await interrupted(training_client, log, done)

        return await finished(training_client, log, done)


async def training_data(
    config: RlConfig, groups_P: Sequence[TrajectoryGroup], reference: SamplingClient | None
) -> tuple[list[Datum], dict[str, float]]:
    """Rewards -> advantages -> datums, with the penalty on leaving the reference where there is one, and its `kl/*` metrics."""
    data_D = [
        datum
        for group in groups_P
        for datum in datums.group_to_datums(
            group, group_centred(group.rewards_G), loss=config.loss.name, mark_sampled=reference is not None
        )
    ]
    return (data_D, {}) if reference is None else await add_kl_penalty(data_D, reference, config.kl.coef)


async def train(
    config: RlConfig, training_client: TrainingClient, data_D: Sequence[Datum], loss_fn: LossFnType, step: int
) -> tuple[ForwardBackwardOutput, OptimStepResponse]:
    """One forward_backward and one optimizer step, or several of each on parts of the batch; all queued before anything is awaited."""
    queued = [
        (
            training_client.forward_backward(part_D, loss_fn, config.loss.config),
            training_client.optim_step(adam_params(config, step)),
        )
        for part_D in updates.minibatches(data_D, config.optim.updates_per_batch)
    ]
    outputs, steps = [await trained for trained, _ in queued], [await updated for _, updated in queued]
    return updates.joined_output(outputs), updates.joined_steps(steps)


def rollout_speed(sampled_tokens: float, rollout_s: float) -> dict[str, float]:
    """Of a batch from its start to its last answer, which is time/sample_s unless it was started before the step that waited for it."""
    return {"time/rollout_s": rollout_s, "time/tokens_per_second": sampled_tokens / max(rollout_s, 1e-9)}
