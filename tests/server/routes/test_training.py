"""Training requests as no SDK would send them: out of order, twice, with gaps, damaged."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import zstandard

BASE = "scripted/unigram"
SUM_EXP = sum(math.exp(v / 10) for v in range(8))
LOSS = -sum(v / 10 - math.log(SUM_EXP) for v in (2, 3, 4))
"""Of the default datum (targets 2, 3, 4) on an untrained model."""


def metrics(raw: Any, response: httpx.Response) -> Any:
    assert response.status_code == 200, response.text
    return raw.output(response.json()["request_id"]).metrics


def test_a_request_is_answered_at_once_and_names_its_model(raw: Any) -> None:
    session = raw.session()
    body = {"session_id": session, "model_seq_id": 0, "base_model": BASE, "lora_config": {"rank": 4}, "optimizer_config": {"type": "adamw"}}
    accepted = raw.post("create_model", body)
    assert accepted["model_id"] == f"{session}:train:0"
    assert raw.result(accepted["request_id"]) == {"model_id": f"{session}:train:0", "type": "create_model"}
    info = raw.post("get_info", {"model_id": f"{session}:train:0"})
    assert info["type"] == "get_info"
    assert info["model_data"] == {"arch": "unigram", "model_name": BASE, "tokenizer_id": BASE}


def test_chunks_that_come_out_of_order_run_in_order(raw: Any) -> None:
    model = raw.model()
    # forward(3) sees the step (2) on the gradient of 1, which is sent last
    third = raw.forward_backward(model, 3, forward_only=True)
    second = raw.optim_step(model, 2, learning_rate=1.0)
    first = raw.forward_backward(model, 1)
    # meters and the journal tell them apart by their kind
    assert [r.json()["request_id"] for r in (first, third)] == [f"{model}:forward_backward:1", f"{model}:forward:3"]
    assert metrics(raw, first)["loss:sum"] == pytest.approx(LOSS, rel=1e-6)
    assert raw.result(second)["metrics"].get("skipped:sum", 0) == 0
    assert metrics(raw, third)["loss:sum"] < LOSS - 0.5


def test_the_same_post_twice_is_one_request(raw: Any) -> None:
    model = raw.model()
    first, again = raw.forward_backward(model, 1), raw.forward_backward(model, 1)
    assert first.json() == again.json()
    raw.optim_step(model, 2, learning_rate=0.5)
    once = metrics(raw, raw.forward_backward(model, 3, forward_only=True))["loss:sum"]
    assert raw.optim_step(model, 2, learning_rate=0.5) == f"{model}:optim_step:2"
    assert metrics(raw, raw.forward_backward(model, 4, forward_only=True))["loss:sum"] == once
    # and after it was answered and fetched
    assert metrics(raw, raw.forward_backward(model, 1))["loss:sum"] == pytest.approx(LOSS, rel=1e-6)


def test_another_body_under_a_used_number_is_refused(raw: Any) -> None:
    model = raw.model()
    metrics(raw, raw.forward_backward(model, 1))
    for response in (
        raw.forward_backward(model, 1, weights=(2.0, 1.0, 1.0)),
        raw.http.post("optim_step", json={"model_id": model, "seq_id": 1, "adam_params": {"learning_rate": 0.1}}),
    ):
        assert response.status_code == 400
        assert "was used before" in response.json()["error"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss_fn": "nope"}, "unknown loss"),
        ({"targets": (2, 3, 99)}, "99"),
        ({"targets": (2, 3)}, "3"),
        ({"loss_fn": "importance_sampling", "logprobs": (-1.0, -1.0, -1.0), "advantages": (1.0, math.nan, 0.0)}, "advantages"),
        ({"tokens": (), "targets": (), "weights": ()}, "datum 0"),
        ({"num_datums": 0}, "at least one datum"),
    ],
)
def test_what_is_wrong_with_a_batch_is_told_by_its_future_and_uses_its_number(raw: Any, change: Any, words: str) -> None:
    model = raw.model()
    failed = raw.result(raw.forward_backward(model, 1, **change).json()["request_id"])
    assert failed["category"] == "user"
    assert words in failed["error"]
    assert raw.result(raw.optim_step(model, 2))["metrics"]["skipped:sum"] == 1
    assert metrics(raw, raw.forward_backward(model, 3))["loss:sum"] == pytest.approx(LOSS, rel=1e-6)


@pytest.mark.parametrize(
    "body",
    [
        {"adam_params": {"learning_rate": "much"}},
        {"adam_params": {"learning_rate": -1.0}},
        {"optimizer_params": {"type": "dimuon"}},
        {},
    ],
)
def test_a_wrong_optimizer_body_uses_its_number_too(raw: Any, body: Any) -> None:
    model = raw.model()
    failed = raw.result(raw.post("optim_step", {"model_id": model, "seq_id": 1, **body})["request_id"])
    assert failed["category"] == "user", failed
    assert metrics(raw, raw.forward_backward(model, 2))["loss:sum"] == pytest.approx(LOSS, rel=1e-6)


def test_a_body_without_an_address_is_refused_at_once(raw: Any) -> None:
    model = raw.model()
    for body in (b"", b"{", b"[]", b'{"model_id": 3, "seq_id": 1}', b'{"seq_id": 1}', b'{"model_id": "%s", "seq_id": 0}' % model.encode()):
        response = raw.http.post("optim_step", content=body)
        assert (response.status_code, response.json()["category"]) == (400, "user"), response.text
    for content in (b"", b"\xff\xff\xff", b"\x00", bytes(range(256))):
        response = raw.http.post("forward_backward", content=content)
        assert (response.status_code, response.json()["category"]) == (400, "user"), response.text
    assert metrics(raw, raw.forward_backward(model, 1))["loss:sum"] == pytest.approx(LOSS, rel=1e-6)


def test_models_and_sessions_that_are_not_there(raw: Any) -> None:
    assert raw.forward_backward("nobody:train:0", 1).status_code == 404
    raw.post("optim_step", {"model_id": "nobody:train:0", "seq_id": 1}, 404)
    raw.post("get_info", {"model_id": "nobody:train:0"}, 404)
    raw.post("create_model", {"session_id": "nobody", "model_seq_id": 0, "base_model": BASE, "lora_config": {"rank": 4}}, 404)
    raw.post("load_weights", {"session_id": "nobody", "model_seq_id": 0, "path": "tinker://a/weights/b", "optimizer": True}, 404)


@pytest.mark.parametrize("name", ["../up", "a/b", "..", ".hidden", "", "a\x00b", "x" * 201, "/etc/passwd", "a\\b\n"])
def test_names_cannot_leave_the_data_directory(raw: Any, name: str) -> None:
    model = raw.model()
    for seq_id, path in enumerate(("save_weights", "save_weights_for_sampler", "save_weights_external"), start=1):
        failed = raw.result(raw.post(path, {"model_id": model, "seq_id": seq_id, "path": name, "overwrite": True})["request_id"])
        assert failed["category"] == "user", failed
    for number, path in enumerate((f"tinker://{model}/weights/{name}", f"tinker://../../{name}", f"tinker://{name}/weights/x"), start=4):
        failed = raw.result(raw.post("load_weights", {"model_id": model, "seq_id": number, "path": path, "optimizer": False})["request_id"])
        assert failed["category"] == "user", failed


def test_both_forms_of_load_weights(raw: Any) -> None:
    session = raw.session()
    model = raw.model(session)
    raw.forward_backward(model, 1)
    raw.optim_step(model, 2, learning_rate=0.5)
    path = raw.result(raw.post("save_weights", {"model_id": model, "seq_id": 3, "path": "s", "overwrite": False})["request_id"])["path"]
    trained = metrics(raw, raw.forward_backward(model, 4, forward_only=True))["loss:sum"]
    body = {"session_id": session, "model_seq_id": 7, "path": path, "optimizer": True}
    new = raw.result(raw.post("load_weights", body)["request_id"])
    assert new == {"path": path, "model_id": f"{session}:train:7", "type": "load_weights"}
    assert metrics(raw, raw.forward_backward(new["model_id"], 1, forward_only=True))["loss:sum"] == trained
    old = raw.model(session, 8)
    raw.post("load_weights", {"model_id": old, "seq_id": 1, "path": path, "optimizer": False})
    assert metrics(raw, raw.forward_backward(old, 2, forward_only=True))["loss:sum"] == trained
    raw.post("load_weights", {"path": path, "optimizer": True}, 400)
    for number, refused in enumerate(({"weights_access_token": "t"}, {"optimizer_config": {"type": "dimuon"}}), start=9):
        failed = raw.result(raw.post("load_weights", {**body, "model_seq_id": number, **refused})["request_id"])
        assert failed["category"] == "user"


def test_what_cannot_be_served_is_said(raw: Any) -> None:
    model = raw.model()
    for seq_id, (path, more, words) in enumerate(
        [
            ("save_weights_for_sampler", {"sampling_session_seq_id": 1, "kind": "inflight"}, "inflight"),
            ("save_weights_external", {"path": "e", "age_encryption_recipients": ["age1"]}, "encrypt"),
            ("save_weights", {"path": "s", "ttl_seconds": 5}, "ttl_seconds"),
            ("save_weights_for_sampler", {"path": "a", "sampling_session_seq_id": 1}, "not both"),
        ],
        start=1,
    ):
        failed = raw.result(raw.post(path, {"model_id": model, "seq_id": seq_id, **more})["request_id"])
        assert failed["category"] == "user" and words in failed["error"]


def test_an_ephemeral_sampler_belongs_to_the_session_of_its_model(raw: Any) -> None:
    session = raw.session()
    model = raw.model(session)
    saved = raw.result(raw.post("save_weights_for_sampler", {"model_id": model, "seq_id": 1, "sampling_session_seq_id": 4})["request_id"])
    assert saved == {"path": None, "sampling_session_id": f"{session}:sample:4", "type": "save_weights_for_sampler"}
    assert raw.get(f"samplers/{session}:sample:4") == {"sampler_id": f"{session}:sample:4", "base_model": BASE, "model_path": None}


def test_a_compressed_body_and_what_is_no_such_thing(raw: Any, make_pass: Callable[..., bytes]) -> None:
    model = raw.model()
    body = make_pass(model, 1)
    headers = {"content-type": "application/x-protobuf", "content-encoding": "zstd"}
    sent = raw.http.post("forward_backward", content=zstandard.compress(body), headers=headers)
    assert metrics(raw, sent)["loss:sum"] == pytest.approx(LOSS, rel=1e-6)
    # the same request, sent again without compression, is the same request
    assert raw.http.post("forward_backward", content=body).json() == sent.json()
    assert raw.http.post("forward_backward", content=b"no zstd", headers=headers).status_code == 400
    assert raw.http.post("forward_backward", content=body, headers={"content-encoding": "br"}).status_code == 400


def test_limits_of_a_call(serve: Callable[..., Any], raw_of: Callable[..., Any], make_pass: Callable[..., bytes], tmp_path: Path) -> None:
    with serve(tmp_path, max_datums=2, max_tokens_per_call=7, max_body_bytes=20_000, max_decompressed_bytes=40_000) as server:
        raw = raw_of(server.client())
        model = raw.model()
        refused = raw.result(raw.forward_backward(model, 1, num_datums=3).json()["request_id"])
        assert "3 datums" in refused["error"] and refused["category"] == "user"
        four = {"tokens": (1,) * 4, "targets": (1,) * 4, "weights": (1.0,) * 4}
        assert "8 tokens" in raw.result(raw.forward_backward(model, 2, num_datums=2, **four).json()["request_id"])["error"]
        assert metrics(raw, raw.forward_backward(model, 3, num_datums=2))["tokens:sum"] == 6
        bomb = zstandard.compress(b"\0" * 10_000_000)
        assert len(bomb) < 20_000
        answer = raw.http.post("forward_backward", content=bomb, headers={"content-encoding": "zstd"})
        assert (answer.status_code, answer.json()["category"]) == (413, "user")
        raw.http.close()


def test_too_many_waiting_requests_are_answered_429_but_not_the_one_waited_for(
    serve: Callable[..., Any], raw_of: Callable[..., Any], tmp_path: Path
) -> None:
    with serve(tmp_path, max_pending_per_key=3) as server:
        raw = raw_of(server.client())
        model = raw.model()
        waiting = [raw.forward_backward(model, seq_id).json()["request_id"] for seq_id in (2, 3, 4)]
        full = raw.forward_backward(model, 5)
        assert full.status_code == 429
        assert float(full.headers["retry-after"]) > 0
        assert raw.http.post("asample", json=raw.sample_body(raw.sampler(model.partition(":")[0]), 0)).status_code == 429
        first = raw.forward_backward(model, 1)  # the others wait for this one
        assert first.status_code == 200
        for request_id in (first.json()["request_id"], *waiting):
            assert raw.output(request_id).metrics["loss:sum"] == pytest.approx(LOSS, rel=1e-6)
        assert raw.forward_backward(model, 5).status_code == 200
        raw.http.close()


def test_a_number_that_never_comes_is_given_up(serve: Callable[..., Any], raw_of: Callable[..., Any], tmp_path: Path) -> None:
    with serve(tmp_path, gap_timeout_s=0.2, maintenance_every_s=0.1) as server:
        raw = raw_of(server.client())
        model = raw.model()
        began = time.monotonic()
        assert metrics(raw, raw.forward_backward(model, 2))["loss:sum"] == pytest.approx(LOSS, rel=1e-6)
        assert time.monotonic() - began > 0.2
        raw.http.close()


@pytest.mark.parametrize("seq_id", [2**63 - 1, 10**7])
def test_a_number_far_ahead_is_refused_before_anything_waits_for_it(raw: Any, seq_id: int) -> None:
    model = raw.model()
    refused = raw.http.post("optim_step", json={"model_id": model, "seq_id": seq_id, "adam_params": {}})
    assert refused.status_code == 400 and "ahead" in refused.json()["error"]
    assert metrics(raw, raw.forward_backward(model, 1))["loss:sum"] == pytest.approx(LOSS, rel=1e-6)
