"""The whole face, driven by the real SDK."""

from __future__ import annotations

import asyncio
import gc
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tinker
from tinker import types

BASE = "scripted/unigram"
KEY = "tml-anything"
# the SDK leaves connections of its own open
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
SUM_EXP = sum(math.exp(v / 10) for v in range(8))


@pytest.fixture(autouse=True)
def _sdk_leftovers() -> Iterator[None]:
    """Collected here, where the warnings about them are ignored, and not in somebody else's test."""
    yield
    gc.collect()


@pytest.fixture
def service(server: Any) -> Iterator[tinker.ServiceClient]:
    client = tinker.ServiceClient(base_url=server.url, api_key=KEY, user_metadata={"who": "test"}, display_name="a test")
    yield client
    client.close("success").result()


def datum(*targets: int) -> types.Datum:
    inputs = {"target_tokens": list(targets), "weights": [1.0] * len(targets)}
    return types.Datum(model_input=types.ModelInput.from_ints([1] * len(targets)), loss_fn_inputs=inputs)


def logprob(token: int) -> float:
    """Of the untrained unigram model: log softmax of 0, 0.1, 0.2 ..."""
    return token / 10 - math.log(SUM_EXP)


def test_training_through_the_sdk_moves_the_loss(service: tinker.ServiceClient) -> None:
    model = service.create_lora_training_client(BASE, rank=4, train_unembed=False, user_metadata={"run": "1"}).result()
    assert model.get_info().model_data.model_name == BASE
    before = model.forward([datum(2, 3)], "cross_entropy")
    first, step = model.forward_backward([datum(2, 3)], "cross_entropy"), model.optim_step(types.AdamParams(learning_rate=0.1))
    second = model.forward([datum(2, 3)], "cross_entropy").result()
    assert before.result().metrics["loss:sum"] == pytest.approx(-logprob(2) - logprob(3), rel=1e-6)
    assert first.result().metrics["loss:sum"] == pytest.approx(before.result().metrics["loss:sum"], rel=1e-7)
    assert step.result().metrics is not None
    assert second.metrics["loss:sum"] < first.result().metrics["loss:sum"] - 0.1
    logprobs = first.result().loss_fn_outputs[0]["logprobs"].to_numpy()
    assert logprobs.tolist() == pytest.approx([logprob(2), logprob(3)], rel=1e-6)


def test_custom_losses_run_on_the_client_and_from_the_server(service: tinker.ServiceClient) -> None:
    model = service.create_lora_training_client(BASE, rank=4).result()

    def by_client(data: list[types.Datum], logprobs: list[Any]) -> Any:
        loss = sum((-2 * value).sum() for value in logprobs)
        return loss, {"mine": 1.0}

    output = model.forward_backward_custom([datum(2, 3)], by_client).result()
    assert output.metrics["loss:sum"] == pytest.approx(2 * (-logprob(2) - logprob(3)), rel=1e-6)


def test_an_uploaded_loss_gives_what_it_would_give_here(service: tinker.ServiceClient) -> None:
    def twice(logprobs: Any, weights: Any) -> Any:
        loss = -(logprobs * weights * 2.0).sum()
        return loss, {"custom/twice:sum": loss}

    handle = service.create_custom_loss(twice, {"logprobs": 1, "weights": 1}).result()
    model = service.create_lora_training_client(BASE, rank=4).result()
    output = model.forward_backward_custom([datum(2, 3)], handle).result()
    assert output.metrics["loss:sum"] == pytest.approx(2 * (-logprob(2) - logprob(3)), rel=1e-6)


def test_samples_and_scores_come_from_the_published_weights(service: tinker.ServiceClient) -> None:
    model = service.create_lora_training_client(BASE, rank=4).result()
    prompt = types.ModelInput.from_ints([1, 2, 3])
    base = service.create_sampling_client(base_model=BASE).result()
    assert base.compute_logprobs(prompt).result() == [None, pytest.approx(logprob(2), rel=1e-6), pytest.approx(logprob(3), rel=1e-6)]
    model.forward_backward([datum(3, 3)], "cross_entropy")
    model.optim_step(types.AdamParams(learning_rate=1.0))
    snapshot = model.save_weights_and_get_sampling_client().result()
    named = service.create_sampling_client(model_path=model.save_weights_for_sampler("named").result().path).result()
    trained = snapshot.compute_logprobs(prompt).result()
    assert trained[2] > logprob(3) + 0.3
    assert named.compute_logprobs(prompt).result() == trained
    drawn = named.sample(prompt, 3, types.SamplingParams(max_tokens=5, seed=1)).result()
    again = snapshot.sample(prompt, 3, types.SamplingParams(max_tokens=5, seed=1)).result()
    assert [s.tokens for s in drawn.sequences] == [s.tokens for s in again.sequences]
    assert len({s.sequence_id for s in [*drawn.sequences, *again.sequences]}) == 6
    assert named.get_base_model() == BASE


def test_many_samples_at_once(service: tinker.ServiceClient) -> None:
    sampler = service.create_sampling_client(base_model=BASE).result()
    prompts = [types.ModelInput.from_ints([1] * (1 + i % 3)) for i in range(200)]
    futures = [sampler.sample(p, 1, types.SamplingParams(max_tokens=3, seed=i)) for i, p in enumerate(prompts)]
    assert all(len(f.result().sequences[0].tokens) == 3 for f in futures)


def test_state_is_loaded_with_and_without_the_optimizer(service: tinker.ServiceClient) -> None:
    model = service.create_lora_training_client(BASE, rank=4).result()
    model.forward_backward([datum(2, 3)], "cross_entropy")
    model.optim_step(types.AdamParams(learning_rate=0.5))
    path = model.save_state("step1", ttl_seconds=7200).result().path

    def next_loss(client: tinker.TrainingClient) -> float:
        client.forward_backward([datum(2, 3)], "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=0.5))
        return float(client.forward([datum(2, 3)], "cross_entropy").result().metrics["loss:sum"])

    unbroken = next_loss(model)
    resumed = service.create_training_client_from_state_with_optimizer(path).result()
    fresh = service.create_training_client_from_state(path).result()
    assert next_loss(resumed) == unbroken
    assert next_loss(fresh) != unbroken
    assert resumed.get_info().lora_rank == 4


def test_a_failed_request_is_told_and_the_next_one_runs(service: tinker.ServiceClient) -> None:
    model = service.create_lora_training_client(BASE, rank=4).result()
    with pytest.raises(tinker.RequestFailedError, match="unknown loss 'nope'") as failure:
        model.forward_backward([datum(2, 3)], "nope").result()
    assert failure.value.category == "user"
    assert model.forward([datum(2, 3)], "cross_entropy").result().metrics["tokens:sum"] == 2
    model.save_state("taken").result()
    with pytest.raises(tinker.RequestFailedError, match="exists already"):
        model.save_state("taken").result()
    with pytest.raises(tinker.RequestFailedError, match="not served here"):
        service.create_lora_training_client("no/such-model", rank=4).result()
    with pytest.raises(tinker.NotFoundError):
        service.create_sampling_client(model_path="tinker://gone:train:0/sampler_weights/x").result()


def test_every_rest_method_that_means_something_here(server: Any, service: tinker.ServiceClient) -> None:
    model = service.create_lora_training_client(BASE, rank=4, user_metadata={"run": "rest"}).result()
    saved, external = model.save_state("s").result().path, model.save_weights_external("e").result().path
    sampler = service.create_sampling_client(model_path=model.save_weights_for_sampler("w").result().path).result()
    rest = tinker.RestClient(base_url=server.url, api_key=KEY)
    assert BASE in [m.model_name for m in rest.get_server_capabilities().result().supported_models]
    run = rest.get_training_run_by_tinker_path(saved).result()
    assert (run.training_run_id, run.user_metadata, run.lora_rank) == (model.model_id, {"run": "rest"}, 4)
    assert model.model_id in [r.training_run_id for r in rest.list_training_runs(limit=1000).result().training_runs]
    assert {c.checkpoint_id for c in rest.list_checkpoints(model.model_id).result().checkpoints} == {
        "weights/s", "external_weights/e", "sampler_weights/w",
    }  # fmt: skip
    assert rest.list_user_checkpoints(limit=1).result().cursor.total_count >= 3
    rest.publish_checkpoint_from_tinker_path(saved).result()
    assert [c.public for c in rest.list_checkpoints(model.model_id).result().checkpoints if c.checkpoint_id == "weights/s"] == [True]
    rest.unpublish_checkpoint_from_tinker_path(saved).result()
    rest.set_checkpoint_ttl_from_tinker_path(saved, 7200).result()
    info = rest.get_weights_info_by_tinker_path(saved).result()
    assert (info.base_model, info.lora_rank, info.train_mlp) == (BASE, 4, True)
    copy = rest.copy_weights(saved, destination_project_id="any").result()
    assert copy != saved and rest.get_weights_info_by_tinker_path(copy).result() == info
    urls = rest.get_external_weights_urls(external).result().urls
    assert list(urls) == ["adapter_model.safetensors"]
    rest.delete_checkpoint_from_tinker_path(saved).result()
    with pytest.raises(tinker.NotFoundError):
        rest.get_weights_info_by_tinker_path(saved).result()
    session_id = service.holder.get_session_id()
    session = rest.get_session(session_id).result()
    assert (session.training_run_ids, session.display_name, session.user_metadata) == ([model.model_id], "a test", {"who": "test"})
    assert session_id in rest.list_sessions(limit=1000).result().sessions
    assert rest.get_sampler(session.sampler_ids[0]).result().model_path.endswith("sampler_weights/w")
    with pytest.warns(tinker.ExperimentalWarning):
        found = rest.search_sessions(types.SessionSearchRequest(display_name="TEST", session_id=session_id)).result()
    assert session_id in [s.session_id for s in found.sessions]
    assert rest.export_session_trace(session_id).result().startswith(server.url)
    for refused in (rest.assign_session_project(session_id, "p"), tinker.AdminClient(base_url=server.url, api_key=KEY).get_audit_log()):
        with pytest.raises(tinker.BadRequestError):
            refused.result()
    assert sampler.get_base_model() == BASE


def test_a_pickled_sampling_client_goes_on_with_numbers_of_its_own(
    service: tinker.ServiceClient, monkeypatch: pytest.MonkeyPatch, server: Any
) -> None:
    monkeypatch.setenv("TINKER_BASE_URL", server.url)
    sampler = service.create_sampling_client(base_model=BASE).result()
    clones = [pickle.loads(pickle.dumps(sampler)) for _ in range(2)]
    prompt, params = types.ModelInput.from_ints([1]), types.SamplingParams(max_tokens=2)
    responses = [client.sample(prompt, 1, params).result() for client in (sampler, *clones)]
    assert len({response.sequences[0].sequence_id for response in responses}) == 3


def test_the_async_face(server: Any) -> None:
    async def main() -> float:
        client = tinker.ServiceClient(base_url=server.url, api_key=KEY)
        model = await client.create_lora_training_client(BASE, rank=4)
        output = await model.forward_backward([datum(2)], "cross_entropy")
        await model.optim_step(types.AdamParams())
        sampler = await model.save_weights_and_get_sampling_client()
        drawn = await asyncio.gather(
            *(sampler.sample(types.ModelInput.from_ints([1]), 1, types.SamplingParams(max_tokens=1)) for _ in range(5))
        )
        assert len(drawn) == 5
        await client.close("success")
        return float(output.metrics["loss:sum"])

    assert asyncio.run(main()) == pytest.approx(-logprob(2), rel=1e-6)


def test_large_batches_arrive_in_several_compressed_calls(service: tinker.ServiceClient) -> None:
    model = service.create_lora_training_client(BASE, rank=4).result()
    output = model.forward_backward([datum(*[2] * 3) for _ in range(2500)], "cross_entropy").result()
    assert output.metrics["loss:sum"] == pytest.approx(-7500 * logprob(2), rel=1e-6)
    assert len(output.loss_fn_outputs) == 2500


def test_a_cancelled_sample_leaves_the_server_well(server: Any, service: tinker.ServiceClient) -> None:
    sampler = service.create_sampling_client(base_model=BASE).result()
    future = sampler.sample(types.ModelInput.from_ints([1]), 1, types.SamplingParams(max_tokens=2))
    future.future().cancel()
    assert sampler.sample(types.ModelInput.from_ints([1]), 1, types.SamplingParams(max_tokens=2)).result().sequences


def test_a_client_that_was_connected_goes_on_after_a_restart(serve: Callable[..., Any], tmp_path: Path) -> None:
    with serve(tmp_path, seed=3) as first:
        port = int(first.url.rpartition(":")[2])
        client = tinker.ServiceClient(base_url=first.url, api_key=KEY)
        model = client.create_lora_training_client(BASE, rank=4).result()
        model.forward_backward([datum(2, 3)], "cross_entropy").result()
        model.optim_step(types.AdamParams(learning_rate=0.5)).result()
        sampler = model.save_weights_and_get_sampling_client().result()
        prompt = types.ModelInput.from_ints([1, 2])
        scores = sampler.compute_logprobs(prompt).result()
        loss = model.forward([datum(2, 3)], "cross_entropy").result().metrics["loss:sum"]
    with serve(tmp_path, seed=3, port=port):
        assert model.forward([datum(2, 3)], "cross_entropy").result().metrics["loss:sum"] == loss
        assert sampler.compute_logprobs(prompt).result() == scores
        client.close("success").result()
