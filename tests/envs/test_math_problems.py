"""Problems: what is asked, what it pays, which come when, and where they are loaded from."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path

import pytest

from ptlab.envs import addition
from ptlab.envs.math_problems import FEW_SHOT, Problem, ProblemEnv, ProblemFormat, addition_task, gsm8k_task, load_problems, shuffled
from ptlab.errors import ConfigError
from ptlab.renderers import Message
from ptlab.rl.types import Task

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"


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


def problems_of(task: Task, step: int) -> list[Problem]:
    return [builder.problem for builder in task.train.get_batch(step)]


def test_addition_trains_off_the_test_pairs_and_asks_them():
    task = addition_task(None, groups_per_step=5, group_size=3, num_test=4, seed=0, reward="correct")
    assert problems_of(task, 2) == [Problem(*addition.training_problem(0, 2, i)) for i in range(5)]
    assert [builder.problem for builder in task.test_P] == [Problem(*pair) for pair in addition.test_problems(4)]
    assert [builder.group_size for builder in task.test_P] == [1] * 4
    envs_G = asyncio.run(task.train.get_batch(0)[0].make_envs())
    assert len(envs_G) == 3
    [message] = asyncio.run(envs_G[0].message_env.initial_observation())
    assert message["content"] == problems_of(task, 0)[0].question  # no suffix: the base model has never seen one
    wrong = asyncio.run(envs_G[0].message_env.step(Message(role="assistant", content="no idea")))
    assert wrong.reward == 0.0


def test_random_addition_tosses_a_coin_for_each_attempt_and_none_in_the_test():
    def rewards(seed):
        task = addition_task(None, groups_per_step=4, group_size=8, num_test=2, seed=seed, reward="random")
        assert all(builder.coin_seed is None for builder in task.test_P)
        envs = [env for builder in task.train.get_batch(3) for env in asyncio.run(builder.make_envs())]
        return [asyncio.run(env.message_env.step(Message(role="assistant", content="x"))).reward for env in envs]

    assert rewards(0) == rewards(0) != rewards(1)
    assert 4 <= sum(rewards(0)) <= 28


@pytest.mark.skipif(not GSM8K.exists(), reason="the shared GSM8K rows are not on this machine")
def test_gsm8k_from_local_files():
    task = gsm8k_task(
        None,
        groups_per_step=128,
        group_size=16,
        num_test=10,
        seed=0,
        train_path=str(GSM8K / "train.jsonl"),
        test_path=str(GSM8K / "test.jsonl"),
    )
    assert len(task.train) == 59 and len(task.test_P) == 10  # 7473 problems: 58 full batches and a part
    assert task.test_P[0].problem.question.startswith("Janet") and task.test_P[0].problem.answer == "18"
    assert all(problem.answer.replace(".", "").replace("-", "").isdigit() for problem in problems_of(task, 0))


def test_local_rows_may_give_the_answer_alone(tmp_path):
    path = tmp_path / "p.jsonl"
    lines = ['{"question": "a\u2028b", "answer": "\\\\frac{1}{2}"}', "", '{"question": "c", "answer": "x\\n#### 1,234"}']
    path.write_text("\n".join(lines), encoding="utf-8")
    assert load_problems(str(path), hub_name="", split="train") == [Problem("a\u2028b", "\\frac{1}{2}"), Problem("c", "1234")]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "no problems found"),
        ("{", r"p\.jsonl:1: not JSON"),
        (json.dumps({"question": "a", "answer": "1"}) + "\n[1]", r"p\.jsonl:2: needed an object"),
        (json.dumps({"question": "a", "answer": 1}), r"p\.jsonl:1: needed an object"),
        (json.dumps({"question": "a", "answer": "two\nlines"}), r"p\.jsonl:1: .*####"),
        (json.dumps({"question": "a", "answer": ""}), r"p\.jsonl:1: .*####"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path, content, says):
    path = tmp_path / "p.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=says):
        load_problems(str(path), hub_name="", split="train")
    with pytest.raises(ConfigError, match="cannot read"):
        load_problems(str(tmp_path / "absent.jsonl"), hub_name="", split="train")


def test_the_hub_is_asked_by_name_and_its_absence_is_one_sentence(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return [{"question": "q", "answer": "so\n#### 4"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_problems(None, hub_name="openai/gsm8k", split="train") == [Problem("q", "4")]
    assert asked == [(("openai/gsm8k", "main"), {"split": "train"})]

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ConfigError, match=r"'openai/gsm8k' \(test\).*no route to host; with no network, set env\.train_path"):
        load_problems(None, hub_name="openai/gsm8k", split="test")
