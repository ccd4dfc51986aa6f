"""Losses: which there are, what a datum must bring for them, their sum, and what a user watches.

    call = resolve_loss("ppo", {"clip_high_threshold": 1.3})     names and numbers checked, defaults filled in
    check_datum(datum, call, index=3, ...)                       refuses what can never work, by name
    inputs = [loss_inputs(datum, call) for datum in data]        dense tensors
    loss_sum(call, target_logprobs, inputs).backward()           a plain sum over tokens and datums: no mean, no division
    loss_metrics(call, target_logprobs, inputs)                  "loss:sum", "ratio:mean", ...

The formulas are in loss_formulas.py, their explanation with worked numbers in docs/losses.md.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ptlab.errors import InvalidRequestError
from ptlab.loss_formulas import cispo, clip_ratio, cross_entropy, dro, gspo, importance_sampling, ppo, sequence_log_ratio, token_log_ratio
from ptlab.types import Datum, EncodedTextChunk, ModelInput, TensorData

__all__ = [
    "LOSSES",
    "Loss",
    "LossCall",
    "check_datum",
    "cispo",
    "cross_entropy",
    "dro",
    "gspo",
    "importance_sampling",
    "loss_inputs",
    "loss_metrics",
    "loss_sum",
    "ppo",
    "resolve_loss",
]

Array = npt.NDArray[Any]

VALUE_LIMIT = 1e9
"""Weights, advantages, bounds, and log-probabilities that count, are at most this large: their products stay inside float32."""


@dataclass(frozen=True, slots=True)
class LossCall:
    """A loss and its numbers, as resolve_loss made them."""

    name: str
    config: Mapping[str, float]
    """Complete: defaults filled in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """A row of LOSSES."""

    fn: Callable[..., Tensor]
    """fn(target_logprobs, *inputs without target_tokens, **config) -> one value per token."""
    inputs: tuple[str, ...]
    """Required loss_fn_inputs, target_tokens first, the others in the order of fn's arguments."""
    optional: tuple[str, ...] = ()
    """Accepted loss_fn_inputs: `weights` multiplies a token's loss (0.0 leaves it out); a config key by its name, one value per token."""
    defaults: Mapping[str, float] = field(default_factory=dict)
    per_sequence: bool = False
    """fn needs to see exactly one datum."""
    needs_all_tokens: bool = False
    """A token of advantage 0.0 still has a loss (dro)."""
    clips: Literal["never", "gain", "weight"] = "never"
    """What the bounds cut: the gain of a token (its gradient vanishes), or its importance weight (the gradient stays, bounded)."""


_POLICY_INPUTS = ("target_tokens", "logprobs", "advantages")
_BOUNDS = ("clip_low_threshold", "clip_high_threshold")

LOSSES: Mapping[str, Loss] = MappingProxyType(
    {
        "cross_entropy": Loss(fn=cross_entropy, inputs=("target_tokens", "weights")),
        "importance_sampling": Loss(fn=importance_sampling, inputs=_POLICY_INPUTS, optional=("weights",)),
        "ppo": Loss(
            fn=ppo,
            inputs=_POLICY_INPUTS,
            optional=("weights", *_BOUNDS),
            defaults={"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
            clips="gain",
        ),
        "cispo": Loss(
            fn=cispo,
            inputs=_POLICY_INPUTS,
            optional=("weights", *_BOUNDS),
            defaults={"clip_low_threshold": 0.0, "clip_high_threshold": 4.0},
            clips="weight",
        ),
        # Tinker's default beta is not public; 0.05 is the value of its documentation's example.
        "dro": Loss(fn=dro, inputs=_POLICY_INPUTS, optional=("weights",), defaults={"beta": 0.05}, needs_all_tokens=True),
        # Tinker's default bounds are not public; these are the paper's (section 5.1).
        "gspo": Loss(
            fn=gspo,
            inputs=(*_POLICY_INPUTS, "sequence_ratio_mask"),
            optional=("weights",),
            defaults={"clip_low_threshold": 1 - 3e-4, "clip_high_threshold": 1 + 4e-4},
            per_sequence=True,
            clips="gain",
        ),
    }
)

# Names of the API that are not in the table, and why.
_REFUSED_LOSSES: Mapping[str, str] = MappingProxyType(
    {
        "stable_reinforce": "loss 'stable_reinforce' is not served: its formula is not public; "
        "'importance_sampling' and 'cispo' are the nearest that are",
        "custom": "loss 'custom' is not served: ptlab runs no uploaded loss graphs inside the trainer; call "
        "forward_backward_custom(data, loss_fn) with your function, which runs on the client and sends its gradient",
    }
)


def resolve_loss(name: str, config: Mapping[str, float | str] | None = None) -> LossCall:
    """The loss of that name, its config checked and completed.

    Raises: InvalidRequestError for an unknown name or key (with the nearest known one), and for numbers that cannot work.
    """
    if name in _REFUSED_LOSSES:
        raise InvalidRequestError(_REFUSED_LOSSES[name])
    if name not in LOSSES:
        raise InvalidRequestError(f"unknown loss {name!r}{_nearest(name, LOSSES)}; known: {', '.join(LOSSES)}")
    defaults = LOSSES[name].defaults
    given: dict[str, float] = {}
    for key, value in (config or {}).items():
        if key not in defaults:
            known = f"known: {', '.join(defaults)}" if defaults else "it has no config"
            raise InvalidRequestError(f"loss {name!r}: unknown config key {key!r}{_nearest(key, defaults)}; {known}")
        if isinstance(value, (bool, str)) or not isinstance(value, Real):
            raise InvalidRequestError(f"loss {name!r}: config {key!r} is {value!r}; it must be a number")
        if not abs(float(value)) <= VALUE_LIMIT:
            raise InvalidRequestError(f"loss {name!r}: config {key!r} is {float(value)}; its size must be at most {VALUE_LIMIT:.0e}")
        given[key] = float(value)
    complete = {**defaults, **given}
    _check_config(name, complete)
    return LossCall(name, complete)


def _check_config(name: str, config: Mapping[str, float]) -> None:
    if config.get("beta", 0.0) < 0:
        raise InvalidRequestError(f"loss {name!r}: beta is {config['beta']}; it must be >= 0 (a negative one rewards leaving the sampler)")
    if "clip_low_threshold" not in config:
        return
    low, high = config["clip_low_threshold"], config["clip_high_threshold"]
    if low > high:
        raise InvalidRequestError(f"loss {name!r}: clip_low_threshold {low} is above clip_high_threshold {high}; exchange them?")
    if LOSSES[name].clips == "gain" and not low <= 1 <= high:
        raise InvalidRequestError(
            f"loss {name!r}: clip_low_threshold {low} and clip_high_threshold {high} do not enclose 1, "
            f"so on-policy tokens would not learn; the bounds are ratios (e.g. 0.8 and 1.2), not distances from 1 (0.2)"
        )


def _nearest(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


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


def _check_names(where: str, datum: Datum, loss_name: str) -> None:
    spec, given = LOSSES[loss_name], datum.loss_fn_inputs
    known = (*spec.inputs, *spec.optional)
    needs = f"loss {loss_name!r} needs {', '.join(spec.inputs)}" + (f" and takes {', '.join(spec.optional)}" if spec.optional else "")
    for name in given:
        if name not in known:
            raise InvalidRequestError(f"{where}: unknown input {name!r}{_nearest(name, known)}; {needs}")
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
    if not arrays.keys() & set(_BOUNDS):
        return
    low, high = (np.broadcast_to(arrays.get(key, np.float32(loss.config[key])), counts.shape) for key in _BOUNDS)
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
    """The datum's loss_fn_inputs as dense CPU tensors: target_tokens int64 [N] or [N, K], all others float32. Checked by check_datum."""
    spec = LOSSES[loss.name]
    named = {name: datum.loss_fn_inputs[name].to_torch() for name in (*spec.inputs, *spec.optional) if name in datum.loss_fn_inputs}
    return {name: tensor.long() if name == "target_tokens" else tensor.float() for name, tensor in named.items()}


def loss_sum(loss: LossCall, target_logprobs: list[Tensor], inputs: list[dict[str, Tensor]]) -> Tensor:
    """The loss summed over all tokens of all datums: a float32 scalar with gradient. Grouping datums into calls does not change it.

    Args:
        target_logprobs: per datum [N] or [N, K], the trainer's log-probability of target_tokens at temperature 1.
        inputs: per datum, from loss_inputs; moved to the device of target_logprobs.
    """
    groups = _groups(loss, target_logprobs, inputs)
    return torch.stack([_token_losses(loss, logprobs, fields).sum() for logprobs, fields in groups]).sum()


def loss_metrics(loss: LossCall, target_logprobs: list[Tensor], inputs: list[dict[str, Tensor]]) -> dict[str, float]:
    """What a user watches, over all datums of one call; keys are `name:reduction`. docs/losses.md says what each one means.

    Means are over the tokens that count; without any, only the sums are there.
    """
    with torch.no_grad():
        groups = _groups(loss, target_logprobs, inputs)
        losses = torch.cat([_token_losses(loss, logprobs, fields) for logprobs, fields in groups])
        metrics = {"loss:sum": losses.double().sum().item()}
        if loss.name == "cross_entropy":
            trained_rows = [(fields["weights"].reshape(len(fields["weights"]), -1) != 0).any(dim=1) for fields in inputs]
            return {**metrics, "tokens:sum": float(torch.cat(trained_rows).sum().item()), **_likelihood_metrics(*groups[0])}
        return {**metrics, **_policy_metrics(loss, groups)}


def _groups(loss: LossCall, target_logprobs: list[Tensor], inputs: list[dict[str, Tensor]]) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """The datums as fn wants them: one by one, or all in one flat row of float32 on the trainer's device."""
    if len(target_logprobs) != len(inputs):
        raise ValueError(f"{len(target_logprobs)} target_logprobs for the inputs of {len(inputs)} datums; each needs both")
    pairs = list(zip(target_logprobs, inputs, strict=True))
    return [_flatten(loss, [pair]) for pair in pairs] if LOSSES[loss.name].per_sequence else [_flatten(loss, pairs)]


def _flatten(loss: LossCall, pairs: list[tuple[Tensor, dict[str, Tensor]]]) -> tuple[Tensor, dict[str, Tensor]]:
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


def _likelihood_metrics(logprobs_T: Tensor, fields: Mapping[str, Tensor]) -> dict[str, float]:
    weights_T = fields["weights"]
    metrics = {"weights:sum": weights_T.double().sum().item()}
    counted = logprobs_T[(weights_T != 0) & torch.isfinite(logprobs_T)].double()
    return metrics | ({"nll:mean": -counted.mean().item()} if counted.numel() else {})


def _policy_metrics(loss: LossCall, groups: list[tuple[Tensor, dict[str, Tensor]]]) -> dict[str, float]:
    spec = LOSSES[loss.name]
    ratios, clipped, gaps = [], [], []
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
        if spec.clips != "never":
            bounded_T = clip_ratio(ratio_T, *(fields.get(key, loss.config[key]) for key in _BOUNDS))
            cut_T = bounded_T * advantages_T < ratio_T * advantages_T if spec.clips == "gain" else bounded_T != ratio_T
            clipped.append(cut_T[counts_T])
    ratio = torch.cat(ratios).double()
    metrics = {"tokens:sum": float(ratio.numel())}
    if ratio.numel():
        metrics |= {"ratio:mean": ratio.mean().item(), "ratio:max": ratio.max().item(), "ratio:min": ratio.min().item()}
        if clipped:
            metrics["clip_fraction:mean"] = torch.cat(clipped).double().mean().item()
    gap = torch.cat(gaps).double()
    if gap.numel():
        metrics |= {"kl_sample_train_v1:mean": gap.mean().item(), "kl_sample_train_v2:mean": 0.5 * gap.square().mean().item()}
    return metrics
