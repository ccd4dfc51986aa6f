"""A tar of files that is sent while it is made: nothing is written, and its size is known beforehand."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

BLOCK: Final = tarfile.BLOCKSIZE
CHUNK: Final = 1 << 20


def tar_size(files: Mapping[str, Path]) -> int:
    """Bytes that tar_chunks gives for these files."""
    return sum(BLOCK + _padded(path.stat().st_size) for path in files.values()) + 2 * BLOCK


def tar_chunks(files: Mapping[str, Path]) -> Iterator[bytes]:
    """Names (at most 100 bytes of ASCII), contents, and neither owners nor times: the same files give the same tar. Raises: OSError."""
    for name, path in files.items():
        info = tarfile.TarInfo(name)
        info.size = path.stat().st_size
        yield info.tobuf(tarfile.USTAR_FORMAT)
        sent = 0
        with path.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                sent += len(chunk)
                yield chunk
        yield b"\0" * (_padded(sent) - sent)
    yield b"\0" * (2 * BLOCK)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
