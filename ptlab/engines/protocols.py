"""What a trainer and a sampler must do. Structural types: an engine need not inherit from them.

Values in and out are `ptlab.types` (numpy inside); no torch tensor crosses. Each engine passes the one contract suite of its
protocol (tests/engines/test_trainer_contract.py, tests/engines/test_sampler_contract.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ptlab.losses import LossCall
from ptlab.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    LoraConfig,
    ModelInput,
    OptimStepResponse,
    PromptAltTokens,
    SampleResponse,
    SamplingParams,
    TensorData,
    TopkLogprobs,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRef:
    """LoRA weights a sampler can load. Never changes: new weights are a new ref; there is no "latest"."""

    name: str
    """Unique for ever; vLLM keys its prefix cache by name and path."""
    version: int
    """Optimizer steps behind these weights; 0 = as initialised."""
    path: Path
    """PEFT layout (adapter_config.json, adapter_model.safetensors), complete once the ref exists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModelInfo:
    """Facts about a base model that requests are checked against."""

    name: str
    """The name clients use: a hub id, or the name given in the config."""
    arch: str
    """transformers model_type, e.g. "qwen3"."""
    vocab_size: int
    """Rows of the output head; every token id must lie in 0 .. vocab_size - 1."""
    max_context_length: int
    """Tokens of prompt and answer together."""
    dtype: str
    """Compute type: "float32" or "bfloat16"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleCall:
    """One sampling request: `num_samples` draws after one prompt, and what to score on the prompt."""

    prompt: ModelInput
    num_samples: int
    params: SamplingParams
    adapter: AdapterRef | None = None
    """None = the base model."""
    include_prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: TensorData | None = None
    """int64 [len(prompt) - 1, K]; row i scores prompt position i + 1; -1 = nothing."""
    prompt_alt_tokens_k: int = 0
    """Draws (with replacement, at the request's temperature) for every prompt position >= 1."""
    prompt_logprobs_last_n: int | None = None
    """Score only the last n prompt positions."""
    sequence_ids: Sequence[str] = field(default=())
    """num_samples unique ids; empty = the sampler makes them."""

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether it asks for log-probabilities of the prompt's own tokens, or of the likeliest ones in their places."""
        return self.include_prompt_logprobs or self.topk_prompt_logprobs > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerCapabilities:
    """Known once the sampler runs; requests beyond it raise NotServedError or InvalidRequestError, never a wrong answer."""

    max_lora_rank: int | None
    """Largest rank of an adapter; None = any."""
    lora_on_head: bool
    """Adapters may change the output head (train_unembed)."""
    prompt_logprobs_with_head: bool
    """Prompt log-probabilities stay right while an adapter on the head is loaded."""
    arbitrary_prompt_scores: bool
    """target_prompt_logprobs and prompt_alt_tokens_k are served."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptScores:
    """What a call asked about its prompt of T tokens; None = not asked for."""

    logprobs_T: NDArray[np.float32] | None
    """float32 [T], nats; NaN where there is no score (the first position)."""
    topk: TopkLogprobs | None
    targets: TensorData | None
    alternatives: PromptAltTokens | None


def lora_alpha(rank: int) -> int:
    """Alpha of every ptlab adapter: 32 at any rank, so the update is scaled by 32 / rank.

    Source: "LoRA Without Regret" (Thinking Machines, 2025): with alpha fixed and 1/rank scaling, the best learning rate hardly
    depends on the rank. The hosted service does not state its alpha; 32 is what its compatible servers use.
    """
    del rank  # the scale alpha / rank is where the rank enters
    return 32


class Trainer(Protocol):
    """Owns one base model and many LoRA adapters. Blocking; one caller at a time.

    `forward` and `forward_backward` return for every datum `logprobs` in the shape of its target_tokens, and metrics that hold at
    least `loss:sum`. Gradients of successive forward_backward calls add up (a plain sum over tokens and datums) until optim_step.
    """

    between_micro_batches: Callable[[], None] | None
    """Called between two micro-batches of forward and forward_backward, on the thread that called these; None at first.

    It lets others at the trainer in the middle of a long pass: it may score, save, create, load, remove and train any adapter but change
    the one in the pass, and the pass then goes on as if nothing had happened. What it raises ends the pass, with nothing accumulated.
    """

    @property
    def info(self) -> BaseModelInfo: ...

    def create_adapter(self, model_id: str, lora: LoraConfig) -> None: ...

    def remove_adapter(self, model_id: str) -> None: ...

    def forward(self, model_id: str, data: Sequence[Datum], loss: LossCall) -> ForwardBackwardOutput: ...

    def forward_backward(self, model_id: str, data: Sequence[Datum], loss: LossCall) -> ForwardBackwardOutput: ...

    def optim_step(self, model_id: str, adam: AdamParams) -> OptimStepResponse:
        """One step on the accumulated gradients. Where there are none nothing moves, and the metrics say `skipped:sum` 1."""
        ...

    def compute_logprobs(self, model_id: str | None, tokens: Sequence[int]) -> list[float | None]:
        """Log-probability in nats of each token given those before it; the first is None. model_id None = the base model."""
        ...

    def score_prompt(self, call: SampleCall) -> PromptScores:
        """What the call asks about its prompt, under the weights of call.adapter as they lie in its directory (None = the base model).

        For what a sampler cannot answer (`SamplerCapabilities`). The trainable adapters are not touched.
        """
        ...

    def save_adapter(self, model_id: str, directory: Path) -> None:
        """PEFT layout, exactly what samplers load and plain PEFT reads."""
        ...

    def save_state(self, model_id: str, directory: Path) -> None:
        """Adapter, optimizer and unapplied gradients: a resume continues bit for bit."""
        ...

    def load_state(self, model_id: str, directory: Path, *, with_optimizer: bool) -> None: ...


class Sampler(Protocol):
    """Serves one base model with loaded adapters. Async; many requests in flight."""

    @property
    def info(self) -> BaseModelInfo: ...

    @property
    def capabilities(self) -> SamplerCapabilities: ...

    async def sample(self, call: SampleCall) -> SampleResponse:
        """Raises: EngineError if call.adapter is not loaded; it never answers from other weights instead."""
        ...

    async def load_adapter(self, adapter: AdapterRef) -> frozenset[str]:
        """Returns the names of the LoRA tensors now registered, as they stand in the adapter's safetensors file."""
        ...

    async def unload_adapter(self, adapter: AdapterRef) -> None:
        """Forget an adapter. Requests in flight on it finish first."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Engines:
    """All that serves one base model."""

    trainer: Trainer
    sampler: Sampler
    tokenizer: Any
    """A transformers tokenizer; Any because only engines/ import transformers."""
