"""The shown text: whole characters, no stop text, no special tokens, however the tokens arrive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptlab.engines.base_model import load_tokenizer
from ptlab.server.openai_text import REPLACEMENT, AnswerText, Detokenizer, decode

SPECIAL = frozenset({0, 1, 2})
EOS, IM_END = 0, 2


@pytest.fixture(scope="module")
def tokenizer(tiny_qwen3_dir: Path) -> Any:
    return load_tokenizer(str(tiny_qwen3_dir))


def answer(tokenizer: Any, *stop_texts: str) -> AnswerText:
    return AnswerText(tokenizer, before=[], stop_texts=stop_texts, special=SPECIAL)


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def one_by_one(text: AnswerText, tokens: list[int], ended: Any) -> list[str]:
    return [text.feed([token], ended if i == len(tokens) - 1 else "") for i, token in enumerate(tokens)]


def test_characters_of_several_tokens_are_shown_whole(tokenizer: Any) -> None:
    tokens = encode(tokenizer, "é→🙂x")
    assert len(tokens) > 4, "the tokenizer must spell these in pieces for this test to mean something"
    parts = one_by_one(answer(tokenizer), tokens, "length")
    assert "".join(parts) == "é→🙂x"
    assert all(REPLACEMENT not in part for part in parts)


def test_half_a_character_at_the_end_is_shown_as_such(tokenizer: Any) -> None:
    half = encode(tokenizer, "🙂")[:-1]
    assert answer(tokenizer).feed([*encode(tokenizer, "a"), *half], "length") == "a" + REPLACEMENT


@pytest.mark.parametrize("stop", ["stop", "p the"])
def test_a_stop_text_and_what_its_last_token_brings_along_are_cut_off(tokenizer: Any, stop: str) -> None:
    whole = "The sum. stop the answer"
    tokens = encode(tokenizer, whole)
    text = answer(tokenizer, "unused", stop)
    parts = one_by_one(text, tokens, "stop")
    assert "".join(parts) == whole[: whole.index(stop)]
    assert text.ended == "stop"
    assert "".join(decode(tokenizer, [shown.token]) for shown in text.tokens).startswith(whole[: whole.index(stop)])
    assert all(shown.offset < whole.index(stop) for shown in text.tokens), "tokens of the stop are none of the answer's"


def test_what_may_be_a_stop_text_is_held_back_and_shown_when_it_is_none(tokenizer: Any) -> None:
    text = answer(tokenizer, "abc")
    assert text.feed(encode(tokenizer, "xab"), "") == "x"
    assert text.feed(encode(tokenizer, "d"), "") == "abd"
    assert text.feed(encode(tokenizer, "ab"), "length") == "ab"
    assert text.ended == "length"


def test_a_stop_token_is_not_shown_even_if_it_is_not_special(tokenizer: Any) -> None:
    [letter] = encode(tokenizer, "a")
    text = answer(tokenizer)
    assert text.feed([*encode(tokenizer, "b"), letter], "stop") == "b"
    assert [shown.token for shown in text.tokens] == encode(tokenizer, "b")
    text = answer(tokenizer)
    assert text.feed([*encode(tokenizer, "b"), letter], "length") == "ba"


def test_special_tokens_are_never_shown_but_may_be_a_stop_text(tokenizer: Any) -> None:
    a, b = encode(tokenizer, "a"), encode(tokenizer, "b")
    text = answer(tokenizer)
    assert text.feed([*a, 1, *b, EOS], "stop") == "ab"
    assert [(shown.token, shown.offset) for shown in text.tokens] == [(a[0], 0), (1, 1), (b[0], 1)]
    assert answer(tokenizer, "<|im_end|>b").feed([*a, IM_END, *b], "stop") == "a"


def test_half_a_character_before_a_special_token_stays_half(tokenizer: Any) -> None:
    assert answer(tokenizer).feed([*encode(tokenizer, "🙂")[:-1], IM_END], "stop") == REPLACEMENT


def test_tokens_after_the_end_are_ignored(tokenizer: Any) -> None:
    text = answer(tokenizer, "ab")
    assert text.feed(encode(tokenizer, "xab then more"), "length") == "x"
    assert text.feed(encode(tokenizer, "y"), "length") == ""
    assert text.ended == "stop"


def test_offsets_count_characters_of_the_shown_text(tokenizer: Any) -> None:
    tokens = [*encode(tokenizer, "The 🙂"), IM_END, *encode(tokenizer, "sum")]
    text = answer(tokenizer)
    assert text.feed(tokens, "length") == "The 🙂sum"
    offsets = [token.offset for token in text.tokens]
    pieces = [decode(tokenizer, [token]) for token in encode(tokenizer, "The ")]
    assert offsets[: len(pieces)] == [sum(map(len, pieces[:i])) for i in range(len(pieces))]
    assert set(offsets[len(pieces) : tokens.index(IM_END)]) == {4}, "all pieces of a character stand where it stands"
    assert offsets[tokens.index(IM_END) :][:2] == [5, 5]


@settings(max_examples=150, deadline=None)
@given(words=st.text(alphabet="abé🙂 \n12", max_size=30), stops=st.lists(st.text(alphabet="ab \n", min_size=1, max_size=3), max_size=1))
def test_fed_singly_or_at_once_the_text_is_that_before_the_first_stop(tokenizer: Any, words: str, stops: list[str]) -> None:
    tokens = encode(tokenizer, words)
    expected = words[: min((at for stop in stops if (at := words.find(stop)) >= 0), default=len(words))]
    at_once, singly = answer(tokenizer, *stops), answer(tokenizer, *stops)
    assert at_once.feed(tokens, "length") == expected
    assert "".join(one_by_one(singly, tokens, "length")) == expected
    assert at_once.tokens == singly.tokens


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(0, 511), max_size=60))
def test_any_tokens_give_their_valid_characters(tokenizer: Any, tokens: list[int]) -> None:
    detokenizer = Detokenizer(tokenizer)
    text = "".join(detokenizer.add(token) for token in tokens) + detokenizer.rest()
    assert text.replace(REPLACEMENT, "") == decode(tokenizer, tokens).replace(REPLACEMENT, "")


def test_a_run_of_bytes_that_is_no_text_is_not_held_back_for_ever(tokenizer: Any) -> None:
    [first, *_] = encode(tokenizer, "🙂")
    text = answer(tokenizer)
    shown = [text.feed([first], "") for _ in range(40)]
    assert "".join(shown).count(REPLACEMENT) >= 20


def test_the_prompt_decides_about_the_space_before_the_first_token() -> None:
    class Spaced:
        """Drops the leading space of what it decodes, as SentencePiece does."""

        def decode(self, tokens: list[int], **_: Any) -> str:
            return " ".join(f"w{token}" for token in tokens)

    assert AnswerText(Spaced(), before=[7], stop_texts=[], special=frozenset()).feed([1, 2], "length") == " w1 w2"
