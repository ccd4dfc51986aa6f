from __future__ import annotations

import asyncio
from importlib.util import find_spec
from pathlib import Path

import pytest

from ptlab.benchmarks.models import write_adapter
from ptlab.benchmarks.sampler import Load, SamplerTiming, compare_on_models, sampler_table, time_samplers
from ptlab.engines.protocols import AdapterRef, SampleCall
from ptlab.engines.torch_sampler import TorchSampler
from ptlab.errors import EngineError
from ptlab.types import SampleResponse

TINY_LOAD = Load(request_counts=(1, 3), prompt_tokens=4, answer_tokens=4, repeats=1)


WARM_UP = (0, 2, 3, 4)  # of the eight calls on the base or the adapter: a warm-up and one counted burst of 1, then of 3


class CountingSampler(TorchSampler):
    """Notes the calls it gets; takes its time for those of a warm-up."""

    warm_up_s = 0.0

    async def sample(self, call: SampleCall) -> SampleResponse:
        self.calls = [*self.__dict__.get("calls", []), call]
        if (len(self.calls) - 1) % 8 in WARM_UP:
            await asyncio.sleep(self.warm_up_s)
        return await super().sample(call)


def test_every_kind_of_burst_is_timed_in_turns(tmp_path: Path, tiny_qwen3_dir: Path) -> None:
    adapter = AdapterRef(name="a@1", version=1, path=write_adapter(tiny_qwen3_dir, 4, tmp_path / "adapter"))
    samplers = {name: CountingSampler(str(tiny_qwen3_dir)) for name in ("one", "two")}
    samplers["two"].warm_up_s = 0.4
    said: list[str] = []

    async def measure() -> list[SamplerTiming]:
        timings = await time_samplers("tiny", samplers, adapter, TINY_LOAD, said.append)
        for sampler in samplers.values():
            await sampler.close()
        return timings

    timings = asyncio.run(measure())
    kinds = [(t.adapter, t.requests, t.sampler, t.tokens) for t in timings]
    assert kinds == [(a, n, s, 4 * n) for a in (False, True) for n in (1, 3) for s in ("one", "two")]
    assert all(0 < t.wall_s < 0.2 and t.cpu_s > 0 for t in timings)  # a warm-up that counted would show as 0.2 at least
    assert len(said) == 4
    for sampler in samplers.values():
        assert [call.adapter for call in sampler.calls] == [None] * 8 + [adapter] * 8
        prompts = [tuple(call.prompt.to_ints()) for call in sampler.calls[:8]]
        assert len(set(prompts)) >= 6  # the prefix cache may not answer for the warm-up: other prompts every time
    assert [c.prompt for c in samplers["one"].calls] == [c.prompt for c in samplers["two"].calls]


def test_ragged_answers_have_lengths_of_their_own() -> None:
    lengths = Load(answer_tokens=64, ragged=True).lengths(500)
    assert min(lengths) >= 16
    assert max(lengths) <= 112
    assert sum(lengths) / 500 == pytest.approx(64, abs=4)
    assert Load(answer_tokens=64, ragged=True).lengths(500) == lengths
    assert Load(answer_tokens=64).lengths(3) == [64, 64, 64]


def test_a_sampler_that_answers_too_little_is_no_result(tmp_path: Path, tiny_qwen3_dir: Path) -> None:
    class Short(TorchSampler):
        async def sample(self, call: SampleCall) -> SampleResponse:
            fewer = call.params.model_copy(update={"max_tokens": 1})
            return await super().sample(SampleCall(prompt=call.prompt, num_samples=1, params=fewer, adapter=call.adapter))

    adapter = AdapterRef(name="a@1", version=1, path=write_adapter(tiny_qwen3_dir, 4, tmp_path / "adapter"))
    sampler = Short(str(tiny_qwen3_dir))

    async def measure() -> None:
        try:
            await time_samplers("tiny", {"short": sampler}, adapter, TINY_LOAD, lambda text: None)
        finally:
            await sampler.close()

    with pytest.raises(EngineError, match="1 tokens came back, 4 were asked for"):
        asyncio.run(measure())


def test_the_table_compares_two_samplers() -> None:
    slow = SamplerTiming(model="m", adapter=True, requests=16, sampler="torch", tokens=1000, wall_s=4.0, cpu_s=2.0)
    fast = SamplerTiming(model="m", adapter=True, requests=16, sampler="vLLM", tokens=1000, wall_s=1.0, cpu_s=0.8)
    table = sampler_table([fast, slow], "vLLM", "torch").splitlines()
    assert table[0].split(" | ")[3:7] == ["torch tok/s", "vLLM tok/s", "torch tok/CPU-s", "vLLM tok/CPU-s"]
    assert table[2] == "| m | adapter | 16 | 250 | 1,000 | 500 | 1,250 | 4.00 | **2.50** |"
    assert len(table) == 3


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_against_torch_on_a_tiny_model(tmp_path: Path, tiny_qwen3_dir: Path) -> None:
    load = Load(request_counts=(2,), prompt_tokens=4, answer_tokens=8, repeats=1, ragged=True)
    timings = asyncio.run(compare_on_models([str(tiny_qwen3_dir)], load, 8, tmp_path, lambda text: None))
    assert [(t.sampler, t.adapter) for t in timings] == [("vLLM", False), ("torch", False), ("vLLM", True), ("torch", True)]
