"""Someone else who speaks in an environment: an answerer, an opponent, a judge. A model of this run, or any server with OpenAI's chat API.

    speaker = await open_speaker(config.answerer, setting.models)
    text = await speaker.reply([{"role": "user", "content": "Is a cat alive?"}], seed=stable_seed(...))

A speaker keeps no conversation: it gets all messages each time, so one speaker serves every attempt at once.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import httpx
from pydantic import Field, model_validator

from ptlab.envs.env_section import OtherModels
from ptlab.errors import ConfigError, EnvError
from ptlab.renderers import Message, Renderer, text_of
from ptlab.section import Section
from ptlab.types import SamplingParams

if TYPE_CHECKING:
    from ptlab.client.sampling import SamplingClient

FIRST_DELAY_S, LONGEST_DELAY_S = 0.5, 30.0
"""Pause before the second try; it doubles with every further one, up to the longest."""
_OPENAI_SEEDS = 2**31


class Speaker(Protocol):
    """Answers a conversation. Safe to ask from many attempts at once."""

    async def reply(self, messages: Sequence[Message], *, seed: int) -> str:
        """The text that follows `messages`; the same seed gives the same text where the model behind it can promise that.

        Raises: EnvError, EngineError if nobody answers. A useless answer is an answer.
        """


class ModelSpeaker:
    """A sampling client and its renderer as a speaker. Thinking is left out of the reply."""

    def __init__(self, sampling_client: SamplingClient, renderer: Renderer, *, max_tokens: int = 64, temperature: float = 0.0) -> None:
        self.sampling_client = sampling_client
        self.renderer = renderer
        self.max_tokens = max_tokens
        self.temperature = temperature

    async def reply(self, messages: Sequence[Message], *, seed: int) -> str:
        params = SamplingParams(
            max_tokens=self.max_tokens, seed=seed, stop=self.renderer.get_stop_sequences(), temperature=self.temperature
        )
        prompt = self.renderer.build_generation_prompt(messages)
        response = await self.sampling_client.sample(prompt=prompt, num_samples=1, sampling_params=params)
        message, _ = self.renderer.parse_response(response.sequences[0].tokens)
        return text_of(message).strip()


class RememberingSpeaker:
    """Gives what it was asked before, with the same seed, the same answer without asking again; the newest `size` replies are kept."""

    def __init__(self, speaker: Speaker, *, size: int = 20_000) -> None:
        self.speaker = speaker
        self.size = size
        self._replies: OrderedDict[tuple[tuple[tuple[str, str], ...], int], str] = OrderedDict()

    async def reply(self, messages: Sequence[Message], *, seed: int) -> str:
        key = tuple((message["role"], text_of(message)) for message in messages), seed
        if key in self._replies:
            return self._replies[key]
        said = self._replies[key] = await self.speaker.reply(messages, seed=seed)
        if len(self._replies) > self.size:
            self._replies.popitem(last=False)
        return said


class OpenAISpeaker:
    """A server that speaks OpenAI's chat API: `POST {url}/chat/completions`. One connection per reply.

    Args:
        url: up to and including the version, e.g. "http://localhost:8000/v1".
        api_key_env: environment variable that holds the key; None = no key is sent.
        timeout_s: for one try, from connecting to the last byte of the answer.
        tries: how often a reply is asked for while the server is busy (429), broken (5xx) or away, with growing pauses.
        max_in_flight: requests open at once; more wait their turn.

    Raises: ConfigError if the environment variable is not set.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key_env: str | None = None,
        max_tokens: int = 64,
        temperature: float = 0.0,
        timeout_s: float = 60.0,
        tries: int = 5,
        max_in_flight: int = 32,
    ) -> None:
        self.url = url.rstrip("/") + "/chat/completions"
        self.model = model
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.timeout_s = timeout_s
        self.tries = tries
        self._headers = {} if api_key_env is None else {"Authorization": f"Bearer {_api_key(api_key_env, url)}"}
        self._tls = httpx.create_ssl_context()  # reading the certificates takes longer than a local answer
        self._slots = asyncio.Semaphore(max_in_flight)

    async def reply(self, messages: Sequence[Message], *, seed: int) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": message["role"], "content": text_of(message)} for message in messages],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": seed % _OPENAI_SEEDS,
        }
        jitter = random.Random(seed)
        async with self._slots:
            for number in range(1, self.tries + 1):
                failure, asked_delay_s = "", 0.0
                try:
                    response = await self._post(body)
                except (httpx.TransportError, TimeoutError) as err:
                    failure = f"{type(err).__name__} {err}".strip()
                else:
                    if response.status_code == 200:
                        return self._content(response)
                    failure = f"HTTP {response.status_code}: {response.text[:200]}"
                    if response.status_code != 429 and response.status_code < 500:
                        raise EnvError(f"{self.url}: model {self.model!r}: {failure}; check url, model and api_key_env of the speaker")
                    asked_delay_s = _retry_after_s(response)
                if number < self.tries:
                    delay_s = FIRST_DELAY_S * 2 ** (number - 1) * (0.5 + jitter.random())
                    await asyncio.sleep(min(LONGEST_DELAY_S, max(asked_delay_s, delay_s)))
        raise EnvError(f"{self.url}: no answer of model {self.model!r} in {self.tries} tries; the last: {failure}; is the server up?")

    async def _post(self, body: dict[str, Any]) -> httpx.Response:
        async with asyncio.timeout(self.timeout_s), httpx.AsyncClient(verify=self._tls, timeout=None) as client:
            return await client.post(self.url, json=body, headers=self._headers)

    def _content(self, response: httpx.Response) -> str:
        """Raises: EnvError if this is not a chat completion."""
        try:
            content = response.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as err:
            found = response.text[:200]
            raise EnvError(f"{self.url}: needed a chat completion (choices[0].message.content), found {found!r}") from err
        return content.strip() if isinstance(content, str) else ""  # null: a model that said nothing


def _api_key(name: str, url: str) -> str:
    key = os.environ.get(name)
    if not key:
        raise ConfigError(
            f"api_key_env: environment variable {name} is not set; {url} is asked with the key it holds. Set it, or leave it out"
        )
    return key


def _retry_after_s(response: httpx.Response) -> float:
    """What the server asks for in seconds; 0.0 where it says nothing, or gives a date."""
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isdigit() else 0.0


class ModelSpeakerConfig(Section):
    kind: Literal["model"] = "model"
    """A model of this run's service."""
    base_model: str | None = None
    """Its base model; None = the run's."""
    path: str | None = None
    """tinker:// path of its sampler weights; None = the base model itself."""
    max_tokens: int = Field(default=64, ge=1)
    """Longest reply, tokens."""
    temperature: float = Field(default=0.0, ge=0)
    """0 = its likeliest reply."""


class OpenAISpeakerConfig(Section):
    kind: Literal["openai"] = "openai"
    """A server that speaks OpenAI's chat API (vLLM, `ptlab serve`, a hosted one)."""
    url: str = Field(pattern=r"^https?://")
    """Up to and including the version: http://localhost:8000/v1."""
    model: str = Field(min_length=1)
    """Name of the model there."""
    api_key_env: str | None = None
    """Environment variable that holds the key; None = none is sent. The key itself never stands in a config."""
    max_tokens: int = Field(default=64, ge=1)
    """Longest reply, tokens."""
    temperature: float = Field(default=0.0, ge=0)
    """0 = its likeliest reply."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Most seconds for one try."""
    tries: int = Field(default=5, ge=1)
    """Tries per reply while the server is busy, broken or away."""
    max_in_flight: int = Field(default=32, ge=1)
    """Requests open at once."""

    @model_validator(mode="after")
    def _not_the_whole_route(self) -> OpenAISpeakerConfig:
        if self.url.rstrip("/").endswith("/chat/completions"):
            raise ValueError(f"url is {self.url}; leave out /chat/completions, it is added")
        return self


SpeakerConfig = Annotated[ModelSpeakerConfig | OpenAISpeakerConfig, Field(discriminator="kind")]
"""The section of a speaker: `{kind: model, path: tinker://...}` or `{kind: openai, url: http://..., model: ...}`."""


async def open_speaker(section: ModelSpeakerConfig | OpenAISpeakerConfig, models: OtherModels) -> Speaker:
    """The speaker of a config section.

    Raises: NotFoundError, CheckpointError for weights that are not there; ConfigError for a key that is not set.
    """
    match section:
        case ModelSpeakerConfig():
            client, renderer = await models.open(base_model=section.base_model, model_path=section.path)
            return ModelSpeaker(client, renderer, max_tokens=section.max_tokens, temperature=section.temperature)
        case OpenAISpeakerConfig():
            return OpenAISpeaker(
                section.url,
                section.model,
                api_key_env=section.api_key_env,
                max_tokens=section.max_tokens,
                temperature=section.temperature,
                timeout_s=section.timeout_s,
                tries=section.tries,
                max_in_flight=section.max_in_flight,
            )
