"""Load a frozen base model and its tokenizer from a local directory or a hub id. Shared by the trainer and the samplers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from ptlab.engines.protocols import BaseModelInfo
from ptlab.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_device(device: str | None) -> torch.device:
    """None = the first GPU where there is one, else the CPU. Raises: ConfigError on a device this machine does not have."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as err:
        raise ConfigError(f"device {device!r} is not a torch device; say 'cpu', 'cuda' or 'cuda:1'") from err
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r} asks for a GPU and torch {torch.__version__} sees none; say 'cpu' or install CUDA torch")
    return chosen


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The word "auto" means float32 on the CPU, bfloat16 on a GPU. Raises: ConfigError on an unknown word."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown; known: auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def load_base_model(path: str, *, name: str | None = None, dtype: str = "auto", device: str | None = None) -> tuple[Any, BaseModelInfo]:
    """A causal LM ready for inference: eval mode, no gradients, sdpa attention; and the facts about it.

    Args:
        path: a local directory in Hugging Face layout, or a hub id.
        name: what clients call the model (`BaseModelInfo.name`); None = `path`.
        dtype: "auto" (float32 on the CPU, bfloat16 on a GPU), "float32" or "bfloat16".
        device: a torch device; None = the first GPU where there is one, else the CPU.

    Each call loads a private copy: adapters put on one copy are not seen by another.
    Raises: ConfigError if there is no such model, or it is not a causal LM.
    """
    on = resolve_device(device)
    compute = resolve_dtype(dtype, on)
    _check_directory(path)
    hf_logging.disable_progress_bar()  # a download still shows its own
    try:
        config = AutoConfig.from_pretrained(path)
        model: Any = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=compute, attn_implementation="sdpa")
    except (OSError, ValueError) as err:
        raise ConfigError(_cannot_load("base model", path, err)) from err
    model = model.to(on).eval().requires_grad_(False)
    text_config = model.config.get_text_config()
    return model, BaseModelInfo(
        name=path if name is None else name,
        arch=str(model.config.model_type),
        vocab_size=int(model.get_output_embeddings().weight.shape[0]),
        max_context_length=int(text_config.max_position_embeddings),
        dtype=str(compute).removeprefix("torch."),
    )


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside the model. Raises: ConfigError if there is none."""
    _check_directory(path)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as err:
        raise ConfigError(_cannot_load("tokenizer", path, err)) from err
    return tokenizer


def eos_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer when a request names no stop: the tokenizer's EOS and those of the model's generation config."""
    return end_token_ids(model.generation_config.eos_token_id, tokenizer)


def end_token_ids(listed: int | list[int] | None, tokenizer: Any) -> frozenset[int]:
    """What a generation config lists (one id, several, or none) and the tokenizer's own."""
    ids = [listed] if isinstance(listed, int) else list(listed or [])
    return frozenset([*ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])])


def _check_directory(path: str) -> None:
    """Refuse what can only be a local path and is not there, before transformers takes it for a hub id."""
    looks_local = path.startswith((".", "~", os.sep)) or path.count("/") > 1
    directory = Path(path)
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise ConfigError(f"model {path!r}: the directory has no config.json; point to a directory written by save_pretrained()")
    elif looks_local:
        raise ConfigError(
            f"model {path!r}: no such directory; give a directory written by save_pretrained(), or a hub id such as 'Qwen/Qwen3-0.6B'"
        )


def _cannot_load(what: str, path: str, err: Exception) -> str:
    reason = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
    where = "the local directory" if Path(path).is_dir() else "the Hugging Face hub or its local cache"
    todo = "Check the name, or download the model and set model.path to its directory."
    return f"{what} {path!r} cannot be loaded from {where}: {reason} {todo}"
