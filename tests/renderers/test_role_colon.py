from __future__ import annotations

from typing import Any

import pytest

from ptlab.renderers import Message, RoleColonRenderer

CHAT: list[Message] = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "sure?"},
]


def test_the_prompt_is_plain_text(qwen3_tokenizer: Any) -> None:
    tokens = RoleColonRenderer(qwen3_tokenizer).build_generation_prompt(CHAT).to_ints()
    expected = "User: 2+2?\n\nAssistant: 4\n\nUser: sure?\n\nAssistant:"
    assert qwen3_tokenizer.decode(tokens) == expected
    assert tokens == qwen3_tokenizer.encode(expected, add_special_tokens=False)  # the pieces fall where the tokenizer cuts anyway


def test_a_tokenizer_with_a_bos_token_gets_it_once(llama3_tokenizer: Any, qwen3_tokenizer: Any) -> None:
    assert RoleColonRenderer(llama3_tokenizer).build_generation_prompt(CHAT).to_ints()[0] == llama3_tokenizer.bos_token_id
    assert RoleColonRenderer(llama3_tokenizer).build_generation_prompt(CHAT).to_ints().count(llama3_tokenizer.bos_token_id) == 1
    assert qwen3_tokenizer.bos_token_id is None


def test_the_stop_string_is_trained_after_the_last_answer_and_prompts_extend(qwen3_tokenizer: Any) -> None:
    renderer = RoleColonRenderer(qwen3_tokenizer)
    example, weights = renderer.build_supervised_example(CHAT[:2])
    trained = [token for token, weight in zip(example.to_ints(), weights, strict=True) if weight]
    assert qwen3_tokenizer.decode(trained) == " 4\n\nUser:"
    assert renderer.parse_response(trained) == ({"role": "assistant", "content": "4"}, True)
    longer, _ = renderer.build_supervised_example([*CHAT, {"role": "assistant", "content": "yes"}])
    assert qwen3_tokenizer.decode(longer.to_ints()) == "User: 2+2?\n\nAssistant: 4\n\nUser: sure?\n\nAssistant: yes\n\nUser:"
    prompt = renderer.build_generation_prompt(CHAT).to_ints()
    assert renderer.has_extension_property and prompt[: example.length] == example.to_ints()


@pytest.mark.parametrize(
    ("response", "content", "success"),
    [
        (" 4\n\nUser:", "4", True),
        (" 4<|im_end|>", "4", True),  # the tokenizer's end-of-sequence token
        (" 4\n\nUser:<|im_end|>", "4", False),
        (" 4", "4", False),
        (" 4\n\nUser: and?\n\nAssistant: 5", "4", False),
        (" 4\n\nUser:\n\nUser:", "4", False),
        ("\n\nUser:", "", True),
        (" 4\n\nUser:\n", "4", True),  # ":\n" is one token: the one that completed the stop string
    ],
)
def test_an_answer_ends_with_one_stop(qwen3_tokenizer: Any, response: str, content: str, success: bool) -> None:
    tokens = qwen3_tokenizer.encode(response, add_special_tokens=False)
    assert RoleColonRenderer(qwen3_tokenizer).parse_response(tokens) == ({"role": "assistant", "content": content}, success)
    assert RoleColonRenderer(qwen3_tokenizer).get_stop_sequences() == ["\n\nUser:"]


def test_an_empty_response_is_malformed(qwen3_tokenizer: Any) -> None:
    assert RoleColonRenderer(qwen3_tokenizer).parse_response([]) == ({"role": "assistant", "content": ""}, False)
