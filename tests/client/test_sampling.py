"""SamplingClient: single await, aborts when cancelled, releases its session when nobody uses it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import pickle
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ptlab.client.sampling import SamplingClient
from ptlab.client.service import ServiceClient
from ptlab.errors import InvalidRequestError
from ptlab.types import ModelInput, SampleResponse, SamplingParams, TensorData

PROMPT = ModelInput.from_ints([1, 2])


def eventually(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.002)


def test_every_argument_of_sample_reaches_the_backend(service: ServiceClient, backend: Any) -> None:
    client = service.create_sampling_client("tinker://r/sampler_weights/a", "base")
    target = TensorData([3], "int64", [1, 1])
    client.sample(PROMPT, 4, SamplingParams(max_tokens=7, stop=["\n"]), True, 2, 3, target, 5, 1).result(5)
    opened, sampled = (next(a for n, a in backend.calls if n == name) for name in ("create_sampling_session", "sample"))
    assert opened == {"model_path": "tinker://r/sampler_weights/a", "base_model": "base"}
    assert sampled == {
        "prompt": PROMPT,
        "num_samples": 4,
        "params": SamplingParams(max_tokens=7, stop=["\n"]),
        "include_prompt_logprobs": True,
        "topk_prompt_logprobs": 2,
        "topk_sample_logprobs": 3,
        "target_prompt_logprobs": target,
        "prompt_alt_tokens_k": 5,
        "prompt_logprobs_last_n": 1,
        "record_stability_info": False,
    }


def test_one_await_gives_the_value_in_both_styles_and_in_many_loops(service: ServiceClient) -> None:
    client = service.create_sampling_client(base_model="base")

    async def main() -> None:
        assert isinstance(await client.sample_async(PROMPT, 1, SamplingParams()), SampleResponse)
        assert isinstance(await client.sample(PROMPT, 1, SamplingParams()), SampleResponse)
        assert await client.compute_logprobs_async(PROMPT) == [None, -1.0]
        assert await client.compute_logprobs(PROMPT) == [None, -1.0]
        answers = await asyncio.gather(*(client.sample(PROMPT, n + 1, SamplingParams()) for n in range(5)))
        assert [len(a.sequences) for a in answers] == [1, 2, 3, 4, 5]
        assert client.sample(PROMPT, 1, SamplingParams()).result(5).sequences[0].tokens == [1]  # inside a running loop

    for _ in range(2):
        asyncio.run(main())
    futures = [client.sample(PROMPT, 1, SamplingParams()) for _ in range(3)]
    done, _ = concurrent.futures.wait(futures, timeout=5)
    assert len(done) == 3


def test_compute_logprobs_scores_the_prompt_at_temperature_one(service: ServiceClient, backend: Any) -> None:
    client = service.create_sampling_client(base_model="base")
    client.compute_logprobs(PROMPT, prompt_logprobs_last_n=1).result(5)
    asked = backend.calls[-1][1]
    assert asked["include_prompt_logprobs"] is True and asked["prompt_logprobs_last_n"] == 1 and asked["num_samples"] == 1
    assert asked["params"].max_tokens == 1 and asked["params"].temperature == 1.0


def test_cancelling_aborts_the_request_in_the_backend_and_a_timeout_does_not(service: ServiceClient, backend: Any) -> None:
    client = service.create_sampling_client(base_model="base").result(5)
    backend.gates["sample"] = threading.Event()

    async def main() -> None:
        task = asyncio.create_task(client.sample_async(PROMPT, 1, SamplingParams()))
        while not any(name == "sample" for name, _ in backend.calls):
            await asyncio.sleep(0.002)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    eventually(lambda: backend.aborted == ["sample"], "the backend's coroutine was cancelled")
    patient = client.sample(PROMPT, 1, SamplingParams())
    with pytest.raises(TimeoutError):
        patient.result(timeout=0.02)
    backend.gates["sample"].set()
    assert len(patient.result(5).sequences) == 1
    logprobs = client.compute_logprobs(PROMPT)
    assert logprobs.result(5) == [None, -1.0]


def test_a_dropped_client_releases_its_session_without_the_garbage_collector(service: ServiceClient, backend: Any) -> None:
    gc.collect()
    gc.disable()
    try:
        pending = service.create_sampling_client(base_model="base")
        client = pending.result(5)
        name = client.sampling_session_id
        client.sample(PROMPT, 1, SamplingParams()).result(5)
        del pending
        time.sleep(0.02)
        assert backend.released == []  # the other face of it still lives
        del client
        eventually(lambda: backend.released == [name], "the session was released")
    finally:
        gc.enable()


def test_a_request_keeps_its_session_although_the_client_is_gone(service: ServiceClient, backend: Any) -> None:
    backend.gates["sample"] = threading.Event()
    sampled = service.create_sampling_client(base_model="base").sample(PROMPT, 1, SamplingParams())
    gc.collect()
    eventually(lambda: any(name == "sample" for name, _ in backend.calls), "the request runs")
    time.sleep(0.02)
    assert backend.released == []
    backend.gates["sample"].set()
    assert len(sampled.result(5).sequences) == 1
    eventually(lambda: backend.released == ["s:sample:0"], "the session was released after it")


def test_a_client_dropped_before_it_was_ready_leaks_nothing(service: ServiceClient, backend: Any) -> None:
    backend.gates["create_sampling_session"] = threading.Event()
    pending = service.create_sampling_client(base_model="base")
    assert pending.cancel()
    del pending
    time.sleep(0.02)
    assert backend.released == []  # a release before the opening would find nothing, and the session would stay for ever
    backend.gates["create_sampling_session"].set()
    eventually(lambda: backend.released == ["s:sample:0"], "the session was released once it was open")
    assert backend.samplers == {}


def test_base_model_and_tokenizer(service: ServiceClient) -> None:
    client = service.create_sampling_client(base_model="base")
    assert client.get_base_model() == "base" and client.get_tokenizer() == "tokenizer of base"
    assert asyncio.run(client.get_base_model_async()) == "base"


def test_it_says_why_it_cannot_leave_the_process(service: ServiceClient) -> None:
    pending = service.create_sampling_client(base_model="base")
    for refused in (
        lambda: pickle.dumps(pending),
        lambda: pickle.dumps(pending.result(5)),
        lambda: pending.get_sampler_handle(),
        lambda: SamplingClient.from_sampler_handle("abc"),
    ):
        with pytest.raises(InvalidRequestError, match="ptlab server"):
            refused()


def test_wrong_objects_are_named_at_the_call(service: ServiceClient) -> None:
    client = service.create_sampling_client(base_model="base")
    with pytest.raises(TypeError, match="from_ints"):
        client.sample([1, 2], 1, SamplingParams())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="SamplingParams"):
        client.sample(PROMPT, 1, {"max_tokens": 3})  # type: ignore[arg-type]


def test_objects_of_the_official_sdk_are_taken(service: ServiceClient, backend: Any) -> None:
    tinker = pytest.importorskip("tinker", reason="tinker (dev extra) is not installed")
    client = service.create_sampling_client(base_model="base")
    theirs = tinker.types.TensorData(data=np.array([[3]]), dtype="int64", shape=[1, 1])
    client.sample(
        tinker.types.ModelInput.from_ints([1, 2]), 1, tinker.types.SamplingParams(max_tokens=3), target_prompt_logprobs=theirs
    ).result(5)
    asked = backend.calls[-1][1]
    assert asked["prompt"] == PROMPT and asked["params"] == SamplingParams(max_tokens=3)
    assert type(asked["target_prompt_logprobs"]) is TensorData
