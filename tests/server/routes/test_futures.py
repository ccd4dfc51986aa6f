"""How a result is waited for, fetched, fetched again, announced and cancelled."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from ptlab.engines.protocols import Engines, SampleCall
from ptlab.engines.scripted import ScriptedSampler, ScriptedTrainer, unigram_info
from ptlab.types import SampleResponse

BASE = "scripted/unigram"


class SlowSampler(ScriptedSampler):
    """Samples that wait until told; counts those that were aborted."""

    aborted = 0
    gate: asyncio.Event | None = None

    async def sample(self, call: SampleCall) -> SampleResponse:
        if self.gate is None:
            self.gate = asyncio.Event()
        if call.params.max_tokens == 4:  # not the probes of the backend
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.aborted += 1
                raise
        return await ScriptedSampler.sample(self, call)


@pytest.fixture
def slow() -> SlowSampler:
    return SlowSampler(unigram_info())


@pytest.fixture
def slow_server(request: pytest.FixtureRequest, serve: Callable[..., Any], tmp_path: Path, slow: SlowSampler) -> Any:
    """A server whose samples wait; the parameter is its long_poll_s."""

    def open_engines(name: str) -> Engines:
        return Engines(trainer=ScriptedTrainer(unigram_info()), sampler=slow, tokenizer=None)

    with serve(tmp_path, open_engines, long_poll_s=request.param) as server:
        yield server


short_polls = pytest.mark.parametrize("slow_server", [0.5], indirect=True)
long_polls = pytest.mark.parametrize("slow_server", [30.0], indirect=True)


@pytest.fixture
def slow_raw(slow_server: Any, raw_of: Callable[..., Any]) -> Any:
    with slow_server.client() as client:
        yield raw_of(client)


def open_gate(server: Any, slow: SlowSampler) -> None:
    async def go() -> None:
        assert slow.gate is not None
        slow.gate.set()

    server.call(go())


def num_tasks(server: Any) -> int:
    async def count() -> int:
        return len(asyncio.all_tasks())

    return int(server.call(count()))


@short_polls
def test_not_yet_is_408_after_the_long_poll(slow_server: Any, slow_raw: Any, slow: SlowSampler) -> None:
    request_id = slow_raw.post("asample", slow_raw.sample_body(slow_raw.sampler(slow_raw.session()), 0))["request_id"]
    began = time.monotonic()
    response = slow_raw.http.post("retrieve_future", json={"request_id": request_id})
    assert (response.status_code, response.json()) == (408, {"queue_state": "active"})
    assert 0.4 < time.monotonic() - began < 5
    open_gate(slow_server, slow)
    assert slow_raw.poll(request_id).headers["content-type"] == "application/x-protobuf"


def test_a_result_can_be_fetched_again(raw: Any) -> None:
    model = raw.model()
    request_id = raw.forward_backward(model, 1).json()["request_id"]
    first = raw.poll(request_id).content
    assert raw.poll(request_id).content == first
    failed = raw.forward_backward(model, 2, loss_fn="nope").json()["request_id"]
    assert raw.result(failed) == raw.result(failed)
    assert raw.result(failed)["category"] == "user"


def test_a_large_result_is_announced_by_its_size_where_that_is_allowed(
    serve: Callable[..., Any], raw_of: Callable[..., Any], tmp_path: Path
) -> None:
    with serve(tmp_path, inline_result_bytes=1000) as server, server.client() as client:
        raw = raw_of(client)
        model = raw.model()
        large = raw.forward_backward(model, 1, num_datums=100).json()["request_id"]
        content = raw.poll(large, allow_metadata_only=False).content
        assert len(content) > 1000
        announced = raw.poll(large, allow_metadata_only=True)
        assert announced.json() == {"status": "complete_metadata", "response_payload_size": len(content)}
        assert raw.poll(large).content == content
        small = raw.forward_backward(model, 2).json()["request_id"]
        assert raw.poll(small, allow_metadata_only=True).headers["content-type"] == "application/x-protobuf"


def test_unknown_and_expired_results(serve: Callable[..., Any], raw_of: Callable[..., Any], tmp_path: Path) -> None:
    with serve(tmp_path, result_grace_s=0.3, maintenance_every_s=0.1) as server, server.client() as client:
        raw = raw_of(client)
        assert raw.post("retrieve_future", {"request_id": "nothing"}, 404)["category"] == "user"
        raw.post("retrieve_future", {"request_id": ""}, 400)
        raw.post("retrieve_future", {}, 400)
        request_id = raw.forward_backward(raw.model(), 1).json()["request_id"]
        raw.poll(request_id)
        deadline = time.monotonic() + 10
        while (status := client.post("retrieve_future", json={"request_id": request_id}).status_code) == 200:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert status == 410


@short_polls
def test_cancelling_aborts_a_sample_in_the_engine(slow_server: Any, slow_raw: Any, slow: SlowSampler) -> None:
    request_id = slow_raw.post("asample", slow_raw.sample_body(slow_raw.sampler(slow_raw.session()), 0))["request_id"]
    slow_raw.http.post("retrieve_future", json={"request_id": request_id})
    assert slow_raw.http.post("cancel_future", json={"request_id": request_id}).status_code == 204
    assert "cancelled" in slow_raw.result(request_id)["error"]
    assert slow.aborted == 1
    assert slow_raw.http.post("cancel_future", json={"request_id": request_id}).status_code == 204
    assert slow_raw.http.post("cancel_future", json={"request_id": "nothing"}).status_code == 204


@long_polls
def test_a_client_that_goes_away_leaves_no_task_behind(slow_server: Any, slow_raw: Any) -> None:
    sampler = slow_raw.sampler(slow_raw.session())
    ids = [slow_raw.post("asample", slow_raw.sample_body(sampler, i))["request_id"] for i in range(20)]
    assert slow_server.app.state.context.settings.long_poll_s > 10  # the polls do not end by themselves
    before = num_tasks(slow_server)

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=slow_raw.http.base_url, headers=slow_raw.http.headers) as client:
            polls = [asyncio.create_task(client.post("retrieve_future", json={"request_id": i})) for i in ids]
            await asyncio.sleep(0.2)
            for poll in polls:
                poll.cancel()
            await asyncio.gather(*polls, return_exceptions=True)

    asyncio.run(leave())
    deadline = time.monotonic() + 5
    while num_tasks(slow_server) > before + 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert num_tasks(slow_server) <= before + 2


@short_polls
def test_all_results_of_a_sampling_client_at_once(slow_server: Any, slow_raw: Any, slow: SlowSampler) -> None:
    sampler = slow_raw.sampler(slow_raw.session())
    clone = 3 * 1_000_000_000
    for seq_id in (0, 1, clone):
        slow_raw.post("asample", slow_raw.sample_body(sampler, seq_id))

    def ready(cursor: int, client: int = 0, timeout: float | None = 0.3, **more: Any) -> Any:
        target = {"type": "sampling_session", "sampling_session_id": sampler, "cloned_sampler_id": client}
        body = {"target": target, "prev_cursor": cursor, **more} | ({} if timeout is None else {"timeout": timeout})
        return slow_raw.post("retrieve_futures", body)

    assert ready(0) == {"completions": [], "cursor": 0}
    began = time.monotonic()
    assert ready(0, timeout=0)["completions"] == []
    assert time.monotonic() - began < 0.3
    open_gate(slow_server, slow)
    found, cursor = {}, 0
    while len(found) < 2:
        answer = ready(cursor, timeout=None)
        assert not found.keys() & {c["request_id"] for c in answer["completions"]}
        found |= {c["request_id"]: c for c in answer["completions"]}
        cursor = answer["cursor"]
    request_id = f"{sampler}:sample:0"
    assert found[request_id]["state"] == "finished"
    assert found[request_id]["response_payload_uncompressed_size"] == len(slow_raw.poll(request_id).content)
    assert ready(cursor, retrieved_request_ids=list(found)) == {"completions": [], "cursor": cursor}
    assert [c["request_id"] for c in ready(0, 3)["completions"]] == [f"{sampler}:sample:{clone}"]
    target = {"type": "sampling_session", "sampling_session_id": "nobody:sample:0"}
    slow_raw.post("retrieve_futures", {"target": target}, 404)


def test_waiting_clients_are_told_when_the_server_stops(
    serve: Callable[..., Any], raw_of: Callable[..., Any], tmp_path: Path, slow: SlowSampler
) -> None:
    def open_engines(name: str) -> Engines:
        return Engines(trainer=ScriptedTrainer(unigram_info()), sampler=slow, tokenizer=None)

    with serve(tmp_path, open_engines, long_poll_s=30.0) as server, server.client() as client:
        raw = raw_of(client)
        request_id = raw.post("asample", raw.sample_body(raw.sampler(raw.session()), 0))["request_id"]
        began = time.monotonic()
        server.loop.call_soon_threadsafe(server.loop.call_later, 0.3, server.app.state.context.stopping.set)
        assert client.post("retrieve_future", json={"request_id": request_id}).status_code == 408
        assert time.monotonic() - began < 10
