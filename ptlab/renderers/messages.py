"""What a conversation is made of, and which of its tokens are trained."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Literal, NotRequired, TypedDict

from ptlab.errors import InvalidRequestError


class FunctionCall(TypedDict):
    name: str
    arguments: str  # JSON text of one object


class ToolCall(TypedDict):
    """A call the model made, in OpenAI's shape."""

    function: FunctionCall
    type: NotRequired[Literal["function"]]
    id: NotRequired[str]


class UnparsedToolCall(TypedDict):
    """A call the model meant to make; its text also stays in the message's content, so nothing is lost when it is rendered again."""

    raw_text: str
    error: str


class Message(TypedDict):
    """One message. Formats that have no place for a field refuse it by name instead of dropping it."""

    role: str
    content: str
    thinking: NotRequired[str]  # reasoning before the answer, without its tags and their newlines
    tool_calls: NotRequired[list[ToolCall]]
    unparsed_tool_calls: NotRequired[list[UnparsedToolCall]]  # for the environment to answer; never rendered
    trainable: NotRequired[bool]  # TrainOnWhat.CUSTOMIZED only
    name: NotRequired[str]  # role "tool": the function that was called
    tool_call_id: NotRequired[str]


class TrainOnWhat(StrEnum):
    """Which tokens of an example get weight 1. "Output" is what a turn's author writes: its text and the end-of-turn token."""

    LAST_ASSISTANT_MESSAGE = "last_assistant_message"  # output of the last message, which must be the assistant's
    LAST_ASSISTANT_TURN = "last_assistant_turn"  # outputs of all assistant messages after the last user message
    ALL_ASSISTANT_MESSAGES = "all_assistant_messages"
    ALL_MESSAGES = "all_messages"  # outputs of every message, headers not
    ALL_TOKENS = "all_tokens"
    ALL_USER_AND_SYSTEM_MESSAGES = "all_user_and_system_messages"
    CUSTOMIZED = "customized"  # outputs of the messages with trainable=True; every message must have the field


def text_of(message: Message) -> str:
    """The message's answer text, without thinking and tool calls."""
    return message["content"]


def check_messages(messages: Sequence[Message]) -> None:
    """Raises: InvalidRequestError if there is no message, or one without a role or with a content that is not text."""
    if not messages:
        raise InvalidRequestError("messages is empty; a prompt needs at least one message")
    for index, message in enumerate(messages):
        if not message.get("role"):
            raise InvalidRequestError(f"message {index} has no 'role'; give 'system', 'user' or 'assistant'")
        content = message.get("content")
        if not isinstance(content, str):
            raise InvalidRequestError(
                f"message {index} ({message['role']}): 'content' is {type(content).__name__}, a string is needed; "
                f"join text parts, put reasoning into 'thinking', and write '' beside tool calls"
            )


def is_trained(messages: Sequence[Message], index: int, train_on_what: TrainOnWhat) -> bool:
    """Whether the output of message `index` gets weight 1."""
    message = messages[index]
    is_assistant = message["role"] == "assistant"
    match train_on_what:
        case TrainOnWhat.LAST_ASSISTANT_MESSAGE:
            return is_assistant and index == len(messages) - 1
        case TrainOnWhat.LAST_ASSISTANT_TURN:
            return is_assistant and all(later["role"] != "user" for later in messages[index:])
        case TrainOnWhat.ALL_ASSISTANT_MESSAGES:
            return is_assistant
        case TrainOnWhat.ALL_MESSAGES | TrainOnWhat.ALL_TOKENS:
            return True
        case TrainOnWhat.ALL_USER_AND_SYSTEM_MESSAGES:
            return message["role"] in ("user", "system")
        case TrainOnWhat.CUSTOMIZED:
            return message["trainable"]


def trained_indices(messages: Sequence[Message], train_on_what: TrainOnWhat) -> list[int]:
    """Indices of the messages whose output is trained.

    Raises: InvalidRequestError if there is none, or if 'trainable' is missing with CUSTOMIZED or present without it.
    """
    customized = train_on_what is TrainOnWhat.CUSTOMIZED
    for index, message in enumerate(messages):
        if ("trainable" in message) != customized:
            found, remedy = ("no", "add it to every message") if customized else ("a", "remove it, or train on 'customized'")
            raise InvalidRequestError(f"message {index} has {found} 'trainable' field, train_on_what is {train_on_what.value!r}; {remedy}")
    indices = [index for index in range(len(messages)) if is_trained(messages, index, train_on_what)]
    if not indices:
        roles = ", ".join(message["role"] for message in messages)
        raise InvalidRequestError(f"train_on_what={train_on_what.value!r} trains no message of this conversation (roles: {roles})")
    return indices
