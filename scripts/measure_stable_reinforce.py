#!/usr/bin/env python3
"""How losses stand stale data: `python scripts/measure_stable_reinforce.py [--losses ...] [--settings ...] [--seeds 0 1] [--out FILE]`.

Quickstart runs in this process on the torch sampler. A setting is lag,updates,learning_rate: batches sampled `lag` steps ahead
(rollout.max_steps_off_policy), `updates` optimizer steps on each. A loss is a name, or name,key=value,...; "inf" = 1e9, which is off.
Prints a row per run and medians per loss and setting; --out adds the rows to a file, and runs found there are not run again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two threads on busy cores spin at their barriers

from ptlab.cli import guarded
from ptlab.config import RlConfig, load_config
from ptlab.envs.env_section import TaskSetting
from ptlab.local import LocalService, open_service
from ptlab.recipes.held_out import rollout_settings
from ptlab.recipes.models import ServiceModels, run_renderer
from ptlab.recipes.training import adam_params
from ptlab.rl import datums, diagnostics, rollout
from ptlab.rl.advantages import group_centred
from ptlab.rl.evaluation import evaluate
from ptlab.rl.prefetch import Prefetch
from ptlab.rl.types import TrajectoryGroup
from ptlab.types import LossFnType

if TYPE_CHECKING:
    from ptlab.client.sampling import SamplingClient

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"
OFF = 1e9
METRICS = ("ratio:min", "ratio:max", "masked_fraction:mean", "truncated_fraction:mean", "clip_fraction:mean")
SETTINGS = ["0,1,1e-3", "4,1,1e-3", "4,4,1e-3", "8,4,1e-3", "4,4,3e-3", "8,1,3e-3"]
LOSSES = ["importance_sampling", "ppo", "cispo", "stable_reinforce"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one run was, and how it went."""

    loss: str
    setting: str
    seed: int
    steps: int
    greedy: dict[str, float]
    """Held-out accuracy at temperature 0 after so many steps."""
    accuracy: float
    """The same at temperature 1, at the end."""
    reward_mean: float
    """Over all batches: how fast it learned."""
    reward_last: float
    """Over the last five batches."""
    metrics: dict[str, float]
    """Of the losses: the largest (of ratio:min the smallest) over the run."""
    wall_s: float

    @property
    def key(self) -> tuple[str, str, int, int]:
        return self.loss, self.setting, self.seed, self.steps


def parse_loss(text: str) -> tuple[str, dict[str, float]]:
    name, *pairs = text.split(",")
    numbers = dict(pair.split("=", 1) for pair in pairs)
    return name, {key: OFF if value == "inf" else float(value) for key, value in numbers.items()}


def make_config(loss: str, setting: str, seed: int, args: argparse.Namespace, directory: str) -> RlConfig:
    lag, _, learning_rate = setting.split(",")
    name, numbers = parse_loss(loss)
    overrides = [
        "engines.sampler.kind=torch",
        f"engines.sampler.dtype={args.sampler_dtype}",
        f"seed={seed}",
        f"steps={args.steps}",
        f"run_dir={directory}",
        f"rollout.max_steps_off_policy={lag}",
        f"loss.name={name}",
        f"optim.learning_rate={float(learning_rate)}",
        *(f"loss.config.{key}={value}" for key, value in numbers.items()),
    ]
    config = load_config(CONFIG, overrides)
    assert isinstance(config, RlConfig)
    return config


async def train(config: RlConfig, service: LocalService, updates: int, evaluate_every: int) -> list[dict[str, float]]:
    """The recipe's loop with several updates per batch. Returns greedy accuracies, accuracy and rewards, and the losses' metrics."""
    training_client = await service.client.create_lora_training_client(
        base_model=config.model.name, rank=config.lora.rank, seed=config.seed, train_unembed=config.lora.train_unembed
    )
    renderer = run_renderer(config.model, training_client.get_tokenizer())
    models = ServiceModels(service.client, config.model, renderer)
    task = await config.env.make_task(TaskSetting(renderer=renderer, seed=config.seed, models=models))
    settings, loss_fn = rollout_settings(config.rollout, await models.context_length()), cast("LossFnType", config.loss.name)
    sampling_client = await training_client.save_weights_and_get_sampling_client()
    greedy: dict[str, float] = {}
    rewards: list[float] = []
    extremes: dict[str, float] = {}

    async def sample(step: int, newest: SamplingClient) -> list[TrajectoryGroup]:
        return await rollout.run_groups(task.train.get_batch(step), newest, settings, seed=(config.seed, "train", step))

    async with Prefetch(sample, first=0, end=config.steps, ahead=config.rollout.max_steps_off_policy) as batches:
        for step in range(config.steps):
            groups_P, _ = await batches.take(step, sampling_client)
            rewards.append(diagnostics.reward_metrics(groups_P)["reward/mean"])
            data_D = [d for g in groups_P for d in datums.group_to_datums(g, group_centred(g.rewards_G), loss=config.loss.name)]
            for _ in range(updates if data_D else 0):
                trained = training_client.forward_backward(data_D, loss_fn, config.loss.config)
                updated = training_client.optim_step(adam_params(config, step))
                output, _ = await trained, await updated
                for key in METRICS:
                    if key in output.metrics:
                        pick = min if key == "ratio:min" else max
                        extremes[key] = pick(extremes.get(key, output.metrics[key]), output.metrics[key])
            sampling_client = await training_client.save_weights_and_get_sampling_client()
            if (step + 1) % evaluate_every == 0 or step + 1 == config.steps:
                scores = (await evaluate(task.test_P, sampling_client, settings, seed=config.seed)).metrics
                greedy[str(step + 1)] = round(scores["eval/accuracy_greedy"], 4)
    last = rewards[-5:]
    summary = {"accuracy": scores["eval/accuracy"], "mean": statistics.fmean(rewards), "last": statistics.fmean(last)}
    return [greedy, summary, extremes]


def run_one(loss: str, setting: str, seed: int, args: argparse.Namespace) -> Run:
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        config = make_config(loss, setting, seed, args, directory)
        with open_service(config) as service:
            greedy, rewards, extremes = asyncio.run(train(config, service, int(setting.split(",")[1]), args.evaluate_every))
    return Run(
        loss=loss,
        setting=setting,
        seed=seed,
        steps=args.steps,
        greedy=greedy,
        accuracy=round(rewards["accuracy"], 4),
        reward_mean=round(rewards["mean"], 4),
        reward_last=round(rewards["last"], 4),
        metrics={key: float(f"{value:.3g}") for key, value in extremes.items()},
        wall_s=round(time.perf_counter() - began, 1),
    )


def table(runs: list[Run]) -> str:
    """Medians over the seeds, and the worst seed's greedy accuracy at the end."""
    lines = [
        "| lag,updates,lr | loss | greedy, median | worst | temperature 1 | reward, all steps | masked, most | truncated or clipped, most |"
    ]
    lines.append("|" + " --- |" * 8)
    for setting in dict.fromkeys(run.setting for run in runs):
        for loss in dict.fromkeys(run.loss for run in runs):
            group = [run for run in runs if (run.loss, run.setting) == (loss, setting)]
            if not group:
                continue
            finals = [run.greedy[str(run.steps)] for run in group]
            cut = [max(run.metrics.get("truncated_fraction:mean", 0.0), run.metrics.get("clip_fraction:mean", 0.0)) for run in group]
            cells = [
                f"{statistics.median(finals):.3f}",
                f"{min(finals):.3f}",
                f"{statistics.median(run.accuracy for run in group):.3f}",
                f"{statistics.median(run.reward_mean for run in group):.3f}",
                f"{max(run.metrics.get('masked_fraction:mean', 0.0) for run in group):.3f}",
                f"{max(cut):.3f}",
            ]
            lines.append(f"| {setting} | {loss} ({len(group)}) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure(args: argparse.Namespace) -> int:
    lines = args.out.read_text(encoding="utf-8").splitlines() if args.out is not None and args.out.exists() else []
    runs = [Run(**json.loads(line)) for line in lines]
    done = {run.key for run in runs}
    for seed in args.seeds:
        for setting in args.settings:
            for loss in args.losses:
                if (loss, setting, seed, args.steps) in done:
                    continue
                run = run_one(loss, setting, seed, args)
                runs.append(run)
                print(json.dumps(asdict(run)), flush=True)
                if args.out is not None:
                    with args.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(asdict(run)) + "\n")
    print(table(runs))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", default=LOSSES, help="name or name,key=value,...")
    parser.add_argument("--settings", nargs="+", default=SETTINGS, help="lag,updates,learning_rate")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--evaluate-every", type=int, default=10)
    parser.add_argument(
        "--sampler-dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: a sampler unlike the trainer"
    )
    parser.add_argument("--out", type=Path, default=None, help="JSONL of all runs")
    args = parser.parse_args()
    return guarded(lambda: measure(args))


if __name__ == "__main__":
    sys.exit(main())
