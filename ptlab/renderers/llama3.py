"""Llama 3: `<|start_header_id|>role<|end_header_id|>\\n\\ncontent<|eot_id|>` after one `<|begin_of_text|>`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ptlab.errors import InvalidRequestError
from ptlab.renderers.base import MessageRenderer, RenderedMessage
from ptlab.renderers.codec import Tokenizer
from ptlab.renderers.messages import Message


class Llama3Renderer(MessageRenderer):
    """Llama 3, 3.1, 3.2 and 3.3 Instruct; text only, roles system, user, assistant.

    Differences from the template Meta ships with 3.1, both also the cookbook's: no "Cutting Knowledge Date / Today Date" lines
    are put into the system message (write them there to get that template's tokens), and tools are refused, because the format
    writes calls as bare JSON that cannot be told from an answer. System and user text is stripped as the template does; an
    assistant's text is not, so that a sampled answer keeps its tokens.
    """

    name: ClassVar[str] = "llama3"
    roles: ClassVar[tuple[str, ...]] = ("system", "user", "assistant")

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self._begin = self.codec.control("<|begin_of_text|>", renderer=self.name)
        self._start_header = self.codec.control("<|start_header_id|>", renderer=self.name)
        self._end_header = self.codec.control("<|end_header_id|>", renderer=self.name)
        self._eot = self.codec.control("<|eot_id|>", renderer=self.name)

    @property
    def has_extension_property(self) -> bool:
        return True

    def get_stop_sequences(self) -> list[int]:
        return [self._eot]

    def start_tokens(self) -> list[int]:
        return [self._begin]

    def render_message(self, messages: Sequence[Message], index: int) -> RenderedMessage:
        message = messages[index]
        self._refuse(message, index, "thinking", "tool_calls")
        role = message["role"]
        if role not in self.roles:
            raise InvalidRequestError(f"message {index} has role {role!r}; renderer 'llama3' writes {', '.join(self.roles)}")
        header = [self._start_header, *self.codec.encode(role), self._end_header]
        if role == "assistant":
            return RenderedMessage([*header, *self.codec.encode("\n\n")], [*self.codec.encode(message["content"]), self._eot])
        newlines, text = self.codec.encode_after("\n\n", message["content"].strip())
        return RenderedMessage([*header, *newlines], [*text, self._eot])

    def generation_header(self, messages: Sequence[Message]) -> list[int]:
        return [self._start_header, *self.codec.encode("assistant"), self._end_header, *self.codec.encode("\n\n")]

    def parse_response(self, tokens: Sequence[int]) -> tuple[Message, bool]:
        body, success = self._split_at_stop(tokens, self._eot)
        return Message(role="assistant", content=self.codec.decode(body)), success
