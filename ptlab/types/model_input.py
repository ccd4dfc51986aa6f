"""What a model reads: tokens, and the chunks of other kinds that the API knows."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, Field, field_serializer, field_validator

from ptlab.errors import InvalidRequestError
from ptlab.types.base import RequestModel


class EncodedTextChunk(RequestModel):
    """Token ids."""

    tokens: Sequence[int]
    type: Literal["encoded_text"] = "encoded_text"

    @property
    def length(self) -> int:
        return len(self.tokens)


class ImageChunk(RequestModel):
    """An image as bytes (base64 text in JSON)."""

    data: bytes
    format: Literal["png", "jpeg"]
    expected_tokens: int | None = None
    """Tokens the caller expects the image to take; needed only for `length`."""
    type: Literal["image"] = "image"

    @field_validator("data", mode="before")
    @classmethod
    def _decode(cls, value: object) -> object:
        return base64.b64decode(value) if isinstance(value, str) else value

    @field_serializer("data")
    def _encode(self, value: bytes) -> str:
        return base64.b64encode(value).decode("ascii")

    @property
    def length(self) -> int:
        return _expected_length(self.expected_tokens, "ImageChunk")


class ImageAssetPointerChunk(RequestModel):
    """An image by its place."""

    format: Literal["png", "jpeg"]
    location: str
    expected_tokens: int | None = None
    type: Literal["image_asset_pointer"] = "image_asset_pointer"

    @property
    def length(self) -> int:
        return _expected_length(self.expected_tokens, "ImageAssetPointerChunk")


class DmelChunk(RequestModel):
    """Audio tokens: the bytes of a serialized tensor, [tokens, ...]."""

    dmel: bytes
    type: Literal["dmel"] = "dmel"

    @field_validator("dmel", mode="before")
    @classmethod
    def _decode(cls, value: object) -> object:
        return base64.b64decode(value) if isinstance(value, str) else value

    @field_serializer("dmel")
    def _encode(self, value: bytes) -> str:
        return base64.b64encode(value).decode("ascii")

    @property
    def length(self) -> int:
        shape = _container_shape(self.dmel)
        if not shape:
            raise InvalidRequestError("DmelChunk: the tensor has no dimensions, so it has no length; its first dimension counts tokens")
        return shape[0]


def _own_chunk(value: Any) -> Any:
    """The official SDK's chunk objects as the dict of their fields; everything else stays for pydantic to judge."""
    if isinstance(value, BaseModel) and not isinstance(value, RequestModel):
        return value.model_dump()
    return value


ModelInputChunk: TypeAlias = Annotated[
    Annotated[EncodedTextChunk | ImageAssetPointerChunk | ImageChunk | DmelChunk, Field(discriminator="type")],
    BeforeValidator(_own_chunk),
]


class ModelInput(RequestModel):
    """A sequence of chunks; for text models one chunk of token ids."""

    chunks: list[ModelInputChunk]

    @classmethod
    def from_ints(cls, tokens: Sequence[int]) -> ModelInput:
        """One text chunk. Raises: pydantic.ValidationError (a ValueError) for arrays and tensors; pass `.tolist()`."""
        return cls(chunks=[EncodedTextChunk(tokens=tokens)])

    @classmethod
    def empty(cls) -> ModelInput:
        return cls(chunks=[])

    def to_ints(self) -> list[int]:
        """All token ids. Raises: InvalidRequestError if a chunk is not text."""
        tokens: list[int] = []
        for index, chunk in enumerate(self.chunks):
            if not isinstance(chunk, EncodedTextChunk):
                raise InvalidRequestError(f"ModelInput.to_ints: chunk {index} is {chunk.type!r}; only 'encoded_text' holds token ids")
            tokens.extend(chunk.tokens)
        return tokens

    @property
    def length(self) -> int:
        """Positions in the model's context. Raises: InvalidRequestError for an image chunk without expected_tokens."""
        return sum(chunk.length for chunk in self.chunks)

    def append(self, chunk: ModelInputChunk) -> ModelInput:
        """A new ModelInput with one more chunk."""
        return ModelInput(chunks=[*self.chunks, chunk])

    def append_int(self, token: int) -> ModelInput:
        """A new ModelInput with one more token."""
        return self.append(EncodedTextChunk(tokens=[token]))


def as_model_input(value: Any) -> ModelInput:
    """Ours, unchanged, or ours made from the official SDK's by structure (`chunks`)."""
    if isinstance(value, ModelInput):
        return value
    if isinstance(value, BaseModel) and "chunks" in type(value).model_fields:
        return ModelInput.model_validate(value.model_dump())
    raise TypeError(f"model_input must be a ModelInput, got {type(value).__name__}; make one with ModelInput.from_ints(tokens)")


def _expected_length(expected_tokens: int | None, what: str) -> int:
    if expected_tokens is None:
        raise InvalidRequestError(f"{what}: length is unknown without expected_tokens; set it to the number of tokens of the image")
    return expected_tokens


def _container_shape(data: bytes) -> tuple[int, ...]:
    """Shape in the header of a serialized tensor: [254 for a constant], one dtype byte 0..7, then varints: ndim, sizes."""
    position = 1 if data[:1] == b"\xfe" else 0
    if position >= len(data):
        raise InvalidRequestError(f"DmelChunk: the tensor header is cut off after {len(data)} bytes")
    if data[position] > 7:
        raise InvalidRequestError(f"DmelChunk: dtype byte {data[position]} is unknown; 0..7 are defined")
    num_dims, position = _varint(data, position + 1)
    sizes: list[int] = []
    for _ in range(num_dims):
        size, position = _varint(data, position)
        sizes.append(size)
    return tuple(sizes)


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if position >= len(data):
            raise InvalidRequestError(f"DmelChunk: the tensor header is cut off after {len(data)} bytes")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise InvalidRequestError("DmelChunk: a number in the tensor header is longer than 64 bits")
