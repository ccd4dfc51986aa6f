"""Speakers: a sampling client behind a renderer, and a real HTTP server on this machine that speaks OpenAI's chat API, badly at times."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from pydantic import TypeAdapter, ValidationError

from ptlab.envs import speakers
from ptlab.envs.speakers import (
    ModelSpeaker,
    ModelSpeakerConfig,
    OpenAISpeaker,
    OpenAISpeakerConfig,
    RememberingSpeaker,
    SpeakerConfig,
    open_speaker,
)
from ptlab.errors import ConfigError, EnvError
from ptlab.renderers import Message
from ptlab.types import ModelInput, SampledSequence, SampleResponse

QUESTION = [Message(role="system", content="be brief"), Message(role="user", content="alive?")]


class ChatServer:
    """Answers each request with the next of `answers` (status, body, headers), then with the last one for ever."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, str, dict[str, str]]] = []
        self.seen: list[tuple[str, str | None, dict[str, object]]] = []
        self.delay_s = 0.0
        self.open_now = self.most_open = 0
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.open_now += 1
                    outer.most_open = max(outer.most_open, outer.open_now)
                    outer.seen.append((self.path, self.headers.get("Authorization"), body))
                    status, text, headers = outer.answers[0] if len(outer.answers) == 1 else outer.answers.pop(0)
                time.sleep(outer.delay_s)
                with lock:
                    outer.open_now -= 1
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(text.encode()))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = False
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


def said(text: str | None) -> tuple[int, str, dict[str, str]]:
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}), {}


@pytest.fixture
def server() -> Iterator[ChatServer]:
    chat = ChatServer()
    thread = threading.Thread(target=chat.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield chat
    chat.http.shutdown()
    chat.http.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speakers, "FIRST_DELAY_S", 0.002)


def ask(speaker: OpenAISpeaker, seed: int = 5) -> str:
    return asyncio.run(speaker.reply(QUESTION, seed=seed))


def test_the_request_is_a_chat_completion_with_key_and_seed(server, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "k-123")
    server.answers = [said(" yes\n")]
    assert ask(OpenAISpeaker(server.url + "/", "m", api_key_env="SOME_KEY", max_tokens=7, temperature=0.5), seed=2**31 + 5) == "yes"
    [(path, authorization, body)] = server.seen
    assert (path, authorization) == ("/v1/chat/completions", "Bearer k-123")
    assert body == {"model": "m", "messages": QUESTION, "max_tokens": 7, "temperature": 0.5, "seed": 5}


def test_busy_and_broken_servers_are_asked_again(server):
    server.answers = [(429, "slow down", {"Retry-After": "0"}), (503, "", {}), said("no")]
    assert ask(OpenAISpeaker(server.url, "m")) == "no"
    assert len(server.seen) == 3 and server.seen[0][1] is None


def test_it_waits_as_long_as_the_server_asks(server):
    server.answers = [(429, "", {"Retry-After": "1"}), said("no")]
    began = time.monotonic()
    assert ask(OpenAISpeaker(server.url, "m")) == "no"
    assert time.monotonic() - began >= 1.0


def test_a_server_that_stays_broken_is_an_env_error_that_says_so(server):
    server.answers = [(500, "out of memory", {})]
    with pytest.raises(
        EnvError, match=r"/v1/chat/completions: no answer of model 'm' in 3 tries.*HTTP 500: out of memory.*is the server up"
    ):
        ask(OpenAISpeaker(server.url, "m", tries=3))
    assert len(server.seen) == 3


def test_a_refusal_is_not_repeated(server):
    server.answers = [(404, "no such model", {})]
    with pytest.raises(EnvError, match="HTTP 404: no such model; check url, model and api_key_env"):
        ask(OpenAISpeaker(server.url, "m"))
    assert len(server.seen) == 1


@pytest.mark.parametrize("text", ["<html>", "{}", '{"choices": []}', "[1]", '{"choices": [{"message": null}]}'])
def test_an_answer_of_another_form_is_an_env_error(server, text):
    server.answers = [(200, text, {})]
    with pytest.raises(EnvError, match=r"needed a chat completion \(choices\[0\].message.content\), found"):
        ask(OpenAISpeaker(server.url, "m"))


def test_a_model_that_says_nothing_has_said_nothing(server):
    server.answers = [said(None)]
    assert ask(OpenAISpeaker(server.url, "m")) == ""


def test_a_server_that_hangs_costs_its_timeout_and_is_asked_again(server):
    server.answers, server.delay_s = [said("late")], 0.4
    began = time.monotonic()
    with pytest.raises(EnvError, match="in 2 tries; the last: TimeoutError"):
        ask(OpenAISpeaker(server.url, "m", timeout_s=0.05, tries=2))
    assert time.monotonic() - began < 0.4


def test_nobody_there():
    with pytest.raises(EnvError, match=r"in 2 tries; the last: ConnectError"):
        ask(OpenAISpeaker("http://127.0.0.1:9/v1", "m", tries=2))


def test_no_more_requests_at_once_than_told(server):
    server.answers, server.delay_s = [said("yes")], 0.02

    async def many() -> list[str]:
        speaker = OpenAISpeaker(server.url, "m", max_in_flight=3)
        return await asyncio.gather(*[speaker.reply(QUESTION, seed=n) for n in range(12)])

    assert asyncio.run(many()) == ["yes"] * 12
    assert server.most_open == 3


def test_a_key_that_is_not_set_is_found_before_the_first_question(monkeypatch):
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(ConfigError, match="environment variable SOME_KEY is not set"):
        OpenAISpeaker("http://127.0.0.1:9/v1", "m", api_key_env="SOME_KEY")


class LetterRenderer:
    def build_generation_prompt(self, messages):
        return ModelInput.from_ints([ord(c) for m in messages for c in m["content"]])

    def get_stop_sequences(self):
        return [ord("|")]

    def parse_response(self, tokens):
        text = "".join(map(chr, tokens))
        return Message(role="assistant", content=text.removesuffix("|")), text.endswith("|")


class EchoClient:
    """Says its prompt and its seed."""

    def __init__(self) -> None:
        self.params = None

    async def sample(self, prompt, num_samples, sampling_params):
        self.params = sampling_params
        tokens = [*prompt.to_ints(), *map(ord, f" {sampling_params.seed} |")]
        sequence = SampledSequence.from_lists(tokens, [-0.5] * len(tokens), stop_reason="stop", sequence_id="s", policy_version=0)
        return SampleResponse(sequences=[sequence])


def test_a_model_speaks_through_its_renderer():
    client = EchoClient()
    speaker = ModelSpeaker(client, LetterRenderer(), max_tokens=9, temperature=0.25)
    assert asyncio.run(speaker.reply(QUESTION, seed=3)) == "be briefalive? 3"
    assert (client.params.max_tokens, client.params.temperature, client.params.stop) == (9, 0.25, [ord("|")])


def test_what_was_asked_before_is_not_asked_again():
    class Counting:
        def __init__(self) -> None:
            self.asked = []

        async def reply(self, messages, *, seed):
            self.asked.append((messages[-1]["content"], seed))
            if messages[-1]["content"] == "fail":
                raise EnvError("away")
            return f"answer {len(self.asked)}"

    async def run() -> tuple[list[str], list[tuple[str, int]]]:
        counting = Counting()
        speaker = RememberingSpeaker(counting, size=2)
        said = [
            await speaker.reply([Message(role="user", content=text)], seed=seed)
            for text, seed in (("a", 1), ("a", 1), ("a", 2), ("b", 1), ("a", 2), ("a", 1))
        ]
        for _ in range(2):
            with pytest.raises(EnvError):
                await speaker.reply([Message(role="user", content="fail")], seed=1)
        return said, counting.asked

    said, asked = asyncio.run(run())
    assert said == ["answer 1", "answer 1", "answer 2", "answer 3", "answer 2", "answer 4"]
    assert asked == [("a", 1), ("a", 2), ("b", 1), ("a", 1), ("fail", 1), ("fail", 1)]


def test_sections_open_as_what_they_say():
    opened = []

    class Models:
        async def open(self, *, base_model=None, model_path=None):
            opened.append((base_model, model_path))
            return EchoClient(), LetterRenderer()

    section = TypeAdapter(SpeakerConfig).validate_python({"kind": "model", "path": "tinker://x", "max_tokens": 3})
    assert isinstance(section, ModelSpeakerConfig)
    model = asyncio.run(open_speaker(section, Models()))
    assert opened == [(None, "tinker://x")] and model.max_tokens == 3
    openai = asyncio.run(open_speaker(OpenAISpeakerConfig(url="http://h/v1", model="m", tries=2), Models()))
    assert openai.url == "http://h/v1/chat/completions" and openai.tries == 2
    with pytest.raises(ValidationError, match="leave out /chat/completions"):
        OpenAISpeakerConfig(url="http://h/v1/chat/completions", model="m")
    with pytest.raises(ValidationError):
        OpenAISpeakerConfig(url="ftp://h", model="m")
