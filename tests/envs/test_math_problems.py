"""Problems: what is asked, what it pays, which come when, and how rows become problems."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from pydantic import ValidationError

from ptlab.envs import addition
from ptlab.envs.addition import AdditionConfig
from ptlab.envs.env_section import EnvSection, TaskSetting
from ptlab.envs.math_problems import (
    FEW_SHOT,
    Problem,
    ProblemEnv,
    ProblemFormat,
    ProblemSection,
    optional_text,
    problems_in,
    shuffled,
    without,
)
from ptlab.errors import ConfigError
from ptlab.renderers import Message
from ptlab.rl.types import Task


def grade(text: str, answer: str = "1/2", *, finished: bool = True, form: ProblemFormat | None = None, coin_seed: int | None = None):
    env = ProblemEnv(Problem("q", answer), form or ProblemFormat(), coin_seed=coin_seed)
    reply = Message(role="assistant", content=text)
    return asyncio.run(env.step(reply) if finished else env.step_cut_off(reply))


@pytest.mark.parametrize(
    ("text", "finished", "reward", "correct", "form"),
    [
        ("so \\boxed{0.5}", True, 1.0, 1.0, 1.0),
        ("so \\boxed{0.4}", True, 0.0, 0.0, 1.0),
        ("so 0.5", True, -0.1, 0.0, 0.0),
        ("so \\boxed{0.5} and on and on", False, 0.9, 1.0, 0.0),
        ("so \\boxed{", False, -0.1, 0.0, 0.0),
        ("", True, -0.1, 0.0, 0.0),
    ],
)
def test_reward_is_correct_plus_the_format_term(text, finished, reward, correct, form):
    step = grade(text, finished=finished)
    assert step.reward == pytest.approx(reward)
    assert dict(step.metrics) == {"correct": correct, "format": form} and step.done


HOSTILE = ["\\boxed{" * 3000, "\\boxed{9^9^9^9^9}", "\\boxed{\x00\ud800}", "\\boxed{\\frac{1}{0}}", "\\boxed{()}" + "}" * 100]


@pytest.mark.parametrize("text", HOSTILE)
def test_wrong_answers_never_raise(text):
    assert grade(text).reward <= 0.0


def test_random_rewards_are_a_fair_coin_of_the_seed_and_the_metrics_stay_true():
    rewards = [grade("\\boxed{1/2}", coin_seed=seed).reward for seed in range(400)]
    assert 150 < sum(rewards) < 250 and set(rewards) == {0.0, 1.0}
    assert rewards == [grade("no", coin_seed=seed).reward for seed in range(400)]
    assert grade("no", coin_seed=1).metrics["correct"] == 0.0


def test_question_carries_the_suffix_and_the_strawberry_example():
    env = ProblemEnv(Problem("How many?", "3"), ProblemFormat(prefix=FEW_SHOT))
    messages = asyncio.run(env.initial_observation())
    assert [m["role"] for m in messages] == ["user", "assistant", "user"]
    assert messages[0]["content"].startswith("How many r's are in strawberry?") and messages[1]["content"].endswith("\\boxed{3}")
    assert messages[2]["content"] == "How many? Write your answer in \\boxed{} format."


def test_every_pass_meets_every_problem_once_in_an_order_of_its_own():
    problems = [Problem(str(i), "0") for i in range(10)]
    at = shuffled(problems, 4, seed=1)
    asked = [p.question for step in range(5) for p in at(step)]  # two passes in batches of 4
    assert set(asked[:10]) == set(asked[10:]) == {str(i) for i in range(10)}
    assert asked[:10] != asked[10:]
    assert [p.question for p in at(3)] == asked[12:16]  # a step alone is what it is in order
    assert [p.question for p in shuffled(problems, 4, seed=2)(0)] != asked[:4]
    assert Counter(p.question for p in shuffled(problems[:3], 7, seed=0)(0)).total() == 7  # more groups than problems


def make(section: EnvSection, *, seed: int = 0, attempts: int = 1) -> Task:
    setting = TaskSetting(renderer=None, seed=seed, models=None, test_attempts=attempts)  # type: ignore[arg-type]  # neither is asked
    return asyncio.run(section.make_task(setting))


def problems_of(task: Task, step: int) -> list[Problem]:
    return [builder.problem for builder in task.train.get_batch(step)]


def test_addition_trains_off_the_test_pairs_and_asks_them():
    task = make(AdditionConfig(groups_per_step=5, group_size=3, num_test=4), attempts=2)
    assert problems_of(task, 2) == [Problem(*addition.training_problem(0, 2, i)) for i in range(5)]
    assert [builder.problem for builder in task.test_P] == [Problem(*pair) for pair in addition.test_problems(4)]
    assert [builder.group_size for builder in task.test_P] == [2] * 4
    envs_G = asyncio.run(task.train.get_batch(0)[0].make_envs())
    assert len(envs_G) == 3
    [message] = asyncio.run(envs_G[0].message_env.initial_observation())
    assert message["content"] == problems_of(task, 0)[0].question  # no suffix: the base model has never seen one
    wrong = asyncio.run(envs_G[0].message_env.step(Message(role="assistant", content="no idea")))
    assert wrong.reward == 0.0


class TwoProblems(ProblemSection):
    """Five problems to train on and two held out."""

    kind: str = "two"

    @property
    def tag(self) -> str:
        return "two"

    def load(self):
        return [Problem(f"q{i}", str(i)) for i in range(5)], [Problem("t0", "0"), Problem("t1", "1")]


@pytest.mark.parametrize("section", [AdditionConfig(groups_per_step=4, reward="random"), TwoProblems(groups_per_step=4, reward="random")])
def test_the_control_tosses_a_coin_for_each_attempt_and_none_in_the_test(section):
    def rewards(seed):
        task = make(section, seed=seed)
        assert all(builder.coin_seed is None for builder in task.test_P)
        envs = [env for builder in task.train.get_batch(3) for env in asyncio.run(builder.make_envs())]
        return [asyncio.run(env.message_env.step(Message(role="assistant", content="x"))).reward for env in envs]

    assert rewards(0) == rewards(0) != rewards(1)
    assert 4 <= sum(rewards(0)) <= 28


def test_a_section_asks_as_it_says_and_pays_as_it_says():
    task = make(TwoProblems(num_test=1, few_shot=False, suffix=" Box it.", format_coef=0.5, groups_per_step=2, group_size=3), attempts=4)
    assert len(task.train) == 3 and [builder.group_size for builder in task.test_P] == [4]
    [builder, _] = task.train.get_batch(0)
    assert builder.logging_tags() == ["two"] and builder.group_size == 3
    env = asyncio.run(builder.make_envs())[0].message_env
    [message] = asyncio.run(env.initial_observation())
    assert message["content"] == builder.problem.question + " Box it."
    assert asyncio.run(env.step(Message(role="assistant", content="no"))).reward == -0.5
    assert problems_of(task, 1) == problems_of(make(TwoProblems(groups_per_step=2)), 1)  # of seed and step alone
    assert any(
        problems_of(make(TwoProblems(groups_per_step=5), seed=seed), 0) != problems_of(make(TwoProblems(groups_per_step=5)), 0)
        for seed in (1, 2, 3)
    )


def test_one_path_without_the_other_is_refused():
    with pytest.raises(ValidationError, match="train_path is set but test_path is not; set both"):
        TwoProblems(train_path="a")
    with pytest.raises(ValidationError, match="test_path is set but train_path is not; set both"):
        TwoProblems(test_path="a")
    assert TwoProblems(train_path="a", test_path="b").files() == {"train_path": "a", "test_path": "b"}


def test_no_problems_at_all_is_an_error_that_names_the_file():
    class None_(TwoProblems):
        def load(self):
            return [Problem("q", "1")], []

    with pytest.raises(ConfigError, match=r"env two: no held-out problems found in b\.jsonl with these settings"):
        make(None_(train_path="a.jsonl", test_path="b.jsonl"))


def test_rows_become_problems_and_those_without_an_answer_are_counted(caplog):
    rows = [("f:1", {"q": " What? ", "a": " 1 "}), ("f:2", {"q": "x", "a": None}), ("f:3", {"q": "y", "a": " "})]
    found = problems_in(rows, question="q", answer=lambda where, row: optional_text(where, row, "a"))
    assert found == [Problem(" What? ", "1")]
    assert "2 problems without an answer are left out; the first is f:2" in caplog.text
    with pytest.raises(ConfigError, match=r'f:1: needed a text in the field "x", found \'None\'; the row has q, a'):
        problems_in(rows, question="x", answer=lambda where, row: "1")
    with pytest.raises(ConfigError, match=r'f:1: needed a text in the field "b"'):
        problems_in(rows, question="q", answer=lambda where, row: optional_text(where, row, "b"))
    with pytest.raises(ConfigError, match=r'f:1: needed a text in the field "a", found \'5\''):
        problems_in([("f:1", {"q": "x", "a": 5})], question="q", answer=lambda where, row: optional_text(where, row, "a"))


def test_held_out_questions_are_known_in_another_spelling_and_others_are_not():
    held_out = [Problem("Find $x$ if\n\\[x + 1 = 2.\\]", "1")]
    same = ["Find $x$ if\n\\[x + 1 = 2.\\]", "find x if \\[x+1=2\\]", "Find $x$ if \\[\\displaystyle x\\, + 1 = 2.\\]"]
    other = ["Find $x$ if\n\\[x - 1 = 2.\\]", "Find $x$ if\n\\[x + 1 = 3.\\]", "Find $y$ if\n\\[x + 1 = 2.\\]"]
    problems = [Problem(question, "1") for question in (*same, *other)]
    assert [problem.question for problem in without(problems, held_out)] == other
