"""Every setting says what it is, and a wrong one is refused."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ptlab.server import settings
from ptlab.server.settings import ServeSettings


def test_every_field_has_a_line_of_explanation() -> None:
    tree = ast.parse(inspect.getsource(settings))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef)).body
    fields = [i for i, node in enumerate(body) if isinstance(node, ast.AnnAssign)]
    assert len(fields) == len(ServeSettings.model_fields)
    for i in fields:
        after = body[i + 1] if i + 1 < len(body) else None
        assert isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant), ast.unparse(body[i])


@pytest.mark.parametrize("wrong", [{"port": 70000}, {"max_datums": 0}, {"long_poll_s": 0}, {"max_datum": 3}, {"host": None}])
def test_wrong_settings(wrong: Any) -> None:
    with pytest.raises(ValidationError):
        ServeSettings(data_dir=Path("x"), **wrong)


def test_the_long_poll_is_shorter_than_what_the_sdk_waits() -> None:
    assert ServeSettings(data_dir=Path("x")).long_poll_s < 40
