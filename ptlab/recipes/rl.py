"""Reinforcement learning with a verifiable reward: sample, grade, train, sync, again. One loop, read top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

from ptlab.config import AdditionConfig, Gsm8kConfig, RunConfig
from ptlab.envs.math_problems import addition_task, gsm8k_task
from ptlab.model_info import get_recommended_renderer_name
from ptlab.recipes.interrupt import StopRequestedError, stop_on_signals
from ptlab.renderers import Renderer, get_renderer
from ptlab.rl import datums, diagnostics, rollout
from ptlab.rl.advantages import group_centred
from ptlab.rl.evaluation import evaluate
from ptlab.rl.prefetch import Prefetch
from ptlab.rl.types import EnvGroupBuilder, Task, TrajectoryGroup
from ptlab.runlog import RunLog
from ptlab.types import AdamParams, LossFnType

if TYPE_CHECKING:
    from ptlab.client.sampling import SamplingClient
    from ptlab.client.service import ServiceClient
    from ptlab.client.training import TrainingClient


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """How a run ended, and what it leaves behind."""

    status: Literal["finished", "interrupted"]
    step: int
    """Training steps done; a resumed run starts here."""
    checkpoint: str
    """tinker:// path of the full state after `step` steps."""


async def run(
    config: RunConfig, service_client: ServiceClient, log: RunLog, *, side_metrics: Callable[[], dict[str, float]] = dict
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
    task = make_task(config, get_renderer(config.model.renderer or get_recommended_renderer_name(config.model.name), tokenizer))
    settings, loss_fn = rollout_settings(config), cast("LossFnType", config.loss.name)  # the config knows which there are
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
                        row |= await stop.unless_requested(evaluate_and_log(config, task.test_P, sampling_client, log, step, tokenizer))
                        clock.lap("eval")

                    groups_P, rollout_s = await stop.unless_requested(batches.take(step, sampling_client))
                    clock.lap("sample")
                    data_D = [d for g in groups_P for d in datums.group_to_datums(g, group_centred(g.rewards_G), loss=config.loss.name)]
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
                row = await stop.unless_requested(evaluate_and_log(config, task.test_P, sampling_client, log, done, tokenizer))
                clock.lap("eval")
                log.write(done, row | clock.metrics() | side_metrics())
        except StopRequestedError:  # nothing of the step under way has reached the trainer; what is in flight is gone
            path = await save_checkpoint(training_client, log, done)
            return RunResult(status="interrupted", step=done, checkpoint=path)

        path = await save_checkpoint(training_client, log, done)
        sampler = await training_client.save_weights_for_sampler("final")
        log.checkpoint(done, sampler.path, kind="sampler")
        log.finish()
        return RunResult(status="finished", step=done, checkpoint=path)


async def open_training_client(config: RunConfig, service_client: ServiceClient, log: RunLog) -> tuple[TrainingClient, int]:
    """The trainer and the step it starts with: as the last checkpoint left it, or new."""
    last = log.last_checkpoint()
    if last is not None:
        return await service_client.create_training_client_from_state_with_optimizer(last.path), last.step
    lora = config.lora
    training_client = await service_client.create_lora_training_client(
        base_model=config.model.name,
        rank=lora.rank,
        seed=config.seed if lora.seed is None else lora.seed,
        train_mlp=lora.train_mlp,
        train_attn=lora.train_attn,
        train_unembed=lora.train_unembed,
    )
    return training_client, 0


def make_task(config: RunConfig, renderer: Renderer) -> Task:
    """The environments of config.env."""
    match config.env:
        case AdditionConfig() as env:
            return addition_task(
                renderer,
                groups_per_step=env.groups_per_step,
                group_size=env.group_size,
                num_test=env.num_test,
                seed=config.seed,
                reward=env.reward,
            )
        case Gsm8kConfig() as env:
            return gsm8k_task(
                renderer,
                groups_per_step=env.groups_per_step,
                group_size=env.group_size,
                num_test=env.num_test,
                seed=config.seed,
                train_path=env.train_path,
                test_path=env.test_path,
                hub_name=env.hub_name,
                few_shot=env.few_shot,
                format_coef=env.format_coef,
            )


def rollout_settings(config: RunConfig) -> rollout.RolloutSettings:
    drawn = config.rollout
    return rollout.RolloutSettings(
        max_tokens=drawn.max_tokens, temperature=drawn.temperature, top_k=drawn.top_k, top_p=drawn.top_p, max_turns=drawn.max_turns
    )


def adam_params(config: RunConfig, step: int) -> AdamParams:
    optim = config.optim
    return AdamParams(
        learning_rate=optim.learning_rate_at(step, config.steps),
        beta1=optim.beta1,
        beta2=optim.beta2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        grad_clip_norm=optim.grad_clip_norm,
    )


async def evaluate_and_log(
    config: RunConfig, test_P: Sequence[EnvGroupBuilder], sampling_client: SamplingClient, log: RunLog, step: int, tokenizer: Any
) -> dict[str, float]:
    """Held-out metrics of the sampler's weights; the answers to the first test questions go to the transcripts (always the same ones,
    so that the log can show them before and after)."""
    settings = replace(rollout_settings(config), temperature=config.eval.temperature)
    evaluation = await evaluate(test_P, sampling_client, settings, seed=config.seed, greedy=config.eval.greedy)
    log.transcripts(step, diagnostics.transcript_rows(evaluation.greedy_P or evaluation.groups_P, "eval", tokenizer.decode))
    return evaluation.metrics


async def save_checkpoint(training_client: TrainingClient, log: RunLog, step: int) -> str:
    """Save the full state after `step` steps and note it in the log once it is durable."""
    saved = await training_client.save_state(f"step_{step:06d}", overwrite=True)
    log.checkpoint(step, saved.path)
    return saved.path


def rollout_speed(sampled_tokens: float, rollout_s: float) -> dict[str, float]:
    """Of a batch from its start to its last answer, which is time/sample_s unless it was started before the step that waited for it."""
    return {"time/rollout_s": rollout_s, "time/tokens_per_second": sampled_tokens / max(rollout_s, 1e-9)}


class Clock:
    """Wall clock of the phases of one step."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._phases: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """The time since the last lap was this phase."""
        now = time.perf_counter()
        self._phases[phase] = now - self._last
        self._last = now

    def metrics(self) -> dict[str, float]:
        """time/<phase>_s and time/step_s."""
        metrics = {f"time/{phase}_s": seconds for phase, seconds in self._phases.items()}
        return metrics | {"time/step_s": time.perf_counter() - self._start}
