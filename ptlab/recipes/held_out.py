"""The task of a recipe, and its held-out problems, asked now and then for the curve."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ptlab.config import EvalConfig, ModelConfig, RolloutConfig
from ptlab.envs.env_section import EnvSection, TaskSetting
from ptlab.recipes.models import ServiceModels
from ptlab.renderers import Renderer
from ptlab.rl import diagnostics
from ptlab.rl.evaluation import evaluate
from ptlab.rl.rollout import RolloutSettings
from ptlab.rl.types import Task
from ptlab.runlog import RunLog

if TYPE_CHECKING:
    from ptlab.client.sampling import SamplingClient
    from ptlab.client.service import ServiceClient
    from ptlab.client.training import TrainingClient


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Held-out problems, and how they are asked. Make it with `open`."""

    task: Task
    settings: RolloutSettings
    eval: EvalConfig
    seed: int
    tokenizer: Any

    @classmethod
    async def open(
        cls,
        env: EnvSection,
        rollout: RolloutConfig,
        eval_config: EvalConfig,
        *,
        seed: int,
        model: ModelConfig,
        renderer: Renderer,
        service_client: ServiceClient,
        tokenizer: Any,
    ) -> HeldOut:
        """Raises: ConfigError for data of the environment that is missing."""
        models = ServiceModels(service_client, model, renderer)
        setting = TaskSetting(renderer=renderer, seed=seed, models=models, test_attempts=eval_config.attempts)
        settings = rollout_settings(rollout, await models.context_length())
        return cls(task=await env.make_task(setting), settings=settings, eval=eval_config, seed=seed, tokenizer=tokenizer)

    def due(self, step: int) -> bool:
        return bool(self.eval.every) and step % self.eval.every == 0

    async def of_trainer(self, training_client: TrainingClient, log: RunLog, step: int) -> dict[str, float]:
        """Metrics eval/... of the trainer's weights, which go to the sampler for it."""
        return await self.of_sampler(await training_client.save_weights_and_get_sampling_client(), log, step)

    async def of_sampler(self, sampling_client: SamplingClient, log: RunLog, step: int) -> dict[str, float]:
        """Metrics eval/... of these weights; the answers to the first problems go to the transcripts (always the same problems, so that
        the log can show them before and after)."""
        settings = replace(self.settings, temperature=self.eval.temperature)
        evaluation = await evaluate(self.task.test_P, sampling_client, settings, seed=self.seed, greedy=self.eval.greedy)
        log.transcripts(step, diagnostics.transcript_rows(evaluation.greedy_P or evaluation.groups_P, "eval", self.tokenizer.decode))
        return evaluation.metrics


def rollout_settings(drawn: RolloutConfig, context_length: int | None) -> RolloutSettings:
    """How attempts are drawn; none longer than the model's context (None = the server does not say)."""
    limits = [limit for limit in (drawn.max_trajectory_tokens, context_length) if limit is not None]
    return RolloutSettings(
        max_tokens=drawn.max_tokens,
        temperature=drawn.temperature,
        top_k=drawn.top_k,
        top_p=drawn.top_p,
        max_turns=drawn.max_turns,
        max_trajectory_tokens=min(limits, default=None),
        timeout_s=drawn.timeout_s,
    )
