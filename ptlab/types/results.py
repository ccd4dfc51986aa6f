"""What training gives, and what is stored: outputs, saved weights, checkpoints, runs, sessions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Final, Literal, TypeAlias

from ptlab.errors import InvalidRequestError
from ptlab.types.base import ResultModel
from ptlab.types.datum import Datum, LossFnOutput
from ptlab.types.params import AdamOptimizerConfig, LossFnType, ModelID, OptimizerConfig

CheckpointType: TypeAlias = Literal["training", "sampler", "external"]
PATH_SCHEME: Final = "tinker://"
CHECKPOINT_SEGMENTS: Final[Mapping[str, CheckpointType]] = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}


@dataclass(frozen=True)
class ForwardBackwardInput:
    """What a forward_backward works on."""

    data: list[Datum]
    loss_fn: LossFnType
    loss_fn_config: Mapping[str, float | str] | None = None


@dataclass(frozen=True)
class ForwardBackwardOutput:
    """What a forward or forward_backward found. There is no `.loss`; the sum over all tokens is metrics["loss:sum"]."""

    loss_fn_output_type: str
    loss_fn_outputs: list[LossFnOutput]
    """One dict per datum, in order; each holds `logprobs` in the shape of the datum's target_tokens."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Keys `name:reduction`."""


class OptimStepResponse(ResultModel):
    metrics: dict[str, float] | None = None


class CreateModelResponse(ResultModel):
    model_id: ModelID
    type: Literal["create_model"] = "create_model"


class _SavedWeights(ResultModel):
    path: str
    """tinker://<model_id>/<kind>/<name>"""

    def get_console_url(self) -> str:
        """The path itself: ptlab has no web console, and the path is what its tools take."""
        return self.path


class SaveWeightsResponse(_SavedWeights):
    type: Literal["save_weights"] | None = None


class SaveWeightsForSamplerResponse(_SavedWeights):
    type: Literal["save_weights_for_sampler"] | None = None


class SaveWeightsExternalResponse(_SavedWeights):
    type: Literal["save_weights_external"] | None = None


class LoadWeightsResponse(ResultModel):
    path: str | None = None
    model_id: str | None = None
    type: Literal["load_weights"] | None = None


class ModelData(ResultModel):
    arch: str | None = None
    model_name: str | None = None
    tokenizer_id: str | None = None


class GetInfoResponse(ResultModel):
    type: Literal["get_info"] | None = None
    model_data: ModelData
    model_id: ModelID
    optimizer_config: OptimizerConfig = AdamOptimizerConfig()
    is_lora: bool | None = None
    lora_rank: int | None = None
    model_name: str | None = None


class Checkpoint(ResultModel):
    checkpoint_id: str
    """<kind>/<name>, for example "weights/step_10"."""
    checkpoint_type: CheckpointType
    time: datetime
    tinker_path: str
    size_bytes: int | None = None
    public: bool = False
    user_metadata: dict[str, str] | None = None
    expires_at: datetime | None = None
    """None = never."""


class ParsedCheckpointTinkerPath(ResultModel):
    """A checkpoint path taken apart."""

    tinker_path: str
    training_run_id: str
    checkpoint_type: CheckpointType
    checkpoint_id: str

    @classmethod
    def from_tinker_path(cls, tinker_path: str) -> ParsedCheckpointTinkerPath:
        """Raises: InvalidRequestError unless it is tinker://<run>/<weights|sampler_weights|external_weights>/<name>."""
        parts = tinker_path.removeprefix(PATH_SCHEME).split("/")
        if not tinker_path.startswith(PATH_SCHEME) or len(parts) != 3 or not all(parts) or parts[1] not in CHECKPOINT_SEGMENTS:
            raise InvalidRequestError(
                f"{tinker_path!r} is not a checkpoint path; it must be tinker://<training run>/<{'|'.join(CHECKPOINT_SEGMENTS)}>/<name>, "
                "and a name has no '/'"
            )
        return cls(
            tinker_path=tinker_path,
            training_run_id=parts[0],
            checkpoint_type=CHECKPOINT_SEGMENTS[parts[1]],
            checkpoint_id=f"{parts[1]}/{parts[2]}",
        )


class Cursor(ResultModel):
    offset: int
    limit: int
    total_count: int


class CheckpointsListResponse(ResultModel):
    checkpoints: list[Checkpoint]
    cursor: Cursor | None = None


class TrainingRun(ResultModel):
    training_run_id: str
    base_model: str
    model_owner: str
    is_lora: bool
    corrupted: bool = False
    lora_rank: int | None = None
    last_request_time: datetime
    last_checkpoint: Checkpoint | None = None
    last_sampler_checkpoint: Checkpoint | None = None
    user_metadata: dict[str, str] | None = None


class TrainingRunsResponse(ResultModel):
    training_runs: list[TrainingRun]
    cursor: Cursor


class WeightsInfoResponse(ResultModel):
    base_model: str
    optimizer_config: OptimizerConfig = AdamOptimizerConfig()
    is_lora: bool
    lora_rank: int | None = None
    train_unembed: bool | None = None
    train_mlp: bool | None = None
    train_attn: bool | None = None


class SupportedModel(ResultModel):
    model_name: str | None = None
    max_context_length: int | None = None
    trainable: bool | None = None
    sampleable: bool | None = None


class GetServerCapabilitiesResponse(ResultModel):
    supported_models: list[SupportedModel]


class ExternalWeightsUrlsResponse(ResultModel):
    urls: dict[str, str]
    """By the file's path inside the checkpoint."""
    expires: datetime


class CheckpointArchiveUrlResponse(ResultModel):
    url: str
    expires: datetime


class GetSessionResponse(ResultModel):
    training_run_ids: list[ModelID]
    sampler_ids: list[str]
    user_metadata: dict[str, str] | None = None
    display_name: str | None = None


class ListSessionsResponse(ResultModel):
    sessions: list[str]


class GetSamplerResponse(ResultModel):
    sampler_id: str
    base_model: str
    model_path: str | None = None


class WhoamiResponse(ResultModel):
    user_urn: str
    org_urn: str
    email: str | None = None


class HealthResponse(ResultModel):
    status: Literal["ok"]


class RequestErrorCategory(StrEnum):
    Unknown = "unknown"
    Server = "server"
    User = "user"
