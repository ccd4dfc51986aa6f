"""Running a loss graph on a datum: the outcome and its bounds. The operations one by one: test_loss_ops.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ptlab.errors import InvalidRequestError
from ptlab.loss_graph import LossGraph
from ptlab.loss_graph_run import run_graph

Json = dict[str, Any]


def graph_of(*nodes: tuple[str, str, list[Any]], loss: str, metrics: Json | None = None, rank: int = 1) -> LossGraph:
    """Nodes as (name, target, args); a target without a dot is a method."""
    listed: list[Json] = [{"op": "placeholder", "name": "logprobs", "target": "logprobs"}]
    for name, target, args in nodes:
        listed.append({"op": "call_function" if "." in target else "call_method", "name": name, "target": target, "args": args})
    listed.append({"op": "output", "name": "output", "target": "output", "args": [{"tuple": [{"ref": loss}, {"dict": metrics or {}}]}]})
    return LossGraph.parse(name="mine", inputs=[{"name": "logprobs", "rank": rank}], graph={"format": 1, "nodes": listed})


LP = {"ref": "logprobs"}
SUM = ("total", "sum", [LP])


def test_value_gradient_and_metrics_of_a_loss_found_by_hand() -> None:
    graph = graph_of(
        ("square", "operator.pow", [LP, 2]),
        ("total", "sum", [{"ref": "square"}]),
        ("mean", "mean", [LP]),
        loss="total",
        metrics={"custom/total:sum": {"ref": "total"}, "custom/lp:mean": {"ref": "mean"}},
    )
    logprobs = torch.tensor([-1.0, -3.0], requires_grad=True)
    loss, metrics = run_graph(graph, logprobs, {})
    loss.backward()
    assert loss.item() == 10.0 and loss.dtype == torch.float32 and loss.shape == ()
    assert logprobs.grad is not None and logprobs.grad.tolist() == [-2.0, -6.0]
    assert {key: value.item() for key, value in metrics.items()} == {"custom/total:sum": 10.0, "custom/lp:mean": -2.0}
    assert not any(value.requires_grad for value in metrics.values())


def test_a_double_loss_is_given_back_as_float() -> None:
    loss, _ = run_graph(graph_of(("wide", "double", [LP]), ("total", "sum", [{"ref": "wide"}]), loss="total"), torch.tensor([-0.5]), {})
    assert loss.dtype == torch.float32 and loss.item() == -0.5


@pytest.mark.parametrize(
    ("graph", "logprobs", "message"),
    [
        (graph_of(("minus", "neg", [LP]), loss="minus"), [-1.0, -2.0], r"'mine' returned torch.float32 of shape \[2\]; .*\(sum it\)"),
        (graph_of(("which", "argmax", [LP]), loss="which"), [-1.0, -2.0], r"returned torch.int64 of shape \[\]"),
        (graph_of(("size", "size", [LP]), loss="size"), [-1.0], r"returned tuple; its loss must be one floating-point number"),
        (graph_of(SUM, loss="total"), [-float("inf")], r"custom loss 'mine' is -inf for a datum; look for"),
        (
            graph_of(SUM, loss="total", metrics={"custom/a:sum": LP}),
            [-1.0, -1.0],
            r"metric 'custom/a:sum' must be a tensor with one number",
        ),
        (
            graph_of(("rank", "dim", [LP]), ("total", "operator.mul", [{"ref": "rank"}, {"ref": "logprobs"}]), loss="total"),
            [[-1.0]],
            r"returned torch.float32 of shape \[1, 1\]",
        ),
    ],
)
def test_an_outcome_that_cannot_train_is_refused(graph: LossGraph, logprobs: list[Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        run_graph(graph, torch.tensor(logprobs), {})


def test_a_loss_cut_off_from_its_gradient_is_refused_only_where_a_gradient_is_asked_for() -> None:
    sign = graph_of(("up", "operator.gt", [LP, -1.0]), ("f", "float", [{"ref": "up"}]), ("total", "sum", [{"ref": "f"}]), loss="total")
    with pytest.raises(InvalidRequestError, match="has no gradient"):
        run_graph(sign, torch.tensor([-0.5], requires_grad=True), {})
    assert run_graph(sign, torch.tensor([-0.5]), {})[0].item() == 1.0
    with torch.no_grad():
        assert run_graph(sign, torch.tensor([-0.5], requires_grad=True), {})[0].item() == 1.0


def test_work_is_bounded_in_proportion_to_the_input() -> None:
    pairs = [("column", "unsqueeze", [LP, 1]), ("pairs", "operator.sub", [LP, {"ref": "column"}])]  # [T, T]
    total = ("total", "sum", [{"ref": "pairs"}])
    graph = graph_of(*pairs, total, loss="total")
    run_graph(graph, torch.zeros(2000), {})
    with pytest.raises(InvalidRequestError, match=r"node 'pairs' \(operator.sub\): the graph would compute more than \d+ elements"):
        run_graph(graph, torch.zeros(20_000), {})


def test_a_loss_of_many_plain_operations_on_a_long_datum_is_within_the_bounds() -> None:
    nodes = [(f"n{i}", "operator.mul", [{"ref": f"n{i - 1}" if i else "logprobs"}, 1.0]) for i in range(900)]
    loss, _ = run_graph(graph_of(*nodes, ("total", "sum", [{"ref": "n899"}]), loss="total"), torch.full((32_768,), -1.0), {})
    assert loss.item() == -32_768.0
