from __future__ import annotations

from typing import Any

import pytest

from ptlab.errors import InvalidRequestError
from ptlab.renderers import Message, TrainOnWhat
from ptlab.renderers.messages import check_messages, trained_indices

CHAT: list[Message] = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "u"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "u"},
    {"role": "assistant", "content": "calls"},
    {"role": "tool", "content": "t"},
    {"role": "assistant", "content": "a"},
]


@pytest.mark.parametrize(
    ("train_on_what", "indices"),
    [
        (TrainOnWhat.LAST_ASSISTANT_MESSAGE, [6]),
        (TrainOnWhat.LAST_ASSISTANT_TURN, [4, 6]),
        (TrainOnWhat.ALL_ASSISTANT_MESSAGES, [2, 4, 6]),
        (TrainOnWhat.ALL_MESSAGES, [0, 1, 2, 3, 4, 5, 6]),
        (TrainOnWhat.ALL_TOKENS, [0, 1, 2, 3, 4, 5, 6]),
        (TrainOnWhat.ALL_USER_AND_SYSTEM_MESSAGES, [0, 1, 3]),
    ],
)
def test_which_messages_each_mode_trains(train_on_what: TrainOnWhat, indices: list[int]) -> None:
    assert trained_indices(CHAT, train_on_what) == indices


def test_customized_follows_the_field() -> None:
    marked: list[Message] = [{**message, "trainable": index in (1, 6)} for index, message in enumerate(CHAT)]
    assert trained_indices(marked, TrainOnWhat.CUSTOMIZED) == [1, 6]


def test_the_field_and_the_mode_belong_together() -> None:
    with pytest.raises(InvalidRequestError, match="message 0 has no 'trainable' field"):
        trained_indices(CHAT, TrainOnWhat.CUSTOMIZED)
    with pytest.raises(InvalidRequestError, match="message 1 has a 'trainable' field, train_on_what is 'all_messages'"):
        trained_indices([CHAT[0], {**CHAT[1], "trainable": True}], TrainOnWhat.ALL_MESSAGES)


@pytest.mark.parametrize("chat", [CHAT[:2], [*CHAT, CHAT[1]]])
def test_nothing_to_train_is_refused(chat: list[Message]) -> None:
    with pytest.raises(InvalidRequestError, match=r"'last_assistant_message' trains no message of this conversation \(roles: system, user"):
        trained_indices(chat, TrainOnWhat.LAST_ASSISTANT_MESSAGE)


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "messages is empty"),
        ([{"content": "x"}], "message 0 has no 'role'"),
        ([{"role": "user", "content": None}], "message 0 .user.: 'content' is NoneType"),
        ([CHAT[1], {"role": "user", "content": [{"type": "text", "text": "x"}]}], "message 1 .user.: 'content' is list"),
    ],
)
def test_what_is_not_a_conversation_is_refused(messages: Any, complaint: str) -> None:
    with pytest.raises(InvalidRequestError, match=complaint):
        check_messages(messages)
