"""Prompt distillation: what a model does under a long prompt, learnt so that it does it without.

    teacher reads    prefix + question -> samples an answer
    student trains   question -> this answer          cross_entropy, as in recipes/sft.py

Every step asks new questions, so nothing is learnt by heart and nothing needs to be stored.
Source: Askell et al. 2021, arXiv:2112.00861 (context distillation; there on the teacher's whole distribution of the next token, here on
its samples); Snell et al. 2022, arXiv:2209.15189.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ptlab.config.distill import PromptDistillConfig
from ptlab.envs.env_section import TaskSetting
from ptlab.errors import ConfigError
from ptlab.recipes.held_out import HeldOut
from ptlab.recipes.interrupt import StopRequestedError, stop_on_signals
from ptlab.recipes.models import ServiceModels, run_renderer
from ptlab.recipes.sft import token_mean
from ptlab.recipes.teachers import open_teacher
from ptlab.recipes.training import Clock, RunResult, adam_params, finished, interrupted, open_training_client, save_checkpoint
from ptlab.renderers import Message, datum_from_model_input_weights
from ptlab.renderers.prefixed import PrefixedRenderer
from ptlab.rl import diagnostics, rollout
from ptlab.rl.types import EnvGroupBuilder, Observation, TrajectoryGroup
from ptlab.runlog import RunLog
from ptlab.types import Datum, ModelInput

if TYPE_CHECKING:
    from ptlab.client.service import ServiceClient


async def run(
    config: PromptDistillConfig, service_client: ServiceClient, log: RunLog, *, side_metrics: Callable[[], dict[str, float]] = dict
) -> RunResult:
    """Train as `config` says, from the log's last checkpoint if it has one; every step leaves a row in the log.

    reward/..., train/accuracy and answer/... of a row are the teacher's; eval/... the student's, without the prefix. SIGINT or SIGTERM
    ends the run with a checkpoint.

    Raises: ConfigError for a teacher with another tokenizer, or an environment of several turns; EngineError and its kin.
    """
    training_client, start = await open_training_client(config, service_client, log)
    tokenizer = training_client.get_tokenizer()
    renderer = run_renderer(config.model, tokenizer)
    models = ServiceModels(service_client, config.model, renderer)
    teacher = await open_teacher(config.teacher, models, renderer)
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
    prefix: list[Message] = [{"role": message.role, "content": message.content} for message in config.prefix]
    prompted = await config.env.make_task(TaskSetting(renderer=PrefixedRenderer(renderer, prefix), seed=config.seed, models=models))

    with stop_on_signals() as stop:
        done = start  # steps
        try:
            for step in range(start, config.steps):
                clock = Clock()
                row = {"optim/learning_rate": config.optim.learning_rate_at(step, config.steps)}
                if held_out.due(step):
                    row |= await stop.unless_requested(held_out.of_trainer(training_client, log, step))
                    clock.lap("eval")

                sampling = rollout.run_groups(
                    prompted.train.get_batch(step), teacher, held_out.settings, seed=(config.seed, "teacher", step)
                )
                groups_P = await stop.unless_requested(sampling)
                clock.lap("sample")
                plain_P = [await first_observations(builder) for builder in held_out.task.train.get_batch(step)]  # the same questions
                data_D = [
                    datum
                    for group, plain_G in zip(groups_P, plain_P, strict=True)
                    for datum in student_datums(group, plain_G, only_right=config.keep == "right")
                ]

                row |= diagnostics.summarise(groups_P, data_D, None, num_updates=None)
                row |= {"groups/skipped": 0.0}  # no reward trains here, so groups that agree train like others
                if data_D:
                    trained = training_client.forward_backward(token_mean(data_D), "cross_entropy")  # both queued
                    updated = training_client.optim_step(adam_params(config, step))  # before either is awaited
                    output, optim = await trained, await updated
                    row |= {"train/nll": output.metrics["loss:sum"], **diagnostics.optim_metrics(optim)}  # before the update
                clock.lap("train")

                log.write(step, row | clock.metrics() | side_metrics())
                log.transcripts(step, diagnostics.transcript_rows(groups_P, "teacher", tokenizer.decode))
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


async def first_observations(builder: EnvGroupBuilder) -> list[Observation]:
    """What each attempt of a group sees first."""
    try:
        envs_G = await builder.make_envs()
        observations_G = [(await env.initial_observation())[0] for env in envs_G]
        for env in envs_G:
            await env.close()
        return observations_G
    finally:
        await builder.cleanup()


def student_datums(group: TrajectoryGroup, plain_G: Sequence[Observation], *, only_right: bool) -> list[Datum]:
    """The teacher's answers behind the questions as the student reads them; none of a group that lost an attempt.

    Args:
        plain_G: per attempt, the question without the prefix.
    Raises: ConfigError for an attempt of several turns, which quotes what the student has not seen.
    """
    if len(plain_G) != len(group.trajectories_G):  # which question belongs to which answer is not known any more
        return []
    data: list[Datum] = []
    for trajectory, plain in zip(group.trajectories_G, plain_G, strict=True):
        if len(trajectory.transitions) > 1:
            raise ConfigError(
                f"an attempt has {len(trajectory.transitions)} turns; prompt distillation takes an env of one question and one answer"
            )
        right = diagnostics.last_metrics(trajectory).get("correct", 0.0) >= 1.0
        for turn in trajectory.transitions if right or not only_right else ():
            question, answer = plain.to_ints(), list(turn.action)
            weights = np.asarray([0.0] * len(question) + [1.0] * len(answer), dtype=np.float32)
            data.append(datum_from_model_input_weights(ModelInput.from_ints([*question, *answer]), weights))
    return data
