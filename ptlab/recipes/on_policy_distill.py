"""On-policy distillation: the student writes, the teacher scores every token, the student trains. A sibling of recipes/rl.py.

    advantage_t = -kl_coef * (d_t - mean d),    d_t = log q_student(token_t | before) - log p_teacher(token_t | before)

The mean of d_t over the student's own tokens is the reverse KL per token, which this descends: a signal on each token, where a reward says
one thing about a whole answer, and on the texts that the student really writes, where imitation sees the teacher's only.
Source: Agarwal et al. 2024, arXiv:2306.13649, with reverse KL and samples of the student only; Lu and Thinking Machines Lab 2025,
"On-Policy Distillation", from which the per-token form without a look at later tokens (discount 0). Deviation: the advantages are centred
over the batch, a baseline (rl/kl_penalty.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from ptlab.config.distill import OnPolicyDistillConfig
from ptlab.recipes.held_out import HeldOut
from ptlab.recipes.interrupt import StopRequestedError, stop_on_signals
from ptlab.recipes.models import ServiceModels, run_renderer
from ptlab.recipes.teachers import open_teacher
from ptlab.recipes.training import Clock, RunResult, adam_params, finished, interrupted, open_training_client, save_checkpoint
from ptlab.rl import datums, diagnostics, rollout
from ptlab.rl.kl_penalty import add_kl_penalty
from ptlab.runlog import RunLog
from ptlab.types import LossFnType

if TYPE_CHECKING:
    from ptlab.client.service import ServiceClient


async def run(
    config: OnPolicyDistillConfig, service_client: ServiceClient, log: RunLog, *, side_metrics: Callable[[], dict[str, float]] = dict
) -> RunResult:
    """Train as `config` says, from the log's last checkpoint if it has one; every step leaves a row in the log.

    kl/policy_reference_nats of row s is the reverse KL per token of the student after s steps. SIGINT or SIGTERM ends the run with a
    checkpoint.

    Raises: ConfigError for a teacher with another tokenizer; EngineError and its kin.
    """
    training_client, start = await open_training_client(config, service_client, log)
    tokenizer = training_client.get_tokenizer()
    renderer = run_renderer(config.model, tokenizer)
    teacher = await open_teacher(config.teacher, ServiceModels(service_client, config.model, renderer), renderer)
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
    loss_fn = cast("LossFnType", config.loss.name)  # the config knows which there are
    sampling_client = await training_client.save_weights_and_get_sampling_client()

    with stop_on_signals() as stop:
        done = start  # steps
        try:
            for step in range(start, config.steps):
                clock = Clock()
                row = {"optim/learning_rate": config.optim.learning_rate_at(step, config.steps)}
                if held_out.due(step):
                    row |= await stop.unless_requested(held_out.of_sampler(sampling_client, log, step))
                    clock.lap("eval")

                builders_P = held_out.task.train.get_batch(step)
                sampling = rollout.run_groups(builders_P, sampling_client, held_out.settings, seed=(config.seed, "train", step))
                groups_P = await stop.unless_requested(sampling)
                clock.lap("sample")
                unpaid_D = [
                    datum
                    for group in groups_P
                    for datum in datums.group_to_datums(group, [0.0] * len(group.rewards_G), loss=config.loss.name, mark_sampled=True)
                ]
                data_D, kl_metrics = await stop.unless_requested(add_kl_penalty(unpaid_D, teacher, config.kl_coef))
                clock.lap("teacher")

                trained = training_client.forward_backward(data_D, loss_fn, config.loss.config)  # both queued
                updated = training_client.optim_step(adam_params(config, step))  # before either is awaited
                output, optim = await trained, await updated
                clock.lap("train")
                sampling_client = await training_client.save_weights_and_get_sampling_client()
                clock.lap("sync")

                row |= diagnostics.summarise(groups_P, data_D, output, num_updates=None) | kl_metrics | diagnostics.optim_metrics(optim)
                row |= {"groups/skipped": 0.0}  # no reward trains here, so groups that agree train like others
                log.write(step, row | clock.metrics() | side_metrics())
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
        except StopRequestedError:  # nothing of the step under way has reached the trainer
            return await interrupted(training_client, log, done)

        return await finished(training_client, log, done)
