from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ptlab.engines.base_model import eos_token_ids, load_base_model, load_tokenizer
from ptlab.errors import ConfigError


def test_facts_of_a_loaded_model(tiny_qwen3_dir: Path) -> None:
    model, info = load_base_model(str(tiny_qwen3_dir), name="org/tiny", device="cpu")
    assert (info.name, info.arch, info.vocab_size, info.max_context_length, info.dtype) == ("org/tiny", "qwen3", 512, 256, "float32")
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.config._attn_implementation == "sdpa"


def test_the_name_is_the_path_where_none_is_given_and_bfloat16_is_honoured(tiny_llama_dir: Path) -> None:
    model, info = load_base_model(str(tiny_llama_dir), dtype="bfloat16", device="cpu")
    assert (info.name, info.arch, info.dtype) == (str(tiny_llama_dir), "llama", "bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_each_call_loads_a_private_copy(tiny_qwen3_dir: Path) -> None:
    first, _ = load_base_model(str(tiny_qwen3_dir), device="cpu")
    second, _ = load_base_model(str(tiny_qwen3_dir), device="cpu")
    with torch.no_grad():
        first.lm_head.weight.zero_()
    assert second.lm_head.weight.abs().sum() > 0


def test_eos_comes_from_tokenizer_and_generation_config(tiny_qwen3_dir: Path) -> None:
    model, _ = load_base_model(str(tiny_qwen3_dir), device="cpu")
    assert eos_token_ids(model, load_tokenizer(str(tiny_qwen3_dir))) == {0, 2}


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/nowhere/at/all", "no such directory"),
        ("./nowhere", "no such directory"),
        ("nobody/never-was", "cannot be loaded from the Hugging Face hub"),
    ],
)
def test_a_missing_model_is_one_sentence_with_the_path(path: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        load_base_model(path, device="cpu")
    assert path in str(caught.value)
    with pytest.raises(ConfigError, match=says):
        load_tokenizer(path)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_base_model(str(tmp_path), device="cpu")


@pytest.mark.parametrize(("kwargs", "says"), [({"dtype": "float8"}, "float8"), ({"device": "toaster"}, "toaster")])
def test_unknown_dtype_and_device_are_named(tiny_qwen3_dir: Path, kwargs: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_base_model(str(tiny_qwen3_dir), **kwargs)
