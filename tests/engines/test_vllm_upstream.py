"""What vLLM 0.32.0 does wrong on the CPU as it comes, and that it is right with ptlab's repair.

A test of "as it comes" that fails says that upstream has changed: then ptlab/engines/vllm_patches.py and the settings in vllm_sampler.py
are to be looked at again, and the pinned version with them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed (extras: cpu, vllm)", exc_type=ImportError)

from ptlab.engines import vllm_process  # first: it sets what vLLM reads at its import
from ptlab.engines.protocols import AdapterRef, SampleCall
from ptlab.engines.vllm_sampler import VllmSampler
from ptlab.errors import EngineError
from ptlab.types import ModelInput, SampleResponse, SamplingParams

with vllm_process.import_warnings_hidden():
    from ptlab.engines import vllm_patches

if not vllm_patches.repair_applies():
    pytest.skip(f"the repair is for vllm {vllm_patches.REPAIRED_VERSION} on the CPU", allow_module_level=True)

PROMPT = [40, 17, 300, 8, 99, 12]
WRONG = 0.05  # nats; the right ones agree to 1e-5


@contextmanager
def sampler_on(model_dir: Path, **engine_args: Any) -> Iterator[VllmSampler]:
    made = VllmSampler(str(model_dir), max_loras=2, engine_args=engine_args)
    try:
        yield made
    finally:
        asyncio.run(made.close())


@pytest.fixture(scope="module")
def heads(tiny_qwen3_dir: Path, tmp_path_factory: pytest.TempPathFactory, write_adapter: Callable[..., Path]) -> list[AdapterRef]:
    root = tmp_path_factory.mktemp("heads")
    targets = ["q_proj", "down_proj", "lm_head"]
    paths = [write_adapter(tiny_qwen3_dir, root / f"h{i}", targets=targets, seed=i) for i in (1, 2)]
    return [AdapterRef(name=path.name, version=i, path=path) for i, path in enumerate(paths)]


def call(prompt: list[int] = PROMPT, adapter: AdapterRef | None = None, prompt_logprobs: bool = False, **rest: Any) -> SampleCall:
    params = SamplingParams(**{"max_tokens": 8, "seed": 1, "stop": [], **rest})  # type: ignore[arg-type]
    return SampleCall(
        prompt=ModelInput.from_ints(prompt), num_samples=1, params=params, adapter=adapter, include_prompt_logprobs=prompt_logprobs
    )


def run(sampler: VllmSampler, *calls: SampleCall, load: list[AdapterRef] | None = None) -> list[SampleResponse]:
    async def gather() -> list[SampleResponse]:
        for ref in load or []:
            await sampler.load_adapter(ref)
        return list(await asyncio.gather(*(sampler.sample(c) for c in calls)))

    return asyncio.run(gather())


def base_logprobs(model_dir: Path, prompt: list[int], tokens: list[int]) -> np.ndarray[Any, Any]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        table = torch.log_softmax(model(input_ids=torch.tensor([prompt + tokens])).logits[0], dim=-1)[len(prompt) - 1 : -1]
    return table.gather(1, torch.tensor(tokens)[:, None])[:, 0].numpy()


@pytest.mark.parametrize("repaired", [False, True])
def test_a_row_without_adapter_gets_the_last_one_as_it_comes(tiny_qwen3_dir: Path, heads: list[AdapterRef], repaired: bool) -> None:
    """Upstream PRs 48421 and 49656. Both slots are filled, so that the last one holds an adapter."""
    with nullcontext() if repaired else vllm_patches.stock_vllm(), sampler_on(tiny_qwen3_dir) as sampler:
        base, _ = run(sampler, call(), call(adapter=heads[0], seed=2), load=heads)
    sequence = base.sequences[0]
    gap = np.abs(np.array(sequence.logprobs) - base_logprobs(tiny_qwen3_dir, PROMPT, sequence.tokens)).max()
    assert gap < 1e-4 if repaired else gap > WRONG


@pytest.mark.parametrize("repaired", [False, True])
def test_prompt_logprobs_of_a_batch_with_heads_crash_as_it_comes(tiny_qwen3_dir: Path, heads: list[AdapterRef], repaired: bool) -> None:
    """Issues 16668 and 51594; PRs 51597, 53842."""
    calls = [call(adapter=a, prompt_logprobs=True) for a in (heads[0], heads[1])] + [call([7, 8, 9], prompt_logprobs=True)]
    with nullcontext() if repaired else vllm_patches.stock_vllm(), sampler_on(tiny_qwen3_dir) as sampler:
        if not repaired:
            with pytest.raises(EngineError):
                run(sampler, *calls, load=heads)
            return
        first, second, base = run(sampler, *calls, load=heads)
        (alone,) = run(sampler, calls[1])
    assert base.prompt_logprobs is not None and first.prompt_logprobs is not None and second.prompt_logprobs is not None
    np.testing.assert_allclose(base.prompt_logprobs[1:], base_logprobs(tiny_qwen3_dir, [7], [8, 9]), atol=1e-4)
    np.testing.assert_allclose(second.prompt_logprobs[1:], (alone.prompt_logprobs or [])[1:], atol=1e-4)
    assert np.abs(np.subtract(first.prompt_logprobs[1:], second.prompt_logprobs[1:])).max() > WRONG


def test_a_seed_with_chunked_prefill_crashes_hence_it_is_off(tiny_qwen3_dir: Path) -> None:
    chunked = {"enable_chunked_prefill": True, "max_num_batched_tokens": 32, "max_num_seqs": 4}
    long = list(range(10, 110))
    with sampler_on(tiny_qwen3_dir, **chunked) as sampler, pytest.raises(EngineError, match="Generator"):
        run(sampler, call(long))
    with sampler_on(tiny_qwen3_dir) as sampler:
        assert len(run(sampler, call(long))[0].sequences[0].tokens) == 8


def test_sampling_takes_from_the_global_generator_as_it_comes(tiny_qwen3_dir: Path) -> None:
    def moved(sampler: VllmSampler) -> bool:
        before = torch.get_rng_state()
        run(sampler, call(seed=3), call(temperature=0.0))
        return not torch.equal(before, torch.get_rng_state())

    with vllm_patches.stock_vllm(), sampler_on(tiny_qwen3_dir) as sampler:
        assert moved(sampler)
        stock = run(sampler, call(seed=3))[0].sequences[0].tokens
    with sampler_on(tiny_qwen3_dir) as sampler:
        assert not moved(sampler)
        assert run(sampler, call(seed=3))[0].sequences[0].tokens == stock


def test_the_prefix_cache_goes_by_name_and_path_not_by_id() -> None:
    """Why the sampler puts a number that is never used twice into the name it gives vLLM."""
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import SamplingParams as VllmParams
    from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys
    from vllm.v1.request import Request

    def keys(name: str, int_id: int, path: str) -> Any:
        lora = LoRARequest(lora_name=name, lora_int_id=int_id, lora_path=path)
        request = Request("r", list(range(64)), VllmParams(max_tokens=1), None, lora_request=lora)
        return generate_block_hash_extra_keys(request, 0, 32, 0)[0]

    assert keys("a", 1, "/v") == keys("a", 2, "/v"), "another id alone is the same key"
    assert len({str(keys("a", 1, "/v")), str(keys("b", 1, "/v")), str(keys("a", 1, "/w"))}) == 3


def test_delta_of_mixed_rows_by_hand() -> None:
    a = torch.tensor([[[[1.0, 1.0]]], [[[1.0, 0.0]]]])  # [2 slots, 1, rank 1, 2 inputs]
    b = torch.tensor([[[[1.0], [2.0]]], [[[10.0], [20.0]]]])  # [2 slots, 1, 2 outputs, rank 1]
    inputs = torch.tensor([[1.0, 2.0]] * 3)
    for slots, want in [
        ([1, -1, 0], [[10.0, 20.0], [0.0, 0.0], [3.0, 6.0]]),
        ([1, 1, 1], [[10.0, 20.0]] * 3),
        ([-1, -1, -1], [[0.0, 0.0]] * 3),
    ]:
        outputs = torch.full((3, 3), 0.5)  # a padded third column
        vllm_patches.add_delta(outputs, inputs, vllm_patches.group_rows(torch.tensor(slots)), a, b)
        torch.testing.assert_close(outputs, torch.tensor([[*row, 0.0] for row in want]) + 0.5)
