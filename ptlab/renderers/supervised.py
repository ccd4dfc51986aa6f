"""From a rendered conversation to the datum of a cross_entropy step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ptlab.errors import InvalidRequestError
from ptlab.renderers.base import Renderer, Weights
from ptlab.renderers.messages import Message, TrainOnWhat
from ptlab.types import Datum, ModelInput, TensorData


def supervised_datum(
    messages: Sequence[Message],
    renderer: Renderer,
    max_length: int | None = None,
    train_on_what: TrainOnWhat = TrainOnWhat.LAST_ASSISTANT_MESSAGE,
) -> Datum:
    """The conversation as one datum for loss "cross_entropy"; `max_length` in tokens cuts the end off.

    Raises: InvalidRequestError as build_supervised_example does, or if no trained token is left.
    """
    return datum_from_model_input_weights(*renderer.build_supervised_example(messages, train_on_what), max_length)


def datum_from_model_input_weights(model_input: ModelInput, weights: Weights, max_length: int | None = None) -> Datum:
    """Shifts by one: position t predicts token t + 1, so model_input is tokens[:-1], target_tokens tokens[1:], weights weights[1:].

    Args:
        model_input: N tokens, unshifted.
        weights: [N], one per token of model_input; the first is never used, nothing predicts the first token.
        max_length: at most this many of the N tokens are kept, from the start.
    """
    tokens = model_input.to_ints()
    if len(tokens) != len(weights):
        raise InvalidRequestError(f"model_input has {len(tokens)} tokens, weights has {len(weights)} values; one per token is needed")
    tokens, targets_weights = tokens[:max_length], np.asarray(weights[:max_length], dtype=np.float32)[1:]
    if not np.any(targets_weights):
        raise InvalidRequestError(
            f"none of the {len(tokens)} tokens kept has a weight (max_length {max_length}, {len(weights)} tokens before the cut); "
            f"raise max_length or drop this conversation"
        )
    return Datum(
        model_input=ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": TensorData.from_numpy(np.asarray(tokens[1:], dtype=np.int64)),
            "weights": TensorData.from_numpy(targets_weights),
        },
    )
