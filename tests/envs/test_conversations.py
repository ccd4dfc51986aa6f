"""Rows to conversations to datums: what is trained, what is refused, and by which name."""

from __future__ import annotations

import json

import pytest

from ptlab.envs.conversations import conversation_datums, conversation_of, load_conversations, num_trained
from ptlab.envs.made_sums import careful_sum, made_sums
from ptlab.errors import ConfigError
from ptlab.renderers import TrainOnWhat, get_renderer
from ptlab.tiny_models.quickstart import careful_answer

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "1"}]
CHAT.append({"role": "assistant", "content": "2"})


@pytest.fixture(scope="module")
def renderer(tiny_qwen3_dir):
    from transformers import AutoTokenizer

    return get_renderer("chatml", AutoTokenizer.from_pretrained(tiny_qwen3_dir))


def test_three_forms_of_a_row_are_one_conversation():
    expected = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert conversation_of("r:1", {"messages": expected, "source": "x"}) == expected
    assert conversation_of("r:1", {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}) == expected
    assert conversation_of("r:1", {"prompt": "Hi", "completion": "Ho"}) == expected
    extra = {"role": "assistant", "content": "a", "thinking": "t", "trainable": True, "tool_calls": [], "name": None, "other": 1}
    assert conversation_of("r:1", {"messages": [extra]}) == [{"role": "assistant", "content": "a", "thinking": "t", "trainable": True}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "x"}, "found the fields question"),
        ({"messages": []}, "r:1: messages is '\\[\\]', needed a list"),
        ({"messages": [{"role": "user"}]}, r"r:1: messages\[0\]: needed an object with the texts role and content"),
        ({"messages": ["hi"]}, r"messages\[0\]"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "from is 'tool'"),
        ({"prompt": "x", "completion": 3}, "found the fields prompt, completion"),
    ],
)
def test_a_row_that_is_no_conversation_is_refused_by_place(row, message):
    with pytest.raises(ConfigError, match=message):
        conversation_of("r:1", row)


def test_loading_stops_at_the_limit_and_names_what_is_missing(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": CHAT}) + "\n" for _ in range(3)) + '{"bad": 1}\n')
    assert len(load_conversations(str(path), hub_name="x", split="train", limit=3)) == 3
    with pytest.raises(ConfigError, match=r"rows.jsonl:4: found the fields bad"):
        load_conversations(str(path), hub_name="x", split="train")
    path.write_text("")
    with pytest.raises(ConfigError, match="no conversations"):
        load_conversations(str(path), hub_name="x", split="train")


def test_train_on_what_decides_the_weights(renderer):
    def trained(what: TrainOnWhat, max_length: int | None = None) -> list[str]:
        data = conversation_datums("r:1", CHAT, renderer, what, max_length)
        texts = []
        for datum in data:
            weights, targets = datum.loss_fn_inputs["weights"].to_numpy(), datum.loss_fn_inputs["target_tokens"].to_numpy()
            texts.append(renderer.codec.decode([int(t) for t, w in zip(targets, weights, strict=True) if w]))
            assert num_trained(datum) == weights.sum()
        return texts

    assert trained(TrainOnWhat.ALL_ASSISTANT_MESSAGES) == ["Ho<|im_end|>2<|im_end|>"]
    assert trained(TrainOnWhat.LAST_ASSISTANT_MESSAGE) == ["2<|im_end|>"]
    [everything] = trained(TrainOnWhat.ALL_TOKENS)
    assert everything.endswith("assistant\n2<|im_end|>") and "user" in everything
    length = len(conversation_datums("r:1", CHAT, renderer, TrainOnWhat.LAST_ASSISTANT_MESSAGE, None)[0].model_input.to_ints()) + 1
    assert trained(TrainOnWhat.LAST_ASSISTANT_MESSAGE, length - 1) == ["2"]
    assert trained(TrainOnWhat.LAST_ASSISTANT_MESSAGE, length - 2) == [] and trained(TrainOnWhat.LAST_ASSISTANT_MESSAGE, 1) == []


def test_a_conversation_the_format_cannot_write_is_refused_by_place(renderer):
    with pytest.raises(ConfigError, match=r"train\.jsonl:7"):
        conversation_datums("train.jsonl:7", CHAT[:1], renderer, TrainOnWhat.LAST_ASSISTANT_MESSAGE, None)
    with pytest.raises(ConfigError, match="thinking"):
        thought = [CHAT[0], {"role": "assistant", "content": "a", "thinking": "t"}]
        conversation_datums("r:1", thought, renderer, TrainOnWhat.ALL_ASSISTANT_MESSAGES, None)


# ----------------------------------------------------------------------------------------------------------------- made sums


@pytest.mark.parametrize(("a", "b"), [(347, 586), (100, 100), (999, 999), (505, 495), (158, 901)])
def test_sums_are_written_as_the_quickstart_model_was_taught(a, b):
    import random

    assert careful_sum(a, b) == careful_answer(a, b, random.Random(0), column_slip=0.0)
    assert careful_sum(a, b).endswith(f"\\boxed{{{a + b}}}")


def test_made_sums_are_right_held_out_and_shuffled_on_request():
    train, test = made_sums(60, 20, seed=1)
    assert len(train) == 60 and len(test) == 20
    for question, answer in [*train, *test]:
        a, b = (int(part) for part in "".join(c if c.isdigit() else " " for c in question["content"]).split())
        assert answer["content"] == careful_sum(a, b)
    assert not {q["content"] for q, _ in train} & {q["content"] for q, _ in test}
    shuffled, same_test = made_sums(60, 20, seed=1, shuffled=True)
    assert same_test == test and [q for q, _ in shuffled] == [q for q, _ in train]
    assert sum(a == b for (_, a), (_, b) in zip(shuffled, train, strict=True)) < 10
    assert sorted(a["content"] for _, a in shuffled) == sorted(a["content"] for _, a in train)
    assert made_sums(60, 20, seed=2)[0] != train
