#!/usr/bin/env python3
"""Throw nearly valid requests and garbage at every route of a server: `python scripts/fuzz_server.py [--seconds 300] [--seed 0]`.

Two tenants with keys of their own; each has things whose names the other never hears. It fails on a 5xx (or a 409 or 422, which the SDK
repeats), a request or a result that does not come, an answer with a name of the other tenant's or to nobody's key, an error that is not
JSON, anything the server logs as an error, and a tenant's things that have changed. Starts a server of its own with engines that need no
model, or takes --url with two keys (then nothing is known about its log, and its limits are its operator's).

Case n of a seed is the same request in every run, but for the ids the server gives: `--seed S --case N` sends it alone and shows it.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import logging
import random
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastapi import FastAPI
from fastapi.routing import APIRoute

from scripts.fuzzing.names import API, GRAPH, PASS, SHAPES, Json, Known, shapes_are_complete
from scripts.fuzzing.requests import Maker
from scripts.fuzzing.serving import BASE, GAP_S, LIMITS, ErrorLog, serving
from scripts.fuzzing.tenants import HUNG_S, Answer, Case, Fault, Tenant, Wire, valid_pass

CASES_PER_SET: Final = 200
"""Cases of one worker after which its tenant's models and samplers are made anew."""
KEYLESS: Final = (f"{API}/healthz", f"{API}/download", "/metrics")


# -- one case


def make_case(seed: int, number: int, routes: Sequence[tuple[str, str]], tenant: Tenant) -> Case:
    rng = random.Random(f"{seed}/{number}")
    method, template = rng.choices(routes, [3 if path in SHAPES else 1 for _, path in routes])[0]
    maker = Maker(rng, tenant.known())
    body, kind = maker.body(template) if method in ("POST", "PUT") or maker.chance(0.1) else (b"", "application/json")
    headers: list[tuple[str, str]] = []
    if maker.chance(0.97):
        headers.append(
            ("content-type", kind if maker.chance(0.96) else rng.choice(("text/plain", "", "application/x-protobuf", "a" * 999)))
        )
    fate = rng.random()
    if fate < (0.15 if SHAPES.get(template) == PASS else 0.05):
        body = maker.zstd(body)
        headers.append(("content-encoding", "zstd"))
    elif fate < 0.2:
        headers.append(("content-encoding", rng.choice(("gzip", "zstd", "br", "identity", "zstd, zstd", "\u00e9"))))
    key: str | None = tenant.key
    if maker.chance(0.04):
        key = rng.choice((None, "", "tml-", "tml-wrong", tenant.key[:-1], tenant.key + "x", "\u00e9" * 9, "x" * 9000))
    elif maker.chance(0.1):
        headers.append(("authorization", f"Bearer {key}"))
        key = None
    if maker.chance(0.02):
        method = rng.choice(("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"))
    framing = rng.choices(("length", "chunked", "short"), (0.96, 0.03, 0.01))[0]
    return Case(
        method=method,
        target=maker.target(template),
        route=f"{method} {template}",
        key=key,
        headers=headers,
        body=body,
        framing=framing,
        number=number,
    )


def faults_of(case: Case, answer: Answer, tenant: Tenant) -> Iterator[str]:
    """What is wrong with an answer."""
    if answer.status >= 500 or answer.status in (409, 422):
        yield f"status {answer.status}: {answer.body[:300]!r}"
    everything = answer.body + repr(answer.headers).encode()
    for secret in tenant.other.secrets:
        if secret in everything and secret not in case.encoded():
            yield f"tells {secret.decode()}, which is {tenant.other.name}'s: {answer.body[:300]!r}"
    authorized = case.key == tenant.key or any(name == "authorization" for name, _ in case.headers)
    if not authorized and answer.status < 400 and not case.target.startswith(KEYLESS):
        yield f"let in with the key {case.key!r}: {answer.status}"
    if any(name.lower() == "x-injected" for name, _ in answer.headers):
        yield "a header was injected"
    if answer.media_type == "application/json" and answer.body:
        try:
            value = json.loads(answer.body, parse_constant=lambda text: 1 / 0)
        except (ValueError, ZeroDivisionError):
            yield f"is no JSON: {answer.body[:300]!r}"
            return
        if isinstance(value, dict) and value.get("category") == "server":
            yield f"the server's own fault: {answer.body[:300]!r}"
        if answer.status >= 400 and answer.status != 408 and not (isinstance(value, dict) and value.get("error")):
            yield f"{answer.status} without an error: {answer.body[:300]!r}"
    elif answer.status >= 400 and case.method != "HEAD" and answer.body not in (b"Invalid HTTP request received.", b"Request URI Too Long"):
        yield f"{answer.status} that is no JSON: {answer.body[:300]!r}"


# -- what a tenant tries with names it was told


def intrusions(attacker: Tenant, victim: Known) -> Iterator[tuple[str, str, Json, bytes | None]]:
    """(method, path, JSON body, protobuf body): valid but for whose the named things are."""
    mine, theirs = attacker.own, victim
    session, model, sampler, path = theirs.sessions[0], theirs.models[0], theirs.samplers[0], theirs.paths[1]
    spot = {"model_id": model, "seq_id": 99}
    draw = {"sampling_session_id": sampler, "seq_id": 99, "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1]}]}}
    new_model = {"session_id": mine.sessions[0], "path": path, "optimizer": True}
    posts: list[tuple[str, Json]] = [
        ("get_info", {"model_id": model}),
        ("optim_step", {**spot, "adam_params": {}}),
        ("save_weights", {**spot, "path": "stolen"}),
        ("save_weights_for_sampler", {**spot, "path": "stolen"}),
        ("save_weights_for_sampler", {**spot, "sampling_session_seq_id": 77}),
        ("save_weights_external", {**spot, "path": "stolen"}),
        ("load_weights", {**spot, "path": path, "optimizer": True}),
        ("load_weights", {**new_model, "model_seq_id": attacker.next_seq_id("stolen") + 1_000_000}),
        ("create_model", {"session_id": session, "model_seq_id": 50, "base_model": attacker.base_model, "lora_config": {"rank": 1}}),
        ("create_sampling_session", {"session_id": session, "sampling_session_seq_id": 50, "base_model": attacker.base_model}),
        ("create_sampling_session", {"session_id": mine.sessions[0], "sampling_session_seq_id": 50, "model_path": path}),
        ("join_sampling_session", {"sampling_session_id": sampler}),
        ("asample", draw),
        ("retrieve_future", {"request_id": theirs.requests[0]}),
        ("retrieve_future", {"request_id": theirs.requests[1]}),
        ("retrieve_futures", {"target": {"type": "sampling_session", "sampling_session_id": sampler}, "timeout": 0.0}),
        ("cancel_future", {"request_id": theirs.requests[1]}),
        ("session_heartbeat", {"session_id": session}),
        ("sessions/search", {"session_id": session}),
        (f"sessions/{session}/finish", {"reason": {"type": "errored"}}),
        (f"training_runs/{model}/checkpoints/weights/hinted/publish", None),
        ("weights_info", {"tinker_path": path}),
        ("copy_weights", {"source_path": path}),
        ("create_custom_loss", {"session_id": session, "custom_loss_seq_id": 1, "name": "x", "inputs": [], "graph": GRAPH}),
    ]
    yield from (("POST", f"{API}/{route}", body, None) for route, body in posts)
    checkpoint = f"{API}/training_runs/{model}/checkpoints/sampler_weights/hinted"
    for end in (f"sessions/{session}", f"sessions/{session}/trace_export", f"samplers/{sampler}", f"training_runs/{model}"):
        yield "GET", f"{API}/{end}", None, None
    yield "GET", f"{API}/training_runs/{model}/checkpoints", None, None
    yield "GET", f"{checkpoint}/external_weights_urls", None, None
    yield "GET", f"{checkpoint}/archive", None, None
    yield "GET", f"/v1/models/{path}", None, None
    yield "PUT", f"{checkpoint}/ttl", {"ttl_seconds": 1}, None
    yield "DELETE", f"{checkpoint}/publish", None, None
    yield "DELETE", checkpoint, None, None
    yield "POST", "/v1/completions", {"model": path, "prompt": [1, 2]}, None
    yield "POST", f"{API}/forward_backward", None, valid_pass(model, 99)
    stolen = valid_pass(mine.models[0], attacker.next_seq_id(mine.models[0]), sequence_id=theirs.sequences[0])
    yield "POST", f"{API}/forward_backward", None, stolen


def intrude(attacker: Tenant, wire: Wire) -> Iterator[str]:
    """Faults: what was the other's answers otherwise than what never was. (Accepted requests are asked for their results.)"""
    theirs = attacker.other.hints.sessions[0]
    nobodys = str(uuid.uuid4())
    # each is made twice, as no number may be used for two requests
    for pair in zip(intrusions(attacker, attacker.other.hints), intrusions(attacker, attacker.other.hints), strict=True):
        texts = []
        for name, (method, path, body, raw) in zip((theirs, nobodys), pair, strict=True):
            named = None if body is None else json.loads(json.dumps(body).replace(theirs, name))
            told = attacker.call(wire, method, path.replace(theirs, name), named, raw=raw and raw.replace(theirs.encode(), name.encode()))
            if told.status == 200 and b'"request_id"' in told.body:
                request_id = told.json()["request_id"]
                if name == theirs and b'"error"' not in attacker.settled(wire, request_id).body:
                    yield f"{method} {path} {body} with {attacker.other.name}'s names was done for {attacker.name}: {request_id}"
                texts.append(attacker.settled(wire, request_id).body.decode())
            else:
                texts.append(f"{told.status} {told.body.decode(errors='replace')}")
        if any("was used before" in text or "answered long ago" in text for text in texts):  # a random case has taken the number
            continue
        if texts[0].replace(theirs, "ID") != texts[1].replace(nobodys, "ID"):
            yield f"{method} {path} {body} tells {attacker.name} whether it is there: {texts[0][:200]!r}, otherwise {texts[1][:200]!r}"


# -- a run


@dataclass(slots=True)
class Report:
    """What a run saw."""

    seed: int
    answers: dict[str, Counter[str]] = field(default_factory=dict)
    """Route -> status -> how often."""
    faults: dict[str, int] = field(default_factory=dict)
    """Sentence -> how often something like it was seen; the sentence is the first one."""
    slowest_s: float = 0.0
    slowest: str = ""
    slowest_health_s: float = 0.0
    _kinds: dict[str, str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def saw(self, case: Case, status: str, seconds: float = 0.0) -> None:
        with self._lock:
            self.answers.setdefault(case.route, Counter())[status] += 1
            if seconds > self.slowest_s:
                self.slowest_s, self.slowest = seconds, f"case {case.number}: {case.route}"

    def fault(self, kind: str, sentence: str) -> None:
        with self._lock:
            first = self._kinds.setdefault(kind, sentence)
            if first == sentence:
                print(f"FAULT {sentence}", flush=True)
            self.faults[first] = self.faults.get(first, 0) + 1

    def table(self) -> str:
        lines = [f"{route:78} " + "  ".join(f"{s}:{n}" for s, n in sorted(found.items())) for route, found in sorted(self.answers.items())]
        total = sum(found.total() for found in self.answers.values())
        lines.append(
            f"{total} answers, seed {self.seed}; slowest {self.slowest_s:.2f} s ({self.slowest}); healthz {self.slowest_health_s:.2f} s"
        )
        lines += [f"FAULT ({times} times) {sentence}" for sentence, times in self.faults.items()]
        return "\n".join([*lines, f"{len(self.faults)} kinds of faults"])


def try_case(case: Case, tenant: Tenant, wire: Wire, report: Report) -> Answer | None:
    try:
        answer = wire.send(case)
    except TimeoutError:
        report.saw(case, "hung")
        report.fault(f"hung {case.route}", f"case {case.number}: {case.route}: no answer in {HUNG_S:g} s: {case.encoded()[:600]!r}")
        return None
    except (OSError, http.client.HTTPException) as err:
        report.saw(case, "closed")
        if case.framing == "length" and len(case.encoded()) < 2**20:
            report.fault(f"closed {case.route}", f"case {case.number}: {case.route}: {type(err).__name__}: {err}: {case.encoded()[:600]!r}")
        return None
    report.saw(case, str(answer.status), answer.seconds)
    for fault in faults_of(case, answer, tenant):
        report.fault(f"{case.route} {fault[:40]}", f"case {case.number}: {case.route}: {fault}\n    request {case.encoded()[:1500]!r}")
    return answer


def fuzz(url: str, tenants: Sequence[Tenant], routes: Sequence[tuple[str, str]], seconds: float, seed: int, workers: int) -> Report:
    """Send cases 0, 1, 2 ... until the time is over."""
    report, wire = Report(seed), Wire(url)
    for tenant, other in (tenants, tenants[::-1]):
        tenant.other = other
        tenant.lock_up(wire)
    deadline = time.monotonic() + seconds

    def work(index: int) -> None:
        wire = Wire(url)
        for turn, number in enumerate(itertools.count(index, workers)):
            if time.monotonic() >= deadline:
                break
            tenant = tenants[number % 2]
            try:
                if turn % CASES_PER_SET == CASES_PER_SET - 1:
                    tenant.own = tenant.fill(wire)
                    for fault in intrude(tenant, wire):
                        report.fault(f"intrusion {fault[:60]}", fault)
            except (Fault, OSError, http.client.HTTPException) as err:
                report.fault(f"valid {str(err)[:50]}", f"before case {number}: {type(err).__name__}: {err}")
            case = make_case(seed, number, routes, tenant)
            answer = try_case(case, tenant, wire, report)
            if answer is not None and answer.status == 200 and answer.body.startswith(b'{"request_id"'):
                request_id = answer.json()["request_id"]
                tenant.outstanding.append(request_id)
                if number % 3 == 0:
                    try_case(poll(tenant, request_id, number), tenant, wire, report)
        wire.close()

    def watch() -> None:
        wire = Wire(url)
        while time.monotonic() < deadline:
            health = Case(method="GET", target=f"{API}/healthz", route="GET healthz, once a second", key=None)
            answer = try_case(health, tenants[0], wire, report)
            report.slowest_health_s = max(report.slowest_health_s, HUNG_S if answer is None else answer.seconds)
            time.sleep(1.0)
        wire.close()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(workers)] + [threading.Thread(target=watch)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for tenant in tenants:
        _end(tenant, wire, report)
    wire.close()
    return report


def poll(tenant: Tenant, request_id: str, number: int) -> Case:
    body = json.dumps({"request_id": request_id, "allow_metadata_only": number % 2 == 0}).encode()
    return Case(method="POST", target=f"{API}/retrieve_future", route="POST result of a case", key=tenant.key, body=body, number=number)


def _end(tenant: Tenant, wire: Wire, report: Report) -> None:
    """Every accepted request has a result by now or soon, valid work still works, and the vault is as it was."""
    for request_id in set(tenant.outstanding):
        for _ in range(int((GAP_S + HUNG_S) / LIMITS["long_poll_s"])):
            answer = try_case(poll(tenant, request_id, -1), tenant, wire, report)
            if answer is None or answer.status != 408:
                break
        else:
            report.fault("no result", f"{request_id} never had a result")
    try:
        tenant.fill(wire)
        for change in tenant.changes(wire):
            report.fault("changed", change)
    except (Fault, OSError, http.client.HTTPException) as err:
        report.fault("valid at the end", f"{type(err).__name__}: {err}")


def routes_of(app: FastAPI) -> list[tuple[str, str]]:
    """(method, path template) of every route."""
    found = [(method, route.path) for route in app.routes if isinstance(route, APIRoute) for method in sorted(route.methods)]
    shapes_are_complete(found)
    return found


def tenants_of(keys: Sequence[str], base_model: str) -> list[Tenant]:
    """Two tenants, by their API keys."""
    return [Tenant(name, key, base_model) for name, key in zip(("alice", "bob"), keys, strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=6, help="connections at a time; 1 makes a run repeatable")
    parser.add_argument("--case", type=int, help="send this case alone, and show it")
    parser.add_argument("--url", help="a running server, instead of one of its own")
    parser.add_argument("--keys", nargs=2, help="two API keys of --url")
    parser.add_argument("--base-model", default=BASE, help="that --url serves")
    args = parser.parse_args()
    if (args.url is None) != (args.keys is None):
        parser.error("--url and --keys go together")
    errors = ErrorLog()
    logging.getLogger().addHandler(errors)
    with tempfile.TemporaryDirectory() as directory, serving(Path(directory)) as (app, own_url, own_keys):
        url, keys = args.url or own_url, args.keys or own_keys
        tenants = tenants_of(keys, args.base_model)
        if args.case is not None:
            return show(args.seed, args.case, url, tenants, routes_of(app))
        report = fuzz(url, tenants, routes_of(app), args.seconds, args.seed, args.workers)
    for line in errors.lines:
        report.fault(f"log {line[-60:]}", f"the server logged: {line}")
    print(report.table())
    return 1 if report.faults else 0


def show(seed: int, number: int, url: str, tenants: Sequence[Tenant], routes: Sequence[tuple[str, str]]) -> int:
    report = fuzz(url, tenants, routes, 0.0, seed, 1)
    tenant, wire = tenants[number % 2], Wire(url)
    case = make_case(seed, number, routes, tenant)
    print(case.encoded())
    print(answer := try_case(case, tenant, wire, report))
    if answer is not None and b'"request_id"' in answer.body:
        print(try_case(poll(tenant, answer.json()["request_id"], number), tenant, wire, report))
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
