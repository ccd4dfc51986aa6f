"""The table of losses, and what a request may say about one."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest

from ptlab.errors import InvalidRequestError
from ptlab.losses import LOSSES, LossCall, resolve_loss

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("name", "defaults"),
    [
        ("cross_entropy", {}),
        ("importance_sampling", {}),
        ("ppo", {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
        ("cispo", {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}),
        ("dro", {"beta": 0.05}),
        ("gspo", {"clip_low_threshold": 0.9997, "clip_high_threshold": 1.0004}),
        ("stable_reinforce", {"kl_coeff": 0.0, "max_importance_weight": 2.0, "max_logprob_gap": 0.3}),
    ],
)
def test_defaults_are_those_of_the_api(name: str, defaults: dict[str, float]) -> None:
    assert resolve_loss(name) == resolve_loss(name, {}) == LossCall(name, pytest.approx(defaults))
    assert set(LOSSES) == {"cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo", "stable_reinforce"}


def test_a_given_number_replaces_one_default_and_leaves_the_table_alone() -> None:
    call = resolve_loss("ppo", {"clip_high_threshold": np.float32(1.5)})  # numpy scalars come from sweeps
    assert call.config == {"clip_low_threshold": 0.8, "clip_high_threshold": 1.5}
    assert resolve_loss("ppo").config["clip_high_threshold"] == 1.2


def test_a_loss_call_can_cross_a_process_border() -> None:
    call = resolve_loss("cispo", {"clip_high_threshold": 3})
    assert pickle.loads(pickle.dumps(call)) == copy.deepcopy(call) == call


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("ppoo", {}, r"unknown loss 'ppoo' \(did you mean 'ppo'\?\); known: cross_entropy, importance_sampling, ppo, cispo, dro, gspo, s"),
        ("reinforce", {}, r"unknown loss 'reinforce'.*known: cross_entropy"),
        ("custom", {"loss_id": "loss-0"}, r"'custom' runs a graph that was uploaded.*forward_backward_custom\(data, loss_fn\)"),
        ("custom", {"beta": 0.1}, r"loss 'custom': unknown config key 'beta'; known: loss_id"),
        ("custum", {}, r"unknown loss 'custum' \(did you mean 'custom'\?\)"),
        ("stable_reinforce", {"kl_coef": 0.1}, r"unknown config key 'kl_coef' \(did you mean 'kl_coeff'\?\)"),
        ("stable_reinforce", {"kl_coeff": -0.1}, r"kl_coeff is -0.1; it must be >= 0"),
        ("stable_reinforce", {"max_importance_weight": 0.9}, r"max_importance_weight is 0.9; it must be >= 1"),
        ("stable_reinforce", {"max_logprob_gap": 0}, r"max_logprob_gap is 0.0; it must be > 0"),
        ("ppo", {"clip_low": 0.8}, r"loss 'ppo': unknown config key 'clip_low' \(did you mean 'clip_low_threshold'\?\); known: clip_low"),
        ("importance_sampling", {"beta": 0.1}, r"unknown config key 'beta'; it has no config"),
        ("dro", {"beta": NAN}, r"loss 'dro': config 'beta' is nan"),
        ("cispo", {"clip_high_threshold": INF}, r"config 'clip_high_threshold' is inf; its size must be at most 1e\+09"),
        ("dro", {"beta": "0.1"}, r"config 'beta' is '0.1'; it must be a number"),
        ("dro", {"beta": True}, r"config 'beta' is True; it must be a number"),
        ("dro", {"beta": -0.1}, r"beta is -0.1; it must be >= 0"),
        ("cispo", {"clip_low_threshold": 5.0}, r"clip_low_threshold 5.0 is above clip_high_threshold 4.0"),
        ("ppo", {"clip_low_threshold": 0.2, "clip_high_threshold": 0.2}, r"do not enclose 1.*ratios \(e.g. 0.8 and 1.2\), not distances"),
        ("gspo", {"clip_low_threshold": 3e-4, "clip_high_threshold": 4e-4}, r"loss 'gspo'.*do not enclose 1"),
    ],
)
def test_resolve_refuses_by_name(name: str, config: dict[str, float | str], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        resolve_loss(name, config)


def test_strict_losses_refuse_what_is_not_the_services_own_formula() -> None:
    with pytest.raises(InvalidRequestError, match=r"ptlab's formula, not the hosted service's.*Strict losses are asked for"):
        resolve_loss("stable_reinforce", strict=True)
    assert resolve_loss("ppo", strict=True) == resolve_loss("ppo")


def test_cispo_bounds_need_not_enclose_one() -> None:
    # they bound a weight, not the gain: with (0, 0.5) every token still learns
    assert resolve_loss("cispo", {"clip_high_threshold": 0.5}).config["clip_high_threshold"] == 0.5
