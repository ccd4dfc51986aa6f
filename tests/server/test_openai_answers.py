"""Answers as OpenAI's clients read them."""

from __future__ import annotations

import json
import math
from typing import Any

from ptlab.errors import BusyError, CheckpointError, EngineError, NotFoundError
from ptlab.server.errors import UnauthorizedError
from ptlab.server.openai_answers import LOWEST_LOGPROB, AnswerFormat, Choice, ScoredToken, Usage, error_json
from ptlab.server.openai_bodies import OpenAIRequestError
from ptlab.server.openai_text import TokenText

SPELLINGS = {1: "a", 2: "é", 3: "\ufffd", 4: "\ufffd"}


class Tokenizer:
    def decode(self, tokens: list[int], **_: Any) -> str:
        return "".join(SPELLINGS[token] for token in tokens)


def form(*, chat: bool, includes_usage: bool = False) -> AnswerFormat:
    return AnswerFormat(chat=chat, model="m", fingerprint="f", tokenizer=Tokenizer(), wants_logprobs=True, includes_usage=includes_usage)


def scored(token: int, logprob: float | None, *top: tuple[int, float], offset: int = 0) -> ScoredToken:
    return ScoredToken(TokenText(token, offset), logprob, top)


def test_log_probabilities_of_a_chat() -> None:
    choice = Choice(0, "é", "stop", [scored(2, -0.5, (2, -0.5), (1, -math.inf)), scored(3, -math.inf)], 3)
    told = form(chat=True).whole([choice], Usage(4, 3, 2))
    json.dumps(told, allow_nan=False)
    [answer] = told["choices"]
    assert answer["message"] == {"role": "assistant", "content": "é", "refusal": None}
    first, second = answer["logprobs"]["content"]
    assert (first["token"], first["logprob"], first["bytes"]) == ("é", -0.5, [0xC3, 0xA9])
    assert [(top["token"], top["logprob"]) for top in first["top_logprobs"]] == [("é", -0.5), ("a", LOWEST_LOGPROB)]
    assert second["bytes"] is None, "half a character has bytes that its text does not show"
    assert second["logprob"] == LOWEST_LOGPROB
    assert told["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 3,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_log_probabilities_of_a_completion() -> None:
    tokens = [scored(1, None), scored(2, -1.5, (1, -0.2), (3, -0.9), (4, -1.0), offset=1)]
    told = form(chat=False).whole([Choice(0, "aé", "length", tokens, 1)], Usage(1, 1))
    scores = told["choices"][0]["logprobs"]
    assert scores["tokens"] == ["a", "é"]
    assert scores["token_logprobs"] == [None, -1.5]
    assert scores["text_offset"] == [0, 1]
    assert scores["top_logprobs"] == [None, {"a": -0.2, "\ufffd": -0.9, "é": -1.5}], "the sampled token is among them; likelier twins stay"


def test_all_chunks_of_an_answer_share_its_head_and_the_usage_comes_last() -> None:
    answer = form(chat=True, includes_usage=True)
    choice = Choice(0, "a", "stop", [scored(1, -0.1)], 2)
    chunks = [*answer.role_chunks(1), *answer.choice_chunks(choice), *answer.usage_chunks(Usage(1, 2))]
    assert len({(c["id"], c["created"], c["model"], c["system_fingerprint"], c["object"]) for c in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert chunks[0]["id"].startswith("chatcmpl-")
    assert [c["choices"][0]["delta"] for c in chunks[:-1]] == [{"role": "assistant", "content": ""}, {"content": "a"}, {}]
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]] == [None, None, "stop"]
    assert [c["usage"] is None for c in chunks] == [True, True, True, False]
    assert chunks[-1]["choices"] == []
    plain = form(chat=False)
    assert plain.role_chunks(2) == plain.usage_chunks(Usage(1, 1)) == []
    [chunk] = plain.choice_chunks(choice)
    assert chunk["object"] == "text_completion"
    assert "usage" not in chunk
    assert (chunk["choices"][0]["text"], chunk["choices"][0]["finish_reason"]) == ("a", "stop")


def test_errors_in_openais_words() -> None:
    def told(error: Any) -> tuple[Any, ...]:
        return tuple(error_json(error)["error"][key] for key in ("type", "param", "code"))

    assert told(OpenAIRequestError("x", param="n")) == ("invalid_request_error", "n", None)
    assert told(NotFoundError("x")) == ("invalid_request_error", "model", "model_not_found")
    assert told(BusyError("x")) == ("rate_limit_error", None, None)
    assert told(CheckpointError("x")) == ("invalid_request_error", None, None)
    assert told(UnauthorizedError("x")) == ("authentication_error", None, "invalid_api_key")
    assert told(EngineError("x")) == ("server_error", None, None)
