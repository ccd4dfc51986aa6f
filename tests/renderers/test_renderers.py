from __future__ import annotations

import pickle
from typing import Any

import pytest

from ptlab.errors import InvalidRequestError
from ptlab.renderers import RENDERER_NAMES, Message, get_renderer, text_of

CHAT: list[Message] = [{"role": "user", "content": "2+2?"}]


def test_every_name_gives_its_renderer_and_survives_pickling(chatml_tokenizer: Any) -> None:
    assert {"qwen3", "qwen3_disable_thinking", "llama3", "role_colon", "chatml", "chat_template"} <= set(RENDERER_NAMES)
    for name in set(RENDERER_NAMES) - {"llama3"}:
        renderer = get_renderer(name, chatml_tokenizer)
        assert renderer.name == name
        assert pickle.loads(pickle.dumps(renderer)).build_generation_prompt(CHAT) == renderer.build_generation_prompt(CHAT)


def test_llama3_needs_its_own_tokenizer(qwen3_tokenizer: Any, llama3_tokenizer: Any) -> None:
    assert get_renderer("llama3", llama3_tokenizer).name == "llama3"
    with pytest.raises(InvalidRequestError, match=r"renderer 'llama3' needs '<\|begin_of_text\|>'"):
        get_renderer("llama3", qwen3_tokenizer)


def test_an_unknown_name_is_answered_with_the_known_ones(chatml_tokenizer: Any) -> None:
    with pytest.raises(InvalidRequestError, match="unknown renderer 'qwen'; known are qwen3, qwen3_disable_thinking"):
        get_renderer("qwen", chatml_tokenizer)


def test_text_of_is_the_answer_without_thinking() -> None:
    assert text_of({"role": "assistant", "content": "4", "thinking": "hm"}) == "4"
