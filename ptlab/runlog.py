"""One run directory, runs/<name>/, and what a run says on the terminal.

    config.yaml         the resolved config            metrics.jsonl      one object per step: {"step": 3, "reward/mean": 0.31, ...}
    run.json            versions, commit, hardware     transcripts.jsonl  some trajectories per step, as text
    curves.png          the run at a glance            checkpoints.jsonl  {"step", "path", "kind"} of every durable checkpoint
    checkpoints/        the checkpoints themselves (written by the backend)

Step s counts finished training steps: row s of metrics.jsonl is written when step s ends, and a checkpoint of step s holds the state
*before* step s, so a resumed run starts with step s. Lines are appended whole, by one write; metrics reach the disk (fsync) before the
checkpoint that follows them is noted. A resume cuts every file back to its checkpoint, so that no step is there twice.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from ptlab.config import RunConfig, parse_yaml
from ptlab.curves import draw_curves
from ptlab.errors import ConfigError
from ptlab.provenance import provenance
from ptlab.report import final_report, progress_line
from ptlab.trackers import Tracker, check_trackers, open_trackers

METRICS, TRANSCRIPTS, CHECKPOINTS = "metrics.jsonl", "transcripts.jsonl", "checkpoints.jsonl"
_OWN_FILES = ("config.yaml", "run.json", METRICS, TRANSCRIPTS, CHECKPOINTS, "curves.png", "wandb_id.txt")
_OWN_DIRECTORIES = ("checkpoints", "tensorboard", "wandb")
_KEY = re.compile(r"[a-z0-9_]+(/[A-Za-z0-9_.:@-]+)+")
# What may differ between a run and its continuation: it changes where and how often things are written, not what is learnt.
_FREE_ON_RESUME = frozenset({"name", "run_dir", "steps", "eval", "checkpoint", "logging", "engines"})


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointEntry:
    """A durable checkpoint of the run."""

    step: int
    """Finished training steps; a resumed run starts with this step."""
    path: str
    """tinker:// path of the state."""
    kind: str = "state"
    """"state" (adapter and optimizer) or "sampler" (adapter only)."""


class RunLog:
    """Writes one run directory. Make it with `RunLog.open`; use it as a context manager."""

    def __init__(self, config: RunConfig, directory: Path, lock_fd: int, trackers: Sequence[Tracker], echo: Callable[[str], None]) -> None:
        self.directory = directory
        self._config = config
        self._lock_fd = lock_fd
        self._trackers = trackers
        self._echo = echo
        self._started = time.monotonic()
        self._last_step = max((row["step"] for row in _read_lines(directory / METRICS)), default=-1)

    @classmethod
    def open(cls, config: RunConfig, *, resume: bool = False, overwrite: bool = False, echo: Callable[[str], None] = print) -> RunLog:
        """Prepare the run directory; everything that can be refused is refused here, before anything is lost.

        Args:
            resume: continue the run that is there (from step 0 if it has no checkpoint, or if there is none).
            overwrite: delete the run that is there, its checkpoints too.
            echo: takes each line meant for the terminal.
        Raises: ConfigError if the directory holds a run and neither flag is set, if a resume changes what is learnt, if another
            process writes there, or if a tracker's package is missing.
        """
        directory = config.directory
        if resume and overwrite:
            raise ConfigError("--resume continues a run and --overwrite deletes it; give one of the two")
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise ConfigError(f"run directory {directory}: cannot be made: {err.strerror}; choose another run_dir or name") from err
        lock_fd = _lock(directory)
        try:
            if (directory / "config.yaml").exists():
                if not (resume or overwrite):
                    raise ConfigError(_holds_a_run(directory))
                if resume:
                    _check_same_run(config, directory)
            elif resume:
                echo(f"{directory}: no run to resume, starting at step 0")
            check_trackers(config)
            if resume:
                _cut_back(directory)
            else:
                _delete_run(directory)
            _write_run_json(directory, resume)
            _replace(directory / "config.yaml", config.to_yaml())
            trackers = open_trackers(config, directory)
            for row in _read_lines(directory / METRICS):
                for tracker in trackers:
                    tracker.replay(row["step"], {key: value for key, value in row.items() if key != "step"})
            return cls(config, directory, lock_fd, trackers, echo)
        except BaseException:
            os.close(lock_fd)
            raise

    def write(self, step: int, metrics: Mapping[str, float | int | bool]) -> None:
        """Append the row of one finished step and print its progress line. Steps rise; a step is written once.

        NaN and infinities become null: the line stays JSON. Raises: ValueError on a key that is not area/name, or a repeated step.
        """
        if step <= self._last_step:
            raise ValueError(f"metrics of step {step} after those of step {self._last_step}; a step is written once, in order")
        bad = [key for key in metrics if not _KEY.fullmatch(key)]
        if bad:
            raise ValueError(f"metric keys {bad} are not of the form area/name, e.g. reward/mean")
        values = {key: _number(value) for key, value in metrics.items()}
        _append(self.directory / METRICS, [{"step": step} | values])
        self._last_step = step
        for tracker in self._trackers:
            tracker.write(step, {key: value for key, value in values.items() if value is not None})
        self._echo(progress_line(step, self._config.steps, values))

    def transcripts(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append trajectories as text, at most `logging.transcripts` per call.

        A row has `split` ("train" or "eval"), `prompt`, `response`, `reward`, and whatever else is worth reading. The first and last
        "eval" rows of a prompt become the before/after table.
        """
        kept = [dict(row) for row, _ in zip(rows, range(self._config.logging.transcripts), strict=False)]
        _append(self.directory / TRANSCRIPTS, [{"step": step} | row for row in kept])

    def checkpoint(self, step: int, path: str, kind: str = "state") -> None:
        """Note a checkpoint of `step` finished steps; call it only once the checkpoint is durable. Redraws curves.png."""
        for name in (METRICS, TRANSCRIPTS):
            _flush_to_disk(self.directory / name)
        entry = asdict(CheckpointEntry(step=step, path=path, kind=kind))
        if entry not in _read_lines(self.directory / CHECKPOINTS):  # a resumed run may save under the same name again
            _append(self.directory / CHECKPOINTS, [entry])
            _flush_to_disk(self.directory / CHECKPOINTS)
        self._draw()

    def last_checkpoint(self) -> CheckpointEntry | None:
        """The newest full state, from which a resumed run starts; None = start at step 0."""
        return _last_state(self.directory)

    def finish(self) -> None:
        """Flush, draw the curves and print the final table with answers before and after."""
        self._draw()
        rows, transcripts = _read_lines(self.directory / METRICS), _read_lines(self.directory / TRANSCRIPTS)
        self._echo(final_report(self.directory, rows, transcripts, time.monotonic() - self._started))

    def close(self) -> None:
        """Release the directory; safe to call twice."""
        if self._lock_fd < 0:
            return
        for name in (METRICS, TRANSCRIPTS):
            _flush_to_disk(self.directory / name)
        for tracker in self._trackers:
            tracker.close()
        os.close(self._lock_fd)
        self._lock_fd = -1

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _draw(self) -> None:
        rows = _read_lines(self.directory / METRICS)
        if rows:
            draw_curves(rows, self.directory / "curves.png", title=self._config.name)


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Rows of a run directory's metrics.jsonl. Raises: ConfigError if there are none."""
    rows = _read_lines(directory / METRICS)
    if not rows:
        raise ConfigError(f"{directory}: no {METRICS} with rows; name the directory of a run, e.g. runs/quickstart")
    return rows


def newest_sampler_weights(directory: Path) -> Path:
    """The newest weights for sampling that a run directory holds; a directory that is none is returned as it is.

    Raises: ConfigError for a run that has not saved any: they are saved when a run ends.
    """
    if not (directory / CHECKPOINTS).exists() and not (directory / "config.yaml").exists():
        return directory
    saved = [CheckpointEntry(**row) for row in _read_lines(directory / CHECKPOINTS) if row["kind"] == "sampler"]
    if not saved:
        raise ConfigError(f"{directory}: this run has saved no weights for sampling; let it end, or name the directory of such weights")
    newest = max(saved, key=lambda entry: entry.step)
    weights = directory / "checkpoints" / newest.path.removeprefix("tinker://")
    if not weights.is_dir():
        raise ConfigError(
            f"{directory}: its weights do not lie below it; a run on a server leaves them there: name {newest.path}, and the server"
        )
    return weights


# ---------------------------------------------------------------------------------------------------------------------- opening


def _lock(directory: Path) -> int:
    """An exclusive lock that dies with the process, so a killed run never blocks its resume."""
    fd = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        os.close(fd)
        raise ConfigError(f"{directory}: another process is writing this run; stop it or choose another --name") from err
    return fd


def _holds_a_run(directory: Path) -> str:
    steps = len(_read_lines(directory / METRICS))
    last = _last_state(directory)
    state = f"its last checkpoint is of step {last.step}" if last else "it has no checkpoint"
    return (
        f"{directory} already holds a run ({steps} rows of metrics, {state}); continue it with --resume, "
        "replace it with --overwrite, or choose another --name"
    )


def _check_same_run(config: RunConfig, directory: Path) -> None:
    path = directory / "config.yaml"
    before = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    now = config.model_dump()
    free = _FREE_ON_RESUME - ({"steps"} if config.optim.schedule != "constant" else set())  # the schedule depends on the length
    changed = [text for text in _differences(before, now) if text.split(":")[0].split(".")[0] not in free]
    if changed:
        raise ConfigError(
            f"{directory} was started with another config ({'; '.join(changed)}); resume with the config it had, or choose another --name"
        )


def _differences(before: Any, now: Any, path: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = list(dict.fromkeys([*before, *now]))
        return [text for key in keys for text in _differences(before.get(key), now.get(key), f"{path}.{key}" if path else str(key))]
    return [] if before == now else [f"{path}: was {before!r}, is {now!r}"]


def _cut_back(directory: Path) -> None:
    """Keep what came before the last checkpoint; a line torn by a kill goes too."""
    last = _last_state(directory)
    first_step = last.step if last else 0
    for name in (METRICS, TRANSCRIPTS):
        _replace_lines(directory / name, [row for row in _read_lines(directory / name) if row["step"] < first_step])
    _replace_lines(directory / CHECKPOINTS, [row for row in _read_lines(directory / CHECKPOINTS) if row["step"] <= first_step])


def _delete_run(directory: Path) -> None:
    """Remove what a run writes, and nothing else that may lie there."""
    for name in _OWN_FILES:
        (directory / name).unlink(missing_ok=True)
    for name in _OWN_DIRECTORIES:
        if (directory / name).exists():
            shutil.rmtree(directory / name)


def _write_run_json(directory: Path, resume: bool) -> None:
    path = directory / "run.json"
    now: dict[str, Any] = {"started": datetime.now(UTC).isoformat(timespec="seconds")} | provenance()
    if resume and path.exists():
        first = json.loads(path.read_text(encoding="utf-8"))
        now = first | {"resumed": [*first.get("resumed", []), now]}
    _replace(path, json.dumps(now, indent=2) + "\n")


def _last_state(directory: Path) -> CheckpointEntry | None:
    states = [CheckpointEntry(**row) for row in _read_lines(directory / CHECKPOINTS) if row["kind"] == "state"]
    return max(states, key=lambda entry: entry.step, default=None)


# ---------------------------------------------------------------------------------------------------------------------- lines


def _number(value: float | int | bool) -> float | int | bool | None:
    """A plain number (numpy and torch scalars too); None where JSON has no number."""
    if isinstance(value, bool | int):
        return value
    value = float(value)
    return value if math.isfinite(value) else None


def _append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append whole lines with one write to an O_APPEND file: after a kill at most the last line is torn."""
    data = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        while data:
            data = data[os.write(fd, data) :]
    finally:
        os.close(fd)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """All rows of a .jsonl file; a last line without its newline (torn by a kill) is left out.

    Raises: ConfigError if another line is not JSON: the file was edited.
    """
    if not path.exists():
        return []
    *lines, _torn = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as err:
            raise ConfigError(f"{path} line {number} is not JSON; mend or delete the line, or start again with --overwrite") from err
    return rows


def _replace_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    _replace(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _replace(path: Path, text: str) -> None:
    """Write a file so that a reader, and a kill, see the old content or the new, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    _flush_to_disk(temporary)
    os.replace(temporary, path)


def _flush_to_disk(path: Path) -> None:
    if path.exists():
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
