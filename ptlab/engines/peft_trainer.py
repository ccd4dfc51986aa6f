"""The Trainer on transformers + PEFT: one frozen base model, many LoRA adapters, gradients that add up until optim_step.

What a call promises:
- the result does not depend on how the datums fall into micro-batches (a plain sum, up to floating-point order);
- all or nothing: a call that fails leaves the accumulated gradients as they were;
- out of memory halves the micro-batch and goes on; only a single datum that does not fit is an error;
- between two micro-batches others may use the trainer (`between_micro_batches`), and no number of the call changes by that.
"""

from __future__ import annotations

import gc
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import peft
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ptlab.engines import lora as lora_files
from ptlab.engines.base_model import load_base_model
from ptlab.engines.body import Body, DecoderBody, PaddedBody
from ptlab.engines.buffers import Buffers
from ptlab.engines.decoder import can_decode
from ptlab.engines.fused_linear import Gradients
from ptlab.engines.head_pass import CHUNK_BYTES, OutputHead, head_pass, head_path
from ptlab.engines.logprobs import log_softmax
from ptlab.engines.lora_layers import LoraLayers, LoraWeights
from ptlab.engines.loss_pass import loss_pass, plan_pairs, score
from ptlab.engines.memory_costs import Recompute
from ptlab.engines.prefix_tree import IntArray
from ptlab.engines.prompt_scores import PromptScorer
from ptlab.engines.protocols import AdapterRef, PromptScores, SampleCall
from ptlab.engines.sample_checks import check_call
from ptlab.engines.token_draw import SEED_MASK
from ptlab.errors import CheckpointError, EngineError, InvalidRequestError, NotFoundError
from ptlab.losses import LossCall, loss_inputs, loss_metrics, resolve_loss
from ptlab.types import AdamParams, Datum, ForwardBackwardOutput, LoraConfig, OptimStepResponse, TensorData

ENGINE = "peft trainer"
OPTIMIZER_FILE, GRADIENTS_FILE = "optimizer.safetensors", "gradients.safetensors"
logger = logging.getLogger(__name__)


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
    """A datum made ready: input tokens, and the loss inputs as tensors on the CPU."""

    tokens_T: IntArray
    inputs: dict[str, Tensor]


class PeftTrainer:
    """See `ptlab.engines.protocols.Trainer`.

    Args:
        path: local directory or hub name of any transformers causal LM.
        name: the name clients use for it.
        dtype: compute type; "auto" = float32 on CPU, bfloat16 on GPU. Adapters and optimizer are float32 always.
        tokens_per_micro_batch: tokens in one forward pass; a prefix that rows share counts once (where the model allows it, see body.py).
        recompute: activations that the backward pass computes again: slower, for less memory.
    """

    def __init__(
        self,
        path: str,
        *,
        name: str,
        dtype: str = "auto",
        device: str | None = None,
        tokens_per_micro_batch: int = 4096,
        recompute: Recompute = "nothing",
    ) -> None:
        self._base, self.info = load_base_model(path, name=name, dtype=dtype, device=device)
        self._device: torch.device = self._base.device
        self.num_parameters = sum(p.numel() for p in self._base.parameters())
        self._targets = lora_files.LoraTargets.of(self._base)
        self._layers = LoraLayers(self._base)
        self._output_head = OutputHead.of(self._base, None)
        self._head_path = head_path(self._base)
        self._adapters: dict[str, _Adapter] = {}
        self.between_micro_batches: Callable[[], None] | None = None
        self._in_pass: str | None = None  # the model whose forward or forward_backward is under way
        self._buffers = Buffers(self._device)
        self._body = self._choose_body()
        self.set_micro_batch(tokens_per_micro_batch, recompute=recompute)
        torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # the first one imports torch._dynamo: seconds, not at a client's cost

    @property
    def tokens_per_micro_batch(self) -> int:
        """As set, or less: out of memory makes it smaller."""
        return self._max_tokens

    def set_micro_batch(self, tokens: int, *, recompute: Recompute) -> None:
        """Tokens in one forward pass from now on, and which activations are recomputed."""
        self._max_tokens = tokens
        self._body.set_recompute(recompute)

    def _choose_body(self) -> Body:
        """The decoder where it knows the model, else the model itself.

        Raises: EngineError if log-probabilities made from hidden states are not the model's own.
        """
        rows, expected_D = self._own_logprobs()
        padded = PaddedBody(self._base, self._layers)
        if can_decode(self._base):
            try:
                decoder = DecoderBody(self._base)
                gap, slope_gap = self._gap(decoder, rows, expected_D), self._gradient_gap(decoder, padded, rows)
                if gap < self._allowed_gap and slope_gap < (1e-3 if self.info.dtype == "float32" else 0.1):
                    return decoder
                reason = f"log-probabilities differ from the model's own by {gap:.3g} nats, gradients by {slope_gap:.3g} of their size"
            except Exception as err:  # whatever a GPU's compilers raise where they are not complete
                reason = f"{type(err).__name__}: {err}"
            logger.warning(
                "%s: the decoder cannot be used, training goes on by the model's own modules, slower: %s", self.info.name, reason
            )
        gap = self._gap(padded, rows, expected_D)
        if gap < self._allowed_gap:
            return padded
        raise EngineError(
            f"{self.info.name} ({self.info.arch}): log-probabilities from hidden states differ from the model's own by {gap:.3g} nats; "
            f"its output head does something ptlab does not know, training it would be wrong",
            engine=ENGINE,
            operation="load",
        )

    @property
    def _allowed_gap(self) -> float:
        """Nats."""
        return 1e-3 if self.info.dtype == "float32" else 0.2

    def _gap(self, body: Body, rows: list[IntArray], expected_D: list[Tensor]) -> float:
        layout = body.lay_out([row[:-1] for row in rows])
        inputs = [{"target_tokens": torch.from_numpy(row[1:])} for row in rows]
        pairs = plan_pairs(layout, resolve_loss("cross_entropy"), inputs, backward=False)
        body.use(None)
        hidden_UH = body.forward(layout, pairs.places_U.to(self._device), keep=False)
        found_D = score(self._output_head, hidden_UH, pairs, inputs, self._buffers)
        return max((a - b).abs().max().item() for a, b in zip(found_D, expected_D, strict=True))

    def _gradient_gap(self, body: Body, other: Body, rows: list[IntArray]) -> float:
        """Relative L2 distance of the two bodies' gradients, for an adapter that is gone afterwards."""
        weights = self._layers.make(lora_files.peft_config(self._targets, LoraConfig(rank=8, train_unembed=False), self.info.name))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in weights.parameters.values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        found: list[Tensor] = []
        for one in (body, other):
            layout = one.lay_out(rows)
            one.use(weights)
            hidden_UH = one.forward(layout, torch.arange(layout.num_places, device=self._device), keep=True)
            slopes_UH = torch.zeros_like(hidden_UH)
            for places, row in zip(layout.places_D, rows, strict=True):  # of each token of each row, the same for both
                slope_TH = torch.randn(len(row), hidden_UH.shape[1], generator=torch.Generator().manual_seed(len(row))).to(hidden_UH)
                slopes_UH.index_add_(0, torch.from_numpy(places).to(self._device), slope_TH)
            gradients: Gradients = {}
            one.backward(slopes_UH, gradients)
            found.append(torch.cat([gradients[name].flatten() for name in weights.parameters]))
            one.free()
        return float((found[0] - found[1]).norm() / found[1].norm())

    def _own_logprobs(self) -> tuple[list[IntArray], list[Tensor]]:
        """Three rows, two with a common prefix, and the log-probabilities of their next tokens from the model's own logits."""
        longest = min(24, self.info.max_context_length)
        first = np.arange(1, 1 + 2 * longest, 2) % self.info.vocab_size
        second = np.concatenate([first[: longest * 2 // 3], first[: longest // 6]])
        rows = [first, second, first[::-1][: longest // 2].copy()]
        with torch.no_grad():
            logits_D = [self._base(input_ids=torch.from_numpy(row).to(self._device)[None]).logits[0].float() for row in rows]
            targets_D = [torch.from_numpy(row[1:]).to(self._device) for row in rows]
            pairs = zip(logits_D, targets_D, strict=True)
            return rows, [log_softmax(logits[:-1]).gather(1, targets[:, None])[:, 0].cpu() for logits, targets in pairs]

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
            return self._pass(adapter, data, loss, backward=backward, give_way=outer is None)
        finally:
            self._in_pass = outer

    def _pass(self, adapter: _Adapter, data: Sequence[Datum], loss: LossCall, *, backward: bool, give_way: bool) -> ForwardBackwardOutput:
        items = [_Item(np.asarray(datum.model_input.to_ints(), dtype=np.int64), loss_inputs(datum, loss)) for datum in data]
        logprobs_D: list[Tensor] = [torch.empty(0)] * len(items)
        gradients: Gradients = {}  # of this call alone, added to the adapter's once everything has succeeded
        todo = self._body.plan([item.tokens_T for item in items], self._max_tokens)[::-1]
        while todo:
            group = todo.pop()
            try:
                parts, found = self._micro_batch(adapter, [items[i] for i in group], loss, backward=backward)
            except RuntimeError as err:
                if not _is_out_of_memory(err) or len(group) == 1:
                    raise EngineError(self._failure(err, group, items), engine=ENGINE, operation="forward_backward") from err
                self._max_tokens = max(1, min(self._max_tokens, sum(len(items[i].tokens_T) for i in group)) // 2)
                todo += [group[len(group) // 2 :], group[: len(group) // 2]]
                parts, found = [], {}
                self._body.free()
                self._buffers.clear()
                _free_memory()
                continue
            for i, part in zip(group, parts, strict=True):
                logprobs_D[i] = part
            for name, gradient in found.items():
                gradients[name] = gradients[name].add_(gradient) if name in gradients else gradient
            if todo and give_way and self.between_micro_batches is not None:
                self.between_micro_batches()
        metrics = loss_metrics(loss, logprobs_D, [item.inputs for item in items])
        if backward:
            for name, parameter in adapter.parameters.items():
                gradients.setdefault(name, torch.zeros_like(parameter, requires_grad=False))
            self._accumulate(adapter, gradients, metrics)
        outputs = [{"logprobs": TensorData.from_numpy(part.cpu().numpy().astype(np.float32, copy=False))} for part in logprobs_D]
        return ForwardBackwardOutput(loss_fn_output_type="ArrayRecord", loss_fn_outputs=outputs, metrics=metrics)

    def _micro_batch(self, adapter: _Adapter, items: list[_Item], loss: LossCall, *, backward: bool) -> tuple[list[Tensor], Gradients]:
        """Per-datum log-probabilities in the shape of target_tokens, and the adapter's gradients (none if not backward)."""
        inputs = [item.inputs for item in items]
        layout = self._body.lay_out([item.tokens_T for item in items])
        pairs = plan_pairs(layout, loss, inputs, backward=backward)
        self._body.use(adapter.weights)
        hidden_UH = self._body.forward(layout, pairs.places_U.to(self._device), keep=backward)
        head = self._head_with(adapter.weights)
        if not backward:
            return score(head, hidden_UH, pairs, inputs, self._buffers), {}
        result = loss_pass(head, hidden_UH, pairs, loss, inputs, self._buffers)
        gradients: Gradients = {}
        self._body.backward(result.d_hidden_UH, gradients)
        for side, gradient in (("A", result.d_a_RH), ("B", result.d_b_VR)):
            if gradient is not None:
                gradients[f"{self._head_path}.lora_{side}.weight"] = gradient
        return result.logprobs_D, gradients

    def _head_with(self, weights: LoraWeights | None) -> OutputHead:
        return replace(self._output_head, lora=None if weights is None else weights.layers.get(self._head_path))

    def _hidden(self, weights: LoraWeights | None, tokens: Sequence[int]) -> Tensor:
        """Last hidden states of one row: [T, H], good until the next pass."""
        layout = self._body.lay_out([np.asarray(tokens, dtype=np.int64)])
        self._body.use(weights)
        return self._body.forward(layout, torch.arange(len(tokens), device=self._device), keep=False)

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
        sizes = [len(items[i].tokens_T) for i in group]
        if _is_out_of_memory(err):
            return f"datum {group[0]} with {sizes[0]} tokens does not fit into the memory of {self._device} even alone: shorten it"
        return f"{len(group)} datums of up to {max(sizes)} tokens failed on {self._device}: {err}"

    def compute_logprobs(self, model_id: str | None, tokens: Sequence[int]) -> list[float | None]:
        weights = None if model_id is None else self._adapter(model_id).weights
        if len(tokens) < 2:
            return [None] * len(tokens)
        hidden_TH = self._hidden(weights, tokens[:-1])
        targets_T = torch.tensor(tokens[1:], dtype=torch.int64, device=self._device)
        rows_T = torch.arange(len(targets_T), device=self._device)
        return [None, *head_pass(self._head_with(weights), hidden_TH, rows_T, targets_T, None, buffers=self._buffers).logprobs_P.tolist()]

    def score_prompt(self, call: SampleCall) -> PromptScores:
        tokens = check_call(call, self.info).tokens
        seed = secrets.randbits(63) if call.params.seed is None else call.params.seed & SEED_MASK
        scorer = PromptScorer(call, tokens, seed, self._device)
        weights = None if call.adapter is None else self._version(call.adapter)
        with torch.no_grad():
            head, hidden_TH = self._head_with(weights), self._hidden(weights, tokens)
            chunk = max(1, CHUNK_BYTES[self._device.type] // (self.info.vocab_size * hidden_TH.element_size()))
            for start in range(0, len(tokens), chunk):
                scorer.add(head.logits(hidden_TH[start : start + chunk]), start)
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
