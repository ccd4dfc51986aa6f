"""One backend, two faces: a recipe gives the same numbers in one process and through `ptlab serve` and the official SDK."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
OFFLINE = {**os.environ, "TINKER_API_KEY": "tml-test", "TINKER_TELEMETRY": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


COMMON = {
    "name": "tiny",
    "model": {"name": "tiny", "renderer": "chatml"},
    "lora": {"rank": 4},
    "optim": {"learning_rate": 0.01, "grad_clip_norm": 1.0},
    "engines": {"sampler": {"kind": "torch"}},
    "checkpoint": {"every": 2},
}
ADDITION = {"kind": "addition", "groups_per_step": 3, "group_size": 4, "num_test": 3, "reward": "random"}
RECIPES: dict[str, dict[str, Any]] = {
    "rl": {"recipe": "rl", "steps": 4, "env": ADDITION, "rollout": {"max_tokens": 8}, "loss": {"name": "ppo"}, "eval": {"every": 2}},
    "game, kl": {
        "recipe": "rl",
        "steps": 2,
        "env": {"kind": "guess_number", "high": 8, "groups_per_step": 2, "group_size": 3, "num_test": 3, "reward": "random"},
        "rollout": {"max_tokens": 6},
        "kl": {"coef": 0.1},
        "eval": {"every": 2},
    },
    "sft": {"recipe": "sft", "steps": 3, "data": {"kind": "sums", "num_train": 40, "num_test": 8}, "batch": {"conversations": 8}},
    "dpo": {
        "recipe": "dpo",
        "steps": 3,
        "data": {"kind": "made", "num_train": 40, "num_test": 8},
        "pairs_per_step": 4,
        "eval": {"every": 2},
    },
}


def write_config(directory: Path, model_dir: Path, recipe: str) -> Path:
    config = COMMON | RECIPES[recipe] | {"run_dir": str(directory / "runs"), "model": {**COMMON["model"], "path": str(model_dir)}}
    directory.mkdir(parents=True)
    path = directory / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def train(config: Path, *flags: str) -> list[dict[str, float]]:
    """The rows of the run's metrics, without wall clocks and what only the process with the engines can tell."""
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--config", str(config), *flags]
    done = subprocess.run(command, cwd=ROOT, env=OFFLINE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (config.parent / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if not key.startswith(("time/", "sync/"))} for line in lines]


@contextmanager
def serve(model_dir: Path, data_dir: Path) -> Iterator[str]:
    """`ptlab serve` as a user starts it; its URL."""
    command = [sys.executable, "-m", "ptlab.cli", "serve", "--model", f"tiny={model_dir}", "--data-dir", str(data_dir), "--port", "0"]
    process = subprocess.Popen([*command, "--sampler", "torch"], cwd=ROOT, env=OFFLINE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        printed = ""
        while not (found := re.search(r"TINKER_BASE_URL=(\S+)", printed)):
            line = process.stdout.readline()
            assert line, f"the server ended before it was ready: {printed}"
            printed += line
        yield found[1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


@pytest.fixture(scope="module")
def url(tiny_qwen3_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve(tiny_qwen3_dir, tmp_path_factory.mktemp("data")) as url:
        yield url


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_gives_the_same_metrics_in_process_and_over_http(tmp_path: Path, tiny_qwen3_dir: Path, recipe: str, url: str) -> None:
    local = train(write_config(tmp_path / "local", tiny_qwen3_dir, recipe))
    remote = train(write_config(tmp_path / "remote", tiny_qwen3_dir, recipe), "--base-url", url)
    assert [row["step"] for row in remote] == [row["step"] for row in local]
    assert len(local) >= RECIPES[recipe]["steps"]
    for ours, theirs in zip(local, remote, strict=True):
        assert theirs.keys() == ours.keys()
        # tokens are the same; requests fall into other batches on the way, which moves the last bits of float32 log-probabilities
        assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-5)
