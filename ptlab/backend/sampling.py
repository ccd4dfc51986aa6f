"""Sampling sessions: one per sampling client, each on one base model and one adapter version or none."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ptlab.backend.checkpoints import CheckpointPath, Checkpoints, Manifest, Probe
from ptlab.backend.records import LOCAL_OWNER
from ptlab.backend.sequences import Sequences
from ptlab.backend.served import ServedModel
from ptlab.backend.store import SamplerRow, Store
from ptlab.engines.protocols import AdapterRef, SampleCall
from ptlab.errors import CheckpointError, EngineError, EngineLostError, InvalidRequestError, NotFoundError
from ptlab.types import GetSamplerResponse, ModelInput, SampleResponse, SamplingParams, TensorData

RESENDS = 2
logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class SamplingSession:
    """What a sampling client samples from; that never changes. Whether the sampler holds it just now may."""

    sampling_session_id: str
    base_model: str
    owner: str = LOCAL_OWNER
    ref: AdapterRef | None = None
    """None = the base model."""
    probe: Probe | None = None
    """What the version is verified with when it is loaded again."""
    model_path: str | None = None
    loaded: bool = False
    last_used: float = field(default_factory=time.monotonic)
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def ephemeral(self) -> bool:
        """The version belongs to this session alone: its files go with it."""
        return self.ref is not None and self.model_path is None


class SamplingSessions:
    """The open sampling sessions. Belongs to the backend's event loop.

    Args:
        serve: the engines of a base model by name, opened if need be.
    """

    def __init__(
        self, checkpoints: Checkpoints, store: Store, sequences: Sequences, serve: Callable[[str], Awaitable[ServedModel]]
    ) -> None:
        self._checkpoints = checkpoints
        self._store = store
        self._sequences = sequences
        self._serve = serve
        self._open: dict[str, SamplingSession] = {}
        self._closing = False

    async def add(self, session: SamplingSession) -> None:
        """Open a session; if it is `loaded`, it is already counted as a user of its version."""
        version = None
        if session.ref is not None:
            version = {"name": session.ref.name, "version": session.ref.version, "path": str(session.ref.path)}
            version["probe"] = session.probe.model_dump() if session.probe else None
        self._open[session.sampling_session_id] = session
        await self._store.add_sampler(
            SamplerRow(
                sampling_session_id=session.sampling_session_id,
                session_id=session.sampling_session_id.partition(":sample:")[0],
                owner=session.owner,
                base_model=session.base_model,
                model_path=session.model_path,
                version=version,
                created=time.time(),
                last_used=time.time(),
                client_counter=0,
            )
        )

    def restore(self, row: SamplerRow) -> None:
        """A session of an earlier process; its version is loaded, and verified, when somebody samples."""
        self._open[row.sampling_session_id] = SamplingSession(
            sampling_session_id=row.sampling_session_id,
            base_model=row.base_model,
            owner=row.owner,
            ref=_ref(row.version),
            probe=Probe.model_validate(row.version["probe"]) if row.version and row.version["probe"] else None,
            model_path=row.model_path,
        )

    def forget_all(self) -> None:
        """Drop every session without unloading anything: the engines are about to end. Later releases find nothing to do."""
        self._closing = True
        self._open.clear()

    def is_open(self, sampling_session_id: str) -> bool:
        return sampling_session_id in self._open

    def ids_of(self, session_id: str) -> list[str]:
        """Sampling sessions that a client session has open."""
        return [sampler_id for sampler_id in self._open if sampler_id.startswith(f"{session_id}:sample:")]

    def named_ref(self, path: CheckpointPath, manifest: Manifest) -> AdapterRef:
        """The version that a saved sampler checkpoint holds."""
        # the content is part of the name: a path deleted and written anew is another version
        content = hashlib.sha256("".join(file.sha256 for file in manifest.files.values()).encode()).hexdigest()[:12]
        return AdapterRef(name=f"{path}#{content}", version=manifest.step, path=self._checkpoints.directory(path))

    async def create_sampling_session(
        self, *, sampling_session_id: str, model_path: str | None = None, base_model: str | None = None, owner: str = LOCAL_OWNER
    ) -> None:
        """Open a sampler on saved sampler weights, or on a base model. Returns once the sampler holds the verified weights."""
        if sampling_session_id in self._open:
            known = self._open[sampling_session_id]
            if known.model_path == model_path and base_model in (None, known.base_model):
                return  # the same request again
            raise InvalidRequestError(f"sampling session {sampling_session_id} exists already, on {known.model_path or known.base_model}")
        if model_path is None:
            if base_model is None:
                raise InvalidRequestError("a sampling client needs model_path or base_model")
            await self._serve(base_model)
            await self.add(SamplingSession(sampling_session_id=sampling_session_id, base_model=base_model, owner=owner))
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
        await self.add(
            SamplingSession(
                sampling_session_id=sampling_session_id,
                base_model=manifest.base_model,
                owner=owner,
                ref=ref,
                probe=manifest.probe,
                model_path=model_path,
                loaded=True,
            )
        )

    async def release_sampling_session(self, sampling_session_id: str) -> None:
        """Idempotent. The version is unloaded when no other session and no request uses it."""
        session = self._open.pop(sampling_session_id, None)
        if session is None:
            return
        await self._store.remove_samplers([sampling_session_id])
        async with session.loading:
            if session.loaded and session.ref is not None:
                session.loaded = False
                try:
                    await (await self._serve(session.base_model)).sync.release(session.ref, delete_files=session.ephemeral)
                except EngineError:
                    if not self._closing:  # else the engine has ended while this was on its way, and its versions with it
                        raise
            elif session.ephemeral and session.ref is not None:
                await asyncio.to_thread(shutil.rmtree, session.ref.path, ignore_errors=True)  # never loaded since a restart

    async def unload_idle(self, idle_s: float) -> int:
        """Let the sampler forget versions that nobody has sampled from for so long; they are loaded again on demand. Returns how many."""
        unloaded = 0
        for session in list(self._open.values()):
            async with session.loading:
                if session.loaded and session.ref is not None and time.monotonic() - session.last_used > idle_s:
                    session.loaded = False
                    await (await self._serve(session.base_model)).sync.release(session.ref)
                    unloaded += 1
        return unloaded

    async def _hold(self, session: SamplingSession, served: ServedModel) -> None:
        """One more request uses the session's version, which is loaded again if it is not."""
        assert session.ref is not None
        async with session.loading:
            if not session.loaded:
                if not session.ref.path.exists():
                    raise NotFoundError(
                        f"the weights of sampling session {session.sampling_session_id} are gone from {session.ref.path}; "
                        f"save them again and make a new sampling client"
                    )
                await served.sync.acquire(session.ref, session.probe)
                session.loaded = True
            served.sync.hold(session.ref)

    def get(self, sampling_session_id: str) -> SamplingSession:
        """Raises: NotFoundError."""
        if sampling_session_id not in self._open:
            raise NotFoundError(f"no sampling session {sampling_session_id!r}; create a sampling client first")
        return self._open[sampling_session_id]

    async def get_sampler(self, sampling_session_id: str) -> GetSamplerResponse:
        session = self.get(sampling_session_id)
        return GetSamplerResponse(sampler_id=sampling_session_id, base_model=session.base_model, model_path=session.model_path)

    async def join_sampling_session(self, sampling_session_id: str) -> int:
        """A number for a copy of the client in another process: 1, 2, 3 ... Copies use seq_ids of their own ranges."""
        self.get(sampling_session_id)
        return await self._store.next_client_counter(sampling_session_id)

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
        sequence_ids: Sequence[str] = (),
        record_stability_info: bool = False,
    ) -> SampleResponse:
        """Draws of the session's version, which stays loaded until they are done. Cancelling aborts them in the engine.

        Args:
            sequence_ids: names of the sequences to come, num_samples of them; empty = the sampler makes some.
            record_stability_info: remember the sequences for a day, for the loss stable_reinforce.
        """
        session = self.get(sampling_session_id)
        session.last_used = time.monotonic()
        served = await self._serve(session.base_model)
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
            sequence_ids=sequence_ids,
        )
        if session.ref is None:
            response = await _answer(served, call)
        else:
            await self._hold(session, served)
            try:
                response = await _answer(served, call)
            finally:
                session.last_used = time.monotonic()
                await asyncio.shield(served.sync.release(session.ref))
        if record_stability_info:
            await self._sequences.record(session.owner, prompt.to_ints(), response, session.ref.version if session.ref else 0)
        return response


def _ref(version: dict[str, Any] | None) -> AdapterRef | None:
    return None if version is None else AdapterRef(name=version["name"], version=version["version"], path=Path(version["path"]))


async def _answer(served: ServedModel, call: SampleCall) -> SampleResponse:
    """Draws from the sampler; scores of the prompt from the trainer where the sampler has no right ones."""
    if served.scores_prompt_of(call):  # asked once: versions come and go while the sampler works
        return await _sample(served, call)
    drawn = await _sample(served, without_prompt_scores(call))
    if call.adapter is not None and not call.adapter.path.exists():  # the sampler holds the weights still, but no longer the disk
        raise NotFoundError(f"the weights of {call.adapter.name} were deleted; the trainer cannot score a prompt under them")
    scores = await served.run_in_trainer(lambda: served.engines.trainer.score_prompt(call), urgent=True)
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
