"""LoRA adapters held by a sampler's own copy of the base model: load and read back, choose one, forget."""

from __future__ import annotations

from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from ptlab.engines.lora import ADAPTER_FILE, adapter_parameters, attach, copy_into, load_tensors, read_config
from ptlab.engines.protocols import AdapterRef
from ptlab.errors import CheckpointError, EngineError

ENGINE = "torch sampler"
_PREFIX = "base_model.model."


class AdapterSlots:
    """Not thread-safe: used by the one thread that owns the model. Adapter weights are float32 whatever the base computes in."""

    def __init__(self, model: Any) -> None:
        self._base = model
        self._peft: Any = None  # the PeftModel around the base, made with the first adapter
        self._slots: dict[AdapterRef, str] = {}
        self._num_loaded = 0

    def load(self, adapter: AdapterRef) -> frozenset[str]:
        """Put the adapter's tensors into the model and read them back.

        Returns the names as they stand in the file, of the tensors found in the model with the values of the file.
        Raises: CheckpointError if the directory is missing, torn, or not a LoRA of this model; EngineError if the values did not land, or
        the name belongs to another ref.
        Nothing of the adapter stays in the model then.
        """
        if adapter in self._slots:
            return self._read_back(adapter)
        if any(other.name == adapter.name for other in self._slots):
            raise EngineError(
                f"adapter name {adapter.name!r} is in use for other weights; a new version needs a new name",
                engine=ENGINE,
                operation="load_adapter",
            )
        tensors = load_tensors(adapter.path / ADAPTER_FILE)
        config = read_config(adapter)
        slot = f"slot{self._num_loaded}"  # PEFT refuses dots in a name
        self._num_loaded += 1
        try:
            self._add(slot, config)
            copy_into(adapter_parameters(self._base, slot), tensors, adapter.path)
            self._slots[adapter] = slot
            return self._read_back(adapter)
        except BaseException as err:
            self._slots.pop(adapter, None)
            self._remove(slot)
            if isinstance(err, ValueError):
                raise CheckpointError(f"{adapter.path}: not an adapter of {type(self._base).__name__}: {err}") from err
            raise

    def unload(self, adapter: AdapterRef) -> None:
        """Free the adapter's tensors; unknown adapters are fine."""
        slot = self._slots.pop(adapter, None)
        if slot is not None:
            self._remove(slot)

    def activate(self, adapter: AdapterRef | None) -> None:
        """Compute with exactly this adapter from now on; None = the base model. Raises: EngineError if it is not loaded."""
        if adapter is None:
            self._set_active([])
        elif adapter in self._slots:
            self._set_active([self._slots[adapter]])
        else:
            raise EngineError(f"adapter {adapter.name!r} version {adapter.version} is not loaded", engine=ENGINE, operation="sample")

    def _add(self, slot: str, config: peft.LoraConfig) -> None:
        self._peft = attach(self._peft, self._base, config, slot)

    def _remove(self, slot: str) -> None:
        self._set_active([])
        if self._peft is not None and slot in self._peft.peft_config:
            self._peft.base_model.delete_adapter(slot)

    def _set_active(self, slots: list[str]) -> None:
        for module in self._base.modules():
            if isinstance(module, BaseTunerLayer):
                module.set_adapter(slots, inference_mode=True)

    def _read_back(self, adapter: AdapterRef) -> frozenset[str]:
        """Compare the model's tensors with the file, value by value."""
        tensors = load_tensors(adapter.path / ADAPTER_FILE)
        landed = {_PREFIX + name: parameter for name, parameter in adapter_parameters(self._base, self._slots[adapter]).items()}
        for name, parameter in landed.items():
            if name not in tensors or not torch.equal(parameter.detach().cpu(), tensors[name].to(parameter.dtype)):
                raise EngineError(
                    f"adapter {adapter.name!r}: tensor {name} in the model is not the one in {adapter.path}; the adapter was not loaded",
                    engine=ENGINE,
                    operation="load_adapter",
                )
        return frozenset(landed)
