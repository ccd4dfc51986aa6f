"""Rows of every known form to comparisons, what is left out and what is refused, and that test prompts are never trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from ptlab.envs.preference_data import (
    Comparison,
    MadePreferencesConfig,
    PreferenceRowsConfig,
    comparison_of,
    hold_out,
    prompts_of,
)
from ptlab.errors import ConfigError

PREFS = Path(__file__).parents[3] / "shared" / "data" / "prefs"
HELLO = Comparison(
    prompt=({"role": "user", "content": "Hi"},),
    chosen={"role": "assistant", "content": "Hello!"},
    rejected={"role": "assistant", "content": "What?"},
)
USER, GOOD, BAD = HELLO.prompt[0], HELLO.chosen, HELLO.rejected


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!", "rejected": "\n\nHuman: Hi\n\nAssistant: What?"},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 8.0},
        {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Hello!"},
            "rejected": {"from": "gpt", "value": "What?"},
        },
    ],
)
def test_every_form_is_the_same_comparison(row):
    assert comparison_of(row, "x:1") == HELLO


def test_a_conversation_of_several_turns_keeps_them():
    chosen = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Say: \n\nfoo\n\nAssistant: foo"
    found = comparison_of({"chosen": chosen, "rejected": chosen + " bar"}, "x:1")
    assert [message["role"] for message in found.prompt] == ["user", "assistant", "user"]
    assert found.prompt[2]["content"] == "Say: \n\nfoo"
    assert (found.chosen["content"], found.rejected["content"]) == ("foo", "foo bar")


def test_a_system_text_stands_first():
    found = comparison_of({"system": "Be brief.", "prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}, "x:1")
    assert found.prompt == ({"role": "system", "content": "Be brief."}, USER)


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("\n\nHuman: Hi\n\nAssistant: Same", "\n\nHuman: Hi\n\nAssistant: Same"),  # the replies agree
        ("\n\nHuman: Hi\n\nAssistant: a", "\n\nHuman: Ho\n\nAssistant: b"),  # they answer different conversations
        ("\n\nHuman: Hi\n\nAssistant: a\n\nHuman: b", "\n\nHuman: Hi\n\nAssistant: a\n\nHuman: c"),  # no reply at the end
        ("\n\nHuman: Hi\n\nAssistant: a", "\n\nHuman: Hi\n\nAssistant: "),  # an empty one
        ("\n\nAssistant: a", "\n\nAssistant: b"),  # nobody asked
    ],
)
def test_rows_without_a_comparison_are_left_out(chosen, rejected):
    assert comparison_of({"chosen": chosen, "rejected": rejected}, "x:1") is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Hi"}, r'x:7: needed the fields "chosen" and "rejected".*question'),
        ({"chosen": 3, "rejected": "a", "prompt": "Hi"}, r"x:7: 'chosen' is '3'"),
        ({"chosen": [{"role": "boss", "content": "a"}], "rejected": "b", "prompt": "Hi"}, "x:7: 'chosen' holds.*needed messages"),
        ({"chosen": [], "rejected": "b", "prompt": "Hi"}, "x:7: 'chosen' is"),
    ],
)
def test_rows_of_no_known_form_are_refused(row, message):
    with pytest.raises(ConfigError, match=message):
        comparison_of(row, "x:7")


def write_rows(path: Path, count: int) -> str:
    rows = [{"prompt": f"Question {index // 2}", "chosen": f"good {index}", "rejected": f"bad {index}"} for index in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_held_out_prompts_are_in_no_training_comparison(tmp_path):
    data = PreferenceRowsConfig(path=write_rows(tmp_path / "a.jsonl", 40), num_test=7).load(0)
    assert len(data.train) + len(data.test) == 40 and 7 <= len(data.test) <= 8  # both rows of a question
    asked = {json.dumps(prompt) for prompt in prompts_of(data.test)}
    assert asked and not asked & {json.dumps(prompt) for prompt in prompts_of(data.train)}
    again = PreferenceRowsConfig(path=str(tmp_path / "a.jsonl"), num_test=7).load(5)
    assert again.test == data.test  # another seed asks the same


def test_a_prompt_of_the_test_file_is_taken_out_of_training(tmp_path):
    train = write_rows(tmp_path / "train.jsonl", 10)
    test = write_rows(tmp_path / "test.jsonl", 4)
    data = PreferenceRowsConfig(path=train, test_path=test).load(0)
    assert len(data.test) == 4 and [text["content"] for (text,) in prompts_of(data.train)] == ["Question 2", "Question 3", "Question 4"]


def test_too_many_held_out_is_an_error():
    with pytest.raises(ConfigError, match=r"f\.jsonl: num_test 5 of 1 comparisons"):
        hold_out([HELLO], 5, where="f.jsonl")


def test_no_comparison_at_all_is_an_error(tmp_path):
    path = tmp_path / "same.jsonl"
    path.write_text(json.dumps({"prompt": "Hi", "chosen": "a", "rejected": "a"}) + "\n")
    with pytest.raises(ConfigError, match="no comparisons among 1 rows"):
        PreferenceRowsConfig(path=str(path)).load(0)


def test_a_test_path_alone_is_refused():
    with pytest.raises(ValidationError, match="test_path is set but path is not"):
        PreferenceRowsConfig(test_path="x.jsonl")


def test_made_preferences_are_one_fixed_set_and_the_control_swaps_half():
    given = MadePreferencesConfig(num_train=400, num_test=50).load(0)
    assert MadePreferencesConfig(num_train=400, num_test=50).load(9).train == given.train
    shuffled = MadePreferencesConfig(num_train=400, num_test=50, labels="shuffled").load(0)
    assert shuffled.test == given.test
    swapped = sum(a == b.swapped() for a, b in zip(shuffled.train, given.train, strict=True))
    assert 160 < swapped < 240
    assert all(a in (b, b.swapped()) for a, b in zip(shuffled.train, given.train, strict=True))
    assert not set(map(str, prompts_of(given.train))) & set(map(str, prompts_of(given.test)))
    assert given.truth(given.test[0].prompt, {"role": "assistant", "content": "Go away. "}) == -1.5


@pytest.mark.parametrize(("name", "count"), [("dpo_en_as_hh.jsonl", 220), ("dpo_en_demo.jsonl", 300)])
def test_real_rows(name, count):
    if not PREFS.exists():
        pytest.skip("../shared/data/prefs is not here")
    data = PreferenceRowsConfig(path=str(PREFS / name), num_test=20).load(0)
    assert len(data.train) + len(data.test) == count
    assert all(comparison.prompt[-1]["role"] == "user" for comparison in data.train)
