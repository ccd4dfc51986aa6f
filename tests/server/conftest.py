"""A server on a free port in a thread, with engines that need no transformer; and clients of it."""

from __future__ import annotations

import asyncio
import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from ptlab.engines.protocols import Engines
from ptlab.engines.scripted import ScriptedSampler, ScriptedTrainer, unigram_info
from ptlab.errors import InvalidRequestError
from ptlab.server import wire_pb2
from ptlab.server.assembly import assembled
from ptlab.server.listen import address, bind, listen
from ptlab.server.settings import ServeSettings

BASE = "scripted/unigram"
KEY = "tml-anything"
PROTOBUF = {"content-type": "application/x-protobuf"}


def open_scripted(name: str) -> Engines:
    if name != BASE:
        raise InvalidRequestError(f"{name} is not served here; {BASE} is")
    info = unigram_info()
    return Engines(trainer=ScriptedTrainer(info), sampler=ScriptedSampler(info), tokenizer=None)


class RunningServer:
    """A server in a thread. `stop` ends it as SIGTERM does; `app` and `loop` are for tests that look inside."""

    def __init__(self, settings: ServeSettings, open_engines: Callable[[str], Engines], base_models: list[str], require_keys: bool) -> None:
        self.app: FastAPI
        self.loop: asyncio.AbstractEventLoop
        self.error: BaseException | None = None
        self._settings, self._open_engines, self._base_models, self._require_keys = settings, open_engines, base_models, require_keys
        self._stop: asyncio.Event
        self._ready = threading.Event()
        self._socket = bind(settings.host, settings.port)
        self.url = address(self._socket)
        self._thread = threading.Thread(target=self._run, name="test-server")
        self._thread.start()
        self._ready.wait(120)
        if self.error is not None:
            self._socket.close()
            raise self.error

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as err:
            self.error = err
        finally:
            self._ready.set()

    async def _main(self) -> None:
        self.loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with assembled(self._settings, self._open_engines, self._base_models, require_keys=self._require_keys) as self.app:
            await listen(self.app, self._socket, self._stop, self._ready.set)

    def call(self, coroutine: Any) -> Any:
        """Run a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)

    def client(self, key: str | None = KEY) -> httpx.Client:
        headers = {} if key is None else {"X-API-Key": key}
        return httpx.Client(base_url=f"{self.url}/api/v1/", headers=headers, timeout=60)

    def stop(self) -> None:
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(60)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error


@contextmanager
def serving(
    data_dir: Path,
    open_engines: Callable[[str], Engines] = open_scripted,
    base_models: tuple[str, ...] = (BASE,),
    require_keys: bool = False,
    **settings: Any,
) -> Iterator[RunningServer]:
    server = RunningServer(
        ServeSettings(data_dir=data_dir, **{"port": 0, "long_poll_s": 2.0, **settings}), open_engines, list(base_models), require_keys
    )
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One for a module's tests; each makes sessions of its own."""
    with serving(tmp_path_factory.mktemp("server")) as running:
        yield running


class Raw:
    """The Tinker protocol by hand, for what the SDK would never send."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http

    def post(self, path: str, body: Any, status: int = 200) -> Any:
        """The JSON of an answer that must have this status."""
        response = self.http.post(path, json=body)
        assert response.status_code == status, f"{path}: {response.status_code} {response.text}"
        return response.json() if response.content else None

    def get(self, path: str, status: int = 200) -> Any:
        response = self.http.get(path)
        assert response.status_code == status, f"{path}: {response.status_code} {response.text}"
        return response.json()

    def as_it_is(self, method: str, path: str, body: bytes = b"") -> int:
        """The status of a request whose path is sent unchanged: httpx resolves ".." itself."""
        connection = http.client.HTTPConnection(self.http.base_url.host, self.http.base_url.port)
        try:
            connection.putrequest(method, f"/api/v1/{path}", skip_accept_encoding=True)
            connection.putheader("X-API-Key", KEY)
            connection.putheader("content-length", str(len(body)))
            connection.endheaders(body)
            return connection.getresponse().status
        finally:
            connection.close()

    def session(self, **more: Any) -> str:
        return str(self.post("create_session", {"tags": [], "sdk_version": "0.38.0", **more})["session_id"])

    def model(self, session_id: str | None = None, number: int = 0, **lora: Any) -> str:
        body = {"session_id": session_id or self.session(), "model_seq_id": number, "base_model": BASE, "lora_config": {"rank": 4, **lora}}
        answer = self.result(self.post("create_model", body)["request_id"])
        return str(answer["model_id"])

    def result(self, request_id: str, polls: int = 60) -> Any:
        """The JSON a future gives."""
        response = self.poll(request_id, polls=polls)
        assert response.headers["content-type"] == "application/json", response.text
        return response.json()

    def poll(self, request_id: str, polls: int = 60, **more: Any) -> httpx.Response:
        for _ in range(polls):
            response = self.http.post("retrieve_future", json={"request_id": request_id, **more})
            if response.status_code != 408:
                break
        assert response.status_code == 200, f"{response.status_code} {response.text}"
        return response

    def forward_backward(self, model_id: str, seq_id: int, **more: Any) -> httpx.Response:
        return self.http.post("forward_backward", content=pass_body(model_id, seq_id, **more), headers=PROTOBUF)

    def output(self, request_id: str) -> wire_pb2.ForwardBackwardOutput:
        response = self.poll(request_id)
        assert response.headers["content-type"] == "application/x-protobuf", response.text
        return wire_pb2.ForwardBackwardOutput.FromString(response.content)

    def optim_step(self, model_id: str, seq_id: int, learning_rate: float = 0.1) -> str:
        body = {"model_id": model_id, "seq_id": seq_id, "adam_params": {"learning_rate": learning_rate}}
        return str(self.post("optim_step", body)["request_id"])

    def sampler(self, session_id: str, number: int = 0) -> str:
        body = {"session_id": session_id, "sampling_session_seq_id": number, "base_model": BASE}
        return str(self.post("create_sampling_session", body)["sampling_session_id"])

    def sample_body(self, sampler: str, seq_id: int, **more: Any) -> dict[str, Any]:
        prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}
        params = {"max_tokens": 4, "seed": 7, "temperature": 1.0, "top_k": -1, "top_p": 1.0}
        body = {"sampling_session_id": sampler, "seq_id": seq_id, "num_samples": 2, "prompt": prompt, "sampling_params": params}
        return {**body, "prompt_logprobs": False, **more}


def pass_body(
    model_id: str,
    seq_id: int,
    *,
    tokens: tuple[int, ...] = (1, 2, 3),
    targets: tuple[int, ...] = (2, 3, 4),
    weights: tuple[float, ...] = (1.0, 1.0, 1.0),
    num_datums: int = 1,
    loss_fn: str = "cross_entropy",
    forward_only: bool = False,
    **inputs: tuple[float, ...],
) -> bytes:
    """A ForwardBackwardRequest of equal datums."""
    message = wire_pb2.ForwardBackwardRequest(model_id=model_id, seq_id=seq_id, loss_fn=loss_fn, forward_only=forward_only)
    floats = {"weights": weights} if loss_fn == "cross_entropy" else dict(inputs)
    for _ in range(num_datums):
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = np.array(tokens, "<i4").tobytes()
        target = datum.loss_fn_inputs["target_tokens"]
        target.dense, target.dtype = np.array(targets, "<i8").tobytes(), wire_pb2.DTYPE_INT64
        for name, values in floats.items():
            tensor = datum.loss_fn_inputs[name]
            tensor.dense, tensor.dtype = np.array(values, "<f4").tobytes(), wire_pb2.DTYPE_FLOAT32
    encoded: bytes = message.SerializeToString()
    return encoded


@pytest.fixture
def raw(server: RunningServer) -> Iterator[Raw]:
    with server.client() as client:
        yield Raw(client)


@pytest.fixture
def raw_of() -> Callable[[httpx.Client], Raw]:
    """Raw, for tests with servers of their own."""
    return Raw


@pytest.fixture
def serve() -> Callable[..., Any]:
    """`serving`, for tests that start servers of their own."""
    return serving


@pytest.fixture
def make_pass() -> Callable[..., bytes]:
    """pass_body, for tests that send it themselves."""
    return pass_body


@pytest.fixture(scope="module")
def serving_of_module() -> Callable[..., Any]:
    """`serving`, for fixtures of a module."""
    return serving
