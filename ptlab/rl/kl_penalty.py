"""A penalty on leaving a reference model, token by token; with no other reward it is on-policy distillation.

    advantage_t -= coef * (d_t - mean d),    d_t = log q(token_t | before) - log p_ref(token_t | before)

over the sampled tokens of the whole batch. The expectation of d_t under the policy is KL(policy || reference) at that position, so the
policy gradient of the penalty is that of the reverse KL of the next token; what a token does to later tokens' divergence is not counted
(discount 0). The mean over the batch is a baseline: without it a batch that is far from the reference everywhere would push down every
token it holds. Source: the KL term of InstructGPT's reward (Ouyang et al. 2022, arXiv:2203.02155, eq. 2), per token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ptlab.errors import EngineError, InvalidRequestError
from ptlab.types import Datum, ModelInput, TensorData

if TYPE_CHECKING:
    from ptlab.client.sampling import SamplingClient

Floats = npt.NDArray[np.float64]


async def add_kl_penalty(data_D: Sequence[Datum], reference: SamplingClient, coef: float) -> tuple[list[Datum], dict[str, float]]:
    """The datums with the penalty in their advantages, and `kl/policy_reference_nats` (mean d), `kl/advantage_std` (of the penalty).

    Args:
        data_D: from datums.group_to_datums(..., mark_sampled=True); the mark is taken off here.
        coef: in units of reward per nat.
    Raises: InvalidRequestError for a datum without the mark; EngineError if the reference scores fewer tokens than it was given.
    """
    masks_D = [_mask(datum, index) for index, datum in enumerate(data_D)]
    reference_D = await asyncio.gather(*(reference_logprobs(datum, reference) for datum in data_D))
    away_D = [datum.loss_fn_inputs["logprobs"].to_numpy() - scored_T for datum, scored_T in zip(data_D, reference_D, strict=True)]
    away_T = np.concatenate([away[mask] for away, mask in zip(away_D, masks_D, strict=True)]) if data_D else np.zeros(0)
    if not away_T.size:
        return [_with_advantages(datum, None) for datum in data_D], {}
    mean = float(away_T.mean())
    paid_D = [
        _with_advantages(datum, np.where(mask, datum.loss_fn_inputs["advantages"].to_numpy() - coef * (away - mean), 0.0))
        for datum, mask, away in zip(data_D, masks_D, away_D, strict=True)
    ]
    return paid_D, {"kl/policy_reference_nats": mean, "kl/advantage_std": coef * float(away_T.std())}


async def reference_logprobs(datum: Datum, reference: SamplingClient) -> Floats:
    """log p_ref of each target token of a text datum given what is before it; [T] nats."""
    targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
    tokens = [*datum.model_input.to_ints(), int(targets[-1])]
    scored = await reference.compute_logprobs(ModelInput.from_ints(tokens))
    if len(scored) != len(tokens) or any(value is None for value in scored[1:]):
        raise EngineError(
            f"the reference scored {sum(value is not None for value in scored)} of {len(tokens) - 1} tokens", engine="sampler",
            operation="compute_logprobs",
        )  # fmt: skip
    return np.asarray(scored[1:], dtype=np.float64)


def _mask(datum: Datum, index: int) -> npt.NDArray[np.bool_]:
    if "mask" not in datum.loss_fn_inputs:
        raise InvalidRequestError(f"datum {index}: no 'mask' of its sampled tokens; make it with group_to_datums(..., mark_sampled=True)")
    return np.asarray(datum.loss_fn_inputs["mask"].to_numpy() != 0)


def _with_advantages(datum: Datum, advantages_T: Floats | None) -> Datum:
    inputs = {name: value for name, value in datum.loss_fn_inputs.items() if name != "mask"}
    if advantages_T is not None:
        inputs["advantages"] = TensorData.from_numpy(advantages_T.astype(np.float32))
    return Datum(model_input=datum.model_input, loss_fn_inputs=inputs)
