"""The official SDK's own objects become ours by structure; nothing else slips through."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ptlab import types
from ptlab.types import coerce

tinker = pytest.importorskip("tinker", reason="tinker (dev extra) is not installed")
sdk: Any = tinker.types


def test_ours_pass_unchanged() -> None:
    for value in (
        types.ModelInput.empty(),
        types.SamplingParams(),
        types.AdamParams(),
        types.LoraConfig(rank=1),
        types.TensorData([1], "int64"),
    ):
        assert coerce(value) is value


def test_parameters() -> None:
    assert coerce(sdk.SamplingParams(max_tokens=3, stop=[1, 2], temperature=0.5, seed=4)) == types.SamplingParams(
        max_tokens=3, stop=[1, 2], temperature=0.5, seed=4
    )
    assert coerce(sdk.AdamParams(learning_rate=3.0, eps=1e-8)) == types.AdamParams(learning_rate=3.0, eps=1e-8)
    assert coerce(sdk.LoraConfig(rank=3, train_mlp=False)) == types.LoraConfig(rank=3, train_mlp=False)


def test_model_input_with_every_kind_of_chunk() -> None:
    theirs = sdk.ModelInput(
        chunks=[
            sdk.EncodedTextChunk(tokens=[1, 2]),
            sdk.ImageChunk(data=b"\xff\x00", format="png", expected_tokens=3),
            sdk.ImageAssetPointerChunk(format="jpeg", location="x"),
            sdk.DmelChunk(dmel=bytes([0, 1, 4])),
        ]
    )
    assert coerce(theirs) == types.ModelInput(
        chunks=[
            types.EncodedTextChunk(tokens=[1, 2]),
            types.ImageChunk(data=b"\xff\x00", format="png", expected_tokens=3),
            types.ImageAssetPointerChunk(format="jpeg", location="x"),
            types.DmelChunk(dmel=bytes([0, 1, 4])),
        ]
    )
    assert types.ModelInput(chunks=[sdk.EncodedTextChunk(tokens=[1])]) == types.ModelInput.from_ints([1])
    assert types.ModelInput.empty().append(sdk.EncodedTextChunk(tokens=[7])).to_ints() == [7]


def test_tensor_data_dense_and_sparse() -> None:
    dense = coerce(sdk.TensorData(data=np.array([[1.0, 2.0]]), dtype="float32", shape=[1, 2]))
    assert type(dense) is types.TensorData and dense.dtype == "float32" and dense.tolist() == [[1.0, 2.0]]
    matrix = torch.zeros(2, 20)
    matrix[1, 3] = 5
    sparse = coerce(sdk.TensorData.from_torch_sparse(matrix))
    assert sparse.sparse_col_indices == [3] and torch.equal(sparse.to_torch(), matrix)


def test_datum_with_spans_and_mixed_construction() -> None:
    span = sdk.PromptProvenanceSpan(sequence_id="s", offset=1, length=2)
    theirs = sdk.Datum(model_input=sdk.ModelInput.from_ints([1, 2]), loss_fn_inputs={"target_tokens": [2, 3], "weights": [1.0, 0.5]})
    ours = coerce(theirs.with_provenance([span], [span]))
    assert type(ours) is types.Datum and ours.model_input == types.ModelInput.from_ints([1, 2])
    assert ours.loss_fn_inputs["weights"].tolist() == [1.0, 0.5] and type(ours.loss_fn_inputs["weights"]) is types.TensorData
    assert ours.model_input_spans == [types.PromptProvenanceSpan(sequence_id="s", offset=1, length=2)]
    assert coerce(theirs).model_input_spans is None
    mixed = types.Datum(sdk.ModelInput.from_ints([1]), {"weights": sdk.TensorData(data=[1.0], dtype="float32")})
    assert type(mixed.model_input) is types.ModelInput and type(mixed.loss_fn_inputs["weights"]) is types.TensorData


def test_sample_response_with_everything_in_it() -> None:
    topk = sdk.sample_response.TopkLogprobs(np.array([[0, 0], [4, 5]], np.int32), np.array([[-99999.0] * 2, [-0.5, -1.0]], np.float32))
    theirs = sdk.SampleResponse(
        sequences=[sdk.SampledSequence("stop", "id", np.array([1, 2], np.int32), np.array([-1.0, -2.0], np.float32), topk)],
        prompt_logprobs_np=np.array([np.nan, -3.0], np.float32),
        topk_prompt_logprobs_np=topk,
        target_prompt_logprobs=sdk.TensorData(data=[-1.0], dtype="float32", shape=[1, 1]),
        prompt_cache_hit_tokens=9,
        prompt_alt_tokens=sdk.prompt_alt_tokens.PromptAltTokens(
            sdk.TensorData(data=[4], dtype="int64", shape=[1, 1]), sdk.TensorData(data=[-4.0], dtype="float32", shape=[1, 1])
        ),
    )
    ours = coerce(theirs)
    assert type(ours) is types.SampleResponse
    (sequence,) = ours.sequences
    assert (sequence.tokens, sequence.logprobs, sequence.stop_reason, sequence.sequence_id) == ([1, 2], [-1.0, -2.0], "stop", "id")
    assert sequence.policy_version is None and sequence.topk_logprobs == [None, [(4, -0.5), (5, -1.0)]]
    assert ours.prompt_logprobs == [None, -3.0] and ours.topk_prompt_logprobs == theirs.topk_prompt_logprobs
    assert ours.target_prompt_logprobs.tolist() == [[-1.0]] and ours.prompt_cache_hit_tokens == 9
    assert ours.prompt_alt_tokens.tokens.tolist() == [[4]] and ours.prompt_alt_tokens.logprobs.tolist() == [[-4.0]]


@pytest.mark.parametrize(
    "value", [None, [1, 2], {"chunks": []}, np.array([1.0]), torch.tensor([1.0]), "abc", sdk.Cursor(offset=0, limit=1, total_count=2)]
)
def test_other_objects_are_refused_by_name(value: Any) -> None:
    with pytest.raises(TypeError, match=type(value).__name__):
        coerce(value)


@pytest.mark.parametrize(
    "convert",
    [types.as_model_input, types.as_datum, types.as_sampling_params, types.as_adam_params, types.as_lora_config, types.as_sample_response],
)
def test_each_conversion_takes_only_its_own_kind(convert: Any) -> None:
    with pytest.raises(TypeError):
        convert(sdk.Cursor(offset=0, limit=1, total_count=2))
