"""The socket, and an end that is told to every connection."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from ptlab.errors import ConfigError
from ptlab.server.listen import address, bind, listen


def test_a_bound_socket_takes_no_connection_yet() -> None:
    with bind("127.0.0.1", 0) as bound:
        assert bound.proto == socket.IPPROTO_TCP  # else asyncio leaves TCP_NODELAY off, and every answer takes 40 ms longer
        with pytest.raises(httpx.ConnectError):
            httpx.get(address(bound))
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="choose another --port"):
        bind("127.0.0.1", taken.getsockname()[1])


def test_of_two_servers_that_start_together_the_second_is_told(serve: Callable[..., Any], tmp_path: Path) -> None:
    with bind("127.0.0.1", 0) as early:
        port = early.getsockname()[1]
        with serve(tmp_path / "a", port=port), pytest.raises(ConfigError, match="choose another --port"):
            asyncio.run(listen(FastAPI(), early, asyncio.Event(), lambda: None))


def test_addresses_are_what_a_client_can_use() -> None:
    with bind("0.0.0.0", 0) as anywhere, bind("::1", 0) as six:
        assert address(anywhere) == f"http://127.0.0.1:{anywhere.getsockname()[1]}"
        assert address(six) == f"http://[::1]:{six.getsockname()[1]}"


def test_small_answers_are_sent_at_once(server: Any) -> None:
    with server.client() as http:
        http.get("healthz")
        times = []
        for _ in range(20):
            began = time.perf_counter()
            http.get("healthz")
            times.append(time.perf_counter() - began)
    assert min(times) < 0.03  # 0.5 ms; 40 ms with delayed acknowledgements
