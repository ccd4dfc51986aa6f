"""Runs of the RL recipe as points of comparison: run what is not there yet, several at a time.

A run directory with all its steps is not run again, one that was cut off goes on from its last checkpoint.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from ptlab.benchmarks.loss_curves import CPU_SECONDS, Curve, curve_of
from ptlab.config import RlConfig
from ptlab.errors import EngineError
from ptlab.runlog import METRICS, RunLog, read_metrics
from ptlab.tiny_models.table import tiny_model_directory


def run_all(configs: Sequence[RlConfig], jobs: int) -> Iterator[RlConfig]:
    """Run these to their end, `jobs` at a time, each process one run after the other; yields each config as its run ends."""
    todo = []
    for config in configs:
        if is_finished(config):
            yield config
        else:
            todo.append(config)
    if not todo:
        return
    for name in {config.model.name for config in todo}:
        tiny_model_directory(name)  # made on first use: here, or by every process at once
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:  # torch's threads do not survive a fork
        pending = {pool.submit(run_one, config): config for config in todo}
        for done in as_completed(pending):
            try:
                done.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
            yield pending[done]


def run_one(config: RlConfig) -> None:
    """Start or resume a run, and see it to its end. Raises: EngineError if it was interrupted."""
    from ptlab import local
    from ptlab.recipes import rl

    with RunLog.open(config, resume=True, echo=lambda line: None) as log:
        spent = _rows(config)[-1][CPU_SECONDS] if _rows(config) else 0.0
        began = time.process_time()
        with local.open_service(config) as service:

            def side_metrics() -> dict[str, float]:
                return service.metrics.take() | {CPU_SECONDS: spent + time.process_time() - began}

            result = asyncio.run(rl.run(config, service.client, log, side_metrics=side_metrics))
    if result.status == "interrupted":
        raise EngineError(f"{config.directory}: interrupted after {result.step} steps; the same command goes on with it")


def is_finished(config: RlConfig) -> bool:
    """The run directory holds all steps of exactly this config."""
    path = config.directory / "config.yaml"
    rows = _rows(config)
    return bool(rows) and rows[-1]["step"] == config.steps and path.read_text(encoding="utf-8") == config.to_yaml()


def read_curve(config: RlConfig) -> Curve:
    """What a finished run's metrics say."""
    return curve_of(read_metrics(config.directory))


def _rows(config: RlConfig) -> list[dict[str, Any]]:
    path = config.directory / METRICS
    return read_metrics(config.directory) if path.exists() and path.stat().st_size else []
