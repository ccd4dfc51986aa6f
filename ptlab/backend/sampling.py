"""Sampling sessions: one per sampling client, each on one base model and one adapter version or none."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from ptlab.backend.checkpoints import CheckpointPath, Checkpoints, Manifest
from ptlab.backend.served import ServedModel
from ptlab.engines.protocols import AdapterRef, SampleCall
from ptlab.errors import CheckpointError, EngineLostError, InvalidRequestError, NotFoundError
from ptlab.types import GetSamplerResponse, ModelInput, SampleResponse, SamplingParams, TensorData

RESENDS = 2
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SamplingSession:
    """What a sampling client samples from; it never changes."""

    sampling_session_id: str
    base_model: str
    served: ServedModel
    ref: AdapterRef | None
    model_path: str | None


class SamplingSessions:
    """The open sampling sessions. Belongs to the backend's event loop.

    Args:
        serve: the engines of a base model by name, opened if need be.
    """

    def __init__(self, checkpoints: Checkpoints, serve: Callable[[str], Awaitable[ServedModel]]) -> None:
        self._checkpoints = checkpoints
        self._serve = serve
        self._open: dict[str, SamplingSession] = {}

    def add(self, session: SamplingSession) -> None:
        """Open a session on a version of which the session becomes a user."""
        self._open[session.sampling_session_id] = session

    def forget_all(self) -> None:
        """Drop every session without unloading anything; later releases find nothing to do."""
        self._open.clear()

    def ids_of(self, session_id: str) -> list[str]:
        """Sampling sessions that a client session has open."""
        return [sampler_id for sampler_id in self._open if sampler_id.startswith(f"{session_id}:sample:")]

    def named_ref(self, path: CheckpointPath, manifest: Manifest) -> AdapterRef:
        """The version that a saved sampler checkpoint holds."""
        # the content is part of the name: a path deleted and written anew is another version
        content = hashlib.sha256("".join(file.sha256 for file in manifest.files.values()).encode()).hexdigest()[:12]
        return AdapterRef(name=f"{path}#{content}", version=manifest.step, path=self._checkpoints.directory(path))

    async def create_sampling_session(
        self, *, sampling_session_id: str, model_path: str | None = None, base_model: str | None = None
    ) -> None:
        """Open a sampler on saved sampler weights, or on a base model. Returns once the sampler holds the verified weights."""
        if model_path is None:
            if base_model is None:
                raise InvalidRequestError("a sampling client needs model_path or base_model")
            self.add(SamplingSession(sampling_session_id, base_model, await self._serve(base_model), None, None))
            return
        path = CheckpointPath.parse(model_path)
        if path.kind != "sampler_weights":
            raise InvalidRequestError(f"{model_path} is a training checkpoint; sample from a path that save_weights_for_sampler gave")
        manifest, _ = await asyncio.to_thread(self._checkpoints.read, path)
        if base_model is not None and base_model != manifest.base_model:
            raise CheckpointError(f"{model_path} belongs to {manifest.base_model}, not to {base_model}")
        served = await self._serve(manifest.base_model)
        ref = self.named_ref(path, manifest)
        await served.sync.acquire(ref, manifest.probe)
        self.add(SamplingSession(sampling_session_id, manifest.base_model, served, ref, model_path))

    async def release_sampling_session(self, sampling_session_id: str) -> None:
        """Idempotent. The version is unloaded when no other session and no request uses it."""
        session = self._open.pop(sampling_session_id, None)
        if session is not None and session.ref is not None:
            await session.served.sync.release(session.ref)

    def _sampler(self, sampling_session_id: str) -> SamplingSession:
        if sampling_session_id not in self._open:
            raise NotFoundError(f"no sampling session {sampling_session_id!r}; create a sampling client first")
        return self._open[sampling_session_id]

    async def get_sampler(self, sampling_session_id: str) -> GetSamplerResponse:
        session = self._sampler(sampling_session_id)
        return GetSamplerResponse(sampler_id=sampling_session_id, base_model=session.base_model, model_path=session.model_path)

    async def sample(
        self,
        *,
        sampling_session_id: str,
        prompt: ModelInput,
        num_samples: int,
        params: SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: TensorData | None = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
    ) -> SampleResponse:
        """Draws of the session's version, which stays loaded until they are done. Cancelling aborts them in the engine."""
        session = self._sampler(sampling_session_id)
        call = SampleCall(
            prompt=prompt,
            num_samples=num_samples,
            params=params,
            adapter=session.ref,
            include_prompt_logprobs=include_prompt_logprobs,
            topk_prompt_logprobs=topk_prompt_logprobs,
            topk_sample_logprobs=topk_sample_logprobs,
            target_prompt_logprobs=target_prompt_logprobs,
            prompt_alt_tokens_k=prompt_alt_tokens_k,
            prompt_logprobs_last_n=prompt_logprobs_last_n,
        )
        if session.ref is None:
            return await _answer(session.served, call)
        session.served.sync.hold(session.ref)
        try:
            return await _answer(session.served, call)
        finally:
            await asyncio.shield(session.served.sync.release(session.ref))


async def _answer(served: ServedModel, call: SampleCall) -> SampleResponse:
    """Draws from the sampler; scores of the prompt from the trainer where the sampler has no right ones."""
    if served.scores_prompt_of(call):  # asked once: versions come and go while the sampler works
        return await _sample(served, call)
    drawn = await _sample(served, without_prompt_scores(call))
    scores = await served.run_in_trainer(lambda: served.engines.trainer.score_prompt(call))
    return replace(
        drawn,
        prompt_logprobs_np=scores.logprobs_T,
        topk_prompt_logprobs_np=scores.topk,
        target_prompt_logprobs=scores.targets,
        prompt_alt_tokens=scores.alternatives,
    )


async def _sample(served: ServedModel, call: SampleCall) -> SampleResponse:
    """The sampler's answer. A request lost with its engine is sent again to the engine that replaces it: nothing of it had been answered,
    and a seed draws the same tokens again."""
    for _ in range(RESENDS):
        try:
            return await served.engines.sampler.sample(call)
        except EngineLostError as err:
            logger.warning("%s; sending the request again", err.message)
    return await served.engines.sampler.sample(call)


def without_prompt_scores(call: SampleCall) -> SampleCall:
    return replace(
        call,
        include_prompt_logprobs=False,
        topk_prompt_logprobs=0,
        target_prompt_logprobs=None,
        prompt_alt_tokens_k=0,
        prompt_logprobs_last_n=None,
    )
