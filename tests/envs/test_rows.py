"""Rows from files of every form and from the hub, and what is said of those that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ptlab.envs.rows import rows_of
from ptlab.errors import ConfigError

ROWS = [{"a": 1, "b": "x\u2028y\r"}, {"a": 2, "b": None}]


def read(path: Path) -> list[tuple[str, dict[str, object]]]:
    return list(rows_of(str(path), hub_name="", split="train"))


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_json_lines_keep_their_order_their_numbers_and_their_line_separators(tmp_path):
    lines = "\n".join([json.dumps(ROWS[0], ensure_ascii=False), "", "  ", json.dumps(ROWS[1])])
    path = written(tmp_path / "r.jsonl", lines)
    assert read(path) == [(f"{path}:1", ROWS[0]), (f"{path}:4", ROWS[1])]
    assert [row for _, row in read(written(path, "\ufeff" + lines.replace("\n", "\r\n")))] == ROWS


@pytest.mark.parametrize("name", ["r.json", "r.jsonl"])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_list_is_told_by_its_first_letter(tmp_path, name, indent):
    path = written(tmp_path / name, json.dumps(ROWS, indent=indent))
    assert read(path) == [(f"{path}[0]", ROWS[0]), (f"{path}[1]", ROWS[1])]


def test_parquet(tmp_path):
    from pyarrow import Table, parquet

    path = tmp_path / "r.parquet"
    parquet.write_table(Table.from_pylist(ROWS), path)
    assert read(path) == [(f"{path}[0]", ROWS[0]), (f"{path}[1]", ROWS[1])]
    with pytest.raises(ConfigError, match=r"r\.parquet: cannot be read as parquet"):
        read(written(path, "no parquet"))
    with pytest.raises(ConfigError, match=r"absent\.parquet: cannot be read as parquet"):
        read(tmp_path / "absent.parquet")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", r"r\.jsonl:1: not JSON"),
        ('{"a": 1}\n[1]', r"r\.jsonl:2: needed an object \(one row\), found \[1\]"),
        ('{"a": 1}\n\n5', r"r\.jsonl:3: needed an object"),
        ("[1]", r"r\.jsonl\[0\]: needed an object"),
        ("[", r"r\.jsonl: not JSON"),
        ("[" * 100_000, r"r\.jsonl: not JSON"),
        ('{"a":' * 100_000, r"r\.jsonl:1: not JSON"),
    ],
)
def test_a_file_that_is_wrong_is_refused_where_it_is_wrong(tmp_path, content, says):
    with pytest.raises(ConfigError, match=says):
        read(written(tmp_path / "r.jsonl", content))


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.jsonl: cannot read the rows: No such file"):
        read(tmp_path / "absent.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match=r"b\.jsonl: not UTF-8 text"):
        read(tmp_path / "b.jsonl")


def test_the_rows_before_a_bad_line_are_given_out(tmp_path):
    rows = rows_of(str(written(tmp_path / "r.jsonl", '{"a": 1}\n{')), hub_name="", split="train")
    assert next(rows)[1] == {"a": 1}
    with pytest.raises(ConfigError):
        next(rows)


class HubRows(list):
    def select_columns(self, columns):
        return HubRows([{name: row[name] for name in columns} for row in self])


def test_the_hub_is_asked_for_name_subset_split_and_columns(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return HubRows(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(rows_of(None, hub_name="me/x", split="test", subset="s")) == [("me/x/s/test[0]", ROWS[0]), ("me/x/s/test[1]", ROWS[1])]
    assert list(rows_of(None, hub_name="me/x", split="train", columns=["a"])) == [
        ("me/x/train[0]", {"a": 1}),
        ("me/x/train[1]", {"a": 2}),
    ]
    assert asked == [(("me/x", "s"), {"split": "test"}), (("me/x",), {"split": "train"})]


def test_a_hub_out_of_reach_is_one_sentence_that_says_what_to_do(monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    says = r"^data set 'me/x/s' \(test\): cannot be loaded from the hub: no route to host; with no network, set env\.train_path and [^\n]*$"
    with pytest.raises(ConfigError, match=says):
        list(rows_of(None, hub_name="me/x", split="test", subset="s"))
