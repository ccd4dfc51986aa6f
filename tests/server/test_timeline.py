"""A session's requests as a trace."""

from __future__ import annotations

import json

from ptlab.server.timeline import MAX_SPANS, Span, Timeline


def span(session: str, lane: str, began: float, failed: bool = False) -> Span:
    return Span(session_id=session, lane=f"{session}:{lane}", name="optim_step", seq_id=3, began=began, ended=began + 0.5, failed=failed)


def test_a_trace_holds_one_sessions_spans_lane_by_lane() -> None:
    timeline = Timeline()
    for one in (span("a", "train:0", 1.0), span("b", "train:0", 2.0), span("a", "sample:1", 3.0, failed=True)):
        timeline.add(one)
    events = json.loads(timeline.trace_of("a"))["traceEvents"]
    assert {e["args"]["name"]: e["tid"] for e in events if e["ph"] == "M"} == {"sample:1": 1, "train:0": 2}
    assert [(e["ph"], e["ts"], e["tid"], e["args"]["failed"]) for e in events if e["ph"] != "M"] == [
        ("b", 1e6, 2, False), ("e", 1.5e6, 2, False), ("b", 3e6, 1, True), ("e", 3.5e6, 1, True),
    ]  # fmt: skip
    assert json.loads(timeline.trace_of("nobody"))["traceEvents"] == []


def test_the_oldest_are_forgotten() -> None:
    timeline = Timeline()
    timeline.add(span("old", "train:0", 0.0))
    for i in range(MAX_SPANS):
        timeline.add(span("new", "train:0", float(i)))
    assert json.loads(timeline.trace_of("old"))["traceEvents"] == []
