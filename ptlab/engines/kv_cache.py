"""A key-value cache that grows in place and can repeat, reorder and drop rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """transformers' DynamicLayer with spare room at its end.

    DynamicLayer copies all keys and values for every new token; this one writes the new token into place and copies only when the room
    is used up, each time making half as much again. `keys` and `values` are views [rows, heads, tokens, head_dim] of what is filled.
    """

    _filled: int = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._allot(key_states, value_states, key_states.shape[-2] + 64)
        end = self._filled + key_states.shape[-2]
        if end > self._key_room.shape[-2]:
            self._allot(self.keys, self.values, end + max(64, end // 2))
        self._key_room[:, :, self._filled : end] = key_states
        self._value_room[:, :, self._filled : end] = value_states
        self._show(end)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Row i becomes the old row indices[i]; repeats allowed."""
        if self._filled:
            filled, room = self._filled, self._key_room.shape[-2]
            self._allot(self.keys[indices], self.values[indices], room)
            self._show(filled)

    def _allot(self, keys: Tensor, values: Tensor, room: int) -> None:
        """Fresh room for rows like these, holding what is filled so far."""
        self._key_room = keys.new_empty((*keys.shape[:2], room, keys.shape[-1]))
        self._value_room = values.new_empty((*values.shape[:2], room, values.shape[-1]))
        self._key_room[:, :, : self._filled] = keys[:, :, : self._filled]
        self._value_room[:, :, : self._filled] = values[:, :, : self._filled]

    def _show(self, end: int) -> None:
        self._filled = end
        self.keys, self.values = self._key_room[:, :, :end], self._value_room[:, :, :end]


def new_cache(model: Any) -> Any:
    """An empty cache for the model; sliding-window and other special layers stay transformers' own."""
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def select_rows(cache: Any, indices: Tensor) -> None:
    """Row i of the cache becomes the old row indices[i]: repeats expand a prompt to its draws, omissions drop finished draws."""
    for layer in cache.layers:
        layer.batch_select_indices(indices)


def bytes_per_token(model: Any) -> int:
    """Key-value bytes of one token of one row."""
    config = model.config.get_text_config()
    head_dim = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
    heads = config.to_dict().get("num_key_value_heads") or config.num_attention_heads
    element_size = torch.empty((), dtype=model.dtype).element_size()
    return int(2 * config.num_hidden_layers * heads * head_dim * element_size)
