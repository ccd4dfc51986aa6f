from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptlab.engines.base_model import load_tokenizer
from ptlab.engines.stop import StopTexts, resolve_stop
from ptlab.errors import InvalidRequestError

EOS = frozenset({0, 2})


def test_none_means_eos_and_an_empty_list_means_nothing() -> None:
    assert resolve_stop(None, EOS, 512).token_ids == EOS
    nothing = resolve_stop([], EOS, 512)
    assert (nothing.token_ids, nothing.texts) == (frozenset(), ())


def test_texts_and_ids_keep_the_implicit_eos() -> None:
    one = resolve_stop("\n", EOS, 512)
    assert (one.token_ids, one.texts) == (EOS, ("\n",))
    several = resolve_stop(("b", "a", "b"), EOS, 512)
    assert (several.token_ids, several.texts) == (EOS, ("a", "b"))
    ids = resolve_stop([7, 511], EOS, 512)
    assert (ids.token_ids, ids.texts) == (EOS | {7, 511}, ())


@pytest.mark.parametrize(
    ("stop", "says"),
    [
        ([512], "512 is outside 0 .. 511"),
        ([-1], "-1 is outside"),
        ("", "empty text"),
        (["a", ""], "empty text"),
        (["a", 3], "mixes texts and token ids"),
    ],
)
def test_stops_that_can_never_work_are_refused(stop: object, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        resolve_stop(stop, EOS, 512)  # type: ignore[arg-type]


def first_hit(stop_texts: StopTexts, texts: tuple[str, ...], tokens: list[int]) -> int | None:
    """Index of the token at which the sampler would stop: found() is asked only where the table says so."""
    may_end = stop_texts.may_end(texts)
    for index, token in enumerate(tokens):
        if may_end[token] and stop_texts.found(texts, tokens[: index + 1]):
            return index
    return None


def test_a_text_that_spans_tokens_stops_at_the_token_that_completes_it(tiny_qwen3_dir: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_qwen3_dir))
    tokens = tokenizer.encode("xyz\\boxed{12} and more")
    hit = first_hit(StopTexts(tokenizer, 512), ("{12}",), tokens)
    assert hit is not None
    assert "{12}" in tokenizer.decode(tokens[: hit + 1])
    assert "{12}" not in tokenizer.decode(tokens[:hit])


def test_a_character_split_over_tokens_and_a_special_token_are_found(tiny_qwen3_dir: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_qwen3_dir))
    tokens = tokenizer.encode("a雪b<|im_end|>c")
    assert len(tokenizer.encode("雪")) == 3, "the test needs a character of several tokens"
    stop_texts = StopTexts(tokenizer, 512)
    assert first_hit(stop_texts, ("雪",), tokens) == 3
    assert first_hit(stop_texts, ("<|im_end|>",), tokens) == tokens.index(2)


def test_most_tokens_are_never_decoded_and_rows_beyond_the_tokenizer_are_silent(tiny_qwen3_dir: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_qwen3_dir))
    may_end = StopTexts(tokenizer, 600).may_end(("<|im_end|>",))
    assert may_end.shape == (600,)
    assert not may_end[len(tokenizer) :].any()
    ascii_without = [i for i in range(len(tokenizer)) if (text := tokenizer.decode([i])).isascii() and ">" not in text]
    assert len(ascii_without) > 200
    assert not may_end[np.array(ascii_without)].any()


TEXT = st.text(alphabet="ab é\n雪}1", min_size=1, max_size=12)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_dir: Path) -> Any:
    return load_tokenizer(str(tiny_llama_dir))


@pytest.fixture(scope="module")
def stop_texts(tokenizer: Any) -> StopTexts:
    return StopTexts(tokenizer, 512)


@settings(max_examples=150, deadline=None)
@given(text=TEXT, stops=st.lists(TEXT.map(lambda s: s[:3]), min_size=1, max_size=3))
def test_agrees_with_decoding_everything_at_every_token(text: str, stops: list[str], tokenizer: Any, stop_texts: StopTexts) -> None:
    texts = tuple(sorted(set(stops)))
    tokens = tokenizer.encode(text)
    plain = next((i for i in range(len(tokens)) if any(s in tokenizer.decode(tokens[: i + 1]) for s in texts)), None)
    assert first_hit(stop_texts, texts, tokens) == plain
