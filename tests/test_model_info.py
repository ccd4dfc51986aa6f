from __future__ import annotations

import pytest

from ptlab.model_info import get_model_attributes, get_recommended_renderer_name
from ptlab.renderers import RENDERER_NAMES


@pytest.mark.parametrize(
    ("model_name", "renderer", "is_chat"),
    [
        ("ptlab/quickstart", "chatml", True),
        ("Qwen/Qwen3-0.6B", "qwen3", True),
        ("Qwen/Qwen3-30B-A3B", "qwen3", True),
        ("Qwen/Qwen3-8B-FP8", "qwen3", True),
        ("Qwen/Qwen3-8B:checkpoint", "qwen3", True),
        ("/models/Qwen3-4B/", "qwen3", True),
        ("Qwen/Qwen3-8B-Base", "role_colon", False),
        ("Qwen/Qwen3-4B-Instruct-2507", "qwen3_instruct", True),
        ("Qwen/Qwen3-235B-A22B-Thinking-2507-FP8", "qwen3_thinking", True),
        ("meta-llama/Llama-3.1-8B", "role_colon", False),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama3", True),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3", True),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama3", True),
        # Alike in name, other templates:
        ("Qwen/Qwen3-Coder-30B-A3B-Instruct", "chat_template", True),
        ("Qwen/Qwen3.5-4B", "chat_template", True),
        ("Qwen/Qwen2.5-7B-Instruct", "chat_template", True),
        ("meta-llama/Llama-2-7b-chat-hf", "chat_template", True),
        ("somebody/model", "chat_template", True),
        ("", "chat_template", True),
    ],
)
def test_the_renderer_for_a_model_name(model_name: str, renderer: str, is_chat: bool) -> None:
    assert get_recommended_renderer_name(model_name) == renderer
    attributes = get_model_attributes(model_name)
    assert attributes.is_chat is is_chat
    assert set(attributes.recommended_renderers) <= set(RENDERER_NAMES)
