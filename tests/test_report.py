"""Text on the terminal: what stands in the line of a step and in the final table."""

from __future__ import annotations

from pathlib import Path

from ptlab.report import final_report, phase_seconds, progress_line


def test_a_progress_line_has_reward_accuracy_speed_and_phases() -> None:
    metrics = {
        "reward/mean": 0.53125, "train/accuracy": 0.6, "groups/skipped": 3.0, "groups/total": 16.0, "time/tokens_per_second": 1234.5,
        "time/sample_s": 1.26, "time/train_s": 0.8, "time/step_s": 2.1,
    }  # fmt: skip
    assert progress_line(8, 30, metrics) == (
        "step  9/30 | reward 0.531 | acc 0.600 | groups skipped 3/16 | 1,234 tok/s | sample 1.3 + train 0.8 s"
    )


def test_a_progress_line_says_what_is_special() -> None:
    assert progress_line(0, 5, {"eval/accuracy": 0.18, "eval/accuracy_greedy": 0.0}) == "step 1/5 | eval 0.180 greedy 0.000"
    assert progress_line(1, 5, {"reward/mean": 0.0, "batch/skipped": 1.0}) == "step 2/5 | reward 0.000 | no update: every group agreed"
    assert progress_line(5, 5, {"eval/accuracy": 0.9}) == "after the last step | eval 0.900"
    assert progress_line(1, 5, {"reward/mean": None}) == "step 2/5"


def test_recipes_without_rewards_show_the_loss_that_should_fall() -> None:
    assert progress_line(0, 5, {"train/nll": 0.5, "eval/nll": 0.25}) == "step 1/5 | nll 0.500 | eval nll 0.250"
    assert progress_line(0, 5, {"loss/dpo": 0.693, "train/accuracy": 0.5}) == "step 1/5 | acc 0.500 | dpo 0.693"
    rows = [{"step": 0, "optim/learning_rate": 1e-3, "train/nll": 0.5}, {"step": 1, "optim/learning_rate": 1e-3, "train/nll": 0.25}]
    lines = final_report(Path("runs/x"), rows, [], 1.0).splitlines()
    assert "2 training steps" in lines[1] and "  train/nll                  0.500     0.250    steps 0 and 1" in lines


def test_phases_leave_out_their_sum_and_what_is_no_time() -> None:
    assert phase_seconds(
        {"time/sample_s": 1, "time/step_s": 3, "time/rollout_s": 7.0, "time/tokens_per_second": 9.0, "reward/mean": 1, "time/eval_s": None}
    ) == {"sample": 1.0}


def test_the_final_table_compares_first_and_last_values() -> None:
    rows = [
        {"step": 0, "optim/learning_rate": 1e-3, "reward/mean": 0.25, "eval/accuracy": 0.2},
        {"step": 1, "optim/learning_rate": 1e-3, "reward/mean": 0.5},
        {"step": 2, "eval/accuracy": 0.875},
    ]
    lines = final_report(Path("runs/x"), rows, [], 12.4).splitlines()
    assert lines[1] == "runs/x: 2 training steps, 12 s in this process"
    assert "  eval/accuracy              0.200     0.875    steps 0 and 2" in lines
    assert "  reward/mean                0.250     0.500    steps 0 and 1" in lines


def test_before_and_after_take_the_first_and_last_answer_to_the_same_prompt() -> None:
    transcripts = [
        {"step": step, "split": split, "prompt": "What is 2+2?", "response": response, "reward": reward}
        for step, split, response, reward in (
            (0, "eval", "5\x1b[31m", 0.0), (0, "train", "7", 0.0), (1, "eval", "6", 0.0), (2, "eval", "4", 1.0), (2, "train", "8", 0.0),
        )
    ]  # fmt: skip
    transcripts.append({"step": 2, "split": "eval", "prompt": "asked only once", "response": "!", "reward": 0.0})
    text = final_report(Path("runs/x"), [], transcripts, 0.0)
    assert "    before (step 0, reward 0): 5\\x1b[31m\n    after (step 2, reward 1): 4" in text  # an answer cannot recolour the terminal
    assert "asked only once" not in text and "7" not in text and "6" not in text
