"""The rules of sessions/search."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from ptlab.backend.store import SessionRow
from ptlab.server.bodies import SearchSessionsBody, decode_body
from ptlab.server.session_search import next_cursor, search, summary
from ptlab.types import Checkpoint


def row(name: str, created: float, **more: Any) -> SessionRow:
    facts: dict[str, Any] = {"owner": "ada", "user_metadata": None, "display_name": None, "project_id": None, "finished": None}
    return SessionRow(session_id=name, ordinal=1, tags=[], created=created, last_seen=created, **(facts | more))


ROWS = [
    row("s1", 1.0, display_name="Pig Latin run", user_metadata={"lr": "1", "k": "v"}),
    row("s2", 2.0, display_name="latin", user_metadata={"lr": "1"}, finished="success"),
    row("s3", 3.0, project_id="p", finished="errored: out of luck: twice"),
    row("s4", 3.0),
]


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ({}, ["s4", "s3", "s2", "s1"]),
        ({"session_id": "s2"}, ["s2"]),
        ({"display_name": "LATIN pig"}, ["s1"]),
        ({"display_name": "latin"}, ["s2", "s1"]),
        ({"display_name": "pig", "session_id": "s3"}, ["s3", "s1"]),
        ({"user_metadata": {"lr": "1"}}, ["s2", "s1"]),
        ({"user_metadata": {"lr": "1", "k": "v"}}, ["s1"]),
        ({"project_ids": ["p"]}, ["s3"]),
        ({"project_ids": ["default"]}, ["s4", "s2", "s1"]),
        ({"statuses": [{"type": "active"}]}, ["s4", "s1"]),
        ({"statuses": [{"type": "client_finished"}]}, ["s3", "s2"]),
        ({"statuses": [{"type": "client_finished", "reasons": ["errored"]}, {"type": "cancelled"}]}, ["s3"]),
        ({"owner": {"type": "accessible"}}, ["s4", "s3", "s2", "s1"]),
        ({"owner": {"type": "user", "owner_urns": ["eve"]}}, []),
        ({"owner": {"type": "user", "owner_urns": ["urn:ptlab:user:ada"]}, "limit": 1}, ["s4"]),
    ],
)
def test_what_a_query_finds(query: Any, found: list[str]) -> None:
    assert [session.session_id for session in search(ROWS, decode_body(SearchSessionsBody, json.dumps(query).encode()))[0]] == found


def test_pages_join_without_gap_or_repetition() -> None:
    found: list[str] = []
    query: dict[str, Any] = {"limit": 1}
    more = True
    while more:
        page, more = search(ROWS, decode_body(SearchSessionsBody, json.dumps(query).encode()))
        found += [session.session_id for session in page]
        query["cursor"] = next_cursor(page)
    assert found == ["s4", "s3", "s2", "s1"]  # two were created in the same moment


def test_a_summary_counts_the_sessions_own_checkpoints() -> None:
    def checkpoint(path: str, size: int) -> Checkpoint:
        return Checkpoint(checkpoint_id="weights/a", checkpoint_type="training", time=datetime.now(UTC), tinker_path=path, size_bytes=size)

    checkpoints = [checkpoint("tinker://s3:train:0/weights/a", 5), checkpoint("tinker://s3:train:1/weights/a", 7)]
    told = summary(ROWS[2], [*checkpoints, checkpoint("tinker://s33:train:0/weights/a", 100)])
    assert (told["checkpoints_count"], told["checkpoint_storage_bytes"], told["project_id"]) == (2, 12, "p")
    assert told["status"] == {"type": "client_finished", "reason": {"type": "errored"}, "detail": "out of luck: twice"}
    assert told["created_at"] == "1970-01-01T00:00:03+00:00"
