"""What a request asks for: sampling, optimizer and adapter parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny

from ptlab.types.base import RequestModel, ResultModel
from ptlab.types.model_input import ModelInput
from ptlab.types.tensor_data import TensorData

LossFnType: TypeAlias = Literal["cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo", "stable_reinforce", "custom"]
SamplingClientKind: TypeAlias = Literal["snapshot", "inflight"]
ModelID: TypeAlias = str


class SamplingParams(ResultModel):
    """How to draw tokens. Unknown fields are ignored, as in the official SDK."""

    max_tokens: int | None = None
    """Most tokens to draw; None = as many as the context holds."""
    seed: int | None = None
    """Draw i of a request uses a stream of its own made from seed and i; None = random."""
    stop: str | Sequence[str] | Sequence[int] | None = None
    """Texts, or token ids, that end a draw. None = the model's end-of-sequence token; [] = nothing ends it but max_tokens."""
    temperature: float = 1
    """0 = greedy."""
    top_k: int = -1
    """-1 = all tokens."""
    top_p: float = 1


class LoraConfig(RequestModel):
    """The adapter to train."""

    rank: int
    seed: int | None = None
    """Of the initial LoRA weights only; None = random."""
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class OptimizerConfigBase(RequestModel):
    """The optimizer family of a model, by `type`."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())
    type: str


class AdamOptimizerConfig(OptimizerConfigBase):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    type: Literal["adamw"] = "adamw"


class DimuonOptimizerConfig(OptimizerConfigBase):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    type: Literal["dimuon"] = "dimuon"
    version: Literal[1] = 1


OptimizerConfig: TypeAlias = AdamOptimizerConfig | SerializeAsAny[OptimizerConfigBase]


class AdamParams(RequestModel):
    """One AdamW step, as torch.optim.AdamW but with weight_decay 0."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    """Decoupled from the gradient."""
    grad_clip_norm: float = 0.0
    """Most the global gradient norm may be; 0 = no clipping."""


class OptimParamsBase(RequestModel):
    """One step of another optimizer family, by `type`."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())
    type: str


class DimuonParams(OptimParamsBase):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())
    type: Literal["dimuon"] = "dimuon"
    learning_rate: float = Field(ge=0)
    grad_clip_norm: float = 0.0
    beta1: float = Field(default=0.9, ge=0, lt=1)


OptimParams: TypeAlias = AdamParams | SerializeAsAny[OptimParamsBase]


class OptimStepRequest(RequestModel):
    """optim_step as a value."""

    optim_params: OptimParams
    model_id: ModelID
    seq_id: int | None = None
    type: Literal["optim_step"] = "optim_step"


class SampleRequest(RequestModel):
    """sample as a value: of a sampling session, or of a base model or path without one."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), arbitrary_types_allowed=True)
    num_samples: int = 1
    prompt: ModelInput
    sampling_params: SamplingParams
    base_model: str | None = None
    model_path: str | None = None
    sampling_session_id: str | None = None
    seq_id: int | None = None
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: TensorData | None = None
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = None
    record_stability_info: bool | None = None
    type: Literal["sample"] = "sample"


def _fields(value: object) -> frozenset[str]:
    return frozenset(type(value).model_fields) if isinstance(value, BaseModel) else frozenset()


def as_sampling_params(value: Any) -> SamplingParams:
    """Ours, unchanged, or ours made from the official SDK's by structure."""
    if isinstance(value, SamplingParams):
        return value
    if _fields(value) >= {"max_tokens", "temperature", "top_k", "top_p", "stop", "seed"}:
        return SamplingParams.model_validate(value.model_dump())
    raise TypeError(f"sampling_params must be SamplingParams, got {type(value).__name__}")


def as_adam_params(value: Any) -> AdamParams:
    """Ours, unchanged, or ours made from the official SDK's by structure."""
    if isinstance(value, AdamParams):
        return value
    if _fields(value) >= {"learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm"}:
        return AdamParams.model_validate(value.model_dump())
    raise TypeError(f"optim_params must be AdamParams, got {type(value).__name__}; ptlab trains with AdamW only")


def as_lora_config(value: Any) -> LoraConfig:
    """Ours, unchanged, or ours made from the official SDK's by structure."""
    if isinstance(value, LoraConfig):
        return value
    if _fields(value) >= {"rank", "seed", "train_unembed", "train_mlp", "train_attn"}:
        return LoraConfig.model_validate(value.model_dump())
    raise TypeError(f"lora must be LoraConfig, got {type(value).__name__}")
