"""/metrics and /api/v1/status of a whole app over a backend without a transformer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from ptlab.backend.access import Access
from ptlab.backend.backend import Backend
from ptlab.backend.requests import Answer, Request, RequestLimits, Requests
from ptlab.backend.store import Store, store_file
from ptlab.engines.protocols import Engines
from ptlab.engines.scripted import ScriptedSampler, ScriptedTrainer
from ptlab.server.app import create_app
from ptlab.server.meters import Meters
from ptlab.server.routes.metrics import create_metrics_router
from ptlab.server.settings import ServeSettings
from ptlab.server.timeline import Timeline
from ptlab.types import LoraConfig

BASE = "scripted/unigram"


@dataclass
class World:
    app: FastAPI
    backend: Backend
    access: Access
    requests: Requests
    meters: Meters
    hold: asyncio.Event

    async def get(self, path: str, *, peer: str = "127.0.0.1", **headers: str) -> httpx.Response:
        transport = httpx.ASGITransport(self.app, client=(peer, 4711), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get(path, headers={name.replace("_", "-"): value for name, value in headers.items()})


@asynccontextmanager
async def world(data_dir: Path) -> AsyncIterator[World]:
    store = Store.open(store_file(data_dir))
    meters = Meters(CollectorRegistry())
    backend = Backend(
        data_dir=data_dir,
        scratch_dir=data_dir / "scratch",
        open_engines=lambda _: Engines(trainer=ScriptedTrainer(), sampler=ScriptedSampler(), tokenizer=None),
        on_metrics=meters.on_metrics,
        base_models=[BASE],
        store=store,
    )
    hold = asyncio.Event()

    async def execute(request: Request) -> Answer:
        await hold.wait()
        return Answer(kind="json", payload=b"{}")

    access = Access(store)
    requests = Requests(backend, store, execute, RequestLimits(), on_finished=meters.request_finished)
    settings = ServeSettings(data_dir=data_dir)
    app = create_app(backend, requests, access, settings, Timeline(), [create_metrics_router(meters)])
    try:
        yield World(app, backend, access, requests, meters, hold)
    finally:
        hold.set()
        await requests.close()
        await backend.close()


def in_world(tmp_path: Path, test: Callable[[World], Awaitable[None]]) -> None:
    async def run() -> None:
        async with world(tmp_path) as w:
            await test(w)

    asyncio.run(run())


async def make_model(w: World, owner: str, name: str | None = None) -> str:
    session_id = await w.backend.create_session(owner=owner, display_name=name)
    return await w.backend.create_model(session_id=session_id, model_seq_id=0, base_model=BASE, lora=LoraConfig(rank=8))


async def ask(w: World, model_id: str, owner: str) -> str:
    return await w.requests.accept(Request(kind="optim_step", scope=model_id, seq_id=1, owner=owner, body=b"x", model_id=model_id))


def test_metrics_are_prometheus_text_and_count_requests(tmp_path: Path) -> None:
    async def test(w: World) -> None:
        model_id = await make_model(w, "local")
        waiting = await ask(w, model_id, "local")
        await asyncio.sleep(0)
        text = (await w.get("/metrics")).text
        assert 'ptlab_requests_waiting{kind="optim_step"} 1.0' in text
        assert 'ptlab_models{state="running"} 1.0' in text
        w.hold.set()
        await w.requests.wait(waiting, "local", 5)
        answer = await w.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=")
        assert 'ptlab_requests_total{kind="optim_step",outcome="ok"} 1.0' in answer.text
        assert 'ptlab_models{state="idle"} 1.0' in answer.text
        assert "ptlab_requests_waiting{" not in answer.text
        assert "ptlab_sessions 1.0" in answer.text
        assert 'ptlab_store_rows{kind="requests_done"} 1.0' in answer.text
        [size] = [line.split()[1] for line in answer.text.splitlines() if line.startswith("ptlab_store_bytes ")]
        assert float(size) > 1000
        assert model_id.split(":")[0] not in answer.text

    in_world(tmp_path, test)


def test_metrics_need_a_key_from_anywhere_but_this_machine(tmp_path: Path) -> None:
    async def test(w: World) -> None:
        key = await w.access.create_key("alice")
        assert (await w.get("/metrics")).status_code == 200
        assert (await w.get("/metrics", peer="::1")).status_code == 200
        for peer in ("10.0.0.5", "127.0.0.1.evil.example", "::ffff:10.0.0.5"):
            assert (await w.get("/metrics", peer=peer)).status_code == 401
        assert (await w.get("/metrics", peer="10.0.0.5", x_api_key=key)).status_code == 200
        assert (await w.get("/metrics", peer="10.0.0.5", authorization=f"Bearer {key}")).status_code == 200
        assert (await w.get("/metrics", peer="10.0.0.5", x_api_key="tml-wrong")).status_code == 401
        for header in ("x_forwarded_for", "forwarded", "via", "x_real_ip"):
            assert (await w.get("/metrics", **{header: "127.0.0.1"})).status_code == 401, "a proxy speaks for somebody else"

    in_world(tmp_path, test)


def test_metrics_name_no_tenant(tmp_path: Path) -> None:
    async def test(w: World) -> None:
        await w.access.create_key("alice-of-accounting")
        model_id = await make_model(w, "alice-of-accounting", "her project")
        w.hold.set()
        await w.requests.wait(await ask(w, model_id, "alice-of-accounting"), "alice-of-accounting", 5)
        text = (await w.get("/metrics")).text
        for name in ("alice", "her project", model_id, model_id.split(":")[0]):
            assert name not in text

    in_world(tmp_path, test)


def test_status_shows_a_caller_their_own_sessions_only(tmp_path: Path) -> None:
    async def test(w: World) -> None:
        keys = {name: await w.access.create_key(name) for name in ("alice", "bob")}
        hers, his = await make_model(w, "alice", "mine"), await make_model(w, "bob")
        await ask(w, hers, "alice")
        await asyncio.sleep(0)
        assert (await w.get("/api/v1/status")).status_code == 401
        told = (await w.get("/api/v1/status", x_api_key=keys["alice"])).json()
        assert told["owner"] == "alice"
        [session] = told["sessions"]
        assert session["session_id"] == hers.split(":")[0]
        assert session["name"] == "mine"
        [model] = session["models"]
        assert (model["model_id"], model["base_model"], model["rank"], model["step"]) == (hers, BASE, 8, 0)
        assert model["state"] == "running"
        assert 0 <= model["idle_s"] < 60
        assert 0 <= session["silent_s"] < 60
        load = told["load"]
        assert load["num_sessions"] == 2
        assert load["models"] == {"running": 1, "idle": 1}
        assert load["waiting"] == {"optim_step": 1}
        assert load["base_models"] == [BASE]
        assert load["memory_bytes"] > 2**20
        assert load["sync_latency_s"] is None
        text = (await w.get("/api/v1/status", x_api_key=keys["bob"])).text
        assert hers not in text
        assert "alice" not in text
        assert "mine" not in text
        assert his in text

    in_world(tmp_path, test)


def test_status_follows_a_model_to_the_disk_and_tells_of_syncs(tmp_path: Path) -> None:
    async def test(w: World) -> None:
        model_id = await make_model(w, "local")
        w.meters.count_tokens("sampled", 40)
        await w.backend.save_weights_for_sampler(model_id=model_id, seq_id=1, name="a")
        told = (await w.get("/api/v1/status")).json()
        assert told["load"]["num_syncs"] == 1
        assert told["load"]["sync_latency_s"] > 0
        assert told["load"]["sync_verify_gap_nats"] >= 0
        assert told["load"]["tokens_per_s"]["sampled"] > 0
        await w.backend.models.park(model_id)
        told = (await w.get("/api/v1/status")).json()
        assert told["sessions"][0]["models"][0]["state"] == "parked"
        assert told["load"]["models"] == {"parked": 1}
        with pytest.raises(ValueError, match="LoRA rank"):
            await w.backend.create_model(session_id=model_id.split(":")[0], model_seq_id=1, base_model=BASE, lora=LoraConfig(rank=0))
        told = (await w.get("/api/v1/status")).json()
        assert [model["state"] for model in told["sessions"][0]["models"]] == ["parked", "failed"]

    in_world(tmp_path, test)


def test_status_lists_the_sessions_heard_of_last(tmp_path: Path) -> None:
    async def test(w: World) -> None:
        ids = [await w.backend.create_session() for _ in range(53)]
        await w.backend.finish_session(ids[5], status="success")
        w.backend.session(ids[0]).last_seen += 100
        told = (await w.get("/api/v1/status")).json()
        assert told["num_sessions"] == 52
        listed = [session["session_id"] for session in told["sessions"]]
        assert len(listed) == 50
        assert listed[0] == ids[0]
        assert ids[5] not in listed
        assert told["sessions"][0]["silent_s"] == 0

    in_world(tmp_path, test)
