"""Every operation of the list, as the official SDK's tracer writes it down, against the same in plain torch: value and gradient."""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ptlab.errors import InvalidRequestError
from ptlab.loss_graph import LossGraph
from ptlab.loss_graph_run import run_graph
from ptlab.loss_ops import _SHARED, ATTRIBUTES, FUNCTIONS, METHODS
from ptlab.losses import check_datum, loss_inputs, loss_metrics, loss_sum, resolve_loss
from ptlab.types import Datum, ModelInput

pytest.importorskip("tinker", reason="tinker (dev extra) is not installed")

import tinker
from tinker.lib.public_interfaces.custom_loss import LossHandle, encode_graph, run_loss_handle, trace_loss

Fn = Callable[[Any, Any], Any]

LOGPROBS = [-0.3, -2.0, -0.7, -1.1, -0.05]
X = [0.5, -1.5, 2.0, 0.25, -0.75]

# torch.<name>(a, ...) and a.<name>(...): what follows a, given x (ordinary numbers) and i (indices 3, 1, 0, 2, 4); a = logprobs, or
# their exponential (0.05 to 0.95) for the names in POSITIVE.
POSITIVE = {"log", "log1p", "log2", "log10", "sqrt", "rsqrt", "logit", "reciprocal", "xlogy", "pow"}
PLAIN = (
    "abs neg exp expm1 log log1p log2 log10 sqrt rsqrt square reciprocal sigmoid tanh relu erf sin cos sign floor ceil round trunc isnan "
    "isinf isfinite logical_not detach clone logit numel max min median argmax argmin any all sum mean nansum prod std var count_nonzero t"
)
BINARY = (
    "add sub mul div pow remainder fmod maximum minimum fmax fmin logaddexp eq ne lt le gt ge logical_and logical_or logical_xor dot "
    "matmul outer"
)
ALONG = "amax amin logsumexp cumsum logcumsumexp softmax log_softmax unsqueeze squeeze"
ARGUMENTS: dict[str, Callable[[Any, Any], tuple[Any, ...]]] = {
    **{name: lambda x, i: () for name in PLAIN.split()},
    **{name: lambda x, i: (x,) for name in BINARY.split()},
    "xlogy": lambda x, i: (x.exp(),),
    "lerp": lambda x, i: (x, 0.25),
    "clamp": lambda x, i: (-1.0, -0.2),
    "clip": lambda x, i: (-1.0, -0.2),
    "clamp_min": lambda x, i: (-1.0,),
    "clamp_max": lambda x, i: (-1.0,),
    "masked_fill": lambda x, i: (x > 0, 0.5),
    "masked_select": lambda x, i: (x > 0,),
    "nan_to_num": lambda x, i: (0.0,),
    **{name: lambda x, i: (0,) for name in ALONG.split()},
    "sort": lambda x, i: (),
    "argsort": lambda x, i: (),
    "topk": lambda x, i: (2,),
    "flip": lambda x, i: ((0,),),
    "roll": lambda x, i: (1,),
    "diff": lambda x, i: (),
    "reshape": lambda x, i: ((-1, 1),),
    "permute": lambda x, i: ((0,),),
    "transpose": lambda x, i: (0, 0),
    "flatten": lambda x, i: (),
    "broadcast_to": lambda x, i: ((2, 5),),
    "gather": lambda x, i: (0, i),
    "index_select": lambda x, i: (0, i),
}
SQUARE = {"tril": lambda a, x: torch.tril(a[:, None] * x), "triu": lambda a, x: torch.triu(a[:, None] * x, 1)}
PAIRS = {"sort", "topk"}  # their results are (values, indices)

OTHERS: dict[str, Fn] = {
    "where": lambda a, x: torch.where(x > 0, a, 0.0),
    "where method": lambda a, x: a.where(x > 0, x),
    "max of two": lambda a, x: torch.max(a, x),
    "max by dim": lambda a, x: a.max(dim=0, keepdim=True)[0],
    "min by dim": lambda a, x: torch.min(a, dim=0).values,
    "indices": lambda a, x: x.max(dim=0).indices * a,
    "mean by axis": lambda a, x: (a[:, None] * x).mean(dim=1, keepdim=True),
    "sum of dims": lambda a, x: (a[:, None] * x).sum((0, 1)),
    "std": lambda a, x: torch.std(a, unbiased=False),
    "add alpha": lambda a, x: torch.add(a, x, alpha=3),
    "div floor": lambda a, x: torch.div(a, x, rounding_mode="floor"),
    "floor_divide": lambda a, x: torch.floor_divide(x, 0.4) * a + x.floor_divide(0.3),  # itself without a derivative
    "by keyword": lambda a, x: torch.exp(input=a),
    "cat": lambda a, x: torch.cat([a, x], dim=0),
    "stack": lambda a, x: torch.stack((a, x), dim=1),
    "zeros_like": lambda a, x: torch.zeros_like(a) + a,
    "ones_like": lambda a, x: torch.ones_like(a, dtype=torch.float64) * a,
    "full_like": lambda a, x: torch.full_like(a, 2.0) * a,
    "zeros": lambda a, x: torch.zeros(a.shape) + a,
    "ones": lambda a, x: torch.ones(a.shape[0], dtype=torch.float32) * a,
    "full": lambda a, x: torch.full(a.shape, 3.0) * a,
    "arange": lambda a, x: torch.arange(a.shape[0]) * a,
    "float": lambda a, x: (x > 0).float() * a,
    "double": lambda a, x: a.double(),
    "long": lambda a, x: x.long() * a,
    "int": lambda a, x: x.int() * a,
    "bool": lambda a, x: x.bool() * a,
    "to": lambda a, x: a.to(torch.float64).to("cpu").to(x).to(device=x.device, dtype=x.dtype),
    "type": lambda a, x: a.type(torch.float64).type_as(x),
    "cpu": lambda a, x: a.cpu().contiguous(),
    "size": lambda a, x: a / a.size(0) * a.dim() + a.size()[0],
    "view": lambda a, x: a.view(-1, 1).view(a.shape).view_as(x).reshape_as(x[None]),
    "reshape spread": lambda a, x: a.reshape(1, -1),
    "expand": lambda a, x: a.expand(3, -1),
    "expand_as": lambda a, x: a.expand_as(x[None, :] * x[:, None]),
    "repeat": lambda a, x: a.repeat(2, 1),
    "new_zeros": lambda a, x: torch.cat([a, a.new_zeros(2)]),
    "new_ones": lambda a, x: a * a.new_ones((5,)),
    "new_full": lambda a, x: a * a.new_full((5,), 2.0),
    "functional.relu": lambda a, x: functional.relu(a + 1),
    "functional.silu": lambda a, x: functional.silu(a),
    "functional.softplus": lambda a, x: functional.softplus(a, beta=2.0),
    "functional.logsigmoid": lambda a, x: functional.logsigmoid(a),
    "functional.softmax": lambda a, x: functional.softmax(a, dim=-1),
    "functional.log_softmax": lambda a, x: functional.log_softmax(a, dim=0),
    "functional.pad": lambda a, x: functional.pad(a, (1, 0), value=0.5),
    "functional.mse_loss": lambda a, x: functional.mse_loss(a, x, reduction="none"),
    "functional.l1_loss": lambda a, x: functional.l1_loss(a, x, reduction="sum"),
    "functional.smooth_l1_loss": lambda a, x: functional.smooth_l1_loss(a, x, beta=0.5),
    "functional.huber_loss": lambda a, x: functional.huber_loss(a, x, delta=0.5),
    "functional.bce": lambda a, x: functional.binary_cross_entropy_with_logits(a, (x > 0).float()),
    "+": lambda a, x: 1 + a + x,
    "-": lambda a, x: 1 - a - x,
    "*": lambda a, x: 2 * a * x,
    "/": lambda a, x: 2 / a / x,
    "**": lambda a, x: 2**a * a**2,
    "//": lambda a, x: x // 0.4 * a,
    "%": lambda a, x: a % 0.4,
    "-a": lambda a, x: -a,
    "+a": lambda a, x: +a,
    "abs": lambda a, x: abs(a),
    "~": lambda a, x: ~(x > 0) * a,
    "&": lambda a, x: ((x > 0) & (x < 1)) * a,
    "|": lambda a, x: ((x > 1) | (x < 0)) * a,
    "^": lambda a, x: ((x > 0) ^ (x < 1)) * a,
    "comparisons": lambda a, x: ((a == x) * 1 + (a != x) * 2 + (a < x) * 3 + (a <= x) * 4 + (a > x) * 5 + (a >= x) * 6) * a,
    "@": lambda a, x: (a[:, None] * x) @ x,
    "slices": lambda a, x: a[1:] - a[:-1],
    "index": lambda a, x: a[x.long().abs()],
    "list index": lambda a, x: a[[0, 2, -1]],
    "mask": lambda a, x: a[x > 0],
    "None and ...": lambda a, x: a[..., None] * a[None, :],
    "slice up to a size": lambda a, x: a[: a.shape[0] - 2],
    "numbers": lambda a, x: a * ((a.shape[0] + 1) // 2) ** 2 / (a.numel() % 3 + 1) - (a.shape[-1] - 1) * (a.ndim == 1),
    "math": lambda a, x: (
        a * math.sqrt(a.shape[0]) + math.log(a.shape[0]) + math.exp(a.ndim) + math.log2(a.ndim) + math.log10(a.ndim)
        + math.log1p(a.ndim) + math.expm1(a.ndim) + math.tanh(a.ndim) + math.floor(a.shape[0] / 2) + math.ceil(a.shape[0] / 2)
    ),
    "data": lambda a, x: a.data * a,
    "T": lambda a, x: (a[:, None] * x).T * x,
    "dtype": lambda a, x: x.to(a.dtype) * a,
    "infinity": lambda a, x: torch.where(x > 0, a, -math.inf).exp(),
}  # fmt: skip


def cases() -> dict[str, Fn]:
    def called(name: str, *, method: bool) -> Fn:
        def fn(a: Any, x: Any) -> Any:
            a = a.exp() if name in POSITIVE else a
            arguments = ARGUMENTS[name](x, torch.where(x > 1, 3, torch.where(x > 0, 1, 4)))
            value = getattr(a, name)(*arguments) if method else getattr(torch, name)(a, *arguments)
            return value[0] if name in PAIRS else value

        return fn

    return (
        {f"torch.{name}": called(name, method=False) for name in ARGUMENTS}
        | {f"method {name}": called(name, method=True) for name in ARGUMENTS}
        | {f"torch.{name}": fn for name, fn in SQUARE.items()}
        | {"method tril": lambda a, x: (a[:, None] * x).tril(), "method triu": lambda a, x: (a[:, None] * x).triu()}
        | OTHERS
    )


CASES = cases()


def traced(fn: Fn) -> LossHandle:
    def loss(logprobs: Any, x: Any) -> Any:
        value = fn(logprobs, x)
        value = (value * 1.5 + logprobs.sum()).double()  # a tensor with a gradient, whatever fn gives
        return (value * value).sum().float(), {"custom/value:sum": value.sum(), "custom/value:mean": value.sum()}

    return trace_loss(loss, {"logprobs": 1, "x": 1}, "session")


def uploaded(handle: LossHandle) -> LossGraph:
    """Through JSON, as over the wire."""
    graph = json.loads(encode_graph(handle).model_dump_json())
    inputs = json.loads(json.dumps([item.model_dump() for item in handle.inputs]))
    return LossGraph.parse(name=handle.name, inputs=inputs, graph=graph)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch about transposing a vector
def test_an_operation_gives_what_plain_torch_gives(case: str) -> None:
    handle = traced(CASES[case])
    x = torch.tensor(X)
    plain = torch.tensor(LOGPROBS, requires_grad=True)
    datum = tinker.Datum(tinker.ModelInput.from_ints([1] * 5), {"target_tokens": torch.ones(5, dtype=torch.int64), "x": x})
    expected, expected_metrics = run_loss_handle(handle, [datum], [plain])
    expected.backward()

    ours = torch.tensor(LOGPROBS, requires_grad=True)
    loss, metrics = run_graph(uploaded(handle), ours, {"x": x})
    loss.backward()
    assert loss.item() == expected.item()
    assert plain.grad is not None and plain.grad.abs().sum() > 0
    torch.testing.assert_close(ours.grad, plain.grad, rtol=0, atol=0, equal_nan=True)
    assert {key: value.item() for key, value in metrics.items()} == expected_metrics


def test_every_operation_of_the_list_is_tested() -> None:
    functions, methods, attributes = set(), set(), set()
    for fn in CASES.values():
        for node in encode_graph(traced(fn)).nodes:
            if node.op == "call_function":
                functions.add(node.target)
                attributes |= {node.args[1]} if node.target == "getattr" else set()
            methods |= {node.target} if node.op == "call_method" else set()
    assert set(FUNCTIONS) - functions == set()
    assert set(METHODS) - methods == set()
    assert set(ATTRIBUTES) - attributes == set()
    assert set(_SHARED) <= set(METHODS)


REFUSED: dict[str, tuple[Fn, str]] = {
    "random": (lambda a, x: torch.rand_like(a) * a, r"torch.rand_like is not served: it is random"),
    "dropout": (lambda a, x: functional.dropout(a), r"dropout is not served: it is random"),
    "in place": (lambda a, x: a.clone().mul_(2), r"method mul_ is not served: it changes its input; use mul and its result"),
    "reads outside": (lambda a, x: torch.take_along_dim(a, x.long(), 0), r"take_along_dim is not served: it is not in the list"),
    "einsum": (lambda a, x: torch.einsum("i,i->", a, x), r"einsum is not served: write it with \* and sum"),
    "attribute": (lambda a, x: a * a.requires_grad, r"attribute 'requires_grad' is not served; known: shape"),
    "keyword": (lambda a, x: torch.exp(a, out=x), r"torch.exp is not served with 'out' here; it takes input"),
    "as_strided": (lambda a, x: a.as_strided((100,), (1,)), r"method as_strided is not served"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_in_the_list_is_refused_by_name(case: str) -> None:
    fn, message = REFUSED[case]
    with pytest.raises(InvalidRequestError, match=message):
        uploaded(traced(fn))


FAILING: dict[str, tuple[Fn, str]] = {
    "matrix product": (lambda a, x: (a[:, None] * x) @ (a[:, None] * x), r"\[T\] @ \[T\] and \[T, K\] @ \[K\] only"),
    "integer division that can end the process": (lambda a, x: torch.div(x.long(), -1, rounding_mode="trunc") * a, "for floats only"),
    "the same by operator": (lambda a, x: (x.long() // -1) * a, "for floats only"),
    "math of a tensor": (lambda a, x: math.exp(a.sum()) * a, r"math.exp would lose the gradient of a tensor; use torch.exp"),
    "a word": (lambda a, x: functional.mse_loss(a, x, reduction="all"), r"reduction is 'all'; served: mean, none, sum"),
    "in place by keyword": (lambda a, x: functional.relu(a, inplace=True), r"inplace must be False"),
    "an index beyond the end": (lambda a, x: a[(x * 100).long()], r"out of bounds|out of range"),
    "gather beyond the end": (lambda a, x: a.gather(0, x.abs().long() + 5), r"out of bounds|out of range"),
    "shapes": (lambda a, x: a[1:] * x, r"do not fit together"),
    "repeating a tuple": (lambda a, x: a * (a.shape * 3)[0], r"tensors and numbers only"),
    "a whole number that grows": (lambda a, x: a * (a.shape[0] ** 60), r"beyond"),
    "a power of whole numbers": (lambda a, x: a * 2 ** (a.shape[0] * 1000), r"too large"),
    "complex": (lambda a, x: a * (a.ndim - 2) ** 0.5, r"gave a complex"),
    "a slice by a tensor": (lambda a, x: a[: x.long()[0]], r"a slice takes whole numbers"),
    "no tensor": (lambda a, x: a.shape.shape, r"found tuple, it needs a tensor"),
}


@pytest.mark.parametrize("case", FAILING)
def test_a_failing_operation_names_its_node(case: str) -> None:
    fn, message = FAILING[case]
    with pytest.raises(InvalidRequestError, match=message):
        run_graph(uploaded(traced(fn)), torch.tensor(LOGPROBS), {"x": torch.tensor(X)})


def big(fn: Fn) -> tuple[LossGraph, Tensor]:
    return uploaded(traced(fn)), torch.zeros(2000)


BOMBS: dict[str, Fn] = {
    "expand": lambda a, x: a.expand(10**9, -1),
    "expand whose size overflows": lambda a, x: a[:1].expand(2**40, 2**40),
    "repeat": lambda a, x: a.repeat(10**9),
    "broadcast": lambda a, x: a[:, None, None] * a[None, :, None] * a,
    "outer products": lambda a, x: torch.outer(torch.outer(a, a).flatten(), a),
    "arange": lambda a, x: torch.arange(a.shape[0] * 10**9).sum() * a,
    "zeros": lambda a, x: a.new_zeros(10**12).sum() * a,
    "full": lambda a, x: torch.full(a.shape, 0.0).new_full((10**6, 10**6), 1.0).sum() * a,
    "pad": lambda a, x: functional.pad(a, (0, 10**12)),
    "cat": lambda a, x: torch.cat([torch.cat([torch.cat([a] * 200)] * 200)] * 200),
    "stack": lambda a, x: torch.stack([torch.stack([torch.stack([a] * 200)] * 200)] * 200),
    "gather": lambda a, x: a[x.long().abs()[:, None, None] + x.long().abs()[:, None] + x.long().abs()],
    "operator": lambda a, x: operator.mul(a[:, None], a)[:, :, None] * a,
}


@pytest.mark.parametrize("case", BOMBS)
def test_a_graph_cannot_fill_the_memory(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    graph, logprobs = big(BOMBS[case])

    class Counting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            value = func(*args, **(kwargs or {}))
            made.extend(value.untyped_storage().nbytes() for _ in (0,) if isinstance(value, Tensor) and value.device.type == "cpu")
            return value

    with Counting(), pytest.raises(InvalidRequestError, match=r"would compute more than \d+ elements|overflow"):
        run_graph(graph, logprobs, {"x": torch.zeros(2000)})
    assert max(made, default=0) <= 4 * 4096 * 4100  # nothing larger than the bound was ever made


def clipped_loss(logprobs: Any, old: Any, advantages: Any, groups: Any) -> Any:
    """A loss as users write them: PPO with a penalty, a mask from whole numbers, normalised by length."""
    trained = (groups == 1).float()
    ratio = torch.exp(logprobs - old)
    gain = torch.minimum(ratio * advantages, torch.clamp(ratio, 0.8, 1.2) * advantages)
    penalty = functional.smooth_l1_loss(logprobs, old, reduction="none")
    loss = ((0.05 * penalty - gain) * trained).sum() / math.sqrt(logprobs.shape[0])
    clipped = torch.logical_or(ratio < 0.8, ratio > 1.2).float() * trained
    return loss, {"custom/clipped:sum": clipped.sum(), "custom/kl:mean": (old.detach() - logprobs).mean()}


def test_a_whole_loss_over_several_datums_gives_what_the_sdk_gives_itself() -> None:
    handle = trace_loss(clipped_loss, {"logprobs": 1, "old": 1, "advantages": 1, "groups": 1}, "session")
    call = resolve_loss("custom", {"loss_id": "x"}, graph=uploaded(handle))
    rng = np.random.default_rng(0)
    theirs, ours, logprobs = [], [], []
    for length in (3, 50, 17):
        lp = -rng.exponential(2.0, length).astype(np.float32)
        fields = {
            "target_tokens": rng.integers(0, 9, length),
            "old": (lp + rng.normal(0, 0.3, length)).astype(np.float32),
            "advantages": rng.normal(0, 1, length).astype(np.float32),
            "groups": rng.integers(0, 2, length),
        }
        theirs.append(tinker.Datum(tinker.ModelInput.from_ints([1] * length), fields))
        ours.append(Datum(ModelInput.from_ints([1] * length), fields))
        logprobs.append(torch.from_numpy(lp))
    leaves, expected_leaves = ([lp.clone().requires_grad_() for lp in logprobs] for _ in range(2))
    expected, expected_metrics = run_loss_handle(handle, theirs, expected_leaves)
    expected.backward()
    for index, datum in enumerate(ours):
        check_datum(datum, call, index=index, vocab_size=9, max_tokens=50)
    inputs = [loss_inputs(datum, call) for datum in ours]
    total = loss_sum(call, leaves, inputs)
    total.backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    for leaf, expected_leaf in zip(leaves, expected_leaves, strict=True):
        torch.testing.assert_close(leaf.grad, expected_leaf.grad, rtol=0, atol=0)
    metrics = loss_metrics(call, [leaf.detach() for leaf in leaves], inputs)
    assert metrics == pytest.approx({"loss:sum": expected.item(), **expected_metrics}, rel=1e-6)


def test_the_documentation_names_every_operation() -> None:
    page = (Path(__file__).parents[1] / "docs" / "losses.md").read_text(encoding="utf-8")
    section = page.partition("## custom")[2].partition("## Output")[0]
    words = set(re.findall(r"\w+", section))
    names = {target.rpartition(".")[2] for target in (*FUNCTIONS, *METHODS, *ATTRIBUTES) if not target.startswith("operator.")}
    assert {name.replace("log_sigmoid", "logsigmoid") for name in names} - words == set()
