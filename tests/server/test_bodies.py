"""The JSON bodies: those that the official SDK sends are read, and what cannot be is named."""

from __future__ import annotations

import json
import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
import tinker
from hypothesis import given, settings
from hypothesis import strategies as st
from tinker._compat import model_dump
from tinker.types.copy_weights_request import CopyWeightsRequest
from tinker.types.create_custom_loss_request import CreateCustomLossRequest
from tinker.types.create_model_request import CreateModelRequest
from tinker.types.create_sampling_session_request import CreateSamplingSessionRequest
from tinker.types.create_session_request import CreateSessionRequest
from tinker.types.future_retrieve_request import FutureRetrieveRequest
from tinker.types.futures_retrieve_request import FuturesRetrieveRequest, SamplingSessionFuturesTarget
from tinker.types.get_info_request import GetInfoRequest
from tinker.types.join_sampling_session_request import JoinSamplingSessionRequest
from tinker.types.load_weights_request import LoadWeightsRequest
from tinker.types.optim_step_request import OptimStepRequest
from tinker.types.sample_request import SampleRequest
from tinker.types.save_weights_external_request import SaveWeightsExternalRequest
from tinker.types.save_weights_for_sampler_request import SaveWeightsForSamplerRequest
from tinker.types.save_weights_request import SaveWeightsRequest
from tinker.types.session_heartbeat_request import SessionHeartbeatRequest
from tinker.types.session_search_request import SessionSearchRequest

from ptlab.errors import InvalidRequestError
from ptlab.server import bodies
from ptlab.server.bodies import (
    AssignProjectBody,
    Body,
    CancelFutureBody,
    ClientConfigBody,
    CopyWeightsBody,
    CreateCustomLossBody,
    CreateModelBody,
    CreateSamplingSessionBody,
    CreateSessionBody,
    FinishSessionBody,
    GetInfoBody,
    HeartbeatBody,
    JoinSamplingSessionBody,
    LoadWeightsBody,
    OptimStepBody,
    RetrieveFutureBody,
    RetrieveFuturesBody,
    SampleBody,
    SaveWeightsBody,
    SaveWeightsExternalBody,
    SaveWeightsForSamplerBody,
    SearchSessionsBody,
    TelemetryBody,
    TtlBody,
    WeightsInfoBody,
    decode_body,
)
from ptlab.types import AdamParams, LoraConfig

ALL: list[type[Body]] = [kind for kind in vars(bodies).values() if isinstance(kind, type) and issubclass(kind, Body)]
SAMPLE: dict[str, Any] = {"sampling_session_id": "s", "seq_id": 0, "prompt": {"chunks": []}}
OPTIM: dict[str, Any] = {"model_id": "m", "seq_id": 1}


def decode(kind: type[Any], value: Any) -> Any:
    return decode_body(kind, json.dumps(value).encode())


def from_sdk(kind: type[Any], request: Any) -> Any:
    """As the SDK puts a request on the wire."""
    return decode(kind, model_dump(request, exclude_unset=False, exclude_none=True, mode="json"))


def refused(kind: type[Any], value: Any, *words: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        decode(kind, value)
    for word in words:
        assert word in caught.value.message


# -- what the SDK sends


@pytest.mark.parametrize(
    ("kind", "request_"),
    [
        (
            CreateSessionBody,
            CreateSessionRequest(tags=["a"], user_metadata={"n": 1}, sdk_version="0.38.0", project_id="p", display_name="d"),
        ),
        (HeartbeatBody, SessionHeartbeatRequest(session_id="s")),
        (GetInfoBody, GetInfoRequest(model_id="m")),
        (SaveWeightsBody, SaveWeightsRequest(model_id="m", path="x", seq_id=3, ttl_seconds=3600, overwrite=True, user_metadata={"a": "b"})),
        (
            SaveWeightsForSamplerBody,
            SaveWeightsForSamplerRequest(model_id="m", path="x", seq_id=3, ttl_seconds=3600, user_metadata={"a": "b"}),
        ),
        (SaveWeightsForSamplerBody, SaveWeightsForSamplerRequest(model_id="m", sampling_session_seq_id=0, seq_id=3, kind="inflight")),
        (SaveWeightsExternalBody, SaveWeightsExternalRequest(model_id="m", path="x", seq_id=3, age_encryption_recipients=["age1"])),
        (LoadWeightsBody, LoadWeightsRequest(session_id="s", model_seq_id=0, path="tinker://a/weights/b", optimizer=True, base_model="m")),
        (LoadWeightsBody, LoadWeightsRequest(model_id="m", seq_id=1, path="tinker://a/weights/b", optimizer=False)),
        (CreateSamplingSessionBody, CreateSamplingSessionRequest(session_id="s", sampling_session_seq_id=0, base_model="m")),
        (JoinSamplingSessionBody, JoinSamplingSessionRequest(sampling_session_id="s")),
        (RetrieveFutureBody, FutureRetrieveRequest(request_id="r", allow_metadata_only=True)),
        (CopyWeightsBody, CopyWeightsRequest(session_id="s", model_seq_id=1, source_path="tinker://a/weights/b", ttl_seconds=3600)),
        (
            RetrieveFuturesBody,
            FuturesRetrieveRequest(
                target=SamplingSessionFuturesTarget(sampling_session_id="s", cloned_sampler_id=2),
                prev_cursor=3,
                timeout=0.5,
                retrieved_request_ids=["r"],
            ),
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, object) and not isinstance(value, type) else value.__name__,
)
def test_every_field_arrives(kind: type[Body], request_: Any) -> None:
    got = from_sdk(kind, request_).model_dump()
    sent = model_dump(request_, exclude_none=True, mode="json")
    for name in got.keys() & sent.keys():
        assert got[name] == sent[name], name
    assert sent.keys() - got.keys() <= {"type"}


def test_create_model() -> None:
    lora = tinker.types.LoraConfig(rank=8, seed=2**64 - 1, train_unembed=False)
    body = from_sdk(
        CreateModelBody, CreateModelRequest(session_id="s", model_seq_id=0, base_model="m", lora_config=lora, user_metadata={"n": 1})
    )
    assert body.lora() == LoraConfig(rank=8, seed=2**64 - 1, train_unembed=False)
    assert body.user_metadata == {"n": 1} and body.text_metadata == {"n": "1"}
    dimuon = CreateModelRequest(
        session_id="s", model_seq_id=0, base_model="m", lora_config=lora, optimizer_config=tinker.types.DimuonOptimizerConfig()
    )
    with pytest.raises(InvalidRequestError, match=r"optimizer_config.type is 'dimuon'; ptlab trains with 'adamw' only"):
        from_sdk(CreateModelBody, dimuon).lora()
    with pytest.raises(InvalidRequestError, match="lora_config is missing"):
        from_sdk(CreateModelBody, CreateModelRequest(session_id="s", model_seq_id=0, base_model="m")).lora()


def test_optim_step() -> None:
    adam = tinker.AdamParams(learning_rate=3e-4, eps=1e-8, grad_clip_norm=1)
    body = from_sdk(OptimStepBody, OptimStepRequest(model_id="m", seq_id=4, optim_params=adam))
    assert body.adam() == AdamParams(learning_rate=3e-4, eps=1e-8, grad_clip_norm=1.0)
    assert decode(OptimStepBody, {**OPTIM, "adam_params": {}}).adam() == AdamParams()
    assert decode(OptimStepBody, {**OPTIM, "adam_params": {"learning_rate": 1, "new": True}}).adam().learning_rate == 1
    dimuon = tinker.types.DimuonParams(learning_rate=0.1)
    body = from_sdk(OptimStepBody, OptimStepRequest(model_id="m", seq_id=4, optim_params=dimuon))
    with pytest.raises(InvalidRequestError, match="optimizer_params of type 'dimuon' are not served"):
        body.adam()
    with pytest.raises(InvalidRequestError, match="adam_params is missing"):
        decode(OptimStepBody, OPTIM).adam()


def test_sample() -> None:
    chunks = [
        tinker.types.EncodedTextChunk(tokens=[1, 2, 3]),
        tinker.types.ImageChunk(data=b"\x89P\x00", format="png", expected_tokens=2),
        tinker.types.ImageAssetPointerChunk(format="jpeg", location="https://x/y.jpg"),
        tinker.types.DmelChunk(dmel=b"\x00\x01\x05"),
    ]
    targets = tinker.TensorData(data=[5], dtype="int64", shape=[10, 2], sparse_crow_indices=[0] * 10 + [1], sparse_col_indices=[1])
    body = from_sdk(
        SampleBody,
        SampleRequest(
            sampling_session_id="s",
            seq_id=3_000_000_000,
            num_samples=2,
            prompt=tinker.ModelInput(chunks=chunks),
            sampling_params=tinker.SamplingParams(max_tokens=4, seed=-(2**63), temperature=0, top_k=5, top_p=0.5, stop=("a", "b")),
            prompt_logprobs=True,
            topk_prompt_logprobs=2,
            topk_sample_logprobs=3,
            target_prompt_logprobs={
                name: getattr(targets, name) for name in ("data", "dtype", "shape", "sparse_crow_indices", "sparse_col_indices")
            },
            prompt_alt_tokens_k=4,
            prompt_logprobs_last_n=1,
            record_stability_info=True,
        ),
    )
    assert [chunk.model_dump() for chunk in body.model_input().chunks] == [chunk.model_dump() for chunk in chunks]
    params = body.params()
    assert (params.max_tokens, params.seed, params.stop) == (4, -(2**63), ["a", "b"])
    assert (params.temperature, params.top_k, params.top_p) == (0, 5, 0.5)
    assert (body.seq_id, body.num_samples, body.topk_prompt_logprobs, body.topk_sample_logprobs) == (3_000_000_000, 2, 2, 3)
    assert (body.prompt_alt_tokens_k, body.prompt_logprobs_last_n) == (4, 1)
    assert body.prompt_logprobs is True and body.record_stability_info is True
    np.testing.assert_array_equal(body.targets().to_numpy(-1), targets.to_numpy(-1))
    assert decode(SampleBody, SAMPLE).targets() is None
    assert decode(SampleBody, SAMPLE).params().model_dump() == tinker.SamplingParams().model_dump()


def test_create_custom_loss() -> None:
    node = {"op": "output", "name": "output", "target": "output", "args": [{"tuple": [{"ref": "neg"}]}], "kwargs": {}}
    request = CreateCustomLossRequest(
        session_id="s", custom_loss_seq_id=0, name="nll", inputs=[{"name": "logprobs", "rank": 1}], graph={"format": 1, "nodes": [node]}
    )
    body = from_sdk(CreateCustomLossBody, request)
    assert body.input_dicts() == [{"name": "logprobs", "rank": 1}] and body.graph == {"format": 1, "nodes": [node]}


def test_search_sessions() -> None:
    request = SessionSearchRequest(
        user_metadata={"a": "b"},
        owner={"type": "user", "owner_urns": ["x"]},
        statuses=[{"type": "client_finished", "reasons": ["errored"]}],
        cursor={"last_created_at": "2026-01-02T03:04:05.000006Z", "last_session_id": "s"},
    )
    body = from_sdk(SearchSessionsBody, request)
    assert body.owner.owner_urns == ["x"] and body.statuses[0].reasons == ["errored"]
    assert body.cursor.last_created_at == request.cursor.last_created_at
    assert decode(SearchSessionsBody, {}).limit == 50


def test_bodies_without_a_request_class() -> None:
    assert decode(ClientConfigBody, {"sdk_version": "0.38.0"}).sdk_version == "0.38.0"
    assert decode(FinishSessionBody, {"reason": {"type": "success"}, "detail": None}).reason.type == "success"
    assert decode(TelemetryBody, {"events": [{"event": "X", "deep": [1]}], "platform": "Linux"}).events[0]["event"] == "X"
    assert decode(TtlBody, {"ttl_seconds": None}).ttl_seconds is None
    assert decode(WeightsInfoBody, {"tinker_path": "tinker://a/weights/b"}).tinker_path == "tinker://a/weights/b"
    assert decode(CancelFutureBody, {"request_id": "r"}).request_id == "r"
    assert decode(AssignProjectBody, {"project_id": "p"}).project_id == "p"


# -- the meanings of stop


@pytest.mark.parametrize("stop", [None, [], "x", "", ["a", "b"], [1, 2]])
def test_stop_keeps_its_kind(stop: Any) -> None:
    got = decode(SampleBody, {**SAMPLE, "sampling_params": {"stop": stop}}).params().stop
    assert got == stop and type(got) is type(stop)
    if stop is None:
        assert decode(SampleBody, {**SAMPLE, "sampling_params": {}}).params().stop is None


@pytest.mark.parametrize("stop", [1, ["a", 1], [True], [1.5], [None], [["a"]], {"a": 1}, False])
def test_stop_of_no_kind_is_refused(stop: Any) -> None:
    refused(SampleBody, {**SAMPLE, "sampling_params": {"stop": stop}}, "sampling_params.stop", "stop must be a text, a list of texts or")


# -- what cannot be


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        (SampleBody, {**SAMPLE, "seq_id": -1}, ["sample: seq_id", "found -1"]),
        (SampleBody, {**SAMPLE, "seq_id": "3"}, ["seq_id", "found '3'"]),
        (SampleBody, {**SAMPLE, "seq_id": 2**63}, ["seq_id"]),
        (SampleBody, {**SAMPLE, "num_samples": 0}, ["num_samples"]),
        (SampleBody, {**SAMPLE, "num_samples": 10**9}, ["num_samples"]),
        (SampleBody, {**SAMPLE, "num_samples": True}, ["num_samples"]),
        (SampleBody, {**SAMPLE, "sampling_params": {"seed": 2**64}}, ["sampling_params.seed"]),
        (SampleBody, {**SAMPLE, "sampling_params": {"max_tokens": 2.5}}, ["sampling_params.max_tokens"]),
        (SampleBody, {**SAMPLE, "sampling_params": {"temperature": "1"}}, ["sampling_params.temperature"]),
        (SampleBody, {**SAMPLE, "prompt": {"chunks": [{"type": "video"}]}}, ["prompt.chunks.0", "'video'"]),
        (SampleBody, {**SAMPLE, "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, "x"]}]}}, ["tokens.1"]),
        (SampleBody, {**SAMPLE, "prompt": {"chunks": [{"type": "image", "format": "png", "data": "!"}]}}, ["prompt.chunks.0.image.data"]),
        (SampleBody, {"seq_id": 0, "prompt": {"chunks": []}, "base_model": "m"}, ["sampling_session_id: Field required"]),
        (OptimStepBody, {"model_id": "m", "seq_id": 0}, ["optim_step: seq_id"]),
        (OptimStepBody, {"model_id": "", "seq_id": 1}, ["model_id"]),
        (OptimStepBody, {**OPTIM, "adam_params": {"learning_rate": None}}, ["adam_params.learning_rate"]),
        (CreateModelBody, {"session_id": "s", "model_seq_id": 0, "base_model": "m", "lora_config": {"rank": 2**64}}, ["lora_config.rank"]),
        (CreateModelBody, {"session_id": "s", "model_seq_id": 0, "base_model": "m" * 2000}, ["base_model"]),
        (CreateSessionBody, {"user_metadata": {"a": "x" * 70_000}}, ["user_metadata takes 70009 bytes"]),
        (SaveWeightsBody, {**OPTIM, "path": "x", "user_metadata": {"a": 1}}, ["the value of 'a' must be a text"]),
        (SaveWeightsBody, OPTIM, ["save_weights: ", "Field required"]),
        (SaveWeightsForSamplerBody, OPTIM, ["give either path"]),
        (SaveWeightsForSamplerBody, {**OPTIM, "path": "x", "sampling_session_seq_id": 1}, ["give either path"]),
        (LoadWeightsBody, {"path": "p", "optimizer": True}, ["give either session_id and model_seq_id"]),
        (LoadWeightsBody, {"path": "p", "optimizer": True, "model_id": "m"}, ["give either"]),
        (LoadWeightsBody, {"path": "p", "optimizer": True, **OPTIM, "session_id": "s", "model_seq_id": 0}, ["give either"]),
        (LoadWeightsBody, {"path": "p", "optimizer": True, **OPTIM, "session_id": "s"}, ["give either"]),
        (CreateSamplingSessionBody, {"session_id": "s", "sampling_session_seq_id": 0}, ["give base_model or model_path"]),
        (TtlBody, {}, ["ttl_seconds: Field required"]),
        (RetrieveFuturesBody, {"target": {"type": "other", "sampling_session_id": "s"}}, ["target.type"]),
        (CreateSessionBody, [], ["create_session"]),
    ],
)
def test_mistakes_are_named(kind: type[Body], value: Any, words: list[str]) -> None:
    refused(kind, value, *words)


def test_the_two_forms_of_load_weights() -> None:
    new = decode(LoadWeightsBody, {"path": "p", "optimizer": True, "session_id": "s", "model_seq_id": 0})
    assert new.new_model == ("s", 0) and new.existing_model is None
    old = decode(LoadWeightsBody, {"path": "p", "optimizer": True, "model_id": "m", "seq_id": 1, "optimizer_config": {"type": "dimuon"}})
    assert old.new_model is None and old.existing_model == ("m", 1)
    new.check_optimizer()
    with pytest.raises(InvalidRequestError, match="'dimuon'"):
        old.check_optimizer()


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        ({"data": [1, 2], "dtype": "int64", "shape": [3]}, "do not fill the shape"),
        ({"data": [], "dtype": "int64", "shape": [-1]}, "negative size"),
        ({"data": [1.5], "dtype": "int64"}, "needs whole numbers; found 1.5"),
        ({"data": [1], "dtype": "int64", "shape": [1, 2**60], "sparse_crow_indices": [0, 1], "sparse_col_indices": [0]}, "more than"),
        ({"data": [1], "dtype": "int64", "shape": [1, 2], "sparse_crow_indices": [0, 1]}, "come together"),
        ({"data": [1], "dtype": "int64", "shape": [1, 2], "sparse_crow_indices": [0, 1], "sparse_col_indices": [2]}, "outside 0..1"),
        ({"data": [1], "dtype": "int64", "shape": [-1, 2], "sparse_crow_indices": [], "sparse_col_indices": [0]}, "negative size"),
    ],
)
def test_targets_that_cannot_be_are_refused_when_they_are_made(tensor: dict[str, Any], words: str) -> None:
    body = decode(SampleBody, {**SAMPLE, "target_prompt_logprobs": tensor})
    with pytest.raises(InvalidRequestError, match=words) as caught:
        body.targets()
    assert caught.value.message.startswith("target_prompt_logprobs: ")


def test_targets_of_any_float_do_not_warn() -> None:
    body = decode(SampleBody, {**SAMPLE, "target_prompt_logprobs": {"data": [1e300, 2], "dtype": "float32"}})
    assert body.targets().tolist() == [float("inf"), 2.0]


def test_unknown_fields_are_ignored_at_every_depth() -> None:
    value = {
        **SAMPLE,
        "new": 1,
        "sampling_params": {"new": 1},
        "prompt": {"new": 1, "chunks": [{"type": "encoded_text", "tokens": [1], "new": 1}]},
    }
    assert decode(SampleBody, value).model_input().to_ints() == [1]


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"\xff", b"[" * 100_000, b'{"sampling_session_id": "\\ud800"}', b'{"seq_id": ' + b"9" * 5000 + b"}"]
)
def test_what_is_no_json_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="Invalid JSON"):
        decode_body(SampleBody, raw)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_json_is_read_or_refused(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(ALL))
    value = data.draw(st.fixed_dictionaries({}, optional={name: JSON for name in kind.model_fields}) | JSON)
    try:
        decode(kind, value)
    except InvalidRequestError:
        return


@given(st.binary(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    for kind in (SampleBody, CreateSessionBody):
        try:
            decode_body(kind, raw)
        except InvalidRequestError:
            continue


def test_a_long_prompt_takes_milliseconds() -> None:
    raw = json.dumps({**SAMPLE, "prompt": {"chunks": [{"type": "encoded_text", "tokens": list(range(100_000, 132_768))}]}}).encode()
    start = time.perf_counter()
    assert len(decode_body(SampleBody, raw).model_input().to_ints()) == 32_768
    assert time.perf_counter() - start < 0.5  # about 0.005 where nothing else runs


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (SampleBody, {**SAMPLE, "prompt": {"chunks": [{"type": "encoded_text", "tokens": ["x"] * 300_000}]}}),
        (SampleBody, {**SAMPLE, "prompt": {"chunks": [1] * 300_000}}),
        (SampleBody, {**SAMPLE, "target_prompt_logprobs": {"data": ["x"] * 300_000, "dtype": "int64"}}),
        (SampleBody, {**SAMPLE, "sampling_params": {"stop": ["x", 1] * 150_000}}),
        (CreateSessionBody, {"tags": [1] * 300_000}),
        (SaveWeightsBody, {**OPTIM, "path": "x", "user_metadata": {str(i): i for i in range(50_000)}}),
    ],
    ids=["tokens", "chunks", "targets", "stop", "tags", "user_metadata"],
)
def test_many_mistakes_take_no_more_memory_than_one(kind: type[Body], value: Any) -> None:
    raw = json.dumps(value).encode()
    tracemalloc.start()
    with pytest.raises(InvalidRequestError) as caught:
        decode_body(kind, raw)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 2**20 and len(caught.value.message) < 1000
