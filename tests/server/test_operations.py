"""What a stored request means, live and in a replay."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ptlab.backend.models import TrainingPass
from ptlab.backend.store import RequestRow
from ptlab.errors import InvalidRequestError
from ptlab.server.operations import check_size, read_journal, session_of
from ptlab.server.settings import ServeSettings
from ptlab.server.unpacking import TooLargeError
from ptlab.types import AdamParams, Datum, ModelInput


def row(kind: str, body: bytes | None) -> RequestRow:
    return RequestRow(request_id="r", kind=kind, scope="s:train:0", seq_id=1, owner="local", body=body, created=time.time())


def test_only_what_changes_a_model_is_run_again(make_pass: Callable[..., bytes]) -> None:
    again = read_journal(row("forward_backward", make_pass("s:train:0", 1, num_datums=2)))
    assert isinstance(again, TrainingPass)
    assert (len(again.data), again.loss_fn, again.backward) == (2, "cross_entropy", True)
    scored = read_journal(row("forward_backward", make_pass("s:train:0", 1, forward_only=True)))
    assert isinstance(scored, TrainingPass) and not scored.backward
    step = {"model_id": "s:train:0", "seq_id": 1, "adam_params": {"learning_rate": 0.25}}
    assert read_journal(row("optim_step", json.dumps(step).encode())) == AdamParams(learning_rate=0.25)
    for kind in ("forward", "save_weights", "save_weights_for_sampler", "load_weights", "create_model", "sample"):
        assert read_journal(row(kind, b"{}")) is None
    assert read_journal(row("forward_backward", None)) is None
    with pytest.raises(InvalidRequestError):
        read_journal(row("optim_step", b"{"))


@pytest.mark.parametrize(("scope", "session"), [("a-b:train:3", "a-b"), ("a-b:sample:0", "a-b"), ("a-b:loss", "a-b"), ("a-b", "a-b")])
def test_a_scope_names_its_session(scope: str, session: str) -> None:
    assert session_of(scope) == session


def test_sizes_at_the_limit_pass() -> None:
    data = [Datum(ModelInput.from_ints([1] * 3), {}) for _ in range(2)]
    limits = {"data_dir": Path("x"), "max_datums": 2, "max_tokens_per_call": 6}
    assert check_size(data, ServeSettings(**limits)) == 6
    for smaller in ({"max_datums": 1}, {"max_tokens_per_call": 5}):
        with pytest.raises(TooLargeError):
            check_size(data, ServeSettings(**{**limits, **smaller}))


def test_tokens_are_counted_where_they_are_computed(serve: Callable[..., Any], raw_of: Callable[..., Any], tmp_path: Path) -> None:
    with serve(tmp_path) as server, server.client() as http:
        raw: Any = raw_of(http)
        model = raw.model()
        raw.output(raw.forward_backward(model, 1, num_datums=2).json()["request_id"])
        raw.output(raw.forward_backward(model, 2, forward_only=True).json()["request_id"])
        sampler = raw.sampler(model.partition(":")[0])
        raw.poll(raw.post("asample", raw.sample_body(sampler, 0))["request_id"])
        lines = [line for line in http.get(f"{server.url}/metrics").text.splitlines() if "tokens_total" in line and line[0] != "#"]
    assert {line.split('"')[1]: float(line.split()[-1]) for line in lines} == {"trained": 6.0, "sampled": 8.0}
