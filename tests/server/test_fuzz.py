"""A short run of scripts/fuzz_server.py, and that it sees what it looks for: every check has a fault planted for it."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest

from ptlab.backend.access import Access
from ptlab.backend.requests import Requests
from ptlab.server import session_search
from scripts import fuzz_server
from scripts.fuzz_server import Report, fuzz, routes_of, tenants_of
from scripts.fuzzing.names import shapes_are_complete
from scripts.fuzzing.serving import BASE, ErrorLog, serving

# the server runs in this process: what it logs as an error is looked at here, and must not fail the test by itself
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("PTLAB_FUZZ"),
        reason="how much a random search finds in so many seconds depends on the machine's load: PTLAB_FUZZ=1, or scripts/fuzz_server.py",
    ),
]


def run(data_dir: Path, seconds: float, seed: int) -> Report:
    errors = ErrorLog()
    logging.getLogger().addHandler(errors)
    try:
        with serving(data_dir) as (app, url, keys):
            report = fuzz(url, tenants_of(keys, BASE), routes_of(app), seconds, seed, workers=2)
    finally:
        logging.getLogger().removeHandler(errors)
    for line in errors.lines:
        report.fault(line[-60:], f"the server logged: {line}")
    return report


def test_a_server_stands_fifteen_seconds_of_it(tmp_path: Path) -> None:
    report = run(tmp_path, 15.0, seed=0)
    assert not report.faults, report.table()
    statuses = sum(report.answers.values(), start=type(next(iter(report.answers.values())))())
    assert statuses["200"] > 50 and statuses["400"] > 50 and statuses["404"] > 20 and statuses["401"] > 2, report.table()


def test_it_sees_a_server_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any) -> Any:
        raise KeyError("planted")

    monkeypatch.setattr(session_search, "search", broken)
    faults = "\n".join(run(tmp_path, 4.0, seed=1).faults)
    assert "sessions/search: status 500" in faults
    assert "the server logged" in faults and "planted" in faults


def test_it_sees_what_another_tenant_may_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def anybody(*given: Any, **named: Any) -> None:
        return None

    monkeypatch.setattr(Access, "check_path", anybody)
    monkeypatch.setattr(fuzz_server, "CASES_PER_SET", 10)
    faults = "\n".join(run(tmp_path, 5.0, seed=2).faults)
    assert "tells canary-" in faults  # names of checkpoints
    assert "checkpoints/sampler_weights/hinted" in faults  # what was tried on purpose
    assert "changed" in faults or "at the end" in faults  # and what it did to the vault


def test_it_sees_a_request_whose_result_never_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Requests.wait

    async def forgetful(self: Requests, request_id: str, owner: str, timeout_s: float) -> Any:
        return None if ":create_custom_loss:" in request_id else await real(self, request_id, owner, timeout_s)

    monkeypatch.setattr(Requests, "wait", forgetful)
    monkeypatch.setattr(fuzz_server, "HUNG_S", 1.0)
    monkeypatch.setitem(fuzz_server.LIMITS, "long_poll_s", 0.05)
    assert "never had a result" in "\n".join(run(tmp_path, 6.0, seed=3).faults)


def test_it_sees_a_key_that_is_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Access.owner_of_key

    async def careless(self: Access, key: str) -> str | None:
        return await real(self, key) or "alice"

    monkeypatch.setattr(Access, "owner_of_key", careless)
    assert "let in with the key" in "\n".join(run(tmp_path, 4.0, seed=4).faults)


def test_a_new_route_must_be_described() -> None:
    with pytest.raises(ValueError, match="/api/v1/new_thing"):
        shapes_are_complete([("POST", "/api/v1/new_thing"), ("GET", "/api/v1/other")])
