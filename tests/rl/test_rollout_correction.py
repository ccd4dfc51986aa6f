"""TIS and MIS: weights by hand, the gradient that a loss then has, and what is left alone."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from ptlab.config import RlConfig
from ptlab.losses import LOSSES, check_datum, loss_inputs, loss_metrics, loss_sum, resolve_loss
from ptlab.rl.datums import trajectory_to_datums
from ptlab.rl.rollout_correction import MaskConfig, NoCorrectionConfig, TruncateConfig, correct, corrected
from ptlab.rl.types import Trajectory, Transition
from ptlab.types import Datum, ForwardBackwardOutput, ModelInput, TensorData

POLICY_LOSSES = [name for name, loss in LOSSES.items() if "advantages" in loss.inputs]
RATIOS = np.array([3.0, 1.5, 0.4, 0.9])  # p_old / q of the four sampled tokens
OLD = np.array([-9.0, *np.log([0.3, 0.3, 0.2, 0.09])])  # the first is of a token of the prompt
ADVANTAGE = -2.0


def datum(loss: str = "importance_sampling") -> Datum:
    sampling = (OLD[1:] - np.log(RATIOS)).tolist()
    turn = Transition(
        observation=ModelInput.from_ints([5, 6]), action=[1, 2, 3, 4], sampling_logprobs_T=sampling, policy_version=0, stop_reason="stop",
        reward=0.0, episode_done=True,
    )  # fmt: skip
    [made] = trajectory_to_datums(Trajectory(transitions=[turn], stop_reason="done"), ADVANTAGE, loss=loss)
    return made


def values(datum: Datum, name: str) -> np.ndarray:
    return datum.loss_fn_inputs[name].to_numpy()


def gradient(datum: Datum, loss: str, logprobs: np.ndarray, **config: float) -> np.ndarray:
    """d loss / d log p."""
    call = resolve_loss(loss, config)
    check_datum(datum, call, index=0, vocab_size=100, max_tokens=100)
    leaf = torch.tensor(logprobs, dtype=torch.float32, requires_grad=True)
    loss_sum(call, [leaf], [loss_inputs(datum, call)]).backward()
    assert leaf.grad is not None
    return leaf.grad.numpy()


@pytest.mark.parametrize(
    ("correction", "weights", "name", "share"),
    [
        (TruncateConfig(high=2.0), [2.0, 1.5, 0.4, 0.9], "truncated", 0.25),
        (MaskConfig(low=0.5, high=2.0), [0.0, 1.5, 0.0, 0.9], "masked", 0.5),
        (TruncateConfig(level="sequence", high=2.0), [1.62] * 4, "truncated", 0.0),  # 3 x 1.5 x 0.4 x 0.9
        (TruncateConfig(level="sequence", high=1.25), [1.25] * 4, "truncated", 1.0),
        (MaskConfig(level="sequence", low=0.5, high=1.7), [1.62] * 4, "masked", 0.0),
        (MaskConfig(level="sequence", low=0.5, high=1.5), [0.0] * 4, "masked", 1.0),
    ],
)
def test_weights_logprobs_and_metrics_by_hand(correction, weights, name, share):
    [new], metrics = correct([datum()], [OLD], correction)
    np.testing.assert_allclose(values(new, "weights"), [0.0, *weights], rtol=1e-6)
    np.testing.assert_allclose(values(new, "logprobs"), OLD, rtol=1e-6)
    np.testing.assert_array_equal(values(new, "advantages"), [0.0, *[ADVANTAGE] * 4])
    ratios = RATIOS if correction.level == "token" else np.array([1.62])
    assert metrics == pytest.approx(
        {"correction/ratio_mean": ratios.mean(), "correction/ratio_max": ratios.max(), "correction/ratio_min": ratios.min(),
         f"correction/{name}_frac": share}
    )  # fmt: skip


@pytest.mark.parametrize("loss", [name for name in POLICY_LOSSES if name != "gspo"])
@pytest.mark.parametrize(
    ("correction", "weights"), [(TruncateConfig(high=2.0), [2.0, 1.5, 0.4, 0.9]), (MaskConfig(), [0.0, 1.5, 0.0, 0.9])]
)
def test_at_the_first_update_every_loss_has_the_weighted_policy_gradient(loss, correction, weights):
    [new], _ = correct([datum(loss)], [OLD], correction)
    np.testing.assert_allclose(gradient(new, loss, OLD), [0.0, *(-np.array(weights) * ADVANTAGE)], rtol=1e-5, atol=1e-7)


def test_truncation_is_cispo_while_the_trainer_has_not_moved():
    [new], _ = correct([datum()], [OLD], TruncateConfig(high=2.0))
    cispo = gradient(datum("cispo"), "cispo", OLD, clip_low_threshold=0.0, clip_high_threshold=2.0)
    np.testing.assert_allclose(gradient(new, "importance_sampling", OLD), cispo, rtol=1e-5)


def test_a_clip_sees_what_the_batch_moved_and_not_what_was_stale():
    """After the first minibatch the ratio to p_old is 1.1 for all tokens; ppo's bounds, 0.8 and 1.2, hold none of them back."""
    moved = OLD + math.log(1.1)
    [new], _ = correct([datum("ppo")], [OLD], TruncateConfig(high=2.0))
    np.testing.assert_allclose(gradient(new, "ppo", moved)[1:], 1.1 * np.array([2.0, 1.5, 0.4, 0.9]) * 2.0, rtol=1e-5)
    stale = gradient(datum("ppo"), "ppo", moved)[1:]  # uncorrected: ratio 0.44 < 0.8 with a negative advantage is clipped
    np.testing.assert_allclose(stale, [3.3 * 2, 1.65 * 2, 0.0, 0.99 * 2], rtol=1e-5)


def test_gspo_keeps_the_ratio_of_the_whole_sequence():
    """A masked token loses its loss, not its share in the mean log-ratio of what the batch moved."""
    moved = OLD + np.array([5.0, 1e-4, 2e-4, 3e-4, 4e-4])
    [new], _ = correct([datum("gspo")], [OLD], MaskConfig())
    call = resolve_loss("gspo")
    metrics = loss_metrics(call, [torch.tensor(moved, dtype=torch.float32)], [loss_inputs(new, call)])
    assert metrics["ratio:mean"] == pytest.approx(math.exp(2.5e-4), abs=1e-6)
    assert metrics["tokens:sum"] == 2.0
    np.testing.assert_allclose(gradient(new, "gspo", OLD), [0.0, 0.0, 3.0, 0.0, 1.8], rtol=1e-5)


def test_weights_that_a_datum_has_are_multiplied():
    """dro's leave the prompt out; that stays so."""
    made = datum("dro")
    made.loss_fn_inputs["weights"] = TensorData.from_numpy(np.array([0.0, 0.5, 0.5, 0.5, 0.0], dtype=np.float32))
    [new], metrics = correct([made], [OLD], TruncateConfig(high=2.0))
    np.testing.assert_allclose(values(new, "weights"), [0.0, 1.0, 0.75, 0.2, 0.0], rtol=1e-6)
    assert metrics["correction/ratio_mean"] == pytest.approx(RATIOS[:3].mean())


def test_metrics_are_over_all_datums_and_the_given_ones_stay_as_they_are():
    made = [datum(), datum()]
    before = [{name: values(one, name).copy() for name in one.loss_fn_inputs} for one in made]
    doubled = OLD + math.log(2)
    _, metrics = correct(made, [OLD, doubled], TruncateConfig(high=2.0))
    assert metrics["correction/ratio_mean"] == pytest.approx(1.5 * RATIOS.mean())
    assert metrics["correction/ratio_max"] == pytest.approx(6.0) and metrics["correction/truncated_frac"] == 3 / 8
    for one, old in zip(made, before, strict=True):
        assert one.loss_fn_inputs.keys() == old.keys()
        assert all((values(one, name) == old[name]).all() for name in old)


def test_ratios_without_bound_do_not_overflow():
    new, metrics = correct([datum()], [np.array([0.0, 900.0, -900.0, -np.inf, 0.0])], TruncateConfig(high=2.0))
    assert values(new[0], "weights").tolist() == [0.0, 2.0, 0.0, 0.0, 2.0]
    assert metrics["correction/ratio_max"] == pytest.approx(math.exp(40))


@dataclass
class Trainer:
    """Answers `forward` with OLD."""

    asked: list[tuple[Any, ...]] = field(default_factory=list)

    async def forward(self, data: list[Datum], loss_fn: str, config: Any) -> ForwardBackwardOutput:
        self.asked.append((len(data), loss_fn, dict(config)))
        return ForwardBackwardOutput("ArrayRecord", [{"logprobs": TensorData.from_numpy(OLD.astype(np.float32))} for _ in data])


def test_the_trainer_is_asked_once_and_only_if_there_is_a_correction():
    trainer = Trainer()
    new, metrics = asyncio.run(corrected([datum("ppo")] * 3, MaskConfig(), trainer, "ppo", {"clip_high_threshold": 1.5}))  # type: ignore[arg-type]
    assert trainer.asked == [(3, "ppo", {"clip_high_threshold": 1.5})]
    np.testing.assert_allclose(values(new[2], "weights"), [0.0, 0.0, 1.5, 0.0, 0.9], rtol=1e-5)
    assert metrics["correction/masked_frac"] == 0.5
    given = [datum()]
    assert asyncio.run(corrected(given, NoCorrectionConfig(), trainer, "ppo", {})) == (given, {})  # type: ignore[arg-type]
    assert len(trainer.asked) == 1


def test_the_config_knows_what_each_kind_needs():
    def correction(**given: Any) -> Any:
        return RlConfig.model_validate({"name": "x", "correction": given}).correction

    assert RlConfig(name="x").correction.kind == "none"
    assert correction(kind="truncate") == TruncateConfig(level="token", high=2.0)
    assert correction(kind="mask", level="sequence") == MaskConfig(level="sequence", low=0.5, high=2.0)
    for bad in (
        {"kind": "truncate", "low": 0.5},
        {"kind": "mask", "low": 1.5},
        {"kind": "truncate", "high": 0.9},
        {"kind": "none", "high": 2.0},
    ):
        with pytest.raises(ValueError):
            correction(**bad)
