"""Any model with a chat template: the tokenizer's own `apply_chat_template` decides the format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from ptlab.errors import InvalidRequestError
from ptlab.renderers.base import Renderer, Weights
from ptlab.renderers.codec import Tokenizer
from ptlab.renderers.messages import Message, TrainOnWhat, check_messages, trained_indices
from ptlab.types import ModelInput

_PROBE = "PTLABPROBE"
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # Unicode keeps these 32 for internal use; no text needs them


class ChatTemplateRenderer(Renderer):
    """The fallback for models that have no renderer of their own.

    What it cannot know: how the template writes thinking and tool calls in an answer, so parse_response leaves them in the
    content; and whether prompts extend each other, so has_extension_property is False ("not promised"). Of the modes that
    train part of a conversation it knows those of assistant messages, and checks that the template writes each of them after
    the prompt it is sampled after. 'thinking' is passed to the template as `reasoning_content`; a template that does not know
    a field drops it.

    Safe against control tokens in text: the text is cut inside each special token's spelling, the cut is marked by a
    noncharacter while the template runs, and the pieces on its two sides are encoded apart.
    """

    name: ClassVar[str] = "chat_template"

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self._stop = self._end_of_turn()

    @property
    def has_extension_property(self) -> bool:
        return False

    def get_stop_sequences(self) -> list[int]:
        """The first special token the template writes after an answer; the tokenizer's end-of-sequence token if there is none."""
        return [self._stop]

    def build_generation_prompt(self, messages: Sequence[Message], prefill: str | None = None) -> ModelInput:
        check_messages(messages)
        mark = _unused_mark(messages)
        tokens = self._encode(self._render(messages, mark, add_generation_prompt=True), mark)
        return ModelInput.from_ints([*tokens, *self.codec.encode(prefill or "")])

    def parse_response(self, tokens: Sequence[int]) -> tuple[Message, bool]:
        body, success = self._split_at_stop(tokens, self._stop)
        return Message(role="assistant", content=self.codec.decode(body)), success

    def build_supervised_example(
        self, messages: Sequence[Message], train_on_what: TrainOnWhat = TrainOnWhat.LAST_ASSISTANT_MESSAGE
    ) -> tuple[ModelInput, Weights]:
        check_messages(messages)
        mark = _unused_mark(messages)
        trained = trained_indices(messages, train_on_what)
        whole = self._render(messages, mark, add_generation_prompt=False)
        if train_on_what is TrainOnWhat.ALL_TOKENS:
            tokens = self._encode(whole, mark)
            return ModelInput.from_ints(tokens), np.ones(len(tokens), dtype=np.float32)
        tokens, weights, done = [], [], 0
        for index in trained:
            start, end = self._span(messages, index, whole, mark)
            for weight, part in ((0.0, whole[done:start]), (1.0, whole[start:end])):
                ids = self._encode(part, mark)
                tokens += ids
                weights += [weight] * len(ids)
            done = end
        rest = self._encode(whole[done:], mark)
        return ModelInput.from_ints(tokens + rest), np.asarray(weights + [0.0] * len(rest), dtype=np.float32)

    def _span(self, messages: Sequence[Message], index: int, whole: str, mark: str) -> tuple[int, int]:
        """Where in `whole` the output of assistant message `index` stands: from its prompt's end through its end-of-turn token."""
        where = f"renderer 'chat_template', message {index}"
        if messages[index]["role"] != "assistant" or index == 0:
            raise InvalidRequestError(
                f"{where} ({messages[index]['role']}): only assistant messages that follow another message can be told apart; "
                f"train on 'last_assistant_message' or 'all_assistant_messages', or on 'all_tokens'"
            )
        prompt = self._render(messages[:index], mark, add_generation_prompt=True)
        through = self._render(messages[: index + 1], mark, add_generation_prompt=False)
        stop = self.codec.decode([self._stop])
        end = through.rfind(stop)
        end = len(through) if end < len(prompt) else end + len(stop)
        if not (through.startswith(prompt) and whole.startswith(through[:end])):
            raise InvalidRequestError(
                f"{where}: the template writes this turn differently in a longer conversation or after another prompt (thinking removed "
                f"from history?), so one example cannot show it as it is sampled. Use build_supervised_examples, or a model's own renderer"
            )
        return len(prompt), end

    def _render(self, messages: Sequence[Message], mark: str, *, add_generation_prompt: bool) -> str:
        conversation = [_for_template(self._marked(message, mark)) for message in messages]
        return str(self.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=add_generation_prompt))

    def _marked(self, value: Any, mark: str) -> Any:
        if isinstance(value, str):
            return mark.join(self.codec.cut(value))
        if isinstance(value, dict):
            return {key: self._marked(item, mark) for key, item in value.items()}
        return [self._marked(item, mark) for item in value] if isinstance(value, list) else value

    def _encode(self, rendered: str, mark: str) -> list[int]:
        return [token for piece in rendered.split(mark) for token in self.codec.encode_markup(piece)]

    def _end_of_turn(self) -> int:
        probe = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _PROBE}]
        try:
            rendered = str(self.tokenizer.apply_chat_template(probe, tokenize=False, add_generation_prompt=False))
        except ValueError as err:
            raise InvalidRequestError(
                f"renderer 'chat_template': the tokenizer could not write a conversation ({err}); use 'role_colon' for a base model"
            ) from err
        after = self.codec.encode_markup(rendered.rpartition(_PROBE)[2])
        specials = [token for token in after if token in self.codec.special_ids]
        if specials:
            return specials[0]
        if self.tokenizer.eos_token_id is None:
            raise InvalidRequestError(
                "renderer 'chat_template': the template writes no special token after an answer and the tokenizer has no eos_token, "
                "so an answer would have no end; use another renderer"
            )
        return self.tokenizer.eos_token_id


def _for_template(message: dict[str, Any]) -> dict[str, Any]:
    fields = {key: value for key, value in message.items() if key not in ("thinking", "trainable", "unparsed_tool_calls")}
    return fields | ({"reasoning_content": message["thinking"]} if "thinking" in message else {})


def _unused_mark(messages: Sequence[Message]) -> str:
    text = json.dumps(list(messages), ensure_ascii=False)
    for mark in _NONCHARACTERS:
        if mark not in text:
            return mark
    raise InvalidRequestError("messages use all 32 Unicode noncharacters U+FDD0..U+FDEF; remove one, it carries no text")
