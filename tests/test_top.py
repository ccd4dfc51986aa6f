"""`ptlab top`: the page it draws, and what it says where there is no server."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from ptlab import top
from ptlab.errors import ConfigError

MODEL = {"base_model": "Qwen/Qwen3-8B", "rank": 32}
STATUS: dict[str, Any] = {
    "owner": "alice",
    "num_sessions": 2,
    "sessions": [
        {
            "session_id": "11111111-aaaa",
            "name": "gsm8k",
            "silent_s": 3.0,
            "num_samplers": 2,
            "models": [
                {
                    "model_id": "11111111-aaaa:train:0",
                    "base_model": "Qwen/Qwen3-8B",
                    "rank": 32,
                    "state": "parked",
                    "step": 7,
                    "idle_s": 7300,
                },
                {
                    "model_id": "11111111-aaaa:train:1",
                    "base_model": "Qwen/Qwen3-8B",
                    "rank": 32,
                    "state": "running",
                    "step": 12,
                    "idle_s": 1,
                },
            ],
        },
        {"session_id": "22222222-bbbb", "name": None, "silent_s": 90.0, "num_samplers": 1, "models": []},
    ],
    "load": {
        "up_s": 3700.0,
        "base_models": ["Qwen/Qwen3-8B"],
        "num_sessions": 5,
        "models": {"running": 1, "parked": 3},
        "num_samplers": 4,
        "waiting": {"sample": 12, "optim_step": 1},
        "tokens_per_s": {"sampled": 1234.4, "trained": 567.0},
        "num_syncs": 9,
        "sync_latency_s": 0.31,
        "sync_verify_gap_nats": 2.5e-5,
        "memory_bytes": 3 * 2**30,
        "store_bytes": 700 * 1024,
    },
}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server: Any = self.server
        server.seen.append((self.path, self.headers.get("X-API-Key")))
        code, body = server.answers[min(len(server.seen) - 1, len(server.answers) - 1)]
        self.send_response(code)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Any]:
    made: Any = HTTPServer(("127.0.0.1", 0), Handler)
    made.seen, made.answers = [], [(200, json.dumps(STATUS).encode())]
    made.url = f"http://127.0.0.1:{made.server_port}"
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def test_the_page_shows_load_queues_syncs_and_models() -> None:
    text = top.page(STATUS, "http://x", (100, 40))
    assert "sampled 1234  trained 567" in text
    assert "memory 3.0 GiB  store 700 KiB" in text
    assert "waiting   optim_step 1  sample 12" in text
    assert "9 so far, last 0.31 s  verify gap 2.5e-05 nats" in text
    assert "5 sessions  4 models (1 running, 3 parked)  4 samplers" in text
    assert "alice: 2 sessions" in text
    rows = text.splitlines()[8:]
    assert rows[0].split() == ["11111111-a", "gsm8k", "1", "running", "12", "32", "1s", "Qwen/Qwen3-8B"], "what runs stands first"
    assert rows[1].split() == ["22222222-b", "-", "-", "1", "samplers,", "silent", "for", "1m"]
    assert rows[2].split() == ["11111111-a", "gsm8k", "0", "parked", "7", "32", "2h", "Qwen/Qwen3-8B"]
    heading = text.splitlines()[7]
    assert rows[0].index("running") == heading.index("STATE")
    assert rows[0].index("12") + 2 == heading.index("STEP") + 4


def test_the_page_of_an_idle_server() -> None:
    idle = deepcopy(STATUS) | {"sessions": [], "num_sessions": 0}
    idle["load"] |= {"waiting": {}, "models": {}, "sync_latency_s": None, "sync_verify_gap_nats": None, "num_syncs": 0}
    text = top.page(idle, "http://x", (100, 40))
    assert "waiting   nothing" in text
    assert "sync      none yet" in text
    assert "0 models  4 samplers" in text


def test_the_page_fits_the_terminal_and_says_what_is_missing() -> None:
    many = deepcopy(STATUS)
    many["sessions"] = [deepcopy(STATUS["sessions"][1]) for _ in range(30)]
    text = top.page(many, "http://" + "x" * 200, (60, 20))
    lines = text.splitlines()
    assert len(lines) <= 20
    assert max(map(len, lines)) <= 60
    assert lines[-1] == "  ... and 20 more"


def test_names_cannot_steer_the_terminal() -> None:
    evil = deepcopy(STATUS)
    evil["sessions"][0]["name"] = "\x1b[2Jboo\nx"
    assert "\x1b" not in top.page(evil, "http://x", (100, 40))
    assert "?[2Jboo?x" in top.page(evil, "http://x", (100, 40))


def test_once_prints_one_page_without_control_sequences(server: Any) -> None:
    out = io.StringIO()
    assert top.top(server.url + "/", "tml-k", every_s=1, once=True, out=out) == 0
    assert out.getvalue() == top.page(STATUS, server.url + "/", (top.COLUMNS, 1_000_000))
    assert server.seen == [("/api/v1/status", "tml-k")]
    assert "\x1b" not in out.getvalue()


def test_it_goes_on_while_the_server_is_away(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    good = (200, json.dumps(STATUS).encode())
    server.answers = [good, (503, b""), good]
    sleeps = []

    def sleep(seconds: float) -> None:
        sleeps.append(seconds)
        if len(sleeps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(top.time, "sleep", sleep)
    out = io.StringIO()
    assert top.top(server.url, None, every_s=2.5, once=False, out=out) == 0
    screens = out.getvalue().split(top.HOME_AND_CLEAR)
    assert len(screens) == 4
    assert "alice: 2 sessions" in screens[1]
    assert "answered 503" in screens[2]
    assert "trying again every 2.5 s" in screens[2]
    assert "alice: 2 sessions" in screens[3]
    assert sleeps == [2.5, 2.5, 2.5]


@pytest.mark.parametrize(
    ("code", "body", "message"),
    [
        (401, b"{}", "wants an API key"),
        (404, b"", "is it a `ptlab serve`"),
        (200, b"hello", "does not answer as"),
        (200, b"[]", "something else"),
    ],
)
def test_an_answer_that_is_no_status_says_why(server: Any, code: int, body: bytes, message: str) -> None:
    server.answers = [(code, body)]
    with pytest.raises(ConfigError, match=message):
        top.top(server.url, None, every_s=1, once=True, out=io.StringIO())


def test_no_server_and_bad_arguments_are_the_users_errors() -> None:
    for url in ("http://127.0.0.1:9", "file:///etc/passwd", "127.0.0.1:8000"):
        with pytest.raises(ConfigError, match=url.replace("/", ".")):
            top.fetch(url, None)
    with pytest.raises(ConfigError, match="--every"):
        top.top("http://127.0.0.1:9", None, every_s=0, once=True, out=io.StringIO())


def test_durations_and_sizes() -> None:
    assert [top.duration(s) for s in (0, 59.9, 60, 3599, 3600, 86399, 200000)] == ["0s", "59s", "1m", "59m", "1h", "23h", "2d"]
    assert [top.size_text(n) for n in (0, 1023, 1024, 5 * 2**20, 2**40)] == ["0 B", "1023 B", "1 KiB", "5 MiB", "1024.0 GiB"]
