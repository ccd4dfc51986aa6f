"""Requests that outlive the process: exactly once, whatever happens between accepting and answering.

A process is "killed" here by stopping its tasks and forgetting its memory; what the next one finds is what lies in the data directory.
tests/sdk does the same to a real server with SIGKILL.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ptlab.backend.backend import Backend
from ptlab.backend.models import Replayable, TrainingPass
from ptlab.backend.parking import ReplayCost
from ptlab.backend.requests import Answer, Request, RequestLimits, Requests
from ptlab.backend.store import RequestRow, Store
from ptlab.engines.protocols import Engines
from ptlab.engines.scripted import ScriptedSampler, ScriptedTrainer
from ptlab.errors import BusyError, GoneError, InvalidRequestError, NotFoundError, OrderError, PtlabError, StoreError
from ptlab.losses import LossCall
from ptlab.types import AdamParams, Datum, ForwardBackwardOutput, LoraConfig, ModelInput, OptimStepResponse, SamplingParams


def datum(targets: list[int]) -> Datum:
    return Datum(
        model_input=ModelInput.from_ints([0] * len(targets)), loss_fn_inputs={"target_tokens": targets, "weights": [1.0] * len(targets)}
    )


@dataclass(slots=True)
class CountingTrainer(ScriptedTrainer):
    """Counts its work, and can be told to hang in it."""

    calls: list[str] = field(default_factory=list)
    hang_in: str = ""
    hanging: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    def _work(self, name: str) -> None:
        self.calls.append(name)
        if name == self.hang_in:
            self.hanging.set()
            self.go_on.wait(20)

    def forward_backward(self, model_id: str, data: Any, loss: LossCall) -> ForwardBackwardOutput:
        self._work("forward_backward")
        return ScriptedTrainer.forward_backward(self, model_id, data, loss)

    def optim_step(self, model_id: str, adam: AdamParams) -> OptimStepResponse:
        self._work("optim_step")
        return ScriptedTrainer.optim_step(self, model_id, adam)


class World:
    """A backend with requests on a data directory; bodies are JSON. `die` and `start` stand for kill -9 and a restart."""

    def __init__(self, root: Path, limits: RequestLimits | None = None) -> None:
        self.root = root
        self.limits = limits or RequestLimits()

    async def start(self) -> World:
        self.trainer = CountingTrainer()
        self.store = Store.open(self.root / "store.sqlite")
        self.backend = Backend(
            data_dir=self.root,
            scratch_dir=self.root / "versions",
            open_engines=lambda name: Engines(trainer=self.trainer, sampler=ScriptedSampler(), tokenizer=None),
            on_metrics=lambda metrics: None,
            store=self.store,
            read_journal=read_journal,
        )
        self.requests = Requests(self.backend, self.store, self.execute, self.limits)
        await self.backend.restore()
        await self.requests.recover()
        return self

    async def die(self) -> None:
        self.trainer.go_on.set()
        await self.requests.close()
        await self.backend.close()

    async def execute(self, request: Request) -> Answer:
        body = json.loads(request.body)
        result = await getattr(self, f"_{request.kind}")(request, body)
        return Answer(kind="json", payload=json.dumps(result).encode())

    async def _create(self, request: Request, body: Any) -> Any:
        session_id, _, number = request.scope.partition(":train:")
        return await self.backend.create_model(session_id=session_id, model_seq_id=int(number), base_model="m", lora=LoraConfig(rank=1))

    async def _forward_backward(self, request: Request, body: Any) -> Any:
        output = await self.backend.forward_backward(
            model_id=request.scope, seq_id=request.seq_id, data=[datum(body["targets"])], loss_fn=body.get("loss", "cross_entropy")
        )
        return output.loss_fn_outputs[0]["logprobs"].tolist()

    async def _forward(self, request: Request, body: Any) -> Any:
        output = await self.backend.forward(model_id=request.scope, seq_id=request.seq_id, data=[datum([1, 2])], loss_fn="cross_entropy")
        return output.loss_fn_outputs[0]["logprobs"].tolist()

    async def _optim_step(self, request: Request, body: Any) -> Any:
        return (await self.backend.optim_step(model_id=request.scope, seq_id=request.seq_id, adam=AdamParams(**body))).metrics

    async def _save(self, request: Request, body: Any) -> Any:
        return (await self.backend.save_state(model_id=request.scope, seq_id=request.seq_id, name=body["name"])).path

    async def _publish(self, request: Request, body: Any) -> Any:
        sampler_id = body["sampler"]
        await self.backend.save_weights_for_ephemeral_sampler(model_id=request.scope, seq_id=request.seq_id, sampling_session_id=sampler_id)
        return sampler_id

    async def _sample(self, request: Request, body: Any) -> Any:
        response = await self.backend.sampling.sample(
            sampling_session_id=request.scope,
            prompt=ModelInput.from_ints([1]),
            num_samples=1,
            params=SamplingParams(max_tokens=4, seed=body["seed"]),
        )
        return response.sequences[0].tokens

    async def post(self, kind: str, scope: str, seq_id: int, owner: str = "local", **body: Any) -> str:
        model_id = scope if ":train:" in scope else None
        content = json.dumps(body).encode()
        return await self.requests.accept(
            Request(kind=kind, scope=scope, seq_id=seq_id, owner=owner, body=content, model_id=model_id, at_once=kind == "sample")
        )

    async def answer(self, request_id: str) -> Any:
        answer = await self.requests.wait(request_id, "local", 20)
        assert answer is not None, f"{request_id} got no answer"
        return json.loads(answer.payload)

    async def ask(self, kind: str, scope: str, seq_id: int, **body: Any) -> Any:
        return await self.answer(await self.post(kind, scope, seq_id, **body))


def read_journal(row: RequestRow) -> Replayable:
    assert row.body is not None
    body = json.loads(row.body)
    if row.kind == "forward_backward":
        return TrainingPass(data=[datum(body["targets"])], loss_fn=body.get("loss", "cross_entropy"), loss_fn_config=None, backward=True)
    return AdamParams(**body) if row.kind == "optim_step" else None


def run(tmp_path: Path, scenario: Callable[[World], Awaitable[None]], limits: RequestLimits | None = None) -> None:
    async def started() -> None:
        world = await World(tmp_path, limits).start()
        try:
            await scenario(world)
        finally:
            await world.die()

    asyncio.run(started())


async def new_model(world: World) -> str:
    model_id = f"{await world.backend.create_session()}:train:0"
    assert await world.ask("create", model_id, 0) == model_id
    return model_id


STEP = {"learning_rate": 0.1}


async def unbroken(world: World, model_id: str, steps: int, first: int = 1) -> list[Any]:
    """forward_backward, optim_step, ... then the log-probabilities that come of it."""
    for number in range(steps):
        await world.ask("forward_backward", model_id, first + 2 * number, targets=[number % 8])
        await world.ask("optim_step", model_id, first + 2 * number + 1, **STEP)
    return [await world.ask("forward", model_id, first + 2 * steps)]


def test_requests_run_in_order_and_a_repeated_one_is_the_same_one(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        model_id = await new_model(world)
        second = await world.post("optim_step", model_id, 2, **STEP)
        assert await world.requests.wait(second, "local", 0.05) is None
        first = await world.post("forward_backward", model_id, 1, targets=[3])
        again = await asyncio.gather(*(world.post("forward_backward", model_id, 1, targets=[3]) for _ in range(5)))
        assert set(again) == {first}
        await world.answer(second)
        assert world.trainer.calls == ["forward_backward", "optim_step"]
        assert await world.post("optim_step", model_id, 2, **STEP) == second  # also after its answer was given
        with pytest.raises(OrderError, match="another"):
            await world.post("optim_step", model_id, 2, learning_rate=5.0)
        assert world.trainer.calls == ["forward_backward", "optim_step"]

    run(tmp_path, scenario)


def test_a_failed_request_is_an_answer_with_a_category_and_the_next_one_runs(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        model_id = await new_model(world)
        failed = await world.ask("forward_backward", model_id, 1, targets=[3], loss="nonsense")
        assert failed["category"] == "user"
        assert "nonsense" in failed["error"]
        world.trainer.info = None  # type: ignore[assignment]  # an unforeseen error
        assert (await world.ask("forward_backward", model_id, 2, targets=[3]))["category"] == "server"

    run(tmp_path, scenario)


def test_a_request_that_fails_before_its_turn_is_not_waited_for(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        model_id = await new_model(world)
        third = await world.post("optim_step", model_id, 3, **STEP)
        assert "category" in await world.ask("optim_step", model_id, 2, no_such_field=1)  # its body cannot be read
        await world.ask("forward_backward", model_id, 1, targets=[3])
        assert "learning_rate:mean" in await world.answer(third)

    run(tmp_path, scenario)


def test_a_number_far_ahead_is_refused_and_costs_nothing(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        model_id = await new_model(world)
        with pytest.raises(InvalidRequestError, match="ahead"):
            await world.post("optim_step", model_id, 2**63 - 1, **STEP)
        assert world.backend.models.get(model_id).sequencer.gap == []
        assert await world.store.pending() == []

    run(tmp_path, scenario)


def test_another_owner_sees_nothing(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        model_id = await new_model(world)
        request_id = await world.post("forward", model_id, 1)
        await world.answer(request_id)
        with pytest.raises(NotFoundError):
            await world.requests.wait(request_id, "somebody else", 0.1)
        await world.requests.fetched(request_id)
        with pytest.raises(NotFoundError):
            await world.requests.wait(request_id, "somebody else", 0.1)
        assert len(await world.answer(request_id)) == 2  # fetched, and still there for its owner

    run(tmp_path, scenario)


def test_an_answer_is_kept_for_its_time_and_then_gone(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        model_id = await new_model(world)
        request_id = await world.post("forward", model_id, 1)
        await world.answer(request_id)
        await world.requests.fetched(request_id)
        await world.store.expire_requests(finished_before=4e9)
        with pytest.raises(GoneError, match="no longer kept"):
            await world.answer(request_id)
        with pytest.raises(NotFoundError):
            await world.answer("never:asked:1")

    run(tmp_path, scenario)


def test_a_full_queue_refuses_but_never_the_request_that_others_wait_for(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        model_id = await new_model(world)
        waiting = [await world.post("optim_step", model_id, n, **STEP) for n in (2, 3, 4)]
        with pytest.raises(BusyError, match="send it again"):
            await world.post("optim_step", model_id, 5, **STEP)
        await world.ask("forward_backward", model_id, 1, targets=[1])
        for request_id in waiting:
            await world.answer(request_id)
        await world.ask("optim_step", model_id, 5, **STEP)

    run(tmp_path, scenario, RequestLimits(max_pending_per_owner=3))


@pytest.mark.parametrize("hang_in", ["forward_backward", "optim_step"])
def test_killed_in_the_middle_of_a_request_it_is_applied_exactly_once(tmp_path: Path, hang_in: str) -> None:
    async def scenario(world: World) -> None:
        expected_model, model_id = await new_model(world), await new_model(world)
        expected = await unbroken(world, expected_model, 3)
        await unbroken(world, model_id, 1)  # numbers 1 to 3
        world.trainer.hang_in = hang_in
        pending = [
            await world.post("forward_backward", model_id, 4, targets=[1]),
            await world.post("optim_step", model_id, 5, **STEP),
            await world.post("forward_backward", model_id, 6, targets=[2]),
        ]
        await asyncio.to_thread(world.trainer.hanging.wait, 20)
        await world.die()
        await world.start()
        for request_id in pending:
            assert "error" not in await world.answer(request_id)
        await world.ask("optim_step", model_id, 7, **STEP)
        assert [await world.ask("forward", model_id, 8)] == expected
        assert world.trainer.calls.count("optim_step") == 3

    run(tmp_path, scenario)


def test_answers_given_before_a_crash_stay_as_they_were(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        model_id = await new_model(world)
        ids = [await world.post("forward_backward", model_id, 1, targets=[5]), await world.post("optim_step", model_id, 2, **STEP)]
        before = [await world.answer(request_id) for request_id in ids]
        await world.die()
        await world.start()
        assert [await world.answer(request_id) for request_id in ids] == before
        assert world.trainer.calls == []  # nobody has asked for the model yet: it stays parked
        assert await world.post("optim_step", model_id, 2, **STEP) == ids[1]  # the lost answer's request, sent again
        assert [await world.answer(ids[1])] == before[1:]
        assert world.trainer.calls == []

    run(tmp_path, scenario)


def test_a_model_that_was_parked_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        expected_model, model_id = await new_model(world), await new_model(world)
        expected = await unbroken(world, expected_model, 3)
        await unbroken(world, model_id, 1)
        await world.ask("forward_backward", model_id, 4, targets=[1])
        await world.backend.models.park(model_id)  # with a gradient that is not applied yet
        assert world.backend.models.get(model_id).parked
        await world.ask("optim_step", model_id, 5, **STEP)
        await world.backend.models.park(model_id)
        await world.die()
        await world.start()
        await world.ask("forward_backward", model_id, 6, targets=[2])
        await world.ask("optim_step", model_id, 7, **STEP)
        assert [await world.ask("forward", model_id, 8)] == expected
        assert world.trainer.calls == ["forward_backward", "optim_step"]  # nothing was replayed: the snapshot had it all

    run(tmp_path, scenario)


def test_a_model_made_from_a_checkpoint_outlives_that_checkpoint_and_a_crash(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        source = await new_model(world)
        await unbroken(world, source, 2)
        path = await world.ask("save", source, 6, name="there")
        session_id = await world.backend.create_session()
        copy = await world.backend.create_model_from_state(session_id=session_id, model_seq_id=0, path=path, with_optimizer=True)
        await world.backend.catalog.delete_checkpoint(source, "weights/there")
        await world.die()
        await world.start()
        assert await world.ask("forward", copy, 1) == await world.ask("forward", source, 7)
        await unbroken(world, source, 1, first=8)
        await unbroken(world, copy, 1, first=2)
        assert await world.ask("forward", copy, 5) == await world.ask("forward", source, 11)

    run(tmp_path, scenario)


def test_a_save_that_was_done_but_not_answered_is_not_refused_as_taken(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        model_id = await new_model(world)
        request_id = await world.post("save", model_id, 1, name="a")
        before = await world.answer(request_id)
        await world.die()
        await forget_answer(tmp_path, request_id)
        await world.start()
        assert await world.answer(request_id) == before
        taken = await world.ask("save", model_id, 2, name="a")
        assert "exists already" in taken["error"]

    run(tmp_path, scenario)


def test_a_sampler_of_unsaved_weights_survives_with_those_weights(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        model_id = await new_model(world)
        await unbroken(world, model_id, 2)
        sampler = f"{model_id.partition(':')[0]}:sample:0"
        published = await world.post("publish", model_id, 6, sampler=sampler)
        await world.answer(published)
        before = await world.ask("sample", sampler, 0, seed=1)
        await unbroken(world, model_id, 2, first=7)  # the trainer goes on; the sampler must not
        await world.die()
        await forget_answer(tmp_path, published)
        await world.start()
        assert await world.answer(published) == sampler
        assert await world.ask("sample", sampler, 1, seed=1) == before
        assert await world.backend.sampling.unload_idle(0.0) == 1
        assert await world.ask("sample", sampler, 2, seed=1) == before  # loaded again on demand
        await world.backend.finish_session(model_id.partition(":")[0], status="success")
        assert list((tmp_path / "versions").iterdir()) == []

    run(tmp_path, scenario)


async def forget_answer(root: Path, request_id: str) -> None:
    """As if the process had died between doing the work and storing the answer."""
    import sqlite3

    with sqlite3.connect(root / "store.sqlite") as connection:
        connection.execute("DELETE FROM request_answers WHERE number = (SELECT number FROM requests WHERE request_id = ?)", [request_id])
        connection.execute("UPDATE requests SET state = 'pending', answer_kind = NULL WHERE request_id = ?", [request_id])
    connection.close()


def test_work_since_the_last_snapshot_is_bounded(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        model_id = await new_model(world)
        world.backend.models.get(model_id).replay_cost = ReplayCost(shortest_s=0.0, share=1e9)
        await unbroken(world, model_id, 3)
        await asyncio.sleep(0.2)
        await world.die()
        await world.start()
        await world.ask("forward", model_id, 8)
        assert len(world.trainer.calls) <= 2

    run(tmp_path, scenario)


def test_cancelling_ends_a_sample_and_leaves_a_model_in_order(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        model_id = await new_model(world)
        waiting = await world.post("optim_step", model_id, 2, **STEP)
        await world.requests.cancel(waiting, "local")
        await world.requests.cancel("unknown:request:0", "local")
        await world.ask("forward_backward", model_id, 1, targets=[1])
        assert "learning_rate:mean" in await world.answer(waiting)
        session_id = model_id.partition(":")[0]
        await world.backend.sampling.create_sampling_session(sampling_session_id=f"{session_id}:sample:0", base_model="m")

        async def hang(request: Request, body: Any) -> Any:
            await asyncio.sleep(30)

        world._sample = hang  # type: ignore[method-assign]
        sample = await world.post("sample", f"{session_id}:sample:0", 0, seed=1)
        await asyncio.sleep(0)
        await world.requests.cancel(sample, "somebody else")
        assert await world.requests.wait(sample, "local", 0.05) is None
        await world.requests.cancel(sample, "local")
        assert "cancelled" in (await world.answer(sample))["error"]

    run(tmp_path, scenario)


def test_a_draw_that_begins_before_it_is_stored_is_the_same_request_when_it_comes_again(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        session_id = await world.backend.create_session()
        sampler = f"{session_id}:sample:0"
        await world.backend.sampling.create_sampling_session(sampling_session_id=sampler, base_model="m")
        drawn: list[int] = []
        sample = world._sample

        async def counting(request: Request, body: Any) -> Any:
            drawn.append(request.seq_id)
            return await sample(request, body)

        world._sample = counting  # type: ignore[method-assign]
        ids = await asyncio.gather(*(world.post("sample", sampler, 0, seed=None) for _ in range(4)))
        first = await world.answer(ids[0])
        assert len(set(ids)) == 1 and drawn == [0]
        await world.requests.fetched(ids[0])
        assert await world.post("sample", sampler, 0, seed=None) == ids[0]  # begun again, and given up: it has its answer
        await asyncio.sleep(0.05)
        assert await world.answer(ids[0]) == first
        with pytest.raises(OrderError):
            await world.post("sample", sampler, 0, seed=7)
        assert await world.answer(ids[0]) == first

        async def refusing(row: Any) -> Any:
            raise StoreError("the disk is full")

        world.store.accept = refusing  # type: ignore[method-assign]
        with pytest.raises(StoreError):
            await world.post("sample", sampler, 1, seed=1)
        with pytest.raises(NotFoundError):
            await world.answer(f"{sampler}:sample:1")

    run(tmp_path, scenario)


def test_an_answer_that_cannot_be_stored_is_not_lost_and_not_computed_twice(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        model_id = await new_model(world)
        await world.ask("forward_backward", model_id, 1, targets=[1])
        finish, failures = world.store.finish, [StoreError("the disk is full")]

        async def failing(*args: Any, **kwargs: Any) -> bool:
            if failures:
                raise failures.pop()
            return await finish(*args, **kwargs)

        world.store.finish = failing  # type: ignore[method-assign]
        step = await world.post("optim_step", model_id, 2, **STEP)
        assert await world.requests.wait(step, "local", 5) is None
        assert "learning_rate:mean" in await world.answer(step)
        assert world.trainer.calls == ["forward_backward", "optim_step"]

    run(tmp_path, scenario)


def test_categories_tell_users_from_servers() -> None:
    kinds: list[tuple[BaseException, str]] = [
        (InvalidRequestError("x"), "user"),
        (PtlabError("x"), "server"),
        (ZeroDivisionError(), "server"),
    ]
    assert [Answer.failed(error).failure for error, _ in kinds] == [category for _, category in kinds]
    assert np.all([json.loads(Answer.failed(error).payload)["category"] == category for error, category in kinds])
