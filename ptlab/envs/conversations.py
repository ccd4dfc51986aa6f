"""Conversations to imitate, from a local file or the hub.

A row is one of

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}      chat data sets (tulu-3, ...)
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}          ShareGPT
    {"prompt": "Hi", "completion": "Hello"}                                                           one question, one answer

Other fields of a row are not read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from ptlab.envs.rows import rows_of
from ptlab.errors import ConfigError, InvalidRequestError
from ptlab.renderers import Message, Renderer, TrainOnWhat, datum_from_model_input_weights
from ptlab.types import Datum

Conversation = list[Message]
_SHAREGPT_ROLES: Mapping[str, str] = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_TEXT_FIELDS = ("thinking", "name", "tool_call_id")


def load_conversations(
    path: str | None, *, hub_name: str, split: str, subset: str | None = None, limit: int | None = None
) -> list[tuple[str, Conversation]]:
    """(where it stands, conversation) of the first `limit` rows, in order; see rows_of.

    Raises: ConfigError naming the row and what is wrong with it; or if there is none.
    """
    found: list[tuple[str, Conversation]] = []
    for where, row in rows_of(path, hub_name=hub_name, split=split, subset=subset):
        if limit is not None and len(found) >= limit:
            break
        found.append((where, conversation_of(where, row)))
    if not found:
        raise ConfigError(f"{path or hub_name}: no conversations; needed at least one row with messages, conversations or prompt")
    return found


def conversation_of(where: str, row: Mapping[str, Any]) -> Conversation:
    """The messages of a row. Raises: ConfigError."""
    if "messages" in row:
        return [_message(f"{where}: messages[{index}]", item) for index, item in enumerate(_list(where, "messages", row))]
    if "conversations" in row:
        return [_sharegpt(f"{where}: conversations[{index}]", item) for index, item in enumerate(_list(where, "conversations", row))]
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    raise ConfigError(
        f"{where}: found the fields {', '.join(row) or 'none'}; needed a list messages or conversations, or the texts prompt and completion"
    )


def conversation_datums(
    where: str, conversation: Conversation, renderer: Renderer, train_on_what: TrainOnWhat, max_length: int | None
) -> list[Datum]:
    """The datums of one conversation, weight 1.0 on every trained token; none if max_length cuts all trained tokens off.

    One datum, or one per assistant message where the format writes earlier turns differently (thinking that is dropped).
    Args:
        max_length: tokens kept of each, from the start; None = all.
    Raises: ConfigError for a conversation that the format cannot write, or with nothing to train.
    """
    try:
        if train_on_what is TrainOnWhat.ALL_ASSISTANT_MESSAGES:
            examples = renderer.build_supervised_examples(conversation, train_on_what)
        else:
            examples = [renderer.build_supervised_example(conversation, train_on_what)]
    except InvalidRequestError as err:
        raise ConfigError(f"{where}: {err.message}") from err
    return [
        datum_from_model_input_weights(model_input, weights, max_length) for model_input, weights in examples if weights[1:max_length].any()
    ]


def num_trained(datum: Datum) -> float:
    """Sum of the weights: trained tokens, while each weighs 1.0."""
    return math.fsum(datum.loss_fn_inputs["weights"].to_numpy().tolist())


def _list(where: str, key: str, row: Mapping[str, Any]) -> Sequence[Any]:
    value = row[key]
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{where}: {key} is {str(value)[:80]!r}, needed a list of messages that is not empty")
    return value


def _message(where: str, item: Any) -> Message:
    if not isinstance(item, dict) or not isinstance(item.get("role"), str) or not isinstance(item.get("content"), str):
        raise ConfigError(f"{where}: needed an object with the texts role and content, found {str(item)[:80]}")
    message: dict[str, Any] = {"role": item["role"], "content": item["content"]}
    message |= {name: item[name] for name in _TEXT_FIELDS if isinstance(item.get(name), str)}
    message |= {"tool_calls": item["tool_calls"]} if item.get("tool_calls") else {}
    message |= {"trainable": item["trainable"]} if isinstance(item.get("trainable"), bool) else {}
    return cast("Message", message)


def _sharegpt(where: str, item: Any) -> Message:
    if not isinstance(item, dict) or not isinstance(item.get("from"), str) or not isinstance(item.get("value"), str):
        raise ConfigError(f"{where}: needed an object with the texts from and value, found {str(item)[:80]}")
    if item["from"] not in _SHAREGPT_ROLES:
        raise ConfigError(f"{where}: from is {item['from']!r}, needed one of {', '.join(_SHAREGPT_ROLES)}")
    return {"role": _SHAREGPT_ROLES[item["from"]], "content": item["value"]}
