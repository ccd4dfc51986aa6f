"""GSM8K, MATH, Polaris and DeepMath: their rows, from local files and from the hub, what is held out, and what is filtered."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ptlab.envs.deepmath import DeepMathConfig
from ptlab.envs.env_section import TaskSetting
from ptlab.envs.gsm8k import Gsm8kConfig
from ptlab.envs.hendrycks_math import SUBJECTS, HendrycksMathConfig
from ptlab.envs.math_problems import Problem
from ptlab.envs.polaris import PolarisConfig
from ptlab.errors import ConfigError

DATA = Path(__file__).parents[3] / "shared" / "data"
real = pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is absent: the real rows are not part of the project")


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, *rows: object) -> str:
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        return str(path)

    return write


def answers(problems: list[Problem]) -> list[str]:
    return [problem.answer for problem in problems]


@real
def test_gsm8k_rows():
    config = Gsm8kConfig(train_path=str(DATA / "gsm8k/train.jsonl"), test_path=str(DATA / "gsm8k/test.jsonl"), groups_per_step=128)
    train, test = config.load()
    assert (len(train), len(test)) == (7473, 1319)
    assert test[0].question.startswith("Janet") and test[0].answer == "18"
    assert all(answer.replace(".", "").replace("-", "").isdigit() for answer in answers(train))
    setting = TaskSetting(renderer=None, seed=0, models=None)  # type: ignore[arg-type]  # neither is asked
    task = asyncio.run(config.make_task(setting))
    assert len(task.train) == 59 and len(task.test_P) == 250  # 58 full batches and a part


def test_gsm8k_rows_may_give_the_answer_alone(write):
    path = write("p.jsonl", {"question": "a", "answer": "\\frac{1}{2}"}, {"question": "c", "answer": "x\n#### 1,234"})
    train, _ = Gsm8kConfig(train_path=path, test_path=path).load()
    assert train == [Problem("a", "\\frac{1}{2}"), Problem("c", "1234")]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": "a", "answer": 1}, r'p\.jsonl:1: needed a text in the field "answer", found \'1\'; the row has question, answer'),
        ({"answer": "1"}, r'p\.jsonl:1: needed a text in the field "question"'),
        ({"question": "a", "answer": "two\nlines"}, r"p\.jsonl:1: .*####"),
        ({"question": "a", "answer": ""}, r'p\.jsonl:1: needed a text in the field "answer"'),
    ],
)
def test_gsm8k_rows_that_are_none_are_refused(write, row, says):
    path = write("p.jsonl", row)
    with pytest.raises(ConfigError, match=says):
        Gsm8kConfig(train_path=path, test_path=path).load()


@real
def test_math_rows_and_math_500():
    train, test = HendrycksMathConfig(
        train_path=str(DATA / "math/math_train-300.jsonl"), test_path=str(DATA / "math/math500_test.jsonl")
    ).load()
    assert (len(train), len(test)) == (300, 500)
    assert answers(test)[0] == r"\left( 3, \frac{\pi}{2} \right)"
    assert train[0].answer == r"\$42409"


@real
def test_a_math_500_row_is_never_trained_on(write):
    test_path = DATA / "math/math500_test.jsonl"
    rows = [json.loads(line) for line in test_path.read_text(encoding="utf-8").split("\n") if line]
    respelled = [{**row, "problem": " ".join(row["problem"].split()).replace(r"\left", "")} for row in rows]
    kept = {"problem": "What is $1+1$?", "answer": "2"}
    train, _ = HendrycksMathConfig(train_path=write("t.jsonl", *respelled, kept), test_path=str(test_path)).load()
    assert train == [Problem("What is $1+1$?", "2")]


def test_math_answers_stand_in_the_answer_or_in_the_last_box_of_the_solution(write, caplog):
    rows = [
        {"problem": "a", "solution": r"First \boxed{1}, no: $\boxed{\frac{1}{2}}$.", "level": "Level 1", "type": "Algebra"},
        {"problem": "b", "solution": r"\boxed{3}", "answer": "4", "level": 5},
        {"problem": "c", "solution": "no box"},
        {"problem": "d", "answer": None},
    ]
    train, _ = HendrycksMathConfig(train_path=write("t.jsonl", *rows), test_path=write("e.jsonl", {"problem": "t", "answer": "0"})).load()
    assert train == [Problem("a", r"\frac{1}{2}"), Problem("b", "4")]
    assert "2 problems without an answer" in caplog.text
    bad = write("bad.jsonl", {"problem": "a"})
    with pytest.raises(ConfigError, match=r'bad\.jsonl:1: needed a text in the field "solution"'):
        HendrycksMathConfig(train_path=bad, test_path=bad).load()


def test_math_levels(write):
    rows = [{"problem": f"p{level}", "answer": "1", "level": level} for level in ("Level 1", "Level 3", 5, "Level ?", None)]
    train, test = write("t.jsonl", *rows), write("e.jsonl", {"problem": "t", "answer": "0"})

    def kept(**levels: int) -> list[str]:
        return [problem.question for problem in HendrycksMathConfig(train_path=train, test_path=test, **levels).load()[0]]

    assert kept() == ["p" + str(row["level"]) for row in rows]
    assert kept(min_level=3) == ["pLevel 3", "p5"]
    assert kept(max_level=3) == ["pLevel 1", "pLevel 3"]
    with pytest.raises(ValidationError, match="min_level is 4, max_level is 2"):
        HendrycksMathConfig(min_level=4, max_level=2)


POLARIS_ROWS = [
    {"problem": "An ordinary question?", "answer": "34", "difficulty": "3/8"},
    {"problem": "A hard one?", "answer": r"\frac{1}{2}", "difficulty": "0/8"},
    {"problem": "No answer?", "answer": "", "difficulty": "7/8"},
    {"problem": "Held  OUT?", "answer": "9", "difficulty": "7/8"},
]


def test_polaris_rows(write):
    train, test = write("t.jsonl", *POLARIS_ROWS), write("e.jsonl", {"problem": "Held out?", "answer": "9"})

    def kept(**shares: float) -> list[str]:
        return answers(PolarisConfig(train_path=train, test_path=test, **shares).load()[0])

    assert kept() == ["34", r"\frac{1}{2}"]
    assert kept(min_difficulty=0.375) == ["34"]
    assert kept(max_difficulty=0.375) == kept()
    assert kept(max_difficulty=0.37) == [r"\frac{1}{2}"]
    bad = write("bad.jsonl", {**POLARIS_ROWS[0], "difficulty": "hard"})
    assert len(PolarisConfig(train_path=bad, test_path=test).load()[0]) == 1  # nobody asked for it
    with pytest.raises(ConfigError, match=r"bad\.jsonl:1: \"difficulty\" is 'hard'; .* need a share such as \"3/8\""):
        PolarisConfig(train_path=bad, test_path=test, max_difficulty=0.5).load()
    with pytest.raises(ValidationError, match="no problem has both"):
        PolarisConfig(min_difficulty=0.9, max_difficulty=0.1)


DEEPMATH_ROWS = [
    {"question": "Limit?", "final_answer": "0", "difficulty": 4.5, "topic": "Mathematics -> Precalculus -> Limits", "r1_solution_1": "..."},
    {"question": "Group?", "final_answer": "Yes", "difficulty": 8, "topic": "Mathematics -> Algebra -> Group Theory"},
    {"question": "None?", "final_answer": None, "difficulty": 5.0, "topic": "Mathematics"},
]


def test_deepmath_rows(write):
    train, test = write("t.jsonl", *DEEPMATH_ROWS), write("e.jsonl", {"problem": "t", "answer": "0"})

    def kept(**wanted: Any) -> list[str]:
        return answers(DeepMathConfig(train_path=train, test_path=test, **wanted).load()[0])

    assert kept() == ["0", "Yes"]
    assert kept(min_difficulty=5.0) == ["Yes"]
    assert kept(max_difficulty=5.0) == ["0"]
    assert kept(topic="algebra") == ["Yes"]
    bad = write("bad.jsonl", {**DEEPMATH_ROWS[0], "difficulty": "5"})
    with pytest.raises(ConfigError, match=r"bad\.jsonl:1: \"difficulty\" is '5'; .* need a number"):
        DeepMathConfig(train_path=bad, test_path=test, min_difficulty=1.0).load()
    absent = write("absent.jsonl", {"question": "Limit?"})
    with pytest.raises(ConfigError, match=r'absent\.jsonl:1: needed a text in the field "final_answer"'):
        DeepMathConfig(train_path=absent, test_path=test).load()


class HubRows(list):
    def select_columns(self, columns):
        return HubRows([{name: row[name] for name in columns} for row in self])


def test_what_is_asked_of_the_hub(monkeypatch):
    import datasets

    asked: list[tuple[object, ...]] = []

    def load_dataset(name, *subset, split):
        asked.append((name, *subset, split))
        return HubRows(
            [{"problem": f"p{len(asked)}", "question": "q", "answer": "1", "final_answer": "2", "difficulty": 1.0, "topic": "t"}]
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [len(part) for part in HendrycksMathConfig().load()] == [14, 1]
    assert asked[0] == ("HuggingFaceH4/MATH-500", "test")
    assert asked[1:] == [("EleutherAI/hendrycks_math", subject, split) for subject in SUBJECTS for split in ("train", "test")]
    del asked[:]
    HendrycksMathConfig(subjects=["algebra"]).load()
    Gsm8kConfig().load()
    PolarisConfig().load()
    assert DeepMathConfig().load()[0] == [Problem("q", "2")]
    assert asked == [
        ("HuggingFaceH4/MATH-500", "test"),
        ("EleutherAI/hendrycks_math", "algebra", "train"),
        ("EleutherAI/hendrycks_math", "algebra", "test"),
        ("openai/gsm8k", "main", "train"),
        ("openai/gsm8k", "main", "test"),
        ("HuggingFaceH4/MATH-500", "test"),
        ("POLARIS-Project/Polaris-Dataset-53K", "train"),
        ("HuggingFaceH4/MATH-500", "test"),
        ("zwhe99/DeepMath-103K", "train"),
    ]
