"""LoRA adapters held by a sampler's own copy of the base model: load and read back, choose one, forget."""

from __future__ import annotations

from typing import Any

import torch

from ptlab.engines.lora import ADAPTER_FILE, copy_into, load_tensors, read_config
from ptlab.engines.lora_layers import LoraLayers, LoraWeights
from ptlab.engines.protocols import AdapterRef
from ptlab.engines.sampler_errors import name_taken, not_loaded, not_the_files

ENGINE = "torch sampler"
_PREFIX = "base_model.model."


class AdapterSlots:
    """Not thread-safe: used by the one thread that owns the model. Adapter weights are float32 whatever the base computes in."""

    def __init__(self, model: Any) -> None:
        self._layers = LoraLayers(model)
        self._slots: dict[AdapterRef, LoraWeights] = {}

    def load(self, adapter: AdapterRef) -> frozenset[str]:
        """Put the adapter's tensors into the model and read them back.

        Returns the names as they stand in the file, of the tensors found in the model with the values of the file.
        Raises: CheckpointError if the directory is missing, torn, or not a LoRA of this model; EngineError if the values did not land, or
        the name belongs to another ref.
        Nothing of the adapter stays in the model then.
        """
        if adapter not in self._slots:
            if any(other.name == adapter.name for other in self._slots):
                raise name_taken(adapter, ENGINE)
            file = adapter.path / ADAPTER_FILE
            tensors = load_tensors(file)
            weights = self._layers.make(read_config(adapter))
            copy_into(weights.parameters, tensors, file)
            self._slots[adapter] = weights
        try:
            return self._read_back(adapter)
        except BaseException:
            self.unload(adapter)
            raise

    def unload(self, adapter: AdapterRef) -> None:
        """Free the adapter's tensors; unknown adapters are fine."""
        if self._slots.pop(adapter, None) is not None:
            self.activate(None)

    def activate(self, adapter: AdapterRef | None) -> LoraWeights | None:
        """Compute with exactly this adapter from now on, whose matrices are returned; None = the base model.

        Raises: EngineError if it is not loaded.
        """
        if adapter is not None and adapter not in self._slots:
            raise not_loaded(adapter, ENGINE)
        weights = None if adapter is None else self._slots[adapter]
        self._layers.use(weights)
        return weights

    def _read_back(self, adapter: AdapterRef) -> frozenset[str]:
        """Compare what the model computes with under this adapter with the file, value by value."""
        tensors = load_tensors(adapter.path / ADAPTER_FILE)
        with self._layers.using(self._slots[adapter]):
            held = {_PREFIX + name: parameter for name, parameter in self._layers.held().items()}
        wrong = [
            name
            for name, parameter in held.items()
            if name not in tensors or not torch.equal(parameter.detach().cpu(), tensors[name].to(parameter.dtype))
        ]
        if wrong:
            raise not_the_files(adapter, wrong[0], ENGINE, count=len(wrong))
        return frozenset(held)
