"""Every loss against a second implementation: float64 numpy, gradients derived by hand, no autograd and no clamp.

The path tested is the trainer's: Datum -> check_datum -> loss_inputs -> loss_sum -> backward.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pytest
import torch

from ptlab.losses import LOSSES, LossCall, check_datum, loss_inputs, loss_metrics, loss_sum, resolve_loss
from ptlab.types import Datum, ModelInput

Floats = npt.NDArray[np.float64]
VOCAB_SIZE = 1000
RELATIVE_ERROR = 1e-5  # the acceptance bound of issue 2; float32 rounding of log p - log q costs about 1e-6 of it
ABSOLUTE_ERROR = 1e-6  # of gradients that are differences of terms of size 1: where they cancel, a rounding of them remains
DIFFERENCES = ("dro", "stable_reinforce")

CONFIGS: Mapping[str, list[dict[str, float]]] = {
    "cross_entropy": [{}],
    "importance_sampling": [{}],
    "ppo": [{}, {"clip_low_threshold": 0.5, "clip_high_threshold": 3.0}],
    "cispo": [{}, {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}],
    "dro": [{}, {"beta": 0.7}],
    "gspo": [{}, {"clip_low_threshold": 0.5, "clip_high_threshold": 1.5}],
    "stable_reinforce": [{}, {"kl_coeff": 0.3, "max_importance_weight": 1.5, "max_logprob_gap": 0.3}],
}
CASES = [(name, config) for name, configs in CONFIGS.items() for config in configs]


def reference(name: str, lp: Floats, given: Mapping[str, Floats], config: Mapping[str, float]) -> tuple[Floats, Floats]:
    """(loss, dloss/dlp) of each token of one datum, from the formulas of the contract's section 3."""
    weights = given.get("weights", np.ones_like(lp))
    if name == "cross_entropy":
        return -weights * lp, -weights
    q, advantages = given["logprobs"], given["advantages"]
    if name == "dro":
        loss = -(lp * advantages) + 0.5 * config["beta"] * (lp - q) ** 2
        return weights * loss, weights * (config["beta"] * (lp - q) - advantages)
    ratio = np.exp(lp - q)
    if name == "stable_reinforce":
        kl_coeff, cap, gap = (config[key] for key in ("kl_coeff", "max_importance_weight", "max_logprob_gap"))
        weight = np.where(ratio > cap, cap, ratio)
        learns = np.where(advantages > 0, lp - q <= gap, q - lp <= gap).astype(float)
        # k3 up to the cap, from there on its tangent
        k3 = np.where(ratio > cap, cap - 1 - np.log(cap) + (cap - 1) * (lp - q - np.log(cap)), ratio - 1 - (lp - q))
        counts = (advantages != 0) & (weights != 0)
        loss = -learns * weight * advantages * lp + counts * kl_coeff * k3
        return weights * loss, weights * (-learns * weight * advantages + counts * kl_coeff * (weight - 1))
    if name == "importance_sampling":
        return -weights * ratio * advantages, -weights * ratio * advantages
    low = given.get("clip_low_threshold", np.full_like(lp, config["clip_low_threshold"]))
    high = given.get("clip_high_threshold", np.full_like(lp, config["clip_high_threshold"]))
    if name == "cispo":
        bounded = np.where(ratio < low, low, np.where(ratio > high, high, ratio))
        return -weights * bounded * advantages * lp, -weights * bounded * advantages
    if name == "gspo":
        ratio = np.full_like(lp, np.exp(np.mean((lp - q)[given["sequence_ratio_mask"] != 0])))
    # min(r A, clip(r) A), case by case: a gain stops at the bound on its side, a loss is never bounded
    stopped = np.where(advantages > 0, ratio > high, ratio < low)
    bound = np.where(advantages > 0, high, low)
    loss = -weights * np.where(stopped, bound, ratio) * advantages
    return loss, np.where(stopped, 0.0, loss)


def random_datum(name: str, rng: np.random.Generator, *, optional: bool) -> tuple[Datum, torch.Tensor]:
    """A prompt and a sampled part with log-ratios of size 0.5; gspo's sequence ratios spread over both sides of the bounds."""
    num_tokens = int(rng.integers(20, 200))
    num_prompt = int(rng.integers(1, 10))
    sampled = np.arange(num_tokens) >= num_prompt
    lp = -rng.exponential(2.0, num_tokens).astype(np.float32)
    q = np.where(sampled, np.minimum(lp + rng.normal(rng.normal(0, 0.3), 0.5, num_tokens), 0), 0).astype(np.float32)
    fields: dict[str, npt.NDArray[np.float32]] = {
        "logprobs": q,
        "advantages": np.where(sampled, rng.normal(0, 1, num_tokens), 0),
        "sequence_ratio_mask": sampled,
        "weights": np.where(sampled, rng.normal(1, 1, num_tokens), 0),
        "clip_low_threshold": rng.uniform(0.3, 0.9, num_tokens),
        "clip_high_threshold": rng.uniform(1.1, 2.0, num_tokens),
    }
    names = [*LOSSES[name].inputs[1:], *(LOSSES[name].optional if optional else ())]
    inputs = {key: fields[key].astype(np.float32) for key in names}
    tokens = rng.integers(0, VOCAB_SIZE, num_tokens).tolist()
    return Datum(ModelInput.from_ints(tokens), {"target_tokens": np.array(tokens), **inputs}), torch.from_numpy(lp)


def run(loss: LossCall, data: list[Datum], logprobs: list[torch.Tensor]) -> tuple[float, list[Floats]]:
    for index, datum in enumerate(data):
        check_datum(datum, loss, index=index, vocab_size=VOCAB_SIZE, max_tokens=1024)
    leaves = [lp.clone().requires_grad_() for lp in logprobs]
    total = loss_sum(loss, leaves, [loss_inputs(datum, loss) for datum in data])
    total.backward()
    assert total.shape == () and total.dtype == torch.float32
    return total.item(), [leaf.grad.double().numpy() for leaf in leaves if leaf.grad is not None]


def expect(loss: LossCall, data: list[Datum], logprobs: list[torch.Tensor]) -> tuple[float, list[Floats]]:
    totals, gradients = [], []
    for datum, lp in zip(data, logprobs, strict=True):
        given = {key: tensor.to_numpy().astype(np.float64) for key, tensor in datum.loss_fn_inputs.items() if key != "target_tokens"}
        losses, gradient = reference(loss.name, lp.double().numpy(), given, loss.config)
        totals.append(losses.sum())
        gradients.append(gradient)
    return float(np.sum(totals)), gradients


@pytest.mark.parametrize("optional", [False, True], ids=["required", "with_optional"])
@pytest.mark.parametrize(("name", "config"), CASES)
@pytest.mark.parametrize("seed", range(4))
def test_value_and_gradient_equal_float64(name: str, config: dict[str, float], optional: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    loss = resolve_loss(name, config)
    data, logprobs = map(list, zip(*(random_datum(name, rng, optional=optional) for _ in range(8)), strict=True))
    total, gradients = run(loss, data, logprobs)
    expected_total, expected_gradients = expect(loss, data, logprobs)
    assert abs(total - expected_total) <= RELATIVE_ERROR * abs(expected_total)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=RELATIVE_ERROR, atol=ABSOLUTE_ERROR if name in DIFFERENCES else 0)
    # the data reach every branch: tokens with and without a gradient, where the loss knows both
    if LOSSES[name].clips == "gain":
        sampled = np.concatenate([datum.loss_fn_inputs["advantages"].to_numpy() != 0 for datum in data])
        vanished = np.concatenate(expected_gradients)[sampled] == 0
        assert 0 < vanished.sum() < len(vanished)
    if name == "stable_reinforce":
        metrics = loss_metrics(loss, logprobs, [loss_inputs(datum, loss) for datum in data])
        assert 0 < metrics["masked_fraction:mean"] < 1 and 0 < metrics["truncated_fraction:mean"] < 1


@pytest.mark.parametrize("name", ["ppo", "cispo"])
def test_a_bound_given_by_some_datums_only_falls_back_to_the_config_in_the_others(name: str) -> None:
    rng = np.random.default_rng(0)
    loss = resolve_loss(name, {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1})
    pairs = [random_datum(name, rng, optional=index % 2 == 0) for index in range(4)]
    data, logprobs = [datum for datum, _ in pairs], [lp for _, lp in pairs]
    total, gradients = run(loss, data, logprobs)
    expected_total, expected_gradients = expect(loss, data, logprobs)
    assert total == pytest.approx(expected_total, rel=RELATIVE_ERROR)
    np.testing.assert_allclose(np.concatenate(gradients), np.concatenate(expected_gradients), rtol=RELATIVE_ERROR, atol=0)


def test_cross_entropy_with_k_targets_equals_float64() -> None:
    rng = np.random.default_rng(0)
    loss = resolve_loss("cross_entropy")
    lp = torch.from_numpy(-rng.exponential(2.0, (50, 4)).astype(np.float32))
    weights = np.where(rng.random((50, 4)) < 0.7, 0, rng.normal(0, 1, (50, 4))).astype(np.float32)
    targets = {"target_tokens": torch.from_numpy(rng.integers(1, VOCAB_SIZE, (50, 4))), "weights": torch.from_numpy(weights)}
    datum = Datum(ModelInput.from_ints([0] * 50), targets)
    assert datum.loss_fn_inputs["weights"].sparse_crow_indices is not None  # the CSR path is really taken
    total, gradients = run(loss, [datum], [lp])
    assert total == pytest.approx(float((-lp.double().numpy() * weights).sum()), rel=RELATIVE_ERROR)
    np.testing.assert_array_equal(gradients[0], -weights.astype(np.float64))


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo", "dro", "stable_reinforce"])
def test_metrics_equal_float64(name: str) -> None:
    rng = np.random.default_rng(1)
    loss = resolve_loss(name)
    data, logprobs = map(list, zip(*(random_datum(name, rng, optional=False) for _ in range(5)), strict=True))
    metrics = loss_metrics(loss, logprobs, [loss_inputs(datum, loss) for datum in data])
    lp = torch.cat(logprobs).double().numpy()
    q, advantages = (
        np.concatenate([datum.loss_fn_inputs[key].to_numpy() for datum in data]).astype(np.float64) for key in ("logprobs", "advantages")
    )
    counts = np.ones_like(lp, dtype=bool) if name == "dro" else advantages != 0
    ratio = np.exp(lp - q)
    clipped = {
        "ppo": ((advantages > 0) & (ratio > 1.2)) | ((advantages < 0) & (ratio < 0.8)),
        "cispo": ratio > 4.0,
    }
    expected = {
        "loss:sum": expect(loss, data, logprobs)[0],
        "tokens:sum": counts.sum(),
        "ratio:mean": ratio[counts].mean(),
        "ratio:max": ratio[counts].max(),
        "ratio:min": ratio[counts].min(),
        "kl_sample_train_v1:mean": (q - lp)[counts].mean(),
        "kl_sample_train_v2:mean": 0.5 * ((q - lp)[counts] ** 2).mean(),
    } | ({"clip_fraction:mean": clipped[name][counts].mean()} if name in clipped else {})
    if name == "stable_reinforce":
        masked = (lp - q) * np.sign(advantages) > loss.config["max_logprob_gap"]
        expected["masked_fraction:mean"] = masked[counts].mean()
        expected["truncated_fraction:mean"] = (~masked & (ratio > loss.config["max_importance_weight"]))[counts].mean()
    assert metrics == pytest.approx(expected, rel=RELATIVE_ERROR)


def test_the_kl_penalty_is_an_unbiased_estimate_of_the_divergence_and_of_its_gradient() -> None:
    """Over all tokens of a vocabulary, each with its probability under q: sum q k3 = KL(q || p), and its gradient by the logits of p."""
    loss = resolve_loss("stable_reinforce", {"kl_coeff": 1.0, "max_importance_weight": 1e9, "max_logprob_gap": 1e-9})
    generator = torch.Generator().manual_seed(0)
    q_V, logits_V = torch.randn(50, generator=generator).log_softmax(0), torch.randn(50, generator=generator).requires_grad_()
    tiny = torch.full((50,), 1e-20)  # the token must count; its policy gradient is nothing
    inputs = {"target_tokens": torch.arange(50), "logprobs": q_V, "advantages": tiny, "weights": q_V.exp()}
    penalty = loss_sum(loss, [logits_V.log_softmax(0)], [inputs])
    (gradient,) = torch.autograd.grad(penalty, logits_V)
    divergence = (q_V.exp() * (q_V - logits_V.log_softmax(0))).sum()
    (expected,) = torch.autograd.grad(divergence, logits_V)
    assert penalty.item() == pytest.approx(divergence.item(), rel=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)
