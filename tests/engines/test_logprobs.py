"""Chunked log-probabilities: value, gradient, and that the full logits never exist."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ptlab.engines.logprobs import log_softmax, token_logprobs


def setting(num_tokens: int, vocab_size: int, hidden: int = 8) -> tuple[Tensor, nn.Linear, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(hidden, vocab_size, bias=False)
    return torch.randn(num_tokens, hidden, requires_grad=True), head, torch.randint(0, vocab_size, (num_tokens, 3))


@pytest.mark.parametrize("chunk_elements", [1, 50, 10**6])
def test_value_and_gradients_equal_the_plain_computation(chunk_elements: int) -> None:
    hidden_TH, head, targets_TK = setting(num_tokens=7, vocab_size=11)
    weights_TK = torch.randn(7, 3)
    results = []
    for ours in (True, False):
        logprobs_TK = (
            token_logprobs(head, hidden_TH, targets_TK, 11, chunk_elements)
            if ours
            else head(hidden_TH).log_softmax(-1).gather(1, targets_TK)
        )
        grads = torch.autograd.grad((logprobs_TK * weights_TK).sum(), [hidden_TH, head.weight])
        results.append((logprobs_TK.detach(), *grads))
    for ours_, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours_, plain, rtol=1e-5, atol=1e-6)  # float32, another order of sums


def test_half_precision_hidden_states_are_summed_in_float32() -> None:
    hidden_TH, head, targets_TK = setting(num_tokens=4, vocab_size=50_000)
    half = nn.Linear(8, 50_000, bias=False, dtype=torch.bfloat16)
    half.weight.data.copy_(head.weight)
    with torch.no_grad():
        ours = token_logprobs(half, hidden_TH.bfloat16(), targets_TK, 50_000)
        exact = half(hidden_TH.bfloat16()).double().log_softmax(-1).gather(1, targets_TK)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=2e-6)  # the sum over 50k bfloat16 values would be off by 0.01 and more


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor any operation made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_tensor_of_tokens_times_vocabulary_exists() -> None:
    num_tokens, vocab_size, hidden = 400, 150_000, 8
    hidden_TH, head, targets_TK = setting(num_tokens, vocab_size, hidden)
    with _Largest() as largest:
        token_logprobs(head, hidden_TH, targets_TK, vocab_size, chunk_elements=2**21).sum().backward()
    assert largest.numel <= max(2**21, vocab_size * hidden)  # a chunk of logits, or the head's own weight gradient
    assert largest.numel < num_tokens * vocab_size / 25


def test_peak_memory_at_a_large_vocabulary() -> None:
    """4096 tokens x 150k words: the full float32 logits alone are 2.4 GB; the whole process must stay far below that."""
    code = """
        import resource, torch
        from ptlab.engines.logprobs import token_logprobs
        torch.set_num_threads(1)
        hidden_TH = torch.randn(4096, 8, requires_grad=True)
        head = torch.nn.Linear(8, 150_000, bias=False).requires_grad_(False)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        token_logprobs(head, hidden_TH, torch.zeros(4096, 1, dtype=torch.int64), 150_000).sum().backward()
        assert hidden_TH.grad is not None and hidden_TH.grad.abs().sum() > 0
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 500  # MiB; a few chunks of 64 MiB and their gradients


def test_log_softmax_is_exact_where_torchs_own_is_not() -> None:
    scores_BV = torch.randn(4, 151_936, generator=torch.Generator().manual_seed(0)) * 0.1
    scores_BV[:, 7] += 17.0  # beside the largest term each of the others is below float32's resolution; together they are 0.006
    exact_BV = scores_BV.double().log_softmax(-1)
    assert (log_softmax(scores_BV) - exact_BV).abs().max() < 5e-6
    assert (scores_BV.log_softmax(-1) - exact_BV).abs().max() > 2e-5, "torch is right now: engines/logprobs.log_softmax can go"
    cut = torch.tensor([[0.5, -torch.inf, 0.25]])
    torch.testing.assert_close(log_softmax(cut), cut.log_softmax(-1))
