"""What the REST client asks: which models can be served, which runs and checkpoints there are, and changes to checkpoints."""

from __future__ import annotations

import asyncio
import tarfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from ptlab.backend.checkpoints import CheckpointPath, Checkpoints, expiry
from ptlab.backend.records import LOCAL_OWNER
from ptlab.backend.runs import Runs
from ptlab.backend.served import ServedModel
from ptlab.types import (
    Checkpoint,
    CheckpointsListResponse,
    Cursor,
    ExternalWeightsUrlsResponse,
    GetServerCapabilitiesResponse,
    SupportedModel,
    TrainingRun,
    TrainingRunsResponse,
    WeightsInfoResponse,
    WhoamiResponse,
)


class Catalog:
    """Reads and edits what is on disk; holds nothing itself.

    Args:
        base_models: names to list as supported before they are opened.
        opened: the base models with live engines.
    """

    def __init__(self, checkpoints: Checkpoints, runs: Runs, base_models: Sequence[str], opened: Callable[[], list[ServedModel]]) -> None:
        self._checkpoints = checkpoints
        self._runs = runs
        self._base_models = base_models
        self._opened = opened

    async def get_server_capabilities(self) -> GetServerCapabilitiesResponse:
        live = {served.info.name: served.info.max_context_length for served in self._opened()}
        names = [*live, *(name for name in self._base_models if name not in live)]
        models = [SupportedModel(model_name=n, max_context_length=live.get(n), trainable=True, sampleable=True) for n in names]
        return GetServerCapabilitiesResponse(supported_models=models)

    async def get_training_run(self, training_run_id: str) -> TrainingRun:
        return await asyncio.to_thread(self._runs.get, training_run_id)

    async def list_training_runs(self, limit: int, offset: int, owner: str | None = None) -> TrainingRunsResponse:
        """Newest first; of one owner, or of all."""
        runs = await asyncio.to_thread(self._runs.list, owner)
        return TrainingRunsResponse(
            training_runs=runs[offset : offset + limit], cursor=Cursor(offset=offset, limit=limit, total_count=len(runs))
        )

    async def list_checkpoints(self, training_run_id: str, *, external: bool = True) -> CheckpointsListResponse:
        """Newest first; with `external` False without those of save_weights_external."""
        await self.get_training_run(training_run_id)  # an unknown run is an error, not an empty list
        found: list[Checkpoint] = await asyncio.to_thread(self._checkpoints.list, training_run_id)
        return CheckpointsListResponse(checkpoints=[c for c in found if external or c.checkpoint_type != "external"])

    async def list_user_checkpoints(
        self, limit: int, offset: int, owner: str | None = None, *, external: bool = True
    ) -> CheckpointsListResponse:
        """Newest first; of one owner's runs, or of all; with `external` False without those of save_weights_external."""
        found: list[Checkpoint] = await asyncio.to_thread(self._checkpoints.list)
        found = [checkpoint for checkpoint in found if external or checkpoint.checkpoint_type != "external"]
        if owner is not None:
            runs = {run.training_run_id for run in await asyncio.to_thread(self._runs.list, owner)}
            found = [checkpoint for checkpoint in found if CheckpointPath.parse(checkpoint.tinker_path).model_id in runs]
        return CheckpointsListResponse(
            checkpoints=found[offset : offset + limit], cursor=Cursor(offset=offset, limit=limit, total_count=len(found))
        )

    async def delete_checkpoint(self, training_run_id: str, checkpoint_id: str) -> None:
        await asyncio.to_thread(self._checkpoints.delete, _path(training_run_id, checkpoint_id))

    async def set_checkpoint_published(self, training_run_id: str, checkpoint_id: str, *, public: bool) -> None:
        await asyncio.to_thread(self._checkpoints.update, _path(training_run_id, checkpoint_id), public=public)

    async def set_checkpoint_ttl(self, training_run_id: str, checkpoint_id: str, ttl_seconds: int | None) -> None:
        await asyncio.to_thread(self._checkpoints.update, _path(training_run_id, checkpoint_id), expires_at=expiry(ttl_seconds))

    async def get_weights_info(self, tinker_path: str) -> WeightsInfoResponse:
        manifest, _ = await asyncio.to_thread(self._checkpoints.read, CheckpointPath.parse(tinker_path))
        return WeightsInfoResponse(
            base_model=manifest.base_model,
            is_lora=True,
            lora_rank=manifest.lora.rank,
            train_unembed=manifest.lora.train_unembed,
            train_mlp=manifest.lora.train_mlp,
            train_attn=manifest.lora.train_attn,
        )

    async def get_external_weights_urls(self, tinker_path: str) -> ExternalWeightsUrlsResponse:
        """file:// URLs: client and backend share a disk."""
        urls = {name: file.resolve().as_uri() for name, file in (await self.files(tinker_path)).items()}
        expires = self._checkpoints.manifest(CheckpointPath.parse(tinker_path)).expires_at
        return ExternalWeightsUrlsResponse(urls=urls, expires=expires or datetime.now(UTC) + timedelta(days=1))

    async def files(self, tinker_path: str) -> dict[str, Path]:
        """The files of a checkpoint by name, whole and unexpired. Raises: NotFoundError, CheckpointError."""
        manifest, directory = await asyncio.to_thread(self._checkpoints.read, CheckpointPath.parse(tinker_path))
        return {name: directory / name for name in manifest.files}

    async def get_checkpoint_archive(self, training_run_id: str, checkpoint_id: str) -> Path:
        """A tar file with the checkpoint's files, written beside the checkpoint's kind directory as `.<name>.tar`."""
        path = _path(training_run_id, checkpoint_id)

        def pack() -> Path:
            manifest, directory = self._checkpoints.read(path)
            archive = directory.parent / f".{path.name}.tar"
            temporary = archive.with_suffix(".partial")
            with tarfile.open(temporary, "w") as tar:
                for name in manifest.files:
                    tar.add(directory / name, arcname=name)
            return temporary.replace(archive)

        return await asyncio.to_thread(pack)

    async def copy_weights(self, path: str, ttl_seconds: int | None = None) -> str:
        """A copy under the same model with a name of its own, which outlives the original. Returns its path."""
        source = CheckpointPath.parse(path)
        target = source.model_copy(update={"name": f"{source.name}-copy-{datetime.now(UTC):%Y%m%d%H%M%S%f}"})
        await asyncio.to_thread(lambda: self._checkpoints.copy(source, target, expires_at=expiry(ttl_seconds)))
        return str(target)

    async def whoami(self, owner: str = LOCAL_OWNER) -> WhoamiResponse:
        return WhoamiResponse(user_urn=f"urn:ptlab:user:{owner}", org_urn=f"urn:ptlab:org:{owner}")

    async def is_public(self, tinker_path: str) -> bool:
        """Whether a checkpoint is published. False if there is none."""
        path = CheckpointPath.parse(tinker_path)
        return self._checkpoints.exists(path) and self._checkpoints.manifest(path).public


def _path(training_run_id: str, checkpoint_id: str) -> CheckpointPath:
    return CheckpointPath.parse(f"tinker://{training_run_id}/{checkpoint_id}")
