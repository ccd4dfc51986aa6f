"""How often one policy's replies are preferred to another's, as it is and with the length taken out.

A judge that likes long replies pays for length; so does a policy trained against it. The length-controlled win rate asks what the judge
would have said of replies of equal length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ptlab.errors import InvalidRequestError

Floats = npt.NDArray[np.float64]
RIDGE = 1e-3
"""Keeps the fit finite where one side wins every comparison; moves a rate by less than 1e-4 otherwise."""
MAX_STEPS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class WinRate:
    """Of N comparisons."""

    rate: float
    """Mean of the wins, 0..1; a tie counts half."""
    standard_error: float
    length_controlled: float
    """At equal length, see length_controlled_win_rate."""
    length_difference: float
    """Mean length of the first policy's replies minus the second's, tokens."""


def win_rate(wins_N: Sequence[float], lengths_N: Sequence[int], other_lengths_N: Sequence[int]) -> WinRate:
    """All four numbers.

    Args:
        wins_N: for each comparison 1.0 if the first policy's reply won, 0.0 if it lost, 0.5 for a tie (or the judge's probability).
        lengths_N, other_lengths_N: tokens of the two replies.
    Raises: InvalidRequestError if the three differ in length or are empty, or a win is not in 0..1.
    """
    if not len(wins_N) == len(lengths_N) == len(other_lengths_N) or not wins_N:
        raise InvalidRequestError(
            f"win rate: {len(wins_N)} wins, {len(lengths_N)} and {len(other_lengths_N)} lengths; one of each per comparison is needed"
        )
    wins = np.asarray(wins_N, dtype=np.float64)
    if not ((wins >= 0.0) & (wins <= 1.0)).all():
        raise InvalidRequestError(f"win rate: wins must lie in 0..1, found {wins.min():g} .. {wins.max():g}")
    differences = np.asarray(lengths_N, dtype=np.float64) - np.asarray(other_lengths_N, dtype=np.float64)
    rate = float(wins.mean())
    return WinRate(
        rate=rate,
        standard_error=math.sqrt(max(0.0, float(wins.var())) / len(wins)),
        length_controlled=length_controlled_win_rate(wins, differences),
        length_difference=float(differences.mean()),
    )


def length_controlled_win_rate(wins_N: Floats, length_differences_N: Floats) -> float:
    """sigmoid(theta) of the fit P(win) = sigmoid(theta + phi tanh(difference / std(difference))): the win rate at difference 0.

    Source: Dubois et al. 2024, arXiv:2404.04475, eq. 2 (AlpacaEval LC). Deviations: no term for the difficulty of the instruction, which
    theirs shares between many models and two cannot identify; a small ridge instead of cross-validated regularisation. Where all
    differences are the same nothing can be said about length and the plain rate comes out.
    """
    spread = float(length_differences_N.std())
    if spread == 0.0:
        return float(wins_N.mean())
    features_NF = np.stack([np.ones_like(wins_N), np.tanh(length_differences_N / spread)], axis=1)
    theta, _ = _logistic_fit(features_NF, wins_N)
    return 1.0 / (1.0 + math.exp(-theta))


def _logistic_fit(features_NF: Floats, targets_N: Floats) -> tuple[float, ...]:
    """Coefficients that maximise the likelihood of targets in 0..1, by Newton's method with step halving."""
    weights_F = np.zeros(features_NF.shape[1])

    def loss(candidate_F: Floats) -> float:
        logits_N = features_NF @ candidate_F
        return float((np.logaddexp(0.0, logits_N) - targets_N * logits_N).sum() + 0.5 * RIDGE * candidate_F @ candidate_F)

    for _ in range(MAX_STEPS):
        chances_N = 1.0 / (1.0 + np.exp(-(features_NF @ weights_F)))
        gradient_F = features_NF.T @ (chances_N - targets_N) + RIDGE * weights_F
        hessian_FF = (features_NF.T * (chances_N * (1.0 - chances_N))) @ features_NF + RIDGE * np.eye(len(weights_F))
        move_F = np.linalg.solve(hessian_FF, gradient_F)
        size = 1.0
        while loss(weights_F - size * move_F) > loss(weights_F) and size > 1e-6:
            size /= 2
        weights_F = weights_F - size * move_F
        if float(np.abs(move_F).max()) < 1e-9:
            break
    return tuple(float(weight) for weight in weights_F)
