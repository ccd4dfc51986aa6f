"""Adapters from elsewhere: another run's weights and plain PEFT directories, on real engines; damage and strangers are refused."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from ptlab.config import ModelConfig, RlConfig
from ptlab.errors import CheckpointError, ConfigError, NotFoundError
from ptlab.local import ServiceClient, open_service
from ptlab.recipes.models import ServiceModels
from ptlab.types import AdamParams, Datum, ModelInput, TensorData

PROMPT = ModelInput.from_ints([5, 9, 3, 7, 11, 2])


@contextmanager
def service(run_dir: Path, model_dir: Path) -> Iterator[ServiceClient]:
    config = RlConfig.model_validate(
        {
            "name": "run",
            "run_dir": str(run_dir),
            "model": {"name": "tiny", "path": str(model_dir), "renderer": "chatml"},
            "lora": {"rank": 4},
            "engines": {"sampler": {"kind": "torch"}},
        }
    )
    with open_service(config) as opened:
        yield opened.client


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_qwen3_dir: Path) -> tuple[Path, list[float | None]]:
    """Directory of the weights for sampling that a run saved, and how they score PROMPT."""
    run_dir = tmp_path_factory.mktemp("first")
    with service(run_dir, tiny_qwen3_dir) as client:
        training = client.create_lora_training_client("tiny", rank=4, seed=1).result()
        inputs = {"target_tokens": TensorData.from_numpy(np.array([9, 3, 7])), "weights": TensorData.from_numpy(np.ones(3, np.float32))}
        training.forward_backward([Datum(model_input=ModelInput.from_ints([5, 9, 3]), loss_fn_inputs=inputs)], "cross_entropy")
        training.optim_step(AdamParams(learning_rate=0.05)).result()
        saved = training.save_weights_for_sampler("final").result()
        sampling = client.create_sampling_client(model_path=saved.path).result()
        scores = sampling.compute_logprobs(PROMPT).result()
    return run_dir / "run" / "checkpoints" / saved.path.removeprefix("tinker://"), scores


def scores_in(client: ServiceClient, path: str) -> list[float | None]:
    return client.create_sampling_client(model_path=path).result().compute_logprobs(PROMPT).result()


def test_weights_of_another_run_and_their_bare_peft_files_score_the_same(trained, tmp_path, tiny_qwen3_dir):
    directory, wanted = trained
    bare = tmp_path / "bare"
    shutil.copytree(directory, bare, ignore=shutil.ignore_patterns("manifest.json"))
    with service(tmp_path / "second", tiny_qwen3_dir) as client:
        base = client.create_sampling_client(base_model="tiny").result().compute_logprobs(PROMPT).result()
        own, plain = (client.import_adapter(path, "tiny").result() for path in (directory, bare))
        assert own == plain and own.startswith("tinker://imported-")  # the same content is one checkpoint
        assert scores_in(client, own)[1:] == pytest.approx(wanted[1:], abs=1e-5)
        assert max(abs(a - b) for a, b in zip(base[1:], wanted[1:], strict=True)) > 1e-2
    with service(tmp_path / "third", tiny_qwen3_dir) as client:  # without the copy that has a manifest
        path = client.import_adapter(bare, "tiny").result()
        assert scores_in(client, path)[1:] == pytest.approx(wanted[1:], abs=1e-5)


def test_a_foreign_peft_adapter_is_read_with_its_own_alpha(tmp_path, tiny_qwen3_dir, write_adapter: Callable[..., Path]):
    small, large = (write_adapter(tiny_qwen3_dir, tmp_path / str(alpha), targets=["q_proj", "down_proj"], alpha=alpha) for alpha in (4, 64))
    with service(tmp_path / "runs", tiny_qwen3_dir) as client:
        base = np.array(client.create_sampling_client(base_model="tiny").result().compute_logprobs(PROMPT).result()[1:])
        moved = [
            np.abs(np.array(scores_in(client, client.import_adapter(path, "tiny").result())[1:]) - base).max() for path in (small, large)
        ]
    assert 0 < moved[0] < moved[1]


def test_damage_strangers_and_training_states_are_refused(trained, tmp_path, tiny_qwen3_dir):
    directory, _ = trained
    damaged, stranger = tmp_path / "damaged", tmp_path / "stranger"
    shutil.copytree(directory, damaged)
    with (damaged / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    shutil.copytree(directory, stranger)
    manifest = json.loads((stranger / "manifest.json").read_text())
    (stranger / "manifest.json").write_text(json.dumps(manifest | {"base_model": "another"}))
    with service(tmp_path / "runs", tiny_qwen3_dir) as client:
        with pytest.raises(CheckpointError, match="differs from its checksum"):
            client.import_adapter(damaged, "tiny").result()
        with pytest.raises(CheckpointError, match="belongs to another, not to tiny"):
            client.import_adapter(stranger, "tiny").result()
        with pytest.raises(NotFoundError, match=r"no adapter_model\.safetensors"):
            client.import_adapter(tmp_path, "tiny").result()


def test_an_environment_opens_a_run_directory_and_a_run_without_weights_is_named(trained, tmp_path, tiny_qwen3_dir):
    directory, wanted = trained
    run = directory.parents[3]
    entry = {"step": 1, "path": f"tinker://{directory.relative_to(run / 'checkpoints')}", "kind": "sampler"}
    (run / "checkpoints.jsonl").write_text(json.dumps(entry) + "\n")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text("{}")
    with service(tmp_path / "runs", tiny_qwen3_dir) as client:
        models = ServiceModels(client, ModelConfig(name="tiny", renderer="chatml"), renderer="the run's")  # type: ignore[arg-type]

        async def open_and_score() -> list[float | None]:
            sampling, renderer = await models.open(model_path=str(run))
            assert renderer == "the run's"
            with pytest.raises(ConfigError, match="saved no weights for sampling"):
                await models.open(model_path=str(unfinished))
            base, _ = await models.open()
            assert (await base.compute_logprobs(PROMPT))[1:] != pytest.approx(wanted[1:], abs=1e-3)
            assert await models.context_length() == 256
            return await sampling.compute_logprobs(PROMPT)

        assert asyncio.run(open_and_score())[1:] == pytest.approx(wanted[1:], abs=1e-5)
