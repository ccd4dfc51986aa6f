"""What a number of right answers says: an interval around an accuracy, and the chance that one of k attempts is right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, variance

from ptlab.errors import InvalidRequestError


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that at least one of k attempts is right, estimated without bias from n attempts at the problem of which c were right.

    1 - C(n - c, k) / C(n, k): the share of the k-subsets of the n attempts that hold a right one. (1 - (1 - c/n)^k is too small.)
    Source: Chen et al. 2021, arXiv:2107.03374, eq. 1; exact in integers, where the paper multiplies floats.
    Raises: InvalidRequestError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= c <= n:
        raise InvalidRequestError(f"pass_at_k: {c} right of {n} attempts; a count from 0 to {n} is needed")
    if not 1 <= k <= n:
        raise InvalidRequestError(f"pass_at_k: k is {k} with {n} attempts per problem; k must be from 1 to the number of attempts")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4, ... up to n, and n itself: the k that a report of pass@k shows for n attempts."""
    return sorted({1 << power for power in range(n.bit_length())} | {n}) if n else []


def wilson_interval(num_right: float, num_tries: float, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a proportion from independent tries, inside [0, 1]; not of width 0 at 0 or all right.

    With p = num_right / n and z the two-sided normal quantile of `confidence` (1.96 for 0.95):

        (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    Source: Wilson 1927, J. Am. Stat. Assoc. 22 (158), 209-212.
    Args:
        num_tries: 0 gives (0, 1); need not be whole (an effective number).
    Raises: InvalidRequestError unless 0 <= num_right <= num_tries and 0 < confidence < 1.
    """
    if not 0 <= num_right <= num_tries:
        raise InvalidRequestError(f"wilson_interval: {num_right} right of {num_tries} tries; a number from 0 to {num_tries} is needed")
    if not 0 < confidence < 1:
        raise InvalidRequestError(f"wilson_interval: confidence is {confidence}; a number between 0 and 1 is needed, e.g. 0.95")
    if num_tries == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p, shrink = num_right / num_tries, z * z / num_tries
    middle = p + shrink / 2
    half = math.sqrt(shrink * (p * (1 - p) + shrink / 4))
    low, high = (middle - half) / (1 + shrink), (middle + half) / (1 + shrink)
    return (0.0 if num_right == 0 else max(0.0, low)), (1.0 if num_right == num_tries else min(1.0, high))


def accuracy_interval(right_P: Sequence[int], tries_P: Sequence[int], confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the accuracy over all attempts, where several attempts may be at the same problem.

    Attempts at one problem resemble each other, so P problems x n attempts say less than P n independent tries. Wilson's interval with
    the effective number of tries p (1 - p) / SE^2, where SE^2 = var(accuracy per problem) / P, kept between P and all attempts. One
    attempt per problem is plain Wilson.
    Source: clustered errors as in Miller 2024, arXiv:2411.00640, section 2.2; the effective number as in Korn and Graubard 1998, Survey
    Methodology 24 (2), 193-201, there with another interval. Problems are weighed by their attempts only through p: groups of one size
    are assumed, a lost attempt here and there does not matter.
    Args:
        right_P, tries_P: per problem, right attempts and attempts.
    """
    if len(right_P) != len(tries_P):
        raise InvalidRequestError(f"accuracy_interval: {len(right_P)} counts of right answers for {len(tries_P)} problems; one each")
    tried = [(right, tries) for right, tries in zip(right_P, tries_P, strict=True) if tries]
    num_right, num_tries = sum(right for right, _ in tried), sum(tries for _, tries in tried)
    if len(tried) < 2 or num_tries == len(tried):
        return wilson_interval(num_right, num_tries, confidence)
    p = num_right / num_tries
    squared_error = variance([right / tries for right, tries in tried]) / len(tried)
    effective = float(len(tried) if p in (0.0, 1.0) else num_tries)  # all alike says least; all equally split, most
    if squared_error > 0:
        effective = min(max(p * (1 - p) / squared_error, len(tried)), num_tries)
    return wilson_interval(p * effective, effective, confidence)


def mean_pass_at_k(right_P: Sequence[int], tries_P: Sequence[int], k: int) -> float:
    """pass@k over the problems with at least k attempts (a broken environment may have cost some). 0.0 if there is none."""
    estimates = [pass_at_k(tries, right, k) for right, tries in zip(right_P, tries_P, strict=True) if tries >= k]
    return fmean(estimates) if estimates else 0.0
