"""`ptlab eval` on a tiny model: what it asks and writes, that it says what a run's log says, and what it refuses."""

from __future__ import annotations

import argparse
import asyncio
import json

import pytest
import yaml

from ptlab import evaluate, runlog
from ptlab.config import RlConfig, SftConfig
from ptlab.errors import ConfigError
from ptlab.local import open_service
from ptlab.recipes import rl
from ptlab.rl.rollout import RolloutSettings
from ptlab.rl.types import RolloutError, Trajectory, TrajectoryGroup, Transition
from ptlab.runlog import RunLog
from ptlab.types import ModelInput


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.fixture
def config(tmp_path, tiny_qwen3_dir):
    sections = {
        "recipe": "rl",
        "name": "tiny",
        "run_dir": str(tmp_path / "runs"),
        "steps": 1,
        "model": {"name": "tiny", "path": str(tiny_qwen3_dir), "renderer": "chatml"},
        "lora": {"rank": 4},
        "env": {"kind": "addition", "groups_per_step": 2, "group_size": 3, "num_test": 4, "reward": "random"},
        "rollout": {"max_tokens": 5},
        "optim": {"learning_rate": 0.05},
        "engines": {"sampler": {"kind": "torch"}},
        "eval": {"every": 1, "attempts": 2, "greedy": False},
        "logging": {"transcripts": 4},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def test_it_says_what_the_log_of_the_run_says(tmp_path, config, monkeypatch, capsys):
    """The base model as before the first step, the run directory, its PEFT directory and its tinker:// path as after the last."""
    monkeypatch.setattr(runlog, "draw_curves", lambda *args, **kwargs: None)
    run_config = RlConfig.model_validate(yaml.safe_load(config.read_text()))
    with RunLog.open(run_config, echo=lambda line: None) as log, open_service(run_config) as service:
        asyncio.run(rl.run(run_config, service.client, log))
    run_dir = tmp_path / "runs" / "tiny"
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    [sampler] = [row for row in map(json.loads, (run_dir / "checkpoints.jsonl").read_text().splitlines()) if row["kind"] == "sampler"]
    directory = run_dir / "checkpoints" / sampler["path"].removeprefix("tinker://")
    transcripts = [json.loads(line) for line in (run_dir / "transcripts.jsonl").read_text().splitlines()]
    answers = []
    for number, (checkpoint, row) in enumerate([(None, rows[0]), *((path, rows[1]) for path in (run_dir, directory, sampler["path"]))]):
        out = tmp_path / f"eval{number}"
        given = [] if checkpoint is None else ["--checkpoint", str(checkpoint)]
        assert evaluate.main(parsed("--config", str(config), *given, "--attempts", "2", "--out", str(out))) == 0
        report = json.loads((out / "summary.json").read_text())
        assert report["tokens_mean"] == row["eval/tokens_mean"] and report["accuracy"] == row["eval/accuracy"]
        assert report["pass_at_k"] == {"1": row["eval/pass@1"], "2": row["eval/pass@2"]}
        problems = [json.loads(line) for line in (out / "problems.jsonl").read_text().splitlines()]
        assert [problem["problem"] for problem in problems] == [0, 1, 2, 3] and all(len(item["answers"]) == 2 for item in problems)
        assert problems[0]["prompt"].endswith((".", "?")) and problems[0]["attempts"] == 2
        logged = [shown["response"] for shown in transcripts if (shown["split"], shown["step"]) == ("eval", row["step"])]
        assert [problem["answers"][0]["metrics"]["correct"] for problem in problems] == [0.0] * 4 and len(logged) == 4
        assert [shown in problem["answers"][0]["response"] for shown, problem in zip(logged, problems, strict=True)] == [True] * 4
        answers.append([[answer["response"] for answer in problem["answers"]] for problem in problems])
    assert answers[0] != answers[1] == answers[2] == answers[3]
    assert "accuracy" in capsys.readouterr().out and len(rows) == 2
    with pytest.raises(ConfigError, match="holds an evaluation already"):
        evaluate.main(parsed("--config", str(config), "--out", str(tmp_path / "eval0")))


def test_greedy_is_temperature_0(tmp_path, config):
    assert evaluate.main(parsed("--config", str(config), "--temperature", "0", "--out", str(tmp_path / "e"))) == 0
    assert json.loads((tmp_path / "e" / "summary.json").read_text())["temperature"] == 0
    with pytest.raises(ConfigError, match="greedy attempts are all alike"):
        evaluate.main(parsed("--config", str(config), "--temperature", "0", "--attempts", "2"))


def test_what_is_refused(tmp_path, config):
    with pytest.raises(ConfigError, match="no adapter here"):
        evaluate.main(parsed("--config", str(config), "--checkpoint", str(tmp_path)))
    with pytest.raises(ConfigError, match=r"looked for in the run directory .*runs/tiny, which has no checkpoints"):
        evaluate.main(parsed("--config", str(config), "--checkpoint", "tinker://a/sampler_weights/b"))
    assert not (tmp_path / "runs").exists()
    with pytest.raises(ConfigError, match=r"recipe 'sft' without eval.env"):
        evaluate.asked_of(SftConfig(name="x"), "x.yaml")
    for bad in (("--attempts", "0"), ("--temperature", "-1"), ("--temperature", "inf")):
        with pytest.raises(SystemExit):
            parsed("--config", "x", *bad)


# ------------------------------------------------------------------------------------------------------------ without a model


class Tokenizer:
    def decode(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))


def group(*correct: float, errors: int = 0) -> TrajectoryGroup:
    trajectories = [
        Trajectory(
            transitions=[
                Transition(
                    observation=ModelInput.from_ints([7, 8]),
                    action=[1, 2, 3],
                    sampling_logprobs_T=[-1.0] * 3,
                    policy_version=None,
                    stop_reason="length" if value else "stop",
                    reward=2 * value,
                    episode_done=True,
                    metrics={"correct": value, "moves": 3},
                )
            ],
            stop_reason="done",
        )
        for value in correct
    ]
    lost = [RolloutError(error_type="E", error_message="broke")] * errors
    return TrajectoryGroup(trajectories_G=trajectories, final_rewards_G=[0.0] * len(correct), metrics_G=[{}] * len(correct), errors=lost)


def test_the_numbers_of_a_report_by_hand():
    report = evaluate.summarise([group(1.0, 0.0), group(0.0, errors=1), group(1.0, 1.0)], RolloutSettings(max_tokens=3), 1.5)
    assert (report["problems"], report["attempts"], report["accuracy"]) == (3, 2, 0.5)  # a lost attempt is a wrong one
    assert report["pass_at_k"] == {"1": pytest.approx(0.5), "2": pytest.approx(2 / 3)}
    assert (report["tokens_mean"], report["tokens_sum"], report["env_errors"]) == (3, 15, 1)
    assert report["cut_off_frac"] == 3 / 5 and report["metrics"]["eval/moves"] == 3
    low, high = report["interval_95"]
    assert 0 < low < 0.5 < high < 1
    text = evaluate.as_text(report | {"model": "m", "checkpoint": None})
    assert "3 problems x 2 attempts" in text and "pass@2        0.667" in text and "lost          1" in text


def test_a_problem_shows_every_answer():
    row = evaluate.problem_row(4, group(1.0, 0.0, errors=1), Tokenizer())
    assert (row["problem"], row["prompt"], row["right"], row["attempts"], row["errors"]) == (4, "7 8", 1, 3, ["broke"])
    assert [answer["reward"] for answer in row["answers"]] == [2.0, 0.0]
    assert row["answers"][0]["response"] == "1 2 3" and row["answers"][0]["metrics"] == {"correct": 1.0, "moves": 3}
    assert evaluate.problem_row(0, group(errors=2), Tokenizer())["prompt"] == ""
