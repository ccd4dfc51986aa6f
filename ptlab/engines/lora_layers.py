"""The linear layers of a base model that adapters change, and the one adapter they compute with at a time.

An adapter is a set of matrices outside the model; using one hands them to the layers, for the time of a `with`. So making, choosing and
dropping an adapter cost the same however many there are. PEFT, which keeps all adapters inside the model and walks the whole of it each
time, took 0.9 s to add and remove one beside 32 others (28 layers; docs/LOG.md). The arithmetic is PEFT's, operation by operation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to one layer: scale * B A x."""

    a_RI: nn.Parameter
    b_OR: nn.Parameter
    scale: float


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """The matrices of one adapter, float32."""

    parameters: dict[str, nn.Parameter]
    """By PEFT's names in the bare model: `<path of the layer>.lora_A.weight`, in the order of the layers."""
    layers: dict[str, LowRank]
    """The same matrices by path of the layer."""


class LoraLinear(nn.Module):
    """A frozen linear layer (nn.Linear or GPT-2's Conv1D) and what the adapter in use adds to it."""

    def __init__(self, base_layer: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.low_rank: LowRank | None = None

    @property
    def weight(self) -> Tensor:
        """The base layer's: some models look at their layers' weights."""
        weight: Tensor = self.base_layer.weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.base_layer.bias
        return bias

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base_layer(x)
        used = self.low_rank
        if used is None:
            return result
        added = nn.functional.linear(nn.functional.linear(x.to(used.a_RI.dtype), used.a_RI), used.b_OR) * used.scale
        return (result + added).to(result.dtype)


class LoraLayers:
    """Changes `model`: a layer that an adapter is made for becomes a LoraLinear, for good. Used by one thread at a time."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._bare: dict[str, Any] = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
        self._changed: dict[str, LoraLinear] = {}
        self._in_use: LoraWeights | None = None

    def make(self, config: peft.LoraConfig) -> LoraWeights:
        """An adapter of zeros with the targets, ranks and scales of a PEFT config; of linear layers only, so there may be none."""
        parameters: dict[str, nn.Parameter] = {}
        layers: dict[str, LowRank] = {}
        for path, bare in self._bare.items():
            if not check_target_module_exists(config, path):
                continue
            if path not in self._changed:
                self._changed[path] = LoraLinear(bare)
                self._model.set_submodule(path, self._changed[path])
            rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), path), config.r)
            alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), path), config.lora_alpha)
            inputs, outputs = bare.weight.shape if isinstance(bare, Conv1D) else reversed(bare.weight.shape)
            a_RI, b_OR = (nn.Parameter(torch.zeros(shape, device=bare.weight.device)) for shape in ((rank, inputs), (outputs, rank)))
            parameters |= {f"{path}.lora_A.weight": a_RI, f"{path}.lora_B.weight": b_OR}
            layers[path] = LowRank(a_RI, b_OR, alpha / math.sqrt(rank) if config.use_rslora else alpha / rank)
        return LoraWeights(parameters, layers)

    def use(self, weights: LoraWeights | None) -> None:
        """Compute with this adapter from now on; None = the base model."""
        if weights is not self._in_use:
            for path, layer in self._changed.items():
                layer.low_rank = None if weights is None else weights.layers.get(path)
            self._in_use = weights

    @contextmanager
    def using(self, weights: LoraWeights | None) -> Iterator[None]:
        """Compute with this adapter (None = the base model) inside; what was used before is used again afterwards."""
        before = self._in_use
        self.use(weights)
        try:
            yield
        finally:
            self.use(before)

    def held(self) -> dict[str, nn.Parameter]:
        """What the model computes with now, by the names of `LoraWeights.parameters`; empty for the base model."""
        used = {path: layer.low_rank for path, layer in self._changed.items() if layer.low_rank is not None}
        return {f"{path}.lora_{side}.weight": m for path, lora in used.items() for side, m in (("A", lora.a_RI), ("B", lora.b_OR))}
