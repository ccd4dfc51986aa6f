"""Each loss by numbers found by hand: probabilities are chosen so that ratios are round. The same numbers stand in docs/losses.md."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from ptlab.loss_formulas import MAX_LOG_RATIO, sequence_log_ratio
from ptlab.losses import cispo, cross_entropy, dro, gspo, importance_sampling, ppo, stable_reinforce

LN2 = math.log(2)
INF = math.inf


def logs(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log().float()


def check(fn: Callable[[Tensor], Tensor], target_logprobs: Tensor, losses: list[float], gradient: list[float]) -> None:
    """Value and gradient of every token; rtol 1e-6 is a few roundings of float32."""
    target = target_logprobs.clone().requires_grad_()
    loss = fn(target)
    loss.sum().backward()
    assert target.grad is not None
    torch.testing.assert_close(loss.detach().reshape(-1), torch.tensor(losses), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(target.grad.reshape(-1), torch.tensor(gradient), rtol=1e-6, atol=1e-7)


def test_cross_entropy_weighs_each_token_and_a_negative_weight_pushes_away() -> None:
    weights = torch.tensor([1.0, -0.25, 0.0])
    check(lambda lp: cross_entropy(lp, weights), logs(1 / 2, 1 / 4, 1 / 8), [LN2, -0.25 * 2 * LN2, 0.0], [-1.0, 0.25, 0.0])


def test_cross_entropy_sums_over_k_targets_per_position() -> None:
    weights = torch.tensor([[0.75, 0.25], [1.0, 0.0]])
    target = logs(1 / 2, 1 / 4, 1 / 8, 1.0).reshape(2, 2)
    check(lambda lp: cross_entropy(lp, weights), target, [0.75 * LN2, 0.5 * LN2, 3 * LN2, 0.0], [-0.75, -0.25, -1.0, 0.0])


def test_importance_sampling_has_the_gradient_of_its_own_value() -> None:
    # ratios 1.5 and 0.5: -r * A, and d(-r * A)/dlp = -r * A
    fn = partial(importance_sampling, sampling_logprobs_T=logs(1 / 2, 1 / 2), advantages_T=torch.tensor([2.0, -1.0]))
    check(fn, logs(3 / 4, 1 / 4), [-3.0, 0.5], [-3.0, 0.5])


def test_ppo_gives_no_gain_beyond_the_clip_and_no_shelter_on_the_other_side() -> None:
    # ratios 1.5, 0.5, 1.1 with A = 2; 1.5, 0.5 with A = -1; bounds 0.8 and 1.2
    fn = partial(
        ppo,
        sampling_logprobs_T=logs(0.5, 0.5, 0.5, 0.5, 0.5),
        advantages_T=torch.tensor([2.0, 2.0, 2.0, -1.0, -1.0]),
        clip_low_threshold=0.8,
        clip_high_threshold=1.2,
    )
    check(fn, logs(0.75, 0.25, 0.55, 0.75, 0.25), [-2.4, -1.0, -2.2, 1.5, 0.8], [0.0, -1.0, -2.2, 1.5, 0.0])


def test_ppo_bounds_may_differ_per_token() -> None:
    # ratio 1.5 twice, A = 2: the first token may go to 2.0, the second to 1.1
    fn = partial(
        ppo,
        sampling_logprobs_T=logs(0.5, 0.5),
        advantages_T=torch.tensor([2.0, 2.0]),
        clip_low_threshold=torch.tensor([0.5, 0.9]),
        clip_high_threshold=torch.tensor([2.0, 1.1]),
    )
    check(fn, logs(0.75, 0.75), [-3.0, -2.2], [-3.0, 0.0])


def test_cispo_bounds_the_weight_and_keeps_the_gradient() -> None:
    # ratios 5 (bounded to 4) and 0.5: -(4 * ln 0.5), -(0.5 * ln 0.1 * -2); the ratio itself is a constant
    fn = partial(
        cispo,
        sampling_logprobs_T=logs(0.1, 0.2),
        advantages_T=torch.tensor([1.0, -2.0]),
        clip_low_threshold=0.0,
        clip_high_threshold=4.0,
    )
    check(fn, logs(0.5, 0.1), [4 * LN2, math.log(0.1)], [-4.0, 1.0])


def test_dro_pulls_towards_the_sampler() -> None:
    # p = 1/2, q = 1/4, A = 2, beta = 0.05: -(2 * -ln 2 - 0.025 * (ln 2)^2)
    fn = partial(dro, sampling_logprobs_T=logs(1 / 4), advantages_T=torch.tensor([2.0]), beta=0.05)
    check(fn, logs(1 / 2), [2 * LN2 + 0.025 * LN2**2], [-(2 - 0.05 * LN2)])


def test_dro_trains_on_a_prompt_padded_with_zeros() -> None:
    # q = 0.0 and A = 0.0 is not "left out": 0.5 * beta * lp^2, which pulls log p = -2 ln 2 up towards 0
    fn = partial(dro, sampling_logprobs_T=torch.zeros(1), advantages_T=torch.zeros(1), beta=0.05)
    check(fn, logs(1 / 4), [0.1 * LN2**2], [-0.1 * LN2])


def test_gspo_gives_every_token_the_sequence_ratio_and_its_own_gradient() -> None:
    # the prompt token (ratio 8) stays out of the mean; sampled ratios 4 and 1 have the geometric mean 2, beyond both bounds
    fn = partial(
        gspo,
        sampling_logprobs_T=logs(1 / 16, 1 / 8, 1 / 4),
        advantages_T=torch.tensor([0.0, 1.0, -1.0]),
        sequence_ratio_mask_T=torch.tensor([0.0, 1.0, 1.0]),
        clip_low_threshold=0.9997,
        clip_high_threshold=1.0004,
    )
    check(fn, logs(1 / 2, 1 / 2, 1 / 4), [0.0, -1.0004, 2.0], [0.0, 0.0, 2.0])


def test_gspo_with_an_empty_mask_is_zero_not_nan() -> None:
    fn = partial(
        gspo,
        sampling_logprobs_T=torch.tensor([-1.0, -INF]),
        advantages_T=torch.tensor([1.0, 0.0]),
        sequence_ratio_mask_T=torch.zeros(2),
        clip_low_threshold=0.9997,
        clip_high_threshold=1.0004,
    )
    check(fn, torch.tensor([-2.0, -INF]), [0.0, 0.0], [0.0, 0.0])
    assert sequence_log_ratio(torch.tensor([-2.0]), torch.tensor([-1.0]), torch.zeros(1)).item() == 0.0


def policy_loss(name: str, q: Tensor, advantages: Tensor) -> Callable[[Tensor], Tensor]:
    bounds = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "importance_sampling": lambda lp: importance_sampling(lp, q, advantages),
        "ppo": lambda lp: ppo(lp, q, advantages, **bounds),
        "cispo": lambda lp: cispo(lp, q, advantages, **bounds),
        "gspo": lambda lp: gspo(lp, q, advantages, (advantages != 0).float(), **bounds),
        "dro": lambda lp: dro(lp, q, advantages, beta=0.05),
    }
    return losses[name]


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo", "gspo"])
@pytest.mark.parametrize(("target", "sampling"), [(-INF, 0.0), (0.0, -INF), (-INF, -INF), (-1.0, -1e30), (-1e30, 0.0), (-1.0, 1e30)])
def test_a_padded_token_is_exactly_zero_in_value_and_gradient(name: str, target: float, sampling: float) -> None:
    lp = torch.tensor([target, -0.7], requires_grad=True)
    loss = policy_loss(name, torch.tensor([sampling, -0.7]), torch.tensor([0.0, 1.0]))(lp)
    loss.sum().backward()
    assert lp.grad is not None
    assert loss[0].item() == 0.0
    assert lp.grad[0].item() == 0.0
    assert lp.grad[1].item() == pytest.approx(-1.0, rel=1e-6)  # ratio 1: the sampled token is untouched by its neighbour


@pytest.mark.parametrize(("target", "sampling"), [(-INF, 0.0), (0.0, -INF), (-INF, -INF)])
def test_dro_leaves_out_a_token_without_a_finite_logprob(target: float, sampling: float) -> None:
    check(policy_loss("dro", torch.tensor([sampling]), torch.zeros(1)), torch.tensor([target]), [0.0], [0.0])


def test_cross_entropy_ignores_an_impossible_target_of_weight_zero() -> None:
    check(lambda lp: cross_entropy(lp, torch.tensor([0.0, 1.0])), torch.tensor([-INF, -0.5]), [0.0, 0.5], [0.0, -1.0])


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo", "gspo", "dro"])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_ratio_beyond_float32_stays_finite(name: str, advantage: float) -> None:
    # exp(500) is inf in float32, and 0 * inf in the backward pass of minimum or clamp would be NaN
    lp = torch.tensor([-0.1], requires_grad=True)
    loss = policy_loss(name, torch.tensor([-500.0]), torch.tensor([advantage]))(lp)
    loss.sum().backward()
    assert lp.grad is not None
    assert torch.isfinite(loss).all()
    assert torch.isfinite(lp.grad).all()


def test_the_cap_on_the_log_ratio_lies_far_beyond_any_real_ratio() -> None:
    # just below the cap the loss is the plain formula, so nothing is cut that a sampler can produce
    expected = -math.exp(MAX_LOG_RATIO - 1)
    check(policy_loss("importance_sampling", torch.tensor([1 - MAX_LOG_RATIO]), torch.ones(1)), torch.zeros(1), [expected], [expected])


def test_an_impossible_token_with_an_advantage_has_no_gradient_and_no_nan() -> None:
    for name in ("importance_sampling", "ppo", "cispo", "gspo"):
        lp = torch.tensor([-INF], requires_grad=True)
        policy_loss(name, torch.tensor([-1.0]), torch.tensor([1.0]))(lp).sum().backward()
        assert lp.grad is not None
        assert math.isfinite(lp.grad.item()), name


def stable(advantages: list[float], sampling: Tensor, **numbers: float) -> Callable[[Tensor], Tensor]:
    config = {"kl_coeff": 0.0, "max_importance_weight": 2.0, "max_logprob_gap": math.log(1.6)} | numbers
    return partial(stable_reinforce, sampling_logprobs_T=sampling, advantages_T=torch.tensor(advantages), **config)


def test_stable_reinforce_weighs_truncates_and_masks() -> None:
    # ratios 1.5, 0.5 and 1.75 with A = 1; 3, 0.75 and 0.5 with A = -1; the weight ends at 2, the mask begins at 1.6 and 1 / 1.6
    fn = stable([1.0, 1.0, 1.0, -1.0, -1.0, -1.0], logs(0.5, 0.5, 0.5, 0.25, 0.5, 0.5))
    lp = logs(0.75, 0.25, 0.875, 0.75, 0.375, 0.25)
    losses = [-1.5 * math.log(0.75), 0.5 * math.log(4), 0.0, 2 * math.log(0.75), 0.75 * math.log(0.375), 0.0]
    check(fn, lp, losses, [-1.5, -0.5, 0.0, 2.0, 0.75, 0.0])


def test_stable_reinforce_pulls_back_to_the_sampler_and_no_harder_than_the_truncated_weight() -> None:
    # k3 = r - 1 - ln r, gradient r - 1: r = 1, 0.5, 1.5; from r = 2 on the tangent of slope 1: r = 4 gives 2 - 1 - ln 2 + 1 * ln 2 = 1
    fn = stable([1e-30, 1e-30, -1e-30, 1e-30], logs(0.25, 0.5, 0.5, 0.25), kl_coeff=0.5)
    losses = [0.0, 0.5 * (-0.5 + LN2), 0.5 * (0.5 - math.log(1.5)), 0.5]
    check(fn, logs(0.25, 0.25, 0.75, 1.0), losses, [0.0, -0.25, 0.25, 0.5])


def test_stable_reinforce_on_policy_is_reinforce() -> None:
    lp = logs(0.5, 0.25, 1.0)
    check(stable([2.0, -1.0, 3.0], lp, kl_coeff=0.7), lp, [2 * LN2, -2 * LN2, 0.0], [-2.0, 1.0, -3.0])


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("sampling", [-0.5, -1e9])
def test_stable_reinforce_bears_a_token_the_trainer_thinks_impossible(advantage: float, sampling: float) -> None:
    check(stable([advantage], torch.tensor([sampling]), kl_coeff=1.0), torch.tensor([-INF]), [0.0], [0.0])


def test_stable_reinforce_does_not_hide_a_nan_of_the_trainer() -> None:
    fn = stable([1.0], torch.tensor([-0.5]))
    assert fn(torch.tensor([math.nan])).isnan().all()
