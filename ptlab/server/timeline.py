"""When a session's requests were asked for and answered, to be looked at in ui.perfetto.dev."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass

MAX_SPANS = 100_000
"""Of all sessions together; the oldest are forgotten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One request, from when it was taken up (it may then have waited for its turn) to its answer. Times in unix seconds."""

    session_id: str
    lane: str
    """The model or sampling session it belongs to."""
    name: str
    seq_id: int
    began: float
    ended: float
    failed: bool


class Timeline:
    """The newest spans of this process."""

    def __init__(self) -> None:
        self._spans: deque[Span] = deque(maxlen=MAX_SPANS)

    def add(self, span: Span) -> None:
        self._spans.append(span)

    def trace_of(self, session_id: str) -> bytes:
        """A session as a trace in Chrome's JSON format, which Perfetto opens."""
        spans = [span for span in self._spans if span.session_id == session_id]
        lanes = {lane: number for number, lane in enumerate(sorted({span.lane for span in spans}), start=1)}
        names = [
            {"ph": "M", "name": "thread_name", "pid": 1, "tid": number, "args": {"name": lane.removeprefix(f"{session_id}:")}}
            for lane, number in lanes.items()
        ]
        # async events ("b", "e"): requests of one lane overlap
        events = [
            {
                "ph": phase,
                "cat": span.name,
                "name": span.name,
                "id": index,
                "pid": 1,
                "tid": lanes[span.lane],
                "ts": time * 1e6,
                "args": {"seq_id": span.seq_id, "failed": span.failed},
            }
            for index, span in enumerate(spans)
            for phase, time in (("b", span.began), ("e", span.ended))
        ]
        return json.dumps({"traceEvents": [*names, *events], "displayTimeUnit": "ms"}).encode()
