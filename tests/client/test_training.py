"""TrainingClient: order is fixed at the call, in both styles; what is refused and when."""

from __future__ import annotations

import asyncio
import pickle
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from ptlab.client.service import ServiceClient
from ptlab.client.training import TrainingClient
from ptlab.errors import EngineError, InvalidRequestError
from ptlab.futures import APIFuture
from ptlab.types import AdamParams, Datum, DimuonParams, ForwardBackwardOutput, SamplingParams

MakeDatum = Callable[..., Datum]


@pytest.fixture
def client(service: ServiceClient) -> TrainingClient:
    return service.create_lora_training_client("base")


def test_requests_run_in_the_order_of_the_calls_whatever_is_awaited_when(
    client: TrainingClient, backend: Any, make_datum: MakeDatum
) -> None:
    backend.gates["forward_backward"] = threading.Event()
    data = [make_datum(weights=[1.0, 0.0, 0.0])]
    trained = client.forward_backward(data, "cross_entropy")
    updated = client.optim_step(AdamParams(learning_rate=1.0))
    saved = client.save_state("a")
    again = client.forward_backward(data, "cross_entropy")
    backend.gates["forward_backward"].set()
    again.result(5), saved.result(5), updated.result(5), trained.result(5)
    assert backend.ran[1:] == [("forward_backward", 1), ("optim_step", 2), ("save_state", 3), ("forward_backward", 4)]
    assert updated.result().metrics == {"grad": pytest.approx(0.2)}  # -w * slope = -1 * -(1 + 1) / 10


def test_calls_of_many_threads_get_each_a_place_of_its_own(client: TrainingClient, backend: Any) -> None:
    futures: list[APIFuture[Any]] = []
    threads = [threading.Thread(target=lambda: futures.append(client.optim_step(AdamParams()))) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    for future in futures:
        future.result(5)
    assert backend.ran[1:] == [("optim_step", n) for n in range(1, 21)]


def test_the_double_await_and_the_single_await_hold_at_once(client: TrainingClient, backend: Any, make_datum: MakeDatum) -> None:
    data = [make_datum(weights=[1.0, 1.0, 1.0])]

    async def main() -> None:
        trained = await client.forward_backward_async(data, "cross_entropy")
        updated = await client.optim_step_async(adam_params=AdamParams())
        scored = await client.forward_async(data, "cross_entropy", {"x": 1.0})
        saved = await client.save_state_async("n", overwrite=True)
        sampler = await client.save_weights_for_sampler_async("n", ttl_seconds=5)
        loaded = await client.load_state_async("tinker://r/weights/a")
        loaded_all = await client.load_state_with_optimizer_async("tinker://r/weights/a")
        for future in (trained, updated, scored, saved, sampler, loaded, loaded_all):
            assert isinstance(future, APIFuture)
        assert isinstance(await trained, ForwardBackwardOutput) and isinstance(trained.result(5), ForwardBackwardOutput)
        assert (await saved).path == "tinker://s:train:0/weights/n"
        assert (await sampler).path == "tinker://s:train:0/sampler_weights/n"
        await loaded_all
        assert isinstance(await client.forward_backward(data, "cross_entropy"), ForwardBackwardOutput)
        await client.optim_step(AdamParams())

    asyncio.run(main())
    asyncio.run(main())
    arguments = {name: a for name, a in backend.calls}
    assert arguments["forward"]["loss_fn_config"] == {"x": 1.0} and arguments["forward"]["loss_fn"] == "cross_entropy"
    assert arguments["save_state"]["overwrite"] is True and arguments["save_weights_for_sampler"]["ttl_seconds"] == 5
    assert [a["with_optimizer"] for n, a in backend.calls if n == "load_state"] == [False, True] * 2


def test_a_failed_request_does_not_stop_later_ones(client: TrainingClient, backend: Any, make_datum: MakeDatum) -> None:
    backend.fail["forward_backward"] = EngineError("out of memory")
    trained = client.forward_backward([make_datum(weights=[1.0, 1.0, 1.0])], "cross_entropy")
    updated = client.optim_step(AdamParams())
    with pytest.raises(EngineError, match="out of memory"):
        trained.result(5)
    updated.result(5)


def test_cancelling_gives_up_the_wait_and_the_request_keeps_its_place(client: TrainingClient, backend: Any) -> None:
    backend.gates["optim_step"] = threading.Event()
    first, second = client.optim_step(AdamParams()), client.optim_step(AdamParams())
    assert first.cancel()

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(second, 0.02)

    asyncio.run(main())
    third = client.optim_step(AdamParams())
    backend.gates["optim_step"].set()
    third.result(5)
    assert backend.ran[1:] == [("optim_step", 1), ("optim_step", 2), ("optim_step", 3)]


def test_a_request_cancelled_before_it_was_sent_keeps_its_place_too(service: ServiceClient, backend: Any) -> None:
    backend.gates["create_model"] = threading.Event()
    client = service.create_lora_training_client("base")
    first, second = client.optim_step(AdamParams()), client.optim_step(AdamParams())
    assert first.cancel()
    backend.gates["create_model"].set()
    second.result(5)  # would wait for ever for the missing first
    assert backend.ran == [("create_model", 0), ("optim_step", 1), ("optim_step", 2)]


def test_a_sampling_client_given_up_before_it_was_saved_is_released_all_the_same(client: TrainingClient, backend: Any) -> None:
    backend.gates["save_weights_for_ephemeral_sampler"] = threading.Event()
    sampler = client.save_weights_and_get_sampling_client()
    while not any(name == "save_weights_for_ephemeral_sampler" for name, _ in backend.calls):
        time.sleep(0.002)
    assert sampler.cancel()
    del sampler
    backend.gates["save_weights_for_ephemeral_sampler"].set()
    client.optim_step(AdamParams()).result(5)
    deadline = time.monotonic() + 5
    while not backend.released and time.monotonic() < deadline:
        time.sleep(0.002)
    assert backend.released == ["s:sample:0"] and backend.samplers == {}


def test_a_sampling_client_has_the_weights_as_of_its_call(client: TrainingClient, backend: Any) -> None:
    backend.gates["optim_step"] = threading.Event()
    before = client.optim_step(AdamParams())
    sampler = client.save_weights_and_get_sampling_client()
    after = client.optim_step(AdamParams())
    backend.gates["optim_step"].set()
    after.result(5), before.result(5)
    assert backend.ran[1:] == [("optim_step", 1), ("save_weights_for_ephemeral_sampler", 2), ("optim_step", 3)]
    assert backend.samplers == {sampler.sampling_session_id: "weights after 3 requests"}  # creation, optim_step, this one
    from ptlab.types import ModelInput

    assert len(sampler.sample(ModelInput.from_ints([1]), 3, SamplingParams()).result(5).sequences) == 3


def test_a_sampling_client_that_cannot_be_made_does_not_stop_training(client: TrainingClient, backend: Any) -> None:
    backend.fail["save_weights_for_ephemeral_sampler"] = EngineError("the sampler holds other weights")
    sampler = client.save_weights_and_get_sampling_client()
    with pytest.raises(EngineError, match="other weights"):
        sampler.result(5)
    client.optim_step(AdamParams()).result(5)


def test_sampling_clients_from_the_async_twins(client: TrainingClient) -> None:
    async def main() -> None:
        snapshot = await client.save_weights_and_get_sampling_client_async()
        named = await client.create_sampling_client_async("tinker://r/sampler_weights/a")
        assert type(snapshot).__name__ == type(named).__name__ == "SamplingClient"

    asyncio.run(main())


def test_the_ignored_name_warns_and_inflight_is_refused_without_losing_a_place(client: TrainingClient, backend: Any) -> None:
    with pytest.raises(InvalidRequestError, match="snapshot"):
        client.save_weights_and_get_sampling_client(kind="inflight")
    with pytest.warns(DeprecationWarning, match="ignored"):
        client.save_weights_and_get_sampling_client("x").result(5)
    assert backend.ran[1:] == [("save_weights_for_ephemeral_sampler", 1)]


def test_refusals_at_the_call(client: TrainingClient, backend: Any, make_datum: MakeDatum) -> None:
    with pytest.raises(ValueError, match="No data provided"):
        client.forward_backward([], "cross_entropy")
    with pytest.raises(ValueError, match="No data provided"):
        client.forward_backward_custom([], lambda data, logprobs: (logprobs[0].sum(), {}))
    with pytest.raises(ValueError, match="exactly one"):
        client.optim_step()
    with pytest.raises(ValueError, match="exactly one"):
        client.optim_step(AdamParams(), adam_params=AdamParams())
    with pytest.raises(TypeError, match="AdamW only"):
        client.optim_step(DimuonParams(learning_rate=1.0))
    with pytest.raises(TypeError, match=r"data\[1\]: expected a Datum, got dict"):
        client.forward([make_datum(), {}], "cross_entropy")  # type: ignore[list-item]
    with pytest.raises(InvalidRequestError, match="encrypt"):
        client.save_weights_external("a", age_encryption_recipients=["age1..."])
    with pytest.raises(InvalidRequestError, match="tinker://"):
        client.load_state("/tmp/x")
    with pytest.raises(InvalidRequestError, match="access_token"):
        client.load_state("tinker://r/weights/a", "token")
    client.optim_step(AdamParams()).result(5)
    assert backend.ran == [("create_model", 0), ("optim_step", 1)]  # none of them took a place


def test_the_batch_is_taken_as_it_was_at_the_call(client: TrainingClient, backend: Any, make_datum: MakeDatum) -> None:
    backend.gates["forward_backward"] = threading.Event()
    data, config = [make_datum(weights=[1.0, 0.0, 0.0])], {"clip": 1.0}
    trained = client.forward_backward(data, "ppo", config)
    data.clear()
    config["clip"] = 2.0
    backend.gates["forward_backward"].set()
    assert len(trained.result(5).loss_fn_outputs) == 1
    assert backend.calls[-1][1]["loss_fn_config"] == {"clip": 1.0}


def test_info_tokenizer_and_pickle(client: TrainingClient) -> None:
    assert client.get_info().model_id == client.model_id == "s:train:0"
    assert asyncio.run(client.get_info_async()).model_name == "base"
    assert client.get_tokenizer() == "tokenizer of base"
    with pytest.raises(InvalidRequestError, match="ptlab server"):
        pickle.dumps(client)


def test_objects_of_the_official_sdk_are_taken(client: TrainingClient, backend: Any) -> None:
    tinker = pytest.importorskip("tinker", reason="tinker (dev extra) is not installed")
    datum = tinker.types.Datum(
        model_input=tinker.types.ModelInput.from_ints([1, 2]), loss_fn_inputs={"target_tokens": [0, 0], "weights": [1.0, 1.0]}
    )
    client.forward_backward([datum], "cross_entropy").result(5)
    client.optim_step(tinker.types.AdamParams(learning_rate=0.5)).result(5)
    assert type(backend.calls[-2][1]["data"][0]) is Datum
    assert backend.calls[-1][1]["adam"] == AdamParams(learning_rate=0.5)
    assert backend.gradient == pytest.approx(0.2)  # two targets 0, weight 1 each: 2 * 1 / 10
