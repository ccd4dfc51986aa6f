"""Adapters that another data directory, or another program, left on this machine: copied in, so that they have a tinker:// path here.

A checkpoint of ptlab brings its manifest and its probe. A plain PEFT directory has neither: the trainer reads it and computes the probe,
so that what the sampler loads is verified like everything else.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ptlab.backend.checkpoints import MANIFEST, CheckpointPath, Checkpoints, Manifest, read_manifest, sha256
from ptlab.backend.served import ServedModel
from ptlab.backend.weight_sync import ADAPTER_FILE, saved_tensor_names
from ptlab.engines.protocols import AdapterRef
from ptlab.errors import CheckpointError, InvalidRequestError, NotFoundError
from ptlab.types import LoraConfig

ADAPTER_CONFIG = "adapter_config.json"


async def import_adapter(
    checkpoints: Checkpoints, serve: Callable[[str], Awaitable[ServedModel]], directory: Path, base_model: str | None
) -> str:
    """tinker:// path, for sampling, of a copy of the adapter in `directory`; the same content is copied once.

    Args:
        base_model: what a plain PEFT directory belongs to; None = what its adapter_config.json names.
    Raises: NotFoundError if there is no adapter; CheckpointError if it is damaged or belongs to another base model.
    """
    for name in (ADAPTER_FILE, ADAPTER_CONFIG):
        if not (directory / name).is_file():
            raise NotFoundError(
                f"{directory}: no {name}; name a directory of sampler weights (<run>/checkpoints/<model id>/sampler_weights/<name>), "
                "or one in PEFT layout"
            )
    digest = await asyncio.to_thread(sha256, directory / ADAPTER_FILE)
    settings = await asyncio.to_thread(sha256, directory / ADAPTER_CONFIG)  # the same tensors under another alpha are other weights
    path = CheckpointPath(model_id=f"imported-{digest[:16]}-{settings[:8]}", kind="sampler_weights", name="adapter")
    own = directory / MANIFEST
    if own.is_file():
        manifest = await asyncio.to_thread(read_manifest, own)
        recorded = manifest.files.get(ADAPTER_FILE)
        if recorded is None or recorded.sha256 != digest:
            raise CheckpointError(f"{directory}: {ADAPTER_FILE} differs from its checksum in {MANIFEST}; the copy is damaged")
        if manifest.probe is None:
            raise CheckpointError(f"{directory}: holds a training state; name weights saved for sampling (.../sampler_weights/<name>)")
    else:
        manifest = await _manifest_of_peft(serve, directory, base_model)
    if base_model is not None and manifest.base_model != base_model:
        raise CheckpointError(f"{directory} belongs to {manifest.base_model}, not to {base_model}")
    if not checkpoints.exists(path):
        changes = {"seq_id": None, "created": datetime.now(UTC), "expires_at": None, "public": False}

        def fill(new: Path) -> None:
            for name in (ADAPTER_FILE, ADAPTER_CONFIG):
                shutil.copyfile(directory / name, new / name)

        await asyncio.to_thread(checkpoints.write, path, manifest.model_copy(update=changes), fill)
    return str(path)


async def _manifest_of_peft(serve: Callable[[str], Awaitable[ServedModel]], directory: Path, base_model: str | None) -> Manifest:
    config = json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    name = base_model or config.get("base_model_name_or_path")
    if not name:
        raise InvalidRequestError(f"{directory}: {ADAPTER_CONFIG} names no base model; say which one it belongs to")
    served = await serve(name)
    tensors = saved_tensor_names(directory)
    probe = await served.sync.probe_of(AdapterRef(name=f"probe of {directory}", version=0, path=directory))
    return Manifest(
        base_model=name, lora=_lora(config, tensors), alpha=int(config["lora_alpha"]), step=0, created=datetime.now(UTC), probe=probe
    )


def _lora(config: dict[str, Any], tensors: frozenset[str]) -> LoraConfig:
    """Rank, and which kinds of layers the tensors belong to, by the names that transformers gives them."""
    return LoraConfig(
        rank=int(config["r"]),
        train_attn=any("attn" in name for name in tensors),
        train_mlp=any("mlp" in name for name in tensors),
        train_unembed=any("lm_head" in name for name in tensors),
    )
