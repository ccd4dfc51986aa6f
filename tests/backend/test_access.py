from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from ptlab.backend import access as access_module
from ptlab.backend.access import KEYS_FRESH_S, Access
from ptlab.backend.records import LOCAL_OWNER
from ptlab.backend.store import ModelRow, SamplerRow, SessionRow, Store
from ptlab.errors import InvalidRequestError, NotFoundError


def with_access(use: Callable[[Access, Store], Awaitable[None]]) -> None:
    async def run(store: Store) -> None:
        await use(Access(store), store)

    store = Store.open(None)
    try:
        asyncio.run(run(store))
    finally:
        store.close()


async def add_things(store: Store, owner: str) -> None:
    """A session, a model and a sampling session of `owner`, all with that name in their ids."""
    name = f"{owner}-s"
    await store.add_session(SessionRow(session_id=name, owner=owner, created=1.0, last_seen=1.0))
    await store.add_model(ModelRow(model_id=f"{name}:train:0", session_id=name, owner=owner, base_model="b", lora={}, created=1.0))
    await store.add_sampler(
        SamplerRow(sampling_session_id=f"{name}:sample:0", session_id=name, owner=owner, base_model="b", created=1.0, last_used=1.0)
    )


def test_without_keys_everybody_is_local_and_with_one_nobody_else_is() -> None:
    async def use(access: Access, store: Store) -> None:
        assert not await access.has_keys()
        assert await access.owner_of_key("tml-anything") == await access.owner_of_key("") == LOCAL_OWNER
        ann, bob = await access.create_key("ann"), await access.create_key("bob")
        assert await access.has_keys()
        assert [await access.owner_of_key(key) for key in (ann, bob)] == ["ann", "bob"]
        for wrong in ("", "tml-anything", ann[:-1], ann + "x", ann.upper(), "ann", "tml-\ud800é\0"):
            assert await access.owner_of_key(wrong) is None

    with_access(use)


def test_a_key_is_long_random_and_kept_as_its_hash_only() -> None:
    async def use(access: Access, store: Store) -> None:
        keys = [await access.create_key(f"n{i}") for i in range(20)]
        assert len(set(keys)) == 20
        assert all(key.startswith("tml-") and len(key) == 4 + 43 for key in keys)  # 32 bytes in base64
        rows = await access.list_keys()
        assert [row.sha256 for row in rows] == [hashlib.sha256(key.encode()).digest() for key in keys]
        assert not any(key in repr(rows) for key in keys)
        assert len({row.key_id for row in rows}) == 20

    with_access(use)


def test_a_revoked_key_lets_nobody_in_and_its_name_goes_on_with_a_new_one() -> None:
    async def use(access: Access, store: Store) -> None:
        old = await access.create_key("ann")
        assert await access.owner_of_key(old) == "ann"
        assert (await access.revoke_key("ann")).revoked is not None
        assert await access.owner_of_key(old) is None
        assert await access.owner_of_key("tml-anything") is None  # not local again: there were keys
        assert await access.has_keys()
        new = await access.create_key("ann")
        assert [await access.owner_of_key(key) for key in (old, new)] == [None, "ann"]
        key_id = (await access.list_keys())[1].key_id
        await access.revoke_key(key_id)
        assert await access.owner_of_key(new) is None
        with pytest.raises(NotFoundError):
            await access.revoke_key("nobody")

    with_access(use)


@pytest.mark.parametrize("name", ["", "a b", "../x", "-rf", "ü", "n" * 65, "a\n"])
def test_a_key_name_that_could_be_misread_is_refused(name: str) -> None:
    async def use(access: Access, store: Store) -> None:
        with pytest.raises(InvalidRequestError, match="is not allowed: use letters"):
            await access.create_key(name)
        assert not await access.has_keys()

    with_access(use)


def test_every_stored_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def counted(stored: bytes, presented: bytes) -> bool:
        compared.append(stored)
        return compare_digest(stored, presented)

    compare_digest = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", counted)

    async def use(access: Access, store: Store) -> None:
        first = await access.create_key("a")
        for name in ("b", "c"):
            await access.create_key(name)
        await access.owner_of_key(first)
        assert compared == [row.sha256 for row in await store.keys()]

    with_access(use)


def test_keys_of_another_process_count_within_a_second(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store.sqlite")
    other = Store.open(tmp_path / "store.sqlite", beside_server=True)
    clock = [100.0]

    async def use() -> None:
        access, elsewhere = Access(store, now_s=lambda: clock[0]), Access(other)
        assert await access.owner_of_key("") == LOCAL_OWNER
        key = await elsewhere.create_key("ann")
        assert await access.owner_of_key("") == LOCAL_OWNER  # read a moment ago
        clock[0] += KEYS_FRESH_S
        assert await access.owner_of_key("") is None
        assert await access.owner_of_key(key) == "ann"
        await elsewhere.revoke_key("ann")
        clock[0] += KEYS_FRESH_S
        assert await access.owner_of_key(key) is None

    try:
        asyncio.run(use())
    finally:
        other.close()
        store.close()


def test_what_is_anothers_is_answered_like_what_is_not_there() -> None:
    async def use(access: Access, store: Store) -> None:
        await add_things(store, "ann")
        await add_things(store, "bob")
        checks = [
            (access.check_session, "{}-s"),
            (access.check_model, "{}-s:train:0"),
            (access.check_sampler, "{}-s:sample:0"),
        ]
        for check, name in checks:
            for _ in range(2):  # read, then remembered
                await check("ann", name.format("ann"))
                await check("bob", name.format("bob"))
                errors = {}
                for target in ("bob", "nobody"):
                    with pytest.raises(NotFoundError) as caught:
                        await check("ann", name.format(target))
                    errors[target] = caught.value.message
                assert errors["bob"].replace("bob", "nobody") == errors["nobody"]
        with pytest.raises(NotFoundError):
            await access.check_model("ann", "ann-s")  # a session's id is no model's
        with pytest.raises(InvalidRequestError):
            await access.check_session("ann", "\ud800")

    with_access(use)


def test_a_checkpoint_is_its_owners_unless_it_is_published() -> None:
    async def use(access: Access, store: Store) -> None:
        await add_things(store, "ann")
        path = "tinker://{}-s:train:0/sampler_weights/x"
        await access.check_path("ann", path.format("ann"), public=False)
        await access.check_path("bob", path.format("ann"), public=True)
        errors = []
        for model in ("ann", "eve"):
            with pytest.raises(NotFoundError) as caught:
                await access.check_path("bob", path.format(model), public=False)
            errors.append(caught.value.message.replace(model, "?"))
        assert (
            errors[0] == errors[1] == "no checkpoint tinker://?-s:train:0/sampler_weights/x; nothing was saved under model id ?-s:train:0"
        )
        with pytest.raises(NotFoundError):
            await access.check_path(LOCAL_OWNER, path.format("ann"), public=False)
        await access.check_path(LOCAL_OWNER, path.format("eve"), public=False)  # made in-process: the store knows nothing of it
        for wrong in ("tinker://../weights/x", "/etc/passwd", "tinker://m/weights/.."):
            with pytest.raises(InvalidRequestError):
                await access.check_path("ann", wrong, public=True)

    with_access(use)


def test_what_is_not_there_yet_is_not_remembered_as_missing() -> None:
    async def use(access: Access, store: Store) -> None:
        with pytest.raises(NotFoundError):
            await access.check_model("ann", "ann-s:train:0")
        await add_things(store, "ann")
        await access.check_model("ann", "ann-s:train:0")

    with_access(use)


def test_an_owner_is_read_once() -> None:
    async def use(access: Access, store: Store) -> None:
        await add_things(store, "ann")
        await access.check_model("ann", "ann-s:train:0")
        store.close()
        await access.check_model("ann", "ann-s:train:0")
        with pytest.raises(NotFoundError):
            await access.check_model("bob", "ann-s:train:0")

    with_access(use)


def test_the_memory_of_owners_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_module, "MAX_KNOWN_OWNERS", 2)

    async def use(access: Access, store: Store) -> None:
        for owner in ("ann", "bob", "eve"):
            await add_things(store, owner)
        for owner in ("ann", "bob", "eve", "ann"):
            await access.check_session(owner, f"{owner}-s")
            assert len(access._owners) <= 2
        with pytest.raises(NotFoundError):
            await access.check_session("bob", "ann-s")

    with_access(use)
