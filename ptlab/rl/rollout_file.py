"""Rollouts in a file: sampled once, trained on as often as you like (recipes/offline.py).

JSONL, or parquet where the name ends in .parquet. One row per trajectory; rows of one group stand together:

    {"format": "ptlab-rollouts", "version": 1, "model": "ptlab/quickstart", "env": {...}, "rollout": {...}, "num_groups": 500, ...}
    {"group": 0, "attempt": 0, "of": 8, "reward": 1.0, "turns": [{"observation": [...], "action": [...], "logprobs": [...], ...}], ...}
    ...
    {"end": 4000}

In parquet the header is the schema's metadata "ptlab_rollouts" and there is no end row. While rollouts are collected they stand in
FILE.partial, whose whole groups survive a kill; FILE itself appears when it is complete.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError, model_validator

from ptlab.errors import ConfigError, InvalidRequestError
from ptlab.rl.types import Trajectory, TrajectoryGroup, TrajectoryStop, Transition
from ptlab.section import Section
from ptlab.types import EncodedTextChunk, ModelInput

PARQUET_KEY = b"ptlab_rollouts"


class RolloutHeader(Section):
    """What the rollouts are, and how they were sampled."""

    format: Literal["ptlab-rollouts"] = "ptlab-rollouts"
    version: Literal[1] = 1
    model: str
    """Base model."""
    weights: str | None
    """Adapter that sampled, as it was named; None = the base model as it is."""
    renderer: str | None
    """As in model.renderer; None = the recommended one."""
    env: dict[str, Any]
    """The section `env` of the config."""
    rollout: dict[str, Any]
    """The section `rollout` of the config: temperature, limits."""
    seed: int
    num_groups: int
    """Groups that were asked for; one whose environment broke has no rows."""


class _Turn(Section):
    """One transition. `keep` tokens of what stood before (last observation and action) begin the observation; `observation` is the rest."""

    keep: int
    observation: list[int]
    action: list[int]
    logprobs: list[float]
    """log q of each sampled token, nats."""
    policy_version: int | None
    stop_reason: str
    reward: float
    episode_done: bool
    metrics: dict[str, float]

    @model_validator(mode="after")
    def _one_logprob_per_token(self) -> _Turn:
        if len(self.action) != len(self.logprobs):
            raise ValueError(f"{len(self.action)} sampled tokens with {len(self.logprobs)} logprobs; one each is needed")
        return self


class _Row(Section):
    """One trajectory."""

    group: int
    attempt: int
    of: int
    """Trajectories of this group in the file."""
    reward: float
    """Of the steps and the group together."""
    group_reward: float
    stop_reason: TrajectoryStop
    group_metrics: dict[str, float]
    tags: list[str]
    turns: list[_Turn]


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutFile:
    """A whole file, read."""

    header: RolloutHeader
    groups: Sequence[TrajectoryGroup]
    """Those with at least one trajectory, in the order of their ids."""

    @property
    def num_trajectories(self) -> int:
        return sum(len(group.trajectories_G) for group in self.groups)


def read_rollouts(path: Path) -> RolloutFile:
    """The rollouts of a complete file. Raises: ConfigError naming file and line: unreadable, torn, or of another format or version."""
    header_text, numbered = _parquet_texts(path) if path.suffix == ".parquet" else _complete_lines(path)
    header = _header_of(path, header_text)
    rows = [_row_of(f"{path}:{number}", text) for number, text in numbered]
    groups = [_group_of(path, list(members)) for _, members in itertools.groupby(rows, key=lambda row: row.group)]
    if not groups:
        raise ConfigError(f"{path}: no rollouts; collect some with scripts/collect.py --out {path}")
    return RolloutFile(header=header, groups=groups)


class RolloutWriter:
    """Writes FILE.partial group by group, and FILE when it is complete. A context manager; leaving it early keeps FILE.partial.

    Args:
        header: a FILE.partial with the same header is continued at its first missing group.
        batch: groups that are sampled together; a batch that is not whole is sampled again, so that it comes out as it would have.
        overwrite: delete what is there.
    Raises: ConfigError if FILE exists, another process writes it, or FILE.partial holds other rollouts.
    """

    def __init__(self, path: Path, header: RolloutHeader, *, batch: int = 1, overwrite: bool = False) -> None:
        if path.suffix not in (".jsonl", ".parquet"):
            raise ConfigError(f"{path}: rollouts are written as .jsonl or .parquet; give a name that ends in one of them")
        if path.exists() and not overwrite:
            raise ConfigError(f"{path} exists already; give another --out, or --overwrite")
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self.groups_done, self.num_trajectories = self._begin(header, batch, overwrite)
        except BaseException:
            os.close(self._fd)
            raise

    def _begin(self, header: RolloutHeader, batch: int, overwrite: bool) -> tuple[int, int]:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            raise ConfigError(f"{self.partial}: another process is collecting into it; stop it, or give another --out") from err
        lines = [] if overwrite else self.partial.read_bytes().split(b"\n")[:-1]  # a line torn by a kill has no newline
        if not lines:
            os.ftruncate(self._fd, 0)
            self._write([header.model_dump_json()])
            return 0, 0
        found = _header_of(self.partial, lines[0].decode())
        if found != header:
            names = [name for name in RolloutHeader.model_fields if found.model_dump()[name] != header.model_dump()[name]]
            raise ConfigError(
                f"{self.partial}: holds rollouts collected with other settings ({', '.join(names)}); --overwrite deletes them"
            )
        rows = [_row_of(f"{self.partial}:{number}", line.decode()) for number, line in enumerate(lines[1:], start=2)]
        whole = [list(members) for _, members in itertools.groupby(rows, key=lambda row: row.group)]
        if whole and len(whole[-1]) < whole[-1][0].of:  # cut in the middle of a group
            whole.pop()
        groups_done = (whole[-1][0].group + 1) // batch * batch if whole else 0
        num_rows = sum(len(members) for members in whole if members[0].group < groups_done)
        os.ftruncate(self._fd, sum(len(line) + 1 for line in lines[: 1 + num_rows]))
        return groups_done, num_rows

    def append(self, groups: Sequence[TrajectoryGroup]) -> None:
        """The next groups, in order. Raises: InvalidRequestError for observations that are not text."""
        rows = [row for number, group in enumerate(groups, start=self.groups_done) for row in _rows_of(number, group)]
        self._write([row.model_dump_json() for row in rows])
        self.groups_done += len(groups)
        self.num_trajectories += len(rows)

    def finish(self) -> None:
        """Make FILE of FILE.partial; it is on the disk when this returns."""
        if self.path.suffix == ".parquet":
            temporary = self.path.with_name(self.path.name + ".tmp")
            lines = self.partial.read_text(encoding="utf-8").splitlines()
            _write_parquet(temporary, lines[0], [json.loads(line) for line in lines[1:]])
            _sync(temporary)
            os.replace(temporary, self.path)
            self.partial.unlink()
        else:
            self._write([json.dumps({"end": self.num_trajectories})])
            os.fsync(self._fd)
            os.replace(self.partial, self.path)
        _sync(self.path.parent)

    def _write(self, lines: Sequence[str]) -> None:
        data = "".join(line + "\n" for line in lines).encode()
        while data:
            data = data[os.write(self._fd, data) :]

    def __enter__(self) -> RolloutWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._fd)


# ------------------------------------------------------------------------------------------------------- rows and trajectories


def _rows_of(number: int, group: TrajectoryGroup) -> Iterator[_Row]:
    members = zip(group.trajectories_G, group.rewards_G, group.final_rewards_G, group.metrics_G, strict=True)
    for attempt, (trajectory, reward, group_reward, metrics) in enumerate(members):
        yield _Row(
            group=number,
            attempt=attempt,
            of=len(group.trajectories_G),
            reward=reward,
            group_reward=group_reward,
            stop_reason=trajectory.stop_reason,
            group_metrics={name: float(value) for name, value in metrics.items()},
            tags=list(group.tags),
            turns=list(_turns_of(trajectory)),
        )


def _turns_of(trajectory: Trajectory) -> Iterator[_Turn]:
    before: list[int] = []
    for transition in trajectory.transitions:
        observation = _text_tokens(transition.observation)
        keep = len(before) if observation[: len(before)] == before else 0
        yield _Turn(
            keep=keep,
            observation=observation[keep:],
            action=[int(token) for token in transition.action],
            logprobs=[float(str(value)) for value in np.asarray(transition.sampling_logprobs_T, dtype=np.float32)],  # its shortest text
            policy_version=transition.policy_version,
            stop_reason=transition.stop_reason,
            reward=transition.reward,
            episode_done=transition.episode_done,
            metrics={name: float(value) for name, value in transition.metrics.items()},
        )
        before = observation + [int(token) for token in transition.action]


def _text_tokens(observation: ModelInput) -> list[int]:
    for chunk in observation.chunks:
        if not isinstance(chunk, EncodedTextChunk):
            raise InvalidRequestError(f"a rollout file holds text only; an observation has a chunk of type {chunk.type!r}")
    return observation.to_ints()


def _group_of(path: Path, rows: Sequence[_Row]) -> TrajectoryGroup:
    if len(rows) != rows[0].of:
        raise ConfigError(f"{path}: group {rows[0].group} has {len(rows)} of {rows[0].of} rows; the file was edited: collect it again")
    return TrajectoryGroup(
        trajectories_G=[_trajectory_of(row) for row in rows],
        final_rewards_G=[row.group_reward for row in rows],
        metrics_G=[row.group_metrics for row in rows],
        tags=rows[0].tags,
    )


def _trajectory_of(row: _Row) -> Trajectory:
    transitions: list[Transition] = []
    before: list[int] = []
    for turn in row.turns:
        observation = before[: turn.keep] + turn.observation
        transitions.append(
            Transition(
                observation=ModelInput.from_ints(observation),
                action=turn.action,
                sampling_logprobs_T=turn.logprobs,
                policy_version=turn.policy_version,
                stop_reason=turn.stop_reason,
                reward=turn.reward,
                episode_done=turn.episode_done,
                metrics=turn.metrics,
            )
        )
        before = observation + turn.action
    return Trajectory(transitions=transitions, stop_reason=row.stop_reason)


# --------------------------------------------------------------------------------------------------------------------- files


def _header_of(path: Path, text: str) -> RolloutHeader:
    try:
        return RolloutHeader.model_validate_json(text)
    except ValidationError as err:
        raise ConfigError(f"{path}: not a rollout file of version 1: {_first(err)}; make one with scripts/collect.py") from err


def _row_of(where: str, text: str) -> _Row:
    try:
        return _Row.model_validate_json(text)
    except ValidationError as err:
        raise ConfigError(f"{where}: not a rollout: {_first(err)}; the file was edited: collect it again") from err


def _first(err: ValidationError) -> str:
    detail = err.errors(include_url=False)[0]
    return f"{'.'.join(str(part) for part in detail['loc']) or 'the line'}: {detail['msg']}"


def _complete_lines(path: Path) -> tuple[str, Iterable[tuple[int, str]]]:
    """Header, and the numbered rows between it and the end row."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path}: cannot read the rollouts: {err}; make the file with scripts/collect.py --out {path}") from err
    header = _header_of(path, lines[0]).model_dump_json()
    if len(lines) < 3 or lines[-1] or lines[-2] != json.dumps({"end": len(lines) - 3}):
        raise ConfigError(f"{path}: {len(lines) - 1} lines and no fitting end row: the file was cut off or edited; collect it again")
    return header, enumerate(lines[1:-2], start=2)


def _parquet_texts(path: Path) -> tuple[str, Iterable[tuple[int, str]]]:
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.read_table(path)
    except (OSError, ArrowException) as err:
        raise ConfigError(f"{path}: cannot be read as parquet: {str(err).splitlines()[0]}") from err
    metadata = table.schema.metadata or {}
    if PARQUET_KEY not in metadata:
        raise ConfigError(f"{path}: a parquet file without {PARQUET_KEY.decode()!r} in its metadata; make one with scripts/collect.py")
    rows = enumerate(table.to_pylist(), start=1)
    return metadata[PARQUET_KEY].decode(), [(number, json.dumps(_with_dicts(row))) for number, row in rows]


def _write_parquet(path: Path, header: str, rows: Sequence[dict[str, Any]]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    metrics = pa.map_(pa.string(), pa.float64())
    turn = pa.struct(
        {
            "keep": pa.int32(),
            "observation": pa.list_(pa.int32()),
            "action": pa.list_(pa.int32()),
            "logprobs": pa.list_(pa.float64()),
            "policy_version": pa.int64(),
            "stop_reason": pa.string(),
            "reward": pa.float64(),
            "episode_done": pa.bool_(),
            "metrics": metrics,
        }
    )
    numbers = {"group": pa.int64(), "attempt": pa.int32(), "of": pa.int32(), "reward": pa.float64(), "group_reward": pa.float64()}
    texts = {"stop_reason": pa.string(), "group_metrics": metrics, "tags": pa.list_(pa.string()), "turns": pa.list_(turn)}
    table = pa.Table.from_pylist([_with_pairs(row) for row in rows], schema=pa.schema(numbers | texts, metadata={PARQUET_KEY: header}))
    parquet.write_table(table, path, compression="zstd")


def _with_pairs(row: dict[str, Any]) -> dict[str, Any]:
    """pyarrow takes and gives a map as pairs."""
    turns = [turn | {"metrics": list(turn["metrics"].items())} for turn in row["turns"]]
    return row | {"turns": turns, "group_metrics": list(row["group_metrics"].items())}


def _with_dicts(row: dict[str, Any]) -> dict[str, Any]:
    turns = [turn | {"metrics": dict(turn["metrics"])} for turn in row["turns"]]
    return row | {"turns": turns, "group_metrics": dict(row["group_metrics"])}


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
