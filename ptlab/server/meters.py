"""What a server counts: requests, tokens, weight syncs; and how it prints that for Prometheus.

Nothing here names an owner, a session or a model: whoever may read /metrics learns how busy the server is, not whose work it is. Belongs to
the backend's event loop.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

TokenKind = Literal["sampled", "trained"]
KINDS = frozenset({
    "create_model", "create_model_from_state", "forward", "forward_backward", "optim_step", "save_weights", "save_weights_for_sampler",
    "save_weights_external", "load_weights", "sample", "create_custom_loss", "openai_chat", "openai_completion",
})  # fmt: skip
OTHER = "other"
"""Label of a kind that is none of these: labels must not come from outside."""
REQUEST_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
SYNC_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
SYNC_PHASES = {
    "sync/capture_s": "capture",
    "sync/write_s": "write",
    "sync/load_s": "load",
    "sync/verify_s": "verify",
    "sync/latency_s": "all",
}
RATE_WINDOW_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerState:
    """What is counted at the moment of asking rather than as it happens."""

    waiting: Mapping[str, int]
    """Requests that wait or run, by kind."""
    sessions: int
    models: Mapping[str, int]
    """By state: creating, idle, running, parked, failed."""
    samplers: int
    """Open sampling sessions."""
    store_rows: Mapping[str, int]
    store_bytes: int


class Rate:
    """Something per second over the last RATE_WINDOW_S seconds.

    Args:
        now_s: a clock that only goes forward.
    """

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._began_s = now_s()
        self._added: deque[tuple[float, int]] = deque()
        self._sum = 0

    def add(self, count: int) -> None:
        self._added.append((self._now_s(), count))
        self._sum += count
        self._forget()

    def per_second(self) -> float:
        self._forget()
        return self._sum / min(RATE_WINDOW_S, max(1.0, self._now_s() - self._began_s))

    def _forget(self) -> None:
        while self._added and self._added[0][0] <= self._now_s() - RATE_WINDOW_S:
            self._sum -= self._added.popleft()[1]


class Meters:
    """Told of what happens; asked by /metrics and /api/v1/status.

    Args:
        registry: where the metrics are registered; one server, one registry.
    """

    def __init__(self, registry: CollectorRegistry, now_s: Callable[[], float] = time.monotonic) -> None:
        self._registry = registry
        self._now_s = now_s
        self._began_s = now_s()
        self._requests = Counter("ptlab_requests", "Requests that ended.", ["kind", "outcome"], registry=registry)
        self._seconds = Histogram(
            "ptlab_request_seconds", "From acceptance to answer.", ["kind"], buckets=REQUEST_BUCKETS_S, registry=registry
        )
        self._tokens = Counter("ptlab_tokens", "Tokens sampled, and tokens that went through a training pass.", ["kind"], registry=registry)
        self._sync_seconds = Histogram(
            "ptlab_sync_seconds", "Weight syncs from trainer to sampler, by phase.", ["phase"], buckets=SYNC_BUCKETS_S, registry=registry
        )
        self._verify_gap = Gauge(
            "ptlab_sync_verify_gap_nats", "Largest difference of log-probabilities at the last sync: sampler, trainer.", registry=registry
        )
        self._largest_gap = Gauge("ptlab_sync_verify_gap_largest_nats", "The largest of them since the start.", registry=registry)
        self._waiting = Gauge("ptlab_requests_waiting", "Requests that wait or run.", ["kind"], registry=registry)
        self._sessions = Gauge("ptlab_sessions", "Client sessions that have not finished.", registry=registry)
        self._models = Gauge("ptlab_models", "Trainable models.", ["state"], registry=registry)
        self._samplers = Gauge("ptlab_samplers", "Open sampling sessions.", registry=registry)
        self._store_rows = Gauge("ptlab_store_rows", "Rows in the store.", ["kind"], registry=registry)
        self._store_bytes = Gauge("ptlab_store_bytes", "Size of the store's files.", registry=registry)
        self._up = Gauge("ptlab_up_seconds", "Since the start of this server.", registry=registry)
        ProcessCollector(registry=registry)
        for kind in ("sampled", "trained"):
            self._tokens.labels(kind)  # 0 from the start, so that a rate can be taken of the first
        self._rates: dict[TokenKind, Rate] = {"sampled": Rate(now_s), "trained": Rate(now_s)}
        self._largest_gap_nats = 0.0
        self.last_sync: Mapping[str, float] = {}
        """`sync/*` metrics of the newest weight sync."""
        self.num_syncs = 0

    def request_finished(self, kind: str, outcome: str, seconds: float) -> None:
        """A request ended: "ok", "user" or "server" (whose fault it was), or "cancelled"."""
        label = kind if kind in KINDS else OTHER
        self._requests.labels(label, outcome).inc()
        self._seconds.labels(label).observe(seconds)

    def count_tokens(self, kind: TokenKind, count: int) -> None:
        self._tokens.labels(kind).inc(count)
        self._rates[kind].add(count)

    def on_metrics(self, metrics: Mapping[str, float]) -> None:
        """Of one weight sync, as the backend tells them."""
        self.last_sync = dict(metrics)
        self.num_syncs += 1
        for name, phase in SYNC_PHASES.items():
            if name in metrics:
                self._sync_seconds.labels(phase).observe(metrics[name])
        gap = metrics.get("sync/verify_gap")
        if gap is not None:
            self._verify_gap.set(gap)
            self._largest_gap_nats = max(gap, self._largest_gap_nats)
            self._largest_gap.set(self._largest_gap_nats)

    @property
    def up_s(self) -> float:
        return self._now_s() - self._began_s

    def tokens_per_s(self) -> dict[TokenKind, float]:
        """Over the last seconds."""
        return {kind: rate.per_second() for kind, rate in self._rates.items()}

    def render(self, state: ServerState) -> bytes:
        """All of it in Prometheus' text format."""
        waiting: dict[str, int] = {}
        for kind, count in state.waiting.items():
            label = kind if kind in KINDS else OTHER
            waiting[label] = waiting.get(label, 0) + count
        for gauge, values in (
            (self._waiting, waiting),
            (self._models, state.models),
            (self._store_rows, state.store_rows),
        ):
            gauge.clear()  # what was there last time and is not now
            for label, count in values.items():
                gauge.labels(label).set(count)
        self._sessions.set(state.sessions)
        self._samplers.set(state.samplers)
        self._store_bytes.set(state.store_bytes)
        self._up.set(self.up_s)
        return generate_latest(self._registry)
