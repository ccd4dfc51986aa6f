"""Memory that is kept from one micro-batch to the next.

Cost: on a CPU a fresh buffer of more than 128 KiB is mapped page by page when it is first touched, about as slow as writing it four times
over; a 25 M parameter model spends a third of its training time there. So every intermediate result has a name, and the memory behind a
name only grows. On a GPU torch's own allocator does this, and gives back to others what nobody holds: nothing is kept here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Buffers:
    """Named scratch memory on one device. Not thread-safe; what `take` returns holds any numbers until it is written."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._keeps = device, device.type == "cpu"
        self._flat: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, *shape: int, dtype: torch.dtype) -> Tensor:
        """A contiguous tensor over the memory of that name, which whoever took it before must no longer use."""
        if not self._keeps:
            return torch.empty(shape, dtype=dtype, device=self._device)
        numel, key = math.prod(shape), (name, dtype)
        if key not in self._flat or self._flat[key].numel() < numel:
            self._flat.pop(key, None)  # before the larger one is made, not after
            self._flat[key] = torch.empty(numel, dtype=dtype, device=self._device)
        return self._flat[key][:numel].view(shape)

    def clear(self) -> None:
        """Give the memory back."""
        self._flat.clear()
