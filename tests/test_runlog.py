"""The run directory: what a kill leaves behind, what a resume keeps, and what is refused before anything is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ptlab.config import EvalConfig, LoggingConfig, RlConfig, RlOptimConfig, load_config
from ptlab.errors import ConfigError
from ptlab.runlog import CheckpointEntry, RunLog, newest_sampler_weights


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., RlConfig]:
    return lambda **fields: RlConfig(**{"name": "try", "run_dir": str(tmp_path), "steps": 6} | fields)


def rows(config: RlConfig, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.directory / name).read_text(encoding="utf-8").splitlines()]


def silent(_: str) -> None:
    """Swallows the progress lines."""


def run_steps(config: RlConfig, *, until: int, checkpoint_at: int | None = None) -> None:
    with RunLog.open(config, echo=silent) as log:
        for step in range(until):
            log.write(step, {"reward/mean": step / 10})
            log.transcripts(step, [{"split": "train", "prompt": "p", "response": str(step), "reward": 0.0}])
            if step + 1 == checkpoint_at:
                log.checkpoint(step + 1, f"tinker://run/weights/step_{step + 1}")


def test_a_new_run_has_its_config_and_provenance_before_the_first_step(make_config: Callable[..., RlConfig]) -> None:
    config = make_config(optim=RlOptimConfig(learning_rate=4e-5))
    with RunLog.open(config, echo=silent) as log:
        assert log.last_checkpoint() is None
        assert load_config(log.directory / "config.yaml") == config
        facts = json.loads((log.directory / "run.json").read_text(encoding="utf-8"))
    assert facts["versions"]["torch"].startswith("2.") and facts["command"][0] == sys.executable
    assert facts["hardware"]["num_cpus"] >= 1 and {"started", "git"} <= set(facts)


def test_a_row_is_one_json_line_and_what_is_no_number_becomes_null(make_config: Callable[..., RlConfig]) -> None:
    config = make_config()
    with RunLog.open(config, echo=silent) as log:
        log.write(
            0, {"reward/mean": 0.5, "loss/sum": float("nan"), "gap/max_nats": float("inf"), "batch/skipped": True, "groups/total": 16}
        )
    text = (config.directory / "metrics.jsonl").read_text(encoding="utf-8")
    assert text == ('{"step": 0, "reward/mean": 0.5, "loss/sum": null, "gap/max_nats": null, "batch/skipped": true, "groups/total": 16}\n')


def test_keys_without_an_area_and_repeated_steps_are_refused(make_config: Callable[..., RlConfig]) -> None:
    with RunLog.open(make_config(), echo=silent) as log:
        with pytest.raises(ValueError, match=r"\['loss:sum'\] are not of the form area/name"):
            log.write(0, {"loss:sum": 1.0})
        log.write(0, {"reward/mean": 1.0})
        with pytest.raises(ValueError, match="metrics of step 0 after those of step 0"):
            log.write(0, {"reward/mean": 1.0})


def test_a_directory_with_a_run_is_refused_and_left_alone(make_config: Callable[..., RlConfig]) -> None:
    config = make_config()
    run_steps(config, until=3, checkpoint_at=2)
    before = (config.directory / "metrics.jsonl").read_bytes()
    with pytest.raises(
        ConfigError, match=r"already holds a run \(3 rows of metrics, its last checkpoint is of step 2\).*--resume.*--overwrite"
    ):
        RunLog.open(config, echo=silent)
    assert (config.directory / "metrics.jsonl").read_bytes() == before


def test_overwrite_starts_afresh(make_config: Callable[..., RlConfig]) -> None:
    config = make_config()
    run_steps(config, until=3, checkpoint_at=2)
    (config.directory / "checkpoints" / "x").mkdir(parents=True)
    (config.directory / "notes.txt").touch()
    with RunLog.open(config, overwrite=True, echo=silent) as log:
        assert log.last_checkpoint() is None
        assert not (log.directory / "checkpoints").exists()
        assert (log.directory / "notes.txt").exists()  # not the run's own
        log.write(0, {"reward/mean": 1.0})
    assert rows(config) == [{"step": 0, "reward/mean": 1.0}]
    assert not (config.directory / "transcripts.jsonl").exists()


def test_resume_keeps_what_came_before_the_checkpoint_and_doubles_nothing(make_config: Callable[..., RlConfig]) -> None:
    config = make_config()
    run_steps(config, until=5, checkpoint_at=3)
    with RunLog.open(config, resume=True, echo=silent) as log:
        assert log.last_checkpoint() == CheckpointEntry(step=3, path="tinker://run/weights/step_3", kind="state")
        assert [row["step"] for row in rows(config)] == [0, 1, 2]
        assert [row["step"] for row in rows(config, "transcripts.jsonl")] == [0, 1, 2]
        for step in range(3, 6):
            log.write(step, {"reward/mean": step / 10})
        log.checkpoint(6, "tinker://run/weights/step_6")
    assert [row["step"] for row in rows(config)] == list(range(6))
    assert [row["step"] for row in rows(config, "checkpoints.jsonl")] == [3, 6]
    assert len(json.loads((config.directory / "run.json").read_text(encoding="utf-8"))["resumed"]) == 1


def test_resume_without_a_checkpoint_starts_over(make_config: Callable[..., RlConfig]) -> None:
    config = make_config()
    run_steps(config, until=2)
    with RunLog.open(config, resume=True, echo=silent) as log:
        assert log.last_checkpoint() is None
        log.write(0, {"reward/mean": 1.0})
    assert [row["step"] for row in rows(config)] == [0]


def test_resume_of_nothing_starts_and_says_so(make_config: Callable[..., RlConfig]) -> None:
    said: list[str] = []
    with RunLog.open(make_config(), resume=True, echo=said.append) as log:
        assert log.last_checkpoint() is None
    assert len(said) == 1 and "no run to resume, starting at step 0" in said[0]


def test_torn_last_lines_are_dropped(make_config: Callable[..., RlConfig]) -> None:
    config = make_config()
    run_steps(config, until=4, checkpoint_at=2)
    for name, torn in (
        ("metrics.jsonl", b'{"step": 1, "rew'),
        ("checkpoints.jsonl", b'{"step": 4, "path": "tinker://x/wei'),
        ("transcripts.jsonl", b"{"),
    ):
        with (config.directory / name).open("ab") as file:
            file.write(torn)
    with RunLog.open(config, resume=True, echo=silent) as log:
        last = log.last_checkpoint()
        assert last is not None and last.step == 2
        log.write(2, {"reward/mean": 0.2})
    assert [row["step"] for row in rows(config)] == [0, 1, 2]


def test_a_broken_line_in_the_middle_is_named(make_config: Callable[..., RlConfig]) -> None:
    config = make_config()
    run_steps(config, until=3, checkpoint_at=2)
    path = config.directory / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'{"step": 1', b'{"step": ?'))
    with pytest.raises(ConfigError, match=r"metrics\.jsonl line 2 is not JSON"):
        RunLog.open(config, resume=True, echo=silent)


def test_a_kill_9_leaves_whole_lines_and_a_free_directory(make_config: Callable[..., RlConfig]) -> None:
    config = make_config()
    script = f"""
import os, signal, sys
from ptlab.config import RlConfig
from ptlab.runlog import RunLog
log = RunLog.open(RlConfig(name="try", run_dir={config.run_dir!r}, steps=6), echo=lambda line: None)
for step in range(4):
    log.write(step, {{"reward/mean": step / 10}})
    if step == 1:
        log.checkpoint(2, "tinker://run/weights/step_2")
os.kill(os.getpid(), signal.SIGKILL)
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", script], cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, check=False)
    assert done.returncode == -9
    assert [row["step"] for row in rows(config)] == [0, 1, 2, 3]
    with RunLog.open(config, resume=True, echo=silent) as log:
        last = log.last_checkpoint()
        assert last is not None and last.step == 2


def test_two_writers_are_refused(make_config: Callable[..., RlConfig]) -> None:
    config = make_config()
    with RunLog.open(config, echo=silent), pytest.raises(ConfigError, match="another process is writing this run"):
        RunLog.open(config, overwrite=True, echo=silent)
    RunLog.open(config, resume=True, echo=silent).close()  # free again


def test_resume_refuses_another_config_but_not_another_length(make_config: Callable[..., RlConfig]) -> None:
    run_steps(make_config(), until=3, checkpoint_at=2)
    with pytest.raises(ConfigError, match=r"was started with another config \(optim\.learning_rate: was 0\.001, is 0\.002\)"):
        RunLog.open(make_config(optim=RlOptimConfig(learning_rate=2e-3)), resume=True, echo=silent)
    longer = make_config(steps=9, eval=EvalConfig(every=3))
    RunLog.open(longer, resume=True, echo=silent).close()
    assert load_config(longer.directory / "config.yaml").steps == 9


def test_resume_refuses_another_length_under_a_schedule(make_config: Callable[..., RlConfig]) -> None:
    run_steps(make_config(optim=RlOptimConfig(schedule="linear")), until=3, checkpoint_at=2)
    with pytest.raises(ConfigError, match="steps: was 6, is 9"):
        RunLog.open(make_config(steps=9, optim=RlOptimConfig(schedule="linear")), resume=True, echo=silent)


def test_resume_and_overwrite_exclude_each_other(make_config: Callable[..., RlConfig]) -> None:
    with pytest.raises(ConfigError, match="give one of the two"):
        RunLog.open(make_config(), resume=True, overwrite=True, echo=silent)


def test_a_run_directory_that_cannot_be_made_is_a_config_error(make_config: Callable[..., RlConfig], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be made"):
        RunLog.open(make_config(run_dir=str(tmp_path / "file")), echo=silent)


def test_the_same_checkpoint_saved_again_is_noted_once_and_adapters_do_not_resume(make_config: Callable[..., RlConfig]) -> None:
    config = make_config()
    with RunLog.open(config, echo=silent) as log:
        log.write(0, {"reward/mean": 0.0})
        for _ in range(2):
            log.checkpoint(1, "tinker://run/weights/step_1")
        log.checkpoint(5, "tinker://run/sampler_weights/final", kind="sampler")
        last = log.last_checkpoint()
    assert last is not None and last.step == 1
    assert [(row["step"], row["kind"]) for row in rows(config, "checkpoints.jsonl")] == [(1, "state"), (5, "sampler")]


def test_weights_of_a_run_directory_are_found_and_their_absence_is_explained(tmp_path: Path) -> None:
    weights = tmp_path / "run" / "checkpoints" / "m" / "sampler_weights" / "final"
    assert newest_sampler_weights(tmp_path) == tmp_path  # no run directory: taken as it is
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("{}")
    with pytest.raises(ConfigError, match="has saved no weights for sampling; let it end"):
        newest_sampler_weights(tmp_path / "run")
    rows = [{"step": step, "path": f"tinker://m/sampler_weights/{name}", "kind": "sampler"} for step, name in ((9, "final"), (3, "early"))]
    (tmp_path / "run" / "checkpoints.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError, match="a run on a server leaves them there: name tinker://m/sampler_weights/final"):
        newest_sampler_weights(tmp_path / "run")
    weights.mkdir(parents=True)
    assert newest_sampler_weights(tmp_path / "run") == weights


def test_transcripts_are_limited_per_call(make_config: Callable[..., RlConfig]) -> None:
    config = make_config(logging=LoggingConfig(transcripts=2))
    row = {"split": "train", "prompt": "ü", "response": "line\nbreak", "reward": 1.0}
    with RunLog.open(config, echo=silent) as log:
        log.transcripts(0, [row] * 5)
        log.transcripts(0, iter([row] * 5))
    assert rows(config, "transcripts.jsonl") == [{"step": 0} | row] * 4


def test_a_finished_run_has_a_picture_and_a_table(make_config: Callable[..., RlConfig]) -> None:
    said: list[str] = []
    with RunLog.open(make_config(), echo=said.append) as log:
        for step in range(2):
            log.write(step, {"reward/mean": 0.1 + step, "eval/accuracy": 0.2 + step / 2})
            log.transcripts(step, [{"split": "eval", "prompt": "1+1?", "response": f"answer {step}", "reward": float(step)}])
        log.finish()
    assert (log.directory / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(said) == 3
    assert (
        "eval/accuracy" in said[2] and "before (step 0, reward 0): answer 0" in said[2] and "after (step 1, reward 1): answer 1" in said[2]
    )
