"""Another renderer with messages before every conversation: a system prompt or examples that nobody else needs to know of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ptlab.renderers.base import Renderer, Weights
from ptlab.renderers.messages import Message, TrainOnWhat
from ptlab.types import ModelInput


class PrefixedRenderer(Renderer):
    """Renders [*prefix, *messages] as `inner` does; what the model writes is parsed as ever."""

    name: ClassVar[str] = "prefixed"

    def __init__(self, inner: Renderer, prefix: Sequence[Message]) -> None:
        super().__init__(inner.tokenizer)
        self.inner = inner
        self.prefix = tuple(prefix)

    @property
    def has_extension_property(self) -> bool:
        return self.inner.has_extension_property

    def build_generation_prompt(self, messages: Sequence[Message], prefill: str | None = None) -> ModelInput:
        return self.inner.build_generation_prompt([*self.prefix, *messages], prefill)

    def get_stop_sequences(self) -> list[str] | list[int]:
        return self.inner.get_stop_sequences()

    def parse_response(self, tokens: Sequence[int]) -> tuple[Message, bool]:
        return self.inner.parse_response(tokens)

    def build_supervised_example(
        self, messages: Sequence[Message], train_on_what: TrainOnWhat = TrainOnWhat.LAST_ASSISTANT_MESSAGE
    ) -> tuple[ModelInput, Weights]:
        """`train_on_what` is about all messages, those of the prefix too."""
        return self.inner.build_supervised_example([*self.prefix, *messages], train_on_what)
