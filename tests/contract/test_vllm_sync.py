"""The weight sync over real vLLM: planted faults are refused and named, and hundreds of versions leave nothing behind."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm", reason="vLLM is not installed (extras: cpu, gpu)", exc_type=ImportError)

from ptlab import local
from ptlab.client.connection import BackendConnection
from ptlab.client.service import ServiceClient
from ptlab.client.training import TrainingClient
from ptlab.config import EnginesConfig, VllmSamplerConfig
from ptlab.engines.protocols import AdapterRef, SampleCall
from ptlab.engines.vllm_engine import VllmEngine
from ptlab.engines.vllm_sampler import VllmSampler
from ptlab.errors import WeightSyncError
from ptlab.types import AdamParams, Datum, ModelInput, SamplingParams

ADAPTER_FILE = "adapter_model.safetensors"
PROMPT = ModelInput.from_ints([40, 17, 300, 8])
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def connection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackendConnection]:
    root = tmp_path_factory.mktemp("vllm_sync")
    engines = EnginesConfig(sampler=VllmSamplerConfig(), scratch_dir=str(root / "scratch"))
    opened = local._connect(root / "data", engines, {}, local.MetricsBox(), max_lora_rank=8)
    yield opened
    local._disconnect(opened)


@pytest.fixture
def client(connection: BackendConnection, tiny_qwen3_dir: Path) -> TrainingClient:
    """A model two steps old, all LoRA flags on."""
    service = ServiceClient(connection=connection)
    made = service.create_lora_training_client(str(tiny_qwen3_dir), rank=8, seed=1).result()
    for _ in range(2):
        train(made)
    return made


def train(client: TrainingClient, learning_rate: float = 0.02) -> None:
    inputs = {"target_tokens": [7, 8, 9, 10], "weights": [1.0, 1.0, 1.0, 1.0]}
    client.forward_backward([Datum(model_input=PROMPT, loss_fn_inputs=inputs)], "cross_entropy")
    client.optim_step(AdamParams(learning_rate=learning_rate)).result()


def one_zeroed(tensors: Tensors) -> Tensors:
    name = next(n for n in sorted(tensors) if "layers.1.self_attn.v_proj.lora_B" in n)
    return tensors | {name: torch.zeros_like(tensors[name])}


def one_missing(tensors: Tensors) -> Tensors:
    return {n: t for n, t in tensors.items() if "layers.0.mlp.down_proj" not in n}


def another(tensors: Tensors) -> Tensors:
    return {n: t.flip(0) for n, t in tensors.items()}


@pytest.mark.parametrize(
    ("damage", "message"),
    [(another, "other weights"), (one_zeroed, "other weights"), (one_missing, "2 of .* saved LoRA tensors are not registered")],
    ids=["wrong adapter", "zeroed tensor", "missing tensor"],
)
def test_vllm_loading_something_else_is_refused(
    client: TrainingClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Tensors], Tensors], message: str
) -> None:
    load = VllmEngine.load

    def load_damaged(self: VllmEngine, adapter: AdapterRef) -> frozenset[str]:
        copy = shutil.copytree(adapter.path, tmp_path / "damaged", dirs_exist_ok=True)
        save_file(damage(load_file(adapter.path / ADAPTER_FILE)), copy / ADAPTER_FILE)
        damaged = replace(adapter, path=copy)
        names = load(self, damaged)
        self._loras[adapter] = self._loras.pop(damaged)
        return names

    monkeypatch.setattr(VllmEngine, "load", load_damaged)
    with pytest.raises(WeightSyncError, match=message):
        client.save_weights_and_get_sampling_client().result()
    monkeypatch.undo()
    client.save_weights_and_get_sampling_client().result()


@pytest.mark.parametrize(
    ("serve", "message"),
    [(lambda ref, first: None, "like the base model"), (lambda ref, first: first, "older version")],
    ids=["base served", "older version and its prefix cache served"],
)
def test_vllm_answering_from_something_else_is_refused(
    client: TrainingClient, monkeypatch: pytest.MonkeyPatch, serve: Callable[[Any, Any], Any], message: str
) -> None:
    seen: list[AdapterRef] = []
    sample = VllmSampler.sample

    async def remember(self: VllmSampler, call: SampleCall) -> Any:
        seen.extend([call.adapter] if call.adapter is not None else [])
        return await sample(self, call)

    async def wrong(self: VllmSampler, call: SampleCall) -> Any:
        return await sample(self, replace(call, adapter=None if call.adapter is None else serve(call.adapter, seen[0])))

    monkeypatch.setattr(VllmSampler, "sample", remember)
    old = client.save_weights_and_get_sampling_client().result()  # its probe is in the prefix cache now
    train(client, learning_rate=1e-3)
    monkeypatch.setattr(VllmSampler, "sample", wrong)
    with pytest.raises(WeightSyncError, match=message):
        client.save_weights_and_get_sampling_client().result()
    monkeypatch.undo()
    assert len(old.compute_logprobs(PROMPT).result()) == 4
    client.save_weights_and_get_sampling_client().result()


def test_what_vllm_does_not_score_comes_from_the_trainer(client: TrainingClient) -> None:
    sampler = client.save_weights_and_get_sampling_client().result()
    whole = sampler.compute_logprobs(PROMPT).result()
    train(client)  # the trainer has moved on; the sampler's version has not
    answer = sampler.sample(PROMPT, 2, SamplingParams(max_tokens=3), include_prompt_logprobs=True, prompt_alt_tokens_k=2).result()
    assert answer.prompt_alt_tokens is not None and answer.prompt_alt_tokens.tokens.shape == [3, 2]
    assert answer.prompt_logprobs is not None and answer.prompt_logprobs[1:] == pytest.approx(whole[1:], abs=1e-4)
    assert [len(s.tokens) <= 3 for s in answer.sequences] == [True, True]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_hundreds_of_versions_leave_nothing_behind(client: TrainingClient, connection: BackendConnection) -> None:
    """500 publishes, each sampled from once. Memory settles in the first hundred (host cache of adapters, allocator) and stays."""
    backend = connection.backend
    (served,) = backend.served.opened()
    gc.collect()  # what earlier tests still hold
    before = len(served.sync.live_versions)
    sizes = []
    for number in range(500):
        train(client, learning_rate=1e-3)
        sampler = client.save_weights_and_get_sampling_client().result()
        sampler.sample(PROMPT, 1, SamplingParams(max_tokens=2)).result()
        if number % 100 == 99:
            sizes.append(resident_bytes())
    del sampler
    connection.submit(backend.sampling.release_sampling_session("nothing")).result()  # behind the releases on the loop
    assert len(served.sync.live_versions) <= before + 1  # the last one may be on its way out
    assert len(list(backend._scratch.iterdir())) <= before + 1
    assert max(sizes[1:]) - min(sizes[1:]) < 16 * 2**20, [size >> 20 for size in sizes]
