"""From hidden states to log-probabilities and gradients, for every loss, against full logits, loss_sum and autograd."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ptlab.engines import head_pass as head_module
from ptlab.engines.body import Layout
from ptlab.engines.buffers import Buffers
from ptlab.engines.head_pass import OutputHead
from ptlab.engines.lora_layers import LowRank
from ptlab.engines.loss_pass import loss_pass, plan_pairs, score
from ptlab.engines.target_pairs import TargetPairs
from ptlab.losses import LOSSES, LossCall, TokenLoss, loss_gradient, loss_sum, resolve_loss

VOCAB, HIDDEN = 37, 12


def layout() -> Layout:
    """Two rows that share their first three places, one of its own; place 4 is nobody's last."""
    return Layout(9, [np.array([0, 1, 2, 3, 4]), np.array([0, 1, 2, 5]), np.array([6, 7, 8])], None)


def inputs(loss: str, width: int | None = None) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    data = []
    for places in layout().places_D:
        shape = (len(places),) if width is None else (len(places), width)
        fields = {"target_tokens": torch.randint(0, VOCAB, shape, generator=generator)}
        weights = torch.randn(shape, generator=generator)
        weights[:2] = 0.0
        if loss == "cross_entropy":
            fields["weights"] = weights
        else:
            fields |= {"logprobs": -3.6 + 0.2 * torch.randn(shape, generator=generator), "advantages": weights}
        if loss == "gspo":
            fields["sequence_ratio_mask"] = (weights != 0).float()
        data.append(fields)
    return data


def head(with_lora: bool) -> OutputHead:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator) * 0.3
    if not with_lora:
        return OutputHead(weight)
    a, b = (nn.Parameter(torch.randn(shape, generator=generator) * 0.3) for shape in ((3, HIDDEN), (VOCAB, 3)))
    return OutputHead(weight, lora=LowRank(a, b, 2.0))


def expected(output: OutputHead, hidden_UH: Tensor, pairs: TargetPairs, loss: LossCall, data: list[dict[str, Tensor]]) -> Any:
    """Log-probabilities per datum, and the gradients by hidden states, A and B."""
    leaves = [hidden_UH.clone().requires_grad_()]
    logits_UV = leaves[0] @ output.weight_VH.T
    if output.lora is not None:
        leaves += [output.lora.a_RI, output.lora.b_OR]
        logits_UV = logits_UV + output.lora.scale * (leaves[0] @ output.lora.a_RI.T @ output.lora.b_OR.T)
    table = torch.empty_like(logits_UV)
    table[pairs.places_U] = logits_UV.log_softmax(-1)
    logprobs_D = []
    for places, fields in zip(layout().places_D, data, strict=True):
        targets = fields["target_tokens"]
        rows_TV = table[torch.from_numpy(places)]
        logprobs_D.append(rows_TV.gather(1, targets.view(len(targets), -1)).view(targets.shape))
    return [part.detach() for part in logprobs_D], torch.autograd.grad(loss_sum(loss, logprobs_D, data), leaves)


@pytest.mark.parametrize("chunk_bytes", [1, 3 * 4 * VOCAB, 2**26])  # one row, three rows, all of them
@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize(("name", "width"), [(name, None) for name in LOSSES] + [("cross_entropy", 3)])
def test_log_probabilities_and_gradients(
    name: str, width: int | None, with_lora: bool, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(head_module.CHUNK_BYTES, "cpu", chunk_bytes)
    loss, data, output = resolve_loss(name), inputs(name, width), head(with_lora)
    pairs = plan_pairs(layout(), loss, data, backward=True)
    hidden_UH = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(6))
    logprobs_D, gradients = expected(output, hidden_UH, pairs, loss, data)

    found = loss_pass(output, hidden_UH, pairs, loss, data, Buffers(torch.device("cpu")))
    alone = score(output, hidden_UH, pairs, data, Buffers(torch.device("cpu")))
    for ours, theirs, again in zip(found.logprobs_D, logprobs_D, alone, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
        torch.testing.assert_close(again, theirs, rtol=0, atol=2e-6)
    ours_G = [found.d_hidden_UH, *([found.d_a_RH, found.d_b_VR] if with_lora else [])]
    for ours_gradient, theirs_gradient in zip(ours_G, gradients, strict=True):
        assert ours_gradient is not None
        assert (ours_gradient - theirs_gradient).norm() < 1e-5 * theirs_gradient.norm()


def test_places_that_learn_come_first() -> None:
    data = inputs("importance_sampling")
    pairs = plan_pairs(layout(), resolve_loss("importance_sampling"), data, backward=True)
    assert pairs.places_U[: pairs.num_learning].tolist() == [2, 3, 4, 5, 8]
    assert sorted(pairs.places_U.tolist()) == list(range(9))
    assert pairs.rows_P.tolist() == sorted(pairs.rows_P.tolist())
    assert len(pairs.rows_P) == 12  # the shared places have two pairs each
    assert plan_pairs(layout(), resolve_loss("dro"), data, backward=True).num_learning == 9  # its penalty acts on every token
    assert plan_pairs(layout(), resolve_loss("importance_sampling"), data, backward=False).num_learning == 0


@pytest.mark.parametrize("name", [name for name in LOSSES if TokenLoss.is_per_token(resolve_loss(name))])
def test_a_token_loss_is_the_loss_token_by_token(name: str) -> None:
    loss, data = resolve_loss(name), inputs(name)
    if name == "ppo":
        data[0]["clip_high_threshold"] = torch.full((5,), 1.01)  # one datum brings bounds of its own, the others not
    logprobs_D = [-3.6 + 0.3 * torch.randn(fields["target_tokens"].shape) for fields in data]
    whole_T = torch.cat(loss_gradient(loss, logprobs_D, data))
    order_T = torch.randperm(len(whole_T))
    token_loss = TokenLoss(loss, data).in_order(order_T, torch.device("cpu"))
    shuffled_T = torch.cat(logprobs_D)[order_T]
    parts = [token_loss.gradient(first, first + 4, shuffled_T[first : first + 4]) for first in range(0, len(whole_T), 4)]
    assert torch.equal(torch.cat(parts), whole_T[order_T])
    assert not whole_T[~TokenLoss(loss, data).may_learn()].any()
    assert whole_T.any()


def test_losses_over_sequences_are_told_apart() -> None:
    assert {name for name in LOSSES if not TokenLoss.is_per_token(resolve_loss(name))} == {"gspo"}
