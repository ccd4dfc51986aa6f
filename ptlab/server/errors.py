"""From ptlab's errors to HTTP, in one table.

What an accepted request answers later travels inside its future as 200 {"error", "category"}; here is only what a call answers at once.
Two codes are never used: 409, which the SDK repeats for minutes, and 422. A lasting refusal is never 5xx, which the SDK repeats too.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from ptlab.errors import (
    BusyError,
    CheckpointError,
    ConfigError,
    EngineLostError,
    GoneError,
    InvalidRequestError,
    NotFoundError,
    PtlabError,
)
from ptlab.server.unpacking import TooLargeError

logger = logging.getLogger(__name__)


class UnauthorizedError(PtlabError):
    """No API key, or one that is not valid."""

    category = "user"


class HostedOnlyError(InvalidRequestError):
    """Something that only the hosted service has."""


STATUS: tuple[tuple[type[PtlabError], int, Mapping[str, str]], ...] = (
    # the first match decides: subclasses before their bases
    (UnauthorizedError, 401, {"www-authenticate": "ApiKey"}),  # without error="invalid_token", which makes the SDK ask for a new token
    (GoneError, 410, {}),
    (NotFoundError, 404, {}),
    (TooLargeError, 413, {}),
    (BusyError, 429, {"retry-after": "1"}),
    (EngineLostError, 503, {"retry-after": "1"}),  # the engine is being replaced: the one 5xx worth repeating
    (InvalidRequestError, 400, {}),
    (CheckpointError, 400, {}),
    (ConfigError, 400, {}),
    (PtlabError, 500, {}),
)


def install(app: FastAPI) -> None:
    """Let every failure of the app's routes answer through this table."""
    app.add_exception_handler(PtlabError, _ptlab_error)
    app.add_exception_handler(RequestValidationError, _bad_parameters)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(ClientDisconnect, _client_gone)
    app.add_exception_handler(Exception, _unexpected)


def status_of(error: PtlabError) -> tuple[int, Mapping[str, str]]:
    """HTTP status and extra headers of an error."""
    return next((status, headers) for kind, status, headers in STATUS if isinstance(error, kind))


def refusal(path: str, status: int, message: str, category: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The body of an error: {"error": sentence, "category"}; below /v1 as OpenAI clients read it."""
    body: dict[str, Any] = {"error": message, "category": category}
    if path.startswith("/v1/"):
        kind = "invalid_request_error" if status < 500 else "server_error"
        body = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    return JSONResponse(body, status, dict(headers or {}))


def sentence(errors: Sequence[Any]) -> str:
    """The first three of pydantic's complaints, each with where, what is wrong, and the beginning of what was found."""
    parts = []
    for error in errors[:3]:
        place = error["loc"][1:] if error["loc"][:1] in (("body",), ("query",), ("path",)) and len(error["loc"]) > 1 else error["loc"]
        where = ".".join(str(part) for part in place) or "body"
        found = "" if error["type"] in ("missing", "json_invalid") else f" (found {_short(error.get('input'))})"
        parts.append(f"{where}: {error['msg'].removeprefix('Value error, ')}{found}")
    more = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
    return "; ".join(parts) + more


def invalid_body(what: str, error: ValidationError) -> InvalidRequestError:
    return InvalidRequestError(f"{what}: {sentence(error.errors(include_url=False, include_context=False))}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


async def _ptlab_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, PtlabError)
    status, headers = status_of(error)
    if status >= 500:
        logger.error("%s %s: %s", request.method, request.url.path, error.message, exc_info=error)
    return refusal(request.url.path, status, error.message, error.category, headers)


async def _bad_parameters(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return refusal(request.url.path, 400, sentence(error.errors()), "user")


async def _http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    path = request.url.path
    messages = {404: f"there is no {path} on this server", 405: f"{path} does not take {request.method}"}
    category = "user" if error.status_code < 500 else "server"
    return refusal(path, error.status_code, messages.get(error.status_code, str(error.detail)), category, error.headers)


async def _client_gone(request: Request, error: Exception) -> Response:
    """A client that went away in the middle of its body; nobody reads this."""
    del request, error
    return Response(status_code=499)


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    """A fault of ptlab's own; the server logs it with its traceback."""
    message = f"the server failed on this request ({type(error).__name__}); its log says where"
    return refusal(request.url.path, 500, message, "server")
