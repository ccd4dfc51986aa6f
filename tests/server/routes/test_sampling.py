"""Sampling sessions and samples, by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ptlab.server import wire_pb2

BASE = "scripted/unigram"


def drawn(raw: Any, request_id: str) -> wire_pb2.SampleResponse:
    response = raw.poll(request_id)
    assert response.headers["content-type"] == "application/x-protobuf", response.text
    return wire_pb2.SampleResponse.FromString(response.content)


def test_a_sample_names_its_sequences_at_once(raw: Any) -> None:
    sampler = raw.sampler(raw.session())
    accepted = raw.post("asample", raw.sample_body(sampler, 5))
    assert accepted["sample_sequence_ids"] == [f"{sampler}:5:0", f"{sampler}:5:1"]
    response = drawn(raw, accepted["request_id"])
    assert [len(sequence.tokens) for sequence in response.sequences] == [16, 16]  # 4 int32 each
    assert not response.HasField("prompt_logprobs")


def test_the_same_post_twice_is_one_sample_and_another_body_is_none(raw: Any) -> None:
    sampler = raw.sampler(raw.session())
    unseeded = {"sampling_params": {"max_tokens": 16, "temperature": 1.0}}
    first = raw.post("asample", raw.sample_body(sampler, 0, **unseeded))
    assert raw.post("asample", raw.sample_body(sampler, 0, **unseeded)) == first
    once = drawn(raw, first["request_id"])
    raw.post("asample", raw.sample_body(sampler, 0, **unseeded))
    assert drawn(raw, first["request_id"]) == once
    other = raw.post("asample", raw.sample_body(sampler, 0, num_samples=3), 400)
    assert "used before" in other["error"]


def test_prompt_logprobs_are_there_when_asked_for(raw: Any) -> None:
    sampler = raw.sampler(raw.session())
    response = drawn(raw, raw.post("asample", raw.sample_body(sampler, 0, prompt_logprobs=True))["request_id"])
    assert len(response.prompt_logprobs) == 4 * 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"num_samples": 100_000}, "num_samples"),
        ({"prompt": {"chunks": [{"type": "encoded_text", "tokens": ["a"]}]}}, "tokens"),
        ({"prompt": "hello"}, "prompt"),
        ({"sampling_params": {"max_tokens": 10**9}}, "max_tokens"),
        ({"sampling_params": {"stop": [1, "a"]}}, "stop"),
        ({"seq_id": -1}, "seq_id"),
        ({"seq_id": 2**70}, "seq_id"),
        ({"seq_id": True}, "seq_id"),
    ],
)
def test_a_wrong_body_is_refused_at_once(raw: Any, change: Any, words: str) -> None:
    refused = raw.post("asample", raw.sample_body(raw.sampler(raw.session()), 0) | change, 400)
    assert words in refused["error"] and refused["category"] == "user"


def test_what_the_engine_refuses_is_told_by_the_future(raw: Any) -> None:
    sampler = raw.sampler(raw.session())
    body = raw.sample_body(sampler, 0, target_prompt_logprobs={"data": [1.5], "dtype": "int64", "shape": [1, 1]})
    failed = raw.result(raw.post("asample", body)["request_id"])
    assert (failed["category"], "target_prompt_logprobs" in failed["error"]) == ("user", True)


def test_sessions_and_weights_that_are_not_there(raw: Any) -> None:
    raw.post("asample", raw.sample_body("nobody:sample:0", 0), 404)
    raw.get("samplers/nobody:sample:0", 404)
    raw.post("join_sampling_session", {"sampling_session_id": "nobody:sample:0"}, 404)
    session = raw.session()
    create = {"session_id": session, "sampling_session_seq_id": 0}
    raw.post("create_sampling_session", {**create, "session_id": "nobody", "base_model": BASE}, 404)
    raw.post("create_sampling_session", create, 400)
    assert "not served" in raw.post("create_sampling_session", {**create, "base_model": "no/such"}, 400)["error"]
    raw.post("create_sampling_session", {**create, "model_path": f"tinker://{session}:train:0/sampler_weights/gone"}, 404)
    raw.post("create_sampling_session", {**create, "model_path": "tinker://../../etc/sampler_weights/passwd"}, 400)


def test_create_is_repeatable_and_its_number_is_used(raw: Any) -> None:
    session = raw.session()
    assert raw.sampler(session, 3) == raw.sampler(session, 3) == f"{session}:sample:3"
    raw.model(session)
    again = {"session_id": session, "sampling_session_seq_id": 3, "model_path": f"tinker://{session}:train:0/sampler_weights/w"}
    raw.result(raw.post("save_weights_for_sampler", {"model_id": f"{session}:train:0", "seq_id": 1, "path": "w"})["request_id"])
    assert "exists already" in raw.post("create_sampling_session", again, 400)["error"]


def test_copies_of_a_client_get_numbers_of_their_own(raw: Any) -> None:
    sampler = raw.sampler(raw.session())
    joins = [raw.post("join_sampling_session", {"sampling_session_id": sampler})["client_counter"] for _ in range(3)]
    assert joins == [1, 2, 3]


def test_the_servers_seed_makes_unseeded_samples_repeatable(serve: Callable[..., Any], raw_of: Callable[..., Any], tmp_path: Path) -> None:
    def tokens(name: str, seed: int | None) -> list[bytes]:
        with serve(tmp_path / name, seed=seed) as server, server.client() as client:
            raw = raw_of(client)
            sampler = raw.sampler(raw.session())
            unseeded = {"sampling_params": {"max_tokens": 32, "temperature": 1.0}}
            ids = [raw.post("asample", raw.sample_body(sampler, i, **unseeded))["request_id"] for i in range(2)]
            return [sequence.tokens for request_id in ids for sequence in drawn(raw, request_id).sequences]

    first = tokens("a", 5)
    assert len(set(first)) == 4  # every draw is another one
    assert tokens("b", 5) == first
    assert tokens("c", 6) != first
    assert tokens("d", None) != tokens("e", None)
