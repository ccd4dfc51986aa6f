"""Saving, loading and going on: TrainingClient.save_* and load_*, ServiceClient.create_training_client_from_state*, saved samplers."""

from __future__ import annotations

import asyncio
import datetime
import itertools
import json
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import tinker
from checks import (
    OLD_SDK,
    SENTENCES,
    WAIT_S,
    Refused,
    adam,
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
    works_or_refused,
)
from tinker import types

NAMES = (f"c{i}" for i in itertools.count())


def trained(*, steps: int = 2, **options):
    client = make_training_client(**options)
    for _ in range(steps):
        train_a_step(client)
    return client


def sampler_scores(client):
    """As checks.scores, by a sampling client."""
    found = [client.compute_logprobs(prompt_of(s)) for s in SENTENCES]
    return np.concatenate([f.result(WAIT_S)[1:] for f in found])


@check("TrainingClient.save_state", "ServiceClient.create_training_client_from_state_with_optimizer")
def a_run_goes_on_from_weights_and_optimizer_as_if_never_stopped():
    client = trained()
    path = client.save_state("with-optimizer").result(WAIT_S).path
    assert path == f"tinker://{client.model_id}/weights/with-optimizer", path
    resumed = ready(service().create_training_client_from_state_with_optimizer(path))
    assert resumed.model_id != client.model_id and resumed.get_info().lora_rank == 8
    close(scores(resumed), scores(client), atol=1e-5)
    for _ in range(2):
        train_a_step(client), train_a_step(resumed)
        close(scores(resumed), scores(client), atol=1e-4)
    return "two more steps on both: equal log-probabilities"


@check("ServiceClient.create_training_client_from_state")
def a_run_starts_from_weights_with_a_new_optimizer():
    client = trained(steps=3)
    path = client.save_state("weights-only").result(WAIT_S).path
    fresh = ready(service().create_training_client_from_state(path))
    close(scores(fresh), scores(client), atol=1e-5)
    train_a_step(client), train_a_step(fresh)
    far(scores(fresh), scores(client))
    return "equal weights, another next step"


@check(
    "ServiceClient.create_training_client_from_state_async",
    "ServiceClient.create_training_client_from_state_with_optimizer_async",
    "TrainingClient.save_state_async",
)
async def the_async_twins_give_clients():
    client = await asyncio.to_thread(trained)
    path = (await (await client.save_state_async("async"))).path
    wanted = await asyncio.to_thread(scores, client)
    for make in (service().create_training_client_from_state_async, service().create_training_client_from_state_with_optimizer_async):
        made = await make(path, user_metadata={"made": "async"})
        close(await asyncio.to_thread(scores, made), wanted, atol=1e-5)
        run = await rest().get_training_run_async(made.model_id)
        assert run.user_metadata == {"made": "async"}, run.user_metadata


@check("TrainingClient.save_state")
def a_name_is_written_once_unless_overwritten():
    client = trained(steps=1)
    path = client.save_state("taken").result(WAIT_S).path
    train_a_step(client)
    reason = refusal_of(lambda: client.save_state("taken").result(WAIT_S))
    assert client.save_state("taken", overwrite=True).result(WAIT_S).path == path
    close(scores(ready(service().create_training_client_from_state(path))), scores(client), atol=1e-5)
    for name in ("../up", "a/b", "", "x" * 400, "..", "nul\x00"):
        refusal_of(lambda name=name: client.save_state(name).result(WAIT_S))
    train_a_step(client)  # a refused save stops nothing
    return f"the second time refused at once: {reason}"


@check("TrainingClient.save_state", "TrainingClient.save_weights_for_sampler")
def checkpoints_can_expire():
    client = make_training_client()
    client.save_state("short", ttl_seconds=7200).result(WAIT_S)
    client.save_weights_for_sampler("brief", ttl_seconds=3600).result(WAIT_S)
    client.save_state("lasting").result(WAIT_S)
    found = {c.checkpoint_id: c for c in rest().list_checkpoints(client.model_id).result(WAIT_S).checkpoints}
    now = datetime.datetime.now(datetime.UTC)
    if not OLD_SDK or "expires_at" in type(found["weights/short"]).model_fields:
        assert 7100 < (found["weights/short"].expires_at - now).total_seconds() < 7201
        assert 3500 < (found["sampler_weights/brief"].expires_at - now).total_seconds() < 3601
        assert found["weights/lasting"].expires_at is None
    refusal_of(lambda: client.save_state("never", ttl_seconds=-5).result(WAIT_S))


@check("TrainingClient.save_state", "TrainingClient.save_weights_for_sampler", new_only=True)
def checkpoints_carry_user_metadata():
    client = make_training_client()
    client.save_state("noted", user_metadata={"step": "7", "naïve": "ü"}).result(WAIT_S)
    client.save_weights_for_sampler("noted", user_metadata={"step": "8"}).result(WAIT_S)
    found = {c.checkpoint_id: c.user_metadata for c in rest().list_checkpoints(client.model_id).result(WAIT_S).checkpoints}
    assert found == {"weights/noted": {"step": "7", "naïve": "ü"}, "sampler_weights/noted": {"step": "8"}}, found


@check("TrainingClient.save_weights_for_sampler", "TrainingClient.create_sampling_client", "ServiceClient.create_sampling_client")
def saved_sampler_weights_are_the_trained_ones():
    client = trained()
    answer = client.save_weights_for_sampler("s1").result(WAIT_S)
    assert answer.path == f"tinker://{client.model_id}/sampler_weights/s1", answer.path
    wanted = scores(client)
    train_a_step(client)
    for sampler in (ready(client.create_sampling_client(answer.path)), make_sampling_client(model_path=answer.path)):
        close(sampler_scores(sampler), wanted, atol=1e-4)
    far(scores(client), wanted)


@check(
    "TrainingClient.save_weights_for_sampler_async",
    "TrainingClient.create_sampling_client_async",
    "TrainingClient.save_weights_and_get_sampling_client_async",
)
async def async_twins_of_the_sampler_path():
    client = await asyncio.to_thread(trained)
    wanted = await asyncio.to_thread(scores, client)
    saved = await client.save_weights_for_sampler_async("s2")
    named = await client.create_sampling_client_async((await saved).path)
    ephemeral = await client.save_weights_and_get_sampling_client_async()
    for sampler in (named, ephemeral):
        close(await asyncio.to_thread(sampler_scores, sampler), wanted, atol=1e-4)


@check("TrainingClient.save_weights_and_get_sampling_client")
def ephemeral_samplers_need_no_name_and_leave_no_checkpoint():
    client = trained()
    sampler = ready(client.save_weights_and_get_sampling_client(name="ignored"))
    close(sampler_scores(sampler), scores(client), atol=1e-4)
    assert rest().list_checkpoints(client.model_id).result(WAIT_S).checkpoints == []


@check("TrainingClient.save_weights_and_get_sampling_client", new_only=True)
def inflight_samplers_follow_the_training():
    client = trained(steps=1)
    try:
        first = works_or_refused(lambda: client.save_weights_and_get_sampling_client(kind="inflight").result(WAIT_S))
    except Refused as error:
        return f"snapshots work; kind='inflight' is refused: {error}"
    train_a_step(client)
    second = client.save_weights_and_get_sampling_client(kind="inflight").result(WAIT_S)
    for sampler in (first, second):
        close(sampler_scores(sampler), scores(client), atol=1e-4)


@check("TrainingClient.load_state_with_optimizer", "TrainingClient.load_state")
def a_new_client_can_load_a_state():
    client = trained()
    path = client.save_state("to-load").result(WAIT_S).path
    with_optimizer, weights_only = make_training_client(seed=9), make_training_client(seed=9)
    with_optimizer.load_state_with_optimizer(path).result(WAIT_S)
    weights_only.load_state(path).result(WAIT_S)
    for loaded in (with_optimizer, weights_only):
        close(scores(loaded), scores(client), atol=1e-5)
        train_a_step(loaded)
    train_a_step(client)
    close(scores(with_optimizer), scores(client), atol=1e-4)
    far(scores(weights_only), scores(client))


@check("TrainingClient.load_state")
def a_used_client_can_load_a_state_too():
    client = trained()
    path = client.save_state("back").result(WAIT_S).path
    wanted = scores(client)
    client.forward_backward(data(), "cross_entropy").result(WAIT_S)
    train_a_step(client)
    works_or_refused(lambda: client.load_state_with_optimizer(path).result(WAIT_S))
    close(scores(client), wanted, atol=1e-5)
    return "any time, not only as the first request"


@check("TrainingClient.load_state_async", "TrainingClient.load_state_with_optimizer_async")
async def async_twins_of_load_give_a_future():
    client = await asyncio.to_thread(trained)
    path = (await client.save_state("load-async")).path
    wanted = await asyncio.to_thread(scores, client)
    for name in ("load_state_async", "load_state_with_optimizer_async"):
        other = await asyncio.to_thread(make_training_client, seed=5)
        load = {"load_state_async": other.load_state_async, "load_state_with_optimizer_async": other.load_state_with_optimizer_async}[name]
        await (await load(path))
        close(await asyncio.to_thread(scores, other), wanted, atol=1e-5)


@check("TrainingClient.load_state", "ServiceClient.create_training_client_from_state")
def what_does_not_fit_is_refused():
    client = make_training_client(rank=4)
    path = trained(steps=1, rank=8).save_state("rank8").result(WAIT_S).path
    reasons = [
        refusal_of(lambda: client.load_state(path).result(WAIT_S)),
        refusal_of(lambda: client.load_state(path.replace("rank8", "absent")).result(WAIT_S)),
        refusal_of(lambda: ready(service().create_training_client_from_state("tinker://nobody:train:0/weights/x"))),
        refusal_of(lambda: make_sampling_client(model_path="tinker://nobody:train:0/sampler_weights/x")),
    ]
    assert all(reasons)
    train_a_step(client)


@check("TrainingClient.save_weights_external", "RestClient.get_external_weights_urls")
def external_weights_can_be_downloaded_and_are_a_peft_adapter():
    client = trained()
    path = works_or_refused(lambda: client.save_weights_external("for-others").result(WAIT_S)).path
    assert path == f"tinker://{client.model_id}/external_weights/for-others", path
    answer = rest().get_external_weights_urls(path).result(WAIT_S)
    assert answer.expires > datetime.datetime.now(datetime.UTC)
    with tempfile.TemporaryDirectory() as directory:
        for name, url in answer.urls.items():
            with urllib.request.urlopen(url) as response:  # signed: no key, no header
                (Path(directory) / name).write_bytes(response.read())
        config = json.loads((Path(directory) / "adapter_config.json").read_text())
        assert config["r"] == 8 and (Path(directory) / "adapter_model.safetensors").stat().st_size > 1000
    spoiled = next(iter(answer.urls.values()))[:-3] + "xyz"
    try:
        urllib.request.urlopen(spoiled)
        raise AssertionError("a changed signature was accepted")
    except urllib.error.HTTPError as error:
        assert error.code in (400, 401, 403, 404), error.code


@check("TrainingClient.save_weights_external_async", "RestClient.get_external_weights_urls_async")
async def async_twin_of_external_weights():
    client = await asyncio.to_thread(make_training_client)
    saved = await (await client.save_weights_external_async("async"))
    assert (await rest().get_external_weights_urls_async(saved.path)).urls


@check("TrainingClient.save_weights_external", new_only=True)
def encrypted_external_weights_are_refused():
    client = make_training_client()
    reason = refusal_of(lambda: client.save_weights_external("e", age_encryption_recipients=["age1xyz"]).result(WAIT_S))
    return f"plain files; encryption is refused: {reason}"


@check("ServiceClient.copy_weights")
def copied_weights_can_be_loaded():
    client = trained()
    path = client.save_state("to-copy").result(WAIT_S).path
    raises(ValueError, lambda: service().copy_weights(path), "TINKER_PROJECT_ID")  # the SDK copies into a project, named or configured
    in_project = tinker.ServiceClient(project_id="a-project")
    copied = works_or_refused(lambda: in_project.copy_weights(path, ttl_seconds=3600).result(WAIT_S))
    assert copied != path
    close(scores(ready(service().create_training_client_from_state(copied))), scores(client), atol=1e-5)
    rest().delete_checkpoint_from_tinker_path(path).result(WAIT_S)
    close(scores(ready(service().create_training_client_from_state(copied))), scores(client), atol=1e-5)
    return "the copy outlives its source"


@check("TrainingClient.optim_step")
def an_unapplied_gradient_survives_a_save():
    client, plain = make_training_client(), make_training_client()
    client.forward_backward(data(), "cross_entropy")
    client.save_state("between")
    client.save_weights_for_sampler("between")
    client.optim_step(adam()).result(WAIT_S)
    train_a_step(plain)
    close(scores(client), scores(plain), atol=1e-5)


@check("ServiceClient.create_lora_training_client")
def flags_and_rank_are_those_of_the_checkpoint():
    client = make_training_client(rank=4, train_mlp=False, train_unembed=False)
    path = client.save_state("attention").result(WAIT_S).path
    info = rest().get_weights_info_by_tinker_path(path).result(WAIT_S)
    assert (info.is_lora, info.lora_rank) == (True, 4)
    if not OLD_SDK:
        assert (info.train_attn, info.train_mlp, info.train_unembed) == (True, False, False), info
    whole = make_training_client(rank=4)
    train_a_step(client), train_a_step(whole)
    far(scores(client), scores(whole))
    raises(AssertionError, lambda: service().create_lora_training_client("x", train_mlp=False, train_attn=False, train_unembed=False))


@check("TrainingClient.save_state")
def types_parse_the_paths():
    client = make_training_client()
    parsed = types.ParsedCheckpointTinkerPath.from_tinker_path(client.save_state("parsed").result(WAIT_S).path)
    assert (parsed.training_run_id, parsed.checkpoint_id, parsed.checkpoint_type) == (client.model_id, "weights/parsed", "training")


if __name__ == "__main__":
    run_checks()
