from __future__ import annotations

import json
from pathlib import Path

from ptlab.benchmarks.tables import markdown_table, write_jsonl


def test_a_table_rounds_to_what_a_reader_needs() -> None:
    table = markdown_table(["a", "b", "c", "d"], [[1234567.8, 0.012345, 4096, "x"]])
    assert table == "| a | b | c | d |\n| --- | --- | --- | --- |\n| 1,234,568 | 0.0123 | 4,096 | x |"


def test_json_lines_begin_with_where_they_come_from(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    write_jsonl(path, {"cpu": "x"}, [{"a": 1}, {"a": 2}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"about": {"cpu": "x"}}, {"a": 1}, {"a": 2}]
