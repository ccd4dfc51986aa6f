"""ServiceClient: lazy, its clients usable at once, its refusals clear."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from ptlab.client.connection import BackendConnection
from ptlab.client.rest import RestClient
from ptlab.client.sampling import SamplingClient
from ptlab.client.service import ServiceClient
from ptlab.client.training import TrainingClient
from ptlab.errors import InvalidRequestError, NotFoundError
from ptlab.futures import APIFuture
from ptlab.types import AdamOptimizerConfig, AdamParams, DimuonOptimizerConfig, ModelInput, SamplingParams


def test_the_constructor_does_nothing_and_the_first_client_opens_the_session(connection: BackendConnection, backend: Any) -> None:
    service = ServiceClient({"who": "me"}, "project", display_name="run 1", connection=connection)
    assert backend.calls == []
    client = service.create_lora_training_client("base", rank=8, seed=3, train_mlp=False)
    assert client.model_id == "s:train:0"
    client.result(5)
    assert backend.calls[0] == ("create_session", {"user_metadata": {"who": "me"}, "project_id": "project", "display_name": "run 1"})
    lora = backend.calls[1][1]["lora"]
    assert (lora.rank, lora.seed, lora.train_mlp, lora.train_attn, lora.train_unembed) == (8, 3, False, True, True)
    assert service.create_lora_training_client("base").model_id == "s:train:1"


def test_the_project_comes_from_the_environment(connection: BackendConnection, backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_PROJECT_ID", "from env")
    ServiceClient(connection=connection).create_lora_training_client("base").result(5)
    assert backend.calls[0][1]["project_id"] == "from env"


def test_a_created_client_is_the_client_and_a_future_of_it(service: ServiceClient, backend: Any) -> None:
    backend.gates["create_model"] = threading.Event()
    pending = service.create_lora_training_client("base")
    assert isinstance(pending, TrainingClient) and isinstance(pending, APIFuture)
    step = pending.optim_step(AdamParams())  # queued before the model exists
    assert not pending.done() and not step.done()
    backend.gates["create_model"].set()
    client = pending.result(5)
    assert type(client) is TrainingClient and client.model_id == pending.model_id
    assert asyncio.run(pending.coroutine()) is client
    step.result(5)
    client.optim_step(AdamParams()).result(5)  # and both count in one order
    assert backend.ran == [("create_model", 0), ("optim_step", 1), ("optim_step", 2)]


def test_a_sampling_client_is_usable_at_once_too(service: ServiceClient, backend: Any) -> None:
    backend.gates["create_sampling_session"] = threading.Event()
    pending = service.create_sampling_client(base_model="base")
    assert isinstance(pending, SamplingClient) and isinstance(pending, APIFuture)
    sampled = pending.sample(ModelInput.from_ints([1]), 2, SamplingParams())
    assert not sampled.done()
    backend.gates["create_sampling_session"].set()
    assert len(sampled.result(5).sequences) == 2
    assert type(pending.result(5)) is SamplingClient


def test_the_async_twins_give_the_client_itself(service: ServiceClient) -> None:
    async def main() -> list[object]:
        return [
            await service.create_lora_training_client_async("base"),
            await service.create_training_client_from_state_async("tinker://r/weights/a"),
            await service.create_training_client_from_state_with_optimizer_async("tinker://r/weights/a"),
            await service.create_sampling_client_async(base_model="base"),
            await service.create_lora_training_client("base"),
        ]

    clients = asyncio.run(main())
    assert [type(client) for client in clients] == [TrainingClient, TrainingClient, TrainingClient, SamplingClient, TrainingClient]


def test_an_error_of_creation_comes_from_result_and_from_the_first_request(service: ServiceClient, backend: Any) -> None:
    backend.fail["create_model"] = NotFoundError("no base model 'bas'")
    pending = service.create_lora_training_client("bas")
    step = pending.optim_step(AdamParams())
    with pytest.raises(NotFoundError, match="bas"):
        step.result(5)
    with pytest.raises(NotFoundError, match="bas"):
        pending.result(5)
    with pytest.raises(NotFoundError, match="bas"):
        asyncio.run(pending.coroutine())
    backend.fail["create_sampling_session"] = NotFoundError("no base model 'bas'")
    sampler = service.create_sampling_client(base_model="bas")
    with pytest.raises(NotFoundError, match="bas"):
        sampler.sample(ModelInput.from_ints([1]), 1, SamplingParams()).result(5)
    with pytest.raises(NotFoundError, match="bas"):
        sampler.result(5)


def test_from_state_says_whether_the_optimizer_comes_along(service: ServiceClient, backend: Any) -> None:
    service.create_training_client_from_state("tinker://r/weights/a", "base", {"k": "v"}, optimizer=AdamOptimizerConfig()).result(5)
    service.create_training_client_from_state_with_optimizer(path="tinker://r/weights/a").result(5)
    asked = [arguments for name, arguments in backend.calls if name == "create_model_from_state"]
    assert [a["with_optimizer"] for a in asked] == [False, True]
    assert asked[0]["base_model"] == "base" and asked[0]["user_metadata"] == {"k": "v"} and asked[0]["path"] == "tinker://r/weights/a"


def test_requests_without_meaning_are_refused_before_anything_is_sent(service: ServiceClient, backend: Any) -> None:
    with pytest.raises(ValueError, match="both are None"):
        service.create_sampling_client()
    with pytest.raises(ValueError, match="tinker://"):
        service.create_sampling_client(model_path="/tmp/adapter")
    with pytest.raises(ValueError, match="tinker://"):
        service.create_training_client_from_state("weights/a")
    with pytest.raises(ValueError, match="nothing to train"):
        service.create_lora_training_client("base", train_mlp=False, train_attn=False, train_unembed=False)
    with pytest.raises(InvalidRequestError, match="AdamW only"):
        service.create_lora_training_client("base", optimizer=DimuonOptimizerConfig())
    with pytest.raises(InvalidRequestError, match="access_token"):
        service.create_training_client_from_state("tinker://r/weights/a", weights_access_token="t")
    with pytest.raises(InvalidRequestError, match="forward_backward_custom"):
        service.create_custom_loss(lambda logprobs: logprobs, {"logprobs": 1})
    assert backend.calls == []


def test_a_remote_address_unknown_arguments_and_a_missing_backend_are_named() -> None:
    with pytest.raises(InvalidRequestError, match="official SDK"):
        ServiceClient(base_url="http://localhost:8000")
    with pytest.warns(FutureWarning, match="max_retries"):
        service = ServiceClient(max_retries=3, api_key="tml-x")
    with pytest.raises(InvalidRequestError, match=r"ptlab.ServiceClient"):
        service.create_sampling_client(base_model="base")


def test_close_tells_the_first_status_and_ends_the_client(service: ServiceClient, backend: Any) -> None:
    service.create_lora_training_client("base").result(5)
    service.close("success", "done").result(5)
    service.close("errored").result(5)
    assert [a for n, a in backend.calls if n == "finish_session"] == [{"session_id": "s", "status": "success", "detail": "done"}]
    with pytest.raises(InvalidRequestError, match="closed"):
        service.create_lora_training_client("base")


@pytest.mark.parametrize(("error", "status"), [(None, "success"), (ValueError("x"), "errored"), (KeyboardInterrupt(), "interrupted")])
def test_the_context_manager_closes_with_how_it_ended(
    connection: BackendConnection, backend: Any, error: BaseException | None, status: str
) -> None:
    def use() -> None:
        with ServiceClient(connection=connection) as service:
            service.create_lora_training_client("base").result(5)
            if error is not None:
                raise error

    if error is None:
        use()
    else:
        with pytest.raises(type(error)):
            use()
    assert [a["status"] for n, a in backend.calls if n == "finish_session"] == [status]


def test_closing_a_client_that_did_nothing_opens_nothing(backend: Any) -> None:
    with ServiceClient():  # has no backend at all
        pass
    assert backend.calls == []


def test_rest_client_and_capabilities_come_from_the_service(service: ServiceClient) -> None:
    assert isinstance(service.create_rest_client(), RestClient)
