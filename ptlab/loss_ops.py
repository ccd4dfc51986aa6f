"""The operations an uploaded loss graph may use, by the names torch.fx gives them. What is not listed here is refused.

Left out on purpose: whatever is random (a request may be run again), writes in place, reads a tensor's value into Python, or was seen to
read outside its tensor or to end the process on odd integers (take_along_dim; integer division that truncates).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

MAX_INTEGER = 2**53
"""Largest whole number a graph may hold or compute; every one up to it is exact as a float too."""

Growth = Literal["same", "broadcast", "any"]
Value = Any
"""What a node can be: a tensor, a number, a tuple of them (a shape, the two results of sort), a dtype, a device."""


@dataclass(frozen=True, slots=True)
class Op:
    """One allowed operation."""

    fn: Callable[..., Any]
    parameters: tuple[str, ...]
    """In order; also the keywords that are accepted."""
    growth: Growth = "same"
    """How large the result can be: no larger than the largest tensor given, that of all of them broadcast, or anything (asked first)."""
    spread: bool = False
    """Whole numbers may follow one by one in place of a tuple: x.view(2, 3)."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Keywords that torch.fx writes down and that must have this value; they are not passed on."""
    words: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Parameters that are words, and which."""


# ---------------------------------------------------------------------------------------------------------------- wrappers


def _largest(input: Tensor, dim: Any = None, keepdim: bool = False) -> Any:
    return torch.maximum(input, dim) if isinstance(dim, Tensor) else torch.max(input) if dim is None else torch.max(input, dim, keepdim)


def _smallest(input: Tensor, dim: Any = None, keepdim: bool = False) -> Any:
    return torch.minimum(input, dim) if isinstance(dim, Tensor) else torch.min(input) if dim is None else torch.min(input, dim, keepdim)


def _matmul(input: Tensor, other: Tensor) -> Tensor:
    if other.dim() != 1 or input.dim() > 2:  # the product of two matrices costs more than their elements
        raise ValueError("a matrix product is served for [T] @ [T] and [T, K] @ [K] only")
    return torch.matmul(input, other)


def _to(input: Tensor, target: Any = None, *, dtype: Any = None, device: Any = None) -> Tensor:
    del device  # graphs run on the CPU
    wanted = dtype if dtype is not None else target
    if isinstance(wanted, Tensor):
        wanted = wanted.dtype
    return input.to(wanted) if isinstance(wanted, torch.dtype) else input


def _type(input: Tensor, dtype: torch.dtype) -> Tensor:
    return input.to(dtype)


def _size(input: Tensor, dim: int | None = None) -> Any:
    return tuple(input.shape) if dim is None else input.shape[dim]


def _on_floats(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Integer division of tensors can end the process (-2**63 / -1), so it is done on floats only."""

    def divide(input: Any, other: Any, **keywords: Any) -> Any:
        tensors = [value for value in (input, other) if isinstance(value, Tensor)]
        if tensors and not any(tensor.is_floating_point() for tensor in tensors):
            raise TypeError("division with rounding is served for floats only; use x.float()")
        return fn(input, other, **keywords)

    return divide


def _on_numbers(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Python's operator on tensors and numbers; among numbers alone with a result that stays small."""

    def compute(*operands: Any) -> Any:
        if any(not isinstance(value, (Tensor, bool, int, float)) for value in operands):
            raise TypeError("it is served for tensors and numbers only")
        if any(isinstance(value, Tensor) for value in operands):
            return fn(*operands)
        if fn is operator.pow and all(isinstance(value, int) for value in operands) and not (abs(operands[0]) < 2**32 and operands[1] < 64):
            raise OverflowError("the power of whole numbers is too large")
        return fn(*operands)

    return compute


def _math(fn: Callable[..., Any]) -> Callable[..., Any]:
    def compute(*operands: Any) -> Any:
        if any(not isinstance(value, (bool, int, float)) for value in operands):
            raise TypeError(f"math.{fn.__name__} would lose the gradient of a tensor; use torch.{fn.__name__}")
        return fn(*operands)

    return compute


# ---------------------------------------------------------------------------------------------------------------- the list


def _ops(fns: Iterable[Callable[..., Any]], parameters: str, growth: Growth = "same", **more: Any) -> dict[str, Op]:
    return {fn.__name__: Op(fn, tuple(parameters.split()), growth, **more) for fn in fns}


def _op(fn: Callable[..., Any], parameters: str, growth: Growth = "same", **more: Any) -> Op:
    return Op(fn, tuple(parameters.split()), growth, **more)


_ROUNDING = {"rounding_mode": frozenset({"floor", "trunc"})}

# Both torch.<name>(x, ...) and x.<name>(...).
_SHARED: dict[str, Op] = {
    **_ops((torch.abs, torch.neg, torch.exp, torch.expm1, torch.log, torch.log1p, torch.log2, torch.log10, torch.sqrt), "input"),
    **_ops((torch.rsqrt, torch.square, torch.reciprocal, torch.sigmoid, torch.tanh, torch.relu, torch.erf, torch.sin, torch.cos), "input"),
    **_ops((torch.sign, torch.floor, torch.ceil, torch.round, torch.trunc, torch.isnan, torch.isinf, torch.isfinite), "input"),
    **_ops((torch.logical_not, torch.detach, torch.clone, torch.t), "input"),
    **_ops((torch.logit,), "input eps"),
    **_ops((torch.add, torch.sub), "input other alpha", "broadcast"),
    **_ops((torch.mul, torch.maximum, torch.minimum, torch.fmax, torch.fmin, torch.logaddexp, torch.xlogy), "input other", "broadcast"),
    **_ops((torch.eq, torch.ne, torch.lt, torch.le, torch.gt, torch.ge), "input other", "broadcast"),
    **_ops((torch.logical_and, torch.logical_or, torch.logical_xor), "input other", "broadcast"),
    **_ops((torch.pow,), "input exponent", "broadcast"),
    **_ops((torch.lerp,), "input end weight", "broadcast"),
    **_ops((torch.clamp, torch.clip), "input min max", "broadcast"),
    **_ops((torch.clamp_min,), "input min", "broadcast"),
    **_ops((torch.clamp_max,), "input max", "broadcast"),
    **_ops((torch.where,), "condition input other", "broadcast"),
    **_ops((torch.masked_fill,), "input mask value", "broadcast"),
    **_ops((torch.masked_select,), "input mask", "broadcast"),
    **_ops((torch.nan_to_num,), "input nan posinf neginf"),
    "div": _op(_on_floats(torch.div), "input other rounding_mode", "broadcast", words=_ROUNDING),
    "floor_divide": _op(_on_floats(torch.floor_divide), "input other", "broadcast"),
    "remainder": _op(_on_floats(torch.remainder), "input other", "broadcast"),
    "fmod": _op(_on_floats(torch.fmod), "input other", "broadcast"),
    **_ops((torch.sum, torch.mean, torch.nansum, torch.prod), "input dim keepdim dtype"),
    **_ops((torch.amax, torch.amin, torch.logsumexp, torch.any, torch.all, torch.argmax, torch.argmin, torch.median), "input dim keepdim"),
    **_ops((torch.std, torch.var), "input dim unbiased keepdim correction"),
    **_ops((torch.count_nonzero,), "input dim"),
    "max": _op(_largest, "input dim keepdim", "broadcast"),
    "min": _op(_smallest, "input dim keepdim", "broadcast"),
    **_ops((torch.cumsum,), "input dim dtype"),
    **_ops((torch.logcumsumexp,), "input dim"),
    **_ops((torch.softmax, torch.log_softmax), "input dim dtype"),
    **_ops((torch.sort, torch.argsort), "input dim descending"),
    **_ops((torch.topk,), "input k dim largest sorted"),
    **_ops((torch.flip,), "input dims", spread=True),
    **_ops((torch.roll,), "input shifts dims"),
    "diff": _op(lambda input, dim=-1: torch.diff(input, dim=dim), "input dim"),
    **_ops((torch.reshape,), "input shape", spread=True),
    **_ops((torch.permute,), "input dims", spread=True),
    **_ops((torch.unsqueeze,), "input dim"),
    **_ops((torch.squeeze,), "input dim"),
    **_ops((torch.transpose,), "input dim0 dim1"),
    **_ops((torch.flatten,), "input start_dim end_dim"),
    **_ops((torch.tril, torch.triu), "input diagonal"),
    **_ops((torch.broadcast_to,), "input size", "any"),
    **_ops((torch.outer,), "input vec2", "any"),
    **_ops((torch.dot,), "input tensor"),
    "matmul": _op(_matmul, "input other"),
    **_ops((torch.gather,), "input dim index", "any"),
    **_ops((torch.index_select,), "input dim index", "any"),
    "numel": _op(lambda input: input.numel(), "input"),
}

_FUNCTIONS_ONLY: dict[str, Op] = {
    **_ops((torch.cat, torch.stack), "tensors dim", "any"),
    **_ops((torch.zeros_like, torch.ones_like), "input dtype"),
    **_ops((torch.full_like,), "input fill_value dtype"),
    **_ops((torch.zeros, torch.ones), "size dtype", "any"),
    **_ops((torch.full,), "size fill_value dtype", "any"),
    **_ops((torch.arange,), "start end step dtype", "any"),
}

_METHODS_ONLY: dict[str, Op] = dict(
    where=_op(lambda input, condition, other: torch.where(condition, input, other), "input condition other", "broadcast"),
    float=_op(lambda input: input.float(), "input"),
    double=_op(lambda input: input.double(), "input"),
    long=_op(lambda input: input.long(), "input"),
    int=_op(lambda input: input.int(), "input"),
    bool=_op(lambda input: input.bool(), "input"),
    to=_op(_to, "input target dtype device", words={"target": frozenset({"cpu", "cuda"}), "device": frozenset({"cpu", "cuda"})}),
    type=_op(_type, "input dtype"),
    type_as=_op(lambda input, other: input.to(other.dtype), "input other"),
    cpu=_op(lambda input: input, "input"),
    contiguous=_op(lambda input: input.contiguous(), "input"),
    size=_op(_size, "input dim"),
    dim=_op(lambda input: input.dim(), "input"),
    view=_op(lambda input, size: input.view(size), "input size", spread=True),
    view_as=_op(lambda input, other: input.view_as(other), "input other"),
    reshape_as=_op(lambda input, other: input.reshape(other.shape), "input other"),
    expand=_op(lambda input, size: input.expand(size), "input size", "any", spread=True),
    expand_as=_op(lambda input, other: input.expand_as(other), "input other", "broadcast"),
    repeat=_op(lambda input, repeats: input.repeat(repeats), "input repeats", "any", spread=True),
    new_zeros=_op(lambda input, size, dtype=None: input.new_zeros(size, dtype=dtype), "input size dtype", "any", spread=True),
    new_ones=_op(lambda input, size, dtype=None: input.new_ones(size, dtype=dtype), "input size dtype", "any", spread=True),
    new_full=_op(lambda input, size, fill_value: input.new_full(size, fill_value), "input size fill_value", "any"),
)

_NOT_IN_PLACE = {"inplace": False}
_REDUCTION = {"reduction": frozenset({"none", "mean", "sum"})}
_PLAIN_LOSS = {"size_average": None, "reduce": None, "weight": None}
_FUNCTIONAL: dict[str, Op] = {
    "torch.nn.functional.relu": _op(functional.relu, "input", fixed=_NOT_IN_PLACE),
    "torch.nn.functional.silu": _op(functional.silu, "input", fixed=_NOT_IN_PLACE),
    "torch._C._nn.softplus": _op(functional.softplus, "input beta threshold"),
    "torch._C._nn.log_sigmoid": _op(functional.logsigmoid, "input"),
    "torch.nn.functional.softmax": _op(functional.softmax, "input dim dtype", fixed={"_stacklevel": 3}),
    "torch.nn.functional.log_softmax": _op(functional.log_softmax, "input dim dtype", fixed={"_stacklevel": 3}),
    "torch.nn.functional.pad": _op(functional.pad, "input pad mode value", "any", words={"mode": frozenset({"constant"})}),
    "torch.nn.functional.mse_loss": _op(functional.mse_loss, "input target reduction", "broadcast", fixed=_PLAIN_LOSS, words=_REDUCTION),
    "torch.nn.functional.l1_loss": _op(functional.l1_loss, "input target reduction", "broadcast", fixed=_PLAIN_LOSS, words=_REDUCTION),
    "torch.nn.functional.smooth_l1_loss": _op(
        functional.smooth_l1_loss, "input target reduction beta", "broadcast", fixed=_PLAIN_LOSS, words=_REDUCTION
    ),
    "torch.nn.functional.huber_loss": _op(
        functional.huber_loss, "input target reduction delta", "broadcast", fixed=_PLAIN_LOSS, words=_REDUCTION
    ),
    "torch.nn.functional.binary_cross_entropy_with_logits": _op(
        functional.binary_cross_entropy_with_logits,
        "input target reduction",
        "broadcast",
        fixed={**_PLAIN_LOSS, "pos_weight": None},
        words=_REDUCTION,
    ),
}


def _getitem(value: Any, index: Any) -> Any:
    if isinstance(value, tuple) and not isinstance(index, (int, slice)):
        raise TypeError("a tuple is indexed by a whole number or a slice")
    return value[index]


_OPERATORS: dict[str, Op] = {
    **{
        f"operator.{fn.__name__}": _op(_on_numbers(fn), "a b", "broadcast")
        for fn in (operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.and_, operator.or_, operator.xor)
    },
    **{
        f"operator.{fn.__name__}": _op(_on_numbers(fn), "a b", "broadcast")
        for fn in (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)
    },
    "operator.floordiv": _op(_on_numbers(_on_floats(operator.floordiv)), "a b", "broadcast"),
    "operator.mod": _op(_on_numbers(_on_floats(operator.mod)), "a b", "broadcast"),
    **{f"operator.{fn.__name__}": _op(_on_numbers(fn), "a") for fn in (operator.neg, operator.pos, operator.abs, operator.invert)},
    "operator.matmul": _op(_matmul, "a b"),
    "operator.getitem": _op(_getitem, "a b", "any"),
    **{
        f"math.{fn.__name__}": _op(_math(fn), "x")
        for fn in (math.sqrt, math.exp, math.log, math.log2, math.log10, math.log1p, math.expm1, math.tanh, math.floor, math.ceil)
    },
}

FUNCTIONS: Mapping[str, Op] = MappingProxyType(
    {**{f"torch.{name}": op for name, op in {**_SHARED, **_FUNCTIONS_ONLY}.items()}, **_FUNCTIONAL, **_OPERATORS}
)
"""By the qualified name of a call_function node."""
METHODS: Mapping[str, Op] = MappingProxyType({**_SHARED, **_METHODS_ONLY})
"""By the name of a call_method node."""
ATTRIBUTES: Mapping[str, Callable[[Any], Any]] = MappingProxyType(
    {
        "shape": lambda value: tuple(value.shape),
        "ndim": lambda value: value.ndim,
        "dtype": lambda value: value.dtype,
        "device": lambda value: value.device,
        "T": lambda value: value.t(),
        "data": lambda value: value.detach(),
        "values": lambda value: value[0],
        "indices": lambda value: value[1],
    }
)
"""What getattr may ask; the last two of the results of max, sort and topk, the others of tensors."""
DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"float32": torch.float32, "float64": torch.float64, "int64": torch.int64, "int32": torch.int32, "bool": torch.bool}
)
REASONS: Mapping[str, str] = MappingProxyType(
    {
        "rand": "it is random, and a request may be run again",
        "dropout": "it is random, and a request may be run again",
        "normal": "it is random, and a request may be run again",
        "bernoulli": "it is random, and a request may be run again",
        "item": "it reads a tensor into Python; keep every value a tensor",
        "numpy": "it reads a tensor into Python; keep every value a tensor",
        "backward": "the trainer runs the backward pass",
        "einsum": "write it with * and sum",
    }
)
"""Why a name that contains the key is not served."""


def why_refused(target: str) -> str:
    """Half a sentence about an operation that is not in the list."""
    name = target.rpartition(".")[2]
    if name.endswith("_") and not name.endswith("__") and name not in ("and_", "or_"):
        return f"it changes its input; use {name.rstrip('_')} and its result"
    for key, reason in REASONS.items():
        if key in name:
            return reason
    return "it is not in the list of served operations (docs/losses.md)"


def elements(values: Sequence[Any]) -> int:
    """Of all tensors among the values and in tuples and lists of them."""
    total = 0
    for value in values:
        if isinstance(value, Tensor):
            total += math.prod(value.shape)  # not numel(): it may overflow
        elif isinstance(value, (tuple, list)):
            total += elements(value)
    return total
