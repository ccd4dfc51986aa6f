"""Two API keys: what one may see and do of the other's. Keys: $TINKER_API_KEY (the owner) and $OTHER_KEY, given as first argument."""

from __future__ import annotations

import sys

import tinker

OTHER_KEY = sys.argv.pop(1)

from checks import (  # noqa: E402 - the arguments that are left choose checks
    BASE_MODEL,
    OLD_SDK,
    SENTENCES,
    WAIT_S,
    check,
    close,
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
from tinker import types  # noqa: E402

STRANGER = tinker.ServiceClient(api_key=OTHER_KEY)


def owned():
    """A trained model of the owner, its state and its sampler weights."""
    client = make_training_client()
    train_a_step(client)
    return client, client.save_state("mine").result(WAIT_S).path, client.save_weights_for_sampler("mine").result(WAIT_S).path


@check("RestClient.get_training_run")
def what_belongs_to_another_key_is_not_there():
    client, path, sampler_path = owned()
    other, session_id = STRANGER.create_rest_client(), client.model_id.split(":")[0]
    sampler_id = ready(service().create_sampling_client(model_path=sampler_path))._sampling_session_id
    refused = {
        "run": lambda: other.get_training_run(client.model_id).result(WAIT_S),
        "checkpoints": lambda: other.list_checkpoints(client.model_id).result(WAIT_S),
        "info": lambda: other.get_weights_info_by_tinker_path(path).result(WAIT_S),
        "session": lambda: other.get_session(session_id).result(WAIT_S),
        "sampler": lambda: other.get_sampler(sampler_id).result(WAIT_S),
        "delete": lambda: other.delete_checkpoint_from_tinker_path(path).result(WAIT_S),
        "publish": lambda: other.publish_checkpoint_from_tinker_path(path).result(WAIT_S),
        "ttl": lambda: other.set_checkpoint_ttl_from_tinker_path(path, 3600).result(WAIT_S),
        "load": lambda: ready(STRANGER.create_training_client_from_state(path)),
        "sample": lambda: ready(STRANGER.create_sampling_client(model_path=sampler_path)),
        "load into own": lambda: ready(STRANGER.create_lora_training_client(BASE_MODEL, rank=8)).load_state(path).result(WAIT_S),
    }
    theirs, nobodys = {}, {}
    for name, action in refused.items():
        theirs[name] = refusal_of(action)
    absent = client.model_id.rsplit(":", 1)[0] + ":9999"
    nobodys["run"] = refusal_of(lambda: other.get_training_run(absent).result(WAIT_S))
    assert theirs["run"].replace(client.model_id, "X") == nobodys["run"].replace(absent, "X"), "the words give away that it exists"
    assert session_id not in other.list_sessions(limit=1000).result(WAIT_S).sessions
    assert client.model_id not in [r.training_run_id for r in other.list_training_runs(limit=1000).result(WAIT_S).training_runs]
    assert path not in [c.tinker_path for c in other.list_user_checkpoints(limit=1000).result(WAIT_S).checkpoints]
    before = scores(client)
    close(scores(ready(service().create_training_client_from_state(path))), before)


@check("RestClient.publish_checkpoint_from_tinker_path")
def a_published_checkpoint_can_be_loaded_by_all_and_changed_by_its_owner():
    client, path, sampler_path = owned()
    other = STRANGER.create_rest_client()
    rest().publish_checkpoint_from_tinker_path(path).result(WAIT_S)
    rest().publish_checkpoint_from_tinker_path(sampler_path).result(WAIT_S)
    assert other.get_weights_info_by_tinker_path(path).result(WAIT_S).lora_rank == 8
    loaded = ready(STRANGER.create_training_client_from_state(path))
    close(scores(loaded), scores(client))
    sampler = ready(STRANGER.create_sampling_client(model_path=sampler_path))
    close(sampler.compute_logprobs(prompt_of(SENTENCES[0])).result(WAIT_S)[1:], scores(client, SENTENCES[:1]), atol=1e-4)
    refusal_of(lambda: other.delete_checkpoint_from_tinker_path(path).result(WAIT_S))
    refusal_of(lambda: other.unpublish_checkpoint_from_tinker_path(path).result(WAIT_S))
    refusal_of(lambda: other.get_training_run(client.model_id).result(WAIT_S))
    train_a_step(loaded)
    rest().unpublish_checkpoint_from_tinker_path(path).result(WAIT_S)
    refusal_of(lambda: ready(STRANGER.create_training_client_from_state(path)))


@check("ServiceClient.create_lora_training_client")
def a_key_that_is_not_valid_is_told_so():
    invalid = tinker.ServiceClient(api_key="tml-" + "0" * 40)
    raises(tinker.AuthenticationError, lambda: ready(invalid.create_sampling_client(base_model=BASE_MODEL)))
    if not OLD_SDK:
        raises(tinker.AuthenticationError, lambda: tinker.RestClient(api_key="tml-" + "1" * 40).list_sessions().result(WAIT_S))


@check("SamplingClient.sample")
def a_sampling_client_of_another_key_cannot_be_used():
    client, _, sampler_path = owned()
    mine = ready(service().create_sampling_client(model_path=sampler_path))
    theirs = ready(STRANGER.create_sampling_client(base_model=BASE_MODEL))
    theirs._sampling_session_id = mine._sampling_session_id  # as a thief would
    refusal_of(lambda: theirs.sample(prompt_of([5, 6]), 1, types.SamplingParams(max_tokens=1)).result(WAIT_S))
    thief = ready(STRANGER.create_lora_training_client(BASE_MODEL, rank=8))
    thief.model_id = client.model_id
    before = scores(client)
    refusal_of(lambda: thief.optim_step(types.AdamParams(learning_rate=1.0)).result(WAIT_S))
    close(scores(client), before)


if __name__ == "__main__":
    run_checks()
