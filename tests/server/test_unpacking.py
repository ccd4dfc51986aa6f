"""Bodies that are small on the wire and large in memory: refused before they are unpacked."""

from __future__ import annotations

import subprocess
import sys

import pytest
import zstandard

from ptlab.errors import InvalidRequestError
from ptlab.server import unpacking
from ptlab.server import wire_pb2 as pb
from ptlab.server.unpacking import MAX_DENSE_CELLS, CellBudget, TooLargeError, check_parts, check_shape, decompress_zstd

LIMIT = 1 << 20
DATA = pb.ForwardBackwardRequest.DATA_FIELD_NUMBER


def compressed_without_size(data: bytes) -> bytes:
    compressor = zstandard.ZstdCompressor().compressobj()
    return compressor.compress(data) + compressor.flush()


@pytest.mark.parametrize("size", [0, 1, 1000, LIMIT])
def test_frames_of_either_kind_come_back(size: int) -> None:
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    assert decompress_zstd(zstandard.ZstdCompressor().compress(data), LIMIT) == data
    assert decompress_zstd(compressed_without_size(data), LIMIT) == data


def test_one_byte_over_the_limit_is_refused() -> None:
    data = b"x" * (LIMIT + 1)
    with pytest.raises(TooLargeError, match=rf"declares {LIMIT + 1} bytes; at most {LIMIT}"):
        decompress_zstd(zstandard.ZstdCompressor().compress(data), LIMIT)
    with pytest.raises(TooLargeError, match=f"holds more than the {LIMIT} bytes"):
        decompress_zstd(compressed_without_size(data), LIMIT)


BOMBS = """
import resource, zstandard
from ptlab.server.unpacking import decompress_zstd

def bomb(size):
    compressor = zstandard.ZstdCompressor().compressobj(size=size)
    return b"".join([*(compressor.compress(bytes(1 << 20)) for _ in range(1 << 8)), compressor.flush()])

undeclared = bomb(-1)
# the header byte that says how long the size field is, the window, and then a size that is not the frame's
lying = undeclared[:4] + bytes([undeclared[4] | 0x80]) + undeclared[5:6] + (16).to_bytes(4, "little") + undeclared[6:]
for body in (bomb(1 << 28), undeclared, lying):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        decompress_zstd(body, 1 << 22)
    except Exception as err:
        print(type(err).__name__, len(body) < 1 << 16, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 15)
"""


def test_a_bomb_of_256_megabytes_takes_less_than_32() -> None:
    run = subprocess.run([sys.executable, "-c", BOMBS], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["TooLargeError True True", "TooLargeError True True", "InvalidRequestError True True"]


def test_what_is_no_single_whole_frame_is_refused() -> None:
    frame = zstandard.ZstdCompressor().compress(b"some text " * 100)
    with pytest.raises(InvalidRequestError, match="not a zstd frame"):
        decompress_zstd(frame + b"end", LIMIT)
    with pytest.raises(InvalidRequestError, match=f"{len(frame)} bytes follow"):
        decompress_zstd(frame + frame, LIMIT)
    for end in range(len(frame)):
        with pytest.raises(InvalidRequestError):
            decompress_zstd(frame[:end], LIMIT)
    for end in (5, 20, -1):
        with pytest.raises(InvalidRequestError):
            decompress_zstd(compressed_without_size(b"some text " * 100)[:end], LIMIT)
    with pytest.raises(InvalidRequestError, match="not a zstd frame"):
        decompress_zstd(b"no zstd at all", LIMIT)


def test_a_window_beyond_the_limit_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=27, write_content_size=False)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    frame = compressor.compress(b"abc") + compressor.flush()
    with pytest.raises(InvalidRequestError, match="not a zstd frame that can be read here"):
        decompress_zstd(frame, LIMIT)
    assert decompress_zstd(frame, 1 << 27) == b"abc"


def test_parts_are_counted_before_they_are_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "MAX_PARTS", 10)
    empty_datum, datum_of_five = b"\x1a\x00", b"\x1a\x0a" + b"\x0a\x00" * 5
    check_parts(empty_datum * 10, repeated=DATA)
    check_parts(datum_of_five + empty_datum * 4, repeated=DATA)
    for body in (empty_datum * 11, datum_of_five + empty_datum * 5, datum_of_five * 2, b"\x2a\x00" * 11):
        with pytest.raises(TooLargeError, match="more than 10 chunks"):
            check_parts(body, repeated=DATA)
    check_parts(b"\x22\x0a" + b"\x0a\x00" * 5, repeated=DATA)  # another field's content is not looked into


@pytest.mark.parametrize(
    "body",
    [b"\x1a", b"\x1a\x05ab", b"\x1a\x02\x0a\x05", b"\x80" * 11, b"\x0d\x00", b"\x09\x00", b"\x08", b"\x0b\x0c", b"\x1a" + b"\xff" * 9],
)
def test_broken_framing_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="no ForwardBackwardRequest"):
        check_parts(body, repeated=DATA)


def test_shapes() -> None:
    check_shape([0, 5], "here")
    with pytest.raises(InvalidRequestError, match=r"here: the shape \[3, -1\] holds a negative size"):
        check_shape([3, -1], "here")
    with pytest.raises(InvalidRequestError, match="here: the shape has 9 dimensions"):
        check_shape([1] * 9, "here")


def test_the_cells_of_a_request_add_up() -> None:
    budget = CellBudget()
    budget.take([MAX_DENSE_CELLS // 2, 2], "datum 0")
    with pytest.raises(TooLargeError, match=r"datum 1, 'weights': with its shape \[1, 1\]"):
        budget.take([1, 1], "datum 1, 'weights'")
