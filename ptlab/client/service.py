"""ServiceClient: where the other clients come from."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from ptlab.client.connection import BackendConnection, Session, SessionStatus
from ptlab.client.refusals import check_optimizer, check_path, refuse_access_token
from ptlab.client.rest import RestClient
from ptlab.client.sampling import PendingSamplingClient, SamplingClient, open_sampling_client
from ptlab.client.training import ModelHandle, PendingTrainingClient, TrainingClient
from ptlab.errors import InvalidRequestError
from ptlab.futures import APIFuture
from ptlab.types import GetServerCapabilitiesResponse, LoraConfig, OptimizerConfig


class ServiceClient:
    """The in-process face of a backend, with the official SDK's methods.

    The constructor does nothing but remember; the first client that is created opens the connection and the session. As a context manager
    it closes the session: "success", "errored" after an exception, "interrupted" after KeyboardInterrupt and the like.

    Args:
        user_metadata, display_name: kept with the session.
        project_id: kept with the session; None = environment variable TINKER_PROJECT_ID.
        base_url: refused: this face speaks to a backend in the same process.
        api_key, default_headers_overrides: accepted and without effect in-process.
        connection: the backend to use; None = the default one of `ptlab.ServiceClient`.
    """

    def __init__(
        self,
        user_metadata: dict[str, str] | None = None,
        project_id: str | None = None,
        *,
        display_name: str | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        default_headers_overrides: Mapping[str, str] | None = None,
        connection: BackendConnection | None = None,
        **kwargs: Any,
    ) -> None:
        del api_key, default_headers_overrides
        if base_url is not None:
            raise InvalidRequestError(
                f"base_url={base_url!r}: this is ptlab's in-process face, it uses the engines of this process. To use a remote server, "
                "import the official SDK instead: `import tinker; tinker.ServiceClient(base_url=...)`"
            )
        if kwargs:
            warnings.warn(f"ServiceClient ignores the unknown arguments {sorted(kwargs)}", FutureWarning, stacklevel=2)
        self._given_connection = connection
        self._session = Session(
            self._connect,
            user_metadata=user_metadata,
            project_id=project_id or os.environ.get("TINKER_PROJECT_ID"),
            display_name=display_name,
        )

    def _connect(self) -> BackendConnection:
        return self._open_connection() if self._given_connection is None else self._given_connection

    def _open_connection(self) -> BackendConnection:
        """The connection when none was given; ptlab.local overrides it with a default backend."""
        raise InvalidRequestError("this ServiceClient knows no backend; use ptlab.ServiceClient, or pass connection=...")

    @property
    def holder(self) -> Session:
        return self._session

    # -- training clients

    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: dict[str, str] | None = None,
        optimizer: OptimizerConfig | None = None,
    ) -> PendingTrainingClient:
        """A new adapter on a base model. The client can be used at once; `.result()` waits until the model exists.

        Args:
            seed: of the initial weights; None = random.
        """
        if not (train_mlp or train_attn or train_unembed):
            raise InvalidRequestError("train_mlp, train_attn and train_unembed are all False: there would be nothing to train")
        check_optimizer(optimizer)
        lora = LoraConfig(rank=rank, seed=seed, train_mlp=train_mlp, train_attn=train_attn, train_unembed=train_unembed)
        session_id, number, backend = self._session.session_id, self._session.next_model(), self._session.connection.backend
        handle = ModelHandle(
            self._session,
            f"{session_id}:train:{number}",
            lambda: backend.create_model(
                session_id=session_id, model_seq_id=number, base_model=base_model, lora=lora, user_metadata=user_metadata
            ),
        )
        return PendingTrainingClient(handle)

    async def create_lora_training_client_async(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: dict[str, str] | None = None,
        optimizer: OptimizerConfig | None = None,
    ) -> TrainingClient:
        """The client, once the model exists."""
        return await self.create_lora_training_client(
            base_model, rank, seed, train_mlp, train_attn, train_unembed, user_metadata, optimizer
        )

    def create_training_client_from_state(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
        optimizer: OptimizerConfig | None = None,
    ) -> PendingTrainingClient:
        """A new model with the weights of a checkpoint; its optimizer starts afresh. Rank and layers are those of the checkpoint."""
        check_optimizer(optimizer)
        return self._from_state(path, base_model, user_metadata, weights_access_token, with_optimizer=False)

    async def create_training_client_from_state_async(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
        optimizer: OptimizerConfig | None = None,
    ) -> TrainingClient:
        return await self.create_training_client_from_state(path, base_model, user_metadata, weights_access_token, optimizer)

    def create_training_client_from_state_with_optimizer(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
    ) -> PendingTrainingClient:
        """A new model that continues a checkpoint of save_state bit for bit."""
        return self._from_state(path, base_model, user_metadata, weights_access_token, with_optimizer=True)

    async def create_training_client_from_state_with_optimizer_async(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
    ) -> TrainingClient:
        return await self.create_training_client_from_state_with_optimizer(path, base_model, user_metadata, weights_access_token)

    def _from_state(
        self,
        path: str,
        base_model: str | None,
        user_metadata: dict[str, str] | None,
        weights_access_token: str | None,
        *,
        with_optimizer: bool,
    ) -> PendingTrainingClient:
        refuse_access_token(weights_access_token)
        check_path(path)
        session_id, number, backend = self._session.session_id, self._session.next_model(), self._session.connection.backend
        handle = ModelHandle(
            self._session,
            f"{session_id}:train:{number}",
            lambda: backend.create_model_from_state(
                session_id=session_id,
                model_seq_id=number,
                path=path,
                with_optimizer=with_optimizer,
                base_model=base_model,
                user_metadata=user_metadata,
            ),
        )
        return PendingTrainingClient(handle)

    # -- sampling clients

    def create_sampling_client(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: Any = None,
        record_stability_info: bool = False,
    ) -> PendingSamplingClient:
        """A client of weights saved by save_weights_for_sampler, or of a base model.

        Args:
            retry_config: accepted and without effect in-process.
            record_stability_info: what is sampled stays on record for a day, for the loss stable_reinforce.
        """
        del retry_config
        return open_sampling_client(
            self._session, model_path=model_path, base_model=base_model, record_stability_info=record_stability_info
        )

    async def create_sampling_client_async(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: Any = None,
        record_stability_info: bool = False,
    ) -> SamplingClient:
        """The client, once it is ready."""
        return await self.create_sampling_client(model_path, base_model, retry_config, record_stability_info)

    def import_adapter(self, directory: str | Path, base_model: str | None = None) -> APIFuture[str]:
        """tinker:// path, for sampling, of a copy of the adapter in a local directory: sampler weights of another run, or PEFT layout.

        ptlab's own; the official client has no such call.
        """
        connection = self._session.connection
        return connection.submit(connection.backend.import_adapter(Path(directory), base_model))

    # -- the rest

    def create_rest_client(self) -> RestClient:
        return RestClient(self._session)

    def copy_weights(self, path: str, *, ttl_seconds: int | None = None, weights_access_token: str | None = None) -> APIFuture[str]:
        """Copy a checkpoint; gives the path of the copy."""
        return self.create_rest_client().copy_weights(path, ttl_seconds=ttl_seconds, weights_access_token=weights_access_token)

    def create_custom_loss(self, fn: Callable[..., Any], input_ranks: Mapping[str, int]) -> NoReturn:
        """Raises: InvalidRequestError: losses are not uploaded in-process; forward_backward_custom takes a plain function."""
        del fn, input_ranks
        raise InvalidRequestError(
            "create_custom_loss uploads a traced loss to a server; in-process pass your function to "
            "forward_backward_custom(data, loss_fn), where loss_fn(data, logprobs_list) -> (loss, metrics)"
        )

    def get_server_capabilities(self) -> GetServerCapabilitiesResponse:
        """The base models that can be trained and sampled."""
        return self.create_rest_client().get_server_capabilities().result()

    async def get_server_capabilities_async(self) -> GetServerCapabilitiesResponse:
        return await self.create_rest_client().get_server_capabilities()

    def get_console_url(self) -> str:
        """The session id: ptlab has no web console."""
        return self._session.session_id

    def get_telemetry(self) -> None:
        """None: ptlab sends no telemetry."""

    def close(self, status: SessionStatus, detail: str | None = None) -> APIFuture[None]:
        """Finish the session and its samplers. The first call counts. The backend, its models and other sessions stay."""
        return self._session.close(status, detail)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if kind is None:
            self.close("success").result()
        elif issubclass(kind, Exception):
            self.close("errored", repr(error)).result()
        else:
            self.close("interrupted", repr(error)).result()
