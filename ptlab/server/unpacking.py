"""How much a body may become once it is unpacked: judged before it is, whether by zstd or by protobuf."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from typing import Final

import zstandard

from ptlab.errors import InvalidRequestError

MAX_PARTS: Final = 250_000
"""Chunks, loss inputs, spans and settings of one request. Two bytes of input make one of them, and each takes some hundred in memory."""
MAX_DENSE_CELLS: Final = 2**27
"""Cells of all sparse tensors of one request once they are dense: a few bytes of CSR can name a shape of any size."""
MAX_DIMENSIONS: Final = 8

_ZSTD_BLOCK: Final = 1 << 17
_ZSTD_MIN_WINDOW: Final = 1 << 23


class TooLargeError(InvalidRequestError):
    """A body beyond a limit of the server."""


def decompress_zstd(body: bytes, limit_bytes: int) -> bytes:
    """One zstd frame, the whole body.

    Raises: TooLargeError above limit_bytes, whatever size the frame declares; InvalidRequestError if it is cut off, damaged or followed by
    something else.
    """
    try:
        declared = zstandard.frame_content_size(body)
        if declared > limit_bytes:
            raise TooLargeError(f"the zstd body declares {declared} bytes; at most {limit_bytes} are accepted")
        decompressor = zstandard.ZstdDecompressor(max_window_size=max(limit_bytes, _ZSTD_MIN_WINDOW))
        # First only count: what a frame declares binds nobody, and a decompressor object writes out all it is given at once.
        block = bytearray(_ZSTD_BLOCK)
        size = 0
        with decompressor.stream_reader(io.BytesIO(body), read_across_frames=False) as reader:
            while count := reader.readinto(block):
                size += count
                if size > limit_bytes:
                    raise TooLargeError(f"the zstd body holds more than the {limit_bytes} bytes that are accepted")
        frame = decompressor.decompressobj(read_across_frames=False)
        data: bytes = frame.decompress(body)
    except zstandard.ZstdError as err:
        raise InvalidRequestError(f"the body ({len(body)} bytes) is not a zstd frame that can be read here: {err}") from err
    if not frame.eof:
        raise InvalidRequestError(f"the zstd body is cut off after {len(body)} bytes")
    if frame.unused_data:
        raise InvalidRequestError(f"{len(frame.unused_data)} bytes follow the zstd frame; a body is one frame")
    return data


def check_parts(body: bytes, *, repeated: int) -> None:
    """Refuses a body that is small on the wire and large once parsed, before it is parsed."""
    parts = 0
    for field, start, end in _fields(body, 0, len(body)):
        parts += 1
        if field == repeated and end >= 0:
            for _ in _fields(body, start, end):
                parts += 1
                if parts > MAX_PARTS:
                    break
        if parts > MAX_PARTS:
            raise TooLargeError(f"the body has more than {MAX_PARTS} chunks, loss inputs and spans; send fewer datums at a time")


def _fields(body: bytes, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, start, end) of every field between two positions of a protobuf message; end is -1 unless the field has a length."""
    while position < end:
        tag, position = _varint(body, position, end)
        field, wire_type = tag >> 3, tag & 7
        stop = -1
        start = position
        match wire_type:
            case 0:
                _, position = _varint(body, position, end)
            case 1:
                position += 8
            case 2:
                length, start = _varint(body, position, end)
                position = stop = start + length
            case 5:
                position += 4
            case _:
                raise InvalidRequestError(f"the body is no ForwardBackwardRequest in protobuf: wire type {wire_type} at byte {position}")
        if position > end:
            raise InvalidRequestError(f"the body is no ForwardBackwardRequest in protobuf: a field at byte {start} is cut off")
        yield field, start, stop


def _varint(body: bytes, position: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            break
        byte = body[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise InvalidRequestError(f"the body is no ForwardBackwardRequest in protobuf: the number before byte {position} has no end")


def check_shape(shape: Sequence[int], where: str) -> None:
    """Raises: InvalidRequestError for a shape that no array has."""
    if len(shape) > MAX_DIMENSIONS:
        raise InvalidRequestError(f"{where}: the shape has {len(shape)} dimensions; at most {MAX_DIMENSIONS} are read")
    if any(size < 0 for size in shape):
        raise InvalidRequestError(f"{where}: the shape {list(shape)} holds a negative size")


class CellBudget:
    """Counts the cells that the sparse tensors of one request have when they are dense."""

    def __init__(self) -> None:
        self._left = MAX_DENSE_CELLS

    def take(self, shape: Sequence[int], where: str) -> None:
        """Raises: TooLargeError."""
        self._left -= math.prod(shape)
        if self._left < 0:
            raise TooLargeError(
                f"{where}: with its shape {list(shape)} the sparse tensors of this request have more than {MAX_DENSE_CELLS} cells; "
                "send fewer datums at a time"
            )
