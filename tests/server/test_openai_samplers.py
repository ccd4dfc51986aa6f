"""Which weights a `model` names, and how long their sampling sessions stay open; over a backend without a transformer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from ptlab.backend.access import Access
from ptlab.backend.backend import Backend
from ptlab.backend.checkpoints import CheckpointPath
from ptlab.backend.store import Store
from ptlab.engines.protocols import Engines
from ptlab.engines.scripted import ScriptedSampler, ScriptedTrainer
from ptlab.errors import BusyError, CheckpointError, NotFoundError, WeightSyncError
from ptlab.server.openai_samplers import OpenAISamplers
from ptlab.types import AdamParams, Datum, LoraConfig, ModelInput, TensorData

BASE = "scripted/unigram"


@dataclass
class World:
    backend: Backend
    sampler: ScriptedSampler
    samplers: OpenAISamplers
    model_id: str
    seq_id: int = 0

    async def step(self) -> None:
        """One optimizer step that changes the weights."""
        values = {"target_tokens": TensorData(data=[1, 2], dtype="int64", shape=[2])}
        values["weights"] = TensorData(data=[1.0, 1.0], dtype="float32", shape=[2])
        datum = Datum(model_input=ModelInput.from_ints([0, 1]), loss_fn_inputs=values)
        await self.backend.forward_backward(model_id=self.model_id, seq_id=self.next(), data=[datum], loss_fn="cross_entropy")
        await self.backend.optim_step(model_id=self.model_id, seq_id=self.next(), adam=AdamParams(learning_rate=0.5))

    async def save(self, name: str) -> str:
        saved = await self.backend.save_weights_for_sampler(model_id=self.model_id, seq_id=self.next(), name=name)
        return saved.path

    def next(self) -> int:
        self.seq_id += 1
        return self.seq_id

    def paths(self) -> list[str | None]:
        sampling = self.backend.sampling
        return [sampling.get(session_id).model_path for session_id in sampling.ids_of("openai")]

    async def delete(self, path: str) -> None:
        run, checkpoint = path.removeprefix("tinker://").split("/", 1)
        await self.backend.catalog.delete_checkpoint(run, checkpoint)


def in_world(tmp_path: Path, test: Callable[[World], Awaitable[None]]) -> None:
    async def run() -> None:
        sampler, store = ScriptedSampler(), Store.open(None)
        backend = Backend(
            data_dir=tmp_path / "data",
            scratch_dir=tmp_path / "scratch",
            open_engines=lambda _: Engines(trainer=ScriptedTrainer(), sampler=sampler, tokenizer=None),
            on_metrics=lambda _: None,
            base_models=[BASE],
            store=store,
        )
        session_id = await backend.create_session(owner="alice")
        model_id = await backend.create_model(session_id=session_id, model_seq_id=0, base_model=BASE, lora=LoraConfig(rank=1))
        try:
            await test(World(backend, sampler, OpenAISamplers(backend, Access(store), most_per_owner=2), model_id))
        finally:
            await backend.close()

    asyncio.run(run())


def test_many_who_ask_at_once_open_one_session(tmp_path: Path) -> None:
    async def test(w: World) -> None:
        path = await w.save("one")

        async def ask() -> str:
            async with w.samplers.using("alice", path) as opened:
                await asyncio.sleep(0.01)
                return opened.sampling_session_id

        assert len(set(await asyncio.gather(*(ask() for _ in range(20))))) == 1
        assert w.paths() == [path]

    in_world(tmp_path, test)


def test_owners_do_not_share_sessions(tmp_path: Path) -> None:
    async def test(w: World) -> None:
        async with w.samplers.using("alice", BASE) as hers, w.samplers.using("bob", BASE) as his:
            assert hers.sampling_session_id != his.sampling_session_id
            assert hers.fingerprint == his.fingerprint == "ptlab-base"
            assert w.backend.sampling.get(hers.sampling_session_id).owner == "alice"
        assert (w.samplers.num_open("alice"), w.samplers.num_open("bob")) == (1, 1)

    in_world(tmp_path, test)


def test_an_opening_that_failed_is_tried_again(tmp_path: Path) -> None:
    async def test(w: World) -> None:
        first = await w.save("one")
        await w.step()
        await w.save("two")  # lets go of the first, so that the next user loads it
        good, w.sampler.load = w.sampler.load, lambda ref: None
        with pytest.raises(WeightSyncError):
            async with w.samplers.using("alice", first):
                pass
        assert w.samplers.num_open("alice") == 0
        w.sampler.load = good
        async with w.samplers.using("alice", first) as opened:
            assert opened.version == 0
            assert opened.fingerprint.startswith("ptlab-step0-")

    in_world(tmp_path, test)


def test_a_path_written_anew_is_another_version_for_the_next_request(tmp_path: Path) -> None:
    async def test(w: World) -> None:
        path = await w.save("one")
        async with w.samplers.using("alice", path) as before:
            await w.delete(path)
            await w.step()
            assert await w.save("one") == path
            async with w.samplers.using("alice", path) as after:
                assert (before.version, after.version) == (0, 1)
                assert before.fingerprint != after.fingerprint
                ref = w.backend.sampling.get(before.sampling_session_id).ref
                assert ref is not None
                assert ref.version == 0, "who is in the middle of it goes on with the old one"
        await w.delete(path)
        with pytest.raises(NotFoundError):
            async with w.samplers.using("alice", path):
                pass

    in_world(tmp_path, test)


def test_expired_and_damaged_checkpoints_are_not_served(tmp_path: Path) -> None:
    async def test(w: World) -> None:
        path = await w.save("one")
        checkpoints = w.backend.models.checkpoints
        async with w.samplers.using("alice", path):
            pass
        checkpoints.update(CheckpointPath.parse(path), expires_at=datetime.now(UTC) - timedelta(seconds=1))
        with pytest.raises(NotFoundError, match="expired"):
            async with w.samplers.using("alice", path):
                pass
        other = await w.save("two")
        (checkpoints.directory(CheckpointPath.parse(other)) / "adapter_model.safetensors").write_bytes(b"x")
        with pytest.raises(CheckpointError, match="damaged"):
            async with w.samplers.using("alice", other):
                pass

    in_world(tmp_path, test)


def test_what_is_in_use_is_not_closed_for_another(tmp_path: Path) -> None:
    async def test(w: World) -> None:
        paths = [await w.save(name) for name in ("a", "b", "c")]
        async with w.samplers.using("alice", paths[0]), w.samplers.using("alice", paths[1]):
            with pytest.raises(BusyError, match="2 models"):
                async with w.samplers.using("alice", paths[2]):
                    pass
            assert w.paths() == paths[:2]
            async with w.samplers.using("alice", paths[1]):  # one that is open needs no room
                pass
        async with w.samplers.using("alice", paths[2]):
            assert w.paths() == paths[1:]
        await w.samplers.close()
        assert w.paths() == []

    in_world(tmp_path, test)


def test_idle_sessions_and_those_of_an_earlier_process_are_closed(tmp_path: Path) -> None:
    async def test(w: World) -> None:
        sampling = w.backend.sampling
        await sampling.create_sampling_session(sampling_session_id="openai:sample:earlier", base_model=BASE, owner="alice")
        await sampling.create_sampling_session(sampling_session_id="other:sample:1", base_model=BASE, owner="alice")
        path = await w.save("one")
        async with w.samplers.using("alice", path):
            assert w.paths() == [path]
        assert sampling.is_open("other:sample:1")
        brief = OpenAISamplers(w.backend, Access(w.backend.store), idle_s=0.0)
        async with brief.using("alice", path) as first:
            pass
        async with brief.using("bob", BASE):
            assert not sampling.is_open(first.sampling_session_id)

    in_world(tmp_path, test)


def test_a_request_given_up_while_its_session_opens_leaves_the_session_usable(tmp_path: Path) -> None:
    async def test(w: World) -> None:
        path = await w.save("one")

        async def ask() -> None:
            async with w.samplers.using("alice", path):
                await asyncio.sleep(10)

        asked = asyncio.create_task(ask())
        await asyncio.sleep(0)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        async with w.samplers.using("alice", path) as opened:
            assert opened.version == 0
        assert w.paths() == [path]
        await w.samplers.close()
        assert w.paths() == []

    in_world(tmp_path, test)
