"""The protobuf bodies of the Tinker wire protocol (wire.proto) and ptlab's values, in both directions; and the JSON answers.

What a client sends is read without trust: whatever the bytes, a decoder returns a value or raises InvalidRequestError, and it allocates no
more than a small multiple of what was sent. Buffers of numbers become arrays in one step (numpy), never number by number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError
from pydantic import BaseModel

from ptlab.errors import EngineError, InvalidRequestError
from ptlab.server import wire_pb2 as pb
from ptlab.server.unpacking import CellBudget, check_parts, check_shape
from ptlab.types import (
    Datum,
    DmelChunk,
    EncodedTextChunk,
    ForwardBackwardOutput,
    ImageChunk,
    LossFnOutput,
    ModelInput,
    ModelInputChunk,
    PromptProvenanceSpan,
    SampledProvenanceSpan,
    SampledSequence,
    SampleResponse,
    TensorData,
    TensorDtype,
    TopkLogprobs,
)

Array: TypeAlias = npt.NDArray[Any]

_INT32: Final = np.dtype("<i4")
_INT64: Final = np.dtype("<i8")
_FLOAT32: Final = np.dtype("<f4")
_DTYPES: Final[Mapping[int, tuple[str, np.dtype[Any], TensorDtype]]] = {
    pb.DTYPE_FLOAT32: ("float32", _FLOAT32, "float32"),
    pb.DTYPE_INT64: ("int64", _INT64, "int64"),
    pb.DTYPE_INT32: ("int32", _INT32, "int64"),
    pb.DTYPE_BFLOAT16: ("bfloat16", np.dtype("<u2"), "float32"),
}
_STOP_REASONS: Final = {"stop": pb.STOP_REASON_STOP, "length": pb.STOP_REASON_LENGTH}


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBackwardHeader:
    """What is needed to queue a forward or forward_backward; its data are not looked at yet."""

    model_id: str
    seq_id: int
    """>= 1; 0 is the creation of the model."""
    forward_only: bool
    loss_fn: str
    num_data: int
    num_tokens: int
    """Of its text chunks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBackwardCall:
    """A forward or forward_backward as the backend takes it."""

    model_id: str
    seq_id: int
    data: list[Datum]
    loss_fn: str
    loss_fn_config: dict[str, float | str]
    forward_only: bool


# -- requests


def read_forward_backward_header(body: bytes) -> ForwardBackwardHeader:
    """The header of a ForwardBackwardRequest, so that what is wrong with its data can fail the future and not the POST.

    Raises: TooLargeError above MAX_PARTS; InvalidRequestError if it is no such message, or model_id or seq_id are missing.
    """
    message = _parse_forward_backward(body)
    return ForwardBackwardHeader(
        model_id=message.model_id,
        seq_id=message.seq_id,
        forward_only=message.forward_only,
        loss_fn=message.loss_fn,
        num_data=len(message.data),
        num_tokens=sum(len(chunk.encoded_text.tokens) for datum in message.data for chunk in datum.model_input) // _INT32.itemsize,
    )


def decode_forward_backward(body: bytes) -> ForwardBackwardCall:
    """A ForwardBackwardRequest, decompressed.

    Lengths are checked as far as the buffers themselves go; what a loss needs is the backend's to say.

    Raises: InvalidRequestError naming datum and field.
    """
    message = _parse_forward_backward(body)
    budget = CellBudget()
    return ForwardBackwardCall(
        model_id=message.model_id,
        seq_id=message.seq_id,
        data=[_decode_datum(datum, f"datum {index}", budget) for index, datum in enumerate(message.data)],
        loss_fn=message.loss_fn,
        loss_fn_config=_decode_config(message),
        forward_only=message.forward_only,
    )


def _parse_forward_backward(body: bytes) -> pb.ForwardBackwardRequest:
    check_parts(body, repeated=pb.ForwardBackwardRequest.DATA_FIELD_NUMBER)
    message = pb.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except DecodeError as err:
        raise InvalidRequestError(f"the body ({len(body)} bytes) is not a ForwardBackwardRequest in protobuf: {err}") from err
    if not message.model_id:
        raise InvalidRequestError("forward_backward: model_id is empty; it must name a model made by create_model or load_weights")
    if message.seq_id < 1:
        raise InvalidRequestError(f"forward_backward: seq_id is {message.seq_id}; the requests of a model count from 1 (0 creates it)")
    return message


def _decode_config(message: pb.ForwardBackwardRequest) -> dict[str, float | str]:
    if not message.loss_fn_config_v2:
        return dict(message.loss_fn_config)
    config: dict[str, float | str] = {}
    for name, setting in message.loss_fn_config_v2.items():
        match setting.WhichOneof("value"):
            case "number":
                config[name] = setting.number
            case "text":
                config[name] = setting.text
            case _:
                raise InvalidRequestError(f"loss_fn_config[{name!r}] holds neither a number nor a text")
    return config


def _decode_datum(message: pb.Datum, where: str, budget: CellBudget) -> Datum:
    datum = Datum(
        ModelInput(chunks=[_decode_chunk(chunk, f"{where}, chunk {index}") for index, chunk in enumerate(message.model_input)]),
        {name: _decode_tensor(tensor, f"{where}, {name!r}", budget) for name, tensor in message.loss_fn_inputs.items()},
    )
    if not message.model_input_spans and not message.loss_fn_input_spans:
        return datum
    try:
        return datum.with_provenance(
            [_decode_span(span, f"model_input_spans[{i}]") for i, span in enumerate(message.model_input_spans)],
            [_decode_span(span, f"loss_fn_input_spans[{i}]") for i, span in enumerate(message.loss_fn_input_spans)],
        )
    except InvalidRequestError as err:
        raise InvalidRequestError(f"{where}: {err.message}") from err


def _decode_span(message: pb.ProvenanceSpan, where: str) -> PromptProvenanceSpan | SampledProvenanceSpan:
    match message.WhichOneof("span"):
        case "prompt_tokens":
            prompt = message.prompt_tokens
            return PromptProvenanceSpan(sequence_id=prompt.sequence_id, offset=prompt.offset, length=prompt.length)
        case "sampled_tokens":
            sampled = message.sampled_tokens
            return SampledProvenanceSpan(sequence_id=sampled.sequence_id, offset=sampled.offset, length=sampled.length)
    raise InvalidRequestError(f"{where} is neither of prompt_tokens nor of sampled_tokens")


def _decode_chunk(message: pb.Chunk, where: str) -> ModelInputChunk:
    match message.WhichOneof("chunk"):
        case "encoded_text":
            return EncodedTextChunk(tokens=_numbers(message.encoded_text.tokens, _INT32, f"{where}, tokens").tolist())
        case "image":
            return _decode_image(message.image, where)
        case "dmel":
            return DmelChunk(dmel=message.dmel.dmel)
    raise InvalidRequestError(f"{where} is neither encoded_text nor image nor dmel")


def _decode_image(message: pb.ImageChunk, where: str) -> ImageChunk:
    if message.format not in ("png", "jpeg"):
        raise InvalidRequestError(f"{where}: the image format is {message.format!r}; it must be 'png' or 'jpeg'")
    if message.HasField("override_dimensions"):
        raise InvalidRequestError(f"{where}: override_dimensions is not served; send the image in the size it should be read in")
    expected_tokens = message.expected_tokens if message.HasField("expected_tokens") else None
    if expected_tokens is not None and expected_tokens < 0:
        raise InvalidRequestError(f"{where}: expected_tokens is {expected_tokens}; it must be at least 0")
    return ImageChunk(data=message.data, format="png" if message.format == "png" else "jpeg", expected_tokens=expected_tokens)


def _decode_tensor(message: pb.Tensor, where: str, budget: CellBudget) -> TensorData:
    """int32 and bfloat16 are widened to the two dtypes of the API. Without a shape the tensor has one dimension."""
    if message.dtype not in _DTYPES:
        known = ", ".join(f"{number} ({name})" for number, (name, _, _) in _DTYPES.items())
        raise InvalidRequestError(f"{where}: dtype {message.dtype} is unknown; it must be one of {known}")
    _, wire_dtype, dtype = _DTYPES[message.dtype]
    check_shape(message.shape, where)
    shape = list(message.shape)
    encoding = message.WhichOneof("encoding")
    if encoding == "sparse_csr":
        budget.take(shape, where)
        csr = message.sparse_csr
        values = _widened(_numbers(csr.values, wire_dtype, f"{where}, values"))
        crow = _numbers(csr.crow_indices, _INT64, f"{where}, crow_indices").tolist()
        col = _numbers(csr.col_indices, _INT64, f"{where}, col_indices").tolist()
    elif encoding == "dense":
        values, crow, col = _widened(_numbers(message.dense, wire_dtype, where)), None, None
        if shape and math.prod(shape) != values.size:
            raise InvalidRequestError(f"{where}: {values.size} values do not fill the shape {shape}, which holds {math.prod(shape)}")
    else:
        raise InvalidRequestError(f"{where} holds no values, neither dense nor sparse")
    try:
        return TensorData(values, dtype, shape or None, crow, col)
    except InvalidRequestError as err:
        raise InvalidRequestError(f"{where}: {err.message}") from err


def _numbers(buffer: bytes, dtype: np.dtype[Any], where: str) -> Array:
    """A read-only view, [number of values]."""
    if len(buffer) % dtype.itemsize:
        raise InvalidRequestError(f"{where}: {len(buffer)} bytes are no whole number of values of {dtype.itemsize} bytes each")
    return np.frombuffer(buffer, dtype)


def _widened(values: Array) -> Array:
    return (values.astype("<u4") << 16).view(_FLOAT32) if values.dtype == np.uint16 else values


# -- answers


def encode_forward_backward_output(output: ForwardBackwardOutput) -> bytes:
    """Datums follow one another in records; a new record begins where dtype or trailing shape of a field changes.

    Raises: EngineError for what the SDK could not read: datums with other fields than the first one's, or a metric that is not
    "name:reduction".
    """
    message = pb.ForwardBackwardOutput(loss_fn_output_type=output.loss_fn_output_type)
    for name, value in output.metrics.items():
        if name.count(":") != 1:
            raise EngineError(f"metric {name!r} cannot be sent: clients read 'name:reduction' only", operation="forward_backward")
        message.metrics[name] = float(value)
    record: pb.ArrayRecord | None = None
    members: list[dict[str, tuple[TensorDtype, Array]]] = []
    for index, datum in enumerate(output.loss_fn_outputs):
        arrays = _output_arrays(datum)
        if index and arrays.keys() != output.loss_fn_outputs[0].keys():
            raise EngineError(
                f"loss_fn_outputs[{index}] has the fields {sorted(arrays)}, the first datum has {sorted(output.loss_fn_outputs[0])}; "
                "clients need the same ones everywhere",
                operation="forward_backward",
            )
        if record is None or _layout(arrays) != _layout(members[0]):
            if record is not None:
                _fill_record(record, members)
            record, members = message.loss_fn_outputs.add(type_tag=output.loss_fn_output_type), []
        members.append(arrays)
    if record is not None:
        _fill_record(record, members)
    encoded: bytes = message.SerializeToString()
    return encoded


def _output_arrays(datum: LossFnOutput) -> dict[str, tuple[TensorDtype, Array]]:
    return {name: (tensor.dtype, np.atleast_1d(tensor.to_numpy())) for name, tensor in datum.items()}


def _layout(arrays: Mapping[str, tuple[TensorDtype, Array]]) -> dict[str, tuple[TensorDtype, tuple[int, ...]]]:
    return {name: (dtype, array.shape[1:]) for name, (dtype, array) in arrays.items()}


def _fill_record(record: pb.ArrayRecord, members: Sequence[Mapping[str, tuple[TensorDtype, Array]]]) -> None:
    record.num_datums = len(members)
    for name, (dtype, first) in members[0].items():
        arrays = [member[name][1] for member in members]
        field = record.fields[name]
        field.dtype, wire_dtype = _wire_dtype(dtype)
        field.trailing_shape.extend(first.shape[1:])
        field.data = b"".join(array.astype(wire_dtype, copy=False).tobytes() for array in arrays)
        sizes = [array.size * wire_dtype.itemsize for array in arrays]
        field.offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(_INT64).tobytes()


def _wire_dtype(dtype: TensorDtype) -> tuple[pb.DType, np.dtype[Any]]:
    return (pb.DTYPE_INT64, _INT64) if dtype == "int64" else (pb.DTYPE_FLOAT32, _FLOAT32)


def encode_sample_response(response: SampleResponse) -> bytes:
    """sequence_id and policy_version do not travel: the ids were given when the request was accepted, and the SDK knows no versions.

    Empty is absent on this wire: log-probabilities of a draw without tokens, or top-k with k = 0, arrive as None.
    """
    message = pb.SampleResponse(prompt_cache_hit_tokens=response.prompt_cache_hit_tokens)
    for sequence in response.sequences:
        _encode_sequence(message.sequences.add(), sequence)
    logprobs = response.prompt_logprobs_np
    if logprobs is None and response.prompt_logprobs is not None:
        logprobs = np.array([math.nan if logprob is None else logprob for logprob in response.prompt_logprobs])
    if logprobs is not None:
        message.prompt_logprobs = _float32(logprobs)
    topk = response.topk_prompt_logprobs_np or _topk_of_rows(response.topk_prompt_logprobs)
    if topk is not None:
        _encode_topk(message.topk_prompt_logprobs, topk)
    if response.target_prompt_logprobs is not None:
        _encode_tensor(message.target_prompt_logprobs, response.target_prompt_logprobs)
    if response.prompt_alt_tokens is not None:
        _encode_tensor(message.prompt_alt_tokens.tokens, response.prompt_alt_tokens.tokens)
        _encode_tensor(message.prompt_alt_tokens.logprobs, response.prompt_alt_tokens.logprobs)
    encoded: bytes = message.SerializeToString()
    return encoded


def _encode_sequence(message: pb.SampledSequence, sequence: SampledSequence) -> None:
    message.stop_reason = _STOP_REASONS[sequence.stop_reason]
    tokens = sequence.tokens if sequence.tokens_np is None else sequence.tokens_np
    message.tokens = np.asarray(tokens, _INT32).tobytes()
    logprobs = sequence.logprobs if sequence.logprobs_np is None else sequence.logprobs_np
    if logprobs is not None:
        if len(logprobs) != len(tokens):
            raise EngineError(f"a draw has {len(tokens)} tokens and {len(logprobs)} log-probabilities", operation="sample")
        message.logprobs = _float32(logprobs)
    topk = sequence.topk_logprobs_np or _topk_of_rows(sequence.topk_logprobs)
    if topk is not None:
        _encode_topk(message.topk_sampled_logprobs, topk)


def _float32(values: Array | Sequence[float]) -> bytes:
    return np.asarray(values, _FLOAT32).tobytes()


def _topk_of_rows(rows: Sequence[Sequence[tuple[int, float]] | None] | None) -> TopkLogprobs | None:
    return None if rows is None else TopkLogprobs.from_lists(rows, max((len(row) for row in rows if row), default=0))


def _encode_topk(message: pb.TopkLogprobs, topk: TopkLogprobs) -> None:
    if topk.token_ids.ndim != 2 or topk.token_ids.shape != topk.logprobs.shape:
        raise EngineError(f"top-k token ids {topk.token_ids.shape} and logprobs {topk.logprobs.shape} differ", operation="sample")
    message.length, message.k = topk.token_ids.shape
    message.token_ids = np.asarray(topk.token_ids, _INT32).tobytes()
    message.logprobs = _float32(topk.logprobs)


def _encode_tensor(message: pb.Tensor, tensor: TensorData) -> None:
    message.dtype, wire_dtype = _wire_dtype(tensor.dtype)
    if tensor.sparse_crow_indices is None or tensor.sparse_col_indices is None:
        values = tensor.to_numpy()
        message.shape.extend(values.shape)
        message.dense = values.astype(wire_dtype, copy=False).tobytes()
        return
    message.shape.extend(tensor.shape or ())
    message.sparse_csr.values = np.asarray(tensor.data, wire_dtype).tobytes()
    message.sparse_csr.crow_indices = np.asarray(tensor.sparse_crow_indices, _INT64).tobytes()
    message.sparse_csr.col_indices = np.asarray(tensor.sparse_col_indices, _INT64).tobytes()


# -- JSON answers


def encode_json(value: BaseModel | Mapping[str, Any]) -> bytes:
    """JSON that every SDK reads: times in ISO 8601, and numbers that JSON does not have as "NaN", "Infinity" and "-Infinity".

    (The SDK's parser refuses a bare NaN; as text it becomes the number again, since the fields of the SDK's models are floats.)
    """
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return json.dumps(_finite(plain), allow_nan=False, separators=(",", ":")).encode()


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
