"""`ptlab eval`: a task's held-out problems x a checkpoint x a way to sample -> accuracy with its interval, pass@k, tokens, every answer.

    ptlab eval --config configs/gsm8k.yaml --checkpoint runs/gsm8k --attempts 8 --temperature 1.0 --out evals/gsm8k

The same problems, seeds and settings as the evaluations of a training run, so that at the same temperature and attempts it says what
the run's log says. docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptlab.config import OfflineConfig, RlConfig, RolloutConfig, RunConfig, SftConfig, load_config
from ptlab.config.distill import OnPolicyDistillConfig, PromptDistillConfig
from ptlab.envs.env_section import EnvSection, TaskSetting
from ptlab.errors import ConfigError
from ptlab.rl import diagnostics
from ptlab.rl.evaluation import greedy_settings, summary
from ptlab.rl.rollout import RolloutSettings, run_groups
from ptlab.rl.statistics import accuracy_interval, mean_pass_at_k, powers_of_two
from ptlab.rl.types import Trajectory, TrajectoryGroup

if TYPE_CHECKING:
    from ptlab.client.service import ServiceClient
    from ptlab.local import LocalService

SUMMARY, PROBLEMS = "summary.json", "problems.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ptlab eval`."""
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML config whose env, model and rollout are meant")
    example = "override one key, e.g. --set env.num_test=100; may be repeated"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=example)
    where = (
        "adapter: a run directory, a directory in PEFT layout, or tinker://... of the config's run or of the server (default: base model)"
    )
    parser.add_argument("--checkpoint", metavar="PATH", help=where)
    parser.add_argument(
        "--attempts", type=_positive, default=1, metavar="N", help="attempts at each problem; pass@k for k up to N (default: 1)"
    )
    parser.add_argument("--temperature", type=_not_negative, default=1.0, metavar="T", help="0 = greedy (default: 1.0)")
    parser.add_argument("--base-url", metavar="URL", help="sample on this server (key: TINKER_API_KEY) instead of engines in this process")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"write {SUMMARY} and {PROBLEMS} here")
    parser.add_argument("--overwrite", action="store_true", help="replace what --out holds already")


def main(args: argparse.Namespace) -> int:
    """Run what `add_arguments` parsed; returns the exit code. Raises: PtlabError."""
    config = load_config(args.config, args.set)
    asked = asked_of(config, str(args.config))
    if args.out is not None and (args.out / PROBLEMS).exists() and not args.overwrite:
        raise ConfigError(f"{args.out}: holds an evaluation already; give another --out, or --overwrite")
    if args.attempts > 1 and args.temperature == 0:
        raise ConfigError(f"--attempts {args.attempts} at --temperature 0: greedy attempts are all alike; leave one of the two out")
    with open_sampling_service(config, args.checkpoint, args.base_url) as service:
        work = evaluate(config, asked, service.client, checkpoint=args.checkpoint, attempts=args.attempts, temperature=args.temperature)
        report, rows = asyncio.run(work)
    print(as_text(report))
    if args.out is not None:
        write(args.out, report, rows)
        print(f"{args.out}/{SUMMARY}  {PROBLEMS}")
    return 0


# ------------------------------------------------------------------------------------------------------------- what is asked


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The part of a config that an evaluation needs."""

    env: EnvSection
    rollout: RolloutConfig


def asked_of(config: RunConfig, source: str) -> Asked:
    """Raises: ConfigError for a config without a task."""
    match config:
        case RlConfig() | OnPolicyDistillConfig() | PromptDistillConfig():
            return Asked(env=config.env, rollout=config.rollout)
        case SftConfig() if config.eval.env is not None:
            return Asked(env=config.eval.env, rollout=config.eval.rollout)
        case OfflineConfig() if config.env is not None:
            return Asked(env=config.env, rollout=config.rollout or RolloutConfig())
    key = "eval.env" if isinstance(config, SftConfig) else "env"
    raise ConfigError(f"{source}: recipe {config.recipe!r} without {key}: there is nothing to ask; add one, e.g. {key}: {{kind: gsm8k}}")


@contextmanager
def open_sampling_service(config: RunConfig, weights: str | None, base_url: str | None) -> Iterator[LocalService]:
    """A service to sample from; what it writes goes to a directory that is deleted, unless the weights lie in the config's run directory.

    Args:
        weights: tinker:// path, directory, or None for the base model.
    """
    from ptlab import local  # takes seconds; a mistake in the config is told before
    from ptlab.runlog import newest_sampler_weights

    with tempfile.TemporaryDirectory(prefix="ptlab-") as scratch:
        if base_url is not None:
            with local.open_remote(config, base_url) as service:
                yield service
            return
        changes: dict[str, Any] = {}
        if weights is not None and weights.startswith("tinker://"):
            if not (config.directory / "checkpoints").is_dir():
                raise ConfigError(
                    f"{weights}: looked for in the run directory {config.directory}, which has no checkpoints; name another "
                    f"run's directory instead, or its server with --base-url"
                )
        else:
            changes["run_dir"] = scratch
        if weights is not None and "run_dir" in changes:
            rank = rank_of(newest_sampler_weights(Path(weights)))
            changes["lora"] = config.lora.model_copy(update={"rank": max(rank, config.lora.rank)})  # vLLM makes room for this one
        with local.open_service(config.model_copy(update=changes)) as service:
            yield service


def rank_of(directory: Path) -> int:
    """Rank of an adapter in PEFT layout. Raises: ConfigError if there is none."""
    path = directory / "adapter_config.json"
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["r"])
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise ConfigError(
            f"{directory}: no adapter here ({path.name}: {err}); name a run directory, a directory in PEFT layout, or a tinker:// path"
        ) from err


async def evaluate(
    config: RunConfig, asked: Asked, service_client: ServiceClient, *, checkpoint: str | None, attempts: int, temperature: float
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What `summarise` and `problem_row` make of the attempts. Raises: ConfigError, EngineError and their kin."""
    from ptlab.recipes.held_out import rollout_settings
    from ptlab.recipes.models import ServiceModels, run_renderer

    base = await service_client.create_sampling_client(base_model=config.model.name)
    tokenizer = base.get_tokenizer()
    renderer = run_renderer(config.model, tokenizer)
    models = ServiceModels(service_client, config.model, renderer)
    client = base if checkpoint is None else (await models.open(model_path=checkpoint))[0]
    task = await asked.env.make_task(TaskSetting(renderer=renderer, seed=config.seed, models=models, test_attempts=attempts))
    settings = rollout_settings(asked.rollout, await models.context_length())
    settings = greedy_settings(settings) if temperature == 0 else replace(settings, temperature=temperature)
    began = time.perf_counter()
    groups_P = await run_groups(task.test_P, client, settings, seed=(config.seed, "eval_greedy" if temperature == 0 else "eval"))
    elapsed_s = time.perf_counter() - began
    about = {"env": asked.env.model_dump(), "model": config.model.name, "checkpoint": checkpoint, "seed": config.seed}
    report = about | summarise(groups_P, settings, elapsed_s)
    return report, [problem_row(number, group, tokenizer) for number, group in enumerate(groups_P)]


# ------------------------------------------------------------------------------------------------------------------- answers


def summarise(groups_P: Sequence[TrajectoryGroup], settings: RolloutSettings, elapsed_s: float) -> dict[str, Any]:
    """Numbers over all problems. An attempt that a broken environment cost counts as wrong, as in a run's evaluations."""
    right_P = [diagnostics.num_correct(group) for group in groups_P]
    tries_P = [len(group.trajectories_G) + len(group.errors) for group in groups_P]
    attempts = min(tries_P, default=0)
    answers = diagnostics.answer_metrics(groups_P)
    low, high = accuracy_interval(right_P, tries_P)
    return {
        "problems": len(groups_P),
        "attempts": attempts,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "max_tokens": settings.max_tokens,
        "accuracy": sum(right_P) / max(sum(tries_P), 1),
        "interval_95": [low, high],
        "pass_at_k": {str(k): mean_pass_at_k(right_P, tries_P, k) for k in powers_of_two(attempts)},
        "tokens_mean": answers.get("answer/tokens_mean", 0.0),
        "tokens_max": answers.get("answer/tokens_max", 0.0),
        "tokens_sum": answers["answer/tokens_sum"],
        "cut_off_frac": answers.get("answer/cut_off_frac", 0.0),
        "env_errors": sum(len(group.errors) for group in groups_P),
        "metrics": {name: value for name, value in summary(groups_P).items() if name not in ("eval/accuracy", "eval/tokens_mean")},
        "elapsed_s": elapsed_s,
    }


def problem_row(number: int, group: TrajectoryGroup, tokenizer: Any) -> dict[str, Any]:
    """One problem with all its attempts."""
    first = [turn for trajectory in group.trajectories_G for turn in trajectory.transitions[:1]]
    prompt = "" if not first else first[0].logs.get("prompt") or tokenizer.decode(first[0].observation.to_ints())
    pairs = zip(group.trajectories_G, group.rewards_G, strict=True)
    return {
        "problem": number,
        "tags": list(group.tags),
        "prompt": prompt,
        "right": diagnostics.num_correct(group),
        "attempts": len(group.trajectories_G) + len(group.errors),
        "errors": [error.error_message for error in group.errors],
        "answers": [_answer_row(trajectory, reward, tokenizer) for trajectory, reward in pairs],
    }


def _answer_row(trajectory: Trajectory, reward: float, tokenizer: Any) -> dict[str, Any]:
    turns = trajectory.transitions
    return {
        "response": "\n".join(tokenizer.decode(list(turn.action)) for turn in turns),
        "reward": reward,
        "tokens": trajectory.num_sampled_tokens,
        "turns": len(turns),
        "stop_reason": trajectory.stop_reason,
        "metrics": dict(diagnostics.last_metrics(trajectory)),
    }


def as_text(report: Mapping[str, Any]) -> str:
    """The report for a terminal."""
    low, high = report["interval_95"]
    weights = "the base model" if report["checkpoint"] is None else report["checkpoint"]
    many = f"{report['problems']} problems x {report['attempts']} attempts"
    lines = [f"{report['model']}, {weights}: {many}, temperature {report['temperature']:g}, {report['elapsed_s']:.0f} s", ""]
    lines.append(f"  accuracy      {report['accuracy']:.3f}   95 % interval {low:.3f} .. {high:.3f}")
    if len(report["pass_at_k"]) > 1:
        lines += [f"  {f'pass@{k}':<12}  {value:.3f}" for k, value in report["pass_at_k"].items()]
    lines.append(
        f"  tokens        {report['tokens_mean']:.1f} per attempt, at most {report['tokens_max']:.0f}; "
        f"{report['cut_off_frac']:.1%} of the answers cut off at {report['max_tokens']}"
    )
    if report["env_errors"]:
        lines.append(f"  lost          {report['env_errors']} attempts to a broken environment, counted as wrong")
    return "\n".join([*lines, ""])


def write(directory: Path, report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """summary.json and problems.jsonl; each is replaced whole."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _replace(directory / PROBLEMS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        _replace(directory / SUMMARY, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    except OSError as err:
        raise ConfigError(f"{directory}: cannot be written: {err.strerror}; give another --out") from err


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: needed at least 1")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: needed a temperature of 0 or more")
    return value
