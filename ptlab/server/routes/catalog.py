"""What is stored: models that can be served, training runs, checkpoints, and changes to them."""

from __future__ import annotations

import re
from email.utils import format_datetime

from fastapi import APIRouter, Request, Response

from ptlab.errors import InvalidRequestError
from ptlab.server.auth import Owner
from ptlab.server.bodies import CopyWeightsBody, TtlBody, WeightsInfoBody
from ptlab.server.context import Context, Here
from ptlab.server.errors import HostedOnlyError
from ptlab.server.intake import answer, nothing, read_json
from ptlab.server.routes.downloads import signed
from ptlab.server.routes.service import AccessScope, Limit, Offset
from ptlab.types import ExternalWeightsUrlsResponse

router = APIRouter()
FIRST_WITH_EXTERNAL = 28
"""0.28, the first SDK whose checkpoints may be of the type "external"."""
CHECKPOINT = "/training_runs/{run}/checkpoints/{checkpoint:path}"
"""`checkpoint` is <kind>/<name>; run ids hold ':', and neither is escaped by the SDK."""


@router.get("/get_server_capabilities")
async def get_server_capabilities(here: Here, owner: Owner) -> Response:
    return answer(await here.backend.catalog.get_server_capabilities())


@router.get("/whoami")
async def whoami(here: Here, owner: Owner) -> Response:
    """Not called by the SDK, which reads a JWT instead."""
    return answer(await here.backend.catalog.whoami(owner))


# -- training runs


@router.get("/training_runs")
async def list_training_runs(
    here: Here,
    owner: Owner,
    limit: Limit = 20,
    offset: Offset = 0,
    access_scope: AccessScope = "owned",
    project_id: str | None = None,
) -> Response:
    if project_id is not None:
        raise HostedOnlyError("this server has no projects to filter by; leave project_id out")
    return answer(await here.backend.catalog.list_training_runs(limit, offset, owner))


@router.get("/training_runs/{run}")
async def get_training_run(run: str, here: Here, owner: Owner, access_scope: AccessScope = "owned") -> Response:
    await _check_run(here, owner, run)
    return answer(await here.backend.catalog.get_training_run(run))


@router.get("/training_runs/{run}/checkpoints")
async def list_checkpoints(run: str, request: Request, here: Here, owner: Owner) -> Response:
    await _check_run(here, owner, run)
    return answer(await here.backend.catalog.list_checkpoints(run, external=_knows_external(request)))


@router.get("/checkpoints")
async def list_user_checkpoints(request: Request, here: Here, owner: Owner, limit: Limit = 100, offset: Offset = 0) -> Response:
    return answer(await here.backend.catalog.list_user_checkpoints(limit, offset, owner, external=_knows_external(request)))


def _knows_external(request: Request) -> bool:
    """Whether the client can read a list that has external checkpoints in it; SDKs before 0.28 fail on the whole list."""
    version = re.match(r"0\.(\d+)\.", request.headers.get("x-stainless-package-version", ""))
    return version is None or int(version[1]) >= FIRST_WITH_EXTERNAL


# -- one checkpoint; the longer routes stand first, because {checkpoint:path} takes everything


@router.post(CHECKPOINT + "/publish")
async def publish(run: str, checkpoint: str, here: Here, owner: Owner) -> Response:
    return await _set_published(here, owner, run, checkpoint, public=True)


@router.delete(CHECKPOINT + "/publish")
async def unpublish(run: str, checkpoint: str, here: Here, owner: Owner) -> Response:
    return await _set_published(here, owner, run, checkpoint, public=False)


@router.put(CHECKPOINT + "/ttl")
async def set_ttl(run: str, checkpoint: str, request: Request, here: Here, owner: Owner) -> Response:
    body = await read_json(request, here.settings, TtlBody)
    await _check_own(here, owner, _path(run, checkpoint))
    await here.backend.catalog.set_checkpoint_ttl(run, checkpoint, body.ttl_seconds)
    return nothing()


@router.get(CHECKPOINT + "/external_weights_urls")
async def external_weights_urls(run: str, checkpoint: str, request: Request, here: Here, owner: Owner) -> Response:
    path = _path(run, checkpoint)
    await _check_readable(here, owner, path)
    files = await here.backend.catalog.files(path)
    urls = {name: signed(request, here, {"path": path, "file": name}) for name in files}
    expires = min((expires for _, expires in urls.values()), default=None)
    if expires is None:
        raise InvalidRequestError(f"{path} holds no files")
    return answer(ExternalWeightsUrlsResponse(urls={name: url for name, (url, _) in urls.items()}, expires=expires))


@router.get(CHECKPOINT + "/archive")
async def archive(run: str, checkpoint: str, request: Request, here: Here, owner: Owner) -> Response:
    """For SDKs up to 0.33 and the cookbook: where a tar of the checkpoint can be had."""
    path = _path(run, checkpoint)
    await _check_readable(here, owner, path)
    await here.backend.catalog.files(path)  # a missing or damaged one is told now
    url, expires = signed(request, here, {"path": path})
    return Response(status_code=302, headers={"location": url, "expires": format_datetime(expires, usegmt=True)})


@router.delete(CHECKPOINT)
async def delete_checkpoint(run: str, checkpoint: str, here: Here, owner: Owner) -> Response:
    await _check_own(here, owner, _path(run, checkpoint))
    await here.backend.catalog.delete_checkpoint(run, checkpoint)
    return nothing()


@router.post("/weights_info")
async def weights_info(request: Request, here: Here, owner: Owner) -> Response:
    body = await read_json(request, here.settings, WeightsInfoBody)
    await _check_readable(here, owner, body.tinker_path)
    return answer(await here.backend.catalog.get_weights_info(body.tinker_path))


@router.post("/copy_weights")
async def copy_weights(request: Request, here: Here, owner: Owner) -> Response:
    """A project, which RestClient always names, has no meaning here: the copy is its owner's."""
    body = await read_json(request, here.settings, CopyWeightsBody)
    if body.weights_access_token is not None:
        raise HostedOnlyError("weights_access_token is not served: copy what is yours")
    await _check_own(here, owner, body.source_path)
    return answer({"tinker_path": await here.backend.catalog.copy_weights(body.source_path, body.ttl_seconds)})


async def _set_published(here: Context, owner: str, run: str, checkpoint: str, *, public: bool) -> Response:
    await _check_own(here, owner, _path(run, checkpoint))
    await here.backend.catalog.set_checkpoint_published(run, checkpoint, public=public)
    return nothing()


def _path(run: str, checkpoint: str) -> str:
    return f"tinker://{run}/{checkpoint}"


async def _check_run(here: Context, owner: str, run: str) -> None:
    """Runs of an in-process client with the same data directory are in no store; they belong to "local"."""
    await here.access.check_path(owner, _path(run, "weights/any"), public=False)


async def _check_own(here: Context, owner: str, path: str) -> None:
    await here.access.check_path(owner, path, public=False)


async def _check_readable(here: Context, owner: str, path: str) -> None:
    await here.access.check_path(owner, path, public=await here.backend.catalog.is_public(path))
