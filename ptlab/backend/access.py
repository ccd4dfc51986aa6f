"""Who is calling, and what belongs to whom.

A key stands for an owner, and the owner is the key's name: what was made with a key belongs to its name, so a new key under the name of
a revoked one goes on with it. As long as no key was ever created every caller is "local"; a key named "local" goes on with what was made
then. What belongs to somebody else is answered in the same words as what is not there.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable

from ptlab.backend.checkpoints import CheckpointPath
from ptlab.backend.records import LOCAL_OWNER
from ptlab.backend.store import KeyRow, Store
from ptlab.errors import InvalidRequestError, NotFoundError

KEY_PREFIX = "tml-"  # the SDK refuses a key that begins otherwise
KEY_BYTES = 32
KEYS_FRESH_S = 1.0
"""A key that another process (`ptlab keys`) creates or revokes counts here after this time at most."""
MAX_KNOWN_OWNERS = 1 << 16
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]{0,63}")


class Access:
    """Keys and ownership, read from the store. Belongs to the store's event loop.

    Args: now_s: seconds of a clock that only goes forward.
    """

    def __init__(self, store: Store, now_s: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._now_s = now_s
        self._keys: list[KeyRow] | None = None  # as read at _read_s
        self._read_s = 0.0
        self._owners: dict[tuple[str, str], str] = {}  # (kind, id) -> owner, which never changes

    # Keys

    async def create_key(self, name: str) -> str:
        """A new key; only its SHA-256 is kept, so it cannot be shown again.

        Raises: InvalidRequestError if the name is not allowed, or a key in use has it.
        """
        if not _NAME.fullmatch(name):
            raise InvalidRequestError(
                f"key name {name!r} is not allowed: use letters, digits and _ . @ + - (first a letter, digit or _), at most 64 characters"
            )
        key = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
        key_id = f"key-{secrets.token_hex(4)}"
        await self._store.add_key(KeyRow(key_id=key_id, name=name, owner=name, sha256=_digest(key), created=time.time()))
        self._keys = None
        return key

    async def list_keys(self) -> list[KeyRow]:
        """All that were ever created, revoked ones too, in order."""
        return await self._store.keys()

    async def revoke_key(self, key_id_or_name: str) -> KeyRow:
        """Nobody enters with it any more. Raises: NotFoundError if no key in use has this id or name."""
        revoked = await self._store.revoke_key(key_id_or_name)
        self._keys = None
        return revoked

    async def has_keys(self) -> bool:
        """Whether a key was ever created. If all were revoked, nobody may enter."""
        return bool(await self._known_keys())

    async def owner_of_key(self, key: str) -> str | None:
        """The owner the key stands for; None if it is unknown or revoked; "local" as long as there was never a key."""
        keys = await self._known_keys()
        if not keys:
            return LOCAL_OWNER
        presented = _digest(key)
        owner = None
        for row in keys:  # every row, whichever fits: the time says nothing about the keys
            fits = hmac.compare_digest(row.sha256, presented)
            if fits and row.revoked is None:
                owner = row.owner
        return owner

    async def _known_keys(self) -> list[KeyRow]:
        if self._keys is None or self._now_s() - self._read_s >= KEYS_FRESH_S:
            read_s = self._now_s()
            self._keys, self._read_s = await self._store.keys(), read_s
        return self._keys

    # Ownership

    async def check_session(self, owner: str, session_id: str) -> None:
        """Raises: NotFoundError unless the session is there and the caller's."""
        if await self._owner_of("session", session_id) != owner:
            raise NotFoundError(f"no session {session_id!r}")

    async def check_model(self, owner: str, model_id: str) -> None:
        """Raises: NotFoundError unless the model is there and the caller's."""
        if await self._owner_of("model", model_id) != owner:
            raise NotFoundError(f"no model {model_id!r}; to go on with a saved one use create_training_client_from_state(path)")

    async def check_sampler(self, owner: str, sampling_session_id: str) -> None:
        """Raises: NotFoundError unless the sampling session is there and the caller's."""
        if await self._owner_of("sampler", sampling_session_id) != owner:
            raise NotFoundError(f"no sampling session {sampling_session_id!r}; create a sampling client first")

    async def check_path(self, owner: str, tinker_path: str, public: bool) -> None:
        """Whether the caller may use a checkpoint: it is the caller's, or published. Says nothing of whether the checkpoint exists.

        What was saved by a model that the store does not know (an in-process run with the same directory) is "local"'s.
        Args: public: whether the checkpoint is published; False if it does not exist.
        Raises: InvalidRequestError if it is not a path; NotFoundError.
        """
        model_id = CheckpointPath.parse(tinker_path).model_id
        if not public and (await self._owner_of("model", model_id) or LOCAL_OWNER) != owner:
            raise NotFoundError(f"no checkpoint {tinker_path}; nothing was saved under model id {model_id}")

    async def _owner_of(self, kind: str, name: str) -> str | None:
        """None if there is no such thing. What was found once is remembered: a busy store must not slow every request down."""
        owner = self._owners.get((kind, name))
        if owner is None:
            owner = await self._read_owner(kind, name)
            if owner is not None:
                if len(self._owners) >= MAX_KNOWN_OWNERS:
                    self._owners.clear()
                self._owners[kind, name] = owner
        return owner

    async def _read_owner(self, kind: str, name: str) -> str | None:
        if kind == "session":
            session = await self._store.session(name)
            return session.owner if session else None
        if kind == "model":
            model = await self._store.model(name)
            return model.owner if model else None
        sampler = await self._store.sampler(name)
        return sampler.owner if sampler else None


def _digest(key: str) -> bytes:
    """SHA-256 is enough: a key has 256 random bits, there is nothing to guess. A header may hold any characters."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
