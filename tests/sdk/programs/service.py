"""ServiceClient: making clients, metadata, several tenants, closing a session; tinker.auth."""

from __future__ import annotations

import asyncio
import uuid

import numpy as np
import tinker
from checks import (
    BASE_MODEL,
    OLD_SDK,
    SENTENCES,
    WAIT_S,
    check,
    close,
    data,
    far,
    make_sampling_client,
    make_training_client,
    prompt_of,
    raises,
    ready,
    refusal_of,
    rest,
    run_checks,
    scores,
    service,
    train_a_step,
)
from tinker import types
from tinker.lib.public_interfaces import SamplingClient, TrainingClient


@check("ServiceClient.create_lora_training_client")
def the_answer_is_a_client_at_once():
    made = service().create_lora_training_client(BASE_MODEL, rank=8, seed=1)
    assert isinstance(made, TrainingClient)
    session_id, kind, number = made.model_id.split(":")
    assert uuid.UUID(session_id) and kind == "train" and int(number) >= 0
    again = service().create_lora_training_client(base_model=BASE_MODEL, rank=8, seed=1)
    assert again.model_id == f"{session_id}:train:{int(number) + 1}"
    close(scores(made), scores(again), atol=0)
    return "usable as a client without .result(), as scripts for older SDKs do"


@check("ServiceClient.create_lora_training_client")
def the_seed_is_that_of_the_initial_weights():
    same, again, other = (make_training_client(seed=s) for s in (7, 7, 8))
    for client in (same, again, other):
        for _ in range(2):
            train_a_step(client)
    close(scores(again), scores(same), atol=1e-6)
    far(scores(other), scores(same))


@check("ServiceClient.create_lora_training_client_async", "ServiceClient.create_sampling_client_async")
async def async_twins_give_the_client():
    trainer = await service().create_lora_training_client_async(BASE_MODEL, rank=2, user_metadata={"a": "b"})
    sampler = await service().create_sampling_client_async(base_model=BASE_MODEL)
    assert type(trainer) is TrainingClient and type(sampler) is SamplingClient
    assert (await rest().get_training_run_async(trainer.model_id)).user_metadata == {"a": "b"}
    assert len((await sampler.sample_async(prompt_of(SENTENCES[0]), 2, types.SamplingParams(max_tokens=2))).sequences) == 2


@check("ServiceClient.create_lora_training_client", "ServiceClient.create_sampling_client", new_only=True)
async def clients_can_be_awaited():
    trainer = await service().create_lora_training_client(BASE_MODEL, rank=2)
    sampler = await service().create_sampling_client(base_model=BASE_MODEL)
    assert type(trainer) is TrainingClient and type(sampler) is SamplingClient


@check("ServiceClient.create_sampling_client")
def samplers_of_a_base_model_and_of_saved_weights():
    trainer = make_training_client()
    train_a_step(trainer)
    path = trainer.save_weights_for_sampler("service").result(WAIT_S).path
    base, trained, both = (
        make_sampling_client(**options)
        for options in ({"base_model": BASE_MODEL}, {"model_path": path}, {"model_path": path, "base_model": BASE_MODEL})
    )
    found = [np.array(c.compute_logprobs(prompt_of(SENTENCES[0])).result(WAIT_S)[1:]) for c in (base, trained, both)]
    close(found[0], scores(make_training_client(), SENTENCES[:1]), atol=1e-4)
    close(found[1], scores(trainer, SENTENCES[:1]), atol=1e-4)
    close(found[2], found[1], atol=1e-5)
    far(found[0], found[1])
    raises(ValueError, lambda: service().create_sampling_client())
    refusal_of(lambda: make_sampling_client(model_path="not-a-tinker-path"))


@check("ServiceClient.create_lora_training_client", "ServiceClient.create_sampling_client")
def unknown_models_are_refused_at_once():
    reasons = [
        refusal_of(lambda: ready(service().create_lora_training_client("nobody/nothing"))),
        refusal_of(lambda: make_sampling_client(base_model="nobody/nothing")),
    ]
    assert all("nobody/nothing" in reason for reason in reasons), reasons
    for rank in (0, -1, 100_000):
        assert str(rank) in refusal_of(lambda rank=rank: ready(service().create_lora_training_client(BASE_MODEL, rank=rank)))


@check("ServiceClient.create_lora_training_client", new_only=True)
def optimizers_other_than_adamw_are_refused_when_the_client_is_made():
    made = ready(service().create_lora_training_client(BASE_MODEL, rank=2, optimizer=tinker.AdamOptimizerConfig()))
    train_a_step(made)
    reason = refusal_of(lambda: ready(service().create_lora_training_client(BASE_MODEL, rank=2, optimizer=tinker.DimuonOptimizerConfig())))
    return f"AdamW works; Dimuon is refused: {reason}"


@check("ServiceClient.create_lora_training_client")
def tenants_of_one_base_model_do_not_meet():
    """Mixed ranks and flags, requests of all of them in flight at once: each gives what it gives alone."""
    options = [{"rank": 2, "seed": 1}, {"rank": 8, "seed": 2}, {"rank": 4, "seed": 3, "train_mlp": False}, {"rank": 8, "seed": 2}]
    together = [make_training_client(**o) for o in options]
    futures = []
    for step in range(2):
        for client in together:
            batch = data()[step:]
            futures += [client.forward_backward(batch, "cross_entropy"), client.optim_step(types.AdamParams(learning_rate=1e-2))]
    for future in futures:
        future.result(WAIT_S)
    for client, o in zip(together, options, strict=True):
        alone = make_training_client(**o)
        for step in range(2):
            train_a_step(alone, data()[step:])
        close(scores(client), scores(alone), atol=1e-5)


@check("ServiceClient.create_rest_client")
def a_rest_client_needs_no_session():
    client = tinker.ServiceClient().create_rest_client()
    client.list_training_runs(limit=1).result(WAIT_S)


@check("ServiceClient.get_telemetry", "ServiceClient.holder")
def holder_and_telemetry():
    assert service().holder.get_session_id()
    service().get_telemetry()


@check("ServiceClient.get_console_url")
def the_console_url_is_made_by_the_sdk():
    assert service().holder.get_session_id() in service().get_console_url()
    return "an address on the hosted service's site, where a local run is not"


@check("ServiceClient.close")
def a_closed_session_is_finished():
    client = tinker.ServiceClient(user_metadata={"closing": "yes"})
    trainer = ready(client.create_lora_training_client(BASE_MODEL, rank=2))
    path = trainer.save_state("kept").result(WAIT_S).path
    wanted = scores(trainer)
    client.close("success", detail="all done").result(WAIT_S)
    client.close("errored").result(WAIT_S)  # the first reason wins, the second call is no error
    raises(RuntimeError, lambda: client.create_sampling_client(base_model=BASE_MODEL))
    close(scores(ready(service().create_training_client_from_state(path))), wanted, atol=1e-5)
    with tinker.ServiceClient() as scoped:
        ready(scoped.create_sampling_client(base_model=BASE_MODEL))
        session_id = scoped.holder.get_session_id()
    assert rest().get_session(session_id).result(WAIT_S).training_run_ids == []
    try:
        with tinker.ServiceClient() as failing:
            ready(failing.create_sampling_client(base_model=BASE_MODEL))
            raise KeyError("as a user's loop may")
    except KeyError:
        pass
    return "its checkpoints stay and can be loaded by other sessions"


@check("ServiceClient.create_lora_training_client")
def another_session_can_go_on_from_a_checkpoint():
    trainer = make_training_client()
    train_a_step(trainer)
    path = trainer.save_state("across").result(WAIT_S).path
    sampler_path = trainer.save_weights_for_sampler("across").result(WAIT_S).path
    other = tinker.ServiceClient()
    close(scores(ready(other.create_training_client_from_state(path))), scores(trainer), atol=1e-5)
    sampler = ready(other.create_sampling_client(model_path=sampler_path))
    assert sampler.sample(prompt_of(SENTENCES[0]), 1, types.SamplingParams(max_tokens=2)).result(WAIT_S).sequences


@check("auth.get_tinker_token", "auth.tinker_has_credentials", "auth.raise_if_tinker_not_accessible")
def credentials_are_looked_up_and_tried():
    assert tinker.auth.get_tinker_token().startswith("tml-") and tinker.auth.tinker_has_credentials()
    tinker.auth.raise_if_tinker_not_accessible()


@check("ServiceClient.create_lora_training_client")
def several_event_loops_one_after_the_other():
    async def one_step():
        client = await service().create_lora_training_client_async(BASE_MODEL, rank=2)
        await (await client.forward_backward_async(data(), "cross_entropy"))
        return client

    client = asyncio.run(one_step())

    async def another_step():
        return await (await client.optim_step_async(types.AdamParams()))

    asyncio.run(another_step())
    assert OLD_SDK or client.forward(data(), "cross_entropy").future().result(WAIT_S)


if __name__ == "__main__":
    run_checks()
