from __future__ import annotations

from pathlib import Path

import torch
from transformers.cache_utils import DynamicLayer

from ptlab.engines.base_model import load_base_model
from ptlab.engines.kv_cache import RoomyLayer, bytes_per_token, new_cache


def test_holds_what_transformers_own_layer_holds_through_growth_and_selection() -> None:
    """Growth twice past the room of 64, repeats, drops; in between both layers must show the same keys and values."""
    ours, theirs = RoomyLayer(), DynamicLayer()
    generator = torch.Generator().manual_seed(0)
    rows = 2
    for step, length in enumerate([5, 1, 70, 1, 200, 1, 1]):
        keys, values = (torch.randn(rows, 2, length, 4, generator=generator) for _ in range(2))
        got, want = ours.update(keys, values), theirs.update(keys, values)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)
        if step in (1, 3, 5):
            chosen = torch.tensor({1: [0, 0, 1, 1, 1], 3: [4, 0, 2], 5: [1]}[step])
            ours.batch_select_indices(chosen)
            theirs.batch_select_indices(chosen)
            rows = len(chosen)
            torch.testing.assert_close((ours.keys, ours.values), (theirs.keys, theirs.values), rtol=0, atol=0)


def test_a_new_token_does_not_copy_the_old_ones() -> None:
    layer = RoomyLayer()
    keys = torch.ones(1, 1, 4, 2)
    layer.update(keys, keys)
    before = layer.keys.data_ptr()
    for _ in range(50):
        layer.update(keys[:, :, :1], keys[:, :, :1])
    assert layer.keys.data_ptr() == before


def test_cache_of_a_model_uses_it(tiny_qwen3_dir: Path) -> None:
    model, _ = load_base_model(str(tiny_qwen3_dir), device="cpu")
    assert [type(layer) for layer in new_cache(model).layers] == [RoomyLayer, RoomyLayer]
    assert bytes_per_token(model) == 2 * 2 * 2 * 32 * 4  # keys and values, layers, key heads, head_dim, bytes
