"""The loss `custom`: an uploaded graph as a loss of a call. Its operations against the SDK's tracer: test_loss_ops.py."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ptlab.errors import InvalidRequestError
from ptlab.losses import LossCall, LossGraph, check_datum, loss_inputs, loss_metrics, loss_sum, resolve_loss
from ptlab.types import Datum, ModelInput, TensorData

INF, NAN = math.inf, math.nan


def make_datum(tokens: list[int] | None = None, **changes: Any) -> Datum:
    fields = {"target_tokens": [0, 0, 7, 9], "weights": [0.0, 0.0, 1.0, 1.0]} | changes
    return Datum(ModelInput.from_ints([3, 4, 5, 6] if tokens is None else tokens), {k: v for k, v in fields.items() if v is not None})


def sum_and_gradient(loss: LossCall, logprobs: list[Tensor], inputs: list[dict[str, Tensor]]) -> tuple[Tensor, list[Tensor]]:
    leaves = [lp.clone().requires_grad_() for lp in logprobs]
    total = loss_sum(loss, leaves, inputs)
    return total.detach(), list(torch.autograd.grad(total, leaves))


def custom(*nodes: tuple[str, str, list[Any]], rank: int = 1, reads: dict[str, int] | None = None) -> LossCall:
    """A call of a graph whose last node is the loss; it reports itself as custom/loss:sum and custom/loss:mean."""
    inputs = [{"name": name, "rank": r} for name, r in {"logprobs": rank, **(reads or {})}.items()]
    listed: list[dict[str, Any]] = [{"op": "placeholder", "name": item["name"], "target": item["name"]} for item in inputs]
    for name, target, args in nodes:
        listed.append({"op": "call_function" if "." in target else "call_method", "name": name, "target": target, "args": args})
    last = {"ref": nodes[-1][0]}
    metrics = {"dict": {"custom/loss:sum": last, "custom/loss:mean": last}}
    listed.append({"op": "output", "name": "output", "target": "output", "args": [{"tuple": [last, metrics]}]})
    return resolve_loss("custom", {"loss_id": "x"}, graph=LossGraph.parse(name="mine", inputs=inputs, graph={"format": 1, "nodes": listed}))


LP, W = {"ref": "logprobs"}, {"ref": "weights"}
WEIGHTED_NLL = custom(
    ("m", "operator.mul", [LP, W]), ("s", "sum", [{"ref": "m"}]), ("n", "operator.neg", [{"ref": "s"}]), reads={"weights": 1}
)


def test_a_custom_call_can_cross_a_process_border() -> None:
    assert pickle.loads(pickle.dumps(WEIGHTED_NLL)) == copy.deepcopy(WEIGHTED_NLL) == WEIGHTED_NLL
    assert WEIGHTED_NLL.config == {}


def test_a_custom_loss_equals_its_built_in_twin() -> None:
    built_in = resolve_loss("cross_entropy")
    data = [make_datum(), make_datum(weights=[0.5, -2.0, 0.0, 3.0])]
    for index, datum in enumerate(data):
        check_datum(datum, WEIGHTED_NLL, index=index, vocab_size=10, max_tokens=6)
    logprobs = [torch.tensor([-3.0, -1.0, -0.6, -0.2]), torch.tensor([-0.1, -2.0, -INF, -0.7])]
    logprobs[1][2] = -1e30
    inputs = [loss_inputs(datum, WEIGHTED_NLL) for datum in data]
    total, gradients = sum_and_gradient(WEIGHTED_NLL, logprobs, inputs)
    expected, expected_gradients = sum_and_gradient(built_in, logprobs, inputs)
    assert total.item() == expected.item()
    assert [g.tolist() for g in gradients] == [g.tolist() for g in expected_gradients]
    metrics = loss_metrics(WEIGHTED_NLL, logprobs, inputs)
    assert metrics == pytest.approx({"loss:sum": total.item(), "custom/loss:sum": total.item(), "custom/loss:mean": total.item() / 2})


def test_an_impossible_token_that_a_custom_loss_leaves_out_is_exactly_zero() -> None:
    call = custom(
        ("mask", "operator.gt", [LP, -100.0]), ("part", "operator.getitem", [LP, {"ref": "mask"}]), ("s", "sum", [{"ref": "part"}])
    )
    total, [gradient] = sum_and_gradient(call, [torch.tensor([-INF, -1.0])], [{}])
    assert total.item() == -1.0 and gradient.tolist() == [0.0, 1.0]


def test_the_gradient_of_a_custom_loss_reaches_what_made_the_logprobs() -> None:
    logits = torch.tensor([[1.0, 2.0], [0.5, -0.5]], requires_grad=True)
    call = custom(("sq", "operator.pow", [LP, 2]), ("s", "sum", [{"ref": "sq"}]))
    (gradient,) = torch.autograd.grad(3 * loss_sum(call, [logits.log_softmax(-1)[:, 0]], [{}]), logits)
    (expected,) = torch.autograd.grad(3 * logits.log_softmax(-1)[:, 0].square().sum(), logits)
    torch.testing.assert_close(gradient, expected)


def test_a_custom_loss_without_gradients_asked_for_is_only_computed() -> None:
    call = custom(("s", "sum", [LP]))
    with torch.no_grad():
        assert loss_sum(call, [torch.tensor([-1.0], requires_grad=True)], [{}]).item() == -1.0
    assert not loss_sum(call, [torch.tensor([-1.0])], [{}]).requires_grad


def test_a_gradient_that_is_not_finite_is_the_clients_error() -> None:
    call = custom(("shift", "operator.add", [LP, 1.0]), ("root", "sqrt", [{"ref": "shift"}]), ("s", "sum", [{"ref": "root"}]))
    with pytest.raises(InvalidRequestError, match=r"custom loss 'mine': its gradient is not finite although the loss is"):
        loss_sum(call, [torch.tensor([-1.0], requires_grad=True)], [{}])


def test_the_inputs_of_a_custom_loss_keep_their_dtype_and_others_are_not_read() -> None:
    call = custom(("s", "sum", [LP]), reads={"groups": 1, "scale": 0})
    extra = {"groups": np.array([0, 0, 1, 1]), "scale": TensorData([2.0], "float32", []), "unused": np.array([NAN])}
    datum = make_datum(**extra)
    check_datum(datum, call, index=3, vocab_size=10, max_tokens=6)
    inputs = loss_inputs(datum, call)
    assert {name: (tensor.dtype, list(tensor.shape)) for name, tensor in inputs.items()} == {
        "target_tokens": (torch.int64, [4]),
        "groups": (torch.int64, [4]),
        "scale": (torch.float32, []),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": None}, r"datum 3: input 'weights' is missing; custom loss 'mine' reads it; given: target_tokens"),
        ({"target_tokens": None}, r"datum 3: input 'target_tokens' is missing"),
        ({"weights": np.ones((4, 1))}, r"datum 3: 'weights' has shape \[4, 1\]; custom loss 'mine' was made for rank 1"),
        ({"target_tokens": [[7]] * 4}, r"'target_tokens' has shape \[4, 1\]; .* rank 1"),
        ({"target_tokens": [7, 8]}, r"'target_tokens' has shape \[2\]; it needs \[4\] or \[4, K\]"),
        ({"target_tokens": [0, 0, 7, 10]}, r"'target_tokens' is 10 at position 3"),
        ({"weights": np.ones(4 * 1024 + 1)}, r"'weights' has shape \[4097\]; for 4 tokens .* at most 4096 cells"),
        ({"tokens": [3, 4, 5, 99]}, r"model_input has the token id 99"),
    ],
)
def test_check_refuses_what_a_custom_loss_cannot_read(changes: dict[str, Any], message: str) -> None:
    datum = make_datum(**changes)
    with pytest.raises(InvalidRequestError, match=message):
        check_datum(datum, WEIGHTED_NLL, index=3, vocab_size=10, max_tokens=6)


def test_a_sparse_claim_of_a_custom_input_is_refused_before_it_is_made_dense() -> None:
    call = custom(("s", "sum", [LP]), reads={"weights": 2})
    datum = make_datum(weights=TensorData([1.0], "float32", [4, 10**13], [0, 1, 1, 1, 1], [0]))
    with pytest.raises(InvalidRequestError, match=r"at most 4096 cells"):
        check_datum(datum, call, index=3, vocab_size=10, max_tokens=6)


def test_a_custom_loss_of_k_targets_sees_them_all() -> None:
    call = custom(("s", "sum", [LP]), rank=2)
    datum = make_datum(target_tokens=[[1, 2]] * 4, weights=None)
    check_datum(datum, call, index=3, vocab_size=10, max_tokens=6)
    total, [gradient] = sum_and_gradient(call, [torch.full((4, 2), -0.5)], [loss_inputs(datum, call)])
    assert total.item() == -4.0 and gradient.tolist() == [[1.0, 1.0]] * 4
