"""Real engines, trainer and sampler busy at once: what is in flight stays on its version while later ones are trained and published."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ptlab.backend.backend import Backend
from ptlab.client.connection import BackendConnection
from ptlab.client.sampling import SamplingClient
from ptlab.client.service import ServiceClient
from ptlab.client.training import TrainingClient
from ptlab.engines.peft_trainer import PeftTrainer
from ptlab.engines.protocols import Engines, Sampler
from ptlab.engines.torch_sampler import TorchSampler
from ptlab.futures import APIFuture
from ptlab.types import AdamParams, Datum, ModelInput, SampleResponse, SamplingParams, TensorData

PROMPT = [40, 17, 300, 8, 99, 12]


def open_sampler(kind: str, path: Path) -> Sampler:
    if kind == "torch":
        return TorchSampler(str(path), name="tiny", device="cpu")
    pytest.importorskip("vllm", reason="vLLM is not installed (extras: cpu, vllm)", exc_type=ImportError)
    from ptlab.engines.vllm_sampler import VllmSampler

    return VllmSampler(str(path), name="tiny")


@pytest.fixture(params=["torch", "vllm"])
def service(request: pytest.FixtureRequest, tmp_path: Path, tiny_qwen3_dir: Path) -> Iterator[ServiceClient]:
    sampler = open_sampler(request.param, tiny_qwen3_dir)
    trainer = PeftTrainer(str(tiny_qwen3_dir), name="tiny", device="cpu")
    backend = Backend(
        data_dir=tmp_path / "data",
        scratch_dir=tmp_path / "scratch",
        open_engines=lambda name: Engines(trainer=trainer, sampler=sampler, tokenizer=None),
        on_metrics=lambda metrics: None,
    )
    connection = BackendConnection(backend)
    yield ServiceClient(connection=connection)
    connection.submit(backend.close()).result()
    connection.close()


def train(client: TrainingClient) -> None:
    """One step, large enough that its version samples differently."""
    tokens = np.arange(20, 60)
    inputs = {"target_tokens": TensorData.from_numpy(tokens[1:]), "weights": TensorData.from_numpy(np.ones(39, dtype=np.float32))}
    passed = client.forward_backward([Datum(ModelInput.from_ints(tokens[:-1].tolist()), inputs)], "cross_entropy")
    client.optim_step(AdamParams(learning_rate=0.02)).result()
    passed.result()


def ask(client: SamplingClient) -> APIFuture[SampleResponse]:
    """Many times a training step's work for the sampler."""
    return client.sample(ModelInput.from_ints(PROMPT), 64, SamplingParams(max_tokens=200, seed=5, stop=[]))


def test_requests_finish_on_their_version_while_later_ones_are_trained_and_published(service: ServiceClient) -> None:
    training_client = service.create_lora_training_client("tiny", rank=8, seed=0, train_unembed=False)
    train(training_client)
    first = training_client.save_weights_and_get_sampling_client().result()
    idle = ask(first).result()

    busy = ask(first)
    train(training_client)
    assert not busy.done()  # a whole step meanwhile
    second = training_client.save_weights_and_get_sampling_client().result()

    for alone, crowded, newer in zip(idle.sequences, busy.result().sequences, ask(second).result().sequences, strict=True):
        assert (alone.policy_version, crowded.policy_version, newer.policy_version) == (1, 1, 2)
        assert crowded.tokens == alone.tokens
        np.testing.assert_allclose(crowded.logprobs_np, alone.logprobs_np, rtol=0, atol=1e-4)  # another batch, another order of summation
        assert newer.tokens != alone.tokens
