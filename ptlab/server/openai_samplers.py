"""Which weights an OpenAI `model` names, and the sampling sessions kept open on them.

`model` is a base model of this server or `tinker://<run>/sampler_weights/<name>`; nothing else is guessed at. A path is looked up for every
request: one that was deleted, has expired or was written anew answers as it is now, not as a session opened earlier remembers it.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

from ptlab.backend.access import Access
from ptlab.backend.backend import Backend
from ptlab.backend.checkpoints import CheckpointPath, Manifest
from ptlab.errors import BusyError, EngineError, InvalidRequestError, NotFoundError

BASE_FINGERPRINT = "ptlab-base"
SCHEME = "tinker://"
SESSION = "openai"
"""The sampling sessions of this face are openai:sample:<uuid>; no client session has this name."""


@dataclass(frozen=True, slots=True)
class OpenSampler:
    """A sampling session and what it samples from."""

    sampling_session_id: str
    base_model: str
    version: int
    """Optimizer steps behind the weights; 0 also of the base model."""
    fingerprint: str
    """`ptlab-step<version>-<content>` or `ptlab-base`: for OpenAI's `system_fingerprint`."""


@dataclass(slots=True, eq=False)
class _Kept:
    opening: asyncio.Task[OpenSampler]
    num_users: int = 0
    last_used: float = field(default_factory=time.monotonic)


Key = tuple[str, str]
"""(model as asked for, name of the version)."""


class OpenAISamplers:
    """Sampling sessions by owner and model, the least recently used closed first. Belongs to the backend's event loop.

    Args:
        most_per_owner: sessions an owner has open at once; each holds an adapter in the sampler.
        idle_s: a session unused for so long is closed when the next request comes.
    """

    def __init__(self, backend: Backend, access: Access, *, most_per_owner: int = 8, idle_s: float = 1800.0) -> None:
        self._backend = backend
        self._access = access
        self._most_per_owner = most_per_owner
        self._idle_s = idle_s
        self._kept: dict[str, dict[Key, _Kept]] = {}
        """By owner; the order is that of last use."""
        self._earlier_are_gone = False

    @asynccontextmanager
    async def using(self, owner: str, model: str) -> AsyncIterator[OpenSampler]:
        """The sampler of `model`; it stays open while in use.

        Raises: NotFoundError if there is no such model for this owner; InvalidRequestError if the path cannot be sampled from; BusyError if
        the owner samples from too many models at once.
        """
        key = (model, await self._version_name(owner, model))
        await self._close_earlier()
        await self._close_idle()
        kept = self._keep(owner, key)
        try:
            await self._make_room(owner)
            yield await asyncio.shield(kept.opening)
        finally:
            kept.num_users -= 1
            kept.last_used = time.monotonic()

    async def close(self) -> None:
        """Release every session."""
        for owner, mine in list(self._kept.items()):
            for key, kept in list(mine.items()):
                await self._close(owner, key, kept)

    def num_open(self, owner: str) -> int:
        return len(self._kept.get(owner, {}))

    async def base_models(self) -> list[str]:
        capabilities = await self._backend.catalog.get_server_capabilities()
        return [model.model_name for model in capabilities.supported_models if model.model_name]

    async def _version_name(self, owner: str, model: str) -> str:
        """Of the weights that `model` names at this moment."""
        if not model.startswith(SCHEME):
            names = await self.base_models()
            if model not in names:
                raise NotFoundError(
                    f"the model {model!r} is not served here; there are {', '.join(names) or 'none'}, and tinker://<run>/sampler_weights/<name>"
                )
            return ""
        path = CheckpointPath.parse(model)
        if path.kind != "sampler_weights":
            raise InvalidRequestError(
                f"{model} cannot be sampled from; name a path that save_weights_for_sampler gave (.../sampler_weights/...)"
            )
        manifest = await asyncio.to_thread(self._manifest, path)
        await self._access.check_path(owner, model, manifest is not None and manifest.public)
        if manifest is None:
            raise NotFoundError(f"there is no checkpoint {model}, or it has expired")
        return self._backend.sampling.named_ref(path, manifest).name

    def _manifest(self, path: CheckpointPath) -> Manifest | None:
        """None if there is no such checkpoint, or none any more."""
        checkpoints = self._backend.models.checkpoints
        if not checkpoints.exists(path):
            return None
        manifest = checkpoints.manifest(path)
        return None if manifest.expires_at is not None and manifest.expires_at < datetime.now(UTC) else manifest

    def _keep(self, owner: str, key: Key) -> _Kept:
        """The entry of a model, made if need be, with one more user. Raises: BusyError if there is no room for it."""
        mine = self._kept.setdefault(owner, {})
        kept = mine.pop(key, None)
        if kept is None:
            if len(mine) >= self._most_per_owner and all(other.num_users for other in mine.values()):
                raise BusyError(f"this key is sampling from {len(mine)} models at this moment and no more fit; try again later")
            kept = _Kept(asyncio.create_task(self._open(owner, *key)))
            kept.opening.add_done_callback(lambda task: self._forget(owner, key, kept) if task.cancelled() or task.exception() else None)
        kept.num_users += 1
        mine[key] = kept  # the newest
        return kept

    def _forget(self, owner: str, key: Key, kept: _Kept) -> None:
        mine = self._kept.get(owner, {})
        if mine.get(key) is kept:
            del mine[key]
            if not mine:
                del self._kept[owner]

    async def _make_room(self, owner: str) -> None:
        """Close the owner's least recently used sessions until there are few enough, or all are in use."""
        while len(mine := self._kept.get(owner, {})) > self._most_per_owner:
            oldest = next((key for key, kept in mine.items() if not kept.num_users), None)
            if oldest is None:
                return
            await self._close(owner, oldest, mine[oldest])

    async def _open(self, owner: str, model: str, version_name: str) -> OpenSampler:
        sampling, session_id = self._backend.sampling, f"{SESSION}:sample:{uuid.uuid4()}"
        if not version_name:
            await sampling.create_sampling_session(sampling_session_id=session_id, base_model=model, owner=owner)
            return OpenSampler(session_id, model, 0, BASE_FINGERPRINT)
        await sampling.create_sampling_session(sampling_session_id=session_id, model_path=model, owner=owner)
        session = sampling.get(session_id)
        if session.ref is None or session.ref.name != version_name:
            await sampling.release_sampling_session(session_id)
            raise EngineError(f"{model} was written anew while it was opened; ask again", engine="openai", operation="open")
        content = version_name.rpartition("#")[2]
        return OpenSampler(session_id, session.base_model, session.ref.version, f"ptlab-step{session.ref.version}-{content}")

    async def _close_earlier(self) -> None:
        """Sessions of an earlier process, which the backend has kept for their clients; this face makes its own."""
        if not self._earlier_are_gone:
            self._earlier_are_gone = True
            for session_id in self._backend.sampling.ids_of(SESSION):
                await self._backend.sampling.release_sampling_session(session_id)

    async def _close_idle(self) -> None:
        now = time.monotonic()
        for owner, mine in list(self._kept.items()):
            for key, kept in list(mine.items()):
                if not kept.num_users and now - kept.last_used > self._idle_s:
                    await self._close(owner, key, kept)

    async def _close(self, owner: str, key: Key, kept: _Kept) -> None:
        """Requests in flight on its version finish first: they are its users in the sampler too."""
        self._forget(owner, key, kept)
        await asyncio.wait([kept.opening])
        if not kept.opening.cancelled() and kept.opening.exception() is None:
            await self._backend.sampling.release_sampling_session(kept.opening.result().sampling_session_id)
