"""FlexTreeAttention on a CPU: its mask by blocks against the dense one, and the compiled function against TreeAttention.

torch has no flex_attention kernel with a backward pass for CPUs. Its reference implementation has one, which torch.compile reaches through
the backend `aot_eager` once the check that refuses it is out of the way; it knows the mask's function but not the lists of blocks, so
those have tests of their own. The test marked gpu runs the kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.attention.flex_attention
from torch import Tensor

from ptlab.engines.buffers import Buffers
from ptlab.engines.flex_attention import BLOCK, FlexTreeAttention, attention_for, block_lists, visible_blocks
from ptlab.engines.prefix_tree import Segment, build_stream
from ptlab.engines.tree_attention import TreeAttention

CPU = torch.device("cpu")


def random_tree(seed: int, groups: int) -> tuple[list[Segment], int]:
    """Prompts, turns below them, answers below those: segments and tokens."""
    random = np.random.default_rng(seed)
    rows = []
    for group in range(groups):
        prompt = random.integers(0, 50, random.integers(20, 300))
        for turn in range(2):
            history = np.concatenate([prompt, [100 + 2 * group + turn], random.integers(0, 50, random.integers(10, 200))])
            rows += [np.concatenate([history, [200 + i], random.integers(0, 50, random.integers(1, 90))]) for i in range(3)]
    stream = build_stream(rows)
    return stream.segments, len(stream.tokens_T)


def until(segments: list[Segment], num_tokens: int) -> np.ndarray:
    until_T = np.full(num_tokens, num_tokens)
    for segment in segments:
        until_T[segment.start : segment.start + segment.length] = segment.end
    return until_T


def test_a_segment_that_ends_with_its_block_is_not_visited_from_the_next() -> None:
    until_T = np.repeat([2 * BLOCK, 2 * BLOCK, 3 * BLOCK], BLOCK)
    some_BB, all_BB = visible_blocks(until_T)
    assert some_BB.tolist() == [[True, False, False], [True, True, False], [False, False, True]]
    assert all_BB.tolist() == [[False, False, False], [True, False, False], [False, False, False]]


@pytest.mark.parametrize("seed", range(4))
def test_visible_blocks_are_those_of_the_dense_mask(seed: int) -> None:
    segments, tokens = random_tree(seed, groups=3)
    until_T = until(segments, -(-tokens // BLOCK) * BLOCK)
    place_T = np.arange(len(until_T))
    dense_TT = (place_T[None, :] <= place_T[:, None]) & (place_T[:, None] < until_T[None, :])
    dense_BNBN = dense_TT.reshape(len(until_T) // BLOCK, BLOCK, -1, BLOCK)
    some_BB, all_BB = visible_blocks(until_T)
    np.testing.assert_array_equal(some_BB, dense_BNBN.any((1, 3)))
    np.testing.assert_array_equal(all_BB, dense_BNBN.all((1, 3)))
    assert all_BB.any()
    assert not some_BB[np.tri(len(some_BB), dtype=bool)].all()


def test_block_lists() -> None:
    count, index = block_lists(np.array([[0, 0, 0], [1, 0, 1], [0, 1, 0]], dtype=bool))
    assert count.tolist() == [0, 2, 1]
    assert index[1].tolist() == [0, 2, 1]
    assert index[2, 0] == 1
    turned = block_lists(np.array([[0, 1], [0, 1]], dtype=bool).T)
    assert turned[0].tolist() == [0, 2]
    assert turned[1].flags["C_CONTIGUOUS"]  # the kernel takes lists as rows that lie behind each other


@pytest.fixture
def alone(request: pytest.FixtureRequest) -> Iterator[None]:
    """A process of its own: where vLLM has been imported, engines/vllm_process.py has switched torch.compile off on a CPU."""
    if "PTLAB_TEST_ALONE" not in os.environ:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::{request.node.name}"]
        environment = {key: value for key, value in os.environ.items() if key != "TORCHDYNAMO_DISABLE"} | {"PTLAB_TEST_ALONE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stdout
        request.node.obj = lambda **fixtures: None  # done: not here again
    yield


@pytest.fixture
def reference_backward(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda query, key, value: None)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def parts(attention: TreeAttention | FlexTreeAttention, inputs: list[Tensor], scale: float) -> list[Tensor]:
    with torch.no_grad():
        out, saved = attention.forward(*inputs[:3], scale)
        return [out, *attention.backward(saved, inputs[3])]


def random_inputs(tokens: int, heads: tuple[int, ...], device: torch.device = CPU) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(tokens, h, 16, generator=generator).to(device) for h in heads]


@pytest.mark.usefixtures("alone", "reference_backward")
def test_equals_the_attention_for_cpus_and_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any length: many blocks, two, a part of one."""
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
    streams = [random_tree(0, groups=2), random_tree(1, groups=1), ([Segment(start=0, length=5, offset=0, end=5)], 5)]
    for segments, tokens in streams:
        inputs = random_inputs(tokens, (4, 2, 2, 4))
        expected = parts(TreeAttention(segments, tokens, CPU), inputs, 0.3)
        found = parts(FlexTreeAttention(segments, tokens, CPU, compiler="aot_eager"), inputs, 0.3)
        for got, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("alone", "reference_backward")
def test_out_may_be_given() -> None:
    segments, tokens = random_tree(0, groups=1)
    q, k, v, _ = random_inputs(tokens, (2, 2, 2, 2))
    memory = torch.empty_like(q)
    out, _ = FlexTreeAttention(segments, tokens, CPU, compiler="aot_eager").forward(q, k, v, 0.25, out=memory)
    assert out is memory
    torch.testing.assert_close(memory, TreeAttention(segments, tokens, CPU).forward(q, k, v, 0.25)[0], rtol=1e-5, atol=1e-5)


def test_a_cpu_gets_the_attention_for_cpus() -> None:
    segments, tokens = random_tree(0, groups=1)
    assert isinstance(attention_for(segments, tokens, CPU, Buffers(CPU)), TreeAttention)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernels_equal_the_attention_for_cpus() -> None:
    cuda = torch.device("cuda")
    for seed in range(3):
        segments, tokens = random_tree(seed, groups=1 + seed)
        inputs = random_inputs(tokens, (4, 2, 2, 4))
        expected = parts(TreeAttention(segments, tokens, CPU), inputs, 0.3)
        found = parts(FlexTreeAttention(segments, tokens, cuda), [x.to(cuda) for x in inputs], 0.3)
        for got, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(got.cpu(), wanted, rtol=1e-4, atol=1e-4)
