"""Loss `custom`: a loss that a client wrote, traced with torch.fx and uploaded as JSON (format 1).

    graph = LossGraph.parse(name="my_loss", inputs=[{"name": "logprobs", "rank": 1}, ...], graph={"format": 1, "nodes": [...]})
    loss, metrics = run_graph(graph, target_logprobs, {"advantages": ..., ...})      one datum

Nothing in a graph is code: a node names an operation of the list in loss_ops.py, and its arguments are numbers and earlier nodes. A graph
is bounded here in nodes and arguments, in loss_graph_run.py in the elements it may compute.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from ptlab.errors import InvalidRequestError
from ptlab.loss_ops import ATTRIBUTES, DTYPES, FUNCTIONS, MAX_INTEGER, METHODS, why_refused

MAX_NODES = 1000
MAX_ARGUMENTS = 16_000
"""Constants and references in a whole graph."""
MAX_DEPTH = 4
"""Lists within lists in one argument."""
MAX_INPUTS = 16
MAX_METRICS = 64

_NODE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_INPUT_NAME = re.compile(r"[a-z_][a-z0-9_]{0,63}")
_METRIC_NAME = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")
_NOT_SERVED = {
    "get_attr": "captures a tensor; a loss may read logprobs and the loss_fn_inputs it names",
    "call_module": "calls a torch.nn module; use functions",
}


@dataclass(frozen=True, slots=True)
class Ref:
    """The value of an earlier node."""

    index: int


@dataclass(frozen=True, slots=True)
class Items:
    """A list or a tuple of arguments."""

    values: tuple[Any, ...]
    is_list: bool


@dataclass(frozen=True, slots=True)
class Slice:
    """start:stop:step."""

    parts: tuple[Any, Any, Any]


@dataclass(frozen=True, slots=True)
class Node:
    """One operation. Arguments are None, bool, int, float, str, Ellipsis, a torch dtype, Ref, Items or Slice."""

    kind: Literal["placeholder", "call_function", "call_method", "getattr"]
    name: str
    target: str
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class LossInput:
    """What the loss reads: `logprobs` or a key of loss_fn_inputs."""

    name: str
    rank: int
    """0 = one number, 1 = [T], 2 = [T, K]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossGraph:
    """A graph whose every node is allowed; made by parse."""

    name: str
    inputs: tuple[LossInput, ...]
    """`logprobs` first."""
    nodes: tuple[Node, ...]
    loss: Ref
    metrics: tuple[tuple[str, Ref], ...]

    @property
    def logprobs_rank(self) -> int:
        return self.inputs[0].rank

    @classmethod
    def parse(cls, *, name: str, inputs: Sequence[Any], graph: Mapping[str, Any]) -> LossGraph:
        """Check an uploaded loss and take it apart.

        Args:
            inputs: {"name", "rank"} each, `logprobs` first, in the order of the graph's placeholders.
            graph: {"format": 1, "nodes": [...]} as the SDK's CustomLossGraph.
        Raises: InvalidRequestError, naming the loss and the node.
        """
        if not isinstance(name, str) or not 0 < len(name) <= 200:
            raise InvalidRequestError(f"custom loss: its name must be 1 to 200 characters, found {str(name)[:50]!r}")
        return _Reader(name).read(inputs, graph)


# ---------------------------------------------------------------------------------------------------------------- reading


class _Reader:
    def __init__(self, name: str) -> None:
        self.where = f"custom loss {name!r}"
        self.name = name
        self.index_of: dict[str, int] = {}
        self.num_arguments = 0

    def refuse(self, message: str) -> InvalidRequestError:
        return InvalidRequestError(f"{self.where}: {message}")

    def read(self, inputs: Sequence[Any], graph: Mapping[str, Any]) -> LossGraph:
        loss_inputs = self.read_inputs(inputs)
        if not isinstance(graph, Mapping) or graph.get("format") != 1 or isinstance(graph.get("format"), bool):
            raise self.refuse("its graph must be of format 1")
        raw = graph.get("nodes")
        if not isinstance(raw, list) or not len(loss_inputs) < len(raw) <= MAX_NODES:
            raise self.refuse(f"its graph must be a list of at most {MAX_NODES} nodes that ends with the output")
        nodes = [self.read_node(index, node, loss_inputs) for index, node in enumerate(raw[:-1])]
        loss, metrics = self.read_output(raw[-1])
        depends = self.depending_on_logprobs(nodes)
        if loss.index not in depends:
            raise self.refuse("its loss does not depend on logprobs (or only detached from their gradient), so it cannot train")
        return LossGraph(name=self.name, inputs=loss_inputs, nodes=tuple(nodes), loss=loss, metrics=metrics)

    def read_inputs(self, inputs: Sequence[Any]) -> tuple[LossInput, ...]:
        if not isinstance(inputs, Sequence) or not 0 < len(inputs) <= MAX_INPUTS:
            raise self.refuse(f"it must have 1 to {MAX_INPUTS} inputs, logprobs first")
        read = []
        for item in inputs:
            name, rank = (item.get("name"), item.get("rank")) if isinstance(item, Mapping) else (None, None)
            if not isinstance(name, str) or not _INPUT_NAME.fullmatch(name) or isinstance(rank, bool) or rank not in (0, 1, 2):
                raise self.refuse(
                    f'an input must be {{"name": lowercase letters, digits and _, "rank": 0, 1 or 2}}, found {str(item)[:80]}'
                )
            read.append(LossInput(name, rank))
        if read[0].name != "logprobs" or read[0].rank == 0 or len({item.name for item in read}) < len(read):
            raise self.refuse("its first input must be logprobs with rank 1 or 2, and no name may come twice")
        return tuple(read)

    def read_node(self, index: int, raw: Any, inputs: Sequence[LossInput]) -> Node:
        kind, name, target = self.read_head(raw)
        if (kind == "placeholder") != (index < len(inputs)) or (kind == "placeholder" and target != inputs[index].name):
            wanted = ", ".join(item.name for item in inputs)
            raise self.refuse(f"node {name!r}: the graph must begin with the placeholders of its inputs ({wanted}) and have no others")
        if kind == "output":
            raise self.refuse(f"node {name!r}: the output must be the last node, and there must be one")
        if kind in _NOT_SERVED:
            raise self.refuse(f"node {name!r} {_NOT_SERVED[kind]}")
        args, kwargs = raw.get("args", []), raw.get("kwargs", {})
        if not isinstance(args, list) or not isinstance(kwargs, dict):
            raise self.refuse(f"node {name!r}: args must be a list and kwargs an object")
        node = Node(
            cast(Any, "getattr" if kind == "call_function" and target == "getattr" else kind),
            name,
            target,
            tuple(self.read_argument(name, arg) for arg in args),
            tuple((self.read_keyword(name, key), self.read_argument(name, arg)) for key, arg in kwargs.items()),
        )
        self.check_node(node)
        self.index_of[name] = index
        return node

    def read_head(self, raw: Any) -> tuple[str, str, str]:
        if not isinstance(raw, Mapping):
            raise self.refuse(f"a node must be an object, found {type(raw).__name__}")
        kind, name, target = raw.get("op"), raw.get("name"), raw.get("target")
        if not isinstance(name, str) or not _NODE_NAME.fullmatch(name) or name in self.index_of:
            raise self.refuse(f"node name {str(name)[:80]!r} is no identifier, or comes twice")
        if kind not in ("placeholder", "get_attr", "call_function", "call_method", "call_module", "output"):
            raise self.refuse(f"node {name!r}: op is {str(kind)[:80]!r}; torch.fx has no such")
        if not isinstance(target, str) or len(target) > 200:
            raise self.refuse(f"node {name!r}: target must be a name")
        return kind, name, target

    def read_keyword(self, name: str, key: Any) -> str:
        if not isinstance(key, str) or len(key) > 64:
            raise self.refuse(f"node {name!r}: a keyword must be a short word")
        return key

    def read_argument(self, name: str, arg: Any, depth: int = 0) -> Any:
        self.num_arguments += 1
        if self.num_arguments > MAX_ARGUMENTS or depth > MAX_DEPTH:
            raise self.refuse(f"node {name!r}: the graph has more than {MAX_ARGUMENTS} arguments, or lists more than {MAX_DEPTH} deep")
        if arg is None or isinstance(arg, bool):
            return arg
        if isinstance(arg, int):
            if abs(arg) > MAX_INTEGER:
                raise self.refuse(f"node {name!r}: a whole number is beyond {MAX_INTEGER}")
            return arg
        if isinstance(arg, float):
            return arg
        if isinstance(arg, str):
            if len(arg) > 64:
                raise self.refuse(f"node {name!r}: a text of {len(arg)} characters")
            return arg
        if isinstance(arg, list):
            return Items(tuple(self.read_argument(name, item, depth + 1) for item in arg), is_list=True)
        if isinstance(arg, dict) and len(arg) == 1:
            ((kind, value),) = arg.items()
            return self.read_tagged(name, kind, value, depth)
        raise self.refuse(f"node {name!r}: an argument of an unknown form")

    def read_tagged(self, name: str, kind: Any, value: Any, depth: int) -> Any:
        if kind == "ref":
            if not isinstance(value, str) or value not in self.index_of:
                raise self.refuse(f"node {name!r} refers to {str(value)[:80]!r}, which is no earlier node")
            return Ref(self.index_of[value])
        if kind == "tuple" and isinstance(value, list):
            return Items(tuple(self.read_argument(name, item, depth + 1) for item in value), is_list=False)
        if kind == "slice" and isinstance(value, list) and len(value) == 3:
            start, stop, step = (self.read_argument(name, item, depth + 1) for item in value)
            return Slice((start, stop, step))
        if kind == "ellipsis" and value is True:
            return Ellipsis
        if kind == "float" and value in ("inf", "-inf", "nan"):
            return float(value)
        if kind == "dtype" and isinstance(value, str) and value in DTYPES:
            return DTYPES[value]
        if kind == "device" and isinstance(value, str) and len(value) <= 64:
            return "cpu"
        known = f"; dtypes: {', '.join(DTYPES)}" if kind == "dtype" else ""
        raise self.refuse(f"node {name!r}: an argument {str(kind)[:40]!r} of {str(value)[:40]!r} is not served{known}")

    def check_node(self, node: Node) -> None:
        """The operation is in the list and its arguments fit its parameters."""
        if node.kind == "placeholder":
            if node.args or node.kwargs:
                raise self.refuse(f"node {node.name!r}: an input takes no default; every input is required")
            return
        if node.kind == "getattr":
            if len(node.args) != 2 or node.kwargs or not isinstance(node.args[0], Ref) or node.args[1] not in ATTRIBUTES:
                asked = str(node.args[1])[:40] if len(node.args) > 1 else ""
                raise self.refuse(f"node {node.name!r}: attribute {asked!r} is not served; known: {', '.join(ATTRIBUTES)}")
            return
        what = node.target if node.kind == "call_function" else f"method {node.target}"
        op = (FUNCTIONS if node.kind == "call_function" else METHODS).get(node.target)
        if op is None:
            raise self.refuse(f"node {node.name!r}: {what} is not served: {why_refused(node.target)}")
        if node.kind == "call_method" and not (node.args and isinstance(node.args[0], Ref)):
            raise self.refuse(f"node {node.name!r}: {what} without the tensor it is a method of")
        keywords = [key for key, _ in node.kwargs]
        if len(node.args) > len(op.parameters) and not op.spread:
            raise self.refuse(f"node {node.name!r}: {what} takes {', '.join(op.parameters)}; {len(node.args)} arguments were given")
        taken = op.parameters[: len(node.args)]
        for key in keywords:
            if key in op.fixed:
                continue
            if key not in op.parameters or key in taken:
                raise self.refuse(f"node {node.name!r}: {what} is not served with {key!r} here; it takes {', '.join(op.parameters)}")

    def read_output(self, raw: Any) -> tuple[Ref, tuple[tuple[str, Ref], ...]]:
        kind, name, _ = self.read_head(raw)
        args = raw.get("args")
        pair = args[0] if kind == "output" and isinstance(args, list) and len(args) == 1 else None
        if isinstance(pair, dict):
            pair = pair.get("tuple")
        metrics = pair[1].get("dict") if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], dict) else None
        if not isinstance(pair, list) or not isinstance(metrics, dict) or len(metrics) > MAX_METRICS:
            raise self.refuse(f"the last node must be the output (loss, {{metric: tensor}}) with at most {MAX_METRICS} metrics")
        loss = self.read_argument(name, pair[0])
        read = []
        for key, value in metrics.items():
            ref = self.read_argument(name, value)
            if not isinstance(key, str) or not _METRIC_NAME.fullmatch(key) or not isinstance(ref, Ref):
                raise self.refuse(f"metric {str(key)[:80]!r} must be named custom/<name>:sum or custom/<name>:mean and be a tensor")
            read.append((key, ref))
        if not isinstance(loss, Ref):
            raise self.refuse("its loss must be a tensor that the graph computes")
        return loss, tuple(read)

    def depending_on_logprobs(self, nodes: Sequence[Node]) -> set[int]:
        depends = {0}
        for index, node in enumerate(nodes):
            cut = node.target == "detach" or node.target.endswith(".detach") or (node.kind == "getattr" and node.args[1] == "data")
            values = (*node.args, *(value for _, value in node.kwargs))
            if not cut and any(ref.index in depends for ref in _refs(values)):
                depends.add(index)
        return depends


def _refs(values: Sequence[Any]) -> list[Ref]:
    found: list[Ref] = []
    for value in values:
        if isinstance(value, Ref):
            found.append(value)
        elif isinstance(value, Items):
            found += _refs(value.values)
        elif isinstance(value, Slice):
            found += _refs(value.parts)
    return found
