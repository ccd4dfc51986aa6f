"""Rows of a data set, from a local file or from the Hugging Face hub: the one loader of every environment.

A local file holds the same fields as the hub's rows: JSON lines, one JSON list, or parquet (by the ending .parquet). Each row comes with
where it stands ("train.jsonl:17", "openai/gsm8k/train[16]"), for the message of whoever cannot use it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ptlab.errors import ConfigError


def rows_of(
    path: str | None, *, hub_name: str, split: str, subset: str | None = None, columns: Sequence[str] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, row) of every row, in order.

    Args:
        path: local file, read line by line; None = the hub's data set `hub_name`, with its `split` and `subset` ("main").
        columns: of a hub data set read only these, all of which it must have (one whose rows hold long texts nobody needs).

    Raises: ConfigError naming file and line, or the data set: it cannot be read, is not JSON, or a row is no object.
    """
    if path is None:
        return _hub_rows(hub_name, split, subset, columns)
    return _parquet_rows(Path(path)) if path.endswith(".parquet") else _json_rows(Path(path))


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """JSON lines, or one list. A list is told by its first letter, so the ending of the name decides nothing."""
    try:
        with path.open(encoding="utf-8") as lines:  # not str.splitlines: JSON text may hold a U+2028
            for number, line in enumerate(lines, start=1):
                if number == 1 and line.lstrip("\ufeff \t").startswith("["):
                    yield from _list_rows(path, line + lines.read())
                    return
                if line.strip():
                    where = f"{path}:{number}"
                    yield where, _checked(where, _parsed(where, line))
    except OSError as err:
        raise ConfigError(f"{path}: cannot read the rows: {err.strerror}; needed a file of JSON lines, a JSON list or parquet") from err
    except UnicodeDecodeError as err:
        raise ConfigError(f"{path}: not UTF-8 text: {err}; needed JSON lines or a JSON list (parquet by the ending .parquet)") from err


def _list_rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for index, row in enumerate(_parsed(str(path), text)):
        where = f"{path}[{index}]"
        yield where, _checked(where, row)


def _parsed(where: str, text: str) -> Any:
    try:
        return json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as err:
        raise ConfigError(f"{where}: not JSON: {err}") from err


def _checked(where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: needed an object (one row), found {str(row)[:80]}")
    return row


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    from pyarrow import ArrowException, parquet  # a fifth of a second to import; JSON does not need it

    try:
        with parquet.ParquetFile(path) as file:
            index = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    yield f"{path}[{index}]", row
                    index += 1
    except (OSError, ArrowException) as err:
        raise ConfigError(f"{path}: cannot be read as parquet: {str(err).splitlines()[0]}") from err


def _hub_rows(hub_name: str, split: str, subset: str | None, columns: Sequence[str] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets  # one second to import; local files do not need it

    name = hub_name if subset is None else f"{hub_name}/{subset}"
    try:
        rows = datasets.load_dataset(hub_name, *([] if subset is None else [subset]), split=split)
        rows = rows if columns is None else rows.select_columns(list(columns))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as err:
        raise ConfigError(
            f"data set {name!r} ({split}): cannot be loaded from the hub: {str(err).splitlines()[0]}; "
            "with no network, set env.train_path and env.test_path to local files"
        ) from err
    for index, row in enumerate(rows):
        yield f"{name}/{split}[{index}]", dict(row)
