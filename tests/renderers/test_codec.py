from __future__ import annotations

import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptlab.errors import InvalidRequestError
from ptlab.renderers import TextCodec

# Text without lone surrogates, and hostile text: whole special tokens, halves of them, and what is left when one is taken out.
FRAGMENTS = ["<|im_end|>", "<|im_", "end|>", "<|", "<", "|>", "<|im_start|>", "<|endoftext|>", "user\n", "\n", " ", "a"]
HOSTILE = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)
NORMAL = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@settings(max_examples=300, deadline=None)
@given(text=HOSTILE)
def test_text_never_becomes_a_control_token_and_loses_nothing(qwen3_tokenizer: Any, text: str) -> None:
    ids = TextCodec(qwen3_tokenizer).encode(text)
    assert not set(ids) & set(range(151643, 151657))  # the 14 tokens this tokenizer marks special
    assert qwen3_tokenizer.decode(ids) == text


def test_without_the_codec_the_same_text_does_end_the_turn(qwen3_tokenizer: Any) -> None:
    """The planted danger: were the codec to call encode() directly, the test above would fail."""
    assert 151645 in qwen3_tokenizer.encode("a<|im_end|>b", add_special_tokens=False)


@settings(max_examples=200, deadline=None)
@given(text=NORMAL)
def test_normal_text_is_encoded_as_the_tokenizer_does(qwen3_tokenizer: Any, text: str) -> None:
    codec = TextCodec(qwen3_tokenizer)
    assert codec.encode(text) == qwen3_tokenizer.encode(text, add_special_tokens=False)
    assert codec.decode(codec.encode(text)) == unicodedata.normalize("NFC", text)  # NFC is the tokenizer's own normalizer


@given(text=HOSTILE)
def test_the_pieces_of_a_cut_join_to_the_text(chatml_tokenizer: Any, text: str) -> None:
    pieces = TextCodec(chatml_tokenizer).cut(text)
    assert "".join(pieces) == text
    assert not any(special in piece for piece in pieces for special in ("<|im_end|>", "<|im_start|>", "<|endoftext|>"))
    if "|>" not in text:
        assert len(pieces) == (text != "")


def test_a_cut_is_made_inside_each_spelling(chatml_tokenizer: Any) -> None:
    assert TextCodec(chatml_tokenizer).cut("a<|im_end|><|im_end|>") == ["a<", "|im_end|><", "|im_end|>"]


def test_a_header_keeps_its_tokens_unless_the_text_melts_into_it(qwen3_tokenizer: Any) -> None:
    codec = TextCodec(qwen3_tokenizer)
    assert codec.encode_after("user\n", "Hi") == ([872, 198], [13048])
    assert codec.encode_after("user\n", "\nHi") == ([872], [271, 13048])  # 271 is one token of two newlines
    assert codec.encode_after("user\n", "") == ([872, 198], [])


def test_a_normalizer_that_makes_control_tokens_of_text_is_refused(lowercasing_tokenizer: Any) -> None:
    codec = TextCodec(lowercasing_tokenizer)
    assert lowercasing_tokenizer.encode("<|IM_END|>", add_special_tokens=False) == [codec.control("<|im_end|>", renderer="chatml")]
    with pytest.raises(InvalidRequestError, match=r"made control tokens of it \(\['<\|im_end\|>'\]\)"):
        codec.encode("x <|IM_END|>")


def test_a_control_token_the_tokenizer_lacks_is_refused_by_name(chatml_tokenizer: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"renderer 'llama3' needs '<\|eot_id\|>' to be one token"):
        TextCodec(chatml_tokenizer).control("<|eot_id|>", renderer="llama3")


def test_decoding_keeps_spaces_and_spells_out_control_tokens(qwen3_tokenizer: Any) -> None:
    codec = TextCodec(qwen3_tokenizer)
    text = "it 's done . <|im_end|>"
    assert codec.decode(qwen3_tokenizer.encode(text, add_special_tokens=False)) == text
