"""Tinker code under `import ptlab as tinker`, in both call styles, on real engines; and a sampler that does not take new weights."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import ptlab as tinker
from ptlab import local, types
from ptlab.config import EnginesConfig, TorchSamplerConfig, VllmSamplerConfig
from ptlab.engines.adapter_slots import AdapterSlots
from ptlab.local import _default_connection, _disconnect
from ptlab.renderers import get_renderer

ADAM = types.AdamParams(learning_rate=5e-3)


@pytest.fixture(params=["torch", "vllm"])
def sampler_kind(request: pytest.FixtureRequest) -> str:
    if request.param == "vllm":
        pytest.importorskip("vllm", reason="vLLM is not installed (extras: cpu, gpu)", exc_type=ImportError)
    return str(request.param)


@pytest.fixture
def service_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler_kind: str) -> Iterator[tinker.ServiceClient]:
    monkeypatch.setenv("PTLAB_DATA_DIR", str(tmp_path / "data"))
    engines = EnginesConfig(sampler=TorchSamplerConfig() if sampler_kind == "torch" else VllmSamplerConfig())
    monkeypatch.setattr(local, "default_engines", lambda: engines)
    _default_connection.cache_clear()
    yield tinker.ServiceClient()
    _disconnect(_default_connection())
    _default_connection.cache_clear()


def padded_datum(prompt: types.ModelInput, sequence: types.SampledSequence, advantage: float) -> types.Datum:
    assert sequence.logprobs is not None
    full_tokens = prompt.to_ints() + sequence.tokens
    padding = [0.0] * (prompt.length - 1)
    return types.Datum(
        model_input=types.ModelInput.from_ints(full_tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": full_tokens[1:],
            "logprobs": padding + sequence.logprobs,
            "advantages": padding + [advantage] * len(sequence.tokens),
        },
    )


def test_the_blocking_style(service_client: tinker.ServiceClient, tiny_qwen3_dir: Path) -> None:
    training_client = service_client.create_lora_training_client(base_model=str(tiny_qwen3_dir), rank=32)
    renderer = get_renderer("chatml", training_client.get_tokenizer())
    prompt = renderer.build_generation_prompt([{"role": "user", "content": "Compute 103+888."}])
    ratios = []
    for i in range(2):
        sampling_path = training_client.save_weights_for_sampler(f"batch_{i}").result().path
        sampling_client = service_client.create_sampling_client(model_path=sampling_path)
        params = types.SamplingParams(max_tokens=8, temperature=1.0, seed=i, stop=renderer.get_stop_sequences())
        result = sampling_client.sample(prompt=prompt, num_samples=16, sampling_params=params).result()
        assert len(result.sequences) == 16 and {s.policy_version for s in result.sequences} == {i}
        data = [padded_datum(prompt, s, 1.0 if s.tokens[0] % 2 else -1.0) for s in result.sequences]
        fwd_bwd = training_client.forward_backward(
            data, loss_fn="ppo", loss_fn_config={"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
        )
        optim = training_client.optim_step(ADAM)
        ratios.append(fwd_bwd.result().metrics["ratio:max"])
        assert optim.result().metrics is not None
    assert ratios == pytest.approx([1.0, 1.0], abs=1e-4)  # each batch was sampled from the weights it trains

    path = training_client.save_state("checkpoint_10").result().path
    assert path == f"tinker://{training_client.model_id}/weights/checkpoint_10"
    again = service_client.create_training_client_from_state_with_optimizer(path=path)
    outputs = [client.forward(data, "ppo").result().loss_fn_outputs[0]["logprobs"].tolist() for client in (training_client, again)]
    assert outputs[0] == outputs[1]
    for rest in (service_client.create_rest_client(), tinker.RestClient()):
        assert path in {c.tinker_path for c in rest.list_checkpoints(training_client.model_id).result().checkpoints}


def test_the_async_style(service_client: tinker.ServiceClient, tiny_qwen3_dir: Path) -> None:
    async def loop() -> None:
        training_client = await service_client.create_lora_training_client_async(base_model=str(tiny_qwen3_dir), rank=8, seed=1)
        prompt = types.ModelInput.from_ints([5, 6, 7])
        sampling_client = await training_client.save_weights_and_get_sampling_client_async()
        result = await sampling_client.sample_async(prompt, num_samples=4, sampling_params=types.SamplingParams(max_tokens=4, seed=1))
        before = await sampling_client.compute_logprobs_async(prompt)
        data = [padded_datum(prompt, s, 1.0) for s in result.sequences]
        first = await training_client.forward_backward_async(data, "importance_sampling")  # queued, not yet computed
        step = await training_client.optim_step_async(ADAM)
        second = await training_client.forward_backward_async(data, "importance_sampling")  # the next batch, before any result is read
        assert (await first).metrics["ratio:mean"] == pytest.approx(1.0, abs=1e-4)
        assert (await second).metrics["ratio:mean"] > 1.01  # what was rewarded is likelier after the step: order was kept
        assert await step is not None
        newer = await training_client.save_weights_and_get_sampling_client_async()
        assert await sampling_client.compute_logprobs_async(prompt) == before  # a snapshot does not move
        assert await newer.compute_logprobs_async(prompt) != before

    asyncio.run(loop())


def test_a_custom_loss_gives_the_gradient_of_its_built_in_twin(service_client: tinker.ServiceClient, tiny_qwen3_dir: Path) -> None:
    weights = [0.5, -1.0, 2.0]
    datum = types.Datum(model_input=types.ModelInput.from_ints([1, 2, 3]), loss_fn_inputs={"target_tokens": [4, 5, 6], "weights": weights})

    def weighted_nll(data: object, logprobs: list[object]) -> tuple[object, dict[str, float]]:
        import torch

        assert isinstance(logprobs[0], torch.Tensor)
        loss = -(logprobs[0] * torch.tensor(weights)).sum()
        return loss, {"custom": 1.0}

    results = []
    for custom in (True, False):
        client = service_client.create_lora_training_client(base_model=str(tiny_qwen3_dir), rank=8, seed=3)
        built_in = client.forward_backward([datum], "cross_entropy") if not custom else None
        output = built_in or client.forward_backward_custom([datum], weighted_nll)  # type: ignore[arg-type]
        client.optim_step(ADAM)
        results.append((output.result().metrics["loss:sum"], client.forward([datum], "cross_entropy").result().metrics["loss:sum"]))
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_a_short_field_is_named_with_what_is_needed(service_client: tinker.ServiceClient, tiny_qwen3_dir: Path) -> None:
    client = service_client.create_lora_training_client(base_model=str(tiny_qwen3_dir), rank=8)
    datum = types.Datum(
        model_input=types.ModelInput.from_ints([1, 2, 3, 4]),
        loss_fn_inputs={"target_tokens": [2, 3, 4, 5], "logprobs": [-1.0, -1.0], "advantages": [0.0, 0.0, 1.0, 1.0]},
    )
    expected = r"datum 0: 'logprobs' has 2 values, model_input has 4 tokens; loss 'ppo' needs one per token"
    with pytest.raises(tinker.BadRequestError, match=expected):
        client.forward_backward([datum], "ppo").result()
    with pytest.raises(tinker.RequestFailedError, match="rank is 0"):
        service_client.create_lora_training_client(base_model=str(tiny_qwen3_dir), rank=0).result()
    with pytest.raises(tinker.InvalidRequestError, match="unknown loss 'pppo'"):
        client.forward_backward([datum], "pppo").result()  # type: ignore[arg-type]


@pytest.mark.parametrize("sampler_kind", ["torch"], indirect=True)  # those of vLLM are in test_vllm_sync.py
@pytest.mark.parametrize("fault", ["serves the base model", "serves the version before"])
def test_a_sampler_that_does_not_take_the_new_weights_is_refused(
    service_client: tinker.ServiceClient, tiny_qwen3_dir: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    client = service_client.create_lora_training_client(base_model=str(tiny_qwen3_dir), rank=8, seed=1)
    datum = types.Datum(model_input=types.ModelInput.from_ints([1, 2]), loss_fn_inputs={"target_tokens": [3, 4], "weights": [1.0, 1.0]})

    def train() -> None:
        client.forward_backward([datum], "cross_entropy")
        client.optim_step(ADAM).result()

    train()
    old = client.save_weights_and_get_sampling_client().result()
    activate = AdapterSlots.activate

    def stuck(self: AdapterSlots, adapter: object) -> None:
        activate(self, None if fault == "serves the base model" or adapter is None else next(iter(self._slots)))

    train()
    monkeypatch.setattr(AdapterSlots, "activate", stuck)
    with pytest.raises(tinker.WeightSyncError, match="like the base model" if "base" in fault else "older version"):
        client.save_weights_and_get_sampling_client().result()
    monkeypatch.undo()
    assert old.compute_logprobs(types.ModelInput.from_ints([1, 2, 3])).result()[0] is None  # the good version still answers
    client.save_weights_and_get_sampling_client().result()


def test_a_script_ends_cleanly_without_closing_anything(tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    code = f"""
        import ptlab as tinker
        client = tinker.ServiceClient().create_lora_training_client(base_model={str(tiny_qwen3_dir)!r}, rank=4)
        sampler = client.save_weights_and_get_sampling_client()
        print(len(sampler.sample(tinker.ModelInput.from_ints([1, 2]), 2, tinker.SamplingParams(max_tokens=3)).result().sequences))
    """
    environment = {"PTLAB_DATA_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "2\n", "")
