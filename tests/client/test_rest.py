"""RestClient: each method reaches its backend operation with the arguments in their places; what is hosted only says so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import pytest

from ptlab.client.rest import RestClient
from ptlab.client.service import ServiceClient
from ptlab.errors import InvalidRequestError

PATH = "tinker://s:train:0/weights/a"


class Recorder:
    """Answers every operation of the backend and of its catalog with a fixed value, and writes down what it was asked."""

    def __init__(self, log: list[Any], answer: Any) -> None:
        self._log, self._answer = log, answer

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def operation(*args: Any, **kwargs: Any) -> Any:
            self._log.append((name, *args, kwargs) if kwargs else (name, *args))
            return self._answer

        return operation


@pytest.fixture
def asked(backend: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    log: list[Any] = []
    recorder = Recorder(log, tmp_path / "a.tar")
    monkeypatch.setattr(backend, "catalog", recorder, raising=False)
    for name in ("get_session", "list_sessions", "get_sampler"):
        monkeypatch.setattr(backend, name, getattr(recorder, name), raising=False)
    return log


@pytest.fixture
def rest(service: ServiceClient) -> RestClient:
    return service.create_rest_client()


CALLS: list[tuple[str, tuple[Any, ...], tuple[Any, ...]]] = [
    ("get_training_run", ("r",), ("get_training_run", "r")),
    ("get_training_run_by_tinker_path", (PATH,), ("get_training_run", "s:train:0")),
    ("list_training_runs", (3, 4), ("list_training_runs", 3, 4)),
    ("list_checkpoints", ("r",), ("list_checkpoints", "r")),
    ("list_user_checkpoints", (), ("list_user_checkpoints", 100, 0)),
    ("delete_checkpoint", ("r", "weights/a"), ("delete_checkpoint", "r", "weights/a")),
    ("delete_checkpoint_from_tinker_path", (PATH,), ("delete_checkpoint", "s:train:0", "weights/a")),
    ("publish_checkpoint_from_tinker_path", (PATH,), ("set_checkpoint_published", "s:train:0", "weights/a", {"public": True})),
    ("unpublish_checkpoint_from_tinker_path", (PATH,), ("set_checkpoint_published", "s:train:0", "weights/a", {"public": False})),
    ("set_checkpoint_ttl_from_tinker_path", (PATH, 60), ("set_checkpoint_ttl", "s:train:0", "weights/a", 60)),
    ("get_external_weights_urls", (PATH,), ("get_external_weights_urls", PATH)),
    ("copy_weights", (PATH,), ("copy_weights", PATH, None)),
    ("get_session", ("s",), ("get_session", "s")),
    ("list_sessions", (), ("list_sessions", 20, 0)),
    ("get_sampler", ("s:sample:0",), ("get_sampler", "s:sample:0")),
    ("get_checkpoint_archive_url_from_tinker_path", (PATH,), ("get_checkpoint_archive", "s:train:0", "weights/a")),
]


@pytest.mark.parametrize(("method", "arguments", "operation"), CALLS, ids=[call[0] for call in CALLS])
def test_both_styles_ask_the_backend(
    rest: RestClient, asked: list[Any], method: str, arguments: tuple[Any, ...], operation: tuple[Any, ...]
) -> None:
    getattr(rest, method)(*arguments).result(5)

    async def main() -> None:
        await getattr(rest, f"{method}_async")(*arguments)
        await getattr(rest, method)(*arguments)

    asyncio.run(main())
    assert asked == [operation] * 3


def test_methods_without_a_twin(rest: RestClient, asked: list[Any]) -> None:
    rest.get_server_capabilities().result(5)
    rest.get_weights_info_by_tinker_path(PATH).result(5)
    rest.whoami().result(5)
    assert asked == [("get_server_capabilities",), ("get_weights_info", PATH), ("whoami",)]


def test_asking_opens_no_session(rest: RestClient, asked: list[Any], backend: Any) -> None:
    rest.list_sessions().result(5)
    assert len(asked) == 1 and backend.calls == []


def test_the_archive_is_a_file_address(rest: RestClient, asked: list[Any], tmp_path: Path) -> None:
    answer = rest.get_checkpoint_archive_url("r", "weights/a").result(5)
    address = urlparse(answer.url)
    assert address.scheme == "file" and Path(url2pathname(address.path)) == (tmp_path / "a.tar").resolve()


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("assign_session_project", ("s", "p")),
        ("export_session_trace", ("s",)),
        ("get_audit_log", ()),
        ("get_billing_usage", ("2026-01-01", "2026-02-01")),
        ("get_current_checkpoint_storage_usage", ()),
    ],
)
def test_what_only_a_hosted_service_has_is_refused_by_name(rest: RestClient, method: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(InvalidRequestError, match=f"{method}.*in-process ptlab has no"):
        getattr(rest, method)(*arguments)
    with pytest.raises(InvalidRequestError, match=method):
        asyncio.run(getattr(rest, f"{method}_async")(*arguments))


def test_other_refusals(rest: RestClient) -> None:
    with pytest.raises(InvalidRequestError, match="search_sessions"):
        rest.search_sessions(None)
    with pytest.raises(InvalidRequestError, match="project"):
        rest.list_training_runs(project_id="p")
    with pytest.raises(InvalidRequestError, match="project"):
        rest.copy_weights(PATH, "p")
    with pytest.raises(InvalidRequestError, match="checkpoint path"):
        rest.delete_checkpoint_from_tinker_path("tinker://r/a")
    for make in (lambda: RestClient(), lambda: RestClient(base_url="http://x")):
        with pytest.raises(InvalidRequestError, match="create_rest_client"):
            make()
