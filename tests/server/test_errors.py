"""The table from errors to HTTP."""

from __future__ import annotations

import json

import pytest
from pydantic import BaseModel, ValidationError

from ptlab import errors as tree
from ptlab.backend.database import StoreError
from ptlab.server.errors import HostedOnlyError, UnauthorizedError, invalid_body, refusal, status_of
from ptlab.server.unpacking import TooLargeError


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (tree.InvalidRequestError("x"), 400),
        (tree.ConfigError("x"), 400),
        (tree.CheckpointError("x"), 400),
        (tree.OrderError("x"), 400),  # never 409: the SDK repeats it for minutes
        (HostedOnlyError("x"), 400),
        (UnauthorizedError("x"), 401),
        (tree.NotFoundError("x"), 404),
        (tree.GoneError("x"), 410),
        (TooLargeError("x"), 413),
        (tree.BusyError("x"), 429),
        (tree.EngineError("x"), 500),
        (tree.WeightSyncError("x"), 500),
        (StoreError("x"), 500),
        (tree.EngineLostError("x"), 503),
    ],
)
def test_every_error_has_its_status(error: tree.PtlabError, status: int) -> None:
    assert status_of(error)[0] == status
    assert ("retry-after" in status_of(error)[1]) == (status in (429, 503))
    assert (status >= 500) == (error.category == "server" and status != 429)


def test_the_body_of_a_refusal_is_what_the_callers_library_reads() -> None:
    assert json.loads(bytes(refusal("/api/v1/x", 400, "why", "user").body)) == {"error": "why", "category": "user"}
    openai = json.loads(bytes(refusal("/v1/chat/completions", 400, "why", "user").body))["error"]
    assert openai["message"] == "why" and openai["type"] == "invalid_request_error"


def test_a_wrong_body_is_told_in_a_sentence() -> None:
    class Inner(BaseModel):
        number: int
        word: str
        more: list[int]

    with pytest.raises(ValidationError) as err:
        Inner.model_validate_json(b'{"number": "x", "more": [1, "%s"]}' % (b"y" * 500))
    message = invalid_body("inner", err.value).message
    assert message.startswith("inner: number:") and "(found 'x')" in message
    assert "word: Field required" in message and "more.1" in message
    assert "pydantic" not in message and len(message) < 500
