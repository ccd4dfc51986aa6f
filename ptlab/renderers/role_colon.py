"""`User: ...\\n\\nAssistant: ...\\n\\n` in plain text, for base models that know no chat format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ptlab.renderers.base import MessageRenderer, RenderedMessage
from ptlab.renderers.messages import Message

STOP = "\n\nUser:"


class RoleColonRenderer(MessageRenderer):
    """Any role, text only; the answer ends where the model would write the user's next turn, or with its end-of-sequence token.

    The format has no control tokens, so a text that contains "\\n\\nAssistant:" looks like a turn and nothing can prevent it.
    Pieces are encoded one by one; a tokenizer that puts a space before every text it encodes (SentencePiece) adds those spaces.
    """

    name: ClassVar[str] = "role_colon"

    @property
    def has_extension_property(self) -> bool:
        return True

    def get_stop_sequences(self) -> list[str]:
        return [STOP]

    def start_tokens(self) -> list[int]:
        return [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]

    def render_message(self, messages: Sequence[Message], index: int) -> RenderedMessage:
        message = messages[index]
        self._refuse(message, index, "thinking", "tool_calls")
        return RenderedMessage(
            header=self.codec.encode(f"{message['role'].capitalize()}:"),
            output=self.codec.encode(f" {message['content']}\n\n"),
            closing=self.codec.encode("User:") if message["role"] == "assistant" else [],
        )

    def generation_header(self, messages: Sequence[Message]) -> list[int]:
        return self.codec.encode("Assistant:")

    def parse_response(self, tokens: Sequence[int]) -> tuple[Message, bool]:
        """As in Renderer; ending with the end-of-sequence token instead of the stop string is well-formed too, with both is not.

        The token that completes the stop string may carry a character more (":\\n"); it is still the end.
        """
        ids = [int(token) for token in tokens]
        ended = bool(ids) and ids[-1] == self.tokenizer.eos_token_id
        text, *rest = self.codec.decode(ids[:-1] if ended else ids).split(STOP)
        stopped = len(rest) == 1 and STOP not in self.codec.decode(ids[:-1])
        return Message(role="assistant", content=text.removeprefix(" ").removesuffix("\n\n")), stopped or (ended and not rest)
