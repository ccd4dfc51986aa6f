"""The renderer's contract, and the one way most formats fulfil it: message after message."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ptlab.errors import InvalidRequestError
from ptlab.renderers.codec import TextCodec, Tokenizer
from ptlab.renderers.messages import Message, TrainOnWhat, check_messages, trained_indices
from ptlab.types import ModelInput

Weights = npt.NDArray[np.float32]


class Renderer(ABC):
    """Turns messages into tokens and tokens into messages, in one model's format. Immutable; safe in many threads."""

    name: ClassVar[str]

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.codec = TextCodec(tokenizer)

    @property
    @abstractmethod
    def has_extension_property(self) -> bool:
        """Whether each prompt of a conversation starts with the previous prompt and its answer, token for token.

        Holds for answers this renderer encoded. A sampled answer has it too while its tokens are those the tokenizer would
        choose for its text: a policy may spell a word in other tokens, so a trajectory compares tokens before it merges turns.
        """

    @abstractmethod
    def build_generation_prompt(self, messages: Sequence[Message], prefill: str | None = None) -> ModelInput:
        """The prompt after which the model writes the next assistant message.

        Args:
            prefill: beginning of that message; the sampled tokens continue it, and parse_response does not see it.
        """

    @abstractmethod
    def get_stop_sequences(self) -> list[str] | list[int]:
        """For SamplingParams.stop: token ids, or strings where the format has no end-of-turn token."""

    @abstractmethod
    def parse_response(self, tokens: Sequence[int]) -> tuple[Message, bool]:
        """The assistant message in sampled tokens, and whether it is well-formed: exactly one stop sequence, at the end.

        Otherwise (cut off by max_tokens, more than one stop) the message holds the text before the first stop. Never raises on
        what a model can write.
        """

    @abstractmethod
    def build_supervised_example(
        self, messages: Sequence[Message], train_on_what: TrainOnWhat = TrainOnWhat.LAST_ASSISTANT_MESSAGE
    ) -> tuple[ModelInput, Weights]:
        """All tokens of the conversation and one weight (0.0 or 1.0, float32) per token. Not shifted: see `supervised_datum`.

        Raises: InvalidRequestError if nothing would be trained, or if the trained turn does not continue the prompt that
        build_generation_prompt gives for it.
        """

    def build_supervised_examples(
        self, messages: Sequence[Message], train_on_what: TrainOnWhat = TrainOnWhat.ALL_ASSISTANT_MESSAGES
    ) -> list[tuple[ModelInput, Weights]]:
        """Examples in which each trained assistant message follows the prompt it would be sampled after.

        One example where the format has the extension property, otherwise one per trained message.
        """
        if self.has_extension_property:
            return [self.build_supervised_example(messages, train_on_what)]
        check_messages(messages)
        indices = trained_indices(messages, train_on_what)
        for index in indices:
            if messages[index]["role"] != "assistant":
                raise InvalidRequestError(
                    f"renderer {self.name!r} writes a conversation differently at each turn: one example per assistant message; "
                    f"train_on_what={train_on_what.value!r} also trains message {index} ({messages[index]['role']}). "
                    f"Use build_supervised_example"
                )
        plain = [_without_trainable(message) for message in messages]
        return [self.build_supervised_example(plain[: index + 1], TrainOnWhat.LAST_ASSISTANT_MESSAGE) for index in indices]

    def _warn_if_context_differs(self, messages: Sequence[Message], indices: Sequence[int]) -> None:
        num_assistant = sum(messages[index]["role"] == "assistant" for index in indices)
        if num_assistant > 1 and not self.has_extension_property:
            warnings.warn(
                f"renderer {self.name!r} writes earlier assistant messages differently from how they are sampled; one example that trains "
                f"{num_assistant} of them teaches that form. build_supervised_examples gives one example per message",
                stacklevel=3,
            )

    def _split_at_stop(self, tokens: Sequence[int], stop: int) -> tuple[list[int], bool]:
        """Tokens before the first stop, and whether there is exactly one, at the end."""
        ids = [int(token) for token in tokens]
        if stop not in ids:
            return ids, False
        first = ids.index(stop)
        return ids[:first], first == len(ids) - 1


@dataclass(frozen=True, slots=True)
class RenderedMessage:
    """Tokens of one message. `header`: who speaks, given to the model. `output`: what the speaker writes, its end included."""

    header: list[int]
    output: list[int]
    closing: list[int] = field(default_factory=list)  # rest of the stop sequence, if the next message's header would bring it


class MessageRenderer(Renderer):
    """A format that writes messages one after another; a subclass says how one is written and parsed."""

    mismatch_hint: ClassVar[str] = "End the conversation with one assistant message after a user message"

    @abstractmethod
    def render_message(self, messages: Sequence[Message], index: int) -> RenderedMessage:
        """Tokens of messages[index], which may depend on its neighbours."""

    @abstractmethod
    def generation_header(self, messages: Sequence[Message]) -> list[int]:
        """Tokens that open the assistant message following `messages`."""

    def start_tokens(self) -> list[int]:
        """Tokens before the first message."""
        return []

    def build_generation_prompt(self, messages: Sequence[Message], prefill: str | None = None) -> ModelInput:
        return ModelInput.from_ints([*self._prompt_tokens(messages), *self.codec.encode(prefill or "")])

    def build_supervised_example(
        self, messages: Sequence[Message], train_on_what: TrainOnWhat = TrainOnWhat.LAST_ASSISTANT_MESSAGE
    ) -> tuple[ModelInput, Weights]:
        check_messages(messages)
        trained = trained_indices(messages, train_on_what)
        self._warn_if_context_differs(messages, trained if train_on_what is TrainOnWhat.ALL_ASSISTANT_MESSAGES else [])
        header_weight = 1.0 if train_on_what is TrainOnWhat.ALL_TOKENS else 0.0
        tokens = self.start_tokens()
        weights = [header_weight] * len(tokens)
        for index in range(len(messages)):
            rendered = self.render_message(messages, index)
            output = rendered.output + (rendered.closing if index == len(messages) - 1 else [])
            tokens += rendered.header + output
            weights += [header_weight] * len(rendered.header) + [1.0 if index in trained else 0.0] * len(output)
        if train_on_what in (TrainOnWhat.LAST_ASSISTANT_MESSAGE, TrainOnWhat.LAST_ASSISTANT_TURN):
            self._check_continues_prompt(messages, trained[0], tokens)
        return ModelInput.from_ints(tokens), np.asarray(weights, dtype=np.float32)

    def _prompt_tokens(self, messages: Sequence[Message]) -> list[int]:
        check_messages(messages)
        tokens = self.start_tokens()
        for index in range(len(messages)):
            rendered = self.render_message(messages, index)
            tokens += rendered.header + rendered.output
        return tokens + self.generation_header(messages)

    def _check_continues_prompt(self, messages: Sequence[Message], index: int, tokens: list[int]) -> None:
        if index == 0:
            return  # an assistant message that opens the conversation has no prompt to continue
        prompt = self._prompt_tokens(messages[:index])
        if tokens[: len(prompt)] != prompt:
            at = next((i for i, (a, b) in enumerate(zip(prompt, tokens, strict=False)) if a != b), min(len(prompt), len(tokens)))
            raise InvalidRequestError(
                f"renderer {self.name!r}, message {index}: training it would not continue the prompt it is sampled after. From token {at} "
                f"the prompt reads {self.codec.decode(prompt[at : at + 12])!r}, the example {self.codec.decode(tokens[at : at + 12])!r}. "
                f"{self.mismatch_hint}"
            )

    def _refuse(self, message: Message, index: int, *fields: str) -> None:
        """Raises: InvalidRequestError if the message carries something this format cannot write."""
        for name in fields:
            if message.get(name):
                raise InvalidRequestError(
                    f"message {index} ({message['role']}) has {name!r}, and the format of renderer {self.name!r} has no place for it; "
                    f"remove it, or use a renderer whose format has one ('qwen3', 'chat_template')"
                )


def _without_trainable(message: Message) -> Message:
    copy = message.copy()
    copy.pop("trainable", None)
    return copy
