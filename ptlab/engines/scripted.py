"""Trainer and Sampler without a transformer: a unigram language model, one logit per token of a small vocabulary.

Everything around the model is real (losses, gradients, AdamW, adapter files, versions), and every number can be worked out by hand:
log p(token) = log softmax(logits)[token] whatever comes before it. The "adapter" is a vector added to the base logits, initially 0.
For tests and documentation; `kind: scripted` cannot be chosen in a config.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ptlab.engines.protocols import AdapterRef, BaseModelInfo, PromptScores, SampleCall, SamplerCapabilities
from ptlab.engines.sampler_errors import not_loaded
from ptlab.errors import InvalidRequestError, NotFoundError, NotServedError
from ptlab.losses import LossCall, loss_inputs, loss_metrics, loss_sum
from ptlab.types import AdamParams, Datum, ForwardBackwardOutput, LoraConfig, OptimStepResponse, SampledSequence, SampleResponse, TensorData

TENSOR = "base_model.model.unigram.lora_B.weight"


def unigram_info(vocab_size: int = 8, name: str = "scripted/unigram") -> BaseModelInfo:
    return BaseModelInfo(name=name, arch="unigram", vocab_size=vocab_size, max_context_length=1024, dtype="float32")


def base_logits(vocab_size: int) -> Tensor:
    """0, 0.1, 0.2 ...: not uniform, so that a mixed-up token shows."""
    return torch.arange(vocab_size, dtype=torch.float32) / 10


@dataclass(slots=True)
class _Adapter:
    delta_V: Tensor
    optimizer: torch.optim.AdamW


@dataclass(slots=True)
class ScriptedTrainer:
    """See `ptlab.engines.protocols.Trainer`."""

    info: BaseModelInfo = field(default_factory=unigram_info)
    between_micro_batches: Callable[[], None] | None = None
    """Called between two datums: here each is a micro-batch."""
    _adapters: dict[str, _Adapter] = field(default_factory=dict)

    def create_adapter(self, model_id: str, lora: LoraConfig) -> None:
        if lora.rank < 1:
            raise InvalidRequestError(f"LoRA rank is {lora.rank}; it must be at least 1")
        delta_V = torch.zeros(self.info.vocab_size, requires_grad=True)
        self._adapters[model_id] = _Adapter(delta_V, torch.optim.AdamW([delta_V], lr=0.0))

    def remove_adapter(self, model_id: str) -> None:
        del self._adapters[model_id]

    def _adapter(self, model_id: str) -> _Adapter:
        if model_id not in self._adapters:
            raise NotFoundError(f"no trainable model {model_id!r}")
        return self._adapters[model_id]

    def forward(self, model_id: str, data: Sequence[Datum], loss: LossCall) -> ForwardBackwardOutput:
        with torch.no_grad():
            return self._pass(model_id, data, loss)[1]

    def forward_backward(self, model_id: str, data: Sequence[Datum], loss: LossCall) -> ForwardBackwardOutput:
        total, output = self._pass(model_id, data, loss)
        total.backward()  # type: ignore[no-untyped-call]
        return output

    def _pass(self, model_id: str, data: Sequence[Datum], loss: LossCall) -> tuple[Tensor, ForwardBackwardOutput]:
        inputs = [loss_inputs(datum, loss) for datum in data]
        for _ in inputs[1:]:
            if self.between_micro_batches is not None:
                self.between_micro_batches()
        logprobs_V = (base_logits(self.info.vocab_size) + self._adapter(model_id).delta_V).log_softmax(0)
        parts = [logprobs_V[i["target_tokens"]] for i in inputs]
        total = loss_sum(loss, parts, inputs)
        metrics = loss_metrics(loss, [p.detach() for p in parts], inputs)
        outputs = [{"logprobs": TensorData.from_numpy(p.detach().numpy())} for p in parts]
        return total, ForwardBackwardOutput(loss_fn_output_type="ArrayRecord", loss_fn_outputs=outputs, metrics=metrics)

    def optim_step(self, model_id: str, adam: AdamParams) -> OptimStepResponse:
        adapter = self._adapter(model_id)
        if adapter.delta_V.grad is None:
            return OptimStepResponse(metrics={"skipped:sum": 1.0})
        adapter.optimizer.param_groups[0].update(
            lr=adam.learning_rate, betas=(adam.beta1, adam.beta2), eps=adam.eps, weight_decay=adam.weight_decay
        )
        adapter.optimizer.step()
        adapter.optimizer.zero_grad()
        return OptimStepResponse(metrics={"learning_rate:mean": adam.learning_rate})

    def compute_logprobs(self, model_id: str | None, tokens: Sequence[int]) -> list[float | None]:
        delta_V = torch.zeros(self.info.vocab_size) if model_id is None else self._adapter(model_id).delta_V.detach()
        return _score(base_logits(self.info.vocab_size) + delta_V, tokens)

    def score_prompt(self, call: SampleCall) -> PromptScores:
        """Prompt log-probabilities only."""
        logits_V = base_logits(self.info.vocab_size)
        if call.adapter is not None:
            logits_V = logits_V + load_file(call.adapter.path / "adapter_model.safetensors")[TENSOR]
        logprobs_T = np.array([np.nan, *_score(logits_V, call.prompt.to_ints())[1:]], dtype=np.float32)
        return PromptScores(logprobs_T=logprobs_T, topk=None, targets=None, alternatives=None)

    def save_adapter(self, model_id: str, directory: Path) -> None:
        save_file({TENSOR: self._adapter(model_id).delta_V.detach()}, directory / "adapter_model.safetensors")

    def save_state(self, model_id: str, directory: Path) -> None:
        self.save_adapter(model_id, directory)
        adapter = self._adapter(model_id)
        state = {key: value for key, value in adapter.optimizer.state[adapter.delta_V].items()}
        gradient = {} if adapter.delta_V.grad is None else {"gradient": adapter.delta_V.grad}
        save_file(state | gradient, directory / "optimizer.safetensors")

    def load_state(self, model_id: str, directory: Path, *, with_optimizer: bool) -> None:
        adapter = self._adapter(model_id)
        with torch.no_grad():
            adapter.delta_V.copy_(load_file(directory / "adapter_model.safetensors")[TENSOR])
        adapter.delta_V.grad = None
        adapter.optimizer.state.clear()
        if with_optimizer:
            state = load_file(directory / "optimizer.safetensors")
            adapter.delta_V.grad = state.pop("gradient", None)
            if state:
                adapter.optimizer.state[adapter.delta_V] = state


@dataclass(slots=True)
class ScriptedSampler:
    """See `ptlab.engines.protocols.Sampler`. Draws from the unigram distribution; no stop token, so every draw has max_tokens tokens.

    Args:
        load: reads an adapter's vector; a test plants a fault here (the wrong file, zeros, nothing).
    """

    info: BaseModelInfo = field(default_factory=unigram_info)
    load: Callable[[AdapterRef], Tensor | None] = lambda ref: load_file(ref.path / "adapter_model.safetensors")[TENSOR]
    loaded: dict[str, Tensor] = field(default_factory=dict)
    num_requests: int = 0
    lora_on_head: bool = True
    scores_prompts: bool = True
    """False = prompt log-probabilities are refused, as of an engine that gets them wrong."""

    async def sample(self, call: SampleCall) -> SampleResponse:
        tokens = call.prompt.to_ints()
        if call.adapter is not None and call.adapter.name not in self.loaded:
            raise not_loaded(call.adapter, "scripted sampler")
        if call.include_prompt_logprobs and not self.scores_prompts and call.adapter is not None:
            raise NotServedError("no prompt log-probabilities with an adapter", engine="scripted sampler", operation="sample")
        self.num_requests += 1
        logits_V = base_logits(self.info.vocab_size)
        if call.adapter is not None:
            logits_V = logits_V + self.loaded[call.adapter.name]
        version = 0 if call.adapter is None else call.adapter.version
        temperature = call.params.temperature or 1.0
        logprobs_V = (logits_V / temperature).log_softmax(0).numpy()
        sequences = []
        for i in range(call.num_samples):
            seed = None if call.params.seed is None else (call.params.seed, i)
            uniform_T = np.random.default_rng(seed).random(call.params.max_tokens or 16)
            drawn_T = np.minimum(np.searchsorted(np.exp(logprobs_V).cumsum(), uniform_T), self.info.vocab_size - 1)
            if call.params.temperature == 0:
                drawn_T = np.full(len(uniform_T), int(logits_V.argmax()))
            sequences.append(
                SampledSequence(
                    stop_reason="length",
                    sequence_id=call.sequence_ids[i] if call.sequence_ids else f"sequence-{self.num_requests}-{i}",
                    tokens_np=drawn_T.astype(np.int32),
                    logprobs_np=logprobs_V[drawn_T].astype(np.float32),
                    policy_version=version,
                )
            )
        scored = (
            np.array([np.nan if v is None else v for v in _score(logits_V, tokens)], dtype=np.float32)
            if call.include_prompt_logprobs
            else None
        )
        return SampleResponse(sequences=sequences, prompt_logprobs_np=scored)

    @property
    def capabilities(self) -> SamplerCapabilities:
        return SamplerCapabilities(
            max_lora_rank=None, lora_on_head=self.lora_on_head, prompt_logprobs_with_head=self.scores_prompts, arbitrary_prompt_scores=False
        )

    async def load_adapter(self, adapter: AdapterRef) -> frozenset[str]:
        delta_V = self.load(adapter)
        if delta_V is None:
            return frozenset()
        self.loaded[adapter.name] = delta_V
        return frozenset({TENSOR})

    async def unload_adapter(self, adapter: AdapterRef) -> None:
        self.loaded.pop(adapter.name, None)

    async def close(self) -> None:
        self.loaded.clear()


def _score(logits_V: Tensor, tokens: Sequence[int]) -> list[float | None]:
    return [None, *logits_V.log_softmax(0)[list(tokens[1:])].tolist()]
