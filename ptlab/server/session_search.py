"""Which sessions a search means: the rules of the SDK's SessionSearchRequest, over the sessions of one owner."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from ptlab.backend.store import SessionRow
from ptlab.server.bodies import SearchSessionsBody
from ptlab.types import PATH_SCHEME, Checkpoint

NO_PROJECT = "default"
"""What a session without a project is said to belong to: the SDK needs a name."""


def search(sessions: Sequence[SessionRow], query: SearchSessionsBody) -> tuple[list[SessionRow], bool]:
    """(one page, newest first; whether more follow)."""
    found = [session for session in sessions if _matches(session, query)]
    found.sort(key=_position, reverse=True)
    if query.cursor is not None:
        last = (query.cursor.last_created_at.timestamp(), query.cursor.last_session_id)
        found = [session for session in found if _position(session) < last]
    return found[: query.limit], len(found) > query.limit


def summary(session: SessionRow, checkpoints: Sequence[Checkpoint]) -> dict[str, Any]:
    """A session as SessionSummary has it. `checkpoints`: of all sessions."""
    own = [c for c in checkpoints if c.tinker_path.startswith(f"{PATH_SCHEME}{session.session_id}:train:")]
    return {
        "session_id": session.session_id,
        "created_at": _created(session).isoformat(),
        "owner": session.owner,
        "project_id": session.project_id or NO_PROJECT,
        "status": status(session),
        "checkpoints_count": len(own),
        "display_name": session.display_name,
        "user_metadata": session.user_metadata,
        "checkpoint_storage_bytes": sum(c.size_bytes or 0 for c in own),
    }


def next_cursor(page: Sequence[SessionRow]) -> dict[str, str]:
    return {"last_created_at": _created(page[-1]).isoformat(), "last_session_id": page[-1].session_id}


def status(session: SessionRow) -> dict[str, Any]:
    """As the client told it at the end; active until then."""
    if session.finished is None:
        return {"type": "active"}
    reason, _, detail = session.finished.partition(": ")
    return {"type": "client_finished", "reason": {"type": reason}, "detail": detail or None}


def _created(session: SessionRow) -> datetime:
    return datetime.fromtimestamp(round(session.created, 6), UTC)


def _position(session: SessionRow) -> tuple[float, str]:
    return (_created(session).timestamp(), session.session_id)


def _matches(session: SessionRow, query: SearchSessionsBody) -> bool:
    metadata = session.user_metadata or {}
    return (
        _named(session, query)
        and (query.project_ids is None or (session.project_id or NO_PROJECT) in query.project_ids)
        and all(metadata.get(key) == value for key, value in query.user_metadata.items())
        and (query.owner.type != "user" or any(urn.rpartition(":")[2] == session.owner for urn in query.owner.owner_urns))
        and (query.statuses is None or any(_has_status(session, wanted.type, wanted.reasons) for wanted in query.statuses))
    )


def _named(session: SessionRow, query: SearchSessionsBody) -> bool:
    """By id or by display name: either is enough where both are given."""
    if query.session_id is None and query.display_name is None:
        return True
    name = (session.display_name or "").lower()
    by_name = query.display_name is not None and all(word in name for word in query.display_name.lower().split())
    return session.session_id == query.session_id or by_name


def _has_status(session: SessionRow, kind: str, reasons: Sequence[str] | None) -> bool:
    has = status(session)
    return bool(has["type"] == kind and (reasons is None or kind != "client_finished" or has["reason"]["type"] in reasons))
