"""From last hidden states to log-probabilities and the loss's gradient by the hidden states, in one pass over the output head.

One pass means: where a token's loss depends on that token alone (all losses but gspo and uploaded ones), its gradient is taken while the
logits it needs are still at hand, 2 products over the vocabulary instead of 3. For the others the log-probabilities come first (1 product),
and then the tokens that turned out to have a gradient (2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptlab.engines.body import Layout
from ptlab.engines.buffers import Buffers
from ptlab.engines.head_pass import OutputHead, head_pass
from ptlab.engines.target_pairs import TargetPairs
from ptlab.losses import LossCall, TokenLoss, loss_gradient

Inputs = list[dict[str, Tensor]]
"""Per datum, from ptlab.losses.loss_inputs, on the CPU."""


@dataclass(frozen=True, slots=True)
class LossPass:
    """The log-probabilities per datum (float32, CPU, in the shape of target_tokens), and gradients of the summed loss."""

    logprobs_D: list[Tensor]
    d_hidden_UH: Tensor
    d_a_RH: Tensor | None
    """Of LoRA on the output head, float32; None without."""
    d_b_VR: Tensor | None


def plan_pairs(layout: Layout, loss: LossCall, inputs: Inputs, *, backward: bool) -> TargetPairs:
    """The pairs of a micro-batch, those that may learn first as far as that is known beforehand."""
    learns = TokenLoss(loss, inputs).may_learn() if backward and TokenLoss.is_per_token(loss) else None
    return TargetPairs.of(layout, [fields["target_tokens"] for fields in inputs], learns)


def score(head: OutputHead, hidden_UH: Tensor, pairs: TargetPairs, inputs: Inputs, buffers: Buffers) -> list[Tensor]:
    """Log-probabilities alone, as in LossPass."""
    on = hidden_UH.device
    result = head_pass(head, hidden_UH, pairs.rows_P.to(on), pairs.targets_P.to(on), None, buffers=buffers)
    return pairs.split(result.logprobs_P.cpu(), [fields["target_tokens"] for fields in inputs])


def loss_pass(head: OutputHead, hidden_UH: Tensor, pairs: TargetPairs, loss: LossCall, inputs: Inputs, buffers: Buffers) -> LossPass:
    """Log-probabilities and gradients. hidden_UH [U, H] in the order of pairs.places_U."""
    if not TokenLoss.is_per_token(loss):
        return _two_passes(head, hidden_UH, pairs, loss, inputs, buffers)
    on = hidden_UH.device
    weigh = TokenLoss(loss, inputs).in_order(pairs.order_P, on).gradient
    where = pairs.rows_P.to(on), pairs.targets_P.to(on)
    result = head_pass(head, hidden_UH, *where, weigh, learning_rows=pairs.num_learning, buffers=buffers)
    assert result.d_hidden_UH is not None
    logprobs_D = pairs.split(result.logprobs_P.cpu(), [fields["target_tokens"] for fields in inputs])
    return LossPass(logprobs_D, result.d_hidden_UH, result.d_a_RH, result.d_b_VR)


def _two_passes(head: OutputHead, hidden_UH: Tensor, pairs: TargetPairs, loss: LossCall, inputs: Inputs, buffers: Buffers) -> LossPass:
    on = hidden_UH.device
    logprobs_D = score(head, hidden_UH, pairs, inputs, buffers)
    slopes_P = torch.cat([part.reshape(-1) for part in loss_gradient(loss, logprobs_D, inputs)])[pairs.order_P]
    kept_P = (slopes_P != 0).nonzero()[:, 0]
    rows_L, places_P = torch.unique(pairs.rows_P[kept_P], return_inverse=True)
    slopes_on = slopes_P[kept_P].to(on)
    again = head_pass(
        head,
        hidden_UH[rows_L.to(on)],
        places_P.to(on),
        pairs.targets_P[kept_P].to(on),
        lambda first, end, logprobs_P: slopes_on[first:end],
        buffers=buffers,
    )
    assert again.d_hidden_UH is not None
    d_hidden_UH = torch.zeros_like(hidden_UH)
    d_hidden_UH[rows_L.to(on)] = again.d_hidden_UH
    return LossPass(logprobs_D, d_hidden_UH, again.d_a_RH, again.d_b_VR)
