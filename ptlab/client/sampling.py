"""SamplingClient: draws from one fixed version of the weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from ptlab.client.connection import BackendConnection, Session, settled
from ptlab.client.refusals import check_path, refuse_to_pickle
from ptlab.errors import InvalidRequestError
from ptlab.futures import APIFuture
from ptlab.types import (
    GetSamplerResponse,
    ModelInput,
    SampleResponse,
    SamplingParams,
    TensorData,
    as_model_input,
    as_sampling_params,
    as_tensor_data,
)


class SamplerHandle:
    """A sampling session of the backend; released when the last client and the last request that use it are gone.

    Args:
        open_session: opens it; starts at once, and is not cancelled by anyone.
        record_stability_info: what is sampled stays on record for a day, for the loss stable_reinforce.
    """

    def __init__(
        self,
        connection: BackendConnection,
        sampling_session_id: str,
        open_session: Callable[[], Coroutine[Any, Any, None]],
        *,
        record_stability_info: bool,
    ) -> None:
        async def opening() -> GetSamplerResponse:
            await open_session()
            return await connection.backend.sampling.get_sampler(sampling_session_id)

        self.connection = connection
        self.sampling_session_id = sampling_session_id
        self.record_stability_info = record_stability_info
        self.opened: APIFuture[GetSamplerResponse] = connection.submit(opening())
        finalizer = weakref.finalize(self, _release, connection, sampling_session_id)
        finalizer.atexit = False  # the backend goes with the process

    async def ready(self) -> None:
        """Wait on the backend's loop until the session is open. Raises: what opening it raised."""
        await settled(self.opened)
        self.opened.result()


def _release(connection: BackendConnection, sampling_session_id: str) -> None:
    # never before the session is open: until then the future of the client being made holds the handle
    if not connection.closed:
        release = connection.backend.sampling.release_sampling_session(sampling_session_id)
        connection.submit_and_log(release, f"releasing sampling session {sampling_session_id}")


class SamplingClient:
    """Samples from one base model with one version of an adapter, or none. Later training does not change it.

    Made by ServiceClient.create_sampling_client or TrainingClient.save_weights_and_get_sampling_client. The version stays loaded as long as
    a client or a request uses it. Safe to use from any thread and event loop; the more requests are in flight, the faster each token.
    """

    def __init__(self, handle: SamplerHandle) -> None:
        self._handle = handle

    @property
    def sampling_session_id(self) -> str:
        return self._handle.sampling_session_id

    def sample(
        self,
        prompt: ModelInput,
        num_samples: int,
        sampling_params: SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: TensorData | None = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
    ) -> APIFuture[SampleResponse]:
        """`num_samples` draws after one prompt. Cancelling the future aborts them in the engine.

        Args:
            include_prompt_logprobs: score each prompt token, the first is None.
            topk_prompt_logprobs: that many most likely tokens at each prompt position.
            topk_sample_logprobs: the same for each drawn token.
            target_prompt_logprobs: int64 [len(prompt) - 1, K]; row i is scored at prompt position i + 1; -1 = nothing.
            prompt_alt_tokens_k: draws for each prompt position after the first.
            prompt_logprobs_last_n: score only the last n prompt positions.
        """
        handle = self._handle
        own_prompt, params = as_model_input(prompt), as_sampling_params(sampling_params)
        target = None if target_prompt_logprobs is None else as_tensor_data(target_prompt_logprobs)

        async def run() -> SampleResponse:
            await handle.ready()  # and `handle` keeps the session open until the answer is there
            return await handle.connection.backend.sampling.sample(
                sampling_session_id=handle.sampling_session_id,
                prompt=own_prompt,
                num_samples=num_samples,
                params=params,
                include_prompt_logprobs=include_prompt_logprobs,
                topk_prompt_logprobs=topk_prompt_logprobs,
                topk_sample_logprobs=topk_sample_logprobs,
                target_prompt_logprobs=target,
                prompt_alt_tokens_k=prompt_alt_tokens_k,
                prompt_logprobs_last_n=prompt_logprobs_last_n,
                record_stability_info=handle.record_stability_info,
            )

        return handle.connection.submit(run())

    async def sample_async(
        self,
        prompt: ModelInput,
        num_samples: int,
        sampling_params: SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: TensorData | None = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
    ) -> SampleResponse:
        """As `await sample(...)`."""
        return await self.sample(
            prompt,
            num_samples,
            sampling_params,
            include_prompt_logprobs,
            topk_prompt_logprobs,
            topk_sample_logprobs,
            target_prompt_logprobs,
            prompt_alt_tokens_k,
            prompt_logprobs_last_n,
        )

    def compute_logprobs(self, prompt: ModelInput, prompt_logprobs_last_n: int | None = None) -> APIFuture[list[float | None]]:
        """Log-probability in nats, at temperature 1, of each prompt token given those before it; the first is None.

        Draws one token, so the prompt must be shorter than the context.
        """
        sampled = self.sample(
            prompt, 1, SamplingParams(max_tokens=1), include_prompt_logprobs=True, prompt_logprobs_last_n=prompt_logprobs_last_n
        )
        return APIFuture(sampled, convert=_prompt_logprobs, owner=self._handle.connection.thread)

    async def compute_logprobs_async(self, prompt: ModelInput, prompt_logprobs_last_n: int | None = None) -> list[float | None]:
        """As `await compute_logprobs(...)`."""
        return await self.compute_logprobs(prompt, prompt_logprobs_last_n)

    def get_base_model(self) -> str:
        """Name of the base model; waits until the client is ready."""
        return self._handle.opened.result().base_model

    async def get_base_model_async(self) -> str:
        return (await APIFuture(self._handle.opened, cancels_source=False)).base_model

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer of the base model (Any: only engines import transformers)."""
        connection = self._handle.connection
        return connection.submit(connection.backend.get_tokenizer(self.get_base_model())).result()

    def get_sampler_handle(self) -> NoReturn:
        """Raises: InvalidRequestError: an in-process sampler cannot be reached from another process."""
        refuse_to_pickle("the sampler handle")

    @staticmethod
    def from_sampler_handle(handle: str, *, api_key: str | None = None) -> SamplingClient:
        """Raises: InvalidRequestError: handles belong to a server."""
        del handle, api_key
        refuse_to_pickle("a sampler handle")

    def get_telemetry(self) -> None:
        """None: ptlab sends no telemetry."""

    def __reduce__(self) -> NoReturn:
        refuse_to_pickle("a SamplingClient")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._handle.sampling_session_id!r})"


class PendingSamplingClient(SamplingClient, APIFuture[SamplingClient]):
    """A SamplingClient that can be used at once, and a future of it: `.result()` and `await` give the client when it is ready.

    If it cannot be made, `.result()`, `await` and the first request raise why.
    """

    def __init__(self, handle: SamplerHandle) -> None:
        SamplingClient.__init__(self, handle)
        APIFuture.__init__(
            self, handle.opened, convert=lambda _: SamplingClient(handle), owner=handle.connection.thread, cancels_source=False
        )


def open_sampling_client(
    session: Session, *, model_path: str | None, base_model: str | None, record_stability_info: bool
) -> PendingSamplingClient:
    """A client of saved sampler weights, or of a base model without an adapter.

    Raises: InvalidRequestError if both are None, or model_path is no tinker:// path.
    """
    if model_path is None and base_model is None:
        raise InvalidRequestError("create_sampling_client needs model_path (from save_weights_for_sampler) or base_model; both are None")
    if model_path is not None:
        check_path(model_path)
    connection, sampling_session_id = session.connection, session.next_sampler_id()

    async def open_session() -> None:
        await connection.backend.sampling.create_sampling_session(
            sampling_session_id=sampling_session_id, model_path=model_path, base_model=base_model
        )

    handle = SamplerHandle(connection, sampling_session_id, open_session, record_stability_info=record_stability_info)
    return PendingSamplingClient(handle)


def _prompt_logprobs(response: SampleResponse) -> list[float | None]:
    logprobs = response.prompt_logprobs
    if logprobs is None:
        raise RuntimeError("the sampler gave no prompt log-probabilities although they were asked for; this is a fault of the sampler")
    return logprobs
