"""Who is calling: the owner behind the API key of a request.

The key stands in `X-API-Key`, as the SDK sends it, or in `Authorization: Bearer`, as OpenAI clients do. As long as no key was ever
created every caller is the same one, "local", whatever it sends.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from ptlab.server.context import Context, context_of
from ptlab.server.errors import UnauthorizedError

BEARER = "bearer "


async def owner_of(request: Request, context: Annotated[Context, Depends(context_of)]) -> str:
    """The owner of what this request makes and may see. Raises: UnauthorizedError."""
    key = presented_key(request)
    if key is None and await context.access.has_keys():
        raise UnauthorizedError("this server needs an API key: set TINKER_API_KEY (or send it as X-API-Key or Authorization: Bearer)")
    owner = await context.access.owner_of_key(key or "")
    if owner is None:
        raise UnauthorizedError("this API key is not known here, or was revoked; `ptlab keys create` on the server makes one")
    return owner


def presented_key(request: Request) -> str | None:
    """The API key that a request brings, however it brings it."""
    if "x-api-key" in request.headers:
        return request.headers["x-api-key"]
    authorization = request.headers.get("authorization", "")
    return authorization[len(BEARER) :].strip() if authorization.lower().startswith(BEARER) else None


Owner = Annotated[str, Depends(owner_of)]
