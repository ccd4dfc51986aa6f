"""From a stored request to its answer: decode the body, make one call of the backend, encode what it gives.

Used when a request comes and when it is taken up again after a restart, which has nothing but the stored body. A body that cannot be read
fails here, inside its future, so that it still uses its number in the model's order.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel

from ptlab.backend.access import Access
from ptlab.backend.backend import Backend
from ptlab.backend.models import Replayable, TrainingPass
from ptlab.backend.requests import Answer, Request
from ptlab.backend.store import RequestRow
from ptlab.errors import InvalidRequestError
from ptlab.server.bodies import (
    CreateCustomLossBody,
    CreateModelBody,
    LoadWeightsBody,
    OptimStepBody,
    SampleBody,
    SaveWeightsBody,
    SaveWeightsExternalBody,
    SaveWeightsForSamplerBody,
    decode_body,
)
from ptlab.server.meters import Meters
from ptlab.server.settings import ServeSettings
from ptlab.server.timeline import Span, Timeline
from ptlab.server.unpacking import TooLargeError
from ptlab.server.wire import (
    ForwardBackwardCall,
    decode_forward_backward,
    encode_forward_backward_output,
    encode_json,
    encode_sample_response,
)
from ptlab.types import Datum, EncodedTextChunk

T = TypeVar("T")
LARGE_BYTES = 256 * 1024
"""Decoding more than this takes milliseconds: in a thread, so that the loop goes on with other clients."""


class Operations:
    """The kinds of requests there are.

    Args:
        timeline: told of every request that ends.
        meters: told of the tokens that were trained on and sampled.
    """

    def __init__(self, backend: Backend, access: Access, settings: ServeSettings, timeline: Timeline, meters: Meters) -> None:
        self._backend = backend
        self._access = access
        self._settings = settings
        self._timeline = timeline
        self._meters = meters
        self._table: Mapping[str, Callable[[Request], Awaitable[Answer]]] = {
            "create_model": self._create_model,
            "create_model_from_state": self._create_model_from_state,
            "forward": self._pass,
            "forward_backward": self._pass,
            "optim_step": self._optim_step,
            "save_weights": self._save_weights,
            "save_weights_for_sampler": self._save_weights_for_sampler,
            "save_weights_external": self._save_weights_external,
            "load_weights": self._load_weights,
            "sample": self._sample,
            "create_custom_loss": self._create_custom_loss,
        }

    async def execute(self, request: Request) -> Answer:
        """Raises: what the backend raises; InvalidRequestError for a body that cannot be read."""
        began, failed = time.time(), True
        try:
            answer = await self._table[request.kind](request)
            failed = False
            return answer
        finally:
            self._timeline.add(
                Span(
                    session_id=session_of(request.scope),
                    lane=request.scope,
                    name=request.kind,
                    seq_id=request.seq_id,
                    began=began,
                    ended=time.time(),
                    failed=failed,
                )
            )

    # -- models

    async def _create_model(self, request: Request) -> Answer:
        # nothing is awaited before the backend is: after a restart the requests that follow find their model being made
        body = decode_body(CreateModelBody, request.body)
        model_id = await self._backend.create_model(
            session_id=body.session_id,
            model_seq_id=body.model_seq_id,
            base_model=body.base_model,
            lora=body.lora(),
            user_metadata=body.text_metadata,
        )
        return _json({"model_id": model_id, "type": "create_model"})

    async def _create_model_from_state(self, request: Request) -> Answer:
        body = decode_body(LoadWeightsBody, request.body)
        assert body.new_model is not None  # the route chose this kind by it
        body.check_optimizer()
        session_id, model_seq_id = body.new_model
        await self._check_path(request.owner, body)
        model_id = await self._backend.create_model_from_state(
            session_id=session_id,
            model_seq_id=model_seq_id,
            path=body.path,
            with_optimizer=body.optimizer,
            base_model=body.base_model,
            user_metadata=body.text_metadata,
        )
        return _json({"path": body.path, "model_id": model_id, "type": "load_weights"})

    async def _load_weights(self, request: Request) -> Answer:
        body = decode_body(LoadWeightsBody, request.body)
        assert body.existing_model is not None
        await self._check_path(request.owner, body)
        model_id, seq_id = body.existing_model
        return _json(await self._backend.load_state(model_id=model_id, seq_id=seq_id, path=body.path, with_optimizer=body.optimizer))

    async def _check_path(self, owner: str, body: LoadWeightsBody) -> None:
        if body.weights_access_token is not None:
            raise InvalidRequestError("weights_access_token is not served: load what is yours, or what its owner has published")
        await self._access.check_path(owner, body.path, await self._backend.catalog.is_public(body.path))

    # -- training

    async def _pass(self, request: Request) -> Answer:
        call = await off_loop(len(request.body), lambda: decode_forward_backward(request.body))
        num_tokens = check_size(call.data, self._settings)
        run = self._backend.forward if call.forward_only else self._backend.forward_backward
        output = await run(
            model_id=call.model_id, seq_id=call.seq_id, data=call.data, loss_fn=call.loss_fn, loss_fn_config=call.loss_fn_config
        )
        if not call.forward_only:
            self._meters.count_tokens("trained", num_tokens)
        return Answer(kind="proto", payload=encode_forward_backward_output(output))

    async def _optim_step(self, request: Request) -> Answer:
        body = decode_body(OptimStepBody, request.body)
        return _json(await self._backend.optim_step(model_id=body.model_id, seq_id=body.seq_id, adam=body.adam()))

    async def _create_custom_loss(self, request: Request) -> Answer:
        body = decode_body(CreateCustomLossBody, request.body)
        loss_id = await self._backend.create_custom_loss(
            session_id=body.session_id,
            name=body.name,
            inputs=body.input_dicts(),
            graph=body.graph,
            custom_loss_seq_id=body.custom_loss_seq_id,
        )
        return _json({"loss_id": loss_id, "type": "create_custom_loss"})

    # -- saving

    async def _save_weights(self, request: Request) -> Answer:
        body = decode_body(SaveWeightsBody, request.body)
        return _json(
            await self._backend.save_state(
                model_id=body.model_id,
                seq_id=body.seq_id,
                name=body.path,
                ttl_seconds=body.ttl_seconds,
                overwrite=body.overwrite,
                user_metadata=body.user_metadata,
            )
        )

    async def _save_weights_for_sampler(self, request: Request) -> Answer:
        body = decode_body(SaveWeightsForSamplerBody, request.body)
        if body.kind != "snapshot":
            raise InvalidRequestError(f"kind {body.kind!r} is not served: versions never change here; use kind='snapshot'")
        if body.path is not None:
            return _json(
                await self._backend.save_weights_for_sampler(
                    model_id=body.model_id,
                    seq_id=body.seq_id,
                    name=body.path,
                    ttl_seconds=body.ttl_seconds,
                    user_metadata=body.user_metadata,
                )
            )
        sampling_session_id = f"{session_of(body.model_id)}:sample:{body.sampling_session_seq_id}"
        await self._backend.save_weights_for_ephemeral_sampler(
            model_id=body.model_id, seq_id=body.seq_id, sampling_session_id=sampling_session_id
        )
        return _json({"path": None, "sampling_session_id": sampling_session_id, "type": "save_weights_for_sampler"})

    async def _save_weights_external(self, request: Request) -> Answer:
        body = decode_body(SaveWeightsExternalBody, request.body)
        if body.age_encryption_recipients:
            raise InvalidRequestError("age_encryption_recipients is not served: ptlab does not encrypt what it saves; leave it out")
        return _json(
            await self._backend.save_weights_external(
                model_id=body.model_id, seq_id=body.seq_id, name=body.path, ttl_seconds=body.ttl_seconds
            )
        )

    # -- sampling

    async def _sample(self, request: Request) -> Answer:
        body = request.decoded if isinstance(request.decoded, SampleBody) else decode_body(SampleBody, request.body)
        params = body.params()
        if params.seed is None:
            session_id, _, number = body.sampling_session_id.partition(":sample:")
            ordinal = self._backend.session(session_id).ordinal
            params = params.model_copy(update={"seed": self._backend.seed_for("sample", ordinal, number, body.seq_id)})
        response = await self._backend.sampling.sample(
            sampling_session_id=body.sampling_session_id,
            prompt=body.model_input(),
            num_samples=body.num_samples,
            params=params,
            include_prompt_logprobs=bool(body.prompt_logprobs),
            topk_prompt_logprobs=body.topk_prompt_logprobs,
            topk_sample_logprobs=body.topk_sample_logprobs,
            target_prompt_logprobs=body.targets(),
            prompt_alt_tokens_k=body.prompt_alt_tokens_k,
            prompt_logprobs_last_n=body.prompt_logprobs_last_n,
            sequence_ids=sequence_ids(body),
            record_stability_info=bool(body.record_stability_info),
        )
        self._meters.count_tokens("sampled", sum(len(sequence.tokens) for sequence in response.sequences))
        return Answer(kind="proto", payload=encode_sample_response(response))


def read_journal(row: RequestRow) -> Replayable:
    """What a stored request did to its model, for the backend to do again after a crash."""
    if row.body is None:
        return None
    if row.kind == "forward_backward":
        call: ForwardBackwardCall = decode_forward_backward(row.body)
        return TrainingPass(data=call.data, loss_fn=call.loss_fn, loss_fn_config=call.loss_fn_config, backward=not call.forward_only)
    return decode_body(OptimStepBody, row.body).adam() if row.kind == "optim_step" else None


def sequence_ids(body: SampleBody) -> list[str]:
    """The names of the sequences that a request will draw."""
    return [f"{body.sampling_session_id}:{body.seq_id}:{i}" for i in range(body.num_samples)]


def session_of(scope: str) -> str:
    """The session that a model, a sampling session or a custom loss belongs to."""
    for kind in (":train:", ":sample:", ":loss"):
        scope = scope.partition(kind)[0]
    return scope


def check_size(data: Sequence[Datum], settings: ServeSettings) -> int:
    """How many tokens these are. Raises: TooLargeError for more datums or tokens than one call may have."""
    if len(data) > settings.max_datums:
        raise TooLargeError(f"{len(data)} datums in one call; this server takes at most {settings.max_datums}: send several calls")
    num_tokens = sum(len(chunk.tokens) for datum in data for chunk in datum.model_input.chunks if isinstance(chunk, EncodedTextChunk))
    if num_tokens > settings.max_tokens_per_call:
        raise TooLargeError(
            f"{num_tokens} tokens in one call; this server takes at most {settings.max_tokens_per_call}: send several calls"
        )
    return num_tokens


async def off_loop(num_bytes: int, work: Callable[[], T]) -> T:
    """Do CPU work on this many bytes, in a thread if that takes long enough to be noticed."""
    return await asyncio.to_thread(work) if num_bytes > LARGE_BYTES else work()


def _json(value: BaseModel | Mapping[str, Any]) -> Answer:
    return Answer(kind="json", payload=encode_json(value))
