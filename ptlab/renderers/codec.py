"""Text to tokens without letting text become control.

A tokenizer reads "<|im_end|>" in a user's text as the token that ends a turn, so whoever writes the text can write turns.
Here text and control tokens are encoded apart: control tokens are looked up by name, and text is cut inside every spelling of a
special token before it is encoded. The tokens then decode to the same text and none of them is special. Text without such a
spelling is encoded in one piece, exactly as the tokenizer would.

Cutting, not the tokenizer's own `split_special_tokens`: that option is a flag on a tokenizer shared by all threads, and a second
thread that resets it between the setting and the encoding lets the control token through.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ptlab.errors import InvalidRequestError


class AddedToken(Protocol):
    """A token beside the learned vocabulary. `special`: control, never part of an answer's text."""

    @property
    def content(self) -> str: ...
    @property
    def special(self) -> bool: ...


class Tokenizer(Protocol):
    """What renderers need of a tokenizer; those of transformers have it all."""

    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_id(self) -> int | None: ...
    @property
    def unk_token_id(self) -> int | None: ...
    @property
    def added_tokens_decoder(self) -> Mapping[int, AddedToken]: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> Any: ...

    def apply_chat_template(self, conversation: list[dict[str, Any]], *, tokenize: bool, add_generation_prompt: bool) -> Any:
        """Used by the renderer `chat_template` only."""
        ...


class TextCodec:
    """Encodes literal text and control tokens, decodes both. Holds no state but the tokenizer's vocabulary."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # A one-character token cannot be cut, and some tokenizers add whitespace and the like that way.
        specials = {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        spellings = [spelling for spelling in specials if len(spelling) > 1]
        self.special_ids = frozenset(specials[spelling] for spelling in spellings) - {tokenizer.unk_token_id}
        self._spelling = re.compile("|".join(map(re.escape, spellings))) if spellings else None

    def control(self, spelling: str, *, renderer: str) -> int:
        """Id of the control token with this spelling.

        Raises: InvalidRequestError if the tokenizer has no such token.
        """
        ids = self._tokenizer.encode(spelling, add_special_tokens=False)
        if len(ids) != 1:
            raise InvalidRequestError(
                f"renderer {renderer!r} needs {spelling!r} to be one token; this tokenizer makes {len(ids)} of it. "
                f"Use the renderer made for this model, or 'chat_template' or 'role_colon'"
            )
        return ids[0]

    def cut(self, text: str) -> list[str]:
        """`text` in pieces that join to it and hold no special token's spelling. One piece for normal text, none for ''."""
        pieces: list[str] = []
        start = 0
        while self._spelling is not None and (found := self._spelling.search(text, start)):
            pieces.append(text[start : found.start() + 1])
            start = found.start() + 1
        return [*pieces, text[start:]] if text else []

    def encode(self, text: str) -> list[int]:
        """Tokens of literal text; never a special token.

        Raises: InvalidRequestError if the tokenizer's normalizer turned the text into a special token after all.
        """
        ids = [token for piece in self.cut(text) for token in self.encode_markup(piece)]
        if not self.special_ids.isdisjoint(ids):
            spellings = [self.decode([token]) for token in ids if token in self.special_ids]
            raise InvalidRequestError(f"normalizing the text made control tokens of it ({spellings}); change the text {text!r}")
        return ids

    def encode_markup(self, text: str) -> list[int]:
        """Tokens of a text that is trusted to hold control tokens (a rendered chat template)."""
        return list(self._tokenizer.encode(text, add_special_tokens=False)) if text else []

    def encode_after(self, header: str, text: str) -> tuple[list[int], list[int]]:
        """Tokens of `header + text` encoded as one string, parted where the header ends.

        A token that covers both (header "user\\n", text "\\nHi": the tokenizer has a token for two newlines) goes to the text.
        """
        whole, alone = self.encode(header + text), self.encode(header)
        num_common = 0
        while num_common < min(len(whole), len(alone)) and whole[num_common] == alone[num_common]:
            num_common += 1
        return whole[:num_common], whole[num_common:]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the tokens, special ones spelled out, spaces as they are."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))
