"""Values by hand and against float64 numpy; gradients against central differences of the same formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ptlab.rl.preference_losses import bradley_terry, dpo, implicit_rewards, ipo

RNG = np.random.default_rng(0)
CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED = (RNG.normal(-20.0, 4.0, size=7) for _ in range(4))


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.tensor(array, requires_grad=True) for array in arrays]


def numpy_bradley_terry(chosen, rejected, smoothing=0.0):
    margin = chosen - rejected
    return (1 - smoothing) * np.log1p(np.exp(-margin)) + smoothing * np.log1p(np.exp(margin))


def numpy_dpo(chosen, rejected, ref_chosen, ref_rejected, beta, smoothing):
    return numpy_bradley_terry(beta * (chosen - ref_chosen), beta * (rejected - ref_rejected), smoothing)


def numpy_ipo(chosen, rejected, ref_chosen, ref_rejected, beta):
    return ((chosen - ref_chosen) - (rejected - ref_rejected) - 1 / (2 * beta)) ** 2


def check_gradient(loss_of, numpy_of, arrays):
    """d(sum of losses) / d(each argument)."""
    given = tensors(*arrays)
    loss_of(*given).sum().backward()
    step = 1e-5
    for which, tensor in enumerate(given):
        up, down = ([array + sign * step * (number == which) for number, array in enumerate(arrays)] for sign in (1, -1))
        wanted = (numpy_of(*up) - numpy_of(*down)) / (2 * step)  # each pair depends on its own scores only
        np.testing.assert_allclose(tensor.grad.numpy(), wanted, rtol=1e-5, atol=1e-8)


def test_bradley_terry_of_a_margin_of_two():
    loss = bradley_terry(torch.tensor([3.0]), torch.tensor([1.0]))
    assert loss.item() == pytest.approx(0.126928, abs=1e-6)  # -log(1 / (1 + e^-2))
    worse = bradley_terry(torch.tensor([1.0]), torch.tensor([3.0]))
    assert worse.item() == pytest.approx(2.126928, abs=1e-6)


def test_both_losses_are_ln_2_where_nothing_is_known():
    same = torch.tensor([-12.5, -3.0])
    assert bradley_terry(same, same).tolist() == pytest.approx([math.log(2)] * 2)
    policy = torch.tensor([-12.5, -3.0])
    other = torch.tensor([-40.0, -7.0])  # the replies differ; policy and reference agree
    assert dpo(policy, other, policy, other, beta=0.1).tolist() == pytest.approx([math.log(2)] * 2)
    assert ipo(policy, other, policy, other, beta=0.1).tolist() == pytest.approx([25.0] * 2)  # (1 / 0.2)^2


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_bradley_terry_is_the_formula_with_its_gradient(smoothing):
    arrays = [CHOSEN / 4, REJECTED / 4]
    value = bradley_terry(*tensors(*arrays), label_smoothing=smoothing)
    np.testing.assert_allclose(value.detach().numpy(), numpy_bradley_terry(*arrays, smoothing), rtol=1e-12)
    check_gradient(lambda *t: bradley_terry(*t, label_smoothing=smoothing), lambda *a: numpy_bradley_terry(*a, smoothing), arrays)


def test_smoothing_has_its_minimum_at_the_believed_odds():
    margins = torch.linspace(-4, 8, 2401, dtype=torch.float64)
    best = margins[bradley_terry(margins, torch.zeros_like(margins), label_smoothing=0.2).argmin()]
    assert best.item() == pytest.approx(math.log(0.8 / 0.2), abs=0.01)


@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.0), (0.5, 0.1)])
def test_dpo_is_the_formula_with_its_gradient(beta, smoothing):
    arrays = [CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED]
    value = dpo(*tensors(*arrays), beta=beta, label_smoothing=smoothing)
    np.testing.assert_allclose(value.detach().numpy(), numpy_dpo(*arrays, beta, smoothing), rtol=1e-12)
    check_gradient(lambda *t: dpo(*t, beta=beta, label_smoothing=smoothing), lambda *a: numpy_dpo(*a, beta, smoothing), arrays)


def test_ipo_is_the_formula_with_its_gradient():
    arrays = [CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED]
    value = ipo(*tensors(*arrays), beta=0.1)
    np.testing.assert_allclose(value.detach().numpy(), numpy_ipo(*arrays, 0.1), rtol=1e-12)
    check_gradient(lambda *t: ipo(*t, beta=0.1), lambda *a: numpy_ipo(*a, 0.1), arrays)


def test_implicit_rewards_are_beta_times_the_log_ratio():
    assert implicit_rewards(torch.tensor([-2.0]), torch.tensor([-5.0]), beta=0.1).item() == pytest.approx(0.3)


def test_a_margin_of_ten_thousand_stays_finite():
    loss = bradley_terry(torch.tensor([-1e4], requires_grad=True), torch.tensor([0.0]))
    loss.sum().backward()
    assert loss.item() == 1e4
