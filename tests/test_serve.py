"""`ptlab serve` as a process of its own: a tiny model, the real engines, the real SDK, and signals."""

from __future__ import annotations

import argparse
import gc
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tinker
from tinker import types

from ptlab import local, serve
from ptlab.errors import ConfigError
from ptlab.server.settings import ServeSettings

MODEL = "tiny/qwen3"
KEY = "tml-anything"
# the SDK leaves connections of its own open
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")


@pytest.fixture(autouse=True)
def _sdk_leftovers() -> Iterator[None]:
    """Collected here, where the warnings about them are ignored, and not in somebody else's test."""
    yield
    gc.collect()


@contextmanager
def process(model: Path, data_dir: Path, port: int = 0, *more: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """(a running server, its address)"""
    command = [sys.executable, "-m", "ptlab.cli", "serve", "--model", f"{MODEL}={model}", "--sampler", "torch", "--seed", "1"]
    command += ["--port", str(port), "--data-dir", str(data_dir), "--max-lora-rank", "8", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert running.stdout is not None and running.stderr is not None
    with running.stdout, running.stderr:
        try:
            lines = [running.stdout.readline() for _ in range(3)]
            assert MODEL in lines[0], running.stderr.read()
            yield running, lines[1].strip().removeprefix("export TINKER_BASE_URL=")
        finally:
            if running.poll() is None:
                running.kill()
            running.wait(30)


def datum(*tokens: int) -> types.Datum:
    inputs = {"target_tokens": [*tokens[1:], 5], "weights": [1.0] * len(tokens)}
    return types.Datum(model_input=types.ModelInput.from_ints(list(tokens)), loss_fn_inputs=inputs)


def train(model: tinker.TrainingClient, step: int) -> float:
    data = [datum(3 + step, 4, 5), datum(6, 7 + step, 8, 9)]
    output, updated = model.forward_backward(data, "cross_entropy"), model.optim_step(types.AdamParams(learning_rate=0.01))
    updated.result()
    return float(output.result().metrics["loss:sum"])


@pytest.mark.slow
def test_a_run_that_is_stopped_and_killed_equals_an_unbroken_one(tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    losses: dict[str, list[float]] = {}
    prompt, params = types.ModelInput.from_ints([3, 4, 5]), types.SamplingParams(max_tokens=5, temperature=1.0, seed=3)
    drawn: dict[str, Any] = {}
    with process(tiny_qwen3_dir, tmp_path / "unbroken") as (running, url):
        client = tinker.ServiceClient(base_url=url, api_key=KEY)
        model = client.create_lora_training_client(MODEL, rank=4, seed=7).result()
        losses["unbroken"] = [train(model, step) for step in range(4)]
        drawn["unbroken"] = model.save_weights_and_get_sampling_client().result().sample(prompt, 2, params).result()
        client.close("success").result()
    assert len(set(losses["unbroken"])) == 4

    data_dir = tmp_path / "broken"
    with process(tiny_qwen3_dir, data_dir) as (running, url):
        port = int(url.rpartition(":")[2])
        client = tinker.ServiceClient(base_url=url, api_key=KEY)
        model = client.create_lora_training_client(MODEL, rank=4, seed=7).result()
        losses["broken"] = [train(model, 0)]
        running.send_signal(signal.SIGTERM)
        assert running.wait(60) == 0
    with process(tiny_qwen3_dir, data_dir, port) as (running, _):
        losses["broken"] += [train(model, 1), train(model, 2)]
        sampler = model.save_weights_and_get_sampling_client().result()
        before = sampler.sample(prompt, 1, params).result().sequences[0].tokens
        running.kill()  # nothing is parked, nothing is said
    with process(tiny_qwen3_dir, data_dir, port) as (running, _):
        assert sampler.sample(prompt, 1, params).result().sequences[0].tokens == before
        losses["broken"] += [train(model, 3)]
        drawn["broken"] = model.save_weights_and_get_sampling_client().result().sample(prompt, 2, params).result()
        client.close("success").result()
        running.send_signal(signal.SIGTERM)
        assert running.wait(60) == 0
    assert losses["broken"] == losses["unbroken"]
    assert [s.tokens for s in drawn["broken"].sequences] == [s.tokens for s in drawn["unbroken"].sequences]


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_serve_arguments(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "a=/no/such/directory"], "not a directory"),
        (["--model", "=x"], "ID"),
        (["--model", "a", "--model", "a"], "twice"),
        (["--model", "a", "--set", "max_datums"], "KEY=VALUE"),
        (["--model", "a", "--set", "max_datum=3"], "max_datums"),
        (["--model", "a", "--set", "host=0.0.0.0"], "KEY=VALUE"),
        (["--model", "a", "--set", "max_datums=many"], "max_datums = 'many'"),
        (["--model", "a", "--port", "70000"], "port"),
        (["--model", "a", "--host", "0.0.0.0", "--port", "0"], "no API key exists"),
        (["--model", "a", "--host", "::", "--port", "0"], "no API key exists"),
        (["--model", "a", "--host", "192.0.2.1", "--port", "0"], "cannot listen"),
    ],
)
def test_a_wrong_command_line_is_told_before_a_model_is_opened(arguments: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        serve.run(parsed(*arguments, "--data-dir", str(tmp_path), "--sampler", "torch"))


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="choose another --port"):
        serve.run(parsed("--model", "a", "--port", str(taken.getsockname()[1]), "--data-dir", str(tmp_path), "--sampler", "torch"))


def test_a_model_that_cannot_be_opened_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError, match="model"):
        serve.run(parsed("--model", f"a={tmp_path / 'model'}", "--port", "0", "--data-dir", str(tmp_path / "data"), "--sampler", "torch"))


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("example.org", False),
    ],
)
def test_what_counts_as_this_machine_only(host: str, loopback: bool) -> None:
    assert serve._is_loopback(host) == loopback


def test_arguments_become_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr(serve, "serve", lambda *given, **more: called.append((given, more)) or 0)
    (tmp_path / "w").mkdir()
    arguments = ["--model", "Qwen/Qwen3-0.6B", "--model", f"b={tmp_path / 'w'}", "--sampler", "vllm", "--max-loras", "2", "--seed", "5"]
    assert (
        serve.run(parsed(*arguments, "--data-dir", str(tmp_path), "--set", "max_datums=7", "--set", "long_poll_s=2.5", "--strict-losses"))
        == 0
    )
    (settings, models, engines), more = called[0]
    assert models == {"Qwen/Qwen3-0.6B": None, "b": str(tmp_path / "w")}
    assert settings == ServeSettings(data_dir=tmp_path, seed=5, max_datums=7, long_poll_s=2.5, strict_losses=True)
    assert (engines.sampler.kind, engines.sampler.max_loras, more) == ("vllm", 2, {"max_lora_rank": local.DEFAULT_MAX_LORA_RANK})
