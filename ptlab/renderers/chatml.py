"""ChatML: `<|im_start|>role\\ncontent<|im_end|>\\n`, the format of ptlab's quickstart model and the frame of Qwen's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ptlab.renderers.base import MessageRenderer, RenderedMessage
from ptlab.renderers.codec import Tokenizer
from ptlab.renderers.messages import Message


class ChatmlRenderer(MessageRenderer):
    """Any role, text only.

    The newline after `<|im_end|>` belongs to the next header: the model never writes it, so an example ends with `<|im_end|>`
    (one token before where apply_chat_template ends). An assistant's text is encoded apart from its header, as it is when it
    is sampled: if it begins with whitespace that holds a newline, the tokens differ from those of the whole string encoded at once.
    """

    name: ClassVar[str] = "chatml"

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self._im_start = self.codec.control("<|im_start|>", renderer=self.name)
        self._im_end = self.codec.control("<|im_end|>", renderer=self.name)

    @property
    def has_extension_property(self) -> bool:
        return True

    def get_stop_sequences(self) -> list[int]:
        return [self._im_end]

    def render_message(self, messages: Sequence[Message], index: int) -> RenderedMessage:
        message = messages[index]
        self._refuse(message, index, "thinking", "tool_calls")
        role, content = message["role"], message["content"]
        if role == "assistant":
            return self._rendered(index, self.codec.encode("assistant\n"), self.codec.encode(content))
        return self._rendered(index, *self.codec.encode_after(f"{role}\n", content))

    def generation_header(self, messages: Sequence[Message]) -> list[int]:
        return [*self._open(len(messages)), *self.codec.encode("assistant\n")]

    def parse_response(self, tokens: Sequence[int]) -> tuple[Message, bool]:
        body, success = self._split_at_stop(tokens, self._im_end)
        return Message(role="assistant", content=self.codec.decode(body)), success

    def _rendered(self, index: int, header: list[int], output: list[int]) -> RenderedMessage:
        return RenderedMessage(header=[*self._open(index), *header], output=[*output, self._im_end])

    def _open(self, index: int) -> list[int]:
        return [*(self.codec.encode("\n") if index > 0 else []), self._im_start]
