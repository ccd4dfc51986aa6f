"""From OpenAI requests to prompts and from draws to choices, beside what the whole server shows (routes/test_openai.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ptlab.engines.base_model import load_tokenizer
from ptlab.errors import InvalidRequestError
from ptlab.renderers import TextCodec
from ptlab.server.openai_bodies import ChatBody, CompletionBody, OpenAIRequestError
from ptlab.server.openai_drawing import Language, ask_of


@pytest.fixture
def tokenizer(tiny_qwen3_dir: Path) -> Any:
    return load_tokenizer(str(tiny_qwen3_dir))


def language(tokenizer: Any, name: str = "org/unknown") -> Language:
    return Language(name, tokenizer, TextCodec(tokenizer).special_ids)


def chat(**fields: Any) -> ChatBody:
    return ChatBody.parse(json.dumps({"model": "m", "messages": [{"role": "user", "content": "Hi"}]} | fields).encode())


def complete(**fields: Any) -> CompletionBody:
    return CompletionBody.parse(json.dumps({"model": "m"} | fields).encode())


def test_without_a_chat_template_the_format_that_ptlab_knows_the_model_by_is_used(tokenizer: Any) -> None:
    ask = ask_of(chat(), language(tokenizer, "Qwen/Qwen3-8B"))
    assert ask.renderer == "qwen3"
    assert tokenizer.decode(ask.prompts[0].tokens) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert ask_of(chat(), language(tokenizer, "Qwen/Qwen3-8B-Base")).renderer == "role_colon"


def test_a_model_without_any_format_is_not_guessed_at(tokenizer: Any) -> None:
    with pytest.raises(OpenAIRequestError, match=r"no chat template; use /v1/completions, or name a `renderer` \(qwen3") as raised:
        ask_of(chat(), language(tokenizer))
    assert raised.value.param == "renderer"
    assert ask_of(chat(renderer="chatml"), language(tokenizer)).renderer == "chatml"


def test_the_tokenizers_own_template_comes_first(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]<|im_end|>{% endfor %}"
    ask = ask_of(chat(), language(tokenizer, "Qwen/Qwen3-8B"))
    assert ask.renderer == "chat_template"
    assert tokenizer.decode(ask.prompts[0].tokens) == "[Hi]<|im_end|>"
    tokenizer.chat_template = None


def test_stop_texts_of_a_format_and_of_the_request_are_joined(tokenizer: Any) -> None:
    ask = ask_of(chat(renderer="role_colon", stop=["x"]), language(tokenizer))
    assert ask.params.stop == ["x", "\n\nUser:"]
    assert ask.stop_texts == ["x", "\n\nUser:"]
    ask = ask_of(chat(renderer="chatml"), language(tokenizer))
    assert ask.params.stop == [2]
    assert ask.stop_texts == []
    ask = ask_of(complete(prompt="a", stop="x"), language(tokenizer))
    assert ask.params.stop == ["x"]


def test_a_begin_of_text_token_is_read_but_not_echoed(tokenizer: Any) -> None:
    class WithStart:
        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            return [1] * add_special_tokens + list(tokenizer.encode(text, add_special_tokens=False))

    prompt = Language("m", WithStart(), frozenset()).encode("ab")
    assert prompt.tokens[0] == 1
    assert (prompt.text, prompt.num_added) == ("ab", 1)


def test_token_ids_beyond_the_vocabulary_are_refused(tokenizer: Any) -> None:
    assert ask_of(complete(prompt=[511]), language(tokenizer)).prompts[0].tokens == [511]
    with pytest.raises(OpenAIRequestError, match=r"token 512 is outside 0 \.\. 511"):
        ask_of(complete(prompt=[5, 512]), language(tokenizer))


def test_a_renderer_is_made_once_and_an_unknown_one_refused(tokenizer: Any) -> None:
    known = language(tokenizer)
    assert known.renderer("chatml") is known.renderer("chatml")
    with pytest.raises(InvalidRequestError, match="unknown renderer"):
        known.renderer("nope")
