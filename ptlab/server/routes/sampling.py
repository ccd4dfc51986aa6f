"""Sampling sessions and samples."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from ptlab.backend import requests
from ptlab.errors import InvalidRequestError
from ptlab.server.auth import Owner
from ptlab.server.bodies import CreateSamplingSessionBody, JoinSamplingSessionBody, SampleBody
from ptlab.server.context import Here
from ptlab.server.intake import answer, read_json, read_json_bytes
from ptlab.server.operations import sequence_ids
from ptlab.server.settings import ServeSettings

router = APIRouter()


@router.post("/create_sampling_session")
async def create_sampling_session(request: Request, here: Here, owner: Owner) -> Response:
    body = await read_json(request, here.settings, CreateSamplingSessionBody)
    await here.access.check_session(owner, body.session_id)
    if body.model_path is not None:
        await here.access.check_path(owner, body.model_path, await here.backend.catalog.is_public(body.model_path))
    sampling_session_id = f"{body.session_id}:sample:{body.sampling_session_seq_id}"
    await here.backend.sampling.create_sampling_session(
        sampling_session_id=sampling_session_id, model_path=body.model_path, base_model=body.base_model, owner=owner
    )
    return answer({"type": "create_sampling_session", "sampling_session_id": sampling_session_id})


@router.get("/samplers/{sampling_session_id}")
async def get_sampler(sampling_session_id: str, here: Here, owner: Owner) -> Response:
    await here.access.check_sampler(owner, sampling_session_id)
    return answer(await here.backend.sampling.get_sampler(sampling_session_id))


@router.post("/join_sampling_session")
async def join_sampling_session(request: Request, here: Here, owner: Owner) -> Response:
    body = await read_json(request, here.settings, JoinSamplingSessionBody)
    await here.access.check_sampler(owner, body.sampling_session_id)
    counter = await here.backend.sampling.join_sampling_session(body.sampling_session_id)
    return answer({"type": "join_sampling_session", "client_counter": counter})


@router.post("/asample")
async def asample(request: Request, here: Here, owner: Owner) -> Response:
    body, content = await read_json_bytes(request, here.settings, SampleBody)
    _check_size(body, here.settings)
    await here.access.check_sampler(owner, body.sampling_session_id)
    request_id = await here.requests.accept(
        requests.Request(
            kind="sample",
            scope=body.sampling_session_id,
            seq_id=body.seq_id,
            owner=owner,
            body=content,
            at_once=not body.record_stability_info,  # what goes on record is drawn once only
            decoded=body,
        )
    )
    return answer({"request_id": request_id, "sample_sequence_ids": sequence_ids(body)})


def _check_size(body: SampleBody, settings: ServeSettings) -> None:
    """Raises: InvalidRequestError for more than the operator allows."""
    if body.num_samples > settings.max_num_samples:
        raise InvalidRequestError(f"num_samples is {body.num_samples}; this server takes at most {settings.max_num_samples}")
    if (body.sampling_params.max_tokens or 0) > settings.max_new_tokens:
        raise InvalidRequestError(f"max_tokens is {body.sampling_params.max_tokens}; this server takes at most {settings.max_new_tokens}")
