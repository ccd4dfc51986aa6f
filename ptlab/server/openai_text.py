"""The text of a draw as OpenAI's API shows it: no special tokens, no stop text, and nothing shown that may yet turn out to be a stop text.

The engines' draws end with what stopped them (a token, or the token that completed a stop text); here that end is cut off.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Literal

REPLACEMENT = "\ufffd"  # what decoding shows for a piece of a multi-byte character
CONTEXT_TOKENS = 6
"""Tokens of the prompt that are decoded along with an answer: some tokenizers drop the space before the first token they decode."""
MOST_PENDING = 16
"""Tokens held back for the rest of a character. One has at most four bytes, so more of them are not text and are shown as they are."""

Ended = Literal["", "stop", "length"]


@dataclass(frozen=True, slots=True)
class TokenText:
    """A sampled token and where its text begins in the text shown, in characters."""

    token: int
    offset: int


class Detokenizer:
    """Text of a growing sequence of tokens, character by whole character.

    Args:
        before: tokens that stand before the first one; their text is not given again.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(before[-CONTEXT_TOKENS:])
        self._known = 0  # the text of tokens[known:shown] was given; it stays in the window because a token's text depends on its left
        self._shown = len(self._tokens)

    def add(self, token: int) -> str:
        """What is certain about the text now; '' in the middle of a character."""
        self._tokens.append(token)
        before, now = decode(self._tokenizer, self._tokens[self._known : self._shown]), decode(self._tokenizer, self._tokens[self._known :])
        incomplete = now.endswith(REPLACEMENT) and len(self._tokens) - self._shown <= MOST_PENDING
        return "" if incomplete or len(now) <= len(before) else self._show(before, now)

    def rest(self) -> str:
        """What was held back, when no token follows."""
        if self._shown == len(self._tokens):
            return ""
        before, now = decode(self._tokenizer, self._tokens[self._known : self._shown]), decode(self._tokenizer, self._tokens[self._known :])
        return self._show(before, now)

    def _show(self, before: str, now: str) -> str:
        del self._tokens[: self._known]
        self._known, self._shown = self._shown - self._known, len(self._tokens)
        return now[len(before) :]


class AnswerText:
    """One draw's text, fed token by token or all at once.

    Args:
        before: the prompt's tokens.
        stop_texts: texts that end it and are not part of it. As in the engines, special tokens count by their spelling.
        special: token ids that are never shown.
    """

    def __init__(self, tokenizer: Any, *, before: Sequence[int], stop_texts: Sequence[str], special: AbstractSet[int]) -> None:
        self._detokenizer = Detokenizer(tokenizer, before)
        self._stop_texts = tuple(stop_texts)
        self._longest = max(map(len, self._stop_texts), default=0)
        self._special = special
        self._raw_length = 0  # of the text with special tokens
        self._tail = ""  # its end, in which a stop text may stand
        self._length = 0  # of the text without them
        self._begins: list[tuple[TokenText, int]] = []  # with the place in the raw text
        self._waiting: deque[tuple[str, bool]] = deque()  # (raw text, shown?) not given yet
        self._num_given = 0  # raw characters
        self.ended: Ended = ""

    def feed(self, tokens: Sequence[int], ended: Ended) -> str:
        """The text that is certain now and was not given before. Tokens after the end are ignored.

        Args:
            ended: why the draw ended with the last of these tokens; "" = it goes on.
        """
        given = ""
        for position, token in enumerate(tokens):
            if self.ended:
                break
            end = ended if position == len(tokens) - 1 else ""
            begun = self._add(token, is_last=bool(end))
            stop = self._find_stop(begun)
            if stop is None and end == "stop":
                stop = begun  # a stop token
            if stop is not None:
                self.ended = "stop"
                self._begins = [known for known in self._begins if known[1] < stop]
                return given + self._give(stop)
            self.ended = end
            given += self._give(self._raw_length - (0 if end else self._may_be_stop()))
        return given

    @property
    def tokens(self) -> list[TokenText]:
        """The tokens of which something stands before the end, special ones included."""
        return [token for token, _ in self._begins]

    def _add(self, token: int, *, is_last: bool) -> int:
        """Take a token; where it begins in the raw text."""
        special = token in self._special
        if special:
            self._append(self._detokenizer.rest(), shown=True)  # half a character before a special token stays half
        begun = self._raw_length
        self._begins.append((TokenText(token, self._length), begun))
        self._append(self._detokenizer.add(token) + (self._detokenizer.rest() if is_last else ""), shown=not special)
        return begun

    def _append(self, text: str, *, shown: bool) -> None:
        if text:
            self._raw_length += len(text)
            self._tail = (self._tail[-self._longest :] if self._longest else "") + text
            self._length += len(text) if shown else 0
            self._waiting.append((text, shown))

    def _find_stop(self, begun: int) -> int | None:
        """Where the earliest stop text begins that ends after `begun`."""
        if not self._stop_texts:
            return None
        tail_begin = self._raw_length - len(self._tail)
        start = max(0, begun - self._longest + 1 - tail_begin)
        return min((tail_begin + at for text in self._stop_texts if (at := self._tail.find(text, start)) >= 0), default=None)

    def _may_be_stop(self) -> int:
        """Characters at the end of the raw text that a stop text may begin with."""
        for length in range(min(self._longest - 1, len(self._tail)), 0, -1):
            if any(text.startswith(self._tail[-length:]) for text in self._stop_texts):
                return length
        return 0

    def _give(self, raw_end: int) -> str:
        """What is shown of the raw text up to there and was not given."""
        given = ""
        while self._waiting and self._num_given < raw_end:
            text, shown = self._waiting.popleft()
            part = text[: raw_end - self._num_given]
            if len(part) < len(text):
                self._waiting.appendleft((text[len(part) :], shown))
            self._num_given += len(part)
            given += part if shown else ""
        return given


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Special tokens spelled out, spaces as they are."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))
