"""Requests in protobuf, against the official SDK: what its encoder writes is what we read, and nothing else does harm."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tinker.proto import tinker_public_pb2 as sdk_pb
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.types.forward_backward_request import ForwardBackwardRequest as SdkRequest

from ptlab.errors import InvalidRequestError
from ptlab.server import wire_pb2 as pb
from ptlab.server.unpacking import TooLargeError
from ptlab.server.wire import (
    decode_forward_backward,
    read_forward_backward_header,
)
from ptlab.types import (
    Datum,
    PromptProvenanceSpan,
    SampledProvenanceSpan,
    TensorData,
)

NAN = math.nan


def layout(messages: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Field numbers and types of every message, map entries included; messages and enums by their own name."""
    fields: dict[str, dict[str, Any]] = {}
    for name, message in messages.items():
        fields[name] = {
            f"{field.number} {field.name}": (
                field.type,
                field.is_repeated,
                field.has_presence,
                (field.message_type or field.enum_type or field).name,
            )
            for field in message.fields
        }
        fields |= {f"{name}.{nested}": inner for nested, inner in layout(message.nested_types_by_name).items()}
    return fields


def test_every_field_number_and_type_is_the_sdks() -> None:
    ours, theirs = pb.DESCRIPTOR, sdk_pb.DESCRIPTOR
    assert layout(ours.message_types_by_name) == layout(theirs.message_types_by_name)
    assert {name: dict(enum.values_by_number.items()).keys() for name, enum in ours.enum_types_by_name.items()} == {
        name: dict(enum.values_by_number.items()).keys() for name, enum in theirs.enum_types_by_name.items()
    }
    assert (ours.name, ours.package) != (theirs.name, theirs.package)  # else they could not live in one process


# -- requests


def sdk_body(data: list[tinker.Datum], loss_fn: Any = "cross_entropy", config: Any = None, seq_id: int = 3) -> bytes:
    request = SdkRequest(
        model_id="session:train:0",
        seq_id=seq_id,
        forward_backward_input=tinker.types.ForwardBackwardInput(data=data, loss_fn=loss_fn, loss_fn_config=config),
    )
    return forward_backward_request_to_proto(request).SerializeToString()


def sdk_datum(length: int = 3, **inputs: Any) -> tinker.Datum:
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(list(range(10, 10 + length))), loss_fn_inputs=inputs)


def decoded(datum: tinker.Datum) -> Datum:
    return decode_forward_backward(sdk_body([datum])).data[0]


def same(ours: TensorData, theirs: Any) -> None:
    assert (ours.dtype, ours.shape) == (theirs.dtype, list(theirs.to_numpy().shape) if theirs.shape is None else theirs.shape)
    assert ours.sparse_crow_indices == theirs.sparse_crow_indices and ours.sparse_col_indices == theirs.sparse_col_indices
    np.testing.assert_array_equal(ours.to_numpy(), theirs.to_numpy())
    assert ours.to_numpy().dtype == theirs.to_numpy().dtype


@pytest.mark.parametrize(
    "value",
    [
        np.array([1, -2, 2**62]),
        np.array([0.1, NAN, -math.inf], np.float32),
        np.arange(6).reshape(3, 2),
        np.zeros((3, 0), np.float32),
        np.zeros((0,)),
        torch.tensor([[0, 0, 0, 7], [0] * 4, [0, 0, 5, 0], [0] * 4, [0] * 4]),
        torch.zeros(9, 9),
        torch.tensor([0.5, 1.5], dtype=torch.bfloat16),
    ],
    ids=["int64", "float32", "N,K", "N,0", "empty", "csr", "csr without a cell", "bfloat16"],
)
def test_tensors_arrive_as_the_sdk_holds_them(value: Any) -> None:
    theirs = sdk_datum(weights=value, target_tokens=np.arange(3))
    ours = decoded(theirs)
    assert ours.loss_fn_inputs.keys() == {"weights", "target_tokens"}
    same(ours.loss_fn_inputs["weights"], theirs.loss_fn_inputs["weights"])
    ours.loss_fn_inputs["weights"].to_torch().add_(1)  # writable


def test_csr_is_what_torch_makes_of_a_padded_tensor_and_stays_it() -> None:
    padded = torch.zeros(8, 6, dtype=torch.int64)
    padded[2, 3], padded[7, 0] = 5, 9
    ours = decoded(sdk_datum(8, target_tokens=padded)).loss_fn_inputs["target_tokens"]
    assert ours.data == [5, 9] and ours.sparse_col_indices == [3, 0] and ours.shape == [8, 6]
    assert ours.to_numpy().tolist() == padded.tolist()


def test_a_tensor_without_a_shape_has_one_dimension() -> None:
    assert decoded(sdk_datum(advantages=tinker.TensorData(data=[0.5], dtype="float32"))).loss_fn_inputs["advantages"].shape is None


def test_every_kind_of_chunk() -> None:
    chunks = [
        tinker.types.EncodedTextChunk(tokens=[1, 2**31 - 1]),
        tinker.types.ImageChunk(data=b"\x89PNG\x00", format="png", expected_tokens=7),
        tinker.types.ImageChunk(data=b"", format="jpeg"),
        tinker.types.DmelChunk(dmel=b"\x00\x01\x05"),
        tinker.types.EncodedTextChunk(tokens=[]),
    ]
    datum = tinker.Datum(model_input=tinker.ModelInput(chunks=chunks), loss_fn_inputs={})
    assert [chunk.model_dump() for chunk in decoded(datum).model_input.chunks] == [chunk.model_dump() for chunk in chunks]


def test_spans() -> None:
    theirs = sdk_datum(4, target_tokens=np.arange(4)).with_provenance(
        model_input=[
            tinker.types.PromptProvenanceSpan(sequence_id="a", offset=0, length=3),
            tinker.types.SampledProvenanceSpan(sequence_id="b", offset=2, length=1),
        ],
        loss_fn_inputs=[tinker.types.SampledProvenanceSpan(sequence_id="c", offset=5, length=4)],
    )
    ours = decoded(theirs)
    assert ours.model_input_spans == [
        PromptProvenanceSpan(sequence_id="a", offset=0, length=3),
        SampledProvenanceSpan(sequence_id="b", offset=2, length=1),
    ]
    assert ours.loss_fn_input_spans == [SampledProvenanceSpan(sequence_id="c", offset=5, length=4)]
    assert decoded(sdk_datum()).model_input_spans is None


def test_the_rest_of_the_request() -> None:
    body = sdk_body(
        [sdk_datum(3), sdk_datum(0), sdk_datum(2)], "ppo", {"clip_low_threshold": 0.8, "beta": 2, "loss_id": "é-1"}, seq_id=2**31 - 1
    )
    call = decode_forward_backward(body)
    assert (call.model_id, call.seq_id, call.loss_fn, call.forward_only) == ("session:train:0", 2**31 - 1, "ppo", False)
    assert call.loss_fn_config == {"clip_low_threshold": 0.8, "beta": 2.0, "loss_id": "é-1"}
    assert [datum.model_input.to_ints() for datum in call.data] == [[10, 11, 12], [], [10, 11]]
    header = read_forward_backward_header(body)
    assert (header.model_id, header.seq_id, header.loss_fn, header.forward_only) == ("session:train:0", 2**31 - 1, "ppo", False)
    assert (header.num_data, header.num_tokens) == (3, 5)
    message = pb.ForwardBackwardRequest(model_id="m", seq_id=1, forward_only=True, loss_fn_config={"beta": 0.5})
    assert decode_forward_backward(message.SerializeToString()).loss_fn_config == {"beta": 0.5}  # an SDK before loss_fn_config_v2
    assert decode_forward_backward(message.SerializeToString()).forward_only
    assert decode_forward_backward(sdk_body([])).loss_fn_config == {}


def test_narrow_numbers_are_widened() -> None:
    message = request()
    inputs = message.data[0].loss_fn_inputs
    inputs["target_tokens"].CopyFrom(pb.Tensor(dtype=pb.DTYPE_INT32, dense=np.array([1, -1], "<i4").tobytes(), shape=[2]))
    half = torch.tensor([1.5, -3.0], dtype=torch.bfloat16)
    inputs["weights"].CopyFrom(pb.Tensor(dtype=pb.DTYPE_BFLOAT16, dense=half.view(torch.int16).numpy().tobytes(), shape=[2]))
    got = decode_forward_backward(message.SerializeToString()).data[0].loss_fn_inputs
    assert (got["target_tokens"].dtype, got["target_tokens"].data) == ("int64", [1, -1])
    assert (got["weights"].dtype, got["weights"].data) == ("float32", [1.5, -3.0])


# -- requests that cannot be


def request() -> pb.ForwardBackwardRequest:
    """Two datums; the second is where the mistakes are put."""
    message = pb.ForwardBackwardRequest(model_id="m", seq_id=1, loss_fn="cross_entropy")
    for _ in range(2):
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = np.array([1, 2], "<i4").tobytes()
        datum.loss_fn_inputs["target_tokens"].CopyFrom(pb.Tensor(dtype=pb.DTYPE_INT64, dense=bytes(16), shape=[2]))
    return message


def tensor(**fields: Any) -> Callable[[pb.ForwardBackwardRequest], None]:
    return lambda message: message.data[1].loss_fn_inputs["weights"].CopyFrom(pb.Tensor(**{"dtype": pb.DTYPE_FLOAT32, **fields}))


def csr(shape: list[int], crow: list[int], col: list[int], num_values: int | None = None) -> Callable[[pb.ForwardBackwardRequest], None]:
    values = bytes(4 * (len(col) if num_values is None else num_values))
    fields = {"values": values, "crow_indices": np.array(crow, "<i8").tobytes(), "col_indices": np.array(col, "<i8").tobytes()}
    return tensor(shape=shape, sparse_csr=pb.SparseCsr(**fields))


def chunk(**fields: Any) -> Callable[[pb.ForwardBackwardRequest], None]:
    return lambda message: message.data[1].model_input.append(pb.Chunk(**fields))


def spans(model_input: list[pb.ProvenanceSpan], loss_fn_inputs: list[pb.ProvenanceSpan]) -> Callable[[pb.ForwardBackwardRequest], None]:
    def change(message: pb.ForwardBackwardRequest) -> None:
        message.data[1].model_input_spans.extend(model_input)
        message.data[1].loss_fn_input_spans.extend(loss_fn_inputs)

    return change


def sampled(sequence_id: str, offset: int, length: int) -> pb.ProvenanceSpan:
    return pb.ProvenanceSpan(sampled_tokens=pb.SampledProvenanceSpan(sequence_id=sequence_id, offset=offset, length=length))


def field(name: str, value: Any) -> Callable[[pb.ForwardBackwardRequest], None]:
    return lambda message: setattr(message, name, value)


WEIGHTS = "datum 1, 'weights'"
MISTAKES: Mapping[str, tuple[Callable[[pb.ForwardBackwardRequest], None], str]] = {
    "no model": (field("model_id", ""), "model_id is empty"),
    "no seq_id": (field("seq_id", 0), "seq_id is 0"),
    "negative seq_id": (field("seq_id", -1), "seq_id is -1"),
    "torn buffer": (tensor(dense=bytes(7), shape=[2]), f"{WEIGHTS}: 7 bytes are no whole number of values of 4 bytes"),
    "torn tokens": (chunk(encoded_text=pb.EncodedTextChunk(tokens=bytes(5))), "datum 1, chunk 1, tokens: 5 bytes"),
    "too few": (tensor(dense=bytes(8), shape=[3]), f"{WEIGHTS}: 2 values do not fill the shape [3]"),
    "huge shape": (tensor(dense=bytes(8), shape=[2**62, 2**62]), f"{WEIGHTS}: 2 values do not fill"),
    "huge empty shape": (tensor(dense=b"", shape=[2**62, 0, 2**62]), f"{WEIGHTS}: TensorData: 0 values do not fill"),
    "negative shape": (tensor(dense=bytes(8), shape=[-1, -2]), f"{WEIGHTS}: the shape [-1, -2] holds a negative size"),
    "many dimensions": (tensor(dense=bytes(4), shape=[1] * 9), f"{WEIGHTS}: the shape has 9 dimensions"),
    "no dtype": (tensor(dense=bytes(8), shape=[2], dtype=0), f"{WEIGHTS}: dtype 0 is unknown; it must be one of 1 (float32), 2 (int64)"),
    "dtype of tomorrow": (tensor(dense=bytes(8), shape=[2], dtype=99), f"{WEIGHTS}: dtype 99 is unknown"),
    "no encoding": (tensor(shape=[0]), f"{WEIGHTS} holds no values"),
    "column outside": (csr([2, 3], [0, 1, 2], [0, 3]), f"{WEIGHTS}: TensorData: a column index lies outside 0..2"),
    "negative column": (csr([2, 3], [0, 1, 2], [0, -1]), f"{WEIGHTS}: TensorData: a column index lies outside 0..2"),
    "falling rows": (csr([2, 3], [0, 2, 1], [0, 1]), f"{WEIGHTS}: TensorData: sparse_crow_indices of 2 rows"),
    "rows beyond": (csr([2, 3], [0, 1, 2**40], [0, 1]), f"{WEIGHTS}: TensorData: sparse_crow_indices ends at {2**40}"),
    "values missing": (
        csr([2, 3], [0, 1, 2], [0, 1], num_values=1),
        f"{WEIGHTS}: TensorData: sparse_crow_indices ends at 2, but there are 1",
    ),
    "one-dimensional csr": (csr([4], [0, 1], [0]), f"{WEIGHTS}: TensorData: a sparse tensor needs shape [rows, cols], got [4]"),
    "shapeless csr": (csr([], [0, 1], [0]), f"{WEIGHTS}: TensorData: a sparse tensor needs shape"),
    "negative rows": (csr([-1, 3], [], []), f"{WEIGHTS}: the shape [-1, 3] holds a negative size"),
    "csr bomb": (csr([1, 2**60], [0, 1], [0]), f"{WEIGHTS}: with its shape [1, {2**60}] the sparse tensors of this request have more than"),
    "torn csr": (tensor(shape=[1, 1], sparse_csr=pb.SparseCsr(crow_indices=bytes(9))), f"{WEIGHTS}, crow_indices: 9 bytes"),
    "empty chunk": (chunk(), "datum 1, chunk 1 is neither encoded_text nor image nor dmel"),
    "image format": (chunk(image=pb.ImageChunk(format="gif")), "datum 1, chunk 1: the image format is 'gif'"),
    "image tokens": (chunk(image=pb.ImageChunk(format="png", expected_tokens=-1)), "datum 1, chunk 1: expected_tokens is -1"),
    "image size": (chunk(image=pb.ImageChunk(format="png", override_dimensions={"width": 1})), "override_dimensions is not served"),
    "empty span": (spans([pb.ProvenanceSpan()], []), "datum 1: model_input_spans[0] is neither of prompt_tokens nor of sampled_tokens"),
    "nameless span": (spans([sampled("", 0, 2)], [sampled("a", 0, 2)]), "datum 1: SampledProvenanceSpan.sequence_id is empty"),
    "negative span": (spans([sampled("a", -1, 2)], [sampled("a", 0, 2)]), "datum 1: SampledProvenanceSpan: offset -1"),
    "short spans": (spans([sampled("a", 0, 1)], [sampled("a", 0, 2)]), "datum 1: with_provenance: the model_input spans cover 1 positions"),
    "half the spans": (spans([sampled("a", 0, 2)], []), "datum 1: with_provenance: the loss_fn_inputs spans cover 0 positions"),
    "empty setting": (lambda message: message.loss_fn_config_v2["beta"].SetInParent(), "loss_fn_config['beta'] holds neither"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named_with_their_place(name: str) -> None:
    change, words = MISTAKES[name]
    message = request()
    decode_forward_backward(message.SerializeToString())
    change(message)
    with pytest.raises(InvalidRequestError) as caught:
        decode_forward_backward(message.SerializeToString())
    assert words in caught.value.message
    assert isinstance(caught.value, TooLargeError) == (name == "csr bomb")


def test_the_header_is_read_where_only_the_data_are_wrong() -> None:
    message = request()
    tensor(dense=bytes(7))(message)
    assert read_forward_backward_header(message.SerializeToString()).num_data == 2


def test_text_that_is_no_utf8_is_refused() -> None:
    body = request().SerializeToString().replace(b"cross_entropy", b"cross_\xff\xfetropy")
    with pytest.raises(InvalidRequestError, match="not a ForwardBackwardRequest"):
        decode_forward_backward(body)


def test_fields_of_tomorrow_are_ignored() -> None:
    body = request().SerializeToString()
    later = b"\xa2\x06\x03abc" + body + b"\xa8\x06\x05"  # number 100 as bytes, 101 as a number
    assert len(decode_forward_backward(later).data) == 2


def test_many_small_parts_are_refused_before_they_take_memory() -> None:
    body = request().SerializeToString() + b"\x1a\x00" * 300_000
    for read in (decode_forward_backward, read_forward_backward_header):
        with pytest.raises(TooLargeError, match="send fewer datums at a time"):
            read(body)


def _survives(body: bytes) -> None:
    for read in (decode_forward_backward, read_forward_backward_header):
        try:
            read(body)
        except InvalidRequestError:
            continue


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_random_bytes_raise_nothing_else(body: bytes) -> None:
    _survives(body)
    _survives(b"\x0a\x01m\x10\x01\x1a" + bytes([min(len(body), 127)]) + body[:127])  # as a datum


def _rich_body() -> bytes:
    padded = torch.zeros(9, 9)
    padded[4, 4] = 1
    chunks = [tinker.types.EncodedTextChunk(tokens=[1, 2]), tinker.types.ImageChunk(data=b"x", format="png", expected_tokens=1)]
    with_image = tinker.Datum(model_input=tinker.ModelInput(chunks=[*chunks, tinker.types.DmelChunk(dmel=b"\0\1\2")]), loss_fn_inputs={})
    span = tinker.types.SampledProvenanceSpan(sequence_id="a", offset=0, length=3)
    data = [
        sdk_datum(3, target_tokens=np.arange(3), weights=np.ones(3)).with_provenance(model_input=[span], loss_fn_inputs=[span]),
        sdk_datum(9, weights=padded, target_tokens=padded.long()),
        with_image,
    ]
    return sdk_body(data, "ppo", {"a": 1.0, "b": "text"})


RICH_BODY = _rich_body()


@given(st.lists(st.tuples(st.integers(0, len(RICH_BODY) - 1), st.integers(0, 255), st.integers(0, 2)), min_size=1, max_size=8))
@settings(max_examples=1000, deadline=None)
def test_mutated_requests_raise_nothing_else(mutations: list[tuple[int, int, int]]) -> None:
    body = bytearray(RICH_BODY)
    for position, value, kind in mutations:
        at = position % len(body) if body else 0
        body[at : at + (kind != 1)] = b"" if kind == 2 else bytes([value])  # replace, insert, delete
    _survives(bytes(body))
