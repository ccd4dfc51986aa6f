"""forward_backward_custom on the client: the caller's loss of the log-probabilities becomes weights of a cross_entropy.

cross_entropy is L = sum(-logprob * weight), so weight = -dC/dlogprob gives it exactly the gradient of the caller's loss C.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np

from ptlab.errors import InvalidRequestError
from ptlab.types import Datum, ForwardBackwardOutput, TensorData

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
CustomLossFn: TypeAlias = "Callable[[list[Datum], list[torch.Tensor]], tuple[torch.Tensor, Mapping[str, float]]]"
SURROGATE_LOSS = "cross_entropy"


@dataclass(frozen=True, slots=True)
class CustomLoss:
    """What the caller's loss said: the surrogate batch that carries its gradient, its sum and its metrics."""

    data: list[Datum]
    loss_sum: float
    metrics: dict[str, float]

    def describe(self, output: ForwardBackwardOutput) -> ForwardBackwardOutput:
        """The backward's output with the caller's loss as `loss:sum`, that of the surrogate beside it."""
        metrics = {**output.metrics, **self.metrics, "loss:sum": self.loss_sum, "surrogate_loss:sum": output.metrics["loss:sum"]}
        return ForwardBackwardOutput(output.loss_fn_output_type, output.loss_fn_outputs, metrics)


def forward_data(data: Sequence[Datum]) -> list[Datum]:
    """The batch for the first pass: only target_tokens and weights (0 where none are given), whatever else the caller's loss reads.

    Raises: InvalidRequestError if a datum has no target_tokens.
    """
    batch: list[Datum] = []
    for index, datum in enumerate(data):
        target_tokens = datum.loss_fn_inputs.get("target_tokens")
        if target_tokens is None:
            raise InvalidRequestError(f"datum {index}: no 'target_tokens'; a custom loss is a function of their log-probabilities")
        weights = datum.loss_fn_inputs.get("weights")
        if weights is None:
            weights = TensorData.from_numpy(np.zeros(target_tokens.to_numpy().shape, dtype=np.float32))
        batch.append(_with_inputs(datum, target_tokens, weights))
    return batch


def compute(data: Sequence[Datum], given: Sequence[Any], loss_fn: CustomLossFn, output: ForwardBackwardOutput) -> CustomLoss:
    """Call the loss and differentiate it. Runs on a thread of its own: the loss may take its time.

    Args:
        data: the batch as ours; `given` is the same as the caller passed it, and is what the loss sees.
        output: of the first pass.
    Raises: ValueError if the loss is no scalar tensor with a gradient for each datum, or it or its gradient is not finite.
    """
    import torch

    logprobs_D = [record["logprobs"].to_torch().requires_grad_(True) for record in output.loss_fn_outputs]
    with torch.enable_grad():
        result = loss_fn(list(given), logprobs_D)
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], torch.Tensor)):
        raise InvalidRequestError(f"the custom loss must return (loss tensor, metrics dict), got {type(result).__name__}")
    loss, metrics = result
    if loss.numel() != 1:
        raise InvalidRequestError(f"the custom loss must be one number, got shape {tuple(loss.shape)}; sum it")
    loss_sum = float(loss.detach().sum().item())
    if not math.isfinite(loss_sum):
        raise InvalidRequestError(f"the custom loss is {loss_sum}; nothing was sent to the backward pass")
    if not loss.requires_grad:
        raise InvalidRequestError("the custom loss has no gradient: it does not depend on the log-probabilities, or they were detached")
    loss.sum().backward()  # type: ignore[no-untyped-call]
    surrogate: list[Datum] = []
    for index, (datum, logprobs) in enumerate(zip(data, logprobs_D, strict=True)):
        if logprobs.grad is None:
            raise InvalidRequestError(
                f"datum {index}: the custom loss has no gradient for its log-probabilities; leave out datums that the loss does not use, "
                "or add 0 * logprobs.sum()"
            )
        if not bool(torch.isfinite(logprobs.grad).all()):
            raise InvalidRequestError(f"datum {index}: the gradient of the custom loss is not finite; nothing was sent on")
        surrogate.append(_with_inputs(datum, datum.loss_fn_inputs["target_tokens"], TensorData.from_torch(-logprobs.grad)))
    return CustomLoss(surrogate, loss_sum, {name: float(value) for name, value in metrics.items()})


async def in_own_thread(work: Callable[[], T]) -> T:
    """Run blocking work on a new daemon thread. Cancelling gives up the wait."""
    done: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        with contextlib.suppress(concurrent.futures.InvalidStateError):  # cancelled: nobody waits any more
            try:
                value = work()
            except Exception as err:
                done.set_exception(err)
            except BaseException as err:  # SystemExit and the like would end the backend's loop
                done.set_exception(RuntimeError(f"the custom loss ended its thread with {err!r}"))
            else:
                done.set_result(value)

    threading.Thread(target=run, name="ptlab-custom-loss", daemon=True).start()
    return await asyncio.wrap_future(done)


def _with_inputs(datum: Datum, target_tokens: TensorData, weights: TensorData) -> Datum:
    inputs = {"target_tokens": target_tokens, "weights": weights}
    return Datum(datum.model_input, inputs, datum.model_input_spans, datum.loss_fn_input_spans)
