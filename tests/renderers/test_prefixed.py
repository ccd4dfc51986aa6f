"""The prefix stands before every prompt and nowhere else."""

from __future__ import annotations

import pytest

from ptlab.renderers import TrainOnWhat, get_renderer
from ptlab.renderers.prefixed import PrefixedRenderer

PREFIX = [{"role": "system", "content": "Carry."}]
ASKED = [{"role": "user", "content": "1+1?"}]


@pytest.fixture(scope="module")
def plain(tiny_qwen3_dir):
    from transformers import AutoTokenizer

    return get_renderer("chatml", AutoTokenizer.from_pretrained(tiny_qwen3_dir))


def test_prompts_and_examples_begin_with_the_prefix(plain):
    prefixed = PrefixedRenderer(plain, PREFIX)
    assert prefixed.build_generation_prompt(ASKED) == plain.build_generation_prompt([*PREFIX, *ASKED])
    assert prefixed.build_generation_prompt(ASKED, "2") == plain.build_generation_prompt([*PREFIX, *ASKED], "2")
    answered = [*ASKED, {"role": "assistant", "content": "2"}]
    for what in (TrainOnWhat.LAST_ASSISTANT_MESSAGE, TrainOnWhat.ALL_MESSAGES):
        tokens, weights = prefixed.build_supervised_example(answered, what)
        other, other_weights = plain.build_supervised_example([*PREFIX, *answered], what)
        assert tokens == other and weights.tolist() == other_weights.tolist()


def test_answers_are_read_as_ever(plain):
    prefixed = PrefixedRenderer(plain, PREFIX)
    sampled = [*plain.codec.encode("2"), *plain.get_stop_sequences()]
    assert prefixed.parse_response(sampled) == plain.parse_response(sampled) == ({"role": "assistant", "content": "2"}, True)
    assert prefixed.get_stop_sequences() == plain.get_stop_sequences()
    assert prefixed.has_extension_property is plain.has_extension_property
