"""What JSON bodies are made of: bounded texts and numbers, and the bodies' counterparts of ptlab's values.

The values themselves refuse unknown fields, as a typing mistake of a caller must be found; a server has to understand a newer SDK.
"""

from __future__ import annotations

import base64
import json
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from ptlab.errors import InvalidRequestError
from ptlab.server.unpacking import CellBudget, check_shape
from ptlab.types import (
    AdamParams,
    DmelChunk,
    EncodedTextChunk,
    ImageAssetPointerChunk,
    ImageChunk,
    LoraConfig,
    ModelInput,
    ModelInputChunk,
    SamplingParams,
    TensorData,
    TensorDtype,
)

MAX_METADATA_BYTES = 65_536
"""user_metadata as JSON."""
MAX_CHUNKS = 65_536
"""Of one prompt."""

Int64: TypeAlias = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Ordinal: TypeAlias = Annotated[int, Field(ge=0, lt=2**63)]
"""Models, sampling sessions, losses of a session, and requests of a sampling session, counted by the client."""
TrainingSeqId: TypeAlias = Annotated[int, Field(ge=1, lt=2**63)]
"""Requests of a model, counted by the client; 0 is its creation."""
Seed: TypeAlias = Annotated[int, Field(ge=-(2**63), lt=2**64)]
"""Any 64 bits, signed or not."""
Id: TypeAlias = Annotated[str, Field(min_length=1, max_length=512)]
Name: TypeAlias = Annotated[str, Field(min_length=1, max_length=1024)]
"""Checkpoint names, tinker:// paths, base models."""
# One wrong item is enough to know: an error report per item takes far more memory than the body.
Texts: TypeAlias = Annotated[list[str], Field(fail_fast=True)]
Integers: TypeAlias = Annotated[list[Int64], Field(fail_fast=True)]


def _from_base64(value: object) -> object:
    return base64.b64decode(value, validate=True) if isinstance(value, str) else value


Base64: TypeAlias = Annotated[bytes, BeforeValidator(_from_base64)]


def _check_metadata(value: dict[str, Any] | None) -> dict[str, Any] | None:
    size = len(json.dumps(value))
    if size > MAX_METADATA_BYTES:
        raise ValueError(f"user_metadata takes {size} bytes as JSON; at most {MAX_METADATA_BYTES} are kept")
    return value


def check_texts(value: object) -> object:
    """Refuses a dict with a value that is no text, once and not for each of them."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(item, str):
                raise ValueError(f"the value of {key!r} must be a text")
    return value


Metadata: TypeAlias = Annotated[dict[str, Any] | None, AfterValidator(_check_metadata)]
TextMetadata: TypeAlias = Annotated[dict[str, str] | None, BeforeValidator(check_texts), AfterValidator(_check_metadata)]


def metadata_as_text(metadata: dict[str, Any] | None) -> dict[str, str] | None:
    """Values that are no text become JSON: the SDK reads user_metadata back as texts."""
    return None if metadata is None else {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}


class Body(BaseModel):
    """Immutable; unknown fields are ignored; a known one must have its type (no "3" for 3, no true for 1)."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, protected_namespaces=())


class EncodedTextBody(Body):
    type: Literal["encoded_text"]
    tokens: Integers

    def chunk(self) -> ModelInputChunk:
        return EncodedTextChunk(tokens=self.tokens)


class ImageBody(Body):
    type: Literal["image"]
    data: Base64
    format: Literal["png", "jpeg"]
    expected_tokens: Ordinal | None = None

    def chunk(self) -> ModelInputChunk:
        return ImageChunk(data=self.data, format=self.format, expected_tokens=self.expected_tokens)


class ImageAssetPointerBody(Body):
    type: Literal["image_asset_pointer"]
    location: str
    format: Literal["png", "jpeg"]
    expected_tokens: Ordinal | None = None

    def chunk(self) -> ModelInputChunk:
        return ImageAssetPointerChunk(location=self.location, format=self.format, expected_tokens=self.expected_tokens)


class DmelBody(Body):
    type: Literal["dmel"]
    dmel: Base64

    def chunk(self) -> ModelInputChunk:
        return DmelChunk(dmel=self.dmel)


ChunkBody: TypeAlias = Annotated[EncodedTextBody | ImageBody | ImageAssetPointerBody | DmelBody, Field(discriminator="type")]


class PromptBody(Body):
    chunks: Annotated[list[ChunkBody], Field(fail_fast=True, max_length=MAX_CHUNKS)]

    def model_input(self) -> ModelInput:
        return ModelInput(chunks=[chunk.chunk() for chunk in self.chunks])


class SamplingParamsBody(Body):
    max_tokens: Int64 | None = None
    seed: Seed | None = None
    stop: str | Texts | Annotated[list[int], Field(fail_fast=True)] | None = None
    """Absent or null: the model's own end; [] = no end at all."""
    temperature: float = 1
    top_k: Int64 = -1
    top_p: float = 1

    @field_validator("stop", mode="before")
    @classmethod
    def _one_kind(cls, value: object) -> object:
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, list) and ({type(item) for item in value} <= {str} or {type(item) for item in value} == {int}):
            return value
        raise ValueError("stop must be a text, a list of texts or a list of token ids (one kind in a list)")

    def params(self) -> SamplingParams:
        return SamplingParams(**self.model_dump())


class TensorBody(Body):
    """TensorData in JSON."""

    data: Integers | Annotated[list[float], Field(fail_fast=True)]
    dtype: TensorDtype
    shape: Integers | None = None
    sparse_crow_indices: Integers | None = None
    sparse_col_indices: Integers | None = None

    def tensor(self, where: str) -> TensorData:
        """Raises: InvalidRequestError starting with `where`."""
        shape = self.shape or []
        check_shape(shape, where)
        if self.sparse_crow_indices is not None:
            CellBudget().take(shape, where)
        if self.dtype == "int64" and self.data and isinstance(self.data[0], float):  # one float makes the whole list floats
            raise InvalidRequestError(f"{where}: dtype int64 needs whole numbers; found {self.data[0]}")
        try:
            with np.errstate(over="ignore"):  # beyond float32 is infinite
                return TensorData(self.data, self.dtype, self.shape, self.sparse_crow_indices, self.sparse_col_indices)
        except InvalidRequestError as err:
            raise InvalidRequestError(f"{where}: {err.message}") from err


class LoraConfigBody(Body):
    rank: Int64
    seed: Seed | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True

    def lora(self) -> LoraConfig:
        return LoraConfig(**self.model_dump())


class AdamParamsBody(Body):
    learning_rate: float = AdamParams.model_fields["learning_rate"].default
    beta1: float = AdamParams.model_fields["beta1"].default
    beta2: float = AdamParams.model_fields["beta2"].default
    eps: float = AdamParams.model_fields["eps"].default
    weight_decay: float = AdamParams.model_fields["weight_decay"].default
    grad_clip_norm: float = AdamParams.model_fields["grad_clip_norm"].default

    def adam(self) -> AdamParams:
        return AdamParams(**self.model_dump())


class CustomLossInputBody(Body):
    """One input of an uploaded loss: a scalar, [T] or [T, K]."""

    name: Id
    rank: Literal[0, 1, 2]
