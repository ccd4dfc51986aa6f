"""When a draw ends: stop tokens, stop texts, and the model's end-of-sequence tokens.

A draw keeps what stopped it: the stop token, or the token that completed a stop text, is its last token, exactly once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptlab.errors import InvalidRequestError

MAX_TABLES = 64  # each is as long as the vocabulary, and clients choose the texts
REPLACEMENT = "\ufffd"  # what decoding shows for a piece of a multi-byte character


@dataclass(frozen=True, slots=True)
class StopRule:
    """What ends one draw before max_tokens."""

    token_ids: frozenset[int]
    texts: tuple[str, ...]
    """Sorted, without repeats; looked for in the text of the sampled tokens only, special tokens included."""


def resolve_stop(stop: str | Sequence[str] | Sequence[int] | None, eos_token_ids: frozenset[int], vocab_size: int) -> StopRule:
    """`SamplingParams.stop` as a rule.

    None = the EOS tokens; [] = nothing, not even EOS; texts or token ids = these, and EOS as well.
    Raises: InvalidRequestError on an empty text, a token id outside 0 .. vocab_size - 1, or texts and ids mixed.
    """
    if stop is None:
        return StopRule(eos_token_ids, ())
    items: list[str | int] = [stop] if isinstance(stop, str) else list(stop)
    if not items:
        return StopRule(frozenset(), ())
    texts = [item for item in items if isinstance(item, str)]
    ids = [item for item in items if not isinstance(item, str)]
    if texts and ids:
        raise InvalidRequestError(f"sampling_params.stop mixes texts and token ids: {items!r}; give a list of one kind")
    if "" in texts:
        raise InvalidRequestError(f"sampling_params.stop holds an empty text: {items!r}; every text contains it, nothing could be sampled")
    for token in ids:
        if not 0 <= token < vocab_size:
            raise InvalidRequestError(f"sampling_params.stop: token id {token} is outside 0 .. {vocab_size - 1}, the model's vocabulary")
    return StopRule(eos_token_ids | frozenset(ids), tuple(sorted(set(texts))))


class StopTexts:
    """Finds stop texts with little decoding: only a token that can end a stop text is looked at.

    The first time a text is asked for, every token of the vocabulary is decoded once to see what it adds to a running text; after that a
    step costs one table look-up for all rows, and a decode of a short tail for the few rows whose new token passed it.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._pieces: list[str] | None = None
        self._tables: OrderedDict[tuple[str, ...], NDArray[np.bool_]] = OrderedDict()  # the least recently used first

    def may_end(self, texts: tuple[str, ...]) -> NDArray[np.bool_]:
        """[vocab_size] True where sampling this token can complete one of `texts`; never False for one that can."""
        if texts not in self._tables:
            if self._pieces is None:
                self._pieces = self._decode_vocabulary()
            last = {text[-1] for text in texts} | {REPLACEMENT}
            self._tables[texts] = np.array([not last.isdisjoint(piece) for piece in self._pieces])
            if len(self._tables) > MAX_TABLES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(texts)
        return self._tables[texts]

    def tail_length(self, texts: tuple[str, ...]) -> int:
        """How many of the last tokens found() looks at."""
        # A token adds at least one byte in every common tokenizer; the margin is for pieces cut at the start of the tail.
        return max(len(text.encode()) for text in texts) + 8

    def found(self, texts: tuple[str, ...], tokens: Sequence[int]) -> bool:
        """Whether the last of `tokens` (those sampled so far) completed one of `texts`; asked after every token that may_end()."""
        decoded = self._decode(tokens[-self.tail_length(texts) :])
        return any(text in decoded for text in texts)

    def _decode(self, tokens: Iterable[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _decode_vocabulary(self) -> list[str]:
        """What each token adds after a plain letter (alone, some tokenizers drop its leading space).

        Ids beyond the tokenizer's own (padding rows of the embedding) decode to "". A token that changes the letter before it counts as
        one that may end anything.
        """
        anchor = self._tokenizer.encode("a", add_special_tokens=False)
        start = self._decode(anchor)
        known = min(self._vocab_size, len(self._tokenizer))
        decoded = self._tokenizer.batch_decode(
            [[*anchor, token] for token in range(known)], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        pieces = [text.removeprefix(start) if text.startswith(start) else text + REPLACEMENT for text in decoded]
        return pieces + [""] * (self._vocab_size - known)
