"""Fixtures shared by all tests: one thread, offline, and two-layer random models with a small real tokenizer."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two torch threads on busy cores spin at their barriers
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

TINY_VOCAB_SIZE = 512
TINY_CONTEXT_LENGTH = 256


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def write_tiny_tokenizer(directory: Path) -> None:
    """A byte-level BPE tokenizer of 512 tokens, trained on a few lines; ids 0..2 are <|endoftext|> (EOS), <|im_start|>, <|im_end|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    lines = [
        f"Compute {a}+{b}. Ones: {a % 10}+{b % 10}. The answer of the sum is \\boxed{{{a + b}}}, thanks to columns; naïve café, Zürich.\n"
        for a, b in zip(range(100, 400, 3), range(900, 300, -6), strict=True)
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCAB_SIZE,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>").save_pretrained(directory)


def write_tiny_model(directory: Path, *, family: str, tied: bool, seed: int = 0) -> Path:
    """A random causal LM of 2 layers, hidden 64, 4 heads over 2 key heads, 512 tokens, context 256. Sharp enough that its tokens differ."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    shape = {
        "vocab_size": TINY_VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,  # the smallest that vLLM has on the CPU
        "max_position_embeddings": TINY_CONTEXT_LENGTH,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(**shape)) if family == "qwen3" else LlamaForCausalLM(LlamaConfig(**shape))
    model.generation_config.eos_token_id = [0, 2]
    model.save_pretrained(directory)
    write_tiny_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_qwen3_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3 shape, tied embeddings; EOS tokens 0 and 2."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny_qwen3"), family="qwen3", tied=True)


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama shape, untied embeddings; EOS tokens 0 and 2."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny_llama"), family="llama", tied=False)


def write_tiny_adapter(base: Path, directory: Path, *, targets: list[str], rank: int = 4, alpha: int = 32, seed: int = 0) -> Path:
    """A LoRA of random A and B in PEFT layout, strong enough to move log-probabilities by far more than any tolerance."""
    import peft
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM")
    with warnings.catch_warnings():  # of a head tied to the embeddings, which nobody merges here
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        model = peft.inject_adapter_in_model(config, AutoModelForCausalLM.from_pretrained(base), adapter_name="a")
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "base_model.model." + name.replace(".a.", "."): torch.randn(parameter.shape, generator=generator) * 0.05
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(directory))
    return directory


@pytest.fixture(scope="session")
def write_adapter() -> Callable[..., Path]:
    """write_tiny_adapter, for tests that make their own adapters."""
    return write_tiny_adapter
