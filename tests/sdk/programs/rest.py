"""RestClient and AdminClient: what the server keeps, lists, publishes and deletes."""

from __future__ import annotations

import asyncio
import datetime
import io
import tarfile
import urllib.request

import tinker
from checks import (
    BASE_MODEL,
    OLD_SDK,
    WAIT_S,
    Refused,
    check,
    close,
    make_sampling_client,
    make_training_client,
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


def saved(name, *, client=None):
    """A training client and the path of a state saved under that name."""
    client = client or make_training_client()
    return client, client.save_state(name).result(WAIT_S).path


def ids(client):
    return {c.checkpoint_id for c in rest().list_checkpoints(client.model_id).result(WAIT_S).checkpoints}


@check("RestClient.get_server_capabilities", "ServiceClient.get_server_capabilities", "ServiceClient.get_server_capabilities_async")
def the_server_says_which_models_it_has():
    for found in (
        tinker.RestClient().get_server_capabilities().result(WAIT_S),
        service().get_server_capabilities(),
        asyncio.run(service().get_server_capabilities_async()),
    ):
        model = next(m for m in found.supported_models if m.model_name == BASE_MODEL)
        assert model.max_context_length == 256 and model.trainable and model.sampleable, model


@check("ServiceClient.get_server_capabilities", "ServiceClient.get_server_capabilities_async")
def the_server_says_which_models_it_has_without_a_rest_client():
    for found in (service().get_server_capabilities(), asyncio.run(service().get_server_capabilities_async())):
        assert BASE_MODEL in [m.model_name for m in found.supported_models]


@check("RestClient.get_training_run", "RestClient.get_training_run_by_tinker_path")
def a_training_run_is_described():
    client = make_training_client(rank=4, user_metadata={"experiment": "rest"})
    before = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=60)
    _, path = saved("described", client=client)
    sampler_path = client.save_weights_for_sampler("described").result(WAIT_S).path
    for run in (
        rest().get_training_run(client.model_id).result(WAIT_S),
        rest().get_training_run_by_tinker_path(path).result(WAIT_S),
        rest().get_training_run(client.model_id, access_scope="accessible").result(WAIT_S),
    ):
        assert (run.training_run_id, run.base_model, run.is_lora, run.lora_rank) == (client.model_id, BASE_MODEL, True, 4)
        assert run.user_metadata == {"experiment": "rest"} and not run.corrupted and run.last_request_time > before
        assert run.last_checkpoint.tinker_path == path and run.last_sampler_checkpoint.tinker_path == sampler_path
    refusal_of(lambda: rest().get_training_run("nobody:train:0").result(WAIT_S))


@check("RestClient.get_training_run_async", "RestClient.get_training_run_by_tinker_path_async")
async def async_twins_of_get_training_run():
    client, path = await asyncio.to_thread(saved, "twin")
    assert (await rest().get_training_run_async(client.model_id)).training_run_id == client.model_id
    assert (await rest().get_training_run_by_tinker_path_async(path)).training_run_id == client.model_id


@check("RestClient.list_training_runs", "RestClient.list_training_runs_async")
def training_runs_are_listed_in_pages():
    made = {make_training_client(rank=1).model_id for _ in range(3)}
    everything = rest().list_training_runs(limit=100).result(WAIT_S)
    total = everything.cursor.total_count
    found = [r.training_run_id for r in everything.training_runs]
    assert made <= set(found) and (len(found) == total or total > 100)
    pages = [r.training_run_id for o in range(0, total, 2) for r in rest().list_training_runs(2, o).result(WAIT_S).training_runs]
    assert pages[: len(found)] == found, "the pages are the list, in its order"
    assert rest().list_training_runs(limit=5, offset=total + 10).result(WAIT_S).training_runs == []
    assert asyncio.run(rest().list_training_runs_async(limit=1)).cursor.limit == 1
    if not OLD_SDK:
        times = [r.last_request_time for r in everything.training_runs]
        assert len(times) == len(found)


@check("RestClient.list_checkpoints", "RestClient.list_checkpoints_async")
def the_checkpoints_of_a_run_are_listed():
    client, path = saved("one")
    sampler_path = client.save_weights_for_sampler("two").result(WAIT_S).path
    for found in (rest().list_checkpoints(client.model_id).result(WAIT_S), asyncio.run(rest().list_checkpoints_async(client.model_id))):
        by_id = {c.checkpoint_id: c for c in found.checkpoints}
        assert set(by_id) == {"weights/one", "sampler_weights/two"}
        assert by_id["weights/one"].tinker_path == path and by_id["weights/one"].checkpoint_type == "training"
        assert by_id["sampler_weights/two"].tinker_path == sampler_path and by_id["sampler_weights/two"].checkpoint_type == "sampler"
        assert all(c.size_bytes > 1000 and not c.public for c in found.checkpoints)
        assert all(abs((datetime.datetime.now(datetime.UTC) - c.time).total_seconds()) < 300 for c in found.checkpoints)


@check("RestClient.list_user_checkpoints", "RestClient.list_user_checkpoints_async")
def all_checkpoints_are_listed_in_pages():
    paths = [saved(name)[1] for name in ("u1", "u2", "u3")]
    found = rest().list_user_checkpoints(limit=500).result(WAIT_S)
    listed = [c.tinker_path for c in found.checkpoints]
    assert set(paths) <= set(listed)
    pages = [c.tinker_path for o in range(0, len(listed), 3) for c in rest().list_user_checkpoints(3, o).result(WAIT_S).checkpoints]
    assert pages == listed
    assert found.cursor.total_count == len(listed)
    assert len(asyncio.run(rest().list_user_checkpoints_async(limit=2)).checkpoints) == 2


@check("RestClient.delete_checkpoint", "RestClient.delete_checkpoint_from_tinker_path")
def a_deleted_checkpoint_is_gone():
    client, path = saved("d1")
    _, other = saved("d2", client=client)
    rest().delete_checkpoint(client.model_id, "weights/d1").result(WAIT_S)
    assert ids(client) == {"weights/d2"}
    rest().delete_checkpoint_from_tinker_path(other).result(WAIT_S)
    assert ids(client) == set()
    refusal_of(lambda: ready(service().create_training_client_from_state(path)))
    refusal_of(lambda: rest().delete_checkpoint(client.model_id, "weights/d1").result(WAIT_S))
    assert client.save_state("d1").result(WAIT_S).path == path, "the name is free again"


@check("RestClient.delete_checkpoint_async", "RestClient.delete_checkpoint_from_tinker_path_async")
async def async_twins_of_delete():
    client, _ = await asyncio.to_thread(saved, "a1")
    _, other = await asyncio.to_thread(saved, "a2", client=client)
    await rest().delete_checkpoint_async(client.model_id, "weights/a1")
    await rest().delete_checkpoint_from_tinker_path_async(other)
    assert await asyncio.to_thread(ids, client) == set()


def visibility(client):
    return {c.checkpoint_id: c.public for c in rest().list_checkpoints(client.model_id).result(WAIT_S).checkpoints}


@check("RestClient.publish_checkpoint_from_tinker_path", "RestClient.unpublish_checkpoint_from_tinker_path")
def a_checkpoint_is_published_and_taken_back():
    client, path = saved("p1")
    saved("p2", client=client)
    rest().publish_checkpoint_from_tinker_path(path).result(WAIT_S)
    assert visibility(client) == {"weights/p1": True, "weights/p2": False}
    rest().unpublish_checkpoint_from_tinker_path(path).result(WAIT_S)
    assert visibility(client) == {"weights/p1": False, "weights/p2": False}
    refusal_of(lambda: rest().publish_checkpoint_from_tinker_path(path.replace("p1", "absent")).result(WAIT_S))


@check("RestClient.publish_checkpoint_from_tinker_path_async", "RestClient.unpublish_checkpoint_from_tinker_path_async")
async def async_twins_of_publish():
    client, path = await asyncio.to_thread(saved, "p3")
    await rest().publish_checkpoint_from_tinker_path_async(path)
    assert (await asyncio.to_thread(visibility, client)) == {"weights/p3": True}
    await rest().unpublish_checkpoint_from_tinker_path_async(path)
    assert (await asyncio.to_thread(visibility, client)) == {"weights/p3": False}


@check("RestClient.set_checkpoint_ttl_from_tinker_path", "RestClient.set_checkpoint_ttl_from_tinker_path_async")
def a_lifetime_is_set_and_removed():
    client, path = saved("ttl")

    def expires_in():
        [found] = rest().list_checkpoints(client.model_id).result(WAIT_S).checkpoints
        return None if found.expires_at is None else (found.expires_at - datetime.datetime.now(datetime.UTC)).total_seconds()

    assert expires_in() is None
    rest().set_checkpoint_ttl_from_tinker_path(path, 3600).result(WAIT_S)
    assert 3500 < expires_in() < 3601
    asyncio.run(rest().set_checkpoint_ttl_from_tinker_path_async(path, 7200))
    assert 7100 < expires_in() < 7201
    rest().set_checkpoint_ttl_from_tinker_path(path, None).result(WAIT_S)
    assert expires_in() is None
    refusal_of(lambda: rest().set_checkpoint_ttl_from_tinker_path(path, -1).result(WAIT_S))


@check("RestClient.get_weights_info_by_tinker_path")
def the_weights_say_what_they_fit():
    client, path = saved("info", client=make_training_client(rank=2))
    for one in (path, client.save_weights_for_sampler("info").result(WAIT_S).path):
        found = rest().get_weights_info_by_tinker_path(one).result(WAIT_S)
        assert (found.base_model, found.is_lora, found.lora_rank) == (BASE_MODEL, True, 2), found
    refusal_of(lambda: rest().get_weights_info_by_tinker_path("tinker://nobody:train:0/weights/x").result(WAIT_S))


def tar_names(url):
    with urllib.request.urlopen(url) as response:  # signed: no key, no header
        return tarfile.open(fileobj=io.BytesIO(response.read())).getnames()


@check(
    "RestClient.get_checkpoint_archive_url",
    "RestClient.get_checkpoint_archive_url_async",
    "RestClient.get_checkpoint_archive_url_from_tinker_path",
    "RestClient.get_checkpoint_archive_url_from_tinker_path_async",
)
def an_archive_can_be_downloaded():
    client = make_training_client()
    path = client.save_weights_for_sampler("archive").result(WAIT_S).path
    for answer in (
        rest().get_checkpoint_archive_url(client.model_id, "sampler_weights/archive").result(WAIT_S),
        asyncio.run(rest().get_checkpoint_archive_url_async(client.model_id, "sampler_weights/archive")),
        rest().get_checkpoint_archive_url_from_tinker_path(path).result(WAIT_S),
        asyncio.run(rest().get_checkpoint_archive_url_from_tinker_path_async(path)),
    ):
        names = tar_names(answer.url)
        assert any(n.endswith("adapter_model.safetensors") for n in names) and any(n.endswith("adapter_config.json") for n in names), names
        assert answer.expires > datetime.datetime.now(datetime.UTC)


@check("RestClient.get_session", "RestClient.get_session_async", "RestClient.list_sessions", "RestClient.list_sessions_async")
def sessions_are_listed_and_described():
    client = make_training_client()
    sampler = make_sampling_client()
    session_id = client.model_id.split(":")[0]
    for found in (rest().get_session(session_id).result(WAIT_S), asyncio.run(rest().get_session_async(session_id))):
        assert client.model_id in found.training_run_ids
        assert sampler._sampling_session_id in found.sampler_ids
        if not OLD_SDK:
            assert found.user_metadata["suite"] == "sdk"
    everything = rest().list_sessions(limit=1000).result(WAIT_S).sessions
    assert session_id in everything
    pages = [s for o in range(0, len(everything), 2) for s in rest().list_sessions(limit=2, offset=o).result(WAIT_S).sessions]
    assert pages == everything
    assert asyncio.run(rest().list_sessions_async(limit=1000, access_scope="accessible")).sessions == everything
    refusal_of(lambda: rest().get_session("nobody").result(WAIT_S))


@check("RestClient.get_sampler", "RestClient.get_sampler_async")
def a_sampler_is_described():
    client = make_training_client()
    path = client.save_weights_for_sampler("sampler").result(WAIT_S).path
    for sampler, model_path in ((make_sampling_client(model_path=path), path), (make_sampling_client(), None)):
        sampler_id = sampler._sampling_session_id
        for found in (rest().get_sampler(sampler_id).result(WAIT_S), asyncio.run(rest().get_sampler_async(sampler_id))):
            assert (found.sampler_id, found.base_model, found.model_path) == (sampler_id, BASE_MODEL, model_path), found


@check("RestClient.copy_weights", "RestClient.copy_weights_async")
def copying_between_projects():
    raises(ValueError, lambda: rest().copy_weights("tinker://x/weights/y"), "TINKER_PROJECT_ID")
    client, path = saved("copied")
    copied = works_or_refused(lambda: rest().copy_weights(path, "a-project").result(WAIT_S))
    close(scores(ready(service().create_training_client_from_state(copied))), scores(client), atol=1e-5)
    assert asyncio.run(rest().copy_weights_async(path, "a-project")) != copied


@check("RestClient.assign_session_project", "RestClient.assign_session_project_async")
def assigning_a_session_to_a_project():
    session_id = make_training_client().model_id.split(":")[0]
    works_or_refused(lambda: rest().assign_session_project(session_id, "a-project").result(WAIT_S))
    asyncio.run(rest().assign_session_project_async(session_id, "a-project"))


@check("RestClient.export_session_trace", "RestClient.export_session_trace_async")
def a_timeline_of_a_session():
    client = make_training_client()
    train_a_step(client)
    session_id = client.model_id.split(":")[0]
    url = works_or_refused(lambda: rest().export_session_trace(session_id).result(WAIT_S))
    with urllib.request.urlopen(url) as response:
        assert len(response.read()) > 50
    assert asyncio.run(rest().export_session_trace_async(session_id)).startswith("http")


@check("RestClient.search_sessions", new_only=True)
def sessions_can_be_searched():
    other = tinker.ServiceClient(user_metadata={"needle": "found"}, display_name="A Search Test")
    ready(other.create_sampling_client(base_model=BASE_MODEL))
    session_id = other.holder.get_session_id()
    found = works_or_refused(lambda: rest().search_sessions(types.SessionSearchRequest(user_metadata={"needle": "found"})).result(WAIT_S))
    assert found.sessions[0].session_id == session_id
    by_name = rest().search_sessions(types.SessionSearchRequest(display_name="search test")).result(WAIT_S)
    assert session_id in [s.session_id for s in by_name.sessions]
    assert rest().search_sessions(types.SessionSearchRequest(user_metadata={"needle": "no"})).result(WAIT_S).sessions == []


@check("RestClient.whoami")
def whoami():
    try:
        found = rest().whoami().result(WAIT_S)
    except RuntimeError as error:
        assert "JWT" in str(error), error
        raise Refused("the SDK reads it from a token of the hosted service's login; with a plain API key it asks nobody") from error
    assert found.user_urn


@check("RestClient.get_telemetry")
def telemetry_is_taken_and_dropped():
    rest().get_telemetry()


ADMIN = {
    "get_audit_log": lambda c: c.get_audit_log(),
    "get_audit_log_async": lambda c: asyncio.run(c.get_audit_log_async()),
    "get_billing_usage": lambda c: c.get_billing_usage("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"),
    "get_billing_usage_async": lambda c: asyncio.run(c.get_billing_usage_async("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z")),
    "get_current_checkpoint_storage_usage": lambda c: c.get_current_checkpoint_storage_usage(),
    "get_current_checkpoint_storage_usage_async": lambda c: asyncio.run(c.get_current_checkpoint_storage_usage_async()),
}


def register_admin(class_name, method, call, client):
    @check(f"{class_name}.{method}")
    def accounts_are_of_the_hosted_service():
        if OLD_SDK and method == "get_audit_log_async":
            raise Refused("a fault of SDK 0.25.0 itself: asked from the caller's event loop, it sends nothing")
        answer = works_or_refused(lambda: call(client()))
        return works_or_refused(lambda: answer.result(WAIT_S)) if not method.endswith("_async") else answer

    del accounts_are_of_the_hosted_service  # registered


for _method, _call in ADMIN.items():
    register_admin("RestClient", _method, _call, rest)
    register_admin("AdminClient", _method, _call, lambda: tinker.AdminClient())


@check("AdminClient.get_telemetry")
def an_admin_client_needs_no_session():
    tinker.AdminClient().get_telemetry()


if __name__ == "__main__":
    run_checks()
