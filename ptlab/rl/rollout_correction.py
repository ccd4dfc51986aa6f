"""Truncated and masked importance sampling (TIS, MIS): what a batch that other weights sampled is worth to those that train.

Three policies: q sampled the token, p_old is the trainer as the batch reaches it, p is the trainer as it moves on the batch. Between q and
p_old lie staleness (rollout.max_steps_off_policy) and the numbers of another engine. The loss as it stands compares p with q at once;
corrected, it compares p with p_old, so that a clip sees only what this batch moved, and a constant weight pays for the rest:

    w = p_old / q
    truncate (TIS)   w -> min(w, high)
    mask (MIS)       w -> w where low <= w <= high, else 0: the token (or the sequence) is left out
    then             `logprobs` of the datum := log p_old, `weights` x= w: the loss of a token is w * loss(p, p_old, A)

With one update per batch p = p_old at that update, and under importance_sampling the gradient is -w * A * dlog p: the textbook form of
both. Cost: one forward pass of the batch more.

Sources: truncation Ionides 2008; between sampler and trainer TIS, Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You
Off-Policy RL Training", fengyao.notion.site/off-policy-rl; masks Ling team 2025, arXiv:2510.18855 (IcePop, per token) and Liu, Li et al.
2025, "When Speed Kills Stability", richardli.xyz/rl-collapse (per sequence); p_old apart from q: Hilton et al. 2021, arXiv:2110.00641.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from ptlab.rl.diagnostics import sampled_tokens
from ptlab.section import Section
from ptlab.types import Datum, LossFnType, TensorData

if TYPE_CHECKING:
    from ptlab.client.training import TrainingClient

Floats = npt.NDArray[np.float64]

MAX_LOG_RATIO = 40.0
"""As in the losses: a log-ratio is cut off here, so that exp cannot overflow."""


class NoCorrectionConfig(Section):
    kind: Literal["none"] = "none"
    """The loss compares the trainer with the sampler itself."""


class TruncateConfig(Section):
    """Truncated importance sampling (TIS): the loss compares the trainer with itself before the batch; a weight pays for the rest."""

    kind: Literal["truncate"] = "truncate"
    """Weight = min(p of the trainer before the batch / q of the sampler, high)."""
    level: Literal["token", "sequence"] = "token"
    """Whose ratio: each token's, or the product over the datum."""
    high: float = Field(default=2.0, ge=1)
    """Largest weight."""


class MaskConfig(Section):
    """Masked importance sampling (MIS): as TIS, but what leaves the bounds is left out."""

    kind: Literal["mask"] = "mask"
    """Weight = p of the trainer before the batch / q of the sampler, 0 outside the bounds."""
    level: Literal["token", "sequence"] = "token"
    """Whose ratio: each token's, or the product over the datum, which is then left out whole."""
    low: float = Field(default=0.5, ge=0, le=1)
    """Smallest ratio that trains."""
    high: float = Field(default=2.0, ge=1)
    """Largest ratio that trains."""


CorrectionConfig = Annotated[NoCorrectionConfig | TruncateConfig | MaskConfig, Field(discriminator="kind")]


async def corrected(
    data_D: Sequence[Datum],
    correction: CorrectionConfig,
    training_client: TrainingClient,
    loss_fn: LossFnType,
    loss_fn_config: Mapping[str, float | str],
) -> tuple[list[Datum], dict[str, float]]:
    """The datums as `correction` has them trained on, and its `correction/*` metrics; without one, as they are.

    Args:
        training_client: its weights as they are now are p_old.
        loss_fn: what the datums were made for.
    """
    if correction.kind == "none":
        return list(data_D), {}
    scored = await training_client.forward(list(data_D), loss_fn, loss_fn_config)
    return correct(data_D, [output["logprobs"].to_numpy() for output in scored.loss_fn_outputs], correction)


def correct(
    data_D: Sequence[Datum], old_logprobs_D: Sequence[npt.NDArray[np.floating]], correction: TruncateConfig | MaskConfig
) -> tuple[list[Datum], dict[str, float]]:
    """The datums with log p_old for their `logprobs` and the bounded ratio for (or times) their `weights`.

    Metrics over the sampled tokens, at level "sequence" over the datums: correction/ratio_mean, _max, _min before the bounds, and
    correction/truncated_frac or correction/masked_frac, the share that met one.
    """
    new_D, ratios_D, cut_D = [], [], []
    for datum, old_T in zip(data_D, old_logprobs_D, strict=True):
        sampled_T = sampled_tokens(datum)
        log_ratio_T = np.where(sampled_T, old_T.astype(np.float64) - datum.loss_fn_inputs["logprobs"].to_numpy(), 0.0)
        log_ratios = log_ratio_T[sampled_T] if correction.level == "token" else log_ratio_T.sum(keepdims=True)
        ratios = np.exp(np.minimum(log_ratios, MAX_LOG_RATIO))
        weights, cut = bounded(ratios, correction)
        weights_T = np.zeros(len(sampled_T))
        weights_T[sampled_T] = weights  # a sequence's one weight goes to all its tokens
        new_D.append(_with(datum, old_T, weights_T))
        ratios_D.append(ratios)
        cut_D.append(cut)
    ratios, cut = np.concatenate(ratios_D), np.concatenate(cut_D)
    name = "truncated_frac" if correction.kind == "truncate" else "masked_frac"
    return new_D, {
        "correction/ratio_mean": float(ratios.mean()),
        "correction/ratio_max": float(ratios.max()),
        "correction/ratio_min": float(ratios.min()),
        f"correction/{name}": float(cut.mean()),
    }


def bounded(ratios: Floats, correction: TruncateConfig | MaskConfig) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """The weights that these ratios become, and where a bound was met."""
    match correction:
        case TruncateConfig():
            return np.minimum(ratios, correction.high), ratios > correction.high
        case MaskConfig():
            outside = (ratios < correction.low) | (ratios > correction.high)
            return np.where(outside, 0.0, ratios), outside


def _with(datum: Datum, old_logprobs_T: npt.NDArray[np.floating], weights_T: Floats) -> Datum:
    given = datum.loss_fn_inputs
    if "weights" in given:
        weights_T = weights_T * given["weights"].to_numpy()
    new = {"logprobs": old_logprobs_T.astype(np.float32), "weights": weights_T.astype(np.float32)}
    return Datum(
        model_input=datum.model_input, loss_fn_inputs={**given, **{key: TensorData.from_numpy(value) for key, value in new.items()}}
    )
