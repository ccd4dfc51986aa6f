"""Models: creation, training, saving. Every call but get_info is accepted at once and answered through its future.

Of a body only the address is read here (which model, which number): whatever else is wrong with it is told by the future, so that the
number counts as used and the model's later requests do not wait for it.
"""

from __future__ import annotations

import json

from fastapi import APIRouter, Request, Response

from ptlab.backend import requests
from ptlab.server.auth import Owner
from ptlab.server.bodies import CreateCustomLossBody, CreateModelBody, GetInfoBody, LoadWeightsBody, decode_body
from ptlab.server.body_values import Body, Id, Ordinal, TrainingSeqId
from ptlab.server.context import Context, Here
from ptlab.server.intake import answer, read_body, read_json, read_json_bytes
from ptlab.server.operations import off_loop
from ptlab.server.wire import read_forward_backward_header

router = APIRouter()


class TrainingHeader(Body):
    """Where a training request belongs."""

    model_id: Id
    seq_id: TrainingSeqId


class LoadHeader(Body):
    """Where a load_weights belongs, in either form."""

    session_id: Id | None = None
    model_seq_id: Ordinal | None = None
    model_id: Id | None = None
    seq_id: TrainingSeqId | None = None


@router.post("/create_model")
async def create_model(request: Request, here: Here, owner: Owner) -> Response:
    body, content = await read_json_bytes(request, here.settings, CreateModelBody)
    return await _create(here, owner, "create_model", body.session_id, body.model_seq_id, content)


@router.post("/load_weights")
async def load_weights(request: Request, here: Here, owner: Owner) -> Response:
    """A new model from a checkpoint, or (older SDKs) a checkpoint into a model."""
    header, content = await read_json_bytes(request, here.settings, LoadHeader)
    if header.model_id is not None and header.seq_id is not None and header.session_id is None:
        return await _accept(here, owner, "load_weights", header.model_id, header.seq_id, content)
    body = decode_body(LoadWeightsBody, content)
    assert body.new_model is not None  # LoadWeightsBody has exactly one form
    return await _create(here, owner, "create_model_from_state", *body.new_model, content)


@router.post("/get_info")
async def get_info(request: Request, here: Here, owner: Owner) -> Response:
    body = await read_json(request, here.settings, GetInfoBody)
    await here.access.check_model(owner, body.model_id)
    info = await here.backend.get_info(body.model_id)
    return answer(info.model_copy(update={"type": "get_info"}))


@router.post("/forward_backward")
async def forward_backward(request: Request, here: Here, owner: Owner) -> Response:
    content = await read_body(request, here.settings)
    header = await off_loop(len(content), lambda: read_forward_backward_header(content))
    kind = "forward" if header.forward_only else "forward_backward"
    return await _accept(here, owner, kind, header.model_id, header.seq_id, content)


@router.post("/optim_step")
async def optim_step(request: Request, here: Here, owner: Owner) -> Response:
    return await _accept_json(request, here, owner, "optim_step")


@router.post("/save_weights")
async def save_weights(request: Request, here: Here, owner: Owner) -> Response:
    return await _accept_json(request, here, owner, "save_weights")


@router.post("/save_weights_for_sampler")
async def save_weights_for_sampler(request: Request, here: Here, owner: Owner) -> Response:
    header, content = await read_json_bytes(request, here.settings, TrainingHeader)
    # the SDK takes a new sampling_session_seq_id for every retry of the same save; the first one's sampler is the answer to all
    fields = {name: value for name, value in json.loads(content).items() if name != "sampling_session_seq_id"}
    identity = json.dumps(fields, sort_keys=True).encode()
    return await _accept(here, owner, "save_weights_for_sampler", header.model_id, header.seq_id, content, identity)


@router.post("/save_weights_external")
async def save_weights_external(request: Request, here: Here, owner: Owner) -> Response:
    return await _accept_json(request, here, owner, "save_weights_external")


@router.post("/create_custom_loss")
async def create_custom_loss(request: Request, here: Here, owner: Owner) -> Response:
    body, content = await read_json_bytes(request, here.settings, CreateCustomLossBody)
    await here.access.check_session(owner, body.session_id)
    request_id = await here.requests.accept(
        requests.Request(
            kind="create_custom_loss", scope=f"{body.session_id}:loss", seq_id=body.custom_loss_seq_id, owner=owner, body=content
        )
    )
    return answer({"request_id": request_id})


async def _create(here: Context, owner: str, kind: str, session_id: str, model_seq_id: int, content: bytes) -> Response:
    await here.access.check_session(owner, session_id)
    model_id = f"{session_id}:train:{model_seq_id}"
    request_id = await here.requests.accept(
        requests.Request(kind=kind, scope=model_id, seq_id=0, owner=owner, body=content, model_id=model_id)
    )
    return answer({"request_id": request_id, "model_id": model_id})


async def _accept_json(request: Request, here: Context, owner: str, kind: str) -> Response:
    header, content = await read_json_bytes(request, here.settings, TrainingHeader)
    return await _accept(here, owner, kind, header.model_id, header.seq_id, content)


async def _accept(here: Context, owner: str, kind: str, model_id: str, seq_id: int, content: bytes, identity: bytes = b"") -> Response:
    await here.access.check_model(owner, model_id)
    request_id = await here.requests.accept(
        requests.Request(kind=kind, scope=model_id, seq_id=seq_id, owner=owner, body=content, model_id=model_id, identity=identity)
    )
    return answer({"request_id": request_id, "model_id": model_id})
