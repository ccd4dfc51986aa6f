"""Losses: which there are, what a datum must bring for them, their sum, and what a user watches.

    call = resolve_loss("ppo", {"clip_high_threshold": 1.3})     names and numbers checked, defaults filled in
    check_datum(datum, call, index=3, ...)                       refuses what can never work, by name
    inputs = [loss_inputs(datum, call) for datum in data]        dense tensors
    loss_sum(call, target_logprobs, inputs).backward()           a plain sum over tokens and datums: no mean, no division
    loss_metrics(call, target_logprobs, inputs)                  "loss:sum", "ratio:mean", ...

The formulas are in loss_formulas.py, their explanation with worked numbers in docs/losses.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ptlab.errors import InvalidRequestError
from ptlab.loss_formulas import (
    cispo,
    clip_ratio,
    cross_entropy,
    dro,
    gspo,
    importance_sampling,
    moved_too_far,
    ppo,
    sequence_log_ratio,
    stable_reinforce,
    token_log_ratio,
)
from ptlab.loss_graph import LossGraph
from ptlab.loss_graph_run import run_graph
from ptlab.loss_table import (
    BOUNDS,
    CUSTOM,
    LOSSES,
    OWN_FORMULA_NOTICE,
    VALUE_LIMIT,
    Loss,
    LossCall,
    did_you_mean,
    resolve_loss,
)
from ptlab.types import Datum, EncodedTextChunk, ModelInput, TensorData

__all__ = [
    "CUSTOM",
    "LOSSES",
    "OWN_FORMULA_NOTICE",
    "Loss",
    "LossCall",
    "LossGraph",
    "TokenLoss",
    "check_datum",
    "cispo",
    "cross_entropy",
    "dro",
    "gspo",
    "importance_sampling",
    "loss_gradient",
    "loss_inputs",
    "loss_metrics",
    "loss_sum",
    "ppo",
    "resolve_loss",
    "stable_reinforce",
]

Array = npt.NDArray[Any]

CUSTOM_CELLS_PER_TOKEN = 1024
"""A custom loss's inputs, made dense, have at most so many cells per token of model_input."""


# ---------------------------------------------------------------------------------------------------------------- checks


def check_datum(datum: Datum, loss: LossCall, *, index: int, vocab_size: int, max_tokens: int) -> None:
    """Refuse a datum this loss can never train on; the message names the field, what it holds and what is needed.

    -inf in `logprobs` is legal where the advantage (or weight) is 0; NaN and +inf are legal nowhere.

    Args:
        index: position in the request's data, for the message.
        vocab_size: ids 0 .. vocab_size - 1 exist, for model_input and target_tokens.
        max_tokens: longest model_input the trainer takes.
    Raises: InvalidRequestError.
    """
    where = f"datum {index}"
    if loss.graph is not None:
        _check_custom(where, datum, loss.graph, vocab_size, max_tokens)
        return
    _check_names(where, datum, loss.name)
    num_tokens = _check_model_input(where, datum.model_input, vocab_size, max_tokens)
    _check_shapes(where, datum, loss.name, num_tokens, vocab_size)
    arrays = {name: tensor.to_numpy() for name, tensor in datum.loss_fn_inputs.items()}
    _check_targets(where, arrays["target_tokens"], vocab_size)
    for name, values in arrays.items():
        if name not in ("target_tokens", "logprobs"):
            _refuse_where(where, name, values, _too_large(values), f"its size must be at most {VALUE_LIMIT:.0e}")
    if "advantages" in arrays:
        counts = arrays["advantages"] != 0
        if "weights" in arrays:
            counts &= arrays["weights"] != 0
        _check_bounds(where, arrays, counts, loss)
        _check_logprobs(where, arrays, counts, loss.name)


def _check_custom(where: str, datum: Datum, graph: LossGraph, vocab_size: int, max_tokens: int) -> None:
    """Each input of the graph is there with its rank; what else the datum brings is not read."""
    num_tokens = _check_model_input(where, datum.model_input, vocab_size, max_tokens)
    for wanted in (replace(graph.inputs[0], name="target_tokens"), *graph.inputs[1:]):
        if wanted.name not in datum.loss_fn_inputs:
            given = ", ".join(datum.loss_fn_inputs) or "none"
            raise InvalidRequestError(f"{where}: input {wanted.name!r} is missing; custom loss {graph.name!r} reads it; given: {given}")
        shape = _shape_of(datum.loss_fn_inputs[wanted.name])
        if len(shape) != wanted.rank:
            raise InvalidRequestError(
                f"{where}: {wanted.name!r} has shape {list(shape)}; custom loss {graph.name!r} was made for rank {wanted.rank}"
            )
        if math.prod(shape) > CUSTOM_CELLS_PER_TOKEN * num_tokens:
            raise InvalidRequestError(
                f"{where}: {wanted.name!r} has shape {list(shape)}; for {num_tokens} tokens a custom loss takes at most "
                f"{CUSTOM_CELLS_PER_TOKEN * num_tokens} cells"
            )
    target_shape = _shape_of(datum.loss_fn_inputs["target_tokens"])
    if target_shape[0] != num_tokens or 0 in target_shape:
        raise InvalidRequestError(f"{where}: 'target_tokens' has shape {list(target_shape)}; it needs [{num_tokens}] or [{num_tokens}, K]")
    _check_targets(where, datum.loss_fn_inputs["target_tokens"].to_numpy(), vocab_size)


def _check_names(where: str, datum: Datum, loss_name: str) -> None:
    spec, given = LOSSES[loss_name], datum.loss_fn_inputs
    known = (*spec.inputs, *spec.optional)
    needs = f"loss {loss_name!r} needs {', '.join(spec.inputs)}" + (f" and takes {', '.join(spec.optional)}" if spec.optional else "")
    for name in given:
        if name not in known:
            raise InvalidRequestError(f"{where}: unknown input {name!r}{did_you_mean(name, known)}; {needs}")
    for name in spec.inputs:
        if name not in given:
            raise InvalidRequestError(f"{where}: input {name!r} is missing; {needs}; given: {', '.join(given) or 'none'}")


def _check_model_input(where: str, model_input: ModelInput, vocab_size: int, max_tokens: int) -> int:
    for position, chunk in enumerate(model_input.chunks):
        if not isinstance(chunk, EncodedTextChunk):
            raise InvalidRequestError(f"{where}: model_input chunk {position} is of type {chunk.type!r}; it must be 'encoded_text'")
    num_tokens = model_input.length
    if num_tokens == 0:
        raise InvalidRequestError(f"{where}: model_input is empty; it needs at least one token")
    if num_tokens > max_tokens:
        raise InvalidRequestError(f"{where}: model_input has {num_tokens} tokens, the model takes at most {max_tokens}; shorten or drop it")
    tokens = model_input.to_ints()
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        at, token = next((at, token) for at, token in enumerate(tokens) if not 0 <= token < vocab_size)
        raise InvalidRequestError(f"{where}: model_input has the token id {token} at position {at}; the model has 0..{vocab_size - 1}")
    return num_tokens


def _check_targets(where: str, target_tokens: Array, vocab_size: int) -> None:
    if target_tokens.dtype.kind == "f":  # whole floats are ids that lost their dtype on the way
        _refuse_where(where, "target_tokens", target_tokens, target_tokens != np.trunc(target_tokens), "token ids are whole numbers")
    known = (target_tokens >= 0) & (target_tokens < vocab_size)
    needed = f"the model has 0..{vocab_size - 1} (where nothing is trained any id will do, e.g. 0, with weight or advantage 0.0)"
    _refuse_where(where, "target_tokens", target_tokens, ~known, needed)


def _shape_of(tensor: TensorData) -> tuple[int, ...]:
    return (len(tensor.data),) if tensor.shape is None else tuple(tensor.shape)


def _check_shapes(where: str, datum: Datum, loss_name: str, num_tokens: int, vocab_size: int) -> None:
    """All inputs [N], or for cross_entropy all [N, K]. Asked before a sparse tensor is made dense: its shape costs nothing to claim."""
    shapes = {name: _shape_of(tensor) for name, tensor in datum.loss_fn_inputs.items()}
    target_shape = shapes["target_tokens"]
    needed_shape: tuple[int, ...] = (num_tokens,)
    if loss_name == "cross_entropy" and len(target_shape) == 2 and target_shape[0] == num_tokens and 0 < target_shape[1] <= vocab_size:
        needed_shape = target_shape
    for name, shape in shapes.items():
        if shape == needed_shape:
            continue
        if len(shape) == 1 and shape[0] != num_tokens:
            advice = "any id, e.g. 0, on the prompt" if name == "target_tokens" else "0.0 on the prompt"
            if shape[0] == num_tokens + 1:
                advice = "drop the first: with model_input = tokens[:-1] every input is sliced [1:]"
            raise InvalidRequestError(
                f"{where}: {name!r} has {shape[0]} values, model_input has {num_tokens} tokens; "
                f"loss {loss_name!r} needs one per token ({advice})"
            )
        needed = f"[{num_tokens}]"
        if loss_name == "cross_entropy":
            needed = f"[{num_tokens}] or [{num_tokens}, K]" if name == "target_tokens" else f"{list(target_shape)}, as 'target_tokens'"
        raise InvalidRequestError(f"{where}: {name!r} has shape {list(shape)}; loss {loss_name!r} needs {needed}")


def _check_bounds(where: str, arrays: Mapping[str, Array], counts: Array, loss: LossCall) -> None:
    if not arrays.keys() & set(BOUNDS):
        return
    low, high = (np.broadcast_to(arrays.get(key, np.float32(loss.config[key])), counts.shape) for key in BOUNDS)
    crossed = counts & (low > high)  # elsewhere they may be padded with 0.0
    if crossed.any():
        at = int(np.argmax(crossed))
        raise InvalidRequestError(
            f"{where}: clip_low_threshold {low[at]:g} is above clip_high_threshold {high[at]:g} at position {at}; "
            f"a bound that is not given per token comes from the config"
        )


def _check_logprobs(where: str, arrays: Mapping[str, Array], counts: Array, loss_name: str) -> None:
    """logprobs must be usable where they count; elsewhere -inf and any other number is legal, NaN and +inf never."""
    logprobs = arrays["logprobs"]
    _refuse_where(where, "logprobs", logprobs, np.isnan(logprobs) | np.isposinf(logprobs), "it must be a log-probability")
    leave_out = "advantage"
    if LOSSES[loss_name].needs_all_tokens:
        kept = arrays["weights"] != 0 if "weights" in arrays else True
        counts, leave_out = counts | (np.isfinite(logprobs) & kept), "weight"
    if "sequence_ratio_mask" in arrays:
        in_ratio = arrays["sequence_ratio_mask"] != 0
        if counts.any() and not in_ratio.any():
            raise InvalidRequestError(
                f"{where}: 'sequence_ratio_mask' is 0 everywhere, but there are advantages; mark the sampled tokens with 1.0, "
                f"their mean log-ratio is the sequence's ratio"
            )
        counts, leave_out = in_ratio & counts.any(), "sequence_ratio_mask"
    needed = f"where a token counts its size must be at most {VALUE_LIMIT:.0e} ({leave_out} 0.0 leaves it out)"
    _refuse_where(where, "logprobs", logprobs, counts & _too_large(logprobs), needed)


def _too_large(values: Array) -> Array:
    return ~(np.abs(values.astype(np.float64)) <= VALUE_LIMIT)  # NaN too


def _refuse_where(where: str, name: str, values: Array, bad: Array, needed: str) -> None:
    if bad.any():
        at = [int(axis[0]) for axis in np.nonzero(bad)]
        position = at[0] if len(at) == 1 else at
        raise InvalidRequestError(f"{where}: {name!r} is {values[tuple(at)]} at position {position}; {needed}")


# ------------------------------------------------------------------------------------------------- tensors, sum, metrics


def loss_inputs(datum: Datum, loss: LossCall) -> dict[str, Tensor]:
    """The datum's loss_fn_inputs as dense CPU tensors: target_tokens int64 [N] or [N, K], all others float32 (for `custom` those it
    reads, as they are). Checked by check_datum."""
    if loss.graph is not None:
        named = {name: datum.loss_fn_inputs[name].to_torch() for name in ("target_tokens", *(item.name for item in loss.graph.inputs[1:]))}
        return {**named, "target_tokens": named["target_tokens"].long()}
    spec = LOSSES[loss.name]
    named = {name: datum.loss_fn_inputs[name].to_torch() for name in (*spec.inputs, *spec.optional) if name in datum.loss_fn_inputs}
    return {name: tensor.long() if name == "target_tokens" else tensor.float() for name, tensor in named.items()}


def loss_sum(loss: LossCall, target_logprobs: list[Tensor], inputs: list[dict[str, Tensor]]) -> Tensor:
    """The loss summed over all tokens of all datums: a float32 scalar with gradient. Grouping datums into calls does not change it.

    Args:
        target_logprobs: per datum [N] or [N, K], the trainer's log-probability of target_tokens at temperature 1.
        inputs: per datum, from loss_inputs; moved to the device of target_logprobs.
    """
    if loss.graph is not None:
        return torch.stack([_custom_loss(loss.graph, *pair) for pair in _pairs(target_logprobs, inputs)]).sum()
    groups = _groups(loss, target_logprobs, inputs)
    return torch.stack([_token_losses(loss, logprobs, fields).sum() for logprobs, fields in groups]).sum()


def loss_gradient(loss: LossCall, target_logprobs: list[Tensor], inputs: list[dict[str, Tensor]]) -> list[Tensor]:
    """dL/d(target_logprobs) of `loss_sum`, per datum in its shape, float32."""
    leaves = [logprobs.detach().float().requires_grad_() for logprobs in target_logprobs]
    with torch.enable_grad():
        total = loss_sum(loss, leaves, inputs)
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if gradient is None else gradient for leaf, gradient in zip(leaves, found, strict=True)]


class TokenLoss:
    """A loss whose value at a token depends on that token alone, so that its gradient can be had as log-probabilities appear, in any order.

    Every loss is of this kind but those over whole sequences (gspo) and uploaded ones (`custom`): ask `is_per_token` first.
    """

    def __init__(self, loss: LossCall, inputs: list[dict[str, Tensor]]) -> None:
        """inputs: per datum, from loss_inputs; tokens (of [N, K] targets, cells) are numbered through all datums."""
        self._loss = loss
        self._fields = _flatten(loss, [(torch.zeros_like(fields["target_tokens"], dtype=torch.float32), fields) for fields in inputs])[1]

    @staticmethod
    def is_per_token(loss: LossCall) -> bool:
        return loss.graph is None and not LOSSES[loss.name].per_sequence

    def may_learn(self) -> Tensor:
        """bool, one per token: False where the gradient is 0 whatever the log-probability, by weight or advantage."""
        fields, learns_T = self._fields, torch.ones_like(next(iter(self._fields.values())), dtype=torch.bool)
        if "weights" in fields:
            learns_T &= fields["weights"] != 0
        if "advantages" in fields and not LOSSES[self._loss.name].needs_all_tokens:
            learns_T &= fields["advantages"] != 0
        return learns_T

    def in_order(self, order_T: Tensor, device: torch.device) -> TokenLoss:
        """The same on another device with its tokens numbered anew: the i-th is the order_T[i]-th of this one."""
        reordered = copy(self)
        reordered._fields = {name: values[order_T].to(device) for name, values in self._fields.items()}
        return reordered

    def gradient(self, first: int, end: int, logprobs_T: Tensor) -> Tensor:
        """dL/dlogprob of tokens first .. end - 1, given theirs; float32."""
        leaf = logprobs_T.detach().requires_grad_()
        with torch.enable_grad():
            total = _token_losses(self._loss, leaf, {name: values[first:end] for name, values in self._fields.items()}).sum()
        (gradient,) = torch.autograd.grad(total, leaf)
        return gradient


def loss_metrics(loss: LossCall, target_logprobs: list[Tensor], inputs: list[dict[str, Tensor]]) -> dict[str, float]:
    """What a user watches, over all datums of one call; keys are `name:reduction`. docs/losses.md says what each one means.

    Means are over the tokens that count; without any, only the sums are there.
    """
    with torch.no_grad():
        if loss.graph is not None:
            return _custom_metrics(loss.graph, _pairs(target_logprobs, inputs))
        groups = _groups(loss, target_logprobs, inputs)
        losses = torch.cat([_token_losses(loss, logprobs, fields) for logprobs, fields in groups])
        metrics = {"loss:sum": losses.double().sum().item()}
        if loss.name == "cross_entropy":
            trained_rows = [(fields["weights"].reshape(len(fields["weights"]), -1) != 0).any(dim=1) for fields in inputs]
            return {**metrics, "tokens:sum": float(torch.cat(trained_rows).sum().item()), **_likelihood_metrics(*groups[0])}
        return {**metrics, **_policy_metrics(loss, groups)}


Pairs = list[tuple[Tensor, dict[str, Tensor]]]


def _pairs(target_logprobs: list[Tensor], inputs: list[dict[str, Tensor]]) -> Pairs:
    if len(target_logprobs) != len(inputs):
        raise ValueError(f"{len(target_logprobs)} target_logprobs for the inputs of {len(inputs)} datums; each needs both")
    return list(zip(target_logprobs, inputs, strict=True))


def _groups(loss: LossCall, target_logprobs: list[Tensor], inputs: list[dict[str, Tensor]]) -> Pairs:
    """The datums as fn wants them: one by one, or all in one flat row of float32 on the trainer's device."""
    pairs = _pairs(target_logprobs, inputs)
    return [_flatten(loss, [pair]) for pair in pairs] if LOSSES[loss.name].per_sequence else [_flatten(loss, pairs)]


def _flatten(loss: LossCall, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
    spec = LOSSES[loss.name]
    device = pairs[0][0].device
    for logprobs, given in pairs:
        for name in spec.inputs[1:]:
            if given[name].shape != logprobs.shape:
                raise ValueError(f"target_logprobs has shape {list(logprobs.shape)}, {name} {list(given[name].shape)}; they must agree")
    fillers = {"weights": 1.0, **loss.config}  # some datums may bring an optional input and others not
    fields: dict[str, Tensor] = {}
    for name in (*spec.inputs[1:], *spec.optional):
        if any(name in given for _, given in pairs):
            rows = [given[name] if name in given else torch.full_like(given[spec.inputs[1]], fillers[name]) for _, given in pairs]
            fields[name] = torch.cat([row.reshape(-1).float() for row in rows]).to(device)
    return torch.cat([logprobs.reshape(-1).float() for logprobs, _ in pairs]), fields


def _token_losses(loss: LossCall, logprobs_T: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
    """fn's value per token, times `weights` where given for a policy loss. A weight of 0.0 removes the token before fn sees it."""
    spec = LOSSES[loss.name]
    arguments = {name: fields[name] for name in spec.inputs[1:]}
    config = {key: fields.get(key, value) for key, value in loss.config.items()}
    if "weights" in arguments or "weights" not in fields:
        return spec.fn(logprobs_T, *arguments.values(), **config)
    weights_T = fields["weights"]
    masked = {"advantages": arguments["advantages"]}
    if spec.needs_all_tokens:
        masked["logprobs"] = arguments["logprobs"]
        logprobs_T = torch.where(weights_T != 0, logprobs_T, 0.0)
    arguments |= {name: torch.where(weights_T != 0, values, 0.0) for name, values in masked.items()}
    return weights_T * spec.fn(logprobs_T, *arguments.values(), **config)


def _custom_loss(graph: LossGraph, logprobs: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
    """One datum's loss with its gradient by `logprobs`, which is taken here: what the graph computed is freed before the next datum's
    runs, and a gradient that cannot be used is the client's error, not the trainer's."""
    inputs = {name: tensor.cpu() for name, tensor in fields.items()}
    leaf = logprobs.detach().float().cpu()
    if not (torch.is_grad_enabled() and logprobs.requires_grad):
        return run_graph(graph, leaf, inputs)[0].to(logprobs.device)
    loss, _ = run_graph(graph, leaf.requires_grad_(), inputs)
    try:
        (gradient,) = torch.autograd.grad(loss, leaf)
    except RuntimeError as err:
        raise InvalidRequestError(f"custom loss {graph.name!r}: its backward pass failed: {err}") from err
    if not torch.isfinite(gradient).all():
        raise InvalidRequestError(
            f"custom loss {graph.name!r}: its gradient is not finite although the loss is; look for sqrt, log or a power at 0, and for "
            f"torch.where over a branch that is infinite"
        )
    gradient = gradient.to(logprobs.device)
    linear = (torch.where(gradient != 0, logprobs, 0.0) * gradient).sum()  # carries the gradient; its value is taken out again
    return loss.detach().to(logprobs.device) + (linear - linear.detach())


def _custom_metrics(graph: LossGraph, pairs: Pairs) -> dict[str, float]:
    """loss:sum and what the graph reports: custom/<name>:sum over the datums, custom/<name>:mean over their number."""
    total = 0.0
    sums = {key: 0.0 for key, _ in graph.metrics}
    for logprobs, fields in pairs:
        loss, metrics = run_graph(graph, logprobs.detach().float().cpu(), {name: tensor.cpu() for name, tensor in fields.items()})
        total += loss.double().item()
        for key, value in metrics.items():
            sums[key] += value.double().item()
    return {"loss:sum": total, **{key: value / len(pairs) if key.endswith(":mean") else value for key, value in sums.items()}}


def _likelihood_metrics(logprobs_T: Tensor, fields: Mapping[str, Tensor]) -> dict[str, float]:
    weights_T = fields["weights"]
    metrics = {"weights:sum": weights_T.double().sum().item()}
    counted = logprobs_T[(weights_T != 0) & torch.isfinite(logprobs_T)].double()
    return metrics | ({"nll:mean": -counted.mean().item()} if counted.numel() else {})


def _policy_metrics(loss: LossCall, groups: Pairs) -> dict[str, float]:
    spec = LOSSES[loss.name]
    ratios, clipped, masked, gaps = [], [], [], []
    for logprobs_T, fields in groups:
        sampling_T, advantages_T = fields["logprobs"], fields["advantages"]
        finite_T = torch.isfinite(logprobs_T) & torch.isfinite(sampling_T)
        kept_T = fields["weights"] != 0 if "weights" in fields else torch.ones_like(logprobs_T, dtype=torch.bool)
        counts_T = kept_T & (finite_T if spec.needs_all_tokens else advantages_T != 0)
        compared_T = counts_T
        ratio_T = torch.exp(token_log_ratio(logprobs_T, sampling_T, counts_T))
        if spec.per_sequence:
            mask_T = fields["sequence_ratio_mask"]
            compared_T = kept_T & (mask_T != 0)
            ratio_T = torch.exp(sequence_log_ratio(logprobs_T, sampling_T, mask_T)).expand_as(logprobs_T)
        ratios.append(ratio_T[counts_T])
        gaps.append((sampling_T - logprobs_T)[compared_T & finite_T])
        if spec.clips == "tail":
            masked_T = counts_T & moved_too_far(logprobs_T, sampling_T, advantages_T, loss.config["max_logprob_gap"])
            masked.append(masked_T[counts_T])
            clipped.append((~masked_T & (ratio_T > loss.config["max_importance_weight"]))[counts_T])
        elif spec.clips != "never":
            bounded_T = clip_ratio(ratio_T, *(fields.get(key, loss.config[key]) for key in BOUNDS))
            cut_T = bounded_T * advantages_T < ratio_T * advantages_T if spec.clips == "gain" else bounded_T != ratio_T
            clipped.append(cut_T[counts_T])
    ratio = torch.cat(ratios).double()
    metrics = {"tokens:sum": float(ratio.numel())}
    if ratio.numel():
        metrics |= {"ratio:mean": ratio.mean().item(), "ratio:max": ratio.max().item(), "ratio:min": ratio.min().item()}
        if clipped:
            name = "truncated_fraction:mean" if spec.clips == "tail" else "clip_fraction:mean"
            metrics[name] = torch.cat(clipped).double().mean().item()
        if masked:
            metrics["masked_fraction:mean"] = torch.cat(masked).double().mean().item()
    gap = torch.cat(gaps).double()
    if gap.numel():
        metrics |= {"kl_sample_train_v1:mean": gap.mean().item(), "kl_sample_train_v2:mean": 0.5 * gap.square().mean().item()}
    return metrics
