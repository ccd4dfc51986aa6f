"""The distribution a token is drawn from, and the draw itself: pure functions on [rows, vocabulary], one parameter set per row.

A row's draws depend on its own logits and its own stream of uniform numbers only, never on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptlab.engines.logprobs import log_softmax

SEED_MASK = 2**63 - 1  # the contract folds any seed to [0, 2^63 - 1)
PROMPT_STREAM = 2**63  # stream number of prompt_alt_tokens; draws use 0, 1, 2, ...
_LARGEST_UNIFORM = 1 - 2.0**-40


@dataclass(frozen=True, slots=True)
class RowParams:
    """Sampling parameters of B rows, and what they allow to skip."""

    temperature_B: Tensor
    """float32, > 0; greedy rows hold 1, since their log-probabilities are reported at temperature 1."""
    greedy_B: Tensor
    top_k_B: Tensor
    """int64 in 1 .. vocab_size; vocab_size = off."""
    top_p_B: Tensor
    """float32 in (0, 1]; 1 = off."""
    scaled: bool
    """Whether any temperature differs from 1."""
    greedy: bool
    """Whether any row is greedy."""
    truncated_rows: Tensor | None
    """Indices of rows with top_k or top_p on; None = no such row."""

    @classmethod
    def build(cls, rows: Sequence[tuple[float, int, float]], vocab_size: int, device: torch.device) -> RowParams:
        """Rows of (temperature, top_k, top_p) as in SamplingParams: temperature 0 = greedy, top_k -1 = off, top_p 1 = off.

        A greedy row takes the most likely token, so top_k and top_p are off for it.
        """
        greedy = [temperature == 0 for temperature, _, _ in rows]
        temperature = [1.0 if g else t for g, (t, _, _) in zip(greedy, rows, strict=True)]
        top_k = [vocab_size if g or k == -1 else min(k, vocab_size) for g, (_, k, _) in zip(greedy, rows, strict=True)]
        top_p = [1.0 if g else p for g, (_, _, p) in zip(greedy, rows, strict=True)]
        truncated = [i for i, (k, p) in enumerate(zip(top_k, top_p, strict=True)) if k < vocab_size or p < 1.0]
        return cls(
            temperature_B=torch.tensor(temperature, dtype=torch.float32, device=device),
            greedy_B=torch.tensor(greedy, device=device),
            top_k_B=torch.tensor(top_k, device=device),
            top_p_B=torch.tensor(top_p, dtype=torch.float32, device=device),
            scaled=any(t != 1.0 for t in temperature),
            greedy=any(greedy),
            truncated_rows=torch.tensor(truncated, device=device) if truncated else None,
        )


def distribution(logits_BV: Tensor, params: RowParams) -> Tensor:
    """Log-probabilities [B, V] in float32 that the rows draw from: logits / temperature, cut by top_k, then top_p, renormalised.

    top_p keeps the fewest most likely tokens whose probabilities (after top_k) reach top_p, at least one. Cut tokens are -inf.
    Greedy rows hold the plain distribution at temperature 1.
    """
    scores_BV = logits_BV.float()
    if params.scaled:
        scores_BV = scores_BV / params.temperature_B[:, None]
    logprobs_BV = log_softmax(scores_BV)
    if params.truncated_rows is None:
        return logprobs_BV
    rows = params.truncated_rows
    cut = _truncate(logprobs_BV[rows], params.top_k_B[rows], params.top_p_B[rows])
    return logprobs_BV.index_copy(0, rows, cut)


def _truncate(logprobs_RV: Tensor, top_k_R: Tensor, top_p_R: Tensor) -> Tensor:
    sorted_RV, order_RV = logprobs_RV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(logprobs_RV.shape[-1], device=logprobs_RV.device)
    sorted_RV = sorted_RV.masked_fill(rank_V[None, :] >= top_k_R[:, None], -torch.inf)
    probs_RV = torch.softmax(sorted_RV, dim=-1)
    before_RV = probs_RV.cumsum(-1) - probs_RV  # probability of the more likely tokens
    drop_RV = (before_RV >= top_p_R[:, None]) & (top_p_R[:, None] < 1.0) & (rank_V[None, :] > 0)
    kept_RV = log_softmax(sorted_RV.masked_fill(drop_RV, -torch.inf))
    return torch.empty_like(kept_RV).scatter_(1, order_RV, kept_RV)


def pick(logprobs_BV: Tensor, uniforms_B: Tensor, params: RowParams) -> Tensor:
    """One token per row, int64 [B]: the first whose cumulative probability exceeds the row's uniform number; greedy: the likeliest."""
    tokens_B = inverse_cdf(logprobs_BV, uniforms_B[:, None])[:, 0]
    if params.greedy:
        tokens_B = torch.where(params.greedy_B, logprobs_BV.argmax(dim=-1), tokens_B)
    return tokens_B


def inverse_cdf(logprobs_BV: Tensor, uniforms_BN: Tensor) -> Tensor:
    """N draws per row, int64 [B, N]; uniforms in [0, 1), float64. Never a token of probability 0."""
    cdf_BV = logprobs_BV.exp().cumsum(-1, dtype=torch.float64)
    targets_BN = uniforms_BN.clamp(max=_LARGEST_UNIFORM) * cdf_BV[:, -1:]
    return torch.searchsorted(cdf_BV, targets_BN, right=True).clamp_(max=cdf_BV.shape[-1] - 1)


class UniformStreams:
    """One endless stream of uniform numbers per row, made from (seed, stream) alone: Philox, a counter-based generator."""

    def __init__(self, keys: Sequence[tuple[int, int]]) -> None:
        self._generators = [np.random.Generator(np.random.Philox(key=np.array([seed & SEED_MASK, i], dtype=np.uint64))) for seed, i in keys]

    def next(self, count: int) -> NDArray[np.float64]:
        """The next `count` numbers of every row, [rows, count] in [0, 1)."""
        return np.stack([generator.random(count) for generator in self._generators])

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all rows but these; row rows[i] becomes row i."""
        self._generators = [self._generators[row] for row in rows]
