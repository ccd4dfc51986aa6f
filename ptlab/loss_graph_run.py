"""Run an uploaded loss graph on one datum, within bounds.

What an operation would compute is asked before it runs wherever that can be more than what it is given, so a small request cannot fill
the memory. Graphs run on the CPU, away from the device the model lives on: an index out of range there would end the process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from ptlab.errors import InvalidRequestError
from ptlab.loss_graph import Items, LossGraph, Node, Ref, Slice
from ptlab.loss_ops import ATTRIBUTES, FUNCTIONS, MAX_INTEGER, METHODS, Op, elements

ELEMENTS_PER_POSITION = 4096
"""Elements a graph may compute in all, per element of its inputs (with a start of 64)."""
MAX_ELEMENTS = 2**26
"""Elements a graph may compute in all for one datum (256 MiB of float32)."""
_TORCH_ERRORS = (RuntimeError, TypeError, ValueError, IndexError, ArithmeticError)


def run_graph(graph: LossGraph, logprobs: Tensor, inputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one datum, a float32 scalar, and its metrics, one number each. Differentiable by logprobs.

    Args:
        logprobs: [T] or [T, K], on the CPU.
        inputs: what the graph reads besides, by name, on the CPU.
    Raises: InvalidRequestError if an operation fails or would compute too much, or the loss is no finite scalar.
    """
    run = _Run(graph, elements([logprobs, *inputs.values()]))
    values: list[Any] = []
    for node in graph.nodes:
        if node.kind == "placeholder":
            values.append(logprobs if node.target == "logprobs" else inputs[node.target])
        else:
            values.append(run.compute(node, values))
    return run.outcome(values, needs_gradient=torch.is_grad_enabled() and logprobs.requires_grad)


class _Run:
    def __init__(self, graph: LossGraph, num_input_elements: int) -> None:
        self.graph = graph
        self.left = self.limit = min(ELEMENTS_PER_POSITION * (num_input_elements + 64), MAX_ELEMENTS)

    def compute(self, node: Node, values: Sequence[Any]) -> Any:
        where = f"custom loss {self.graph.name!r}, node {node.name!r} ({node.target})"
        args = [_resolve(arg, values) for arg in node.args]
        try:
            if node.kind == "getattr":
                return _checked(where, ATTRIBUTES[node.args[1]](args[0]))
            op = FUNCTIONS[node.target] if node.kind == "call_function" else METHODS[node.target]
            kwargs = {key: _resolve(value, values) for key, value in node.kwargs}
            args, kwargs = _arguments(op, args, kwargs)
            self.charge(where, _expected(op, args, kwargs))
            return _checked(where, op.fn(*args, **kwargs))
        except _TORCH_ERRORS as err:
            if isinstance(err, InvalidRequestError):
                raise
            raise InvalidRequestError(f"{where}: {str(err).splitlines()[0] if str(err) else type(err).__name__}") from err
        except AttributeError as err:
            raise InvalidRequestError(f"{where}: found {type(args[0]).__name__}, it needs a tensor") from err

    def charge(self, where: str, num_elements: int) -> None:
        self.left -= num_elements
        if self.left < 0:
            raise InvalidRequestError(f"{where}: the graph would compute more than {self.limit} elements for this datum; it is too large")

    def outcome(self, values: Sequence[Any], *, needs_gradient: bool) -> tuple[Tensor, dict[str, Tensor]]:
        where = f"custom loss {self.graph.name!r}"
        loss = values[self.graph.loss.index]
        if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
            found = f"{loss.dtype} of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise InvalidRequestError(f"{where} returned {found}; its loss must be one floating-point number per datum (sum it)")
        if needs_gradient and not loss.requires_grad:
            raise InvalidRequestError(f"{where} has no gradient: it does not depend on logprobs, or they were detached")
        if not math.isfinite(loss.item()):
            raise InvalidRequestError(f"{where} is {loss.item()} for a datum; look for a logarithm of 0 or an infinite log-probability")
        metrics: dict[str, Tensor] = {}
        for key, ref in self.graph.metrics:
            value = values[ref.index]
            if not isinstance(value, Tensor) or elements([value]) != 1:
                raise InvalidRequestError(f"{where}: metric {key!r} must be a tensor with one number")
            metrics[key] = value.detach().reshape(())
        return loss.float(), metrics


def _resolve(arg: Any, values: Sequence[Any]) -> Any:
    if isinstance(arg, Ref):
        return values[arg.index]
    if isinstance(arg, Items):
        items = [_resolve(item, values) for item in arg.values]
        return items if arg.is_list else tuple(items)
    if isinstance(arg, Slice):
        parts = [_resolve(part, values) for part in arg.parts]
        if any(part is not None and (isinstance(part, bool) or not isinstance(part, int)) for part in parts):
            raise InvalidRequestError("custom loss: a slice takes whole numbers, not tensors")
        return slice(*parts)
    return arg


def _arguments(op: Op, args: list[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """What fn is called with. Raises: TypeError for a word or a fixed value that is not served."""
    if op.spread and len(args) > 1 and not isinstance(args[1], (tuple, list)):
        args = [args[0], tuple(args[1:])]
    if len(args) > len(op.parameters):
        raise TypeError(f"it takes {', '.join(op.parameters)}")
    for key, value in kwargs.items():
        if key in op.fixed and value != op.fixed[key]:
            raise TypeError(f"{key} must be {op.fixed[key]}")
    kwargs = {key: value for key, value in kwargs.items() if key not in op.fixed}
    for key, value in (*zip(op.parameters, args, strict=False), *kwargs.items()):
        if isinstance(value, str) and value not in op.words.get(key, ()):
            raise TypeError(
                f"{key} is {value!r}; " + (f"served: {', '.join(sorted(op.words[key]))}" if key in op.words else "it is no text")
            )
    return args, kwargs


def _expected(op: Op, args: list[Any], kwargs: Mapping[str, Any]) -> int:
    """At most how many elements the operation makes, before it makes them."""
    given = [*args, *kwargs.values()]
    tensors = _tensors(given)
    if op.growth == "same":
        return max((math.prod(tensor.shape) for tensor in tensors), default=1)
    if op.growth == "broadcast":
        return _broadcast_elements(tensors)
    if op.fn is FUNCTIONS["operator.getitem"].fn:
        masks = [tensor for tensor in _tensors(args[1:]) if tensor.dtype == torch.bool]
        if masks:
            if len(_tensors(args[1:])) > 1:
                raise TypeError("one mask at a time")
            return elements(args[:1])
    with torch.device("meta"), torch.no_grad():  # shapes only, no memory
        return elements([op.fn(*_on_meta(args), **{key: _on_meta(value) for key, value in kwargs.items()})])


def _broadcast_elements(tensors: Sequence[Tensor]) -> int:
    """Raises: ValueError if the shapes do not fit together."""
    total = 1
    for sizes in zip_longest(*(reversed(tensor.shape) for tensor in tensors), fillvalue=1):
        wide = {size for size in sizes if size != 1}
        if len(wide) > 1:
            raise ValueError(f"shapes {[list(tensor.shape) for tensor in tensors]} do not fit together")
        total *= wide.pop() if wide else 1
    return total


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += _tensors(value)
    return found


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("meta")
    if isinstance(value, (tuple, list)):
        moved: Callable[[Any], Any] = tuple if isinstance(value, tuple) else list
        return moved(_on_meta(item) for item in value)
    return value


def _checked(where: str, value: Any) -> Any:
    """A value that a later node may use: no complex numbers, no whole numbers that grow, plain tuples."""
    if isinstance(value, (bool, Tensor, float, torch.dtype, torch.device)):
        return value
    if isinstance(value, int):
        if abs(value) > MAX_INTEGER:
            raise InvalidRequestError(f"{where}: a whole number beyond {MAX_INTEGER}")
        return value
    if isinstance(value, tuple):
        return tuple(_checked(where, item) for item in value)
    raise InvalidRequestError(f"{where}: gave a {type(value).__name__}; a graph works with tensors and numbers")
