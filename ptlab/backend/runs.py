"""Training runs that outlive the process: `<root>/<model_id>/run.json`, one small file a run, beside its checkpoints."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ptlab.backend.checkpoints import Checkpoints, checked
from ptlab.backend.records import LOCAL_OWNER
from ptlab.errors import NotFoundError
from ptlab.types import LoraConfig, TrainingRun

RUN_FILE = "run.json"


class RunRecord(BaseModel):
    """What was asked for when the model was created."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    model_id: str
    base_model: str
    lora: LoraConfig
    created: datetime
    owner: str = LOCAL_OWNER
    user_metadata: dict[str, str] | None = None


class Runs:
    """All training runs below one directory, live or past."""

    def __init__(self, root: Path, checkpoints: Checkpoints) -> None:
        self._root = root
        self._checkpoints = checkpoints

    def record(
        self, model_id: str, base_model: str, lora: LoraConfig, user_metadata: dict[str, str] | None, owner: str = LOCAL_OWNER
    ) -> None:
        directory = self._root / checked(model_id, "model id")
        directory.mkdir(parents=True, exist_ok=True)
        run = RunRecord(
            model_id=model_id, base_model=base_model, lora=lora, created=datetime.now(UTC), owner=owner, user_metadata=user_metadata
        )
        temporary = directory / f".{RUN_FILE}"
        temporary.write_text(run.model_dump_json(indent=1) + "\n")
        temporary.replace(directory / RUN_FILE)

    def get(self, model_id: str) -> TrainingRun:
        """Raises: NotFoundError."""
        file = self._root / checked(model_id, "training run id") / RUN_FILE
        if not file.exists():
            raise NotFoundError(f"no training run {model_id!r} below {self._root}")
        return self._describe(RunRecord.model_validate_json(file.read_bytes()), file)

    def list(self, owner: str | None = None) -> list[TrainingRun]:
        """Newest first; of one owner, or of all."""
        records = [(RunRecord.model_validate_json(file.read_bytes()), file) for file in self._root.glob(f"*/{RUN_FILE}")]
        runs = [self._describe(record, file) for record, file in records if owner in (None, record.owner)]
        return sorted(runs, key=lambda run: run.last_request_time, reverse=True)

    def _describe(self, record: RunRecord, file: Path) -> TrainingRun:
        saved = self._checkpoints.list(record.model_id)
        return TrainingRun(
            training_run_id=record.model_id,
            base_model=record.base_model,
            model_owner=record.owner,
            is_lora=True,
            lora_rank=record.lora.rank,
            last_request_time=max([c.time for c in saved] + [datetime.fromtimestamp(file.stat().st_mtime, UTC)]),
            last_checkpoint=next((c for c in saved if c.checkpoint_type == "training"), None),
            last_sampler_checkpoint=next((c for c in saved if c.checkpoint_type == "sampler"), None),
            user_metadata=record.user_metadata,
        )
