"""The two tenants of scripts/fuzz_server.py: what each owns, and requests as they go over a socket."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

import numpy as np

from ptlab.server import wire_pb2
from scripts.fuzzing.names import API, Json, Known

RESULT_S: Final = 30.0
"""Of a valid request, on a machine that is busy with other things too."""
HUNG_S: Final = 20.0
"""An answer that takes longer never comes. Long polls of the fuzzed server must be shorter."""


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes
    seconds: float

    def json(self) -> Json:
        return json.loads(self.body)

    @property
    def media_type(self) -> str:
        return next((value for name, value in self.headers if name.lower() == "content-type"), "").partition(";")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One request. `route`: its template, for the summary; `number` -1 = not random."""

    method: str
    target: str
    route: str
    key: str | None
    headers: Sequence[tuple[str, str]] = ()
    body: bytes = b""
    framing: str = "length"
    """length | chunked | short (less than it says, then the end)."""
    number: int = -1

    def encoded(self) -> bytes:
        lines = [f"{self.method} {self.target} HTTP/1.1", "host: fuzz"]
        lines += [f"{name}: {value}" for name, value in ([] if self.key is None else [("x-api-key", self.key)]) + list(self.headers)]
        lines.append("transfer-encoding: chunked" if self.framing == "chunked" else f"content-length: {len(self.body)}")
        body = self.body[: len(self.body) // 2] if self.framing == "short" else self.body
        if self.framing == "chunked":
            parts = [body[at : at + 1000] for at in range(0, len(body), 1000)]
            body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
        return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogatepass") + body


class Wire:
    """One connection; a new one whenever the last has ended. Nothing between a case and the bytes that are sent."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._place = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._socket: socket.socket | None = None

    def send(self, case: Case) -> Answer:
        """Raises: TimeoutError if no answer comes in HUNG_S; OSError or HTTPException if the server hangs up instead of answering."""
        began = time.perf_counter()
        reused = self._socket is not None
        try:
            return self._exchange(case, began)
        except TimeoutError:
            self.close()
            raise
        except (OSError, http.client.HTTPException):
            self.close()
            if not reused:
                raise
            return self._exchange(case, began)  # the server may close an idle connection at any time

    def _exchange(self, case: Case, began: float) -> Answer:
        if self._socket is None:
            self._socket = socket.create_connection(self._place, timeout=HUNG_S)
        try:
            self._socket.sendall(case.encoded())
        except (BrokenPipeError, ConnectionResetError):
            if case.framing == "short":
                raise
        if case.framing == "short":
            self._socket.shutdown(socket.SHUT_WR)
        response = http.client.HTTPResponse(self._socket, method=case.method)
        response.begin()
        answer = Answer(response.status, response.getheaders(), response.read(), time.perf_counter() - began)
        if response.will_close or case.framing == "short":
            self.close()
        return answer

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class Tenant:
    """One API key: a vault, which must stay as it is and unknown to others, and a set of things to play with.

    `secrets` are never sent by anybody else; `hints` are the vault's ids, which the other tenant tries.
    """

    def __init__(self, name: str, key: str, base_model: str) -> None:
        self.name, self.key, self.base_model = name, key, base_model
        self.other: Tenant
        self.secrets: list[bytes] = []
        self.hints: Known
        self.own: Known
        self.outstanding: deque[str] = deque(maxlen=4000)
        self._numbers: Counter[str] = Counter()
        self._before: dict[str, Json] = {}
        self._lock = threading.Lock()

    def next_seq_id(self, scope: str) -> int:
        with self._lock:
            self._numbers[scope] += 1
            return self._numbers[scope]

    def call(self, wire: Wire, method: str, path: str, body: Json = None, *, raw: bytes | None = None) -> Answer:
        content = raw if raw is not None else b"" if body is None else json.dumps(body).encode()
        kind = "application/json" if raw is None else "application/x-protobuf"
        return wire.send(Case(method=method, target=path, route=path, key=self.key, headers=[("content-type", kind)], body=content))

    def must(self, wire: Wire, method: str, path: str, body: Json = None, *, raw: bytes | None = None) -> Json:
        """The JSON of a request that has to succeed; of its result, if it has one. Raises: Fault."""
        answer = self.call(wire, method, path, body, raw=raw)
        if answer.status >= 300:
            raise Fault(f"{self.name}: a valid {method} {path} {body} was answered {answer.status} {answer.body[:300]!r}")
        value = answer.json() if answer.body else {}
        if "request_id" not in value:
            return value
        return {**value, **self.result(wire, value["request_id"])}

    def settled(self, wire: Wire, request_id: str) -> Answer:
        """The result of a request, however it went. Raises: Fault if there is none in RESULT_S."""
        deadline = time.monotonic() + RESULT_S
        while time.monotonic() < deadline:
            answer = self.call(wire, "POST", f"{API}/retrieve_future", {"request_id": request_id})
            if answer.status != 408:
                return answer
        raise Fault(f"{self.name}: {request_id} had no result after {RESULT_S:g} s")

    def result(self, wire: Wire, request_id: str) -> Json:
        answer = self.settled(wire, request_id)
        value = answer.json() if answer.media_type == "application/json" else {}
        if answer.status != 200 or "error" in value:
            raise Fault(f"{self.name}: the valid request {request_id} failed: {answer.status} {answer.body[:300]!r}")
        return value

    def fill(self, wire: Wire, label: str = "") -> Known:
        """Make and use one of everything; `label` goes into every text that is kept. Raises: Fault if anything valid fails."""
        text = label or "play"
        meta = {"user_metadata": {text: text}}
        session = self.must(wire, "POST", f"{API}/create_session", {"tags": [text], "display_name": text, "project_id": text, **meta})
        session_id = session["session_id"]
        lora = {"session_id": session_id, "base_model": self.base_model, "lora_config": {"rank": 4}, **meta}
        models = [self.must(wire, "POST", f"{API}/create_model", {**lora, "model_seq_id": n})["model_id"] for n in range(2)]
        model = models[0]
        self.must(wire, "POST", f"{API}/forward_backward", raw=valid_pass(model, self.next_seq_id(model)))
        step = {"model_id": model, "seq_id": self.next_seq_id(model), "adam_params": {"learning_rate": 0.1}}
        self.must(wire, "POST", f"{API}/optim_step", step)
        paths, requests = [], [f"{model}:optim_step:{step['seq_id']}"]
        for route, name in (
            ("save_weights", "hinted"),
            ("save_weights_for_sampler", "hinted"),
            ("save_weights_for_sampler", f"saved-{text}"),
        ):
            saved = {"model_id": model, "seq_id": self.next_seq_id(model), "path": name}
            paths.append(self.must(wire, "POST", f"{API}/{route}", saved)["path"])
        sampling = {"session_id": session_id, "sampling_session_seq_id": 0, "model_path": paths[1]}
        sampler = self.must(wire, "POST", f"{API}/create_sampling_session", sampling)["sampling_session_id"]
        draw = {"sampling_session_id": sampler, "seq_id": self.next_seq_id(sampler), "num_samples": 2, "record_stability_info": True}
        draw |= {"prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}, "sampling_params": {"max_tokens": 3}}
        requests.append(f"{sampler}:sample:{draw['seq_id']}")
        sequences = self.must(wire, "POST", f"{API}/asample", draw)["sample_sequence_ids"]
        urls = self.must(wire, "GET", f"{API}/training_runs/{model}/checkpoints/weights/hinted/external_weights_urls")["urls"]
        return Known(
            base_model=self.base_model,
            sessions=[session_id],
            models=models,
            samplers=[sampler],
            paths=paths[:2],  # the third one's name is the label
            requests=requests,
            sequences=sequences,
            urls=["?" + urlsplit(url).query for url in urls.values()],
            next_seq_id=self.next_seq_id,
        )

    def lock_up(self, wire: Wire) -> None:
        """Make the vault: one set whose ids the other tenant gets as hints, one that it never hears of."""
        texts = [f"canary-{self.name}-{uuid.uuid4().hex[:12]}" for _ in range(2)]
        self.hints = self.fill(wire, texts[0])
        hidden = self.fill(wire, texts[1])
        self.secrets = [text.encode() for text in (*texts, hidden.sessions[0])]
        self.own = self.fill(wire)
        self._before = self.inventory(wire)

    def inventory(self, wire: Wire) -> dict[str, Json]:
        """What stands in the vault."""
        model, (sampler,), (session,) = self.hints.models[0], self.hints.samplers, self.hints.sessions
        paths = [f"training_runs/{model}", f"training_runs/{model}/checkpoints", f"sessions/{session}", f"samplers/{sampler}"]
        return {path: without_times(self.must(wire, "GET", f"{API}/{path}")) for path in paths}

    def changes(self, wire: Wire) -> list[str]:
        now = self.inventory(wire)
        return [f"{self.name}'s {path} changed: {self._before[path]} became {now[path]}" for path in now if now[path] != self._before[path]]

    def known(self) -> Known:
        """What its requests may name: its own things, twice as often as the other's."""
        mine, theirs = self.own, self.other.hints
        both = {
            name: [*getattr(mine, name), *getattr(mine, name), *getattr(theirs, name)]
            for name in ("sessions", "models", "samplers", "paths", "requests", "sequences")
        }
        return Known(base_model=self.base_model, urls=mine.urls, next_seq_id=self.next_seq_id, **both)


class Fault(Exception):
    """Something valid did not work."""


def valid_pass(model_id: str, seq_id: int, sequence_id: str | None = None) -> bytes:
    """A forward_backward on [1, 2] with targets [2, 3]; on a sampled sequence if one is named."""
    loss_fn = "cross_entropy" if sequence_id is None else "stable_reinforce"
    message = wire_pb2.ForwardBackwardRequest(model_id=model_id, seq_id=seq_id, loss_fn=loss_fn)
    datum = message.data.add()
    datum.model_input.add().encoded_text.tokens = np.array([1, 2], "<i4").tobytes()
    target, weights = datum.loss_fn_inputs["target_tokens"], datum.loss_fn_inputs["weights" if sequence_id is None else "advantages"]
    target.dense, target.dtype = np.array([2, 3], "<i8").tobytes(), wire_pb2.DTYPE_INT64
    weights.dense, weights.dtype = np.ones(2, "<f4").tobytes(), wire_pb2.DTYPE_FLOAT32
    if sequence_id is not None:
        prompt, drawn = datum.model_input_spans.add().prompt_tokens, datum.loss_fn_input_spans.add().sampled_tokens
        prompt.sequence_id, prompt.offset, prompt.length = sequence_id, 0, 2
        drawn.sequence_id, drawn.offset, drawn.length = sequence_id, 0, 2
    return bytes(message.SerializeToString())


def without_times(value: Json) -> Json:
    """Without what reading itself may change."""
    if isinstance(value, dict):
        return {key: without_times(part) for key, part in value.items() if key not in ("last_request_time", "last_used", "last_seen")}
    return [without_times(part) for part in value] if isinstance(value, list) else value
