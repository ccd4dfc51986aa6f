"""TrainingClient: one trainable adapter. Requests run in the order of the calls, whatever is awaited when."""

from __future__ import annotations

import concurrent.futures
import threading
import warnings
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeVar

from ptlab.client import custom_loss
from ptlab.client.connection import Session, settled
from ptlab.client.custom_loss import CustomLossFn
from ptlab.client.refusals import check_path, refuse_access_token, refuse_to_pickle
from ptlab.client.sampling import PendingSamplingClient, SamplerHandle, SamplingClient, open_sampling_client
from ptlab.errors import EngineError, InvalidRequestError
from ptlab.futures import APIFuture
from ptlab.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    GetInfoResponse,
    LoadWeightsResponse,
    LossFnType,
    OptimParams,
    OptimStepResponse,
    SamplingClientKind,
    SaveWeightsExternalResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
    as_adam_params,
    as_datum,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Turn:
    """A place in the order of a model's requests."""

    seq_ids: list[int]
    after: concurrent.futures.Future[None] | None
    """The custom loss to wait for."""


class ModelHandle:
    """A model of the backend and the order of the requests to it, shared by its clients.

    Args:
        create: makes the model; starts at once, and is not cancelled by anyone.
    """

    def __init__(self, session: Session, model_id: str, create: Callable[[], Coroutine[Any, Any, str]]) -> None:
        connection = session.connection

        async def creating() -> GetInfoResponse:
            await create()
            return await connection.backend.get_info(model_id)

        self.session = session
        self.connection = connection
        self.model_id = model_id
        self.created: APIFuture[GetInfoResponse] = connection.submit(creating())
        self._lock = threading.Lock()
        self._next_seq_id = 1  # 0 is the creation
        self._custom: concurrent.futures.Future[None] | None = None
        self._failure: BaseException | None = None

    def reserve(self) -> _Turn:
        """The next place in the order. Raises: RuntimeError after a failed custom loss."""
        with self._lock:
            return self._reserve(1)

    async def wait_for(self, turn: _Turn) -> None:
        """Wait on the backend's loop until the request may be sent: the model exists and custom losses before it are done."""
        await settled(self.created)
        self.created.result()
        if turn.after is not None:
            await settled(turn.after)
            self._refuse_if_poisoned()

    def request(self, send: Callable[[int], Coroutine[Any, Any, T]]) -> APIFuture[T]:
        """Queue a request; its place in the order is fixed when this returns.

        Args:
            send: called on the backend's loop with the request's seq_id.
        """
        turn = self.reserve()

        async def run() -> T:
            await self.wait_for(turn)
            return await send(turn.seq_ids[0])

        return self._submit(run())

    def custom_request(self, run: Callable[[int, int], Coroutine[Any, Any, T]]) -> APIFuture[T]:
        """Queue two requests with client code between them. Later requests are sent when it is over, and not at all if it failed."""
        over: concurrent.futures.Future[None] = concurrent.futures.Future()
        with self._lock:
            turn = self._reserve(2)
            self._custom = over

        async def run_and_tell() -> T:
            try:
                await self.wait_for(turn)
                return await run(*turn.seq_ids)
            except BaseException as err:
                self._failure = self._failure or err
                raise
            finally:
                over.set_result(None)

        return self._submit(run_and_tell())

    def _reserve(self, count: int) -> _Turn:
        self._refuse_if_poisoned()
        first, self._next_seq_id = self._next_seq_id, self._next_seq_id + count
        return _Turn(list(range(first, first + count)), self._custom)

    def _refuse_if_poisoned(self) -> None:
        if self._failure is not None:
            raise RuntimeError(
                f"a custom loss of this TrainingClient failed ({self._failure!r}); its gradient is missing, so nothing more is sent; "
                "go on with a new client, create_training_client_from_state_with_optimizer(path of the last save_state)"
            ) from self._failure

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> APIFuture[T]:
        # a request has its place in the order for good: giving up the wait does not take it out
        return APIFuture(self.connection.submit(coroutine), owner=self.connection.thread, cancels_source=False)


class TrainingClient:
    """Trains one LoRA adapter on one base model.

    Every method reserves its place in the order before it returns; nothing needs to be awaited for the next call. Gradients of
    successive forward_backward calls add up until optim_step. A request that fails does not stop later ones, except
    forward_backward_custom. Cancelling a future of a training request gives up the wait; the request runs.
    """

    def __init__(self, handle: ModelHandle) -> None:
        self._handle = handle

    @property
    def model_id(self) -> str:
        return self._handle.model_id

    @property
    def holder(self) -> Session:
        """The session this client belongs to."""
        return self._handle.session

    # -- training

    def forward(
        self, data: list[Datum], loss_fn: LossFnType, loss_fn_config: Mapping[str, float | str] | None = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """Log-probabilities and loss without gradients."""
        batch, config = _batch(data), _config(loss_fn_config)
        model_id, backend = self.model_id, self._handle.connection.backend
        return self._handle.request(
            lambda seq_id: backend.forward(model_id=model_id, seq_id=seq_id, data=batch, loss_fn=loss_fn, loss_fn_config=config)
        )

    async def forward_async(
        self, data: list[Datum], loss_fn: LossFnType, loss_fn_config: Mapping[str, float | str] | None = None
    ) -> APIFuture[ForwardBackwardOutput]:
        return self.forward(data, loss_fn, loss_fn_config)

    def forward_backward(
        self, data: list[Datum], loss_fn: LossFnType, loss_fn_config: Mapping[str, float | str] | None = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """Add the gradient of the loss, summed over all tokens of all datums.

        Raises (from the future): InvalidRequestError that names the datum, the field, what was found and what is needed.
        """
        batch, config = _batch(data), _config(loss_fn_config)
        model_id, backend = self.model_id, self._handle.connection.backend
        return self._handle.request(
            lambda seq_id: backend.forward_backward(model_id=model_id, seq_id=seq_id, data=batch, loss_fn=loss_fn, loss_fn_config=config)
        )

    async def forward_backward_async(
        self, data: list[Datum], loss_fn: LossFnType, loss_fn_config: Mapping[str, float | str] | None = None
    ) -> APIFuture[ForwardBackwardOutput]:
        return self.forward_backward(data, loss_fn, loss_fn_config)

    def forward_backward_custom(
        self, data: list[Datum], loss_fn: CustomLossFn, *, loss_type_input: Literal["logprobs"] | None = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """Add the gradient of a loss of your own: `loss_fn(data, logprobs_list) -> (scalar tensor, metrics)`.

        Two passes: log-probabilities of target_tokens ((N,) or (N, K)) come to `loss_fn`, which runs on a thread of its own; its
        gradient goes back as weights of a cross_entropy. metrics["loss:sum"] is your loss, "surrogate_loss:sum" that cross_entropy's.
        `weights` of the datums, if any, are for your loss to read; they do not weigh the gradient.
        If it fails, this client sends nothing more (also not what is queued already): RuntimeError.
        """
        if loss_type_input not in (None, "logprobs"):
            raise InvalidRequestError(f"loss_type_input {loss_type_input!r} is unknown; a custom loss is a function of 'logprobs'")
        batch, given = _batch(data), list(data)
        first_pass = custom_loss.forward_data(batch)
        model_id, backend = self.model_id, self._handle.connection.backend

        async def run(forward_seq_id: int, backward_seq_id: int) -> ForwardBackwardOutput:
            kind = custom_loss.SURROGATE_LOSS
            scored = await backend.forward(model_id=model_id, seq_id=forward_seq_id, data=first_pass, loss_fn=kind)
            loss = await custom_loss.in_own_thread(lambda: custom_loss.compute(batch, given, loss_fn, scored))
            return loss.describe(await backend.forward_backward(model_id=model_id, seq_id=backward_seq_id, data=loss.data, loss_fn=kind))

        return self._handle.custom_request(run)

    async def forward_backward_custom_async(
        self, data: list[Datum], loss_fn: CustomLossFn, *, loss_type_input: Literal["logprobs"] | None = None
    ) -> APIFuture[ForwardBackwardOutput]:
        return self.forward_backward_custom(data, loss_fn, loss_type_input=loss_type_input)

    def optim_step(self, optim_params: OptimParams | None = None, *, adam_params: AdamParams | None = None) -> APIFuture[OptimStepResponse]:
        """One AdamW step with the accumulated gradients, which are zero afterwards.

        Raises: ValueError unless exactly one of the two is given; TypeError if it is not AdamParams.
        """
        if (optim_params is None) == (adam_params is None):
            raise InvalidRequestError("optim_step needs exactly one of optim_params and adam_params")
        adam = as_adam_params(optim_params if adam_params is None else adam_params)
        model_id, backend = self.model_id, self._handle.connection.backend
        return self._handle.request(lambda seq_id: backend.optim_step(model_id=model_id, seq_id=seq_id, adam=adam))

    async def optim_step_async(
        self, optim_params: OptimParams | None = None, *, adam_params: AdamParams | None = None
    ) -> APIFuture[OptimStepResponse]:
        return self.optim_step(optim_params, adam_params=adam_params)

    # -- saving and loading

    def save_state(
        self, name: str, ttl_seconds: int | None = None, overwrite: bool = False, user_metadata: dict[str, str] | None = None
    ) -> APIFuture[SaveWeightsResponse]:
        """Save weights and optimizer to go on from: `.path` is tinker://<model_id>/weights/<name>."""
        model_id, backend = self.model_id, self._handle.connection.backend
        return self._handle.request(
            lambda seq_id: backend.save_state(
                model_id=model_id, seq_id=seq_id, name=name, ttl_seconds=ttl_seconds, overwrite=overwrite, user_metadata=user_metadata
            )
        )

    async def save_state_async(
        self, name: str, ttl_seconds: int | None = None, overwrite: bool = False, user_metadata: dict[str, str] | None = None
    ) -> APIFuture[SaveWeightsResponse]:
        return self.save_state(name, ttl_seconds, overwrite, user_metadata)

    def save_weights_for_sampler(
        self, name: str, ttl_seconds: int | None = None, user_metadata: dict[str, str] | None = None
    ) -> APIFuture[SaveWeightsForSamplerResponse]:
        """Save weights to sample from: `.path` is tinker://<model_id>/sampler_weights/<name>."""
        model_id, backend = self.model_id, self._handle.connection.backend
        return self._handle.request(
            lambda seq_id: backend.save_weights_for_sampler(
                model_id=model_id, seq_id=seq_id, name=name, ttl_seconds=ttl_seconds, user_metadata=user_metadata
            )
        )

    async def save_weights_for_sampler_async(
        self, name: str, ttl_seconds: int | None = None, user_metadata: dict[str, str] | None = None
    ) -> APIFuture[SaveWeightsForSamplerResponse]:
        return self.save_weights_for_sampler(name, ttl_seconds, user_metadata)

    def save_weights_external(
        self, name: str, ttl_seconds: int | None = None, age_encryption_recipients: list[str] | None = None
    ) -> APIFuture[SaveWeightsExternalResponse]:
        """Save weights for other programs (PEFT layout): `.path` is tinker://<model_id>/external_weights/<name>.

        Raises: InvalidRequestError if encryption is asked for; nothing is written then.
        """
        if age_encryption_recipients is not None:
            raise InvalidRequestError("ptlab does not encrypt exported weights; leave out age_encryption_recipients and encrypt the files")
        model_id, backend = self.model_id, self._handle.connection.backend
        return self._handle.request(
            lambda seq_id: backend.save_weights_external(model_id=model_id, seq_id=seq_id, name=name, ttl_seconds=ttl_seconds)
        )

    async def save_weights_external_async(
        self, name: str, ttl_seconds: int | None = None, age_encryption_recipients: list[str] | None = None
    ) -> APIFuture[SaveWeightsExternalResponse]:
        return self.save_weights_external(name, ttl_seconds, age_encryption_recipients)

    def load_state(self, path: str, weights_access_token: str | None = None) -> APIFuture[LoadWeightsResponse]:
        """Load weights into this model; the optimizer starts afresh."""
        return self._load(path, weights_access_token, with_optimizer=False)

    async def load_state_async(self, path: str, weights_access_token: str | None = None) -> APIFuture[LoadWeightsResponse]:
        return self.load_state(path, weights_access_token)

    def load_state_with_optimizer(self, path: str, weights_access_token: str | None = None) -> APIFuture[LoadWeightsResponse]:
        """Load weights and optimizer into this model: it continues bit for bit."""
        return self._load(path, weights_access_token, with_optimizer=True)

    async def load_state_with_optimizer_async(self, path: str, weights_access_token: str | None = None) -> APIFuture[LoadWeightsResponse]:
        return self.load_state_with_optimizer(path, weights_access_token)

    def _load(self, path: str, weights_access_token: str | None, *, with_optimizer: bool) -> APIFuture[LoadWeightsResponse]:
        refuse_access_token(weights_access_token)
        check_path(path)
        model_id, backend = self.model_id, self._handle.connection.backend
        return self._handle.request(
            lambda seq_id: backend.load_state(model_id=model_id, seq_id=seq_id, path=path, with_optimizer=with_optimizer)
        )

    # -- sampling from this model

    def save_weights_and_get_sampling_client(
        self,
        name: str | None = None,
        retry_config: Any = None,
        record_stability_info: bool = False,
        kind: SamplingClientKind = "snapshot",
    ) -> PendingSamplingClient:
        """A client of the weights as they are after all requests made so far. Nothing is kept on disk when it is gone.

        Args:
            name: ignored, as in the official SDK (DeprecationWarning).
            retry_config: accepted and without effect in-process.
            record_stability_info: what is sampled stays on record for a day, for the loss stable_reinforce.
            kind: only "snapshot".
        Raises: InvalidRequestError for kind "inflight", weights that change under a client: versions never change here.
        """
        del retry_config
        if name is not None:
            warnings.warn("the name is ignored: these weights are not saved under a path", DeprecationWarning, stacklevel=2)
        if kind != "snapshot":
            raise InvalidRequestError(
                f"kind {kind!r}: the weights of a ptlab sampling client never change; use 'snapshot' and take a new client after each step"
            )
        handle, backend = self._handle, self._handle.connection.backend
        sampling_session_id = handle.session.next_sampler_id()
        turn = handle.reserve()

        async def open_session() -> None:
            await handle.wait_for(turn)
            await backend.save_weights_for_ephemeral_sampler(
                model_id=handle.model_id, seq_id=turn.seq_ids[0], sampling_session_id=sampling_session_id
            )

        return PendingSamplingClient(
            SamplerHandle(handle.connection, sampling_session_id, open_session, record_stability_info=record_stability_info)
        )

    async def save_weights_and_get_sampling_client_async(
        self,
        name: str | None = None,
        retry_config: Any = None,
        record_stability_info: bool = False,
        kind: SamplingClientKind = "snapshot",
    ) -> SamplingClient:
        """As `await save_weights_and_get_sampling_client(...)`: the client, ready."""
        return await self.save_weights_and_get_sampling_client(name, retry_config, record_stability_info, kind)

    def create_sampling_client(
        self, model_path: str, retry_config: Any = None, record_stability_info: bool = False
    ) -> PendingSamplingClient:
        """A client of weights saved by save_weights_for_sampler."""
        del retry_config
        return open_sampling_client(
            self._handle.session, model_path=model_path, base_model=None, record_stability_info=record_stability_info
        )

    async def create_sampling_client_async(
        self, model_path: str, retry_config: Any = None, record_stability_info: bool = False
    ) -> SamplingClient:
        return await self.create_sampling_client(model_path, retry_config, record_stability_info)

    # -- what it is

    def get_info(self) -> GetInfoResponse:
        """Base model, rank and optimizer; waits until the model exists."""
        return self._handle.created.result()

    async def get_info_async(self) -> GetInfoResponse:
        return await APIFuture(self._handle.created, cancels_source=False)

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer of the base model (Any: only engines import transformers)."""
        connection, base_model = self._handle.connection, self.get_info().model_name
        if base_model is None:
            raise EngineError(f"the backend does not say which base model {self.model_id} has", engine="backend", operation="get_info")
        return connection.submit(connection.backend.get_tokenizer(base_model)).result()

    def get_console_url(self) -> str:
        """The model id: ptlab has no web console."""
        return self.model_id

    def get_telemetry(self) -> None:
        """None: ptlab sends no telemetry."""

    def __reduce__(self) -> NoReturn:
        refuse_to_pickle("a TrainingClient")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model_id!r})"


class PendingTrainingClient(TrainingClient, APIFuture[TrainingClient]):
    """A TrainingClient that can be used at once, and a future of it: `.result()` and `await` give the client when the model exists.

    If it cannot be created, `.result()`, `await` and every request raise why.
    """

    def __init__(self, handle: ModelHandle) -> None:
        TrainingClient.__init__(self, handle)
        APIFuture.__init__(
            self, handle.created, convert=lambda _: TrainingClient(handle), owner=handle.connection.thread, cancels_source=False
        )


def _batch(data: Sequence[Any]) -> list[Datum]:
    if len(data) == 0:
        raise InvalidRequestError("No data provided: a batch needs at least one datum")
    batch: list[Datum] = []
    for index, datum in enumerate(data):
        try:
            batch.append(as_datum(datum))
        except TypeError as err:
            raise TypeError(f"data[{index}]: {err}") from err
    return batch


def _config(loss_fn_config: Mapping[str, float | str] | None) -> dict[str, float | str] | None:
    return None if loss_fn_config is None else dict(loss_fn_config)
