"""Checkpoints over HTTP: lists, changes, downloads."""

from __future__ import annotations

import io
import tarfile
from email.utils import parsedate_to_datetime
from typing import Any

import pytest


@pytest.fixture
def saved(raw: Any) -> str:
    """A model with a checkpoint of each kind, all named "one"."""
    model = raw.model()
    for seq_id, path in enumerate(("save_weights", "save_weights_for_sampler", "save_weights_external"), start=1):
        raw.result(raw.post(path, {"model_id": model, "seq_id": seq_id, "path": "one"})["request_id"])
    return str(model)


def url(model: str, checkpoint: str = "weights/one", rest: str = "") -> str:
    return f"training_runs/{model}/checkpoints/{checkpoint}{rest}"  # as the SDK sends it: nothing escaped


def test_changes_to_one_checkpoint(raw: Any, saved: str) -> None:
    def listed() -> Any:
        return {c["checkpoint_id"]: c for c in raw.get(f"training_runs/{saved}/checkpoints")["checkpoints"]}

    assert set(listed()) == {"weights/one", "sampler_weights/one", "external_weights/one"}
    assert raw.http.post(url(saved, rest="/publish")).status_code == 204
    assert listed()["weights/one"]["public"] is True and listed()["sampler_weights/one"]["public"] is False
    assert raw.http.delete(url(saved, rest="/publish")).status_code == 204
    assert listed()["weights/one"]["public"] is False
    assert raw.http.put(url(saved, rest="/ttl"), json={"ttl_seconds": 7200}).status_code == 204
    assert listed()["weights/one"]["expires_at"] is not None
    assert raw.http.put(url(saved, rest="/ttl"), json={"ttl_seconds": None}).status_code == 204
    assert listed()["weights/one"]["expires_at"] is None
    assert raw.http.put(url(saved, rest="/ttl"), json={"ttl_seconds": 1}).status_code == 400
    assert raw.http.put(url(saved, rest="/ttl"), json={}).status_code == 400
    assert raw.http.delete(url(saved)).status_code == 204
    assert set(listed()) == {"sampler_weights/one", "external_weights/one"}
    assert raw.http.delete(url(saved)).status_code == 404


def test_an_archive_is_a_tar_behind_a_signed_address(raw: Any, saved: str) -> None:
    sent = raw.http.get(url(saved, rest="/archive"), follow_redirects=False)
    assert sent.status_code == 302
    assert parsedate_to_datetime(sent.headers["expires"]).timestamp() > 0
    got = raw.http.get(sent.headers["location"], headers={"X-API-Key": ""})  # whoever holds the address needs no key
    assert int(got.headers["content-length"]) == len(got.content)
    with tarfile.open(fileobj=io.BytesIO(got.content)) as tar:
        assert sorted(tar.getnames()) == ["adapter_model.safetensors", "optimizer.safetensors"]
        content = tar.extractfile("adapter_model.safetensors")
        assert content is not None
        weights = content.read()
    urls = raw.get(url(saved, "external_weights/one", "/external_weights_urls"))["urls"]
    assert raw.http.get(urls["adapter_model.safetensors"]).content == weights  # untrained both
    assert raw.http.get(urls["adapter_model.safetensors"], headers={"range": "bytes=0-7"}).content == weights[:8]


def test_a_changed_address_opens_nothing(raw: Any, saved: str) -> None:
    good = raw.http.get(url(saved, rest="/archive"), follow_redirects=False).headers["location"]
    for bad in (
        good.replace("weights%2Fone", "sampler_weights%2Fone"),
        good.replace("expires=", "expires=9"),
        good + "&file=..%2F..%2Fstore.sqlite",
        good + "&file=manifest.json",
        good.partition("&signature")[0],
        good[:-1] + ("0" if good[-1] != "0" else "1"),
        good.partition("?")[0],
        good.partition("?")[0] + "?path=tinker%3A%2F%2Fa%2Fweights%2Fb&expires=%FF&signature=%C3%A9",
    ):
        assert raw.http.get(bad).status_code == 400, bad
    assert raw.http.get(good).status_code == 200
    raw.http.delete(url(saved))
    assert raw.http.get(good).status_code == 404


@pytest.mark.parametrize(
    "checkpoint",
    [
        "weights/..",
        "weights/../../run.json",
        "../weights/one",
        "weights",
        "weights/one/more",
        "parked/one",
        "weights/%2e%2e",
        "weights/a%00b",
    ],
)  # fmt: skip
def test_paths_cannot_leave_the_data_directory(raw: Any, saved: str, checkpoint: str) -> None:
    for method, rest in [("GET", "/archive"), ("GET", "/external_weights_urls"), ("DELETE", ""), ("POST", "/publish"), ("PUT", "/ttl")]:
        assert raw.as_it_is(method, url(saved, checkpoint, rest), b'{"ttl_seconds": null}') in (400, 404, 405), (method, rest)
    listed = {c["checkpoint_id"] for c in raw.get(f"training_runs/{saved}/checkpoints")["checkpoints"]}
    assert listed == {"weights/one", "sampler_weights/one", "external_weights/one"}


@pytest.mark.parametrize("run", ["..", "%2e%2e", ".", "a%00", "*", "%2A", "..%2f..", "%ff", "a" * 300])
def test_runs_cannot_leave_it_either(raw: Any, run: str) -> None:
    for path in (f"training_runs/{run}", f"training_runs/{run}/checkpoints", f"training_runs/{run}/checkpoints/weights/one/archive"):
        assert raw.as_it_is("GET", path) in (400, 404), path


def test_weights_info_and_copies(raw: Any, saved: str) -> None:
    path = f"tinker://{saved}/weights/one"
    info = raw.post("weights_info", {"tinker_path": path})
    assert (info["base_model"], info["is_lora"], info["lora_rank"]) == ("scripted/unigram", True, 4)
    copy = raw.post("copy_weights", {"source_path": path, "ttl_seconds": 3600})["tinker_path"]
    assert copy != path and raw.post("weights_info", {"tinker_path": copy}) == info
    raw.post("weights_info", {"tinker_path": "tinker://a/weights/b"}, 404)
    raw.post("weights_info", {"tinker_path": "../../etc"}, 400)
    raw.post("copy_weights", {"source_path": path, "weights_access_token": "t"}, 400)
    raw.post("copy_weights", {"source_path": path, "ttl_seconds": 1}, 400)


def test_pages(raw: Any, saved: str) -> None:
    runs = raw.get("training_runs?limit=1&offset=0&access_scope=owned")
    assert len(runs["training_runs"]) == 1 and runs["cursor"]["total_count"] >= 1
    everything = raw.get("checkpoints?limit=1000")["checkpoints"]
    paged = [c for i in range(len(everything)) for c in raw.get(f"checkpoints?limit=1&offset={i}")["checkpoints"]]
    assert [c["tinker_path"] for c in paged] == [c["tinker_path"] for c in everything]
    assert raw.get(f"training_runs/{saved}")["model_owner"] == "local"
    raw.get("training_runs/nobody:train:0", 404)
    assert raw.get("whoami")["user_urn"].endswith("local")
    assert raw.get("get_server_capabilities")["supported_models"][0]["model_name"] == "scripted/unigram"


def test_sdks_that_do_not_know_external_checkpoints_are_not_shown_any(raw: Any, saved: str) -> None:
    def listed(path: str, version: str) -> set[str]:
        answer = raw.http.get(path, headers={"x-stainless-package-version": version}).json()
        return {c["checkpoint_id"] for c in answer["checkpoints"] if saved in c["tinker_path"]}

    for path in (f"training_runs/{saved}/checkpoints", "checkpoints?limit=1000&offset=0"):
        assert listed(path, "0.25.0") == {"weights/one", "sampler_weights/one"}
        assert listed(path, "0.38.0") == listed(path, "") == {"weights/one", "sampler_weights/one", "external_weights/one"}
