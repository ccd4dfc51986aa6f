"""Keys, and what belongs to whom."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ptlab.errors import ConfigError

BASE = "scripted/unigram"


@pytest.fixture(scope="module")
def owned(tmp_path_factory: pytest.TempPathFactory, serving_of_module: Callable[..., Any]) -> Iterator[tuple[Any, str, str]]:
    """(a server, Ada's key, Bob's key)"""
    with serving_of_module(tmp_path_factory.mktemp("owned")) as server:
        ada, bob = (server.call(server.app.state.context.access.create_key(name)) for name in ("ada", "bob"))
        yield server, ada, bob


def test_without_a_key_nobody_gets_in(owned: Any) -> None:
    server, ada, _ = owned
    paths = [("POST", "client/config"), ("POST", "create_session"), ("POST", "retrieve_future"), ("GET", "sessions"), ("POST", "telemetry")]
    for method, path in [*paths, ("POST", "forward_backward"), ("GET", "training_runs/a/checkpoints/weights/b/archive"), ("GET", "audit")]:
        for key in (None, "tml-wrong", ada[:-1], "", ada + " x"):
            with server.client(key) as client:
                response = client.request(method, path, json={} if method == "POST" else None)
                assert response.status_code == 401, (path, key)
                assert "invalid_token" not in response.headers["www-authenticate"]  # the SDK would ask for a JWT
                assert ada not in response.text
    with server.client(None) as client:
        assert client.get("healthz").status_code == 200
        assert client.post("client/config", headers={"authorization": f"Bearer {ada}"}, json={}).status_code == 200
        assert client.post("client/config", headers={"authorization": f"Basic {ada}"}, json={}).status_code == 401


def test_nobody_sees_or_changes_what_belongs_to_another_key(owned: Any, raw_of: Callable[..., Any]) -> None:
    server, ada_key, bob_key = owned
    with server.client(ada_key) as ada_http, server.client(bob_key) as bob_http:
        ada, bob = raw_of(ada_http), raw_of(bob_http)
        session = ada.session()
        model = ada.model(session)
        sampler = ada.sampler(session)
        saved = ada.result(ada.post("save_weights_for_sampler", {"model_id": model, "seq_id": 1, "path": "mine"})["request_id"])["path"]
        state = ada.result(ada.post("save_weights", {"model_id": model, "seq_id": 2, "path": "mine"})["request_id"])["path"]
        request_id = ada.forward_backward(model, 3).json()["request_id"]
        checkpoint = f"training_runs/{model}/checkpoints/sampler_weights/mine"
        own = bob.session()

        for method, path, body in [
            ("POST", "optim_step", {"model_id": model, "seq_id": 4, "adam_params": {}}),
            ("POST", "get_info", {"model_id": model}),
            ("POST", "create_model", {"session_id": session, "model_seq_id": 5, "base_model": BASE, "lora_config": {"rank": 4}}),
            ("POST", "create_sampling_session", {"session_id": own, "sampling_session_seq_id": 0, "model_path": saved}),
            ("POST", "create_sampling_session", {"session_id": session, "sampling_session_seq_id": 9, "base_model": BASE}),
            ("POST", "asample", ada.sample_body(sampler, 0)),
            ("POST", "join_sampling_session", {"sampling_session_id": sampler}),
            ("GET", f"samplers/{sampler}", None),
            ("POST", "retrieve_future", {"request_id": request_id}),
            ("POST", "weights_info", {"tinker_path": saved}),
            ("POST", "copy_weights", {"source_path": saved}),
            ("GET", f"training_runs/{model}", None),
            ("GET", f"training_runs/{model}/checkpoints", None),
            ("GET", f"{checkpoint}/archive", None),
            ("GET", f"{checkpoint}/external_weights_urls", None),
            ("PUT", f"{checkpoint}/ttl", {"ttl_seconds": 3600}),
            ("POST", f"{checkpoint}/publish", None),
            ("DELETE", checkpoint, None),
            ("GET", f"sessions/{session}", None),
            ("GET", f"sessions/{session}/trace_export", None),
            ("POST", f"sessions/{session}/finish", {"reason": {"type": "success"}}),
        ]:
            response = bob_http.request(method, path, json=body)
            assert response.status_code == 404, (method, path, response.status_code, response.text)
        assert bob.forward_backward(model, 4).status_code == 404
        assert bob_http.post("session_heartbeat", json={"session_id": session}).status_code == 410
        loaded = bob.post("load_weights", {"session_id": own, "model_seq_id": 0, "path": state, "optimizer": True})
        assert "no checkpoint" in bob.result(loaded["request_id"])["error"]
        bob_http.post("cancel_future", json={"request_id": request_id})

        assert bob.get("training_runs")["training_runs"] == bob.get("checkpoints")["checkpoints"] == []
        assert bob.get("sessions")["sessions"] == [own]
        assert [s["session_id"] for s in bob.post("sessions/search", {"owner": {"type": "accessible"}})["sessions"]] == [own]
        assert ada.get(f"training_runs/{model}")["model_owner"] == "ada"
        assert ada.output(request_id).metrics["tokens:sum"] == 3


def test_what_is_published_can_be_used_but_not_changed(owned: Any, raw_of: Callable[..., Any]) -> None:
    server, ada_key, bob_key = owned
    with server.client(ada_key) as ada_http, server.client(bob_key) as bob_http:
        ada, bob = raw_of(ada_http), raw_of(bob_http)
        model, own = ada.model(), bob.session()
        saved = ada.result(ada.post("save_weights_for_sampler", {"model_id": model, "seq_id": 1, "path": "open"})["request_id"])["path"]
        checkpoint = f"training_runs/{model}/checkpoints/sampler_weights/open"
        assert ada_http.post(f"{checkpoint}/publish").status_code == 204
        bob.post("create_sampling_session", {"session_id": own, "sampling_session_seq_id": 0, "model_path": saved})
        assert bob.post("weights_info", {"tinker_path": saved})["base_model"] == BASE
        assert bob_http.get(f"{checkpoint}/archive", follow_redirects=False).status_code == 302
        for method, rest in (("DELETE", ""), ("DELETE", "/publish")):
            assert bob_http.request(method, checkpoint + rest).status_code == 404
        assert bob.get("checkpoints")["checkpoints"] == []
        # what is made from it belongs to whoever made it
        loaded = bob.result(
            bob.post("load_weights", {"session_id": own, "model_seq_id": 0, "path": saved, "optimizer": False})["request_id"]
        )
        assert bob.forward_backward(loaded["model_id"], 1).status_code == 200
        assert ada.forward_backward(loaded["model_id"], 2).status_code == 404


def test_a_revoked_key_is_out_within_a_second(owned: Any) -> None:
    server, _, _ = owned
    access = server.app.state.context.access
    key = server.call(access.create_key("eve"))
    with server.client(key) as client:
        assert client.get("sessions").status_code == 200
        server.call(access.revoke_key("eve"))
        assert client.get("sessions").status_code == 401


def test_an_open_address_needs_keys(serve: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no API key exists"), serve(tmp_path, require_keys=True):
        pass
    with serve(tmp_path) as server:
        key = server.call(server.app.state.context.access.create_key("ada"))
    with serve(tmp_path, require_keys=True) as server, server.client(key) as client:
        assert client.get("sessions").status_code == 200
