"""docs/data: what the pictures are drawn from, small enough to be kept, so that they can be drawn again without training.

runs.jsonl      {"run": "docs-control", "config": {...}, "rows": [{"step": 0, "eval/accuracy": ...}, ...]} per run
group.json      one group of the quickstart's first step: tokens, log-probabilities, rewards, and the datums made of it
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ptlab.config import RlConfig, RunConfig
from ptlab.config.yaml12 import parse_yaml
from ptlab.envs.env_section import TaskSetting
from ptlab.errors import ConfigError
from ptlab.recipes.models import ServiceModels, run_renderer
from ptlab.rl import datums, rollout
from ptlab.rl.advantages import group_centred
from ptlab.runlog import read_metrics

if TYPE_CHECKING:
    from ptlab.client.service import ServiceClient

KEPT_METRICS = (
    "step", "eval/accuracy", "eval/accuracy_greedy", "reward/mean", "answer/tokens_mean", "groups/skipped", "groups/total",
    "policy/entropy_nats", "gap/ratio_max", "gap/kl_sampler_trainer_nats", "optim/grad_norm",
)  # fmt: skip
KEPT_SETTINGS = ("seed", "steps", "loss.name", "optim.learning_rate", "env.group_size", "env.groups_per_step", "env.reward")


@dataclass(frozen=True, slots=True)
class Run:
    """What is kept of a run."""

    name: str
    config: Mapping[str, Any]
    """Of KEPT_SETTINGS, dotted."""
    rows: Sequence[Mapping[str, float]]

    def points(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of a metric, where it was measured."""
        seen = [(row["step"], row[key]) for row in self.rows if key in row]
        return [step for step, _ in seen], [value for _, value in seen]


def read_runs(path: Path) -> dict[str, Run]:
    """Name -> run of a runs.jsonl."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {line["run"]: Run(line["run"], line["config"], line["rows"]) for line in lines}


def keep_runs(directories: Sequence[Path], path: Path) -> None:
    """Write the kept part of these run directories; runs of the file that are not among them stay."""
    lines = {name: {"run": name, "config": dict(run.config), "rows": list(run.rows)} for name, run in _known(path).items()}
    for directory in directories:
        rows = [{key: _short(row[key]) for key in KEPT_METRICS if row.get(key) is not None} for row in read_metrics(directory)]
        lines[directory.name] = {"run": directory.name, "config": _settings(directory / "config.yaml"), "rows": rows}
    path.write_text("".join(json.dumps(lines[name]) + "\n" for name in sorted(lines)), encoding="utf-8")


async def record_group(config: RunConfig, service_client: ServiceClient, index: int) -> dict[str, Any]:
    """Sample group `index` of a run's first step from the untrained model, as recipes/rl.py does, and take it apart.

    Raises: ConfigError if the config is of another recipe.
    """
    if not isinstance(config, RlConfig):
        raise ConfigError(f"recipe is {config.recipe!r}; a group of attempts is sampled by recipe 'rl'")
    sampling_client = await service_client.create_sampling_client(base_model=config.model.name)
    tokenizer = sampling_client.get_tokenizer()
    renderer = run_renderer(config.model, tokenizer)
    models = ServiceModels(service_client, config.model, renderer)
    task = await config.env.make_task(TaskSetting(renderer=renderer, seed=config.seed, models=models))
    settings = rollout.RolloutSettings(max_tokens=config.rollout.max_tokens, temperature=config.rollout.temperature)
    seed = (config.seed, "train", 0, index)  # that of recipes/rl.py: run, split, step; then the group
    group = await rollout.run_group(task.train.get_batch(0)[index], sampling_client, settings, seed=seed)
    first = group.trajectories_G[0].transitions[0]
    prompt = cast("list[int]", datums.elements_of(first.observation))
    attempts = []
    for trajectory, advantage in zip(group.trajectories_G, group_centred(group.rewards_G), strict=True):
        action = list(trajectory.transitions[0].action)
        [datum] = datums.trajectory_to_datums(trajectory, advantage)
        attempts.append(
            {
                "pieces": [tokenizer.decode([token]) for token in action],
                "tokens": action,
                "logprobs": [_short(value) for value in trajectory.transitions[0].sampling_logprobs_T],
                "reward": trajectory.step_reward,
                "advantage": advantage,
                "datum": {name: [_short(value) for value in tensor.to_numpy().tolist()] for name, tensor in datum.loss_fn_inputs.items()},
            }
        )
    return {"prompt": prompt, "prompt_pieces": [tokenizer.decode([token]) for token in prompt], "attempts": attempts}


def write_group(group: Mapping[str, Any], path: Path) -> None:
    """Write a record_group, one attempt per line."""
    attempts = ",\n  ".join(json.dumps(attempt) for attempt in group["attempts"])
    head = json.dumps({name: value for name, value in group.items() if name != "attempts"})
    path.write_text(f'{head[:-1]}, "attempts": [\n  {attempts}\n]}}\n', encoding="utf-8")


def _known(path: Path) -> dict[str, Run]:
    return read_runs(path) if path.exists() else {}


def _settings(path: Path) -> dict[str, Any]:
    loaded = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    found = {}
    for dotted in KEPT_SETTINGS:
        value: Any = loaded
        for key in dotted.split("."):
            value = value[key]
        found[dotted] = value
    return found


def _short(value: float) -> float:
    """Five digits are more than a picture shows."""
    return value if isinstance(value, int) else float(f"{value:.5g}")
