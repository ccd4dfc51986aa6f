"""What a server does now and then: parks, unloads, forgets, goes on without numbers that never came; and nothing of it is noticed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from ptlab.backend.backend import Backend
from ptlab.backend.maintenance import Maintenance, Times
from ptlab.backend.requests import Answer, Request, RequestLimits, Requests
from ptlab.backend.store import Store
from ptlab.engines.protocols import Engines
from ptlab.engines.scripted import ScriptedSampler, ScriptedTrainer
from ptlab.errors import GoneError
from ptlab.types import AdamParams, LoraConfig, ModelInput, SamplingParams

Scenario = Callable[[Backend, Requests, str], Awaitable[None]]


def run(tmp_path: Path, scenario: Scenario) -> None:
    async def started() -> None:
        store = Store.open(tmp_path / "store.sqlite")
        backend = Backend(
            data_dir=tmp_path,
            scratch_dir=tmp_path / "versions",
            open_engines=lambda name: Engines(trainer=ScriptedTrainer(), sampler=ScriptedSampler(), tokenizer=None),
            on_metrics=lambda metrics: None,
            store=store,
        )

        async def execute(request: Request) -> Answer:
            await backend.optim_step(model_id=request.scope, seq_id=request.seq_id, adam=AdamParams())
            return Answer(kind="json", payload=b"{}")

        requests = Requests(backend, store, execute, RequestLimits())
        session_id = await backend.create_session()
        model_id = await backend.create_model(session_id=session_id, model_seq_id=0, base_model="m", lora=LoraConfig(rank=1))
        await scenario(backend, requests, model_id)
        await requests.close()
        await backend.close()

    asyncio.run(started())


def step(model_id: str, seq_id: int) -> Request:
    return Request(kind="optim_step", scope=model_id, seq_id=seq_id, owner="local", body=b"x", model_id=model_id)


def test_idle_models_are_parked_and_busy_ones_are_not(tmp_path: Path) -> None:
    async def scenario(backend: Backend, requests: Requests, model_id: str) -> None:
        idle, now = Times(park_after=3600.0), Times(park_after=0.0)
        await Maintenance(backend, requests, idle).once()
        assert not backend.models.get(model_id).parked
        waiting = await requests.accept(step(model_id, 2))  # number 1 has not come
        await Maintenance(backend, requests, now).once()
        assert not backend.models.get(model_id).parked
        await requests.wait(await requests.accept(step(model_id, 1)), "local", 5)
        await requests.wait(waiting, "local", 5)
        await Maintenance(backend, requests, now).once()
        assert backend.models.get(model_id).parked
        assert await requests.wait(await requests.accept(step(model_id, 3)), "local", 5) is not None

    run(tmp_path, scenario)


def test_a_number_that_never_comes_is_given_up_after_its_time_only(tmp_path: Path) -> None:
    async def scenario(backend: Backend, requests: Requests, model_id: str) -> None:
        waiting = await requests.accept(step(model_id, 3))
        patient = Maintenance(backend, requests, Times(gap_timeout=3600.0))
        for _ in range(3):
            await patient.once()
        assert await requests.wait(waiting, "local", 0.05) is None
        hasty = Maintenance(backend, requests, Times(gap_timeout=0.0))
        await hasty.once()  # sees the gap
        assert await requests.wait(waiting, "local", 0.05) is None
        await hasty.once()
        assert await requests.wait(waiting, "local", 5) is not None

    run(tmp_path, scenario)


def test_answers_and_samplers_go_after_their_time(tmp_path: Path) -> None:
    async def scenario(backend: Backend, requests: Requests, model_id: str) -> None:
        session_id = model_id.partition(":")[0]
        sampler_id = f"{session_id}:sample:0"
        await backend.save_weights_for_ephemeral_sampler(model_id=model_id, seq_id=1, sampling_session_id=sampler_id)
        request_id = await requests.accept(step(model_id, 2))
        await requests.wait(request_id, "local", 5)
        await requests.fetched(request_id)
        await Maintenance(backend, requests, Times()).once()
        assert await requests.wait(request_id, "local", 1) is not None
        short = Times(unload_sampler_after=0.0, keep_fetched=-1.0)
        await Maintenance(backend, requests, short).once()
        with pytest.raises(GoneError):
            await requests.wait(request_id, "local", 1)
        assert not backend.sampling.get(sampler_id).loaded
        assert list((tmp_path / "versions").iterdir()) != []  # unloaded, not deleted
        await backend.sampling.sample(
            sampling_session_id=sampler_id, prompt=ModelInput.from_ints([1]), num_samples=1, params=SamplingParams(max_tokens=1)
        )
        await Maintenance(backend, requests, Times(lost_session=-1.0)).once()
        assert not backend.sampling.is_open(sampler_id)
        assert list((tmp_path / "versions").iterdir()) == []

    run(tmp_path, scenario)
