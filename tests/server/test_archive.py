"""A tar that is made while it is sent."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

from ptlab.server.archive import CHUNK, tar_chunks, tar_size


def test_it_holds_the_files_and_has_the_size_that_was_promised(tmp_path: Path) -> None:
    contents = {"empty": b"", "one": b"x", "block": b"y" * 512, "large.safetensors": os.urandom(CHUNK + 513)}
    files = {name: tmp_path / f"file{i}" for i, name in enumerate(contents)}
    for name, content in contents.items():
        files[name].write_bytes(content)
    archive = b"".join(tar_chunks(files))
    assert len(archive) == tar_size(files)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        members = {member.name: member for member in tar}
        found = {name: tar.extractfile(member) for name, member in members.items()}
        assert {name: stream.read() for name, stream in found.items() if stream is not None} == contents
        assert {(m.uid, m.mtime, m.uname) for m in members.values()} == {(0, 0, "")}
    assert list(tar_chunks({})) == [b"\0" * 1024]
