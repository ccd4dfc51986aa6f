"""LoRA as ptlab defines it: which modules the three flags mean, the initial weights, and the files of an adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ptlab.engines.protocols import AdapterRef, lora_alpha
from ptlab.errors import CheckpointError, InvalidRequestError
from ptlab.types import LoraConfig

ADAPTER_FILE = "adapter_model.safetensors"
_ROUTERS = ("gate", "router")  # the router of a mixture of experts is not part of "mlp"


@dataclass(frozen=True, slots=True)
class LoraTargets:
    """Paths of a bare model's linear layers by the flag that selects them. Found once, before any adapter changes the modules."""

    attn: frozenset[str]
    mlp: frozenset[str]
    unembed: frozenset[str]
    others: frozenset[str]
    transposed: bool
    """The model uses Conv1D (GPT-2), whose weight is stored the other way round."""

    @classmethod
    def of(cls, model: Any) -> LoraTargets:
        """A layer belongs to attention or MLP by the name of its parent module."""
        head = model.get_output_embeddings()
        found: dict[str, set[str]] = {"attn": set(), "mlp": set(), "unembed": set(), "others": set()}
        layers = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
        for path, module in layers.items():
            *parents, name = path.lower().split(".")
            if module is head:
                kind = "unembed"
            elif any("attn" in p or "attention" in p for p in parents):
                kind = "attn"
            elif name not in _ROUTERS and any(word in p for p in parents for word in ("mlp", "ffn", "feed_forward", "expert")):
                kind = "mlp"
            else:
                kind = "others"
            found[kind].add(path)
        transposed = any(isinstance(module, Conv1D) for module in layers.values())
        return cls(**{kind: frozenset(paths) for kind, paths in found.items()}, transposed=transposed)

    def select(self, lora: LoraConfig) -> list[str]:
        """Target modules of a PEFT config: short names ("q_proj"), on which samplers match, unless one of them is ambiguous.

        Raises: InvalidRequestError if no flag is set, or one that is set finds no layer.
        """
        chosen: set[str] = set()
        for flag, on, paths in [
            ("train_attn", lora.train_attn, self.attn),
            ("train_mlp", lora.train_mlp, self.mlp),
            ("train_unembed", lora.train_unembed, self.unembed),
        ]:
            if on and not paths:
                raise InvalidRequestError(f"LoRA flag {flag} is set, but this model has no linear layer it could mean; set {flag}=False")
            chosen |= paths if on else frozenset()
        if not chosen:
            raise InvalidRequestError("a LoRA adapter needs at least one of train_attn, train_mlp, train_unembed")
        rest = (self.attn | self.mlp | self.unembed | self.others) - chosen
        short = {path.split(".")[-1] for path in chosen}
        return sorted(chosen) if short & {path.split(".")[-1] for path in rest} else sorted(short)


def peft_config(targets: LoraTargets, lora: LoraConfig, base_model: str) -> peft.LoraConfig:
    """The PEFT config of an adapter: rank, alpha, targets; no dropout, no bias.

    Raises: InvalidRequestError for a rank below 1 or flags that select nothing.
    """
    if lora.rank < 1:
        raise InvalidRequestError(f"LoRA rank is {lora.rank}; it must be at least 1 (8 to 64 is usual)")
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora_alpha(lora.rank),
        target_modules=targets.select(lora),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        fan_in_fan_out=targets.transposed,
    )
    config.base_model_name_or_path = base_model
    return config


def initialise(parameters: dict[str, nn.Parameter], seed: int | None) -> None:
    """Fill A with the usual Kaiming-uniform draw (bound 1 / sqrt(fan_in)) and B with zeros, so the adapter starts as the identity.

    The draw happens on the CPU in name order: a seed gives the same adapter on every device. seed None = a random one.
    """
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    with torch.no_grad():
        for name in sorted(parameters):
            weight = parameters[name]
            if ".lora_A." in name:
                values = torch.empty(weight.shape, dtype=torch.float32)
                nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
                weight.copy_(values)
            else:
                weight.zero_()


def save_adapter(parameters: dict[str, nn.Parameter], config: peft.LoraConfig, directory: Path) -> None:
    """Write the PEFT layout into an existing directory: adapter_config.json and the LoRA tensors, never a base weight."""
    tensors = {f"base_model.model.{name}": p.detach().to("cpu").contiguous() for name, p in parameters.items()}
    save_file(tensors, directory / ADAPTER_FILE, metadata={"format": "pt"})
    inference = peft.LoraConfig(**{**config.to_dict(), "inference_mode": True})
    inference.save_pretrained(str(directory))


def read_config(adapter: AdapterRef) -> peft.LoraConfig:
    """The PEFT config in the directory. Raises: CheckpointError if there is none, or it asks for more than plain LoRA matrices."""
    if not (adapter.path / "adapter_config.json").is_file():
        raise CheckpointError(f"{adapter.path}: no adapter_config.json; an adapter directory in PEFT layout is needed")
    config = peft.LoraConfig.from_pretrained(str(adapter.path))
    if config.modules_to_save or config.use_dora or config.bias != "none":
        raise CheckpointError(
            f"{adapter.path}: modules_to_save={config.modules_to_save}, use_dora={config.use_dora}, bias={config.bias!r}; "
            f"ptlab serves plain LoRA matrices only"
        )
    return config


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file. Raises: CheckpointError if it is missing or torn."""
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except FileNotFoundError as err:
        raise CheckpointError(f"{path}: the file is missing; the checkpoint is incomplete") from err
    except Exception as err:  # safetensors raises its own SafetensorError and plain OSError alike
        raise CheckpointError(f"{path}: cannot be read as safetensors ({err}); the checkpoint is torn") from err
    return tensors


def copy_into(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor], where: Path) -> None:
    """Copy tensors (PEFT names) into parameters; every name and shape must match. Raises: CheckpointError, before any copy."""
    named = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    missing, unknown = sorted(parameters.keys() - named.keys()), sorted(named.keys() - parameters.keys())
    if missing or unknown:
        raise CheckpointError(
            f"{where}: holds {len(named)} LoRA tensors, the adapter has {len(parameters)}; "
            f"missing {missing[:3]}, unknown {unknown[:3]}: it was written under other flags or another base model"
        )
    for name, parameter in parameters.items():
        if named[name].shape != parameter.shape:
            raise CheckpointError(
                f"{where}: {name} has shape {tuple(named[name].shape)}, "
                f"the adapter needs {tuple(parameter.shape)} (another rank or base model)"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(named[name])
