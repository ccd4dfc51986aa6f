"""Handshake, sessions, and what only the hosted service has."""

from __future__ import annotations

from typing import Any

import pytest

BASE = "scripted/unigram"


def test_the_handshake_says_how_to_speak_here(raw: Any) -> None:
    config = raw.post("client/config", {"sdk_version": "0.38.0"})
    assert config["parallel_fwdbwd_chunks"] is False  # chunks would come out of order
    assert config["sample_join_sampling_session"] is True
    assert config["proto_write_fwdbwd"] is config["fwd_via_fwdbwd"] is config["create_model_via_load_weights"] is True
    assert "pjwt_auth_enabled" not in config
    assert raw.post("client/dynamic_config", {"sdk_version": "0.38.0"})["sample_cancel_enabled"] is True
    assert raw.get("healthz") == {"status": "ok"}
    assert raw.post("telemetry", {"events": [{"event": "X"}], "session_id": "s"}) == {"status": "accepted"}
    assert raw.http.post("telemetry", content=b"anything").json() == {"status": "accepted"}


def test_a_session_from_beginning_to_end(raw: Any) -> None:
    session = raw.session(user_metadata={"a": "b", "n": 3}, display_name="me", project_id="p", tags=["t"])
    model = raw.model(session)
    raw.sampler(session, 1)
    assert raw.get(f"sessions/{session}?access_scope=owned") == {
        "training_run_ids": [model],
        "sampler_ids": [f"{session}:sample:1"],
        "user_metadata": {"a": "b", "n": "3"},
        "display_name": "me",
    }
    assert raw.post("session_heartbeat", {"session_id": session}) == {"type": "session_heartbeat"}
    assert raw.get("sessions?limit=1")["sessions"] == [session]
    for reason in ("errored", "success"):
        finish = raw.http.post(f"sessions/{session}/finish", json={"reason": {"type": reason}, "detail": "why"})
        assert (finish.status_code, finish.content) == (204, b"")
    raw.post("session_heartbeat", {"session_id": session}, 410)
    found = raw.post("sessions/search", {"session_id": session})["sessions"]
    assert [s["status"] for s in found] == [{"type": "client_finished", "reason": {"type": "errored"}, "detail": "why"}]  # the first wins
    # models outlive their session: their checkpoints may still be asked for
    assert raw.forward_backward(model, 1).status_code == 200


def test_sessions_that_are_not_there(raw: Any) -> None:
    assert raw.post("session_heartbeat", {"session_id": "nobody"}, 410)["category"] == "user"
    raw.get("sessions/nobody", 404)
    raw.post("sessions/nobody/finish", {"reason": {"type": "success"}}, 404)
    raw.post(f"sessions/{raw.session()}/finish", {"reason": {"type": "bored"}}, 400)
    raw.get("sessions/nobody/trace_export", 404)


def test_a_trace_is_a_file_behind_a_signed_address(raw: Any) -> None:
    session = raw.session()
    model = raw.model(session)
    raw.output(raw.forward_backward(model, 1).json()["request_id"])
    raw.result(raw.forward_backward(model, 2, loss_fn="nope").json()["request_id"])
    exported = raw.get(f"sessions/{session}/trace_export")
    assert exported["status"] == "ready"
    trace = raw.http.get(exported["url"], headers={"X-API-Key": ""}).json()
    events = [(e["name"], e["ph"], e["args"]["failed"]) for e in trace["traceEvents"] if e["ph"] in "be"]
    assert events == [
        (name, phase, failed)
        for name, failed in [("create_model", False), ("forward_backward", False), ("forward_backward", True)]
        for phase in "be"
    ]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "billing/usage/events"),
        ("GET", "billing/usage/checkpoints/current"),
        ("GET", "audit"),
        ("POST", "auth/token"),
        ("GET", "auth/apikey/me"),
        ("DELETE", "auth/apikey/me"),
        ("PUT", "sessions/any/project"),
        ("GET", "training_runs?project_id=p"),
    ],
)
def test_what_only_the_hosted_service_has_is_refused_with_a_sentence(raw: Any, method: str, path: str) -> None:
    response = raw.http.request(method, path)
    assert response.status_code == 400
    assert len(response.json()["error"]) > 20 and response.json()["category"] == "user"


def test_paths_and_methods_that_do_not_exist(raw: Any) -> None:
    assert "/api/v1/nothing" in raw.get("nothing", 404)["error"]
    assert raw.http.get("optim_step").status_code == 405
    assert raw.http.get("checkpoints/").status_code == 404  # no redirect


@pytest.mark.parametrize("query", ["limit=-1", "limit=x", "offset=-1", "limit=1e9", "access_scope=all", "offset=99999999999999999999"])
def test_wrong_queries_are_400_with_the_name_of_the_field(raw: Any, query: str) -> None:
    for path in ("sessions", "training_runs"):
        refused = raw.get(f"{path}?{query}", 400)
        assert query.partition("=")[0] in refused["error"]
