"""Exit codes and sentences: a user's mistake is never a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from ptlab import cli
from ptlab.errors import CheckpointError, ConfigError, EngineError, PtlabError

ROOT = Path(__file__).parent.parent


def run_script(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *arguments]
    return subprocess.run(command, cwd=cwd, env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True, timeout=120, check=False)


def test_the_script_refuses_a_typo_in_one_sentence_from_any_directory(tmp_path: Path) -> None:
    done = run_script("--config", str(ROOT / "configs" / "quickstart.yaml"), "--set", "optim.learning_rat=1", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --set optim.learning_rat: unknown key (did you mean learning_rate?)\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError("a typo"), 2), (CheckpointError("a torn file"), 2), (EngineError("out of memory"), 1), (PtlabError("?"), 1)],
)
def test_errors_become_one_line_and_a_code(capsys: pytest.CaptureFixture[str], error: PtlabError, code: int) -> None:
    def command() -> int:
        raise error

    assert cli.guarded(command) == code
    assert capsys.readouterr().err == f"error: {error.message}\n"


def test_a_bug_keeps_its_traceback() -> None:
    def command() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.guarded(command)


def test_an_interrupt_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> int:
        raise KeyboardInterrupt

    assert cli.guarded(command) == 130
    assert "--resume" in capsys.readouterr().err


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands for the engines and the recipe; keeps the config it was called with, ends with `status`."""
    seen = SimpleNamespace(config=None, status="finished", closed=False)

    @contextmanager
    def open_service(config: Any) -> Any:
        yield SimpleNamespace(client="client", metrics=SimpleNamespace(take=lambda: {"sync/version": 1.0}))
        seen.closed = True

    async def run(config: Any, service_client: Any, log: Any, *, side_metrics: Any) -> SimpleNamespace:
        assert service_client == "client"
        seen.config = config
        if log.last_checkpoint() is None:
            log.write(0, {"reward/mean": 0.5} | side_metrics())
            log.checkpoint(1, "tinker://run/weights/step_1")
        return SimpleNamespace(status=seen.status, step=1, checkpoint="tinker://run/weights/step_1")

    local, table = ModuleType("ptlab.local"), ModuleType("ptlab.recipes.table")
    local.open_service, table.run = open_service, run  # type: ignore[attr-defined]
    for name, module in (("ptlab.local", local), ("ptlab.recipes.table", table)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("ptlab.local", local, raising=False)
    monkeypatch.setattr("ptlab.recipes.table", table, raising=False)
    return seen


def train(tmp_path: Path, *arguments: str) -> int:
    return cli.main(["train", "--config", str(ROOT / "configs" / "quickstart.yaml"), "--set", f"run_dir={tmp_path}", *arguments])


def test_train_opens_runs_and_closes(tmp_path: Path, recipe: SimpleNamespace) -> None:
    assert train(tmp_path, "--set", "steps=2", "--name", "1e3") == 0
    assert (recipe.config.name, recipe.config.steps, recipe.closed) == ("1e3", 2, True)  # a name is text, whatever it looks like
    assert (tmp_path / "1e3" / "metrics.jsonl").read_text(encoding="utf-8") == '{"step": 0, "reward/mean": 0.5, "sync/version": 1.0}\n'


def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path, recipe: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.status = "interrupted"
    assert train(tmp_path) == 130
    assert "stopped after 1 steps, checkpoint tinker://run/weights/step_1; continue with --resume" in capsys.readouterr().err


def test_a_second_run_of_the_same_name_is_refused(tmp_path: Path, recipe: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path) == 0
    assert train(tmp_path) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert train(tmp_path, "--overwrite") == 0
    assert train(tmp_path, "--resume") == 0


def test_biased_sampling_is_warned_of_on_stderr(tmp_path: Path, recipe: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path, "--set", "rollout.top_k=50") == 0
    assert "warning: rollout.top_k is 50: " in capsys.readouterr().err


def test_resume_and_overwrite_together_are_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        train(tmp_path, "--resume", "--overwrite")
    assert caught.value.code == 2


def test_doctor_passes_its_exit_code_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for code in (0, 1):
        monkeypatch.setattr("ptlab.doctor.main", lambda code=code: code)
        assert cli.main(["doctor"]) == code
