"""Our clients against the installed official SDK's: the same methods, parameters, order, kinds and defaults.

Wanted differences stand here with their reasons; a difference that is not listed fails, and so does a listed one that is gone.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import pytest

import ptlab

tinker: Any = pytest.importorskip("tinker", reason="tinker (dev extra) is not installed")

CLIENTS = ["ServiceClient", "TrainingClient", "SamplingClient", "RestClient", "APIFuture"]
OWN_METHODS: Mapping[str, Mapping[str, str]] = {
    "ServiceClient": {"import_adapter": "weights that lie in a directory of this machine; a hosted service has no such directory"},
    "TrainingClient": {
        "holder": "an attribute of the instance there, a property here",
        "model_id": "an attribute of the instance there, a property here",
    },
    "SamplingClient": {"sampling_session_id": "names the sampler for RestClient.get_sampler"},
    "RestClient": {
        "get_checkpoint_archive_url": "in the SDK until 0.33; the cookbook still calls it",
        "get_checkpoint_archive_url_async": "in the SDK until 0.33; the cookbook still calls it",
        "get_checkpoint_archive_url_from_tinker_path": "in the SDK until 0.33; the cookbook still calls it",
        "get_checkpoint_archive_url_from_tinker_path_async": "in the SDK until 0.33; the cookbook still calls it",
    },
    "APIFuture": {name: "it is a concurrent.futures.Future at the same time" for name in (
        "add_done_callback", "cancel", "cancelled", "done", "exception", "running", "set_exception", "set_result",
        "set_running_or_notify_cancel",
    )},
}  # fmt: skip
MISSING_METHODS: Mapping[str, Mapping[str, str]] = {
    "SamplingClient": {
        "create": "internal: makes a client from the SDK's connection holder",
        "on_queue_state_change": "internal: called by the SDK's own retry machinery",
    },
}
DIFFERENT_PARAMETERS: Mapping[str, str] = {
    "ServiceClient.__init__": "one keyword more, `connection`: the backend to use",
    "TrainingClient.__init__": "internal in both; clients come from a ServiceClient",
    "SamplingClient.__init__": "internal in both; clients come from a ServiceClient",
    "APIFuture.__init__": "internal in both; futures come from the clients",
    "ServiceClient.__exit__": "positional only by protocol; the names of the three arguments differ",
}


def methods(kind: type) -> dict[str, Any]:
    return {
        name: member
        for name, member in inspect.getmembers(kind)
        if not name.startswith("_") or name in ("__init__", "__enter__", "__exit__")
    }


def shape(function: Any) -> list[tuple[str, str, Any]]:
    return [(p.name, p.kind.name, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("client", CLIENTS)
def test_the_methods_are_the_same(client: str) -> None:
    theirs, ours = set(methods(getattr(tinker, client))), set(methods(getattr(ptlab, client)))
    assert theirs - ours == set(MISSING_METHODS.get(client, {}))
    assert ours - theirs == set(OWN_METHODS[client])


@pytest.mark.parametrize("client", CLIENTS)
def test_names_order_and_defaults_of_the_parameters_are_the_same(client: str) -> None:
    theirs, ours = methods(getattr(tinker, client)), methods(getattr(ptlab, client))
    different = set()
    for name in sorted(set(theirs) & set(ours)):
        if not inspect.isroutine(theirs[name]):
            assert isinstance(inspect.getattr_static(getattr(ptlab, client), name), property)
        elif inspect.isroutine(ours[name]) and shape(theirs[name]) != shape(ours[name]):
            different.add(f"{client}.{name}")
    assert different == {name for name in DIFFERENT_PARAMETERS if name.startswith(f"{client}.")}


@pytest.mark.parametrize("client", CLIENTS)
def test_what_is_a_coroutine_there_is_one_here(client: str) -> None:
    theirs, ours = methods(getattr(tinker, client)), methods(getattr(ptlab, client))
    for name in set(theirs) & set(ours):
        assert inspect.iscoroutinefunction(inspect.unwrap(theirs[name])) == inspect.iscoroutinefunction(ours[name]), name


def test_the_constructor_has_theirs_and_one_more() -> None:
    theirs, ours = shape(tinker.ServiceClient), shape(ptlab.ServiceClient)
    assert [p for p in ours if p[0] != "connection"] == theirs


def test_a_created_client_is_of_both_kinds_as_there() -> None:
    from ptlab.client.sampling import PendingSamplingClient
    from ptlab.client.training import PendingTrainingClient

    assert issubclass(tinker.BackcompatTrainingClientFuture, (tinker.TrainingClient, tinker.APIFuture))
    assert issubclass(PendingTrainingClient, ptlab.TrainingClient) and issubclass(PendingTrainingClient, ptlab.APIFuture)
    assert issubclass(PendingSamplingClient, ptlab.SamplingClient) and issubclass(PendingSamplingClient, ptlab.APIFuture)
