"""What the meters count, and how they print it."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from ptlab.server.meters import RATE_WINDOW_S, Meters, Rate, ServerState

SYNC = {"sync/capture_s": 0.1, "sync/write_s": 0.2, "sync/load_s": 0.3, "sync/verify_s": 0.04, "sync/latency_s": 0.7, "sync/version": 3.0}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def state(**changes: Any) -> ServerState:
    told: dict[str, Any] = {"waiting": {}, "sessions": 2, "models": {}, "samplers": 3, "store_rows": {}, "store_bytes": 4096}
    return ServerState(**(told | changes))


def values(meters: Meters, now: ServerState | None = None) -> dict[tuple[str, str], float]:
    """(metric, its label values) -> value, as Prometheus' own parser reads it."""
    families = text_string_to_metric_families(meters.render(now or state()).decode())
    return {(s.name, ",".join(s.labels.values())): s.value for family in families for s in family.samples}


def test_requests_are_counted_by_kind_and_outcome() -> None:
    meters = Meters(CollectorRegistry())
    meters.request_finished("sample", "ok", 0.3)
    meters.request_finished("sample", "ok", 40.0)
    meters.request_finished("sample", "user", 0.001)
    meters.request_finished("optim_step", "server", 1.0)
    told = values(meters)
    assert told["ptlab_requests_total", "sample,ok"] == 2
    assert told["ptlab_requests_total", "sample,user"] == 1
    assert told["ptlab_requests_total", "optim_step,server"] == 1
    assert told["ptlab_request_seconds_sum", "sample"] == pytest.approx(40.301)
    assert told["ptlab_request_seconds_bucket", "sample,0.5"] == 2
    assert told["ptlab_request_seconds_bucket", "sample,60.0"] == 3


def test_labels_cannot_come_from_outside() -> None:
    meters = Meters(CollectorRegistry())
    meters.request_finished("alice's secret", "ok", 1.0)
    text = meters.render(state(waiting={"x": 2, "y": 3, "sample": 1})).decode()
    assert "secret" not in text
    told = values(meters, state(waiting={"x": 2, "y": 3, "sample": 1}))
    assert told["ptlab_requests_total", "other,ok"] == 1
    assert told["ptlab_requests_waiting", "other"] == 5
    assert told["ptlab_requests_waiting", "sample"] == 1


def test_tokens_are_counted_and_zero_before_the_first() -> None:
    clock = Clock()
    meters = Meters(CollectorRegistry(), clock)
    assert values(meters)["ptlab_tokens_total", "trained"] == 0
    clock.now += 20
    meters.count_tokens("sampled", 500)
    meters.count_tokens("trained", 30)
    clock.now += 1
    meters.count_tokens("sampled", 100)
    assert values(meters)["ptlab_tokens_total", "sampled"] == 600
    assert meters.tokens_per_s() == {"sampled": 60.0, "trained": 3.0}
    assert values(meters)["ptlab_up_seconds", ""] == 21


def test_a_rate_forgets_what_is_older_than_its_window() -> None:
    clock = Clock()
    rate = Rate(clock)
    rate.add(50)
    assert rate.per_second() == 50, "a server that has just started is not ten seconds old"
    clock.now += 5
    assert rate.per_second() == 10
    rate.add(50)
    clock.now += RATE_WINDOW_S - 5
    assert rate.per_second() == 5
    clock.now += RATE_WINDOW_S
    assert rate.per_second() == 0


def test_a_weight_sync_gives_its_phases_and_its_gap() -> None:
    meters = Meters(CollectorRegistry())
    meters.on_metrics(SYNC | {"sync/verify_gap": 3e-5})
    meters.on_metrics(SYNC | {"sync/verify_gap": 1e-5})
    told = values(meters)
    assert told["ptlab_sync_seconds_sum", "load"] == pytest.approx(0.6)
    assert told["ptlab_sync_seconds_sum", "all"] == pytest.approx(1.4)
    assert told["ptlab_sync_seconds_count", "verify"] == 2
    assert told["ptlab_sync_verify_gap_nats", ""] == 1e-5
    assert told["ptlab_sync_verify_gap_largest_nats", ""] == 3e-5
    assert meters.num_syncs == 2
    assert meters.last_sync["sync/latency_s"] == 0.7


def test_what_is_gone_is_no_longer_shown() -> None:
    meters = Meters(CollectorRegistry())
    before = values(meters, state(models={"idle": 2, "parked": 1}, waiting={"sample": 4}, store_rows={"keys": 2}))
    assert before["ptlab_models", "idle"] == 2
    assert before["ptlab_store_rows", "keys"] == 2
    assert (before["ptlab_sessions", ""], before["ptlab_samplers", ""], before["ptlab_store_bytes", ""]) == (2, 3, 4096)
    after = values(meters, state(models={"parked": 3}))
    assert after["ptlab_models", "parked"] == 3
    assert ("ptlab_models", "idle") not in after
    assert ("ptlab_requests_waiting", "sample") not in after


def test_two_servers_in_one_process_do_not_share_counts() -> None:
    one, other = Meters(CollectorRegistry()), Meters(CollectorRegistry())
    one.count_tokens("sampled", 5)
    assert values(other)["ptlab_tokens_total", "sampled"] == 0
    assert values(one)["process_resident_memory_bytes", ""] > 0
