"""forward_backward_custom: the gradient that arrives is that of the caller's loss; order and poison."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ptlab.client.service import ServiceClient
from ptlab.client.training import TrainingClient
from ptlab.errors import EngineError
from ptlab.types import AdamParams, Datum, TensorData

MakeDatum = Callable[..., Datum]


@pytest.fixture
def client(service: ServiceClient) -> TrainingClient:
    return service.create_lora_training_client("base")


def square(data: list[Datum], logprobs_list: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """Weighed by an input that only the client reads, and not linear in the log-probabilities."""
    parts = [
        (datum.loss_fn_inputs["advantages"].to_torch() * logprobs**2).sum() for datum, logprobs in zip(data, logprobs_list, strict=True)
    ]
    return torch.stack(parts).sum(), {"mine": 4.0}


@pytest.mark.parametrize(
    ("targets", "advantages"),
    [([1, 2, 3], [1.0, -2.0, 0.5]), ([[1, 2], [3, 4], [0, 0]], [[1.0, -2.0], [0.5, 0.0], [0.0, 3.0]])],
    ids=["N", "N x K"],
)
def test_the_gradient_is_that_of_the_loss(
    client: TrainingClient, backend: Any, make_datum: MakeDatum, targets: Any, advantages: Any
) -> None:
    data = [make_datum(targets, advantages=advantages), make_datum(targets, advantages=advantages)]
    output = client.forward_backward_custom(data, square).result(5)
    theta = torch.tensor(backend.theta, dtype=torch.float64, requires_grad=True)
    logprobs = -theta * (torch.tensor(targets, dtype=torch.float64) + 1) / 10
    loss = 2 * (torch.tensor(advantages, dtype=torch.float64) * logprobs**2).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert theta.grad is not None
    assert backend.gradient == pytest.approx(theta.grad.item(), rel=1e-5)
    assert output.metrics["loss:sum"] == pytest.approx(loss.item(), rel=1e-5)
    assert output.metrics["mine"] == 4.0 and output.metrics["clock:mean"] == 1.0
    assert "surrogate_loss:sum" in output.metrics and output.metrics["surrogate_loss:sum"] != output.metrics["loss:sum"]
    assert list(output.loss_fn_outputs[0]["logprobs"].to_numpy().shape) == list(torch.tensor(targets).shape)


def test_only_targets_and_weights_are_sent_and_the_loss_sees_the_callers_own_datums(
    client: TrainingClient, backend: Any, make_datum: MakeDatum
) -> None:
    datum = make_datum([1, 2], advantages=[1.0, 1.0], weights=[5.0, 5.0])
    seen: list[Datum] = []

    def loss_fn(data: list[Datum], logprobs_list: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        seen.extend(data)
        assert all(logprobs.requires_grad and logprobs.is_leaf for logprobs in logprobs_list)
        return -logprobs_list[0].sum(), {}

    client.forward_backward_custom([datum], loss_fn, loss_type_input="logprobs").result(5)
    assert seen == [datum]
    (forward,) = (a for n, a in backend.calls if n == "forward")
    (backward,) = (a for n, a in backend.calls if n == "forward_backward")
    assert forward["loss_fn"] == backward["loss_fn"] == "cross_entropy"
    assert forward["data"][0].loss_fn_inputs["weights"].tolist() == [5.0, 5.0]
    assert set(backward["data"][0].loss_fn_inputs) == {"target_tokens", "weights"}
    assert backward["data"][0].loss_fn_inputs["weights"].tolist() == [1.0, 1.0]  # -d(-sum)/dlogprob, the datum's 5.0 plays no part


def test_sparse_targets_get_weights_of_their_dense_shape(client: TrainingClient, backend: Any) -> None:
    from ptlab.types import ModelInput

    sparse = TensorData.from_torch_sparse(torch.tensor([[0] * 9 + [4], [0] * 10]))
    assert sparse.sparse_crow_indices is not None
    datum = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": sparse})
    client.forward_backward_custom([datum], lambda data, logprobs: (logprobs[0].sum(), {})).result(5)
    assert backend.calls[-1][1]["data"][0].loss_fn_inputs["weights"].tolist() == [[-1.0] * 10] * 2


def test_it_returns_at_once_and_holds_its_place_before_later_requests(client: TrainingClient, backend: Any, make_datum: MakeDatum) -> None:
    thinking, threads = threading.Event(), []

    def slow(data: list[Datum], logprobs_list: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        threads.append(threading.current_thread().name)
        assert thinking.wait(5)
        return logprobs_list[0].sum(), {}

    trained = client.forward_backward_custom([make_datum()], slow)
    updated = client.optim_step(AdamParams())
    another = client.forward_backward_custom([make_datum()], lambda data, logprobs: (logprobs[0].sum(), {}))
    time.sleep(0.03)
    assert not trained.done() and not updated.done()
    thinking.set()
    another.result(5)
    assert backend.ran[1:] == [
        ("forward", 1),
        ("forward_backward", 2),
        ("optim_step", 3),
        ("forward", 4),
        ("forward_backward", 5),
    ]
    assert threads == ["ptlab-custom-loss"]  # neither the caller's thread nor the backend's


def test_both_styles(client: TrainingClient, make_datum: MakeDatum) -> None:
    async def main() -> None:
        future = await client.forward_backward_custom_async([make_datum()], lambda data, logprobs: (logprobs[0].sum(), {}))
        assert (await future).metrics["loss:sum"] == pytest.approx(-1.8)  # -2 * (2 + 3 + 4) / 10

    asyncio.run(main())


def _fails(data: list[Datum], logprobs_list: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    raise KeyError("margin")


def _exits(data: list[Datum], logprobs_list: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    raise SystemExit(3)


@pytest.mark.parametrize(
    ("loss_fn", "error", "message"),
    [
        (_fails, KeyError, "margin"),
        (_exits, RuntimeError, "SystemExit"),
        (lambda data, logprobs: (logprobs[0].sum() * float("nan"), {}), ValueError, "loss is nan"),
        (lambda data, logprobs: ((logprobs[0] - logprobs[0]).sqrt().sum() + logprobs[1].sum(), {}), ValueError, "datum 0: the gradient"),
        (lambda data, logprobs: (logprobs[0].sum(), {}), ValueError, "datum 1: .* no gradient"),
        (lambda data, logprobs: (torch.tensor(1.0), {}), ValueError, "no gradient"),
        (lambda data, logprobs: (logprobs[0], {}), ValueError, "one number"),
        (lambda data, logprobs: logprobs[0].sum(), ValueError, "must return"),
    ],
    ids=["raises", "exits", "nan", "nan gradient", "unused datum", "detached", "vector", "no metrics"],
)
def test_a_bad_loss_fails_loudly_and_nothing_after_it_runs(
    client: TrainingClient, backend: Any, make_datum: MakeDatum, loss_fn: Any, error: type[Exception], message: str
) -> None:
    backend.gates["forward"] = threading.Event()
    trained = client.forward_backward_custom([make_datum(), make_datum()], loss_fn)
    queued = client.optim_step(AdamParams())
    sampler = client.save_weights_and_get_sampling_client()
    backend.gates["forward"].set()
    with pytest.raises(error, match=message):
        trained.result(5)
    for later in (queued, sampler):
        with pytest.raises(RuntimeError, match="custom loss of this TrainingClient failed"):
            later.result(5)
    with pytest.raises(RuntimeError, match="create_training_client_from_state"):
        client.optim_step(AdamParams())
    assert backend.ran[1:] == [("forward", 1)] and backend.gradient == 0.0


def test_a_failing_pass_poisons_too(client: TrainingClient, backend: Any, make_datum: MakeDatum) -> None:
    backend.fail["forward"] = EngineError("out of memory")
    trained = client.forward_backward_custom([make_datum()], _fails)
    with pytest.raises(EngineError):
        trained.result(5)
    with pytest.raises(RuntimeError, match="out of memory"):
        client.optim_step(AdamParams())


def test_missing_targets_and_unknown_inputs_are_refused_at_the_call(client: TrainingClient, make_datum: MakeDatum) -> None:
    from ptlab.types import ModelInput

    with pytest.raises(ValueError, match="datum 0: no 'target_tokens'"):
        client.forward_backward_custom([Datum(ModelInput.from_ints([1]), {})], square)
    with pytest.raises(ValueError, match="'logprobs'"):
        client.forward_backward_custom([make_datum()], square, loss_type_input="logits")  # type: ignore[arg-type]
    client.optim_step(AdamParams()).result(5)  # not poisoned: nothing was queued
