"""Messages to tokens and back, in the chat format of a model."""

from __future__ import annotations

from ptlab.errors import InvalidRequestError
from ptlab.renderers.base import MessageRenderer, RenderedMessage, Renderer
from ptlab.renderers.chat_template import ChatTemplateRenderer
from ptlab.renderers.chatml import ChatmlRenderer
from ptlab.renderers.codec import TextCodec, Tokenizer
from ptlab.renderers.llama3 import Llama3Renderer
from ptlab.renderers.messages import FunctionCall, Message, ToolCall, TrainOnWhat, UnparsedToolCall, text_of
from ptlab.renderers.qwen3 import (
    Qwen3DisableThinkingRenderer,
    Qwen3InstructRenderer,
    Qwen3PreserveThinkingRenderer,
    Qwen3Renderer,
    Qwen3ThinkingRenderer,
)
from ptlab.renderers.role_colon import RoleColonRenderer
from ptlab.renderers.supervised import datum_from_model_input_weights, supervised_datum

_KINDS: tuple[type[Renderer], ...] = (
    Qwen3Renderer,
    Qwen3DisableThinkingRenderer,
    Qwen3PreserveThinkingRenderer,
    Qwen3ThinkingRenderer,
    Qwen3InstructRenderer,
    Llama3Renderer,
    ChatmlRenderer,
    RoleColonRenderer,
    ChatTemplateRenderer,
)
RENDERER_NAMES: tuple[str, ...] = tuple(kind.name for kind in _KINDS)


def get_renderer(name: str, tokenizer: Tokenizer) -> Renderer:
    """The renderer of this name for this tokenizer; `model_info.get_recommended_renderer_name` knows the name for a model.

    Raises: InvalidRequestError if the name is unknown or the tokenizer lacks the format's control tokens.
    """
    for kind in _KINDS:
        if kind.name == name:
            return kind(tokenizer)
    raise InvalidRequestError(f"unknown renderer {name!r}; known are {', '.join(RENDERER_NAMES)}")


__all__ = [
    "RENDERER_NAMES",
    "ChatTemplateRenderer",
    "ChatmlRenderer",
    "FunctionCall",
    "Llama3Renderer",
    "Message",
    "MessageRenderer",
    "Qwen3DisableThinkingRenderer",
    "Qwen3InstructRenderer",
    "Qwen3PreserveThinkingRenderer",
    "Qwen3Renderer",
    "Qwen3ThinkingRenderer",
    "RenderedMessage",
    "Renderer",
    "RoleColonRenderer",
    "TextCodec",
    "Tokenizer",
    "ToolCall",
    "TrainOnWhat",
    "UnparsedToolCall",
    "datum_from_model_input_weights",
    "get_renderer",
    "supervised_datum",
    "text_of",
]
