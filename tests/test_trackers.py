"""TensorBoard and W&B: asked for, used; asked for but not installed, refused by name; not asked for, not imported."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ptlab.config import LoggingConfig, RlConfig
from ptlab.errors import ConfigError
from ptlab.runlog import RunLog


def config(tmp_path: Path, **logging: Any) -> RlConfig:
    return RlConfig(name="try", run_dir=str(tmp_path), steps=4, logging=LoggingConfig(**logging))


def silent(_: str) -> None:
    """Swallows the progress lines."""


@pytest.mark.parametrize(("field", "package"), [({"tensorboard": True}, "tensorboard"), ({"wandb": "project"}, "wandb")])
def test_a_missing_package_is_a_config_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: dict[str, Any], package: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"logging.{package}: needs the package {package}, which is not installed; pip install {package}"):
        RunLog.open(config(tmp_path, **field), echo=silent)


def test_a_missing_package_leaves_the_run_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunLog.open(config(tmp_path), echo=silent) as log:
        log.write(0, {"reward/mean": 0.5})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError):
        RunLog.open(config(tmp_path, tensorboard=True), overwrite=True, echo=silent)
    assert (tmp_path / "try" / "metrics.jsonl").stat().st_size > 0


class FakeWandb:
    """Stands for the wandb package: keeps what was logged."""

    def __init__(self) -> None:
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []

    def init(self, **kwargs: Any) -> SimpleNamespace:
        self.inits.append(kwargs)
        return SimpleNamespace(id="abc", log=lambda metrics, step: self.logged.append((step, metrics)), finish=lambda: None)


def test_wandb_gets_every_row_and_a_resume_continues_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with RunLog.open(config(tmp_path, wandb="lab"), echo=silent) as log:
        log.write(0, {"reward/mean": 0.5, "loss/sum": float("nan")})
        log.checkpoint(1, "tinker://run/weights/1")
    with RunLog.open(config(tmp_path, wandb="lab"), resume=True, echo=silent) as log:
        log.write(1, {"reward/mean": 0.6})
    assert fake.logged == [(0, {"reward/mean": 0.5}), (1, {"reward/mean": 0.6})]
    assert [(init["project"], init["name"], init["id"]) for init in fake.inits] == [("lab", "try", None), ("lab", "try", "abc")]


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="the package tensorboard is not installed (extra: dev or logging)"
)
def test_tensorboard_holds_each_step_once_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog.open(config(tmp_path, tensorboard=True), echo=silent) as log:
        for step in range(3):
            log.write(step, {"reward/mean": step / 2})
        log.checkpoint(1, "tinker://run/weights/1")
    with RunLog.open(config(tmp_path, tensorboard=True), resume=True, echo=silent) as log:
        log.write(1, {"reward/mean": 0.75})
    events = EventAccumulator(str(tmp_path / "try" / "tensorboard"))
    events.Reload()
    assert [(event.step, list(event.tensor_proto.float_val)) for event in events.Tensors("reward/mean")] == [(0, [0.0]), (1, [0.75])]
