"""Sections that every recipe's config shares: model, adapter, optimizer, engines, checkpoints, logging.

Defaults are those of the smallest useful run (the quickstart). The string under a field is its documentation.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ptlab.losses import resolve_loss
from ptlab.section import Section


class ModelConfig(Section):
    name: str = Field(default="ptlab/quickstart", min_length=1)
    """Base model: a Hugging Face hub id, or "ptlab/quickstart", which ptlab makes itself."""
    path: str | None = None
    """Local directory with the weights and tokenizer; None = cache or hub."""
    renderer: str | None = None
    """How messages become tokens ("qwen3", "llama3", ...); None = the one recommended for the model."""


class LoraSection(Section):
    rank: int = Field(default=16, ge=1, le=512)
    """Width of the two LoRA factors."""
    seed: int | None = None
    """Seed of the LoRA initialisation; None = the run's seed."""
    train_mlp: bool = True
    """LoRA on gate, up and down projections (and experts)."""
    train_attn: bool = True
    """LoRA on q, k, v and o projections."""
    train_unembed: bool = True
    """LoRA on the output head."""
    unembed: Literal["auto", "require"] = "auto"
    """What if the sampler cannot serve an adapter on the output head: auto = train without it and warn, require = refuse."""

    @model_validator(mode="after")
    def _something_trains(self) -> LoraSection:
        if not (self.train_mlp or self.train_attn or self.train_unembed):
            raise ValueError("train_mlp, train_attn and train_unembed are all false, so nothing would train; set at least one to true")
        return self


class LossConfig(Section):
    name: str = "importance_sampling"
    """One of ptlab.losses.LOSSES."""
    config: dict[str, float | str] = Field(default_factory=dict)
    """The loss's own numbers, e.g. clip_low_threshold; what is left out has its default."""

    @model_validator(mode="after")
    def _known(self) -> LossConfig:
        resolve_loss(self.name, self.config)
        return self


class OptimConfig(Section):
    learning_rate: float = Field(default=1e-3, gt=0)
    """AdamW step size, at its highest."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the gradient's running mean."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the squared gradient's running mean."""
    eps: float = Field(default=1e-12, gt=0)
    """Added to the denominator."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    grad_clip_norm: float = Field(default=0.0, ge=0)
    """Clip the global gradient norm to this; 0 = off."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or falling towards 0 at the last step."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear rise from learning_rate / warmup_steps."""

    def learning_rate_at(self, step: int, steps: int) -> float:
        """Learning rate of step 0 .. steps - 1 of a run of `steps`."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        factor = 1.0 - done if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.learning_rate * factor


DType = Literal["auto", "float32", "bfloat16"]


class PeftTrainerConfig(Section):
    kind: Literal["peft"] = "peft"
    """transformers + PEFT in this process."""
    dtype: DType = "auto"
    """Compute type of the base; auto = float32 on CPU, bfloat16 on GPU. LoRA weights are float32 always."""
    tokens_per_micro_batch: int = Field(default=8192, ge=1)
    """Tokens that go through the model at once; the gradient does not depend on it, memory does."""


class TorchSamplerConfig(Section):
    kind: Literal["torch"] = "torch"
    """The embedded sampler on transformers."""
    dtype: DType = "auto"
    """Compute type; auto = the trainer's."""


class VllmSamplerConfig(Section):
    kind: Literal["vllm"] = "vllm"
    """vLLM: in this process on the CPU, in its own process on a GPU."""
    dtype: DType = "auto"
    """Compute type; auto = the trainer's."""
    max_loras: int | None = Field(default=None, ge=1)
    """Adapter versions that can be in one batch; more take turns. None = 4 on a GPU, up to 32 on a CPU as their memory allows."""
    max_lora_rank: int | None = Field(default=None, ge=1, le=512)
    """Largest rank served; None = lora.rank."""
    gpu_memory_utilization: float | None = Field(default=None, gt=0, lt=1)
    """Share of the GPU's memory for vLLM's weights and KV cache; None = ptlab's memory plan decides."""


def _vllm_unless_said(section: Any) -> Any:
    """`engines.sampler.max_loras: 2` alone is about the default sampler."""
    return {"kind": "vllm", **section} if isinstance(section, dict) else section


SamplerConfig = Annotated[VllmSamplerConfig | TorchSamplerConfig, Field(discriminator="kind"), BeforeValidator(_vllm_unless_said)]


class EnginesConfig(Section):
    trainer: PeftTrainerConfig = PeftTrainerConfig()
    """Who computes gradients."""
    sampler: SamplerConfig = VllmSamplerConfig()
    """Who draws answers."""
    scratch_dir: str | None = None
    """Where versions lie that live only while someone samples from them; None = in RAM (/dev/shm) where there is room, else on disk."""


class CheckpointConfig(Section):
    every: int = Field(default=10, ge=0)
    """Save the full state after every n-th step and after the last; 0 = only after the last and on Ctrl-C."""


class LoggingConfig(Section):
    tensorboard: bool = False
    """Also write TensorBoard events into the run directory (needs the package tensorboard)."""
    wandb: str | None = None
    """Also log to this Weights & Biases project (needs the package wandb)."""
    transcripts: int = Field(default=4, ge=0)
    """Trajectories per step that go to transcripts.jsonl."""
