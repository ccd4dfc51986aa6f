"""The JSON bodies of the Tinker wire protocol: one model for each, and the values that the backend takes.

What depends on a model (token ids, context, top-k) is judged by the backend, in the same words as for an in-process client.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AwareDatetime, BeforeValidator, Field, ValidationError, model_validator

from ptlab.errors import InvalidRequestError
from ptlab.server.body_values import (
    AdamParamsBody,
    Body,
    CustomLossInputBody,
    Id,
    Int64,
    LoraConfigBody,
    Metadata,
    Name,
    Ordinal,
    PromptBody,
    SamplingParamsBody,
    TensorBody,
    TextMetadata,
    Texts,
    TrainingSeqId,
    check_texts,
    metadata_as_text,
)
from ptlab.server.errors import invalid_body
from ptlab.types import AdamParams, LoraConfig, ModelInput, SamplingClientKind, SamplingParams, TensorData

MAX_NUM_SAMPLES = 65_536
"""Draws of one request: each gets its id when the request is accepted. The operator's limit is lower (ServeSettings.max_num_samples)."""

BodyT = TypeVar("BodyT", bound=Body)


def decode_body(kind: type[BodyT], body: bytes) -> BodyT:
    """The body of one request, from its bytes: pydantic's own JSON parser limits depth, and strict types are then JSON's, not Python's.

    Raises: InvalidRequestError naming the field, what is wrong and what was found.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as err:
        raise invalid_body(_words(kind.__name__), err) from err


def _words(name: str) -> str:
    """CreateModelBody -> create_model."""
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name.removesuffix("Body")).lstrip("_")


def _check_optimizer(config: dict[str, Any] | None) -> None:
    kind = "adamw" if config is None else config.get("type", "adamw")
    if kind != "adamw":
        raise InvalidRequestError(f"optimizer_config.type is {kind!r}; ptlab trains with 'adamw' only")


# -- clients and sessions


class ClientConfigBody(Body):
    """client/config and client/dynamic_config."""

    sdk_version: str = ""


class CreateSessionBody(Body):
    tags: Texts = Field(default_factory=list)
    user_metadata: Metadata = None
    sdk_version: str = ""
    project_id: Id | None = None
    display_name: Annotated[str, Field(max_length=1024)] | None = None

    @property
    def text_metadata(self) -> dict[str, str] | None:
        return metadata_as_text(self.user_metadata)


class HeartbeatBody(Body):
    session_id: Id


class FinishReason(Body):
    type: Literal["success", "errored", "interrupted"]


class FinishSessionBody(Body):
    reason: FinishReason
    detail: Annotated[str, Field(max_length=65_536)] | None = None


class TelemetryBody(Body):
    """Accepted, not read."""

    events: list[Any] = Field(default_factory=list)


class AssignProjectBody(Body):
    """PUT sessions/{id}/project."""

    project_id: Id


class SearchOwner(Body):
    type: Literal["own", "accessible", "user"] = "own"
    owner_urns: Texts = Field(default_factory=list)


class SearchStatus(Body):
    type: Literal["active", "cancelled", "failed", "client_finished"]
    reasons: Texts | None = None


class SearchCursor(Body):
    last_created_at: AwareDatetime
    last_session_id: str


class SearchSessionsBody(Body):
    """sessions/search; without a field nothing is asked of it."""

    session_id: str | None = None
    project_ids: Texts | None = None
    user_metadata: Annotated[dict[str, str], BeforeValidator(check_texts)] = Field(default_factory=dict)
    display_name: Annotated[str, Field(min_length=1)] | None = None
    owner: SearchOwner = SearchOwner()
    statuses: Annotated[list[SearchStatus], Field(fail_fast=True, min_length=1)] | None = None
    limit: Annotated[int, Field(ge=1, le=200)] = 50
    cursor: SearchCursor | None = None


# -- training


class CreateModelBody(Body):
    session_id: Id
    model_seq_id: Ordinal
    base_model: Name
    lora_config: LoraConfigBody | None = None
    user_metadata: Metadata = None
    optimizer_config: dict[str, Any] | None = None

    def lora(self) -> LoraConfig:
        """Raises: InvalidRequestError without lora_config, or for an optimizer other than AdamW."""
        _check_optimizer(self.optimizer_config)
        if self.lora_config is None:
            raise InvalidRequestError("create_model: lora_config is missing; ptlab trains LoRA adapters only")
        return self.lora_config.lora()

    @property
    def text_metadata(self) -> dict[str, str] | None:
        return metadata_as_text(self.user_metadata)


class GetInfoBody(Body):
    model_id: Id


class OptimStepBody(Body):
    model_id: Id
    seq_id: TrainingSeqId
    adam_params: AdamParamsBody | None = None
    optimizer_params: dict[str, Any] | None = None
    """Another family of optimizers, by `type`."""

    def adam(self) -> AdamParams:
        """Raises: InvalidRequestError for another optimizer than AdamW, or none."""
        if self.optimizer_params is not None:
            kind = self.optimizer_params.get("type")
            raise InvalidRequestError(f"optim_step: optimizer_params of type {kind!r} are not served; ptlab trains with AdamW (AdamParams)")
        if self.adam_params is None:
            raise InvalidRequestError("optim_step: adam_params is missing; it holds learning_rate and the other settings of AdamW")
        return self.adam_params.adam()


class CreateCustomLossBody(Body):
    """The graph is judged by whoever rebuilds it."""

    session_id: Id
    custom_loss_seq_id: Ordinal
    name: Id
    inputs: Annotated[list[CustomLossInputBody], Field(fail_fast=True, max_length=256)]
    graph: dict[str, Any]

    def input_dicts(self) -> list[dict[str, Any]]:
        return [{"name": value.name, "rank": value.rank} for value in self.inputs]


# -- checkpoints


class SaveWeightsBody(Body):
    model_id: Id
    seq_id: TrainingSeqId
    path: Name
    """The checkpoint's name."""
    ttl_seconds: Int64 | None = None
    overwrite: bool = False
    user_metadata: TextMetadata = None


class SaveWeightsForSamplerBody(Body):
    """A checkpoint under a name (`path`), or a sampling session without one (`sampling_session_seq_id`)."""

    model_id: Id
    seq_id: TrainingSeqId
    path: Name | None = None
    sampling_session_seq_id: Ordinal | None = None
    kind: SamplingClientKind = "snapshot"
    ttl_seconds: Int64 | None = None
    user_metadata: TextMetadata = None

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if (self.path is None) == (self.sampling_session_seq_id is None):
            raise ValueError("give either path (a checkpoint's name) or sampling_session_seq_id (a session of its own), and not both")
        return self


class SaveWeightsExternalBody(Body):
    model_id: Id
    seq_id: TrainingSeqId
    path: Name
    ttl_seconds: Int64 | None = None
    age_encryption_recipients: Texts | None = None


class LoadWeightsBody(Body):
    """A new model from a checkpoint (session_id, model_seq_id), or into an existing one (model_id, seq_id)."""

    path: Name
    optimizer: bool
    session_id: Id | None = None
    model_seq_id: Ordinal | None = None
    model_id: Id | None = None
    seq_id: TrainingSeqId | None = None
    base_model: Name | None = None
    user_metadata: Metadata = None
    optimizer_config: dict[str, Any] | None = None
    weights_access_token: str | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        pairs = [(self.session_id, self.model_seq_id), (self.model_id, self.seq_id)]
        begun = [pair for pair in pairs if pair != (None, None)]
        if len(begun) != 1 or None in begun[0]:
            raise ValueError("give either session_id and model_seq_id (a new model), or model_id and seq_id (an existing one)")
        return self

    @property
    def new_model(self) -> tuple[str, int] | None:
        """(session_id, model_seq_id); None = into existing_model."""
        return None if self.session_id is None or self.model_seq_id is None else (self.session_id, self.model_seq_id)

    @property
    def existing_model(self) -> tuple[str, int] | None:
        """(model_id, seq_id); None = new_model."""
        return None if self.model_id is None or self.seq_id is None else (self.model_id, self.seq_id)

    def check_optimizer(self) -> None:
        """Raises: InvalidRequestError for an optimizer other than AdamW."""
        _check_optimizer(self.optimizer_config)

    @property
    def text_metadata(self) -> dict[str, str] | None:
        return metadata_as_text(self.user_metadata)


class WeightsInfoBody(Body):
    tinker_path: Name


class CopyWeightsBody(Body):
    source_path: Name
    session_id: Id | None = None
    model_seq_id: Ordinal | None = None
    destination_project_id: Id | None = None
    ttl_seconds: Int64 | None = None
    weights_access_token: str | None = None


class TtlBody(Body):
    ttl_seconds: Int64 | None
    """None = keep for ever; the field itself must be there."""


# -- sampling


class CreateSamplingSessionBody(Body):
    session_id: Id
    sampling_session_seq_id: Ordinal
    base_model: Name | None = None
    model_path: Name | None = None

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.base_model is None and self.model_path is None:
            raise ValueError("give base_model or model_path; there is nothing to sample from")
        return self


class JoinSamplingSessionBody(Body):
    sampling_session_id: Id


class SampleBody(Body):
    sampling_session_id: Id
    seq_id: Ordinal
    prompt: PromptBody
    sampling_params: SamplingParamsBody = SamplingParamsBody()
    num_samples: Annotated[int, Field(ge=1, le=MAX_NUM_SAMPLES)] = 1
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: Int64 = 0
    topk_sample_logprobs: Int64 = 0
    target_prompt_logprobs: TensorBody | None = None
    prompt_alt_tokens_k: Int64 = 0
    prompt_logprobs_last_n: Int64 | None = None
    record_stability_info: bool | None = None

    def model_input(self) -> ModelInput:
        return self.prompt.model_input()

    def params(self) -> SamplingParams:
        return self.sampling_params.params()

    def targets(self) -> TensorData | None:
        """int64 [len(prompt) - 1, K]. Raises: InvalidRequestError."""
        return None if self.target_prompt_logprobs is None else self.target_prompt_logprobs.tensor("target_prompt_logprobs")


# -- futures


class RetrieveFutureBody(Body):
    request_id: Id
    allow_metadata_only: bool = False


class FuturesTarget(Body):
    type: Literal["sampling_session"]
    sampling_session_id: Id
    cloned_sampler_id: Ordinal = 0
    """seq_id // 1_000_000_000 of the requests that are meant."""


class RetrieveFuturesBody(Body):
    target: FuturesTarget
    prev_cursor: Ordinal = 0
    timeout: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Seconds; None = answer at once."""
    retrieved_request_ids: Texts = Field(default_factory=list)


class CancelFutureBody(Body):
    request_id: Id
