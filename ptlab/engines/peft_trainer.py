"""The Trainer on transformers + PEFT: one frozen base model, many LoRA adapters, gradients that add up until optim_step.

What a call promises:
- the result does not depend on how the datums fall into micro-batches (a plain sum, up to floating-point order);
- all or nothing: a call that fails leaves the accumulated gradients as they were;
- out of memory halves the micro-batch and goes on; only a single datum that does not fit is an error;
- between two micro-batches others may use the trainer (`between_micro_batches`), and no number of the call changes by that.
"""

from __future__ import annotations

import gc
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import peft
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ptlab.engines import lora as lora_files
from ptlab.engines.base_model import load_base_model
from ptlab.engines.batching import pad, plan_micro_batches
from ptlab.engines.logprobs import CHUNK_ELEMENTS, log_softmax, output_head, token_logprobs
from ptlab.engines.lora_layers import LoraLayers, LoraWeights
from ptlab.engines.prompt_scores import PromptScorer
from ptlab.engines.protocols import AdapterRef, PromptScores, SampleCall
from ptlab.engines.sample_checks import check_call
from ptlab.engines.token_draw import SEED_MASK
from ptlab.errors import CheckpointError, EngineError, InvalidRequestError, NotFoundError
from ptlab.losses import LossCall, loss_inputs, loss_metrics, loss_sum
from ptlab.types import AdamParams, Datum, ForwardBackwardOutput, LoraConfig, OptimStepResponse, TensorData

ENGINE = "peft trainer"
OPTIMIZER_FILE, GRADIENTS_FILE = "optimizer.safetensors", "gradients.safetensors"


@dataclass(slots=True)
class _Adapter:
    """One LoRA adapter: master weights (float32), what the optimizer remembers of them, and the gradients not yet applied."""

    config: peft.LoraConfig
    weights: LoraWeights
    optimizer: torch.optim.AdamW
    gradients: dict[str, Tensor] = field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return self.weights.parameters


@dataclass(frozen=True, slots=True)
class _Item:
    """A datum made ready: input tokens, and the loss inputs as tensors on the device."""

    tokens: list[int]
    inputs: dict[str, Tensor]


class PeftTrainer:
    """See `ptlab.engines.protocols.Trainer`.

    Args:
        path: local directory or hub name of any transformers causal LM.
        name: the name clients use for it.
        dtype: compute type; "auto" = float32 on CPU, bfloat16 on GPU. Adapters and optimizer are float32 always.
        tokens_per_micro_batch: padded tokens in one forward pass.
        gradient_checkpointing: recompute layer activations in the backward pass; about 1.3x slower, a fraction of the memory.
    """

    def __init__(
        self,
        path: str,
        *,
        name: str,
        dtype: str = "auto",
        device: str | None = None,
        tokens_per_micro_batch: int = 4096,
        gradient_checkpointing: bool = False,
    ) -> None:
        self._base, self.info = load_base_model(path, name=name, dtype=dtype, device=device)
        self._device: torch.device = self._base.device
        self.num_parameters = sum(p.numel() for p in self._base.parameters())
        self._targets = lora_files.LoraTargets.of(self._base)
        self._layers = LoraLayers(self._base)
        self._head = output_head(self._base)
        self._adapters: dict[str, _Adapter] = {}
        self.between_micro_batches: Callable[[], None] | None = None
        self._in_pass: str | None = None  # the model whose forward or forward_backward is under way
        self.set_micro_batch(tokens_per_micro_batch, checkpoint=gradient_checkpointing)
        self._check_head()
        torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # the first one imports torch._dynamo: seconds, not at a client's cost

    @property
    def tokens_per_micro_batch(self) -> int:
        """As set, or less: out of memory makes it smaller."""
        return self._max_tokens

    def set_micro_batch(self, tokens: int, *, checkpoint: bool) -> None:
        """Padded tokens in one forward pass from now on, and whether activations are recomputed."""
        self._max_tokens = tokens
        self._base.train(checkpoint)  # transformers checkpoints in train mode only; nothing random may come with it
        if not checkpoint:
            self._base.gradient_checkpointing_disable()
            return
        self._base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._base.enable_input_require_grads()
        for module in self._base.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self._base.config.attention_dropout = 0.0

    def _check_head(self) -> None:
        """Compare our chunked log-probabilities with the model's own logits on a few tokens."""
        tokens = [i % self.info.vocab_size for i in range(1, 14, 2)]
        with torch.no_grad():
            logits_TV = self._base(input_ids=torch.tensor([tokens], device=self._device)).logits[0].float()
            expected_T = log_softmax(logits_TV[:-1]).gather(1, torch.tensor(tokens[1:], device=self._device)[:, None])[:, 0]
        ours_T = torch.tensor(self.compute_logprobs(None, tokens)[1:], device=self._device)
        gap = (ours_T - expected_T).abs().max().item()
        if not gap < (1e-3 if self.info.dtype == "float32" else 0.2):
            raise EngineError(
                f"{self.info.name} ({self.info.arch}): log-probabilities from hidden states differ from the model's own by {gap:.3g} nats; "
                f"its output head does something ptlab does not know, training it would be wrong",
                engine=ENGINE,
                operation="load",
            )

    # -- adapters

    def create_adapter(self, model_id: str, lora: LoraConfig) -> None:
        if model_id in self._adapters:
            raise InvalidRequestError(f"model {model_id!r} exists already")
        config = lora_files.peft_config(self._targets, lora, self.info.name)
        weights = self._layers.make(config)
        lora_files.initialise(weights.parameters, lora.seed)
        self._adapters[model_id] = _Adapter(config, weights, torch.optim.AdamW(weights.parameters.values(), lr=0.0))

    def remove_adapter(self, model_id: str) -> None:
        self._changeable(model_id, "remove_adapter")
        del self._adapters[model_id]

    def _adapter(self, model_id: str) -> _Adapter:
        if model_id not in self._adapters:
            raise NotFoundError(f"no trainable model {model_id!r}; the trainer holds {sorted(self._adapters) or 'none'}")
        return self._adapters[model_id]

    def _changeable(self, model_id: str, operation: str) -> _Adapter:
        """Raises: EngineError in the middle of a pass of the same model, whose other half would be of other weights."""
        if model_id == self._in_pass:
            raise EngineError(
                f"{operation} of {model_id!r} between two micro-batches of its own pass; wait for the pass to end",
                engine=ENGINE,
                operation=operation,
            )
        return self._adapter(model_id)

    # -- forward and backward

    def forward(self, model_id: str, data: Sequence[Datum], loss: LossCall) -> ForwardBackwardOutput:
        return self._whole_pass(model_id, data, loss, backward=False)

    def forward_backward(self, model_id: str, data: Sequence[Datum], loss: LossCall) -> ForwardBackwardOutput:
        return self._whole_pass(model_id, data, loss, backward=True)

    def _whole_pass(self, model_id: str, data: Sequence[Datum], loss: LossCall, *, backward: bool) -> ForwardBackwardOutput:
        adapter = self._changeable(model_id, "forward_backward") if backward else self._adapter(model_id)
        outer = self._in_pass
        self._in_pass = outer or model_id  # a pass inside a pass is never interrupted itself
        try:
            with self._layers.using(adapter.weights):
                return self._pass(adapter, data, loss, backward=backward, give_way=outer is None)
        finally:
            self._in_pass = outer

    def _pass(self, adapter: _Adapter, data: Sequence[Datum], loss: LossCall, *, backward: bool, give_way: bool) -> ForwardBackwardOutput:
        items = [_Item(d.model_input.to_ints(), {k: v.to(self._device) for k, v in loss_inputs(d, loss).items()}) for d in data]
        logprobs_D: list[Tensor] = [torch.empty(0)] * len(items)
        gradients: dict[str, Tensor] = {}  # of this call alone, added to the adapter's once everything has succeeded
        todo = plan_micro_batches([len(item.tokens) for item in items], self._max_tokens)[::-1]
        while todo:
            group = todo.pop()
            try:
                parts, grads = self._micro_batch(adapter, [items[i] for i in group], loss, backward=backward)
            except RuntimeError as err:
                if not _is_out_of_memory(err) or len(group) == 1:
                    raise EngineError(self._failure(err, group, items), engine=ENGINE, operation="forward_backward") from err
                self._max_tokens = max(1, min(self._max_tokens, len(group) * len(items[group[0]].tokens)) // 2)
                todo += [group[len(group) // 2 :], group[: len(group) // 2]]
                parts, grads = [], []
                _free_memory()
                continue
            for i, part in zip(group, parts, strict=True):
                logprobs_D[i] = part
            for name, grad in zip(adapter.parameters, grads, strict=False):
                gradients[name] = gradients[name].add_(grad) if name in gradients else grad
            if todo and give_way and self.between_micro_batches is not None:
                self.between_micro_batches()
        metrics = loss_metrics(loss, logprobs_D, [item.inputs for item in items])
        if backward:
            self._accumulate(adapter, gradients, metrics)
        outputs = [{"logprobs": TensorData.from_numpy(part.cpu().numpy().astype(np.float32, copy=False))} for part in logprobs_D]
        return ForwardBackwardOutput(loss_fn_output_type="ArrayRecord", loss_fn_outputs=outputs, metrics=metrics)

    def _micro_batch(self, adapter: _Adapter, items: list[_Item], loss: LossCall, *, backward: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Per-datum log-probabilities (detached, shape of target_tokens) and the gradients in parameter order (none if not backward)."""
        with torch.set_grad_enabled(backward):
            logprobs = self._target_logprobs([item.tokens for item in items], [item.inputs["target_tokens"] for item in items])
            if not backward:
                return logprobs, []
            total = loss_sum(loss, logprobs, [item.inputs for item in items])
            grads = torch.autograd.grad(total, list(adapter.parameters.values()), allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, adapter.parameters.values(), strict=True)]
        return [part.detach() for part in logprobs], filled

    def _target_logprobs(self, rows: list[list[int]], targets: list[Tensor]) -> list[Tensor]:
        batch = pad(rows, self._device)
        hidden_BLH = self._base.base_model(input_ids=batch.input_ids_BL, use_cache=False).last_hidden_state
        hidden_TH = hidden_BLH.flatten(0, 1)[batch.flat_index_T]
        widest = max(t.shape[1] if t.dim() == 2 else 1 for t in targets)
        columns = [t[:, None] if t.dim() == 1 else t for t in targets]
        targets_TK = torch.cat([nn.functional.pad(t, (0, widest - t.shape[1])) for t in columns])
        logprobs_TK = token_logprobs(self._head, hidden_TH, targets_TK, self.info.vocab_size)
        parts: tuple[Tensor, ...] = torch.split(logprobs_TK, batch.lengths)
        return [part[:, 0] if t.dim() == 1 else part[:, : t.shape[1]] for part, t in zip(parts, targets, strict=True)]

    def _accumulate(self, adapter: _Adapter, gradients: dict[str, Tensor], metrics: dict[str, float]) -> None:
        bad = [name for name, grad in gradients.items() if not torch.isfinite(grad).all()]
        if bad:
            raise EngineError(
                f"the gradient of {len(bad)} of {len(gradients)} LoRA tensors is not finite "
                f"(first: {bad[0]}; loss:sum = {metrics['loss:sum']}); nothing was accumulated. "
                f"Look for extreme `logprobs`, `advantages` or `weights` in the batch",
                engine=ENGINE,
                operation="forward_backward",
            )
        for name, grad in gradients.items():
            adapter.gradients[name] = adapter.gradients[name].add_(grad) if name in adapter.gradients else grad.float()

    def _failure(self, err: Exception, group: list[int], items: list[_Item]) -> str:
        sizes = [len(items[i].tokens) for i in group]
        if _is_out_of_memory(err):
            return f"datum {group[0]} with {sizes[0]} tokens does not fit into the memory of {self._device} even alone: shorten it"
        return f"{len(group)} datums of up to {max(sizes)} tokens failed on {self._device}: {err}"

    def compute_logprobs(self, model_id: str | None, tokens: Sequence[int]) -> list[float | None]:
        rows, targets = [list(tokens[:-1])], [torch.tensor(tokens[1:], dtype=torch.int64, device=self._device)]
        if len(tokens) < 2:
            return [None] * len(tokens)

        with self._layers.using(None if model_id is None else self._adapter(model_id).weights), torch.no_grad():
            return [None, *self._target_logprobs(rows, targets)[0].tolist()]

    def score_prompt(self, call: SampleCall) -> PromptScores:
        tokens = check_call(call, self.info).tokens
        seed = secrets.randbits(63) if call.params.seed is None else call.params.seed & SEED_MASK
        scorer = PromptScorer(call, tokens, seed, self._device)
        chunk = max(1, CHUNK_ELEMENTS // self.info.vocab_size)

        with self._layers.using(None if call.adapter is None else self._version(call.adapter)), torch.no_grad():
            ids_BL = torch.tensor([tokens], device=self._device)
            hidden_TH = self._base.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state[0]
            for start in range(0, len(tokens), chunk):
                scorer.add(self._head(hidden_TH[start : start + chunk]), start)
        return scorer.scores()

    def _version(self, adapter: AdapterRef) -> LoraWeights:
        """The weights in a version's directory. Raises: CheckpointError if it is missing, torn, or not of this base model."""
        file = adapter.path / lora_files.ADAPTER_FILE
        weights = self._layers.make(lora_files.read_config(adapter))
        lora_files.copy_into(weights.parameters, lora_files.load_tensors(file), file)
        return weights

    # -- optimizer

    def optim_step(self, model_id: str, adam: AdamParams) -> OptimStepResponse:
        """One AdamW step on the accumulated sum, then clear it. Without gradients nothing moves, and `skipped:sum` says so."""
        adapter = self._changeable(model_id, "optim_step")
        if not adapter.gradients:
            return OptimStepResponse(metrics={"skipped:sum": 1.0})
        for name, parameter in adapter.parameters.items():
            parameter.grad = adapter.gradients[name]
        max_norm = adam.grad_clip_norm if adam.grad_clip_norm > 0 else float("inf")
        norm = nn.utils.clip_grad_norm_(adapter.parameters.values(), max_norm).item()
        for group in adapter.optimizer.param_groups:
            group.update(lr=adam.learning_rate, betas=(adam.beta1, adam.beta2), eps=adam.eps, weight_decay=adam.weight_decay)
        adapter.optimizer.step()
        adapter.optimizer.zero_grad(set_to_none=True)
        adapter.gradients = {}
        return OptimStepResponse(metrics={"grad_norm:mean": norm, "learning_rate:mean": adam.learning_rate, "skipped:sum": 0.0})

    # -- files

    def save_adapter(self, model_id: str, directory: Path) -> None:
        adapter = self._adapter(model_id)
        lora_files.save_adapter(adapter.parameters, adapter.config, directory)

    def save_state(self, model_id: str, directory: Path) -> None:
        adapter = self._adapter(model_id)
        lora_files.save_adapter(adapter.parameters, adapter.config, directory)
        moments: dict[str, Tensor] = {}
        for name, parameter in adapter.parameters.items():
            for key, value in adapter.optimizer.state[parameter].items():
                moments[f"{key}/{name}"] = value.detach().to("cpu").contiguous()
        save_file(moments, directory / OPTIMIZER_FILE)
        save_file({name: grad.to("cpu").contiguous() for name, grad in adapter.gradients.items()}, directory / GRADIENTS_FILE)

    def load_state(self, model_id: str, directory: Path, *, with_optimizer: bool) -> None:
        """Replace weights, and with_optimizer the optimizer and unapplied gradients too; otherwise those start empty."""
        adapter = self._changeable(model_id, "load_state")
        weights = lora_files.load_tensors(directory / lora_files.ADAPTER_FILE)
        moments = lora_files.load_tensors(directory / OPTIMIZER_FILE) if with_optimizer else {}
        gradients = lora_files.load_tensors(directory / GRADIENTS_FILE) if with_optimizer else {}
        state: dict[Tensor, dict[str, Tensor]] = {}
        for key, value in moments.items():
            kind, name = key.split("/", 1)
            if name not in adapter.parameters:
                raise CheckpointError(
                    f"{directory / OPTIMIZER_FILE}: optimizer state for unknown tensor {name}; it belongs to another adapter"
                )
            parameter = adapter.parameters[name]
            state.setdefault(parameter, {})[kind] = value if kind == "step" else value.to(parameter.device)
        lora_files.copy_into(adapter.parameters, weights, directory / lora_files.ADAPTER_FILE)
        adapter.optimizer.state.clear()
        adapter.optimizer.state.update(state)
        adapter.gradients = {name: grad.to(self._device) for name, grad in gradients.items()}


def _is_out_of_memory(err: Exception) -> bool:
    # CUDA raises its own type; the CPU allocator a plain RuntimeError with this text
    return isinstance(err, torch.OutOfMemoryError) or "not enough memory" in str(err)


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
