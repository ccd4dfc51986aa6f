"""A small backend behind real clients: it keeps the real order, records what it was asked, and has a model of one number."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import pytest

from ptlab.backend.backend import Backend
from ptlab.backend.sequencer import Sequencer
from ptlab.client.connection import BackendConnection
from ptlab.client.service import ServiceClient
from ptlab.errors import InvalidRequestError, NotFoundError
from ptlab.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    GetInfoResponse,
    GetSamplerResponse,
    LoadWeightsResponse,
    ModelData,
    OptimStepResponse,
    SampledSequence,
    SampleResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
    TensorData,
)


class FakeBackend:
    """The model is one number theta = 2.0: the log-probability of target t is -theta * (t + 1) / 10."""

    theta = 2.0

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.ran: list[tuple[str, int]] = []
        self.gradient = 0.0
        self.gates: dict[str, threading.Event] = {}
        self.fail: dict[str, Exception] = {}
        self.aborted: list[str] = []
        self.released: list[str] = []
        self._sequencers: dict[str, Sequencer] = defaultdict(Sequencer)
        self.samplers: dict[str, str] = {}

    async def _do(self, name: str, /, **arguments: Any) -> None:
        self.calls.append((name, arguments))
        try:
            while name in self.gates and not self.gates[name].is_set():
                await asyncio.sleep(0.002)
        except asyncio.CancelledError:
            self.aborted.append(name)
            raise
        if name in self.fail:
            raise self.fail[name]

    async def _ordered(self, operation: str, model_id: str, seq_id: int, result: Callable[[], Any], /, **arguments: Any) -> Any:
        async def run() -> Any:
            await self._do(operation, seq_id=seq_id, **arguments)
            self.ran.append((operation, seq_id))
            return result()

        return await self._sequencers[model_id].run(seq_id, f"{operation} {seq_id}", run)

    async def create_session(self, **arguments: Any) -> str:
        await self._do("create_session", **arguments)
        return "s"

    async def finish_session(self, session_id: str, *, status: str, detail: str | None = None) -> None:
        await self._do("finish_session", session_id=session_id, status=status, detail=detail)

    async def create_model(self, *, session_id: str, model_seq_id: int, **arguments: Any) -> str:
        model_id = f"{session_id}:train:{model_seq_id}"
        return cast(str, await self._ordered("create_model", model_id, 0, lambda: model_id, **arguments))

    async def create_model_from_state(self, *, session_id: str, model_seq_id: int, **arguments: Any) -> str:
        model_id = f"{session_id}:train:{model_seq_id}"
        return cast(str, await self._ordered("create_model_from_state", model_id, 0, lambda: model_id, **arguments))

    async def get_info(self, model_id: str) -> GetInfoResponse:
        return GetInfoResponse(model_data=ModelData(), model_id=model_id, model_name="base")

    async def get_tokenizer(self, base_model: str) -> str:
        return f"tokenizer of {base_model}"

    def _pass(self, data: Sequence[Datum], *, learn: bool) -> ForwardBackwardOutput:
        outputs, loss_sum = [], 0.0
        for datum in data:
            targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
            weights = datum.loss_fn_inputs["weights"].to_numpy()
            slope = -(targets + 1) / 10
            if learn:
                self.gradient += float((-weights * slope).sum())
            loss_sum += float((-weights * slope * self.theta).sum())
            outputs.append({"logprobs": TensorData.from_numpy((slope * self.theta).astype(np.float32))})
        return ForwardBackwardOutput("fake", outputs, {"loss:sum": loss_sum, "clock:mean": 1.0})

    async def forward(self, *, model_id: str, seq_id: int, data: Sequence[Datum], **arguments: Any) -> Any:
        return await self._ordered("forward", model_id, seq_id, lambda: self._pass(data, learn=False), data=data, **arguments)

    async def forward_backward(self, *, model_id: str, seq_id: int, data: Sequence[Datum], **arguments: Any) -> Any:
        return await self._ordered("forward_backward", model_id, seq_id, lambda: self._pass(data, learn=True), data=data, **arguments)

    async def optim_step(self, *, model_id: str, seq_id: int, adam: AdamParams) -> Any:
        return await self._ordered("optim_step", model_id, seq_id, lambda: OptimStepResponse(metrics={"grad": self.gradient}), adam=adam)

    async def save_state(self, *, model_id: str, seq_id: int, name: str, **arguments: Any) -> Any:
        response = SaveWeightsResponse(path=f"tinker://{model_id}/weights/{name}")
        return await self._ordered("save_state", model_id, seq_id, lambda: response, name=name, **arguments)

    async def save_weights_for_sampler(self, *, model_id: str, seq_id: int, name: str, **arguments: Any) -> Any:
        response = SaveWeightsForSamplerResponse(path=f"tinker://{model_id}/sampler_weights/{name}")
        return await self._ordered("save_weights_for_sampler", model_id, seq_id, lambda: response, name=name, **arguments)

    async def load_state(self, *, model_id: str, seq_id: int, **arguments: Any) -> Any:
        return await self._ordered("load_state", model_id, seq_id, lambda: LoadWeightsResponse(model_id=model_id), **arguments)

    async def save_weights_for_ephemeral_sampler(self, *, model_id: str, seq_id: int, sampling_session_id: str) -> None:
        def open_session() -> None:
            self.samplers[sampling_session_id] = f"weights after {len(self.ran)} requests"

        await self._ordered("save_weights_for_ephemeral_sampler", model_id, seq_id, open_session)

    @property
    def sampling(self) -> FakeBackend:
        return self

    async def create_sampling_session(self, *, sampling_session_id: str, **arguments: Any) -> None:
        await self._do("create_sampling_session", **arguments)
        self.samplers[sampling_session_id] = "saved"

    async def release_sampling_session(self, sampling_session_id: str) -> None:
        self.samplers.pop(sampling_session_id, None)
        self.released.append(sampling_session_id)

    async def get_sampler(self, sampling_session_id: str) -> GetSamplerResponse:
        if sampling_session_id not in self.samplers:
            raise NotFoundError(sampling_session_id)
        return GetSamplerResponse(sampler_id=sampling_session_id, base_model="base")

    async def sample(self, *, sampling_session_id: str, prompt: Any, num_samples: int, **arguments: Any) -> SampleResponse:
        await self._do("sample", prompt=prompt, num_samples=num_samples, **arguments)
        if sampling_session_id not in self.samplers:
            raise NotFoundError(f"{sampling_session_id} was released")
        if num_samples < 1:
            raise InvalidRequestError("num_samples")
        sequences = [SampledSequence.from_lists([1], [-0.5], stop_reason="stop", sequence_id=str(i)) for i in range(num_samples)]
        scored = np.array([np.nan, -1.0], dtype=np.float32) if arguments["include_prompt_logprobs"] else None
        return SampleResponse(sequences, scored)


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def connection(backend: FakeBackend) -> Iterator[BackendConnection]:
    opened = BackendConnection(cast(Backend, backend))
    yield opened
    for gate in backend.gates.values():
        gate.set()
    opened.close()


@pytest.fixture
def service(connection: BackendConnection) -> ServiceClient:
    return ServiceClient(connection=connection)


@pytest.fixture
def make_datum() -> Callable[..., Datum]:
    def make(targets: Any = (1, 2, 3), **inputs: Any) -> Datum:
        from ptlab.types import ModelInput

        tokens = TensorData.from_numpy(np.array(targets, dtype=np.int64))
        given: Mapping[str, Any] = {"target_tokens": tokens, **inputs}
        return Datum(ModelInput.from_ints(list(range(len(targets)))), dict(given))

    return make
