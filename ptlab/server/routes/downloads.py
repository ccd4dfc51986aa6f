"""Files of checkpoints, and traces of sessions, behind signed addresses: whoever holds one needs no key.

What is sent is looked up by name in a checkpoint's manifest; no part of an address ever becomes a path.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Final

from fastapi import APIRouter, Request, Response
from starlette.responses import FileResponse, StreamingResponse

from ptlab.errors import NotFoundError
from ptlab.server.archive import tar_chunks, tar_size
from ptlab.server.context import Context, Here

router = APIRouter()
ROUTE: Final = "/api/v1/download"
NOSNIFF: Final = {"x-content-type-options": "nosniff"}


def signed(request: Request, here: Context, what: Mapping[str, str]) -> tuple[str, datetime]:
    """(an address of this server that sends `what`, when it expires)."""
    base = here.settings.public_url or str(request.base_url)
    return here.urls.sign(base.rstrip("/") + ROUTE, what)


@router.get("/download")
async def download(request: Request, here: Here) -> Response:
    """Signed by `signed`: {"path"} a tar of a checkpoint, {"path", "file"} one of its files, {"trace"} a session's trace."""
    what = here.urls.check(request.query_params)
    if "trace" in what:
        return _attachment(here.timeline.trace_of(what["trace"]), f"{what['trace']}.pftrace")
    files = await here.backend.catalog.files(what["path"])
    if "file" not in what:
        name = what["path"].rpartition("/")[2]
        headers = {"content-length": str(tar_size(files)), "content-disposition": _disposition(f"{name}.tar"), **NOSNIFF}
        return StreamingResponse(_tar(files), media_type="application/x-tar", headers=headers)
    if what["file"] not in files:
        raise NotFoundError(f"{what['path']} has no file {what['file']!r}")
    return FileResponse(files[what["file"]], media_type="application/octet-stream", filename=what["file"], headers=NOSNIFF)


def _tar(files: Mapping[str, Path]) -> Iterator[bytes]:
    # a plain generator: starlette reads it in a thread
    yield from tar_chunks(files)


def _attachment(content: bytes, name: str) -> Response:
    return Response(content, media_type="application/octet-stream", headers={"content-disposition": _disposition(name), **NOSNIFF})


def _disposition(name: str) -> str:
    safe = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "_" for letter in name)
    return f'attachment; filename="{safe}"'
