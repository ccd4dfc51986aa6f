"""Models and adapters to measure with: random weights, never zeros."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from ptlab.backend.weight_sync import safetensors_header
from ptlab.engines.peft_trainer import PeftTrainer
from ptlab.engines.pretrain import ModelShape, new_model, save_model, train_tokenizer
from ptlab.errors import ConfigError
from ptlab.losses import resolve_loss
from ptlab.tiny_models.quickstart import tokenizer_texts
from ptlab.tiny_models.table import TINY_MODELS, tiny_model_directory
from ptlab.types import AdamParams, Datum, LoraConfig, ModelInput, TensorData

TOKENIZER_SIZE = 320
RANDOM_MODELS = {
    "small": ModelShape(vocab_size=4096, hidden_size=256, intermediate_size=768, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=64),
    "medium": ModelShape(vocab_size=8192, hidden_size=512, intermediate_size=1536, num_layers=8, num_heads=8, num_kv_heads=4, head_dim=64),
}
"""Qwen3-shaped, tied head, context 512: 4.2 M and 29 M parameters, of which the embedding is 1.0 M and 4.2 M."""


def model_directory(name: str, root: Path) -> Path:
    """Directory of a model by name: a tiny model's ("ptlab/quickstart"), one of RANDOM_MODELS (below `root`, on first use), or a path.

    Raises: ConfigError if there is no such model.
    """
    tiny = tiny_model_directory(name)
    if tiny is not None:
        return tiny
    if name in RANDOM_MODELS:
        directory = root / name
        if not directory.exists():
            tokenizer = train_tokenizer(tokenizer_texts(), TOKENIZER_SIZE)
            save_model(new_model(RANDOM_MODELS[name], tokenizer, seed=0), tokenizer, directory)
        return directory
    if not (Path(name) / "config.json").is_file():
        raise ConfigError(f"benchmark model {name!r}: known are {', '.join([*TINY_MODELS, *RANDOM_MODELS])}, or a model's directory")
    return Path(name)


def count_parameters(directory: Path) -> int:
    """Numbers in the model's safetensors files, from their headers; tied weights lie there once."""
    headers = [safetensors_header(file) for file in directory.glob("*.safetensors")]
    return sum(math.prod(tensor["shape"]) for header in headers for tensor in header.values())


def write_adapter(model: Path, rank: int, directory: Path) -> Path:
    """An adapter on all linear layers and the head, one optimizer step away from zero, so that it changes what is sampled."""
    trainer = PeftTrainer(str(model), name=model.name, dtype="float32")
    trainer.create_adapter("adapter", LoraConfig(rank=rank, seed=0))
    trainer.forward_backward("adapter", [random_datum(trainer.info.vocab_size, 32, seed=0)], resolve_loss("cross_entropy"))
    trainer.optim_step("adapter", AdamParams(learning_rate=1e-3))
    directory.mkdir(parents=True)
    trainer.save_adapter("adapter", directory)
    return directory


def random_datum(vocab_size: int, length: int, seed: int) -> Datum:
    """Random tokens, each the target of the one before, for cross_entropy."""
    tokens = np.random.default_rng(seed).integers(0, vocab_size, length + 1)
    return Datum(
        model_input=ModelInput.from_ints(tokens[:-1].tolist()),
        loss_fn_inputs={
            "target_tokens": TensorData.from_numpy(tokens[1:].astype(np.int64)),
            "weights": TensorData.from_numpy(np.ones(length, dtype=np.float32)),
        },
    )
