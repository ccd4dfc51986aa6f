"""The core's own rules: order, refusals that change nothing, checkpoints that continue, sessions."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ptlab.backend.backend import Backend
from ptlab.engines.protocols import Engines
from ptlab.engines.scripted import ScriptedSampler, ScriptedTrainer
from ptlab.errors import CheckpointError, EngineError, InvalidRequestError, NotFoundError, OrderError
from ptlab.types import AdamParams, Datum, LoraConfig, ModelInput, SamplingParams

ADAM = AdamParams(learning_rate=0.1)


def datum(targets: list[int]) -> Datum:
    return Datum(
        model_input=ModelInput.from_ints([0] * len(targets)), loss_fn_inputs={"target_tokens": targets, "weights": [1.0] * len(targets)}
    )


def make(tmp_path: Path) -> Backend:
    return Backend(
        data_dir=tmp_path / "data",
        scratch_dir=tmp_path / "scratch",
        open_engines=lambda name: Engines(trainer=ScriptedTrainer(), sampler=ScriptedSampler(), tokenizer=f"tokenizer of {name}"),
        on_metrics=lambda metrics: None,
        base_models=["m", "other"],
    )


def run(tmp_path: Path, scenario: Callable[[Backend, str], Awaitable[Any]]) -> None:
    async def started() -> None:
        backend = make(tmp_path)
        session = await backend.create_session(display_name="test")
        await scenario(backend, session)
        await backend.close()

    asyncio.run(started())


async def new_model(backend: Backend, session: str, number: int = 0) -> str:
    return await backend.create_model(session_id=session, model_seq_id=number, base_model="m", lora=LoraConfig(rank=1))


async def logprobs(backend: Backend, model_id: str, seq_id: int) -> list[float]:
    output = await backend.forward(model_id=model_id, seq_id=seq_id, data=[datum([1, 2, 3])], loss_fn="cross_entropy")
    values: list[float] = output.loss_fn_outputs[0]["logprobs"].to_numpy().tolist()
    return values


def test_requests_sent_before_creation_has_finished_run_after_it_in_order(tmp_path: Path) -> None:
    async def scenario(backend: Backend, session: str) -> None:
        model_id = f"{session}:train:0"
        create = asyncio.create_task(new_model(backend, session))
        await asyncio.sleep(0)
        step = asyncio.create_task(backend.optim_step(model_id=model_id, seq_id=2, adam=ADAM))
        await asyncio.sleep(0)
        fwd_bwd = asyncio.create_task(backend.forward_backward(model_id=model_id, seq_id=1, data=[datum([1])], loss_fn="cross_entropy"))
        info = await backend.get_info(model_id)
        assert (info.model_data.model_name, info.lora_rank) == ("m", 1)
        await asyncio.gather(create, step, fwd_bwd)
        # the step came after the gradient: token 1 has become likelier than the base makes it
        base = (np.arange(8) / 10) - np.log(np.exp(np.arange(8) / 10).sum())
        assert (await logprobs(backend, model_id, 3))[0] > base[1] + 0.05

    run(tmp_path, scenario)


def test_a_repeated_optim_step_trains_once(tmp_path: Path) -> None:
    async def scenario(backend: Backend, session: str) -> None:
        model_id = await new_model(backend, session)
        await backend.forward_backward(model_id=model_id, seq_id=1, data=[datum([1])], loss_fn="cross_entropy")
        for _ in range(3):
            await backend.optim_step(model_id=model_id, seq_id=2, adam=ADAM)
        once = await logprobs(backend, model_id, 3)
        with pytest.raises(OrderError):
            await backend.optim_step(model_id=model_id, seq_id=2, adam=AdamParams(learning_rate=0.2))
        assert await logprobs(backend, model_id, 4) == once

    run(tmp_path, scenario)


def test_a_refused_batch_uses_its_number_and_changes_nothing(tmp_path: Path) -> None:
    async def scenario(backend: Backend, session: str) -> None:
        model_id = await new_model(backend, session)
        before = await logprobs(backend, model_id, 1)
        short = Datum(model_input=ModelInput.from_ints([0, 0]), loss_fn_inputs={"target_tokens": [1, 1], "weights": [1.0]})
        with pytest.raises(InvalidRequestError, match=r"datum 1: 'weights' has 1 value.*2 tokens"):
            await backend.forward_backward(model_id=model_id, seq_id=2, data=[datum([1]), short], loss_fn="cross_entropy")
        with pytest.raises(InvalidRequestError, match="at least one datum"):
            await backend.forward_backward(model_id=model_id, seq_id=3, data=[], loss_fn="cross_entropy")
        with pytest.raises(InvalidRequestError, match="learning_rate is nan"):
            await backend.optim_step(model_id=model_id, seq_id=4, adam=AdamParams(learning_rate=float("nan")))
        with pytest.raises(InvalidRequestError, match="crossentropy"):
            await backend.forward_backward(model_id=model_id, seq_id=5, data=[datum([1])], loss_fn="crossentropy")
        await backend.optim_step(model_id=model_id, seq_id=6, adam=ADAM)
        assert await logprobs(backend, model_id, 7) == before

    run(tmp_path, scenario)


def test_a_failed_creation_is_the_answer_of_every_later_request(tmp_path: Path) -> None:
    async def scenario(backend: Backend, session: str) -> None:
        with pytest.raises(InvalidRequestError, match="rank is 0"):
            await backend.create_model(session_id=session, model_seq_id=0, base_model="m", lora=LoraConfig(rank=0))
        with pytest.raises(InvalidRequestError, match="rank is 0"):
            await backend.optim_step(model_id=f"{session}:train:0", seq_id=1, adam=ADAM)
        with pytest.raises(InvalidRequestError, match="rank is 0"):
            await backend.get_info(f"{session}:train:0")

    run(tmp_path, scenario)


def test_an_engine_that_breaks_is_an_engine_error_with_its_cause(tmp_path: Path) -> None:
    class Broken(ScriptedTrainer):
        def optim_step(self, model_id: str, adam: AdamParams) -> Any:
            raise ZeroDivisionError("inside the engine")

    async def scenario() -> None:
        backend = Backend(
            data_dir=tmp_path / "data",
            scratch_dir=tmp_path / "scratch",
            open_engines=lambda name: Engines(trainer=Broken(), sampler=ScriptedSampler(), tokenizer=None),
            on_metrics=lambda metrics: None,
        )
        model_id = await new_model(backend, await backend.create_session())
        with pytest.raises(EngineError, match="ZeroDivisionError: inside the engine") as caught:
            await backend.optim_step(model_id=model_id, seq_id=1, adam=ADAM)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        await logprobs(backend, model_id, 2)  # the next request is served

    asyncio.run(scenario())


def test_engines_are_opened_once_and_again_after_a_failure(tmp_path: Path) -> None:
    opened: list[str] = []

    def open_engines(name: str) -> Engines:
        opened.append(name)
        if len(opened) == 1:
            raise InvalidRequestError("no such model here")
        return Engines(trainer=ScriptedTrainer(), sampler=ScriptedSampler(), tokenizer=None)

    async def scenario() -> None:
        backend = Backend(data_dir=tmp_path / "d", scratch_dir=tmp_path / "s", open_engines=open_engines, on_metrics=lambda metrics: None)
        session = await backend.create_session()
        with pytest.raises(InvalidRequestError, match="no such model"):
            await new_model(backend, session, 0)
        await asyncio.gather(*(new_model(backend, session, n) for n in (1, 2, 3)))
        assert opened == ["m", "m"]

    asyncio.run(scenario())


def test_a_saved_state_continues_bit_for_bit_in_another_process(tmp_path: Path) -> None:
    async def step(backend: Backend, model_id: str, seq_id: int, token: int) -> None:
        await backend.forward_backward(model_id=model_id, seq_id=seq_id, data=[datum([token])], loss_fn="cross_entropy")
        await backend.optim_step(model_id=model_id, seq_id=seq_id + 1, adam=ADAM)

    async def first() -> tuple[str, list[float]]:
        backend = make(tmp_path)
        model_id = await new_model(backend, await backend.create_session())
        await step(backend, model_id, 1, 2)
        await backend.forward_backward(model_id=model_id, seq_id=3, data=[datum([5])], loss_fn="cross_entropy")  # not yet applied
        path = (await backend.save_state(model_id=model_id, seq_id=4, name="mid")).path
        await step(backend, model_id, 5, 3)
        return path, await logprobs(backend, model_id, 7)

    async def second(path: str, *, with_optimizer: bool) -> tuple[str, list[float]]:
        backend = make(tmp_path)
        session = await backend.create_session()
        model_id = await backend.create_model_from_state(session_id=session, model_seq_id=0, path=path, with_optimizer=with_optimizer)
        await step(backend, model_id, 1, 3)
        assert (await backend.catalog.get_weights_info(path)).lora_rank == 1
        return model_id, await logprobs(backend, model_id, 3)

    path, unbroken = asyncio.run(first())
    assert asyncio.run(second(path, with_optimizer=True))[1] == unbroken
    model_id, weights_only = asyncio.run(second(path, with_optimizer=False))
    assert weights_only != unbroken

    async def listed() -> None:
        catalog = make(tmp_path).catalog
        runs = await catalog.list_training_runs(limit=10, offset=0)
        assert len(runs.training_runs) == 3 and model_id in {r.training_run_id for r in runs.training_runs}
        checkpoints = await catalog.list_user_checkpoints(limit=10, offset=0)
        assert [c.tinker_path for c in checkpoints.checkpoints] == [path]

    asyncio.run(listed())


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    async def scenario(backend: Backend, session: str) -> None:
        model_id = await new_model(backend, session)
        state = (await backend.save_state(model_id=model_id, seq_id=1, name="s")).path
        sampler = (await backend.save_weights_for_sampler(model_id=model_id, seq_id=2, name="w")).path

        async def restore(number: int, path: str, **kwargs: Any) -> str:
            return await backend.create_model_from_state(session_id=session, model_seq_id=number, path=path, with_optimizer=True, **kwargs)

        with pytest.raises(CheckpointError, match="was trained on m, not on other"):
            await restore(1, state, base_model="other")
        with pytest.raises(InvalidRequestError, match="without optimizer state"):
            await restore(2, sampler)
        with pytest.raises(NotFoundError, match="nope"):
            await restore(3, state.replace("/s", "/nope"))
        with pytest.raises(InvalidRequestError, match="training checkpoint"):
            await backend.sampling.create_sampling_session(sampling_session_id="x", model_path=state)
        with pytest.raises(InvalidRequestError, match="not a checkpoint path"):
            await backend.sampling.create_sampling_session(sampling_session_id="x", model_path="tinker://a/b")

    run(tmp_path, scenario)


def test_sampling_answers_from_its_own_version_and_says_which(tmp_path: Path) -> None:
    async def scenario(backend: Backend, session: str) -> None:
        model_id = await new_model(backend, session)
        await backend.forward_backward(model_id=model_id, seq_id=1, data=[datum([1])], loss_fn="cross_entropy")
        await backend.optim_step(model_id=model_id, seq_id=2, adam=ADAM)
        path = (await backend.save_weights_for_sampler(model_id=model_id, seq_id=3, name="one")).path
        await backend.sampling.create_sampling_session(sampling_session_id=f"{session}:sample:0", model_path=path)
        await backend.sampling.create_sampling_session(sampling_session_id=f"{session}:sample:1", base_model="m")
        versions = []
        for n in (0, 1):
            response = await backend.sampling.sample(
                sampling_session_id=f"{session}:sample:{n}",
                prompt=ModelInput.from_ints([1]),
                num_samples=2,
                params=SamplingParams(max_tokens=3, seed=1),
            )
            versions += [s.policy_version for s in response.sequences]
        assert versions == [1, 1, 0, 0]
        assert (await backend.sampling.get_sampler(f"{session}:sample:0")).model_path == path
        described = await backend.get_session(session)
        assert (described.training_run_ids, len(described.sampler_ids)) == ([model_id], 2)
        await backend.finish_session(session, status="success")
        with pytest.raises(NotFoundError):
            await backend.sampling.get_sampler(f"{session}:sample:0")
        assert await backend.get_tokenizer("m") == "tokenizer of m"
        supported = (await backend.catalog.get_server_capabilities()).supported_models
        assert {m.model_name for m in supported} == {"scripted/unigram", "m", "other"}

    run(tmp_path, scenario)


def test_a_step_without_gradients_is_not_another_version(tmp_path: Path) -> None:
    async def scenario(backend: Backend, session: str) -> None:
        model_id = await new_model(backend, session)
        await backend.optim_step(model_id=model_id, seq_id=1, adam=ADAM)
        await backend.forward_backward(model_id=model_id, seq_id=2, data=[datum([1])], loss_fn="cross_entropy")
        await backend.optim_step(model_id=model_id, seq_id=3, adam=ADAM)
        await backend.optim_step(model_id=model_id, seq_id=4, adam=ADAM)
        sampler = f"{session}:sample:0"
        await backend.save_weights_for_ephemeral_sampler(model_id=model_id, seq_id=5, sampling_session_id=sampler)
        answer = await backend.sampling.sample(
            sampling_session_id=sampler, prompt=ModelInput.from_ints([1]), num_samples=1, params=SamplingParams(max_tokens=1)
        )
        assert answer.sequences[0].policy_version == 1

    run(tmp_path, scenario)
