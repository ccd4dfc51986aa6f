"""Reading an uploaded loss graph: what is legal, and that everything else is refused by name. Running it: test_loss_graph_run.py."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptlab.errors import InvalidRequestError
from ptlab.loss_graph import MAX_ARGUMENTS, MAX_NODES, LossGraph, LossInput, Ref

Json = dict[str, Any]

INPUTS: list[Json] = [{"name": "logprobs", "rank": 1}, {"name": "weights", "rank": 1}]
# The request of a real run (docs of the contract, appendix A): -(logprobs * weights).sum()
NODES: list[Json] = [
    {"op": "placeholder", "name": "logprobs", "target": "logprobs", "args": [], "kwargs": {}},
    {"op": "placeholder", "name": "weights", "target": "weights", "args": [], "kwargs": {}},
    {"op": "call_function", "name": "mul", "target": "operator.mul", "args": [{"ref": "logprobs"}, {"ref": "weights"}], "kwargs": {}},
    {"op": "call_method", "name": "sum_1", "target": "sum", "args": [{"ref": "mul"}], "kwargs": {}},
    {"op": "call_function", "name": "neg", "target": "operator.neg", "args": [{"ref": "sum_1"}], "kwargs": {}},
    {
        "op": "output",
        "name": "output",
        "target": "output",
        "args": [{"tuple": [{"ref": "neg"}, {"dict": {"custom/neg_ll:sum": {"ref": "neg"}}}]}],
        "kwargs": {},
    },
]


def parse(nodes: Any = None, inputs: Any = None, **graph: Any) -> LossGraph:
    body = {"format": 1, "nodes": copy.deepcopy(NODES) if nodes is None else nodes} | graph
    return LossGraph.parse(name="neg_ll", inputs=copy.deepcopy(INPUTS) if inputs is None else inputs, graph=body)


def test_the_request_of_a_real_run_is_read() -> None:
    graph = parse()
    assert graph.name == "neg_ll"
    assert graph.inputs == (LossInput("logprobs", 1), LossInput("weights", 1))
    assert [node.target for node in graph.nodes] == ["logprobs", "weights", "operator.mul", "sum", "operator.neg"]
    assert graph.nodes[2].args == (Ref(0), Ref(1))
    assert graph.loss == Ref(4)
    assert graph.metrics == (("custom/neg_ll:sum", Ref(4)),)


def test_a_graph_is_a_value_that_can_cross_a_process_border() -> None:
    nodes = copy.deepcopy(NODES)
    nodes[2]["args"][1] = {"tuple": [{"slice": [None, 3, None]}, {"ellipsis": True}, {"dtype": "float32"}, [1, {"float": "-inf"}]]}
    graph = parse(nodes)
    assert pickle.loads(pickle.dumps(graph)) == graph == parse(nodes) != parse()
    assert hash(graph) == hash(parse(nodes))


def changed(position: int, **fields: Any) -> Callable[[list[Json]], None]:
    def change(nodes: list[Json]) -> None:
        nodes[position] = nodes[position] | fields

    return change


def nested(depth: int) -> Any:
    return [] if depth == 0 else [nested(depth - 1)]


BROKEN: dict[str, tuple[Callable[[list[Json]], None], str]] = {
    "eval": (changed(2, target="builtins.eval"), r"node 'mul': builtins.eval is not served: it is not in the list"),
    "os.system": (changed(2, target="os.system"), r"os.system is not served"),
    "a dunder method": (changed(3, target="__reduce_ex__"), r"method __reduce_ex__ is not served"),
    "a dunder attribute": (
        changed(2, target="getattr", args=[{"ref": "logprobs"}, "__class__"]),
        r"attribute '__class__' is not served; known: shape, ndim",
    ),
    "an attribute of a text": (changed(2, target="getattr", args=["x", "shape"]), r"attribute 'shape' is not served"),
    "a captured tensor": (changed(2, op="get_attr", target="weight"), r"node 'mul' captures a tensor"),
    "a module": (changed(2, op="call_module", target="linear"), r"node 'mul' calls a torch.nn module"),
    "an unknown op": (changed(2, op="exec"), r"op is 'exec'; torch.fx has no such"),
    "a method of nothing": (changed(3, args=[]), r"method sum without the tensor"),
    "a method of a number": (changed(3, args=[3]), r"method sum without the tensor"),
    "too many arguments": (changed(2, args=[1, 2, 3]), r"operator.mul takes a, b; 3 arguments were given"),
    "a keyword twice": (changed(3, args=[{"ref": "mul"}, 0], kwargs={"dim": 0}), r"method sum is not served with 'dim' here"),
    "an unknown keyword": (changed(3, kwargs={"out": {"ref": "mul"}}), r"method sum is not served with 'out' here; it takes input, dim"),
    "a later node": (changed(2, args=[{"ref": "neg"}, 1]), r"node 'mul' refers to 'neg', which is no earlier node"),
    "itself": (changed(2, args=[{"ref": "mul"}, 1]), r"node 'mul' refers to 'mul'"),
    "no such node": (changed(2, args=[{"ref": ["a"]}, 1]), r"refers to \"\['a'\]\""),
    "a huge number": (changed(2, args=[{"ref": "logprobs"}, 10**40]), r"a whole number is beyond"),
    "a long text": (changed(2, args=[{"ref": "logprobs"}, "x" * 65]), r"a text of 65 characters"),
    "a deep list": (changed(2, args=[nested(9)]), r"lists more than 4 deep"),
    "an odd dtype": (changed(2, args=[{"dtype": "complex64"}]), r"'dtype' of 'complex64' is not served; dtypes: float32, float64"),
    "an odd float": (changed(2, args=[{"float": "1.0"}]), r"'float' of '1.0' is not served"),
    "a layout": (changed(2, args=[{"layout": "sparse_coo"}]), r"'layout' of 'sparse_coo' is not served"),
    "two tags": (changed(2, args=[{"ref": "logprobs", "tuple": []}]), r"an argument of an unknown form"),
    "a dict": (changed(2, args=[{"dict": {}}]), r"'dict' of .* is not served"),
    "args that are no list": (changed(2, args={"a": 1}), r"args must be a list"),
    "a name twice": (changed(3, name="mul"), r"node name 'mul' is no identifier, or comes twice"),
    "an odd name": (changed(2, name="mul; import os"), r"node name 'mul; import os' is no identifier"),
    "a placeholder too many": (changed(2, op="placeholder", target="advantages"), r"must begin with the placeholders of its inputs"),
    "another input": (changed(1, target="advantages"), r"node 'weights': the graph must begin with the placeholders of its inputs \(logpr"),
    "a default": (changed(1, args=[1.0]), r"node 'weights': an input takes no default"),
    "a missing placeholder": (changed(1, op="call_function", target="operator.neg"), r"must begin with the placeholders"),
    "an early output": (changed(4, op="output"), r"the output must be the last node"),
    "no output": (lambda nodes: nodes.pop(), r"the last node must be the output"),
    "a number as loss": (changed(5, args=[{"tuple": [1.0, {"dict": {}}]}]), r"its loss must be a tensor that the graph computes"),
    "no metrics": (changed(5, args=[{"ref": "neg"}]), r"the last node must be the output \(loss, \{metric: tensor\}\)"),
    "an odd metric": (changed(5, args=[{"tuple": [{"ref": "neg"}, {"dict": {"loss:sum": {"ref": "neg"}}}]}]), r"metric 'loss:sum' must be"),
    "a number as metric": (changed(5, args=[{"tuple": [{"ref": "neg"}, {"dict": {"custom/a:sum": 1}}]}]), r"'custom/a:sum' must be named"),
    "many metrics": (
        changed(5, args=[{"tuple": [{"ref": "neg"}, {"dict": {f"custom/{i}:sum": {"ref": "neg"} for i in range(65)}}]}]),
        r"at most 64 metrics",
    ),
    "no gradient": (changed(2, args=[{"ref": "weights"}, 2]), r"its loss does not depend on logprobs"),
    "detached": (changed(3, op="call_method", target="detach"), r"its loss does not depend on logprobs \(or only detached"),
    "detached by attribute": (
        changed(3, op="call_function", target="getattr", args=[{"ref": "mul"}, "data"]),
        r"its loss does not depend on logprobs",
    ),
    "a node that is a text": (lambda nodes: nodes.insert(2, "mul"), r"a node must be an object, found str"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_graph_is_refused_by_name(case: str) -> None:
    change, message = BROKEN[case]
    nodes = copy.deepcopy(NODES)
    change(nodes)
    with pytest.raises(InvalidRequestError, match=message) as caught:
        parse(nodes)
    assert str(caught.value).startswith("custom loss 'neg_ll'")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "inputs",
    [
        [],
        [{"name": "weights", "rank": 1}, {"name": "logprobs", "rank": 1}],
        [{"name": "logprobs", "rank": 0}],
        [{"name": "logprobs", "rank": 3}],
        [{"name": "logprobs", "rank": True}],
        [{"name": "logprobs", "rank": 1}, {"name": "logprobs", "rank": 1}],
        [{"name": "logprobs", "rank": 1}, {"name": "Weights", "rank": 1}],
        [{"name": "logprobs"}],
        ["logprobs"],
        [{"name": "logprobs", "rank": 1}, *({"name": f"x{i}", "rank": 1} for i in range(16))],
    ],
)
def test_broken_inputs_are_refused(inputs: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"custom loss 'neg_ll': .*input"):
        parse(inputs=inputs)


@pytest.mark.parametrize(
    "changes", [{"format": 2}, {"format": "1"}, {"format": True}, {"nodes": "neg"}, {"nodes": []}, {"nodes": NODES[:1]}]
)
def test_another_format_is_refused(changes: Json) -> None:
    with pytest.raises(InvalidRequestError, match="its graph must be"):
        parse(**changes)


def test_the_size_of_a_graph_is_bounded() -> None:
    neg = {"op": "call_function", "target": "operator.neg", "args": [{"ref": "logprobs"}]}
    nodes = [*NODES[:2], *(neg | {"name": f"n{i}"} for i in range(MAX_NODES)), *NODES[2:]]
    with pytest.raises(InvalidRequestError, match=f"at most {MAX_NODES} nodes"):
        parse(nodes)
    wide = copy.deepcopy(NODES)
    wide[2]["args"][1] = [1] * MAX_ARGUMENTS
    with pytest.raises(InvalidRequestError, match=f"more than {MAX_ARGUMENTS} arguments"):
        parse(wide)


@pytest.mark.parametrize("name", ["", "x" * 201, None])
def test_an_odd_name_is_refused(name: Any) -> None:
    with pytest.raises(InvalidRequestError, match="its name must be"):
        LossGraph.parse(name=name, inputs=INPUTS, graph={"format": 1, "nodes": NODES})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["ref", "mul", "logprobs", "sum"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["ref", "tuple", "slice", "dict", "dtype", "x"]), inner),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, 5), field=st.sampled_from(["op", "name", "target", "args", "kwargs"]), value=JSON)
def test_whatever_stands_in_a_node_it_is_read_or_refused(position: int, field: str, value: Any) -> None:
    nodes = copy.deepcopy(NODES)
    nodes[position][field] = value
    with contextlib.suppress(InvalidRequestError):
        parse(nodes)
