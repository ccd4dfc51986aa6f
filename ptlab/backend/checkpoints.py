"""Checkpoints on disk: one directory per name, whole or not at all.

    <root>/<model_id>/<kind>/<name>/manifest.json + the files of that kind        kind = weights | sampler_weights | external_weights

A checkpoint is written under a temporary name and renamed once every file and the manifest are on the disk, so a reader never meets
half of one; what a crash leaves behind begins with a dot and is cleared at the next start. `tinker://<model_id>/<kind>/<name>`
names it in the API.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ptlab.errors import CheckpointError, InvalidRequestError, NotFoundError
from ptlab.types import Checkpoint, LoraConfig, ParsedCheckpointTinkerPath

Kind = Literal["weights", "sampler_weights", "external_weights"]
KINDS: dict[Kind, Literal["training", "sampler", "external"]] = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:+=-]{0,199}")  # no slash, no leading dot: a name cannot leave its directory


class File(BaseModel):
    """One file of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    size_bytes: int
    sha256: str


class Probe(BaseModel):
    """What the trainer computed for a few fixed tokens with these weights; a sampler that loads them must agree."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    tokens: list[int]
    logprobs: list[float]
    base_logprobs: list[float]


class Manifest(BaseModel):
    """What a checkpoint holds and what it fits."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format_version: int = FORMAT_VERSION
    base_model: str
    lora: LoraConfig
    alpha: int
    step: int
    seq_id: int | None = None
    """The request that wrote it; copies have none."""
    created: datetime
    expires_at: datetime | None = None
    public: bool = False
    user_metadata: dict[str, str] | None = None
    probe: Probe | None = None
    files: dict[str, File] = {}


class CheckpointPath(BaseModel):
    """`tinker://<model_id>/<kind>/<name>` taken apart."""

    model_config = ConfigDict(frozen=True)
    model_id: str
    kind: Kind
    name: str

    @classmethod
    def of(cls, model_id: str, kind: Kind, name: str) -> CheckpointPath:
        """Raises: InvalidRequestError for a name that cannot be a directory's."""
        return cls(model_id=model_id, kind=kind, name=checked(name, "checkpoint name"))

    @classmethod
    def parse(cls, path: str) -> CheckpointPath:
        parsed = ParsedCheckpointTinkerPath.from_tinker_path(path)
        kind, name = parsed.checkpoint_id.split("/")
        return cls.model_validate(
            {"model_id": checked(parsed.training_run_id, "model id"), "kind": kind, "name": checked(name, "checkpoint name")}
        )

    def __str__(self) -> str:
        return f"tinker://{self.model_id}/{self.kind}/{self.name}"


class Checkpoints:
    """All checkpoints below one directory. Blocking; several threads may use it at once.

    Two processes may share the directory as long as they do not write the same checkpoint name.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._changing = threading.Lock()  # whoever replaces, changes or deletes what others may be looking at
        root.mkdir(parents=True, exist_ok=True)
        self._clear_leftovers()

    def _clear_leftovers(self) -> None:
        """Undo what a killed process left: a finished replacement is kept, an unfinished write is dropped."""
        for replaced in self.root.glob("*/*/.old-*"):
            name = replaced.with_name(replaced.name.split("~", 1)[1])
            if name.exists():
                shutil.rmtree(replaced)
            else:
                replaced.rename(name)
        for unfinished in self.root.glob("*/*/.new-*"):
            if _abandoned(unfinished):
                shutil.rmtree(unfinished, ignore_errors=True)  # another process may be clearing it too

    def directory(self, path: CheckpointPath) -> Path:
        return self.root / path.model_id / path.kind / path.name

    def exists(self, path: CheckpointPath) -> bool:
        return (self.directory(path) / MANIFEST).exists()

    def write(self, path: CheckpointPath, manifest: Manifest, fill: Callable[[Path], None], *, overwrite: bool = False) -> Manifest:
        """Make the directory of `path`: `fill` writes the files, then checksums, manifest, fsync, rename.

        Returns the manifest as written. Raises: InvalidRequestError if the name is taken and overwrite is False; whatever `fill` raises,
        with nothing left behind.
        """
        checked(path.name, "checkpoint name")
        final = self.directory(path)
        if final.exists() and not overwrite:
            raise InvalidRequestError(f"checkpoint {path} exists already; choose another name or pass overwrite=True")
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f".new-{os.getpid()}-{uuid.uuid4().hex[:8]}~{final.name}")
        temporary.mkdir()
        try:
            fill(temporary)
            files = {file.name: File(size_bytes=file.stat().st_size, sha256=sha256(file)) for file in sorted(temporary.iterdir())}
            manifest = manifest.model_copy(update={"files": files})
            _write_json(temporary / MANIFEST, manifest)
            for file in temporary.iterdir():
                fsync(file)
            fsync(temporary)
            with self._changing:
                _replace(final, temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)  # the first error is the one to report
            raise
        fsync(final.parent)
        return manifest

    def manifest(self, path: CheckpointPath) -> Manifest:
        """What a checkpoint that exists says of itself; its files are not looked at."""
        return read_manifest(self.directory(path) / MANIFEST)

    def read(self, path: CheckpointPath) -> tuple[Manifest, Path]:
        """Manifest and directory of a checkpoint whose files are all there, whole and unexpired.

        Raises: NotFoundError if there is none; CheckpointError if it is torn or of a newer format.
        """
        directory = self.directory(path)
        if not (directory / MANIFEST).exists():
            raise NotFoundError(f"no checkpoint {path} below {self.root}" + self._neighbours(path))
        manifest = read_manifest(directory / MANIFEST)
        if manifest.expires_at is not None and manifest.expires_at < datetime.now(UTC):
            raise NotFoundError(f"checkpoint {path} expired at {manifest.expires_at:%Y-%m-%d %H:%M} UTC")
        for name, file in manifest.files.items():
            if not _is_whole(directory / name, file):
                if read_manifest(directory / MANIFEST) != manifest:  # it was replaced under our eyes
                    return self.read(path)
                raise CheckpointError(
                    f"checkpoint {path}: {name} is missing or differs from its checksum in {MANIFEST}; the copy is damaged, use another one"
                )
        return manifest, directory

    def _neighbours(self, path: CheckpointPath) -> str:
        names = [c.checkpoint_id for c in self.list(path.model_id)][:8]
        return f"; this model has {', '.join(names)}" if names else f"; nothing was saved under model id {path.model_id}"

    def list(self, model_id: str | None = None) -> list[Checkpoint]:
        """Checkpoints of one model or of all, newest first; expired ones are deleted, not listed."""
        found = []
        models = [self.root / model_id] if model_id else _entries(self.root)
        for directory in [name for model in models for kind in _entries(model) for name in _entries(kind)]:
            if directory.name.startswith(".") or directory.parent.name not in KINDS:
                continue
            try:
                manifest = read_manifest(directory / MANIFEST)
            except NotFoundError:  # no checkpoint, or deleted since
                continue
            if manifest.expires_at is not None and manifest.expires_at < datetime.now(UTC):
                shutil.rmtree(directory, ignore_errors=True)  # somebody else may be at it
                continue
            path = CheckpointPath.parse(f"tinker://{directory.parent.parent.name}/{directory.parent.name}/{directory.name}")
            found.append(_as_listed(path, manifest))
        return sorted(found, key=lambda c: c.time, reverse=True)

    def delete(self, path: CheckpointPath) -> None:
        directory = self.directory(path)
        doomed = directory.with_name(f".new-0-deleted{uuid.uuid4().hex[:8]}~{directory.name}")
        with self._changing:
            if not directory.exists():
                raise NotFoundError(f"no checkpoint {path} to delete" + self._neighbours(path))
            directory.rename(doomed)  # gone at once for every reader, then its files
        shutil.rmtree(doomed)

    def update(self, path: CheckpointPath, **changes: Any) -> None:
        """Change manifest fields that are about the checkpoint, not its content: public, expires_at."""
        directory = self.directory(path)
        with self._changing:
            if not (directory / MANIFEST).exists():
                raise NotFoundError(f"no checkpoint {path}" + self._neighbours(path))
            manifest = read_manifest(directory / MANIFEST).model_copy(update=changes)
            temporary = directory / f".{MANIFEST}-{uuid.uuid4().hex[:8]}"
            _write_json(temporary, manifest)
            temporary.replace(directory / MANIFEST)

    def copy(self, source: CheckpointPath, target: CheckpointPath, *, expires_at: datetime | None) -> None:
        manifest, directory = self.read(source)

        def fill(new: Path) -> None:
            for name in manifest.files:
                shutil.copyfile(directory / name, new / name)

        changes = {"expires_at": expires_at, "seq_id": None, "created": datetime.now(UTC), "public": False}
        self.write(target, manifest.model_copy(update=changes), fill)


def expiry(ttl_seconds: int | None) -> datetime | None:
    """The moment a time to live ends. Raises: InvalidRequestError outside one hour to ten years."""
    if ttl_seconds is None:
        return None
    if not 3600 <= ttl_seconds <= 10 * 365 * 86400:
        raise InvalidRequestError(
            f"ttl_seconds is {ttl_seconds}; it must lie between 3600 (an hour) and 315360000 (ten years), or be None for no limit"
        )
    return datetime.now(UTC) + timedelta(seconds=ttl_seconds)


def _entries(directory: Path) -> list[Path]:
    """What is in a directory now; nothing if it is gone or no directory. (Path.glob raises where another thread deletes meanwhile.)"""
    try:
        return sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_whole(path: Path, file: File) -> bool:
    try:
        return path.stat().st_size == file.size_bytes and sha256(path) == file.sha256
    except FileNotFoundError:
        return False


def _as_listed(path: CheckpointPath, manifest: Manifest) -> Checkpoint:
    return Checkpoint(
        checkpoint_id=f"{path.kind}/{path.name}",
        checkpoint_type=KINDS[path.kind],
        time=manifest.created,
        tinker_path=str(path),
        size_bytes=sum(file.size_bytes for file in manifest.files.values()),
        public=manifest.public,
        user_metadata=manifest.user_metadata,
        expires_at=manifest.expires_at,
    )


def checked(name: str, what: str) -> str:
    """The name, if it can be a directory's. Raises: InvalidRequestError."""
    if not _NAME.fullmatch(name):
        raise InvalidRequestError(
            f"{what} {name!r} is not allowed: use letters, digits and _ . : + = - (no slash, no leading dot), at most 200 characters"
        )
    return name


def _replace(final: Path, temporary: Path) -> None:
    """Put `temporary` in the place of `final`. A crash between the two renames is mended by _clear_leftovers."""
    if not final.exists():
        temporary.rename(final)
        return
    old = final.with_name(f".old-{uuid.uuid4().hex[:8]}~{final.name}")
    final.rename(old)
    temporary.rename(final)
    shutil.rmtree(old)


def _abandoned(unfinished: Path) -> bool:
    """Whether nobody writes `.new-<pid>-...` any more: its process is gone, or it is an hour old (process ids come again)."""
    pid = unfinished.name.split("-")[1]
    return not Path(f"/proc/{pid}").exists() or time.time() - unfinished.stat().st_mtime > 3600


def read_manifest(file: Path) -> Manifest:
    """Raises: NotFoundError if there is none; CheckpointError if this version of ptlab cannot read it."""
    try:
        manifest = Manifest.model_validate_json(file.read_bytes())
    except FileNotFoundError as err:
        raise NotFoundError(f"{file}: no such checkpoint; it was deleted, or never saved") from err
    except ValidationError as err:
        raise CheckpointError(f"{file}: not a manifest this version of ptlab can read ({err.errors()[0]['msg']})") from err
    if manifest.format_version > FORMAT_VERSION:
        raise CheckpointError(f"{file}: format {manifest.format_version}, this ptlab reads up to {FORMAT_VERSION}; use a newer ptlab")
    return manifest


def _write_json(file: Path, manifest: Manifest) -> None:
    file.write_text(json.dumps(manifest.model_dump(mode="json"), indent=1) + "\n")
    fsync(file)


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
