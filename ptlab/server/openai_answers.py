"""Answers of the OpenAI-compatible endpoints as JSON objects: choices, log-probabilities, chunks of a stream, usage, errors."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ptlab.errors import NotFoundError, PtlabError
from ptlab.server.errors import status_of
from ptlab.server.openai_bodies import OpenAIRequestError
from ptlab.server.openai_text import REPLACEMENT, TokenText, decode
from ptlab.types import TopkLogprobs

LOWEST_LOGPROB = -9999.0
"""OpenAI's stand-in for minus infinity, which JSON has no number for."""
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token of an answer (or of an echoed prompt) with what was asked about it."""

    text: TokenText
    logprob: float | None
    """Nats; None for the first token of a prompt, which has nothing before it."""
    top: Sequence[tuple[int, float]]
    """The likeliest tokens in its place, likeliest first; empty if not asked for."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One finished draw."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    tokens: Sequence[ScoredToken]
    """Empty if log-probabilities were not asked for."""
    num_tokens: int
    """Sampled, the stop token included."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens read and sampled."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    def json(self) -> Json:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFormat:
    """What all objects of one answer share: its kind and head, and how log-probabilities look."""

    chat: bool
    model: str
    """As asked for."""
    fingerprint: str
    tokenizer: Any
    wants_logprobs: bool
    includes_usage: bool = False
    """Of a stream: a last chunk with the usage, and null in all others."""
    answer_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Choice], usage: Usage) -> Json:
        return self._head(chunk=False) | {"choices": [self._choice(choice) for choice in choices], "usage": usage.json()}

    def role_chunks(self, num_choices: int) -> list[Json]:
        """What a chat's stream begins with; a completion's begins with text."""
        if not self.chat:
            return []
        first: Json = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return [self._chunk([{"index": index} | first]) for index in range(num_choices)]

    def choice_chunks(self, choice: Choice) -> list[Json]:
        """A finished draw: its text, then why it ended."""
        scores = self._logprobs(choice.tokens)
        if not self.chat:
            return [self._chunk([self._choice(choice)])]
        body: Json = {"index": choice.index, "delta": {"content": choice.text}, "logprobs": scores, "finish_reason": None}
        end: Json = {"index": choice.index, "delta": {}, "logprobs": None, "finish_reason": choice.finish_reason}
        return [self._chunk([body]), self._chunk([end])]

    def usage_chunks(self, usage: Usage) -> list[Json]:
        return [self._chunk([]) | {"usage": usage.json()}] if self.includes_usage else []

    def _head(self, *, chunk: bool) -> Json:
        kind, prefix = (("chat.completion.chunk" if chunk else "chat.completion"), "chatcmpl") if self.chat else ("text_completion", "cmpl")
        return {
            "id": f"{prefix}-{self.answer_id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def _chunk(self, choices: list[Json]) -> Json:
        return self._head(chunk=True) | {"choices": choices} | ({"usage": None} if self.includes_usage else {})

    def _choice(self, choice: Choice) -> Json:
        shared: Json = {"index": choice.index, "logprobs": self._logprobs(choice.tokens), "finish_reason": choice.finish_reason}
        if self.chat:
            return shared | {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
        return shared | {"text": choice.text}

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> Json | None:
        if not self.wants_logprobs:
            return None
        if self.chat:
            scored = [
                self._spelled(token.text.token, token.logprob) | {"top_logprobs": [self._spelled(*cell) for cell in token.top]}
                for token in tokens
            ]
            return {"content": scored, "refusal": None}
        return {
            "tokens": [self._spelling(token.text.token) for token in tokens],
            "token_logprobs": [None if token.logprob is None else finite(token.logprob) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": [token.text.offset for token in tokens],
        }

    def _top(self, token: ScoredToken) -> dict[str, float] | None:
        """By spelling, the token itself included as OpenAI does. Of tokens spelled alike (pieces of characters) the likeliest stays."""
        if token.logprob is None:
            return None
        best: dict[str, float] = {}
        for other, logprob in [*token.top, (token.text.token, token.logprob)]:
            best.setdefault(self._spelling(other), finite(logprob))
        return best

    def _spelled(self, token: int, logprob: float | None) -> Json:
        text = self._spelling(token)
        # a piece of a character has bytes that its decoded text does not show
        return {"token": text, "logprob": finite(logprob or 0.0), "bytes": None if REPLACEMENT in text else list(text.encode())}

    def _spelling(self, token: int) -> str:
        return decode(self.tokenizer, [token])


def finite(logprob: float) -> float:
    return max(LOWEST_LOGPROB, float(logprob)) if not math.isnan(logprob) else LOWEST_LOGPROB


def top_rows(topk: TopkLogprobs | None, num_tokens: int) -> list[Sequence[tuple[int, float]]]:
    """The likeliest tokens of each position; empty where not asked for."""
    return [()] * num_tokens if topk is None else [row or () for row in topk.to_lists()]


def error_json(err: PtlabError) -> Json:
    """OpenAI's error object."""
    status, _ = status_of(err)
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error" if status < 500 else "server_error")
    param = err.param if isinstance(err, OpenAIRequestError) else "model" if isinstance(err, NotFoundError) else None
    code = {401: "invalid_api_key", 404: "model_not_found"}.get(status)
    return {"error": {"message": err.message, "type": kind, "param": param, "code": code}}
