"""The answers on the wire, against the official SDK: what we write is what its decoder reads."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import tinker
from tinker.proto.response_conv import deserialize_forward_backward_output, deserialize_sample_response
from tinker.types.optim_step_response import OptimStepResponse as SdkOptimStepResponse

from ptlab.errors import EngineError
from ptlab.server import wire_pb2 as pb
from ptlab.server.wire import encode_forward_backward_output, encode_json, encode_sample_response
from ptlab.types import (
    ForwardBackwardOutput,
    OptimStepResponse,
    PromptAltTokens,
    SampledSequence,
    SampleResponse,
    TensorData,
    TopkLogprobs,
    TrainingRun,
)

NAN = math.nan


def same(ours: TensorData, theirs: Any) -> None:
    assert (ours.dtype, ours.shape, ours.sparse_crow_indices, ours.sparse_col_indices) == (
        theirs.dtype,
        theirs.shape,
        theirs.sparse_crow_indices,
        theirs.sparse_col_indices,
    )
    np.testing.assert_array_equal(ours.to_numpy(), theirs.to_numpy())


def sdk_output(output: ForwardBackwardOutput) -> Any:
    return deserialize_forward_backward_output(encode_forward_backward_output(output))


def output_of(*arrays: Any, **metrics: float) -> ForwardBackwardOutput:
    outputs = [{"logprobs": TensorData.from_numpy(np.asarray(array, np.float32))} for array in arrays]
    return ForwardBackwardOutput("TensorData", outputs, metrics)


def test_outputs_arrive_in_order_with_their_shapes() -> None:
    arrays = [
        np.array([-0.5, -1.5, NAN]),
        np.array([]),
        np.arange(6).reshape(3, 2),
        np.zeros((0, 2)),
        np.arange(3).reshape(1, 3),  # another K: a record of its own
        np.arange(4).reshape(2, 2),  # and back
        np.array([7.0]),
    ]
    output = ForwardBackwardOutput("ArrayRecord", output_of(*arrays).loss_fn_outputs, {"loss:sum": 1 / 3, "x:mean": math.inf})
    got = sdk_output(output)
    assert got.loss_fn_output_type == "ArrayRecord" and got.metrics == {"loss:sum": 1 / 3, "x:mean": math.inf}
    assert len(got.loss_fn_outputs) == len(arrays)
    for theirs, array in zip(got.loss_fn_outputs, arrays, strict=True):
        assert theirs.keys() == {"logprobs"} and theirs["logprobs"].shape == list(array.shape)
        np.testing.assert_array_equal(theirs["logprobs"].to_numpy(), array.astype(np.float32))
        theirs["logprobs"].to_torch().add_(1)


def test_equal_layouts_share_a_record() -> None:
    message = pb.ForwardBackwardOutput()
    message.ParseFromString(encode_forward_backward_output(output_of([1.0, 2.0], [3.0], [[1.0, 2.0]], [4.0])))
    assert [record.num_datums for record in message.loss_fn_outputs] == [2, 1, 1]
    field = message.loss_fn_outputs[0].fields["logprobs"]
    assert np.frombuffer(field.offsets, "<i8").tolist() == [0, 8, 12] and len(field.data) == 12


def test_several_fields_of_both_dtypes_and_none_at_all() -> None:
    datums = [
        {
            "tokens": TensorData([2**40, -1], "int64"),
            "logprobs": TensorData([0.5], "float32"),
            "sparse": TensorData([2.0], "float32", [2, 3], [0, 0, 1], [1]),
            "scalar": TensorData(np.array(3.0), "float32", []),
        },
        {
            "tokens": TensorData([5], "int64"),
            "logprobs": TensorData([], "float32"),
            "sparse": TensorData([], "float32", [0, 3]),
            "scalar": TensorData(np.array(4.0), "float32", []),
        },
    ]
    first, second = sdk_output(ForwardBackwardOutput("x", datums)).loss_fn_outputs
    assert (first["tokens"].dtype, first["tokens"].tolist(), second["tokens"].tolist()) == ("int64", [2**40, -1], [5])
    assert (first["logprobs"].tolist(), second["logprobs"].tolist()) == ([0.5], [])
    assert first["sparse"].tolist() == [[0, 0, 0], [0, 2, 0]] and second["sparse"].shape == [0, 3]
    assert (first["scalar"].tolist(), second["scalar"].tolist()) == ([3.0], [4.0])
    assert sdk_output(ForwardBackwardOutput("x", [{}, {}])).loss_fn_outputs == [{}, {}]
    assert sdk_output(ForwardBackwardOutput("x", [])).loss_fn_outputs == []


def test_what_the_sdk_cannot_read_is_not_sent() -> None:
    with pytest.raises(EngineError, match="metric 'loss' cannot be sent"):
        encode_forward_backward_output(output_of([1.0], loss=1.0))
    with pytest.raises(EngineError, match="metric 'a:b:c'"):
        encode_forward_backward_output(output_of([1.0], **{"a:b:c": 1.0}))
    one, other = output_of([1.0]).loss_fn_outputs[0], {"other": TensorData([1.0], "float32")}
    with pytest.raises(EngineError, match=r"loss_fn_outputs\[1\] has the fields \['other'\], the first datum has \['logprobs'\]"):
        encode_forward_backward_output(ForwardBackwardOutput("x", [one, other]))


def sdk_sampled(response: SampleResponse) -> Any:
    return deserialize_sample_response(encode_sample_response(response))


TOPK = TopkLogprobs.from_lists([None, [(5, -0.5)], [(6, -0.25), (7, -3.0)]], 2)


def test_draws_arrive_with_their_scores() -> None:
    response = SampleResponse(
        sequences=[
            SampledSequence.from_lists([1, 2, 2**31 - 1], [-0.5, -1.5, NAN], stop_reason="stop", sequence_id="a", topk_logprobs=TOPK),
            SampledSequence.from_lists([4], None, stop_reason="length", sequence_id="b", policy_version=3),
        ]
    )
    first, second = sdk_sampled(response).sequences
    assert (first.stop_reason, first.tokens, second.stop_reason, second.tokens) == ("stop", [1, 2, 2**31 - 1], "length", [4])
    np.testing.assert_array_equal(first.logprobs_np, np.array([-0.5, -1.5, NAN], np.float32))
    assert first.topk_logprobs == [None, [(5, -0.5)], [(6, -0.25), (7, -3.0)]]
    assert second.logprobs is None and second.topk_logprobs is None
    rest = sdk_sampled(response)
    assert rest.prompt_logprobs is None and rest.topk_prompt_logprobs is None and rest.target_prompt_logprobs is None
    assert rest.prompt_alt_tokens is None and rest.prompt_cache_hit_tokens == 0


def test_draws_held_as_lists_are_the_same_draws() -> None:
    rows = [None, [(5, -0.5), (6, -1.0)]]
    held = SampledSequence("stop", "a", _tokens_list=[1, 2], _logprobs_list=[-0.5, -1.0], _topk_logprobs_list=rows)
    response = SampleResponse([held], _prompt_logprobs_list=[None, -0.5], _topk_prompt_logprobs_list=rows)
    got = sdk_sampled(response)
    assert (got.sequences[0].tokens, got.sequences[0].logprobs, got.sequences[0].topk_logprobs) == ([1, 2], [-0.5, -1.0], rows)
    assert (got.prompt_logprobs, got.topk_prompt_logprobs) == ([None, -0.5], rows)


def test_prompt_scores_arrive() -> None:
    sparse = TensorData([-0.5], "float32", [2, 3], [0, 0, 1], [1])
    response = SampleResponse(
        sequences=[],
        prompt_logprobs_np=np.array([NAN, -0.5, -1.5], np.float32),
        topk_prompt_logprobs_np=TOPK,
        target_prompt_logprobs=sparse,
        prompt_cache_hit_tokens=17,
        prompt_alt_tokens=PromptAltTokens(
            TensorData([[1, 2], [3, 4]], "int64", [2, 2]), TensorData([[-1, -2], [-3, -4]], "float32", [2, 2])
        ),
    )
    got = sdk_sampled(response)
    assert got.prompt_logprobs == [None, -0.5, -1.5] and got.topk_prompt_logprobs == TOPK.to_lists()
    assert got.prompt_cache_hit_tokens == 17
    same(sparse, got.target_prompt_logprobs)
    assert got.prompt_alt_tokens.tokens.tolist() == [[1, 2], [3, 4]] and got.prompt_alt_tokens.logprobs.tolist() == [[-1, -2], [-3, -4]]
    dense = TensorData([[-0.5, 0.0]], "float32", [1, 2])
    same(dense, sdk_sampled(SampleResponse([], target_prompt_logprobs=dense)).target_prompt_logprobs)
    flat = TensorData([-0.5, 0.0], "float32")  # no shape here, one there: an empty shape is a scalar to the SDK
    assert sdk_sampled(SampleResponse([], target_prompt_logprobs=flat)).target_prompt_logprobs.shape == [2]


def test_empty_is_absent() -> None:
    empty = SampledSequence.from_lists([], [], stop_reason="length", sequence_id="a", topk_logprobs=TopkLogprobs.from_lists([], 2))
    got = sdk_sampled(SampleResponse([empty], prompt_logprobs_np=np.zeros(0, np.float32)))
    assert got.sequences[0].tokens == [] and got.sequences[0].logprobs is None and got.sequences[0].topk_logprobs is None
    assert got.prompt_logprobs is None


def test_scores_that_do_not_fit_are_an_engine_error() -> None:
    with pytest.raises(EngineError, match="2 tokens and 1 log-probabilities"):
        encode_sample_response(SampleResponse([SampledSequence.from_lists([1, 2], [-1.0], stop_reason="stop", sequence_id="a")]))
    broken = TopkLogprobs(np.zeros((2, 3), np.int32), np.zeros((2, 2), np.float32))
    with pytest.raises(EngineError, match=r"\(2, 3\)"):
        encode_sample_response(SampleResponse([], topk_prompt_logprobs_np=broken))


# -- JSON


def test_numbers_that_json_does_not_have_reach_the_sdk() -> None:
    body = encode_json(OptimStepResponse(metrics={"grad_norm:mean": math.inf, "a:sum": -math.inf, "b:sum": NAN, "c:sum": 0.1}))
    strict = json.loads(body, parse_constant=pytest.fail)
    got = SdkOptimStepResponse.model_validate(strict).metrics
    assert got is not None and math.isnan(got.pop("b:sum"))
    assert got == {"grad_norm:mean": math.inf, "a:sum": -math.inf, "c:sum": 0.1}


def test_json_of_models_and_of_dicts() -> None:
    run = TrainingRun.model_validate(
        {"training_run_id": "r", "base_model": "m", "model_owner": "o", "is_lora": True, "last_request_time": "2026-01-02T03:04:05Z"}
    )
    sent = json.loads(encode_json(run))
    assert sent["last_request_time"] == "2026-01-02T03:04:05Z" and sent["lora_rank"] is None
    assert tinker.types.TrainingRun.model_validate(sent).last_request_time == run.last_request_time
    assert encode_json({"path": None, "urls": ["é", (1.5, NAN)]}) == b'{"path":null,"urls":["\\u00e9",[1.5,"NaN"]]}'
