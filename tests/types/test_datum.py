"""Datum: the table of implicit conversions, row by row, and provenance."""

from __future__ import annotations

import copy
import pickle
from collections import UserList
from typing import Any

import numpy as np
import pytest
import torch

from ptlab.types import Datum, ModelInput, PromptProvenanceSpan, SampledProvenanceSpan, TensorData

INPUT = ModelInput.from_ints([1, 2, 3])


def convert(key: str, value: Any) -> TensorData:
    return Datum(INPUT, {key: value}).loss_fn_inputs[key]


@pytest.mark.parametrize(
    ("key", "value", "dtype", "values"),
    [
        ("target_tokens", [1, 2, 3], "int64", [1, 2, 3]),
        ("target_tokens", [1.0, 2.0, 3.0], "int64", [1, 2, 3]),
        ("target_tokens", [[1, 2], [3, 4]], "int64", [[1, 2], [3, 4]]),
        ("target_tokens", [np.int32(4)], "int64", [4]),
        ("weights", [1, 0], "float32", [1.0, 0.0]),
        ("weights", [True, False], "float32", [1.0, 0.0]),
        ("advantages", [0.5], "float32", [0.5]),
        ("logprobs", [], "float32", []),
        ("clip_low_threshold", [0.5], "float32", [0.5]),
        ("clip_high_threshold", [2], "float32", [2.0]),
        ("sequence_ratio_mask", [1, 0], "float32", [1.0, 0.0]),
        ("weights", np.array([1, 2]), "int64", [1, 2]),  # the array's kind, not the name, decides
        ("anything", np.array([1.5]), "float32", [1.5]),
        ("anything", torch.tensor([1.5]), "float32", [1.5]),
        ("target_tokens", torch.tensor([1], dtype=torch.int32), "int64", [1]),
    ],
)
def test_what_becomes_what(key: str, value: Any, dtype: str, values: list[Any]) -> None:
    tensor = convert(key, value)
    assert tensor.dtype == dtype and tensor.tolist() == values and tensor.shape == list(np.array(values).shape)


def test_tensor_data_passes_unchanged() -> None:
    tensor = TensorData([1.0], "float32")
    assert convert("anything", tensor) is tensor


@pytest.mark.parametrize("key", ["target_tokens", "weights", "advantages"])
def test_only_two_dimensional_targets_and_weights_become_sparse(key: str) -> None:
    dense = torch.zeros(3, 20)
    dense[1, 4] = 2
    tensor = convert(key, dense)
    assert (tensor.sparse_crow_indices is not None) == (key != "advantages")
    assert torch.equal(tensor.to_torch(), dense)


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        ("target_token", [1, 2], KeyError, "target_token.*use one of target_tokens"),
        ("weights", (1.0, 2.0), TypeError, "tuple"),
        ("weights", 1.0, TypeError, "float"),
        ("target_tokens", INPUT, TypeError, "ModelInput"),
        ("weights", UserList([1.0]), TypeError, "UserList"),
        ("weights", [[1.0], [1.0, 2.0]], ValueError, "rectangular"),
        ("weights", ["1"], ValueError, "numbers only"),
        ("logprobs", [None, -1.0], ValueError, "numbers only"),
        ("target_tokens", [1.5], ValueError, r"whole numbers; found 1\.5"),
        ("target_tokens", [float("nan")], ValueError, "whole numbers; found nan"),
        ("weights", np.array([True]), ValueError, "weights.*bool"),
        ("weights", np.array([1], dtype=np.uint8), ValueError, "uint8"),
        ("weights", torch.tensor([True]), ValueError, "weights.*bool"),
        ("weights", torch.ones(2, requires_grad=True), RuntimeError, "weights.*requires grad"),
    ],
)
def test_what_is_refused_and_how(key: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        convert(key, value)


def test_lengths_are_not_checked_here() -> None:
    assert convert("weights", [1.0]).shape == [1]  # the backend knows the loss, and says what is needed


def test_the_callers_dict_is_left_alone() -> None:
    inputs: dict[str, Any] = {"weights": [1.0, 1.0, 1.0]}
    Datum(INPUT, inputs)
    assert inputs == {"weights": [1.0, 1.0, 1.0]}


def test_model_input_must_be_one() -> None:
    with pytest.raises(TypeError, match="from_ints"):
        Datum([1, 2, 3], {})  # type: ignore[arg-type]


def test_pickle_and_deepcopy() -> None:
    datum = Datum(INPUT, {"target_tokens": [1, 2, 3]}).with_provenance(
        [PromptProvenanceSpan(sequence_id="s", length=3)], [SampledProvenanceSpan(sequence_id="s", length=3)]
    )
    for twin in (pickle.loads(pickle.dumps(datum)), copy.deepcopy(datum)):
        assert twin.model_input == INPUT and twin.loss_fn_inputs["target_tokens"].tolist() == [1, 2, 3]
        assert twin.model_input_spans == datum.model_input_spans and twin.loss_fn_input_spans == datum.loss_fn_input_spans


def test_provenance_must_tile_both_fields() -> None:
    datum = Datum(INPUT, {"target_tokens": [1, 2, 3]})
    prompt = PromptProvenanceSpan(sequence_id="s", offset=0, length=1)
    sampled = SampledProvenanceSpan(sequence_id="s", length=2)
    spanned = datum.with_provenance([prompt, sampled], [prompt, sampled])
    assert spanned.model_input_spans == [prompt, sampled] and datum.model_input_spans is None
    with pytest.raises(ValueError, match="model_input spans cover 1 positions, the field has 3"):
        datum.with_provenance([prompt], [prompt, sampled])
    with pytest.raises(ValueError, match="loss_fn_inputs spans cover 2 positions"):
        datum.with_provenance([prompt, sampled], [sampled])
    with pytest.raises(ValueError, match="come together"):
        Datum(INPUT, {}, model_input_spans=[prompt, sampled])
    with pytest.raises(TypeError, match="got str"):
        Datum(INPUT, {}, ["a"], ["b"])  # type: ignore[list-item]


@pytest.mark.parametrize("fields", [{"length": -1}, {"length": 1, "offset": -1}, {"length": 1, "sequence_id": ""}])
def test_a_span_that_cannot_be_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="SampledProvenanceSpan"):
        SampledProvenanceSpan(**{"sequence_id": "s", **fields})
