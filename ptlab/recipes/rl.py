"""Reinforcement learning with a verifiable reward: sample, grade, train, sync, again. One loop, read top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from ptlab.config import RlConfig
from ptlab.envs.env_section import TaskSetting
from ptlab.recipes.interrupt import StopRequestedError, stop_on_signals
from ptlab.recipes.models import ServiceModels, run_renderer
from ptlab.recipes.training import Clock, RunResult, adam_params, finished, interrupted, open_training_client, save_checkpoint
from ptlab.rl import datums, diagnostics, rollout
from ptlab.rl.advantages import group_centred
from ptlab.rl.evaluation import evaluate
from ptlab.rl.kl_penalty import add_kl_penalty
from ptlab.rl.prefetch import Prefetch
from ptlab.rl.types import EnvGroupBuilder, TrajectoryGroup
from ptlab.runlog import RunLog
from ptlab.types import Datum, LossFnType

if TYPE_CHECKING:
    from ptlab.client.sampling import SamplingClient
    from ptlab.client.service import ServiceClient


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
    setting = TaskSetting(renderer=renderer, seed=config.seed, models=models, test_attempts=config.eval.attempts)
    task = await config.env.make_task(setting)
    reference = (await models.open(model_path=config.kl.reference))[0] if config.kl.coef else None
    settings, loss_fn = rollout_settings(config, await models.context_length()), cast("LossFnType", config.loss.name)
    sampling_client = await training_client.save_weights_and_get_sampling_client()
    num_updates = 0 if start == 0 else None  # a resumed trainer's count shows in the first samples, which are its own

    async def sample(step: int, newest: SamplingClient) -> list[TrajectoryGroup]:
        return await rollout.run_groups(task.train.get_batch(step), newest, settings, seed=(config.seed, "train", step))

    with stop_on_signals() as stop:
        done = start  # steps
        try:
            async with Prefetch(sample, first=start, end=config.steps, ahead=config.rollout.max_steps_off_policy) as batches:
                for step in range(start, config.steps):
                    clock = Clock()
                    row = {"optim/learning_rate": config.optim.learning_rate_at(step, config.steps)}
                    if config.eval.every and step % config.eval.every == 0:
                        evaluation = evaluate_and_log(config, settings, task.test_P, sampling_client, log, step, tokenizer)
                        row |= await stop.unless_requested(evaluation)
                        clock.lap("eval")

                    groups_P, rollout_s = await stop.unless_requested(batches.take(step, sampling_client))
                    clock.lap("sample")
                    data_D, kl = await stop.unless_requested(training_data(config, groups_P, reference))
                    row |= kl
                    if num_updates is None:
                        num_updates = diagnostics.newest_version(groups_P)

                    if data_D:
                        trained = training_client.forward_backward(data_D, loss_fn, config.loss.config)  # both queued
                        updated = training_client.optim_step(adam_params(config, step))  # before either is awaited
                        output, optim = await trained, await updated
                        clock.lap("train")
                        sampling_client = await training_client.save_weights_and_get_sampling_client()
                        clock.lap("sync")
                        row |= diagnostics.summarise(groups_P, data_D, output, num_updates=num_updates)
                        row |= diagnostics.optim_metrics(optim)
                        num_updates = None if num_updates is None else num_updates + (not row.get("optim/skipped"))
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
                evaluation = evaluate_and_log(config, settings, task.test_P, sampling_client, log, done, tokenizer)
                row = await stop.unless_requested(evaluation)
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


def rollout_settings(config: RlConfig, context_length: int | None) -> rollout.RolloutSettings:
    """How the config draws attempts; none longer than the model's context (None = the server does not say)."""
    drawn = config.rollout
    limits = [limit for limit in (drawn.max_trajectory_tokens, context_length) if limit is not None]
    return rollout.RolloutSettings(
        max_tokens=drawn.max_tokens,
        temperature=drawn.temperature,
        top_k=drawn.top_k,
        top_p=drawn.top_p,
        max_turns=drawn.max_turns,
        max_trajectory_tokens=min(limits, default=None),
        timeout_s=drawn.timeout_s,
    )


async def evaluate_and_log(
    config: RlConfig,
    settings: rollout.RolloutSettings,
    test_P: Sequence[EnvGroupBuilder],
    sampling_client: SamplingClient,
    log: RunLog,
    step: int,
    tokenizer: Any,
) -> dict[str, float]:
    """Held-out metrics of the sampler's weights; the answers to the first test questions go to the transcripts (always the same ones,
    so that the log can show them before and after)."""
    settings = replace(settings, temperature=config.eval.temperature)
    evaluation = await evaluate(test_P, sampling_client, settings, seed=config.seed, greedy=config.eval.greedy)
    log.transcripts(step, diagnostics.transcript_rows(evaluation.greedy_P or evaluation.groups_P, "eval", tokenizer.decode))
    return evaluation.metrics


def rollout_speed(sampled_tokens: float, rollout_s: float) -> dict[str, float]:
    """Of a batch from its start to its last answer, which is time/sample_s unless it was started before the step that waited for it."""
    return {"time/rollout_s": rollout_s, "time/tokens_per_second": sampled_tokens / max(rollout_s, 1e-9)}
