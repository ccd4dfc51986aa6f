"""The losses of the API as pure functions: one value per token, no reduction, no configuration, no metrics.

Use them as `from ptlab.losses import ppo`; ptlab.losses adds their table, the checks of a datum, the sum and the metrics.

Shapes: all tensors [T] unless said otherwise, float32. Log-probabilities are in nats at temperature 1: `target_logprobs_T` from the
trainer (carries the gradient), `sampling_logprobs_T` from the sampler (a constant). Advantages are 0.0 off the sampled tokens.

A token that counts for nothing (weight 0.0, advantage 0.0) gives exactly 0.0 and a gradient of exactly 0.0, whatever its
log-probabilities are: its inputs are replaced *before* exp and multiplication, because 0 * inf is NaN in the value, and in the
gradient even where torch.where drops the value.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_LOG_RATIO = 40.0
"""log p - log q is cut off here (a ratio of 2e17, without gradient beyond), so that float32 never overflows. No sampled token comes
near it: a ratio of this size means that `logprobs` does not belong to these tokens, and shows as such in the metric ratio:max."""


def cross_entropy(target_logprobs_T: Tensor, weights_T: Tensor) -> Tensor:
    """Weighted negative log-likelihood.

    Shapes: both [T], or both [T, K] for K weighted targets per position (distillation from a teacher's top K).
    Weights are any real numbers; negative ones push the token away (forward_backward_custom sends -dloss/dlogprob as weights).
    """
    return -torch.where(weights_T != 0, target_logprobs_T, 0.0) * weights_T


def importance_sampling(target_logprobs_T: Tensor, sampling_logprobs_T: Tensor, advantages_T: Tensor) -> Tensor:
    """Policy gradient corrected for the sampler: the gradient flows through the ratio, nothing is clipped.

    Source: REINFORCE (Williams 1992) with importance weights p / q; on-policy its gradient is -A * dlog p.
    """
    log_ratio_T = token_log_ratio(target_logprobs_T, sampling_logprobs_T, advantages_T != 0)
    return -torch.exp(log_ratio_T) * advantages_T


def ppo(
    target_logprobs_T: Tensor,
    sampling_logprobs_T: Tensor,
    advantages_T: Tensor,
    *,
    clip_low_threshold: float | Tensor,
    clip_high_threshold: float | Tensor,
) -> Tensor:
    """Clipped surrogate loss: no gain, and no gradient, from a ratio moved beyond the bounds in the direction of the advantage.

    The bounds are ratios (0.8, 1.2), not distances from 1 (0.2), as in Tinker's API; a tensor [T] gives each token its own.
    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7; sign flipped to a loss.
    """
    ratio_T = torch.exp(token_log_ratio(target_logprobs_T, sampling_logprobs_T, advantages_T != 0))
    clipped_T = clip_ratio(ratio_T, clip_low_threshold, clip_high_threshold)
    return -torch.minimum(ratio_T * advantages_T, clipped_T * advantages_T)


def cispo(
    target_logprobs_T: Tensor,
    sampling_logprobs_T: Tensor,
    advantages_T: Tensor,
    *,
    clip_low_threshold: float | Tensor,
    clip_high_threshold: float | Tensor,
) -> Tensor:
    """Policy gradient whose importance weight is clipped but constant: a clipped token keeps its gradient, with a bounded weight.

    The bounds are ratios; a tensor [T] gives each token its own.
    Source: MiniMax-M1 2025, arXiv:2506.13585, eq. 4-5, without their division by the number of tokens; sign flipped to a loss.
    """
    log_ratio_T = token_log_ratio(target_logprobs_T.detach(), sampling_logprobs_T, advantages_T != 0)
    coefficients_T = clip_ratio(torch.exp(log_ratio_T), clip_low_threshold, clip_high_threshold) * advantages_T
    return -coefficients_T * torch.where(coefficients_T != 0, target_logprobs_T, 0.0)


def dro(target_logprobs_T: Tensor, sampling_logprobs_T: Tensor, advantages_T: Tensor, *, beta: float) -> Tensor:
    """Off-policy loss: log p * A, held near the sampler by a quadratic penalty on log p - log q.

    The penalty acts on *every* token, prompt included: with q = 0.0 and A = 0.0 there it still pulls log p towards 0. Give explicit
    `weights` (0.0 on the prompt) to leave tokens out; ptlab.losses applies them. A token without a finite log p or log q has no
    penalty to take and gives 0.0.
    Source: Richemond et al. 2024, arXiv:2405.19107; Kimi k1.5 2025, arXiv:2501.12599. The soft advantage is the caller's.
    """
    finite_T = torch.isfinite(target_logprobs_T) & torch.isfinite(sampling_logprobs_T)
    logprobs_T = torch.where(finite_T, target_logprobs_T, 0.0)
    distance_T = logprobs_T - torch.where(finite_T, sampling_logprobs_T, 0.0)
    return -(logprobs_T * advantages_T - 0.5 * beta * distance_T.square())


def gspo(
    target_logprobs_T: Tensor,
    sampling_logprobs_T: Tensor,
    advantages_T: Tensor,
    sequence_ratio_mask_T: Tensor,
    *,
    clip_low_threshold: float,
    clip_high_threshold: float,
) -> Tensor:
    """PPO with one ratio for the whole sequence: the geometric mean of its token ratios (GSPO-token).

    One call is one sequence. Every token carries the sequence's ratio as its value and the gradient of its own log-probability.
    Tokens with a mask != 0 form the mean; a sequence without any has no ratio and gives 0.0 with gradient 0.0.
    Source: Zheng et al. 2025, arXiv:2507.18071, eq. 13-14; sign flipped to a loss, without their division by length.
    """
    counts_T = (advantages_T != 0) & (sequence_ratio_mask_T != 0).any()
    log_ratio_T = torch.where(counts_T, sequence_log_ratio(target_logprobs_T, sampling_logprobs_T, sequence_ratio_mask_T), 0.0)
    own_T = torch.where(counts_T & torch.isfinite(target_logprobs_T), target_logprobs_T, 0.0)
    ratio_T = torch.exp(log_ratio_T + own_T - own_T.detach())
    advantages_T = torch.where(counts_T, advantages_T, 0.0)
    return -torch.minimum(ratio_T * advantages_T, clip_ratio(ratio_T, clip_low_threshold, clip_high_threshold) * advantages_T)


def stable_reinforce(
    target_logprobs_T: Tensor,
    sampling_logprobs_T: Tensor,
    advantages_T: Tensor,
    *,
    kl_coeff: float,
    max_importance_weight: float,
    max_logprob_gap: float,
) -> Tensor:
    """REINFORCE for stale rollouts: log p * A under a constant, truncated weight; a token that moved too far is left out.

    ptlab's formula under the API's name; that of the hosted service is not public. With r = p / q and w = min(r, max_importance_weight):
    - a token gives -w * A * log p, w a constant; a masked one (moved_too_far) 0.0 with gradient 0.0;
    - and, masked or not, kl_coeff * k3 with k3 = r - 1 - log r >= 0, gradient kl_coeff * (w - 1) by log p. On tokens drawn from q the
      means of k3 and of its gradient are KL(q || p) and the gradient of that, without bias where nothing is truncated; beyond the
      truncation k3 goes on as a straight line in log r.
    A token the trainer gives probability 0 has no gradient and gives 0.0.
    Source: REINFORCE (Williams 1992); truncated importance weights (Ionides 2008); k3 (Schulman 2020, "Approximating KL Divergence").
    """
    counts_T = (advantages_T != 0) & ~torch.isneginf(target_logprobs_T)
    log_ratio_T = token_log_ratio(target_logprobs_T, sampling_logprobs_T, counts_T)
    weights_T = torch.exp(log_ratio_T.detach()).clamp(max=max_importance_weight)
    learns_T = counts_T & ~moved_too_far(target_logprobs_T, sampling_logprobs_T, advantages_T, max_logprob_gap)
    gains_T = weights_T * torch.where(learns_T, advantages_T, 0.0) * torch.where(learns_T, target_logprobs_T, 0.0)
    bend = math.log(max_importance_weight)
    curved_T, beyond_T = log_ratio_T.clamp(max=bend), (log_ratio_T - bend).clamp(min=0)
    k3_T = torch.expm1(curved_T) - curved_T + (max_importance_weight - 1) * beyond_T
    return kl_coeff * k3_T - gains_T


def moved_too_far(target_logprobs_T: Tensor, sampling_logprobs_T: Tensor, advantages_T: Tensor, max_logprob_gap: float) -> Tensor:
    """True where log p - log q is beyond the bound (nats) on the side to which the advantage pushes.

    A token that moved the other way is not: without its gradient nothing would bring it back. NaN is not: a fault must show.
    """
    return (target_logprobs_T.detach() - sampling_logprobs_T) * advantages_T.sign() > max_logprob_gap


def token_log_ratio(target_logprobs_T: Tensor, sampling_logprobs_T: Tensor, counts_T: Tensor) -> Tensor:
    """log p - log q in nats, at most MAX_LOG_RATIO; 0.0 without gradient where `counts_T` (bool) is false."""
    return (torch.where(counts_T, target_logprobs_T, 0.0) - torch.where(counts_T, sampling_logprobs_T, 0.0)).clamp(max=MAX_LOG_RATIO)


def sequence_log_ratio(target_logprobs_T: Tensor, sampling_logprobs_T: Tensor, sequence_ratio_mask_T: Tensor) -> Tensor:
    """Mean of log p - log q over the masked tokens, without gradient: a scalar, at most MAX_LOG_RATIO; 0.0 for an empty mask."""
    in_ratio_T = sequence_ratio_mask_T != 0
    differences_T = torch.where(in_ratio_T, target_logprobs_T.detach(), 0.0) - torch.where(in_ratio_T, sampling_logprobs_T, 0.0)
    return (differences_T.sum() / in_ratio_T.sum().clamp(min=1)).clamp(max=MAX_LOG_RATIO)


def clip_ratio(ratio_T: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """`ratio_T` held within [low, high], each one number or one per token."""
    bounds = [torch.as_tensor(bound, dtype=ratio_T.dtype, device=ratio_T.device) for bound in (low, high)]
    return torch.clamp(ratio_T, bounds[0], bounds[1])
