"""The backend's thread, and the session that begins with the first use."""

from __future__ import annotations

import asyncio
import logging
import pickle
import threading
import time
from typing import Any

import pytest

from ptlab.client.connection import BackendConnection, Session
from ptlab.errors import InvalidRequestError


async def _thread_name() -> str:
    return threading.current_thread().name


def test_coroutines_run_on_the_backends_thread_whoever_submits(connection: BackendConnection) -> None:
    assert connection.submit(_thread_name()).result(5) == "ptlab-backend"

    async def main() -> str:
        return await connection.submit(_thread_name())

    assert [asyncio.run(main()) for _ in range(2)] == ["ptlab-backend"] * 2


def test_result_in_a_callback_on_the_backends_thread_is_refused(connection: BackendConnection) -> None:
    refused: list[BaseException] = []

    async def submit_and_wait() -> None:
        try:
            connection.submit(_thread_name()).result()
        except RuntimeError as err:
            refused.append(err)

    connection.submit(submit_and_wait()).result(5)
    assert "wait for ever" in str(refused[0])


def test_close_cancels_what_runs_ends_the_thread_and_refuses_more(connection: BackendConnection) -> None:
    sleeping = connection.submit(asyncio.sleep(60))
    connection.close()
    connection.close()
    assert sleeping.cancelled() and not connection.thread.is_alive()
    with pytest.raises(InvalidRequestError, match="closed"):
        connection.submit(asyncio.sleep(0))


def test_a_failure_that_nobody_waits_for_is_logged(connection: BackendConnection, caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise LookupError("lost")

    with caplog.at_level(logging.WARNING):
        connection.submit_and_log(fail(), "tidying")
        connection.submit(asyncio.sleep(0.01)).result(5)
    assert [record.getMessage() for record in caplog.records] == ["tidying failed: lost"]


def test_the_session_begins_once_with_the_first_use_also_with_many_threads(connection: BackendConnection, backend: Any) -> None:
    opened: list[int] = []

    def open_connection() -> BackendConnection:
        time.sleep(0.01)
        opened.append(1)
        return connection

    session = Session(open_connection, user_metadata={"a": "b"}, project_id=None, display_name="n")
    assert opened == [] and backend.calls == []
    threads = [threading.Thread(target=session.next_sampler_id) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert opened == [1] and [name for name, _ in backend.calls] == ["create_session"]
    assert backend.calls[0][1] == {"user_metadata": {"a": "b"}, "project_id": None, "display_name": "n"}
    assert session.next_sampler_id() == "s:sample:8"


def test_a_connection_says_why_it_cannot_be_pickled(connection: BackendConnection) -> None:
    with pytest.raises(InvalidRequestError, match="ptlab server"):
        pickle.dumps(connection)
