"""The head in one pass: values and gradients against the full logits, which products are made, and that the full logits never exist."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ptlab.engines import head_pass as under_test
from ptlab.engines.buffers import Buffers
from ptlab.engines.head_pass import HeadResult, OutputHead, head_pass
from ptlab.engines.lora_layers import LowRank

ROWS, VOCAB, HIDDEN, RANK = 37, 501, 16, 4


@dataclass
class Problem:
    head: OutputHead
    hidden_UH: Tensor
    rows_P: Tensor
    targets_P: Tensor
    weights_P: Tensor


def low_rank(vocab_size: int = VOCAB) -> LowRank:
    return LowRank(nn.Parameter(0.3 * torch.randn(RANK, HIDDEN)), nn.Parameter(0.3 * torch.randn(vocab_size, RANK)), 0.7)


def a_problem(seed: int = 0, *, pairs_per_row: int | None = None, num_rows: int = ROWS, **head: Any) -> Problem:
    """Rows with one pair and more, pairs that are equal, weights of both signs and 0. Or the same number of pairs for each row."""
    torch.manual_seed(seed)
    made = OutputHead(0.3 * torch.randn(VOCAB, HIDDEN), **head)
    if pairs_per_row is None:
        rows_P = torch.sort(torch.cat([torch.arange(num_rows), torch.randint(0, num_rows, (num_rows,))])).values
    else:
        rows_P = torch.arange(num_rows).repeat_interleave(pairs_per_row)
    targets_P = torch.randint(0, VOCAB, rows_P.shape)
    if pairs_per_row != 1:
        targets_P[: num_rows // 2] = 7
    weights_P = torch.randn(rows_P.shape)
    weights_P[torch.rand(rows_P.shape) < 0.3] = 0.0
    return Problem(made, torch.randn(num_rows, HIDDEN), rows_P, targets_P, weights_P)


def ours(problem: Problem, **more: Any) -> HeadResult:
    def weigh(first: int, end: int, logprobs: Tensor) -> Tensor:
        assert logprobs.shape == (end - first,)
        return problem.weights_P[first:end]

    return head_pass(problem.head, problem.hidden_UH, problem.rows_P, problem.targets_P, weigh, **more)


def plain(problem: Problem, dtype: torch.dtype) -> HeadResult:
    """Autograd through all logits, in `dtype`; LoRA as in LoraLinear: in float32 where the rest is bfloat16."""
    head = problem.head
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    hidden_UH = problem.hidden_UH.to(dtype).requires_grad_()
    logits_UV = nn.functional.linear(hidden_UH, head.weight_VH.to(dtype), None if head.bias_V is None else head.bias_V.to(dtype))
    a_RH = b_VR = None
    if head.lora is not None:
        a_RH, b_VR = (m.detach().to(wide, copy=True).requires_grad_() for m in (head.lora.a_RI, head.lora.b_OR))
        logits_UV = (logits_UV + hidden_UH.to(wide) @ a_RH.t() @ b_VR.t() * head.lora.scale).to(dtype)
    logits_UV = logits_UV * head.scale
    if head.soft_cap is not None:
        logits_UV = torch.tanh(logits_UV / head.soft_cap) * head.soft_cap
    logits_UV = logits_UV.to(wide)
    logprobs_P = (logits_UV - logits_UV.logsumexp(1, keepdim=True))[problem.rows_P, problem.targets_P]
    (logprobs_P * problem.weights_P.to(wide)).sum().backward()
    low = (None, None) if a_RH is None or b_VR is None else (a_RH.grad, b_VR.grad)
    return HeadResult(logprobs_P.detach(), hidden_UH.grad, *low)


def error(found: Tensor | None, exact: Tensor | None) -> float:
    """Relative L2; 0.0 where both do not exist."""
    if exact is None:
        assert found is None
        return 0.0
    assert found is not None and found.shape == exact.shape
    return float((found.double() - exact).norm() / exact.norm())


def gradients(result: HeadResult) -> list[Tensor | None]:
    return [result.d_hidden_UH, result.d_a_RH, result.d_b_VR]


def assert_right(problem: Problem, result: HeadResult, gradient_error: float = 1e-6) -> None:
    exact = plain(problem, torch.float64)
    assert result.logprobs_P.dtype == torch.float32
    torch.testing.assert_close(result.logprobs_P.double(), exact.logprobs_P, rtol=1.2e-7, atol=1e-6)
    for found, wanted in zip(gradients(result), gradients(exact), strict=True):
        assert error(found, wanted) < gradient_error


@pytest.fixture(params=[1, 2, 9, 36, 1000], ids=lambda rows: f"{rows} rows a chunk")
def chunk_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setitem(under_test.CHUNK_BYTES, "cpu", request.param * VOCAB * 4)
    monkeypatch.setitem(under_test.BLOCK_ELEMENTS, "cpu", 4 * VOCAB)
    yield request.param


HEADS: dict[str, dict[str, Any]] = {
    "bare": {},
    "scale": {"scale": 1.7},
    "bias": {"bias_V": torch.linspace(-2, 2, VOCAB)},
    "soft cap": {"soft_cap": 3.0},
    "all": {"bias_V": torch.linspace(-2, 2, VOCAB), "scale": 0.6, "soft_cap": 5.0},
}


@pytest.mark.parametrize("with_lora", [False, True], ids=["frozen", "lora"])
@pytest.mark.parametrize("kind", HEADS)
def test_values_and_gradients_equal_those_of_the_full_logits(kind: str, with_lora: bool, chunk_rows: int) -> None:
    problem = a_problem(**HEADS[kind])
    if with_lora:
        problem.head = dataclasses.replace(problem.head, lora=low_rank())
    assert_right(problem, ours(problem))


@pytest.mark.parametrize("pairs_per_row", [1, 20])
def test_every_row_may_have_one_target_or_twenty(pairs_per_row: int, chunk_rows: int) -> None:
    problem = a_problem(pairs_per_row=pairs_per_row, lora=low_rank())
    assert_right(problem, ours(problem))


def test_weights_of_a_row_that_cancel_still_have_a_gradient() -> None:
    problem = a_problem(pairs_per_row=2)
    problem.targets_P = torch.arange(2 * ROWS)
    problem.weights_P[0::2], problem.weights_P[1::2] = 1.5, -1.5
    assert_right(problem, ours(problem))


def test_weights_are_asked_for_once_per_pair_with_its_logprob(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(under_test.CHUNK_BYTES, "cpu", 5 * VOCAB * 4)
    problem = a_problem()
    seen: list[tuple[int, int, Tensor]] = []

    def weigh(first: int, end: int, logprobs: Tensor) -> Tensor:
        seen.append((first, end, logprobs.clone()))
        return logprobs.exp()

    result = head_pass(problem.head, problem.hidden_UH, problem.rows_P, problem.targets_P, weigh)
    assert [first for first, _, _ in seen] == [0, *(end for _, end, _ in seen[:-1])]
    assert torch.equal(torch.cat([logprobs for _, _, logprobs in seen]), result.logprobs_P)
    problem.weights_P = result.logprobs_P.exp()
    assert_right(problem, result)


def test_logprobs_alone_have_no_gradient(chunk_rows: int) -> None:
    problem = a_problem(soft_cap=4.0, lora=low_rank())
    result = head_pass(problem.head, problem.hidden_UH, problem.rows_P, problem.targets_P, None)
    assert gradients(result) == [None, None, None]
    torch.testing.assert_close(result.logprobs_P.double(), plain(problem, torch.float64).logprobs_P, rtol=1.2e-7, atol=1e-6)


# -- bfloat16


@pytest.mark.parametrize("kind", HEADS)
def test_bfloat16_is_as_near_to_float32_as_the_plain_bfloat16_computation(kind: str) -> None:
    plain_errors, our_errors = torch.zeros(4), torch.zeros(4)
    for seed in range(4):  # a few problems: the errors are those of rounding, and one problem's are luck
        problem = a_problem(seed, num_rows=300, **HEADS[kind])
        bias_V = None if problem.head.bias_V is None else problem.head.bias_V.bfloat16()
        problem.head = dataclasses.replace(problem.head, weight_VH=problem.head.weight_VH.bfloat16(), bias_V=bias_V, lora=low_rank())
        problem.hidden_UH = problem.hidden_UH.bfloat16()
        exact, half, result = plain(problem, torch.float64), plain(problem, torch.bfloat16), ours(problem)
        assert result.d_hidden_UH is not None and result.d_hidden_UH.dtype == torch.bfloat16
        assert result.d_b_VR is not None and result.d_b_VR.dtype == torch.float32
        for i, name in enumerate(["logprobs_P", "d_hidden_UH", "d_a_RH", "d_b_VR"]):
            plain_errors[i] += error(getattr(half, name), getattr(exact, name))
            our_errors[i] += error(getattr(result, name), getattr(exact, name))
    assert (our_errors < 1.2 * plain_errors).all(), (our_errors, plain_errors)


def test_a_target_that_is_nearly_certain_keeps_its_small_gradient_in_bfloat16() -> None:
    """p = 0.99: the difference of a rounded p and 1 would be wrong by a quarter."""
    problem = a_problem(pairs_per_row=1)
    problem.hidden_UH, problem.weights_P = problem.hidden_UH.bfloat16(), torch.ones(ROWS)
    weight_VH = problem.head.weight_VH
    weight_VH[problem.targets_P] = problem.hidden_UH.float() * 0.7
    problem.head = OutputHead(weight_VH.bfloat16())
    exact, half, result = plain(problem, torch.float64), plain(problem, torch.bfloat16), ours(problem)
    assert exact.logprobs_P.exp().median() > 0.95
    assert error(result.d_hidden_UH, exact.d_hidden_UH) < 1.2 * error(half.d_hidden_UH, exact.d_hidden_UH)
    assert error(result.d_hidden_UH, exact.d_hidden_UH) < 0.02
    assert error(result.logprobs_P, exact.logprobs_P) < 0.4 * error(half.logprobs_P, exact.logprobs_P)


def test_the_sum_over_a_large_vocabulary_is_right_to_a_millionth_of_a_nat() -> None:
    vocab_size = 151_936
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        hidden_UH = torch.zeros(4, 8, dtype=dtype)
        hidden_UH[:, 0] = 1.0
        weight_VH = torch.zeros(vocab_size, 8, dtype=dtype)
        weight_VH[:, 0] = 0.1 * torch.randn(vocab_size)
        weight_VH[7, 0] += 17.0  # beside the largest term each of the others is below float32's resolution; together they are 0.006
        targets_P = torch.tensor([7, 8, 9, 151_935])
        found = head_pass(OutputHead(weight_VH), hidden_UH, torch.arange(4), targets_P, None).logprobs_P
        exact = weight_VH[:, 0].double().log_softmax(0)[targets_P]
        torch.testing.assert_close(found.double(), exact, rtol=1.2e-7, atol=1e-6)


# -- large and infinite logits


@pytest.mark.parametrize("level", [-300.0, -95.0, 60.0, 95.0, 2000.0])
def test_the_level_of_the_logits_does_not_matter(level: float, chunk_rows: int) -> None:
    """GPT-2's lie around -100; exp overflows at 88 and is 0 below -104."""
    problem = a_problem(lora=low_rank(), bias_V=torch.full([VOCAB], level))
    exact = plain(dataclasses.replace(problem, head=dataclasses.replace(problem.head, bias_V=None)), torch.float64)
    result = ours(problem)
    # float32 logits of this size are this coarse, in any computation
    torch.testing.assert_close(result.logprobs_P.double(), exact.logprobs_P, rtol=0, atol=abs(level) * 1.2e-7 + 1e-6)
    for found, wanted in zip(gradients(result), gradients(exact), strict=True):
        assert error(found, wanted) < abs(level) * 2e-7 + 1e-6


def test_one_huge_logit_in_one_row_is_no_harm_to_the_others() -> None:
    problem = a_problem()
    problem.hidden_UH[11] *= 300.0
    exact, result = plain(problem, torch.float64), ours(problem)
    torch.testing.assert_close(result.logprobs_P.double(), exact.logprobs_P, rtol=3e-7, atol=1e-6)
    assert error(result.d_hidden_UH, exact.d_hidden_UH) < 1e-5


@pytest.mark.parametrize("level", [0.0, 200.0])
def test_words_that_cannot_be_have_minus_infinity_and_the_rest_stays_right(level: float) -> None:
    bias_V = torch.full([VOCAB], level)
    bias_V[::3] = -torch.inf
    problem = a_problem(bias_V=bias_V)
    problem.weights_P[problem.targets_P % 3 == 0] = 0.0
    exact, result = plain(problem, torch.float64), ours(problem)
    impossible_P = problem.targets_P % 3 == 0
    assert impossible_P.any() and (result.logprobs_P[impossible_P] == -torch.inf).all()
    torch.testing.assert_close(result.logprobs_P.double(), exact.logprobs_P, rtol=0, atol=level * 1.2e-7 + 1e-6)
    assert error(result.d_hidden_UH, exact.d_hidden_UH) < level * 2e-7 + 1e-6


def test_the_only_possible_word_has_log_probability_zero() -> None:
    bias_V = torch.full([VOCAB], -torch.inf)
    bias_V[7] = 1.0
    problem = a_problem(bias_V=bias_V)
    problem.targets_P[:] = 7
    result = ours(problem)
    assert ((result.logprobs_P <= 0.0) & (result.logprobs_P > -1e-7)).all()
    assert result.d_hidden_UH is not None and (result.d_hidden_UH.abs() < 1e-6).all()


# -- which work is done


class _Watch(TorchDispatchMode):
    """The largest tensor any operation made, and the rows of the products with the weight matrix in the backward direction."""

    numel = 0
    rows_behind = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        if func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out) and args[0].shape[1] == VOCAB and args[0].shape[0] != VOCAB:
            self.rows_behind += args[0].shape[0]
        return out


def test_rows_without_weight_cost_no_second_product(chunk_rows: int) -> None:
    problem = a_problem()
    learning_U = torch.zeros(ROWS, dtype=torch.bool)
    learning_U[problem.rows_P[problem.weights_P != 0.0]] = True
    assert 0 < learning_U.sum() < ROWS
    with _Watch() as watch:
        result = ours(problem)
    assert watch.rows_behind == learning_U.sum()
    assert result.d_hidden_UH is not None and (result.d_hidden_UH[~learning_U] == 0.0).all()
    assert_right(problem, result)


def test_rows_known_not_to_learn_are_not_weighed(chunk_rows: int) -> None:
    problem = a_problem()
    problem.weights_P[problem.rows_P >= 10] = 0.0
    asked: list[int] = []

    def weigh(first: int, end: int, logprobs: Tensor) -> Tensor:
        asked.append(end)
        return problem.weights_P[first:end]

    result = head_pass(problem.head, problem.hidden_UH, problem.rows_P, problem.targets_P, weigh, learning_rows=10)
    assert_right(problem, result)
    assert int(problem.rows_P[asked[-1] - 1]) < 10
    with _Watch() as watch:
        nothing = ours(problem, learning_rows=0)
    assert watch.rows_behind == 0 and nothing.d_hidden_UH is not None and (nothing.d_hidden_UH == 0.0).all()
    assert torch.equal(nothing.logprobs_P, result.logprobs_P)


def test_no_tensor_of_rows_times_vocabulary_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    num_rows, chunk_elements = 400, 20 * VOCAB
    monkeypatch.setitem(under_test.CHUNK_BYTES, "cpu", 4 * chunk_elements)
    problem = a_problem(num_rows=num_rows, lora=low_rank())
    with _Watch() as watch:
        ours(problem)
    assert watch.numel <= max(chunk_elements, VOCAB * HIDDEN) < num_rows * VOCAB / 15


def test_peak_memory_at_a_large_vocabulary() -> None:
    """4096 rows x 150k words: the full float32 logits alone are 2.4 GB."""
    code = """
        import resource, torch
        from ptlab.engines.head_pass import OutputHead, head_pass
        torch.set_num_threads(1)
        hidden_UH = torch.randn(4096, 8)
        head = OutputHead(torch.randn(150_000, 8))
        rows_P, targets_P = torch.arange(4096), torch.zeros(4096, dtype=torch.int64)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        result = head_pass(head, hidden_UH, rows_P, targets_P, lambda first, end, logprobs: torch.ones(end - first))
        assert result.d_hidden_UH.abs().sum() > 0
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 200  # MiB; one chunk, a block, and what the libraries take


def test_kept_buffers_are_used_again_and_hold_no_result() -> None:
    buffers = Buffers(torch.device("cpu"))
    first, second = a_problem(0, soft_cap=4.0, lora=low_rank()), a_problem(1, soft_cap=4.0, lora=low_rank())
    results = [ours(problem, buffers=buffers) for problem in (first, second)]
    assert_right(first, results[0])
    assert_right(second, results[1])
    kept = {buffers.take(name, 1, dtype=torch.float32).data_ptr() for name in ("head: logits", "head: tanh")}
    ours(first, buffers=buffers)
    assert kept == {buffers.take(name, 1, dtype=torch.float32).data_ptr() for name in ("head: logits", "head: tanh")}
