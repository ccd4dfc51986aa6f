"""What is particular to the torch sampler: merging, memory limits, faults in the worker. Its promises: test_sampler_contract."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ptlab.engines import adapter_slots, decode_attention, torch_sampler
from ptlab.engines.protocols import AdapterRef, SampleCall
from ptlab.engines.torch_sampler import TorchSampler
from ptlab.errors import ConfigError, EngineError
from ptlab.types import ModelInput, SampleResponse, SamplingParams


@pytest.fixture(scope="module")
def sampler(tiny_qwen3_dir: Path) -> Iterator[TorchSampler]:
    made = TorchSampler(str(tiny_qwen3_dir), device="cpu", gather_quiet_s=0.03, gather_max_s=0.5)  # a busy machine must not split bursts
    yield made
    asyncio.run(made.close())


@pytest.fixture
def adapter(tiny_qwen3_dir: Path, tmp_path: Path, write_adapter: Callable[..., Path]) -> AdapterRef:
    return AdapterRef(name=str(tmp_path), version=1, path=write_adapter(tiny_qwen3_dir, tmp_path / "a", targets=["q_proj", "down_proj"]))


class Recorder:
    """Stands in for generate(): notes what each batch holds, then does the work, or fails where `fault` says."""

    def __init__(self, fault: Callable[[list[Any]], Exception | None] = lambda draws: None) -> None:
        self.batches: list[tuple[int, int]] = []  # (prompts, rows)
        self._generate, self._fault = torch_sampler.generate, fault

    def __call__(self, model: Any, prompts: Any, draws: Any, **rest: Any) -> Any:
        self.batches.append((len(prompts), len(draws)))
        err = self._fault(draws)
        if err is not None:
            raise err
        return self._generate(model, prompts, draws, **rest)


def call(prompt: list[int], n: int = 1, adapter: AdapterRef | None = None, **params: Any) -> SampleCall:
    asked = SamplingParams(**{"max_tokens": 10, "seed": 1, "stop": [], **params})
    return SampleCall(prompt=ModelInput.from_ints(prompt), num_samples=n, params=asked, adapter=adapter)


def run(sampler: TorchSampler, *calls: SampleCall) -> list[Any]:
    async def gather() -> list[Any]:
        return list(await asyncio.gather(*(sampler.sample(c) for c in calls), return_exceptions=True))

    return asyncio.run(gather())


def tokens(response: SampleResponse) -> list[list[int]]:
    return [sequence.tokens for sequence in response.sequences]


def test_a_burst_is_one_batch_whose_order_does_not_depend_on_arrival(sampler: TorchSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(torch_sampler, "generate", recorder)
    calls = [call([7 + i % 3, *range(20, 25 + i % 4)], n=3, seed=i, temperature=0.5 + i / 10) for i in range(8)]
    forward = run(sampler, *calls)
    backward = run(sampler, *calls[::-1])[::-1]
    assert recorder.batches == [(8, 24), (8, 24)]
    for one, other in zip(forward, backward, strict=True):
        for a, b in zip(one.sequences, other.sequences, strict=True):
            np.testing.assert_array_equal(a.tokens_np, b.tokens_np)
            np.testing.assert_array_equal(a.logprobs_np, b.logprobs_np)  # to the last bit


def test_each_distinct_prompt_is_read_once(sampler: TorchSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(torch_sampler, "generate", recorder)
    run(sampler, *(call([5, 6, 7 + i % 2], n=4, seed=i) for i in range(6)))
    assert recorder.batches == [(2, 24)]


@pytest.mark.parametrize("limits", [{"max_rows": 3}, {"max_kv_bytes": 1024 * 38}, {"max_kv_bytes": 1}, {"prefill_tokens": 7}])
def test_limits_split_the_work_and_change_nothing(
    sampler: TorchSampler, tiny_qwen3_dir: Path, monkeypatch: pytest.MonkeyPatch, limits: dict[str, int]
) -> None:
    """1024 key-value bytes a token; 38 tokens hold two rows of up to 9 + 10, and not three of 3 + 10."""
    calls = [call(list(range(10, 13 + 2 * i)), n=3, seed=i) for i in range(4)]
    plain = run(sampler, *calls)
    small = TorchSampler(str(tiny_qwen3_dir), device="cpu", gather_quiet_s=0.03, **limits)  # type: ignore[arg-type]
    recorder = Recorder()
    monkeypatch.setattr(torch_sampler, "generate", recorder)
    tight = run(small, *calls)
    asyncio.run(small.close())
    for one, other in zip(plain, tight, strict=True):
        assert tokens(one) == tokens(other)
        for a, b in zip(one.sequences, other.sequences, strict=True):
            np.testing.assert_allclose(a.logprobs_np, b.logprobs_np, atol=1e-4)  # float32, other padding
    most_rows = {"max_rows": 3, "max_kv_bytes": 2 if limits.get("max_kv_bytes") != 1 else 1, "prefill_tokens": 12}[next(iter(limits))]
    assert max(rows for _, rows in recorder.batches) == most_rows
    assert sum(rows for _, rows in recorder.batches) == 12


def test_a_failure_fails_its_batch_with_the_cause_and_the_worker_lives_on(
    sampler: TorchSampler, adapter: AdapterRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    asyncio.run(sampler.load_adapter(adapter))
    fault = ArithmeticError("planted")
    monkeypatch.setattr(torch_sampler, "generate", Recorder(lambda draws: fault if any(d.max_tokens == 9 for d in draws) else None))
    bad, other_bad, good = run(sampler, call([5], max_tokens=9), call([6]), call([5], adapter=adapter))
    for err in (bad, other_bad):
        assert isinstance(err, EngineError)
        assert err.__cause__ is fault
        assert (err.engine, err.operation) == ("torch sampler", "sample")
    assert isinstance(good, SampleResponse)
    assert isinstance(run(sampler, call([5]))[0], SampleResponse)


def test_out_of_memory_runs_the_batch_in_halves(sampler: TorchSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [call([5 + i], n=2, seed=i) for i in range(3)]
    plain = run(sampler, *calls)
    recorder = Recorder(lambda draws: torch.OutOfMemoryError("planted") if len(draws) > 2 else None)
    monkeypatch.setattr(torch_sampler, "generate", recorder)
    assert [tokens(r) for r in run(sampler, *calls)] == [tokens(r) for r in plain]
    assert [rows for _, rows in recorder.batches] == [6, 3, 1, 2, 3, 1, 2]
    monkeypatch.setattr(torch_sampler, "generate", Recorder(lambda draws: torch.OutOfMemoryError("planted")))
    (err,) = run(sampler, calls[0])
    assert isinstance(err, EngineError)
    assert isinstance(err.__cause__, torch.OutOfMemoryError)


def test_weights_that_did_not_land_are_noticed_and_leave_nothing(
    sampler: TorchSampler, adapter: AdapterRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(parameters: dict[str, torch.nn.Parameter], tensors: Any, where: Path) -> None:
        for name, parameter in parameters.items():
            parameter.data.copy_(tensors["base_model.model." + name])
        next(iter(parameters.values())).data[0, 0] += 1e-3

    with monkeypatch.context() as patch:
        patch.setattr(adapter_slots, "copy_into", forgetful)
        with pytest.raises(EngineError, match=r"lora_A\.weight in the model is not the one in"):
            asyncio.run(sampler.load_adapter(adapter))
    assert isinstance(run(sampler, call([5], adapter=adapter))[0], EngineError)
    assert len(asyncio.run(sampler.load_adapter(adapter))) == 8


def test_a_name_is_not_given_to_other_weights(sampler: TorchSampler, adapter: AdapterRef) -> None:
    asyncio.run(sampler.load_adapter(adapter))
    with pytest.raises(EngineError, match="in use for other weights"):
        asyncio.run(sampler.load_adapter(AdapterRef(name=adapter.name, version=2, path=adapter.path)))


def test_unloaded_weights_are_freed_and_the_base_is_untouched(sampler: TorchSampler, adapter: AdapterRef) -> None:
    (before,) = run(sampler, call([5, 6, 7], n=2))
    asyncio.run(sampler.load_adapter(adapter))
    held = [weakref.ref(parameter) for parameter in sampler._slots._slots[adapter].parameters.values()]
    assert len(held) == 8 and all(ref() is not None for ref in held)
    asyncio.run(sampler.unload_adapter(adapter))
    gc.collect()
    assert all(ref() is None for ref in held)
    (after,) = run(sampler, call([5, 6, 7], n=2))
    np.testing.assert_array_equal(before.sequences[1].logprobs_np, after.sequences[1].logprobs_np)


def test_cancelling_stops_the_generation_and_takes_queued_requests_out(sampler: TorchSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(torch_sampler, "generate", recorder)
    passes = 0
    begun = threading.Event()

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == 5:
            begun.set()

    async def scenario() -> None:
        running = asyncio.create_task(sampler.sample(call([5], max_tokens=250)))
        await asyncio.to_thread(begun.wait, 10)
        queued = asyncio.create_task(sampler.sample(call([6], max_tokens=250)))
        await asyncio.sleep(0)
        for task in (running, queued):
            task.cancel()
        await asyncio.gather(running, queued, return_exceptions=True)
        await sampler.sample(call([7], max_tokens=1))

    hook = sampler._model.register_forward_hook(count)
    asyncio.run(scenario())
    hook.remove()
    assert passes < 200  # of 250
    assert recorder.batches == [(1, 1), (1, 1)]  # the queued one never ran


def test_serves_several_event_loops_at_once(sampler: TorchSampler) -> None:
    results: dict[int, Any] = {}
    threads = [threading.Thread(target=lambda i=i: results.update({i: run(sampler, call([5, 6], seed=i))[0]})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {i: tokens(r) for i, r in results.items()} == {i: tokens(run(sampler, call([5, 6], seed=i))[0]) for i in range(4)}


def test_a_model_whose_decoding_differs_from_its_forward_pass_is_refused(tiny_qwen3_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = decode_attention.decode_attention

    def wrong(module: Any, query: torch.Tensor, *args: Any, **rest: Any) -> Any:
        return original(module, query * 1.2 if query.shape[2] == 1 else query, *args, **rest)

    monkeypatch.setattr(decode_attention, "decode_attention", wrong)
    with pytest.raises(EngineError, match="batched decoding differs from a plain forward pass by"):
        TorchSampler(str(tiny_qwen3_dir), device="cpu")
    monkeypatch.undo()
    asyncio.run(TorchSampler(str(tiny_qwen3_dir), device="cpu").close())


def test_a_missing_model_is_a_config_error_before_any_thread_starts() -> None:
    before = threading.active_count()
    with pytest.raises(ConfigError, match="no such directory"):
        TorchSampler("/nowhere/at/all")
    assert threading.active_count() == before
