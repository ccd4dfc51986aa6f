"""`/v1/chat/completions`, `/v1/completions`, `/v1/models`: the samplers for programs that speak OpenAI's API.

The samplers answer whole sequences, so a stream holds the role at once, then each choice when it is finished; comment lines keep the
connection alive meanwhile. A client that goes away aborts its draws in the engine, streaming or not.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send

from ptlab.backend.access import Access
from ptlab.backend.backend import Backend
from ptlab.errors import BusyError, NotFoundError, PtlabError
from ptlab.server.auth import Owner
from ptlab.server.errors import status_of
from ptlab.server.openai_answers import AnswerFormat, Json, Usage, error_json
from ptlab.server.openai_bodies import ChatBody, CompletionBody, OpenAIRequestError
from ptlab.server.openai_drawing import Ask, Language, Languages, PromptAnswer, ask_of, draw
from ptlab.server.openai_samplers import OpenAISamplers, OpenSampler

T = TypeVar("T")
logger = logging.getLogger(__name__)
CLIENT_GONE = 499
"""Nobody reads it; the access log does."""
MOST_LISTED = 10_000
"""Checkpoints looked at for /v1/models."""
HEAD_S = 0.05
"""A stream's status waits so long for what the samplers refuse without computing anything."""


@dataclass(frozen=True, slots=True)
class OpenAILimits:
    """What this face takes at once."""

    most_requests: int = 256
    """In flight, of all keys; one more is answered 429."""
    most_new_tokens: int = 131_072
    """Largest max_tokens."""
    most_models_per_key: int = 8
    """Models that one key has open; the least recently used one is closed for another."""
    idle_s: float = 1800.0
    """A model that nobody asks for so long is closed."""
    keep_alive_s: float = 15.0
    """Between comment lines of a stream that has nothing to say."""


@dataclass(slots=True)
class _Watch:
    """How a request went, for the meters."""

    outcome: Literal["ok", "user", "server", "cancelled"] = "cancelled"  # until something else is known


OnFinished = Callable[[str, str, float], None]
"""(kind, "ok" | "user" | "server" | "cancelled", seconds)."""


def nobody_counts(*told: object) -> None:
    """For a server without meters."""


class OpenAIFace:
    """The endpoints without HTTP routing. Belongs to the backend's event loop."""

    def __init__(
        self,
        backend: Backend,
        samplers: OpenAISamplers,
        on_finished: OnFinished,
        on_sampled: Callable[[int], None],
        limits: OpenAILimits,
    ) -> None:
        self._sampling = backend.sampling
        self._samplers = samplers
        self._languages = Languages(backend.get_tokenizer)
        self._on_finished = on_finished
        self._on_sampled = on_sampled
        self._limits = limits
        self._num_requests = 0

    async def answer(self, request: Request, owner: str, body: ChatBody | CompletionBody) -> Response:
        """One answer or a stream of chunks. Raises: PtlabError for what is wrong before the first byte."""
        async with AsyncExitStack() as stack:
            watch = stack.enter_context(self._watched("openai_chat" if isinstance(body, ChatBody) else "openai_completion"))
            sampler = await stack.enter_async_context(self._samplers.using(owner, body.model))
            language = await self._languages.of(sampler.base_model)
            ask = await asyncio.to_thread(ask_of, body, language)
            self._check_length(ask)
            answer = AnswerFormat(
                chat=isinstance(body, ChatBody),
                model=body.model,
                fingerprint=sampler.fingerprint,
                tokenizer=language.tokenizer,
                wants_logprobs=ask.num_top is not None,
                includes_usage=body.includes_usage,
            )
            headers = {"x-ptlab-version": sampler.fingerprint} | ({"x-ptlab-renderer": ask.renderer} if ask.renderer else {})
            tasks = self._start(sampler, ask, language)
            stack.callback(_abandon, tasks)
            if body.stream:
                done, _ = await asyncio.wait(tasks, timeout=HEAD_S, return_when=asyncio.FIRST_EXCEPTION)
                for task in done:
                    task.result()  # what can never work is refused at once, and is a status then, not an event
                return _EventStream(self._events(tasks, ask, answer, watch), headers=headers, cleanup=stack.pop_all())
            drawn = await unless_gone(request, asyncio.gather(*tasks))
            if drawn is None:
                return Response(status_code=CLIENT_GONE)
            watch.outcome = "ok"
            content = answer.whole([choice for part in drawn for choice in part.choices], _total(drawn))
            return JSONResponse(content, headers=headers)

    def _check_length(self, ask: Ask) -> None:
        if (ask.params.max_tokens or 0) > self._limits.most_new_tokens:
            raise OpenAIRequestError(
                f"max_tokens is {ask.params.max_tokens}; this server draws at most {self._limits.most_new_tokens}", param="max_tokens"
            )

    @contextmanager
    def _watched(self, kind: str) -> Iterator[_Watch]:
        """Counts the request as in flight. Raises: BusyError if there are too many."""
        watch, began = _Watch(), time.perf_counter()
        try:
            if self._num_requests >= self._limits.most_requests:
                raise BusyError(f"{self._num_requests} OpenAI requests are in flight, as many as this server takes; try again later")
            self._num_requests += 1
            try:
                yield watch
            finally:
                self._num_requests -= 1
        except PtlabError as err:
            watch.outcome = "user" if status_of(err)[0] < 500 else "server"
            raise
        except Exception:
            watch.outcome = "server"
            raise
        finally:
            self._on_finished(kind, watch.outcome, time.perf_counter() - began)

    def _start(self, sampler: OpenSampler, ask: Ask, language: Language) -> list[asyncio.Task[PromptAnswer]]:
        async def counted(index: int) -> PromptAnswer:
            answer = await draw(self._sampling, sampler, ask, index, language)
            self._on_sampled(answer.usage.completion_tokens)
            return answer

        return [asyncio.create_task(counted(index)) for index in range(len(ask.prompts))]

    async def _events(
        self, tasks: Sequence[asyncio.Task[PromptAnswer]], ask: Ask, answer: AnswerFormat, watch: _Watch
    ) -> AsyncIterator[str]:
        """Server-sent events. An error after the first of them is an event too: the status has been sent."""
        try:
            for chunk in answer.role_chunks(len(ask.prompts) * ask.num_choices):
                yield _event(chunk)
            waiting = set(tasks)
            while waiting:
                done, waiting = await asyncio.wait(waiting, timeout=self._limits.keep_alive_s, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    yield ": waiting for the sampler\n\n"
                for choice in [choice for task in done for choice in task.result().choices]:
                    for chunk in answer.choice_chunks(choice):
                        yield _event(chunk)
            for chunk in answer.usage_chunks(_total([task.result() for task in tasks])):
                yield _event(chunk)
            watch.outcome = "ok"
            yield "data: [DONE]\n\n"
        except PtlabError as err:
            watch.outcome = "user" if status_of(err)[0] < 500 else "server"
            yield _event(error_json(err))


def _abandon(tasks: Sequence[asyncio.Task[PromptAnswer]]) -> None:
    """Cancel what is not finished; an error that nobody waits for any more is not worth a log line."""
    for task in tasks:
        task.cancel()
        task.add_done_callback(lambda ended: None if ended.cancelled() else ended.exception())


class _EventStream(StreamingResponse):
    """Closes what the stream used when it ends, also one whose client went away before the first event was made."""

    def __init__(self, events: AsyncIterator[str], *, headers: dict[str, str], cleanup: AsyncExitStack) -> None:
        # no-transform and X-Accel-Buffering: a proxy that gathers events into blocks would make a stream of nothing
        super().__init__(
            events, media_type="text/event-stream", headers=headers | {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}
        )
        self._cleanup = cleanup

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._cleanup:
            await super().__call__(scope, receive, send)


async def unless_gone(request: Request, work: asyncio.Future[T]) -> T | None:
    """The result of `work`, or None when the client closes the connection first; it is cancelled then."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        work.cancel()

    leaving = asyncio.create_task(gone())
    try:
        await asyncio.wait([work])
        return None if work.cancelled() else work.result()
    finally:
        work.cancel()
        leaving.cancel()


class OpenAIRoute(APIRoute):
    """Errors in OpenAI's format, whatever raised them: a program that speaks OpenAI's API knows no other."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_openai(request: Request) -> Response:
            try:
                return await handle(request)
            except PtlabError as err:
                status, headers = status_of(err)
                if status >= 500:
                    logger.error("%s %s: %s", request.method, request.url.path, err.message, exc_info=err)
                return JSONResponse(error_json(err), status_code=status, headers=dict(headers))

        return handle_openai


def create_openai_router(
    backend: Backend,
    access: Access,
    *,
    on_finished: OnFinished = nobody_counts,
    on_sampled: Callable[[int], None] = nobody_counts,
    limits: OpenAILimits | None = None,
) -> APIRouter:
    """The `/v1` routes. Who is calling decides ptlab.server.auth.owner_of.

    Args:
        on_finished: told kind, outcome and seconds of every request that ends.
        on_sampled: told how many tokens were drawn.
    """
    limits = limits or OpenAILimits()
    router = APIRouter(prefix="/v1", route_class=OpenAIRoute, tags=["openai"])
    samplers = OpenAISamplers(backend, access, most_per_owner=limits.most_models_per_key, idle_s=limits.idle_s)
    face = OpenAIFace(backend, samplers, on_finished, on_sampled, limits)
    began = int(time.time())

    @router.post("/chat/completions")
    async def chat_completions(request: Request, owner: Owner) -> Response:
        return await face.answer(request, owner, ChatBody.parse(await request.body()))

    @router.post("/completions")
    async def completions(request: Request, owner: Owner) -> Response:
        return await face.answer(request, owner, CompletionBody.parse(await request.body()))

    async def models(owner: str) -> list[Json]:
        base = [{"id": name, "object": "model", "created": began, "owned_by": "ptlab"} for name in await samplers.base_models()]
        found = await backend.catalog.list_user_checkpoints(limit=MOST_LISTED, offset=0, owner=owner)
        saved = [
            {"id": checkpoint.tinker_path, "object": "model", "created": int(checkpoint.time.timestamp()), "owned_by": owner}
            for checkpoint in found.checkpoints
            if checkpoint.checkpoint_type == "sampler"
        ]
        return base + saved

    @router.get("/models")
    async def list_models(owner: Owner) -> Response:
        return JSONResponse({"object": "list", "data": await models(owner)})

    @router.get("/models/{model:path}")
    async def retrieve_model(model: str, owner: Owner) -> Response:
        for known in await models(owner):
            if known["id"] == model:
                return JSONResponse(known)
        raise NotFoundError(f"there is no model {model!r}")

    return router


def _event(data: Json) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _total(answers: Sequence[PromptAnswer]) -> Usage:
    usages = [answer.usage for answer in answers]
    return Usage(sum(u.prompt_tokens for u in usages), sum(u.completion_tokens for u in usages), sum(u.cached_tokens for u in usages))
