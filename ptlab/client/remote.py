"""Recipes against a server: the official SDK as the way there, ptlab's values on this side of it.

The SDK is the HTTP client; nothing here knows HTTP. These classes offer what recipes use of the three clients, translate values and
errors, and count optimizer steps, because the SDK drops `policy_version` on the way. Works against `ptlab serve` and against the hosted
service alike. Needs the package `tinker` (extra `remote`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from types import ModuleType, TracebackType
from typing import Any, Generic, Self, TypeVar

from ptlab.errors import ConfigError, EngineError, InvalidRequestError, PtlabError, RemoteError
from ptlab.types import (
    AdamParams,
    Datum,
    EncodedTextChunk,
    ForwardBackwardOutput,
    GetServerCapabilitiesResponse,
    ModelInput,
    OptimStepResponse,
    SampledSequence,
    SampleResponse,
    SamplingParams,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
    SupportedModel,
    TensorData,
)

T = TypeVar("T")


def load_sdk() -> ModuleType:
    """The official SDK. Raises: ConfigError saying how to install it."""
    try:
        import tinker
    except ImportError as err:
        raise ConfigError("a remote server is spoken to through the official SDK, which is not installed: pip install tinker") from err
    return tinker


class Coming(Generic[T]):
    """A result on its way: the SDK has sent the request already. Await it, or call result(), as often as you like."""

    def __init__(self, future: Any, convert: Callable[[Any], T]) -> None:
        self._future = future
        self._convert = convert

    def result(self, timeout: float | None = None) -> T:
        try:
            return self._convert(self._future.result(timeout))
        except Exception as err:
            raise translated(err) from err

    def __await__(self) -> Generator[Any, None, T]:
        return self._wait().__await__()

    async def _wait(self) -> T:
        try:
            return self._convert(await self._future)
        except Exception as err:
            raise translated(err) from err


def translated(err: Exception) -> Exception:
    """The SDK's error as ptlab's of the same meaning; others as they are."""
    sdk = load_sdk()
    if isinstance(err, sdk.RequestFailedError):
        return InvalidRequestError(str(err)) if str(err.category) == "user" else EngineError(str(err), engine="server")
    if isinstance(err, (sdk.BadRequestError, sdk.NotFoundError, sdk.UnprocessableEntityError)):
        return InvalidRequestError(str(err))
    if isinstance(err, sdk.TinkerError) and not isinstance(err, PtlabError):
        return RemoteError(f"{type(err).__name__}: {err}")
    return err


class RemoteServiceClient:
    """What recipes need of a ServiceClient, on a server.

    Args:
        load_tokenizer: a tokenizer by base model name; the SDK's own way looks on the hub, where a local model is not.
        base_url, api_key: None = TINKER_BASE_URL and TINKER_API_KEY, as the SDK has it.
    """

    def __init__(
        self,
        *,
        load_tokenizer: Callable[[str], Any],
        base_url: str | None = None,
        api_key: str | None = None,
        display_name: str | None = None,
    ) -> None:
        self._load_tokenizer = load_tokenizer
        try:
            self._service = load_sdk().ServiceClient(base_url=base_url, api_key=api_key, display_name=display_name)
        except Exception as err:
            raise translated(err) from err

    def create_lora_training_client(self, base_model: str, **lora: Any) -> Coming[RemoteTrainingClient]:
        created = self._service.create_lora_training_client(base_model=base_model, **lora)
        return Coming(created, lambda client: RemoteTrainingClient(client, self._load_tokenizer))

    def create_training_client_from_state_with_optimizer(self, path: str) -> Coming[RemoteTrainingClient]:
        created = self._service.create_training_client_from_state_with_optimizer(path)
        return Coming(created, lambda client: RemoteTrainingClient(client, self._load_tokenizer))

    def create_sampling_client(self, model_path: str | None = None, base_model: str | None = None) -> Coming[RemoteSamplingClient]:
        created = self._service.create_sampling_client(model_path=model_path, base_model=base_model)
        return Coming(created, lambda client: RemoteSamplingClient(client, None, self._load_tokenizer))

    async def import_adapter(self, directory: str, base_model: str | None = None) -> str:
        """Raises: InvalidRequestError: a server does not read this machine's files."""
        del base_model
        raise InvalidRequestError(f"{directory}: a directory cannot be given to a server; name weights it has saved itself (tinker://...)")

    async def get_server_capabilities_async(self) -> GetServerCapabilitiesResponse:
        said = await self._service.create_rest_client().get_server_capabilities()
        models = [SupportedModel(model_name=m.model_name, max_context_length=m.max_context_length) for m in said.supported_models]
        return GetServerCapabilitiesResponse(supported_models=models)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        status = "success" if error is None else "errored" if isinstance(error, Exception) else "interrupted"
        self._service.close(status).result()


class RemoteTrainingClient:
    """What recipes need of a TrainingClient."""

    def __init__(self, client: Any, load_tokenizer: Callable[[str], Any]) -> None:
        self._client = client
        self._load_tokenizer = load_tokenizer
        self._num_steps = 0

    def get_tokenizer(self) -> Any:
        return self._load_tokenizer(self._client.get_info().model_data.model_name)

    def forward_backward(
        self, data: Sequence[Datum], loss_fn: str, loss_fn_config: Mapping[str, float | str] | None = None
    ) -> Coming[ForwardBackwardOutput]:
        sent = self._client.forward_backward([_datum(datum) for datum in data], loss_fn, dict(loss_fn_config or {}) or None)
        return Coming(sent, _forward_backward_output)

    def forward(
        self, data: Sequence[Datum], loss_fn: str, loss_fn_config: Mapping[str, float | str] | None = None
    ) -> Coming[ForwardBackwardOutput]:
        sent = self._client.forward([_datum(datum) for datum in data], loss_fn, dict(loss_fn_config or {}) or None)
        return Coming(sent, _forward_backward_output)

    def forward_backward_custom(
        self, data: Sequence[Datum], loss_fn: Callable[[list[Datum], list[Any]], tuple[Any, Mapping[str, float]]]
    ) -> Coming[ForwardBackwardOutput]:
        """The loss gets ptlab's datums, whatever the SDK makes of them on the way."""
        ours = list(data)
        sent = self._client.forward_backward_custom([_datum(datum) for datum in ours], lambda _, logprobs: loss_fn(ours, logprobs))
        return Coming(sent, _forward_backward_output)

    def optim_step(self, adam_params: AdamParams) -> Coming[OptimStepResponse]:
        self._num_steps += 1
        sent = self._client.optim_step(load_sdk().AdamParams(**adam_params.model_dump()))
        return Coming(sent, lambda response: OptimStepResponse(metrics=response.metrics))

    def save_state(self, name: str, overwrite: bool = False) -> Coming[SaveWeightsResponse]:
        return Coming(self._client.save_state(name, overwrite=overwrite), lambda saved: SaveWeightsResponse(path=saved.path))

    def save_weights_for_sampler(self, name: str) -> Coming[SaveWeightsForSamplerResponse]:
        return Coming(self._client.save_weights_for_sampler(name), lambda saved: SaveWeightsForSamplerResponse(path=saved.path))

    def save_weights_and_get_sampling_client(self) -> Coming[RemoteSamplingClient]:
        version = self._num_steps
        saved = self._client.save_weights_and_get_sampling_client()
        return Coming(saved, lambda client: RemoteSamplingClient(client, version, self._load_tokenizer))


class RemoteSamplingClient:
    """What recipes need of a SamplingClient.

    Args:
        version: optimizer steps that this process had asked for when the weights were saved; None = not weights of this process.
    """

    def __init__(self, client: Any, version: int | None, load_tokenizer: Callable[[str], Any]) -> None:
        self._client = client
        self._version = version
        self._load_tokenizer = load_tokenizer

    def get_tokenizer(self) -> Any:
        return self._load_tokenizer(self._client.get_base_model())

    def compute_logprobs(self, prompt: ModelInput) -> Coming[list[float | None]]:
        return Coming(self._client.compute_logprobs(_model_input(prompt)), list)

    def sample(self, prompt: ModelInput, num_samples: int, sampling_params: SamplingParams) -> Coming[SampleResponse]:
        given = sampling_params.model_dump()
        sent = self._client.sample(prompt=_model_input(prompt), num_samples=num_samples, sampling_params=load_sdk().SamplingParams(**given))
        return Coming(sent, self._response)

    def _response(self, response: Any) -> SampleResponse:
        return SampleResponse(
            sequences=[
                SampledSequence(
                    stop_reason=sequence.stop_reason,
                    sequence_id=sequence.sequence_id,
                    tokens_np=sequence.tokens_np,
                    logprobs_np=sequence.logprobs_np,
                    policy_version=self._version,
                )
                for sequence in response.sequences
            ]
        )


def _model_input(value: ModelInput) -> Any:
    sdk = load_sdk()
    chunks = []
    for chunk in value.chunks:
        if not isinstance(chunk, EncodedTextChunk):
            raise InvalidRequestError(f"a recipe on a remote server sends text only, found a chunk of type {chunk.type}")
        chunks.append(sdk.EncodedTextChunk(tokens=list(chunk.tokens)))
    return sdk.ModelInput(chunks=chunks)


def _datum(datum: Datum) -> Any:
    sdk = load_sdk()
    fields = {name: sdk.TensorData.from_numpy(tensor.to_numpy()) for name, tensor in datum.loss_fn_inputs.items()}
    return sdk.Datum(model_input=_model_input(datum.model_input), loss_fn_inputs=fields)


def _forward_backward_output(output: Any) -> ForwardBackwardOutput:
    fields = [{name: TensorData.from_numpy(tensor.to_numpy()) for name, tensor in row.items()} for row in output.loss_fn_outputs]
    return ForwardBackwardOutput(output.loss_fn_output_type, fields, dict(output.metrics))
