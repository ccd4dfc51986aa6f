from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ptlab.errors import InvalidRequestError
from ptlab.renderers import ChatmlRenderer, Message, datum_from_model_input_weights, supervised_datum
from ptlab.types import ModelInput


def test_targets_and_weights_are_shifted_by_one_against_the_input() -> None:
    datum = datum_from_model_input_weights(ModelInput.from_ints([10, 11, 12, 13]), np.array([0, 0, 1, 0.5], dtype=np.float32))
    assert datum.model_input.to_ints() == [10, 11, 12]
    assert datum.loss_fn_inputs["target_tokens"].tolist() == [11, 12, 13]
    assert datum.loss_fn_inputs["weights"].tolist() == [0.0, 1.0, 0.5]
    assert datum.loss_fn_inputs["target_tokens"].dtype == "int64" and datum.loss_fn_inputs["weights"].dtype == "float32"


def test_max_length_counts_unshifted_tokens_and_cuts_the_end() -> None:
    datum = datum_from_model_input_weights(ModelInput.from_ints([10, 11, 12, 13]), np.array([0, 1, 1, 1], dtype=np.float32), max_length=3)
    assert datum.model_input.to_ints() == [10, 11]
    assert datum.loss_fn_inputs["target_tokens"].tolist() == [11, 12]


def test_a_conversation_becomes_the_datum_that_predicts_its_answer(chatml_tokenizer: Any) -> None:
    messages: list[Message] = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    datum = supervised_datum(messages, ChatmlRenderer(chatml_tokenizer))
    predicted = [t for t, w in zip(*(datum.loss_fn_inputs[key].tolist() for key in ("target_tokens", "weights")), strict=True) if w]
    assert chatml_tokenizer.decode(predicted) == "4<|im_end|>"


def test_a_cut_that_leaves_nothing_to_train_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"none of the 2 tokens kept has a weight \(max_length 2, 3 tokens before the cut\)"):
        datum_from_model_input_weights(ModelInput.from_ints([1, 2, 3]), np.array([1, 0, 1], dtype=np.float32), max_length=2)
    with pytest.raises(InvalidRequestError, match="model_input has 2 tokens, weights has 1 values"):
        datum_from_model_input_weights(ModelInput.from_ints([1, 2]), np.ones(1, dtype=np.float32))
