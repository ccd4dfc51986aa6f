"""What every recipe does alike: open the trainer where the log left off, step, save, and time the phases of a step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ptlab.config import RunConfig
from ptlab.runlog import RunLog
from ptlab.types import AdamParams

if TYPE_CHECKING:
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


async def save_checkpoint(training_client: TrainingClient, log: RunLog, step: int) -> str:
    """Save the full state after `step` steps and note it in the log once it is durable."""
    saved = await training_client.save_state(f"step_{step:06d}", overwrite=True)
    log.checkpoint(step, saved.path)
    return saved.path


async def finished(training_client: TrainingClient, log: RunLog, steps: int) -> RunResult:
    """The end of a run: the full state, the weights for sampling ("final"), curves and the final table."""
    path = await save_checkpoint(training_client, log, steps)
    sampler = await training_client.save_weights_for_sampler("final")
    log.checkpoint(steps, sampler.path, kind="sampler")
    log.finish()
    return RunResult(status="finished", step=steps, checkpoint=path)


async def interrupted(training_client: TrainingClient, log: RunLog, steps: int) -> RunResult:
    """The end of a run that was asked to stop: the full state, from which --resume goes on."""
    return RunResult(status="interrupted", step=steps, checkpoint=await save_checkpoint(training_client, log, steps))


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
