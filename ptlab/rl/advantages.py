"""What the loss multiplies: from the rewards of one group to one number per trajectory."""

from __future__ import annotations

import math
from collections.abc import Sequence


def group_centred(rewards_G: Sequence[float]) -> list[float]:
    """Reward minus the mean reward of the group; no division by the standard deviation.

    A group that agrees gets exact zeros (the floating-point mean of six times 0.1 is not 0.1, which would train on rounding).
    Source: GRPO (Shao et al. 2024, arXiv:2402.03300) without its scaling, as in Dr. GRPO (Liu et al. 2025, arXiv:2503.20783).
    """
    if not rewards_G or min(rewards_G) == max(rewards_G):
        return [0.0 for _ in rewards_G]
    mean = math.fsum(rewards_G) / len(rewards_G)
    return [reward - mean for reward in rewards_G]
