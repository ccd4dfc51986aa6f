from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ptlab.benchmarks.models import count_parameters, model_directory, random_datum, write_adapter
from ptlab.engines.peft_trainer import PeftTrainer
from ptlab.errors import ConfigError


def test_parameters_are_counted_from_the_file(tiny_llama_dir: Path, tiny_qwen3_dir: Path) -> None:
    for directory in (tiny_llama_dir, tiny_qwen3_dir):
        assert count_parameters(directory) == PeftTrainer(str(directory), name="tiny").num_parameters


def test_models_by_name(tmp_path: Path, tiny_llama_dir: Path) -> None:
    small = model_directory("small", tmp_path)
    assert small == tmp_path / "small"
    assert count_parameters(small) == 4_197_120  # 4096*256 + 4*(2*256*(256+128) + 3*256*768 + 2*256 + 2*64) + 256
    assert model_directory("small", tmp_path) == small
    assert model_directory(str(tiny_llama_dir), tmp_path) == tiny_llama_dir
    with pytest.raises(ConfigError, match=r"known are ptlab/quickstart, .*, small, medium"):
        model_directory("smal", tmp_path)


def test_an_adapter_differs_from_the_base(tmp_path: Path, tiny_qwen3_dir: Path) -> None:
    tensors = load_file(write_adapter(tiny_qwen3_dir, 4, tmp_path / "adapter") / "adapter_model.safetensors")
    moved = [name for name, values in tensors.items() if "lora_B" in name and np.abs(values).max() > 0]
    assert len(moved) == len(tensors) // 2 == 2 * 7 + 1


def test_random_data_are_shifted_tokens() -> None:
    datum = random_datum(100, 8, seed=1)
    tokens, targets = datum.model_input.to_ints(), datum.loss_fn_inputs["target_tokens"].to_numpy().tolist()
    assert len(tokens) == len(targets) == 8
    assert tokens[1:] == targets[:-1]
    assert len(set(tokens)) > 1
