"""What the loss benchmark compares, and at which size: a grid of variants, all of them configs of the RL recipe.

    setting     updates per batch x steps off-policy            1x0  4x0  1x2  4x2
    loss        importance_sampling, ppo, cispo, dro, gspo      each with its defaults
    correction  none, TIS (truncate), MIS (mask), per token     with steps off-policy only: on-policy the ratio that they bound is 1

`python scripts/benchmark_losses.py --quick` runs the quick plan; docs/loss-benchmark.md shows what came out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.loss_runs import read_curve, run_all
from ptlab.benchmarks.loss_results import Result, Variant
from ptlab.config import RlConfig, load_config

ROOT = Path(__file__).resolve().parent.parent
LOSSES = ("importance_sampling", "ppo", "cispo", "dro", "gspo")
CORRECTIONS = {"none": "{kind: none}", "TIS": "{kind: truncate, high: 2.0}", "MIS": "{kind: mask, low: 0.5, high: 2.0}"}
"""Bounds as verl's default, 2.0, and for the mask its inverse (docs/losses.md#truncated-and-masked-importance-sampling)."""
SETTINGS = ((1, 0), (4, 0), (1, 2), (4, 2))
"""Updates per batch, steps off-policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A benchmark of some size. All of its runs share everything but the variant and the seed."""

    name: str
    config: str
    """Below configs/."""
    overrides: tuple[str, ...]
    seeds: tuple[int, ...]
    jobs: int
    """Runs at a time, each in a process of its own."""


QUICK = Plan(
    name="quick",
    config="quickstart.yaml",
    overrides=(
        "steps=16",
        "env.groups_per_step=8",
        "env.num_test=160",
        "optim.learning_rate=1.5e-3",
        "engines.sampler.kind=torch",
        "eval={every: 4, greedy: false}",
        "checkpoint.every=0",
        "logging.transcripts=0",
    ),
    seeds=(0, 1, 2),
    jobs=2,
)
"""The quickstart on two CPU cores, in minutes."""

FULL = Plan(
    name="full",
    config="gsm8k.yaml",
    overrides=(
        "model.name=meta-llama/Llama-3.2-1B-Instruct",
        "steps=60",
        "env.groups_per_step=64",
        "optim.learning_rate=7.0e-5",
        "eval={every: 10, greedy: false}",
        "logging.transcripts=0",
    ),
    seeds=(0, 1, 2),
    jobs=1,
)
"""GSM8K on one GPU of 80 GB, in days, resumable at every 20th step. Never run yet. 7e-5 is a seventh of what ptlab.learning_rates gives
for its width, as the published 4e-5 is for the 8B model."""


def variants() -> list[Variant]:
    """The grid, in the order of the tables."""
    return [
        Variant(loss, correction, updates, ahead)
        for updates, ahead in SETTINGS
        for correction in (CORRECTIONS if ahead else ("none",))
        for loss in LOSSES
    ]


def config_of(plan: Plan, variant: Variant, seed: int, run_dir: Path, more: Sequence[str] = ()) -> RlConfig:
    """The run of a variant with a seed, in `run_dir`/<variant>-s<seed>.

    Args:
        more: overrides for every run alike, after the plan's.
    Raises: ConfigError if one of them is no setting.
    """
    own = [
        f"loss.name={variant.loss}",
        f"correction={CORRECTIONS[variant.correction]}",
        f"optim.updates_per_batch={variant.updates}",
        f"rollout.max_steps_off_policy={variant.ahead}",
        f"seed={seed}",
        f"name={variant.name}-s{seed}",
        f"run_dir={run_dir}",
    ]
    config = load_config(ROOT / "configs" / plan.config, [*plan.overrides, *more, *own])
    assert isinstance(config, RlConfig), "no other recipe takes these overrides"
    return config


def settings_that_differ(configs: Sequence[RlConfig]) -> set[str]:
    """Dotted names of what is not alike in all configs."""
    flat = [_flat(config.model_dump()) for config in configs]
    keys = {key for found in flat for key in found}
    return {key for key in keys if len({repr(found.get(key)) for found in flat}) > 1}


def _flat(nested: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(nested, dict):
        return {prefix: nested}
    return {name: value for key, item in nested.items() for name, value in _flat(item, f"{prefix}.{key}" if prefix else key).items()}


def measure(plan: Plan, run_dir: Path, more: Sequence[str], progress: Callable[[str], object]) -> list[Result]:
    """Run what is missing of a plan, a line of progress per run; seed by seed, so that what is there so far is a whole comparison."""
    planned = [(variant, seed, config_of(plan, variant, seed, run_dir, more)) for seed in plan.seeds for variant in variants()]
    about = {config.name: (variant, seed) for variant, seed, config in planned}
    results: dict[str, Result] = {}
    for config in run_all([config for _, _, config in planned], plan.jobs):
        result = Result(*about[config.name], read_curve(config))
        results[config.name] = result
        progress(f"{len(results)}/{len(about)} {config.name}: accuracy {result.curve.accuracy[-1]:.3f}, {result.curve.cpu_s[-1]:.1f} CPU-s")
    return [results[name] for name in about]
