"""uvicorn on the running loop, until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Final

import uvicorn
from fastapi import FastAPI

from ptlab.errors import ConfigError

KEEP_ALIVE_S: Final = 120
"""Longer than clients keep idle connections: a connection that the server closes just as a request comes is an error there."""
LAST_ANSWERS_S: Final = 5
"""For requests in flight when the server stops; who waits for a result is answered at once."""


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet, so that nobody connects before the models are open. Raises: ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # with its protocol named: only then does asyncio set TCP_NODELAY, without which an answer in two packets takes 40 ms
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that was just stopped may start again
    try:
        bound.bind((host, port))
    except OSError as err:
        bound.close()
        raise _not_free(host, port, err) from err
    return bound


def _not_free(host: str, port: int, err: OSError) -> ConfigError:
    return ConfigError(f"cannot listen on {host} port {port}: {err.strerror}; choose another --port, or stop what uses it")


def address(bound: socket.socket) -> str:
    """http://host:port of a bound socket, as a client on this machine reaches it."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def listen(app: FastAPI, bound: socket.socket, stop: asyncio.Event, on_started: Callable[[], None]) -> None:
    """Serve until `stop` is set; then take no more requests and finish those in flight.

    Args:
        on_started: called once connections are taken.
    """
    config = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=LAST_ANSWERS_S,
    )
    server = _Uvicorn(config, on_started)
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            app.state.context.stopping.set()
            server.should_exit = True
        try:
            await serving
        except OSError as err:  # two sockets may be bound to a port, but only one listens
            host, port = bound.getsockname()[:2]
            raise _not_free(host, port, err) from err
    finally:
        stopping.cancel()


class _Uvicorn(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the caller's: uvicorn would raise them again at its end, and the process would die before models are parked."""
        yield
