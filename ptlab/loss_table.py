"""The table of losses and what a request may say about one: its name, its numbers, for `custom` its graph.

Use it as `from ptlab.losses import LOSSES, resolve_loss`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from types import MappingProxyType
from typing import Literal

from torch import Tensor

from ptlab.errors import InvalidRequestError
from ptlab.loss_formulas import cispo, cross_entropy, dro, gspo, importance_sampling, ppo, stable_reinforce
from ptlab.loss_graph import LossGraph

VALUE_LIMIT = 1e9
"""Weights, advantages, bounds, and log-probabilities that count, are at most this large: their products stay inside float32."""
CUSTOM = "custom"
"""The loss that a client uploaded as a graph; it stands in no table."""
BOUNDS = ("clip_low_threshold", "clip_high_threshold")
STABLE_REINFORCE_DEFAULTS: Mapping[str, float] = MappingProxyType({"kl_coeff": 0.0, "max_importance_weight": 2.0, "max_logprob_gap": 0.3})
"""Measured on the quickstart task with stale rollouts: docs/losses.md, docs/LOG.md."""
OWN_FORMULAS = frozenset({"stable_reinforce"})
OWN_FORMULA_NOTICE = (
    "loss 'stable_reinforce' is ptlab's formula, not the hosted service's, which is not public: REINFORCE with a truncated importance "
    "weight and a mask on tokens that moved too far (docs/losses.md); results may differ from the service's"
)
"""For a one-time warning, and for the server's capabilities."""


@dataclass(frozen=True, slots=True)
class LossCall:
    """A loss and its numbers, as resolve_loss made them."""

    name: str
    config: Mapping[str, float]
    """Complete: defaults filled in."""
    graph: LossGraph | None = None
    """What `custom` computes; None for every other loss."""


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
    clips: Literal["never", "gain", "weight", "tail"] = "never"
    """What the bounds cut: the gain of a token (its gradient vanishes), its importance weight (the gradient stays, bounded), or the tail:
    a large weight is bounded, and a token that moved too far is left out (stable_reinforce)."""


_POLICY_INPUTS = ("target_tokens", "logprobs", "advantages")

LOSSES: Mapping[str, Loss] = MappingProxyType(
    {
        "cross_entropy": Loss(fn=cross_entropy, inputs=("target_tokens", "weights")),
        "importance_sampling": Loss(fn=importance_sampling, inputs=_POLICY_INPUTS, optional=("weights",)),
        "ppo": Loss(
            fn=ppo,
            inputs=_POLICY_INPUTS,
            optional=("weights", *BOUNDS),
            defaults={"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
            clips="gain",
        ),
        "cispo": Loss(
            fn=cispo,
            inputs=_POLICY_INPUTS,
            optional=("weights", *BOUNDS),
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
        # The formula and its numbers are ptlab's own; only the name and kl_coeff are Tinker's.
        "stable_reinforce": Loss(
            fn=stable_reinforce, inputs=_POLICY_INPUTS, optional=("weights",), defaults=STABLE_REINFORCE_DEFAULTS, clips="tail"
        ),
    }
)


def resolve_loss(
    name: str, config: Mapping[str, float | str] | None = None, *, graph: LossGraph | None = None, strict: bool = False
) -> LossCall:
    """The loss of that name, its config checked and completed.

    Args:
        graph: for `custom`, what its loss_id names; whoever calls has looked it up (`config["loss_id"]`).
        strict: refuse a loss whose formula is ptlab's own although the hosted service has one of that name.
    Raises: InvalidRequestError for an unknown name or key (with the nearest known one), and for numbers that cannot work.
    """
    if name == CUSTOM:
        return _custom_call(config or {}, graph)
    if name not in LOSSES:
        known = ", ".join((*LOSSES, CUSTOM))
        raise InvalidRequestError(f"unknown loss {name!r}{did_you_mean(name, (*LOSSES, CUSTOM))}; known: {known}")
    if strict and name in OWN_FORMULAS:
        raise InvalidRequestError(f"{OWN_FORMULA_NOTICE}. Strict losses are asked for, so it is refused; take ppo or cispo")
    defaults = LOSSES[name].defaults
    given: dict[str, float] = {}
    for key, value in (config or {}).items():
        if key not in defaults:
            known = f"known: {', '.join(defaults)}" if defaults else "it has no config"
            raise InvalidRequestError(f"loss {name!r}: unknown config key {key!r}{did_you_mean(key, defaults)}; {known}")
        if isinstance(value, (bool, str)) or not isinstance(value, Real):
            raise InvalidRequestError(f"loss {name!r}: config {key!r} is {value!r}; it must be a number")
        if not abs(float(value)) <= VALUE_LIMIT:
            raise InvalidRequestError(f"loss {name!r}: config {key!r} is {float(value)}; its size must be at most {VALUE_LIMIT:.0e}")
        given[key] = float(value)
    complete = {**defaults, **given}
    _check_config(name, complete)
    return LossCall(name, complete)


def _custom_call(config: Mapping[str, float | str], graph: LossGraph | None) -> LossCall:
    for key in config:
        if key != "loss_id":
            raise InvalidRequestError(f"loss {CUSTOM!r}: unknown config key {key!r}; known: loss_id (a loss brings its numbers itself)")
    if graph is None:
        raise InvalidRequestError(
            f"loss {CUSTOM!r} runs a graph that was uploaded with create_custom_loss, named by config 'loss_id'; there is none here. "
            f"forward_backward_custom(data, loss_fn) takes a function, runs it on the client and sends its gradient"
        )
    return LossCall(CUSTOM, {}, graph)


def _check_config(name: str, config: Mapping[str, float]) -> None:
    if config.get("beta", 0.0) < 0:
        raise InvalidRequestError(f"loss {name!r}: beta is {config['beta']}; it must be >= 0 (a negative one rewards leaving the sampler)")
    if config.get("kl_coeff", 0.0) < 0:
        raise InvalidRequestError(f"loss {name!r}: kl_coeff is {config['kl_coeff']}; it must be >= 0 (0 = no penalty)")
    if not config.get("max_importance_weight", 1.0) >= 1:
        raise InvalidRequestError(
            f"loss {name!r}: max_importance_weight is {config['max_importance_weight']}; it must be >= 1, the weight of an on-policy token"
        )
    if not config.get("max_logprob_gap", 1.0) > 0:
        raise InvalidRequestError(
            f"loss {name!r}: max_logprob_gap is {config['max_logprob_gap']}; it must be > 0 (nats), or nothing learns"
        )
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


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'ppo'?)`, or nothing when no known name is near."""
    matches = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
