"""Learning from another model, and from oneself under a prompt: on real engines and a tiny random transformer."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from ptlab import runlog
from ptlab.config import RunConfig
from ptlab.config.distill import OnPolicyDistillConfig, PromptDistillConfig, TeacherConfig
from ptlab.config.sft import SftConfig
from ptlab.errors import ConfigError
from ptlab.local import open_service
from ptlab.recipes import on_policy_distill, prompt_distill, sft
from ptlab.recipes.teachers import open_teacher
from ptlab.renderers import get_renderer
from ptlab.rl.types import RolloutError, Trajectory, TrajectoryGroup, Transition
from ptlab.runlog import RunLog
from ptlab.types import ModelInput

ENV = {"kind": "addition", "groups_per_step": 8, "group_size": 1, "num_test": 3}
RUNS = {OnPolicyDistillConfig: on_policy_distill.run, PromptDistillConfig: prompt_distill.run, SftConfig: sft.run}


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr(runlog, "draw_curves", lambda *args, **kwargs: None)  # a second each, and not the question here


def train(kind: type[RunConfig], directory: Path, model_dir: Path, *, resume: bool = False, **changes) -> list[dict[str, float]]:
    sections = {
        "name": "run",
        "run_dir": str(directory),
        "steps": 4,
        "model": {"name": "tiny", "path": str(model_dir), "renderer": "chatml"},
        "lora": {"rank": 8},
        "optim": {"learning_rate": 0.01},
        "engines": {"sampler": {"kind": "torch"}},
        "checkpoint": {"every": 2},
        "eval": {"every": 2},
    }
    config = kind.model_validate(sections | changes)
    with RunLog.open(config, resume=resume, echo=lambda line: None) as log, open_service(config) as service:
        asyncio.run(RUNS[kind](config, service.client, log))
    return [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]


def without_clock(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if not key.startswith(("time/", "sync/"))} for row in rows]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, tiny_qwen3_dir) -> Path:
    """A run directory: the tiny model after a few steps on sums."""
    directory = tmp_path_factory.mktemp("teacher")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runlog, "draw_curves", lambda *args, **kwargs: None)
        data = {"kind": "sums", "num_train": 64, "num_test": 4}
        train(SftConfig, directory, tiny_qwen3_dir, steps=20, data=data, eval={"every": 0}, batch={"conversations": 8})
    return directory / "run"


def test_the_reverse_kl_to_the_teacher_falls(tmp_path, tiny_qwen3_dir, teacher):
    changes = {"env": ENV | {"groups_per_step": 32}, "rollout": {"max_tokens": 8}, "eval": {"every": 0}}
    rows = train(OnPolicyDistillConfig, tmp_path, tiny_qwen3_dir, teacher={"path": str(teacher)}, steps=16, **changes)
    kl = [row["kl/policy_reference_nats"] for row in rows]
    assert kl[0] > 0.5 and sum(kl[-3:]) / 3 < 0.75 * kl[0]
    assert all(row["batch/datums"] == 32 for row in rows)  # those that earn alike train as well


def test_who_is_its_own_teacher_has_nothing_to_learn(tmp_path, tiny_qwen3_dir):
    rows = train(
        OnPolicyDistillConfig, tmp_path, tiny_qwen3_dir, teacher={"base_model": "tiny"}, env=ENV, rollout={"max_tokens": 6}, steps=1
    )
    assert abs(rows[0]["kl/policy_reference_nats"]) < 1e-5 and rows[0]["kl/advantage_std"] < 1e-4


@pytest.mark.parametrize("kind", [OnPolicyDistillConfig, PromptDistillConfig])
def test_a_resumed_run_is_the_unbroken_one(tmp_path, tiny_qwen3_dir, teacher, kind):
    changes = {"env": ENV, "rollout": {"max_tokens": 6}, "teacher": {"path": str(teacher)}}
    changes |= {"prefix": [{"role": "system", "content": "Add."}]} if kind is PromptDistillConfig else {}
    whole = train(kind, tmp_path / "a", tiny_qwen3_dir, **changes)
    train(kind, tmp_path / "b", tiny_qwen3_dir, **changes | {"steps": 2})
    resumed = train(kind, tmp_path / "b", tiny_qwen3_dir, resume=True, **changes)
    assert len(whole) == 5
    for row, other in zip(without_clock(resumed), without_clock(whole), strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-3)  # the loss adds up advantages whose mean is 0: rounding


def test_the_student_learns_what_the_teacher_says_under_the_prompt(tmp_path, tiny_qwen3_dir):
    prefix = [{"role": "system", "content": "Ones, Tens, Hundreds."}, {"role": "user", "content": "Hi"}]
    changes = {"rollout": {"max_tokens": 6, "temperature": 0.3}, "eval": {"every": 0}, "optim": {"learning_rate": 0.02}}
    rows = train(PromptDistillConfig, tmp_path, tiny_qwen3_dir, prefix=prefix, env=ENV | {"groups_per_step": 24}, steps=14, **changes)
    nll = [row["train/nll"] for row in rows]
    assert nll[0] > 0.5 and sum(nll[-3:]) / 3 < 0.7 * nll[0]


def test_only_right_answers_are_kept_on_request(tmp_path, tiny_qwen3_dir):
    changes = {"prefix": [{"role": "system", "content": "x"}], "env": ENV, "rollout": {"max_tokens": 4}, "eval": {"every": 0}, "steps": 1}
    [row] = train(PromptDistillConfig, tmp_path, tiny_qwen3_dir, keep="right", **changes)
    assert row["batch/skipped"] == 1 and row["train/accuracy"] == 0 and "train/nll" not in row  # a random model is never right


# ------------------------------------------------------------------------------------------------------------ without a model


def answered(*correct: float, turns: int = 1) -> TrajectoryGroup:
    transition = Transition(
        observation=ModelInput.from_ints([9, 9, 9, 1, 2]),
        action=[5, 6],
        sampling_logprobs_T=[-1.0, -1.0],
        policy_version=0,
        stop_reason="stop",
        reward=0.0,
        episode_done=True,
    )
    trajectories = [Trajectory(transitions=[replace(transition, metrics={"correct": c})] * turns, stop_reason="done") for c in correct]
    return TrajectoryGroup(trajectories_G=trajectories, final_rewards_G=[0.0] * len(correct), metrics_G=[{}] * len(correct))


def test_the_answer_stands_behind_the_question_without_the_prefix():
    plain = [ModelInput.from_ints([1, 2])] * 2
    data = prompt_distill.student_datums(answered(1.0, 0.0), plain, only_right=False)
    assert len(data) == 2 and data[0].model_input.to_ints() == [1, 2, 5]
    assert data[0].loss_fn_inputs["target_tokens"].to_numpy().tolist() == [2, 5, 6]
    assert data[0].loss_fn_inputs["weights"].to_numpy().tolist() == [0.0, 1.0, 1.0]
    assert len(prompt_distill.student_datums(answered(1.0, 0.0), plain, only_right=True)) == 1


def test_questions_and_answers_that_cannot_be_paired_are_left_out():
    lost = replace(answered(1.0), errors=[RolloutError(error_type="E", error_message="e")])
    assert prompt_distill.student_datums(lost, [ModelInput.from_ints([1])] * 2, only_right=False) == []
    with pytest.raises(ConfigError, match="an attempt has 2 turns"):
        prompt_distill.student_datums(answered(1.0, turns=2), [ModelInput.from_ints([1])], only_right=False)


def test_a_teacher_with_other_tokens_is_refused(tiny_qwen3_dir):
    from transformers import AutoTokenizer

    student = get_renderer("chatml", AutoTokenizer.from_pretrained(tiny_qwen3_dir))

    class Shifted:
        codec = type("Codec", (), {"encode": staticmethod(lambda text: [token + 1 for token in student.codec.encode(text)])})()

    class Models:
        def __init__(self, renderer):
            self.renderer = renderer

        async def open(self, *, base_model, model_path):
            return (base_model, model_path), self.renderer

    teacher = TeacherConfig(base_model="b", path="tinker://x")
    assert asyncio.run(open_teacher(teacher, Models(student), student)) == ("b", "tinker://x")
    with pytest.raises(ConfigError, match=r"teacher\.base_model 'b' has another tokenizer"):
        asyncio.run(open_teacher(teacher, Models(Shifted()), student))


def test_what_a_config_refuses():
    with pytest.raises(ValueError, match="its own teacher"):
        OnPolicyDistillConfig.model_validate({"name": "x", "teacher": {}})
    with pytest.raises(ValueError, match="takes no advantages"):
        OnPolicyDistillConfig.model_validate({"name": "x", "teacher": {"path": "p"}, "loss": {"name": "cross_entropy"}})
    with pytest.raises(ValueError, match="samples on-policy"):
        OnPolicyDistillConfig.model_validate({"name": "x", "teacher": {"path": "p"}, "rollout": {"max_steps_off_policy": 1}})
    with pytest.raises(ValueError, match="prefix"):
        PromptDistillConfig.model_validate({"name": "x", "prefix": []})
