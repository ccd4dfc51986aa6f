"""From one server to the next on the same directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ptlab.engines.protocols import Engines
from ptlab.errors import ConfigError, InvalidRequestError

BASE = "scripted/unigram"


def loss(raw: Any, model: str, seq_id: int) -> float:
    return float(raw.output(raw.forward_backward(model, seq_id, forward_only=True).json()["request_id"]).metrics["loss:sum"])


def test_the_next_server_goes_on_with_everything(serve: Callable[..., Any], raw_of: Callable[..., Any], tmp_path: Path) -> None:
    with serve(tmp_path) as server, server.client() as http:
        raw = raw_of(http)
        session = raw.session(display_name="kept")
        model = raw.model(session)
        raw.forward_backward(model, 1)
        step = raw.optim_step(model, 2, learning_rate=0.5)
        raw.forward_backward(model, 3)  # a gradient that is not applied yet
        saved = raw.result(
            raw.post("save_weights_for_sampler", {"model_id": model, "seq_id": 4, "sampling_session_seq_id": 0})["request_id"]
        )
        trained, stepped = loss(raw, model, 5), raw.result(step)
        waiting = raw.forward_backward(model, 7).json()["request_id"]  # waits for 6
        scored = raw.sample_body(saved["sampling_session_id"], 0, prompt_logprobs=True)
        scores = raw.poll(raw.post("asample", scored)["request_id"]).content
    with serve(tmp_path) as server, server.client() as http:
        raw = raw_of(http)
        assert raw.get(f"sessions/{session}")["display_name"] == "kept"
        assert raw.result(step) == stepped  # answers outlive the process
        assert loss(raw, model, 6) == trained
        assert raw.output(waiting).metrics["loss:sum"] == pytest.approx(trained, rel=1e-6)
        again = raw.optim_step(model, 2, learning_rate=0.5)  # the same request: not a second step
        assert raw.result(again) == stepped
        assert loss(raw, model, 8) == trained
        assert raw.poll(raw.post("asample", {**scored, "seq_id": 1})["request_id"]).content == scores
        assert raw.result(raw.optim_step(model, 9))["metrics"].get("skipped:sum", 0) == 0  # on the gradients of 3 and 7
        assert raw.model(session, 1) == f"{session}:train:1"


def test_two_servers_cannot_share_a_directory(serve: Callable[..., Any], tmp_path: Path) -> None:
    with serve(tmp_path), pytest.raises(ConfigError), serve(tmp_path):
        pass


def test_a_base_model_that_cannot_be_opened_ends_the_start(serve: Callable[..., Any], tmp_path: Path) -> None:
    def broken(name: str) -> Engines:
        raise InvalidRequestError(f"no weights for {name}")

    with pytest.raises(InvalidRequestError, match="no weights for"), serve(tmp_path, broken):
        pass
    with serve(tmp_path) as server, server.client() as http:  # and leaves nothing locked
        assert http.get("healthz").status_code == 200


def test_openai_and_metrics_stand_beside_the_tinker_protocol(server: Any) -> None:
    with server.client() as http:
        models = http.get(f"{server.url}/v1/models").json()["data"]
        assert BASE in [model["id"] for model in models]
        assert "ptlab" in http.get(f"{server.url}/metrics").text
        assert http.get("status").status_code == 200
