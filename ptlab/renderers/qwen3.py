"""Qwen3: ChatML with thinking blocks and tool calls, token for token the template in the models' tokenizer_config.json.

    renderer                  models                       the prompt ends with                         history
    qwen3                     Qwen3-8B, ... (hybrid)       <|im_start|>assistant\\n                      thinking removed
    qwen3_disable_thinking    the same, told not to think  ...assistant\\n<think>\\n\\n</think>\\n\\n         thinking removed
    qwen3_preserve_thinking   the same                     <|im_start|>assistant\\n                      thinking kept: prompts extend
    qwen3_thinking            Qwen3-*-Thinking-2507        ...assistant\\n<think>\\n                      thinking removed
    qwen3_instruct            Qwen3-*-Instruct-2507        <|im_start|>assistant\\n                      has none

`<think>`, `<tool_call>` and `<tool_response>` are tokens too, but the tokenizer does not mark them special: in a user's text they
stay what the tokenizer makes of them, because system prompts that explain tools need them. They cannot end or open a turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import ClassVar

from ptlab.errors import InvalidRequestError
from ptlab.renderers.base import RenderedMessage
from ptlab.renderers.chatml import ChatmlRenderer
from ptlab.renderers.codec import Tokenizer
from ptlab.renderers.messages import Message, ToolCall, UnparsedToolCall

EMPTY_THINKING = "<think>\n\n</think>\n\n"
_CALL = re.compile(r"\n?<tool_call>\n?(.*?)\n?</tool_call>", re.DOTALL)


class Qwen3InstructRenderer(ChatmlRenderer):
    """Qwen3-*-Instruct-2507: tool calls, no thinking."""

    name: ClassVar[str] = "qwen3_instruct"
    roles: ClassVar[tuple[str, ...]] = ("system", "user", "assistant", "tool")

    def render_message(self, messages: Sequence[Message], index: int) -> RenderedMessage:
        message = messages[index]
        role, content = message["role"], message["content"]
        if role not in self.roles:
            raise InvalidRequestError(f"message {index} has role {role!r}; renderer {self.name!r} writes {', '.join(self.roles)}")
        if role == "tool":
            return self._tool_response(messages, index)
        if role == "assistant":
            header, text = self.assistant_texts(messages, index)
            return self._rendered(index, self.codec.encode(f"assistant\n{header}"), self.codec.encode(text))
        self._refuse(message, index, "thinking", "tool_calls")
        return self._rendered(index, *self.codec.encode_after(f"{role}\n", content))

    def assistant_texts(self, messages: Sequence[Message], index: int) -> tuple[str, str]:
        """What follows "assistant\\n": the part the prompt gives, and the part the model writes."""
        self._refuse(messages[index], index, "thinking")
        return "", messages[index]["content"] + calls_text(messages[index], after=messages[index]["content"])

    def parse_response(self, tokens: Sequence[int]) -> tuple[Message, bool]:
        body, success = self._split_at_stop(tokens, self._im_end)
        return self.parse_text(self.codec.decode(body)), success

    def parse_text(self, text: str) -> Message:
        """Tool calls go to 'tool_calls' if all of them can be read and nothing follows them; otherwise they stay in the content."""
        message = Message(role="assistant", content=text)
        before, opened, after = text.rstrip().partition("<tool_call>")
        if not opened:
            return message
        calls: list[ToolCall] = []
        errors: list[UnparsedToolCall] = []
        for raw in _CALL.findall(opened + after):
            try:
                calls.append(_parse_call(raw))
            except ValueError as err:
                errors.append(UnparsedToolCall(raw_text=raw, error=str(err)))
        if rest := _CALL.sub("", opened + after).strip():
            errors.append(UnparsedToolCall(raw_text=rest, error="text after or between the tool calls, or a call that is not closed"))
        if errors:
            message["unparsed_tool_calls"] = errors
        else:
            message["content"] = before.removesuffix("\n")
            message["tool_calls"] = calls
        return message

    def _tool_response(self, messages: Sequence[Message], index: int) -> RenderedMessage:
        """Neighbouring tool messages share one user turn, as in the template."""
        opens = index == 0 or messages[index - 1]["role"] != "tool"
        closes = index + 1 == len(messages) or messages[index + 1]["role"] != "tool"
        header, text = self.codec.encode_after(
            ("user" if opens else "") + "\n<tool_response>\n", messages[index]["content"] + "\n</tool_response>"
        )
        return RenderedMessage([*(self._open(index) if opens else []), *header], [*text, *([self._im_end] if closes else [])])


class Qwen3Renderer(Qwen3InstructRenderer):
    """The hybrid models, thinking allowed.

    Args:
        strip_thinking_from_history: as the template does: answers before the last user message lose their thinking, so a
            prompt does not extend the one before. False keeps every block, and then it does.
    """

    name: ClassVar[str] = "qwen3"
    opening: ClassVar[str] = ""  # what the prompt writes of the answer's thinking block
    mismatch_hint: ClassVar[str] = (
        "End the conversation with one assistant message after a user message; in a chain of tool calls train the last message only, "
        "or keep the thinking blocks of history (qwen3_preserve_thinking)"
    )

    def __init__(self, tokenizer: Tokenizer, *, strip_thinking_from_history: bool = True) -> None:
        super().__init__(tokenizer)
        self.strip_thinking_from_history = strip_thinking_from_history

    @property
    def has_extension_property(self) -> bool:
        return not self.strip_thinking_from_history

    def generation_header(self, messages: Sequence[Message]) -> list[int]:
        return [*self._open(len(messages)), *self.codec.encode(f"assistant\n{self.opening}")]

    def assistant_texts(self, messages: Sequence[Message], index: int) -> tuple[str, str]:
        thinking, content = _thinking_and_content(messages[index])
        calls = calls_text(messages[index], after=content)
        if not self._has_block(messages, index, thinking):
            return "", content + calls
        text = "<think>\n" + thinking.strip("\n") + "\n</think>\n\n" + content.lstrip("\n") + calls
        return (self.opening, text.removeprefix(self.opening)) if text.startswith(self.opening) else ("", text)

    def parse_text(self, text: str) -> Message:
        """Reads `<think>...</think>` at the start into 'thinking'; a block that was never closed stays in the content."""
        opened = text if text.lstrip().startswith("<think>") else self.opening + text
        before, closed, after = opened.partition("</think>")
        if not before.lstrip().startswith("<think>"):
            return super().parse_text(text)
        if not closed:
            return Message(role="assistant", content=opened)
        message = super().parse_text(after.lstrip("\n"))
        if thinking := before.lstrip().removeprefix("<think>").strip("\n"):
            message["thinking"] = thinking
        return message

    def _has_block(self, messages: Sequence[Message], index: int, thinking: str) -> bool:
        if not self.strip_thinking_from_history:
            return True
        return index > _last_query(messages) and (index == len(messages) - 1 or thinking != "")


class Qwen3PreserveThinkingRenderer(Qwen3Renderer):
    """Every answer keeps its thinking block, so that the turns of a trajectory extend each other. Not the template's history."""

    name: ClassVar[str] = "qwen3_preserve_thinking"

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer, strip_thinking_from_history=False)


class Qwen3DisableThinkingRenderer(Qwen3Renderer):
    """The template with enable_thinking=False: the prompt ends with an empty block. Training a message with thinking is refused."""

    name: ClassVar[str] = "qwen3_disable_thinking"
    opening: ClassVar[str] = EMPTY_THINKING
    mismatch_hint: ClassVar[str] = (
        "This prompt tells the model not to think: remove the thinking from the message or use renderer 'qwen3'; "
        "the message must follow a user message, and of a chain of tool calls only the last message can be trained"
    )

    def parse_text(self, text: str) -> Message:
        thinks = text.lstrip().startswith("<think>")
        return super().parse_text(text) if thinks else Qwen3InstructRenderer.parse_text(self, text)


class Qwen3ThinkingRenderer(Qwen3Renderer):
    """Qwen3-*-Thinking-2507: the prompt opens the thinking block."""

    name: ClassVar[str] = "qwen3_thinking"
    opening: ClassVar[str] = "<think>\n"


def calls_text(message: Message, *, after: str) -> str:
    """The message's tool calls as the template writes them behind the text `after`."""
    calls = [
        f'<tool_call>\n{{"name": "{call["function"]["name"]}", "arguments": {call["function"]["arguments"]}}}\n</tool_call>'
        for call in message.get("tool_calls", [])
    ]
    return "\n" * bool(after and calls) + "\n".join(calls)


def _thinking_and_content(message: Message) -> tuple[str, str]:
    """The template's rule: the field 'thinking' if there is one, else a block written into the content."""
    content = message["content"]
    if "thinking" in message:
        return message["thinking"], content
    if "</think>" not in content:
        return "", content
    thinking = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
    return thinking, content.split("</think>")[-1].lstrip("\n")


def _last_query(messages: Sequence[Message]) -> int:
    """Index of the last user message that is not a tool response written by hand; of the last message if there is none."""
    for index in range(len(messages) - 1, -1, -1):
        content = messages[index]["content"]
        wrapped = content.startswith("<tool_response>") and content.endswith("</tool_response>")
        if messages[index]["role"] == "user" and not wrapped:
            return index
    return len(messages) - 1


def _parse_call(raw: str) -> ToolCall:
    """Raises: ValueError saying what is wrong with the model's text."""
    try:
        call = json.loads(raw)
        json.dumps(call, ensure_ascii=False).encode()  # a lone surrogate ("\\ud800") could not be rendered again
    except (ValueError, RecursionError) as err:
        raise ValueError(f"not JSON: {err}") from err
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not isinstance(call.get("arguments"), dict):
        raise ValueError("a JSON object with 'name' (a string) and 'arguments' (an object) is needed")
    return ToolCall(type="function", function={"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)})
