"""Bodies of OpenAI requests: what is read from them, and in which words they are refused."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from ptlab.server.openai_bodies import REFUSED, ChatBody, CompletionBody, OpenAIRequestError

USER = {"role": "user", "content": "Hi"}


def chat(**fields: Any) -> ChatBody:
    return ChatBody.parse(json.dumps({"model": "m", "messages": [USER]} | fields).encode())


def completion(**fields: Any) -> CompletionBody:
    return CompletionBody.parse(json.dumps({"model": "m", "prompt": "a"} | fields).encode())


def test_null_is_the_default_of_every_parameter() -> None:
    nulls = dict.fromkeys(["n", "seed", "stop", "temperature", "top_p", "stream", "stream_options", "logprobs", "max_tokens", *REFUSED])
    body = chat(**nulls, max_completion_tokens=None, top_logprobs=None)
    params = body.sampling_params(body.most_tokens, None)
    assert (params.temperature, params.top_p, params.top_k, params.seed, params.max_tokens) == (1.0, 1.0, -1, None, None)
    assert (body.num_choices, body.stop_texts, body.includes_usage) == (1, [], False)
    assert completion(max_tokens=None).most_tokens == 16


def test_zero_is_not_the_default() -> None:
    body = completion(temperature=0, seed=0, top_k=0, max_tokens=0, echo=True)
    params = body.sampling_params(body.most_tokens, None)
    assert (params.temperature, params.seed, params.top_k, params.max_tokens) == (0.0, 0, -1, 0)


def test_either_name_of_the_token_limit_counts() -> None:
    assert chat(max_tokens=5).most_tokens == 5
    assert chat(max_completion_tokens=6).most_tokens == 6
    assert chat(max_completion_tokens=6, max_tokens=6).most_tokens == 6


def test_roles_and_parts_become_plain_messages() -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "annotations": []},
    ]
    assert chat(messages=messages).messages_to_render() == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c"},
    ]


def test_prompts_in_all_four_forms() -> None:
    assert completion(prompt="ab").prompts == ["ab"]
    assert completion(prompt=["a", "b"]).prompts == ["a", "b"]
    assert completion(prompt=[5, 6]).prompts == [[5, 6]]
    assert completion(prompt=[[5], [6, 7]]).prompts == [[5], [6, 7]]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_accepted_with_the_value_that_changes_nothing(name: str) -> None:
    neutral, reason = REFUSED[name]
    for value in [*neutral, None]:
        chat(**{name: value})
    with pytest.raises(OpenAIRequestError, match="is not supported") as raised:
        chat(**{name: "something"})
    assert raised.value.param == name
    assert reason in raised.value.message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": "x"}, 'n: Input should be a valid integer, unable to parse string as an integer; found "x"'),
        ({"temperature": float("nan")}, "temperature: Input should be a finite number"),
        ({"messages": [USER, {"role": "user"}]}, "messages[1].content: Field required"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "messages[0].content: Input should be a valid"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages[0].tool_calls is not supported"),
        ({"stop": ["a", "x" * 201]}, "stop[1]: String should have at most 200 characters"),
        ({"model": ""}, "model: String should have at least 1 character"),
    ],
)
def test_refusals_name_the_field_and_what_was_found(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(OpenAIRequestError) as raised:
        chat(**fields).messages_to_render()
    assert raised.value.message.startswith(message)
    assert len(raised.value.message) < 300


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"best_of": 2}, "best_of"),
        ({"max_tokens": 0}, "echo=true"),
        ({"prompt": ["a"] * 20, "n": 7}, "more than 128 choices"),
        ({"prompt": None}, "prompt: "),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"suffix": "x"}, "'suffix' is not supported"),
        ({"logprobs": 21}, "less than or equal to 20"),
    ],
)
def test_completions_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(OpenAIRequestError, match=message):
        completion(**fields)
    completion(best_of=3, n=3)


def test_the_error_keeps_its_field_through_pickling() -> None:
    error = pickle.loads(pickle.dumps(OpenAIRequestError("no", param="n")))
    assert (error.message, error.param) == ("no", "n")
