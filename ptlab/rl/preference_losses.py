"""Losses of a pair (chosen, rejected): one value per pair, no reduction. Pure functions of scores or of log-probabilities.

Both are a logistic loss on a difference: of two scores (reward model), or of two log-ratios to a reference (DPO). At the start, where the
model cannot tell the replies apart, both are ln 2 = 0.6931.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def bradley_terry(chosen_scores_B: Tensor, rejected_scores_B: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """-log P(chosen beats rejected), where P = sigmoid(score of chosen - score of rejected); nats per pair.

    Shapes: all [B]. `label_smoothing` is the share of labels believed to be the wrong way round: the loss is then
    -(1 - e) log P - e log(1 - P), whose best P is 1 - e instead of 1.
    Source: Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, eq. 1. Smoothing: Mitchell 2023, "A note on DPO with noisy
    preferences". Deviation from Ouyang: no division by the number of pairs of a prompt; a batch holds one pair per prompt.
    """
    margin_B = chosen_scores_B - rejected_scores_B
    return -(1.0 - label_smoothing) * functional.logsigmoid(margin_B) - label_smoothing * functional.logsigmoid(-margin_B)


def implicit_rewards(policy_logprobs_B: Tensor, reference_logprobs_B: Tensor, *, beta: float) -> Tensor:
    """beta x (log pi - log pi_ref) of whole replies [B]: the reward under which the policy would be the optimum of RL with KL weight beta.

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 5 (up to a constant per prompt, which a difference does not see).
    """
    return beta * (policy_logprobs_B - reference_logprobs_B)


def dpo(
    policy_chosen_B: Tensor,
    policy_rejected_B: Tensor,
    reference_chosen_B: Tensor,
    reference_rejected_B: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Bradley-Terry on the implicit rewards; nats per pair, ln 2 while policy and reference agree.

    Shapes: all [B], log-probabilities of whole replies (sum over their tokens), nats. No gradient belongs to the reference.
    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; with label_smoothing "conservative DPO" (see bradley_terry).
    """
    chosen_B = implicit_rewards(policy_chosen_B, reference_chosen_B, beta=beta)
    rejected_B = implicit_rewards(policy_rejected_B, reference_rejected_B, beta=beta)
    return bradley_terry(chosen_B, rejected_B, label_smoothing=label_smoothing)


def ipo(
    policy_chosen_B: Tensor, policy_rejected_B: Tensor, reference_chosen_B: Tensor, reference_rejected_B: Tensor, *, beta: float
) -> Tensor:
    """(h - 1 / (2 beta))^2 with h the difference of the log-ratios: pulls the margin to a fixed size instead of ever further apart.

    Shapes as in `dpo`. (1 / (2 beta))^2 while policy and reference agree.
    Source: Azar et al. 2023, arXiv:2310.12036, eq. 17 (their tau is beta).
    """
    margin_B = (policy_chosen_B - reference_chosen_B) - (policy_rejected_B - reference_rejected_B)
    return (margin_B - 1.0 / (2.0 * beta)).square()
