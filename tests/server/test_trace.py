"""One line per request, and no secrets in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_every_request_is_a_line(serve: Callable[..., Any], raw_of: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    with serve(tmp_path / "data", trace=file) as server, server.client("tml-secret") as http:
        http.headers["x-sdk-method"] = "Some.method"
        raw = raw_of(http)
        session = raw.session(display_name="private")
        raw.post("optim_step", {"model_id": "nobody", "seq_id": 1}, 404)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["method"], line["path"], line["status"]) for line in lines] == [
        ("POST", "/api/v1/create_session", 200),
        ("POST", "/api/v1/optim_step", 404),
    ]
    assert lines[0]["sdk_method"] == "Some.method" and lines[0]["request_bytes"] > 20 and lines[0]["response_bytes"] > len(session)
    assert "secret" not in file.read_text() and "private" not in file.read_text()
