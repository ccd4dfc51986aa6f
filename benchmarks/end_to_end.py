#!/usr/bin/env python3
"""One RL step from prompts to new weights in the sampler, ptlab beside TRL: `python benchmarks/end_to_end.py` (part of make bench).

Items, float32, LoRA r=16:
    quickstart   model and batch of configs/quickstart.yaml, 16 problems x 8 samples, answers end where the model ends them, 64 tokens at
                 most: the lengths of both systems are draws from the same distribution, and the ratio is that of CPU-seconds per sampled
                 token
    fixed        the same, but every answer has exactly 64 tokens: the same work to the token, and nothing gained where answers end early
    small        the 4.7M-parameter random model of benchmarks/trainer.py, 8 x 8 x 32, every answer of 32 tokens

One thread, steps in turns, each system in a process of its own; CPU-seconds, median of --repeats after one step that is not counted.
Rewards are prepared, so that every sequence is trained on in both. TRL samples with transformers, ptlab with its torch sampler.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two threads on busy cores spin at their barriers

import numpy as np

from benchmarks.worker_process import WorkerProcess
from ptlab.benchmarks.against import OURS
from ptlab.benchmarks.tables import markdown_table, write_jsonl
from ptlab.benchmarks.work_items import TOKENIZER_SIZE, VARIANTS, make_sequences
from ptlab.cli import guarded
from ptlab.engines.base_model import load_tokenizer
from ptlab.engines.pretrain import chat_prompt, new_model, save_model, train_tokenizer
from ptlab.envs.addition import training_problem
from ptlab.errors import ConfigError, EngineError
from ptlab.provenance import provenance
from ptlab.tiny_models.quickstart import tokenizer_texts
from ptlab.tiny_models.table import tiny_model_directory

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("sampling", "reward", "train", "sync", "overhead")
RANK = 16
FASTEST_MICRO_BATCH = {"quickstart": 64, "fixed": 64, "small": 16}
"""TRL's, in its training passes; found by --micro-batch."""


def write_item(name: str, root: Path) -> tuple[Path, Path]:
    """(model directory, item file); rewards are seeded normal draws."""
    if name in ("quickstart", "fixed"):
        directory = tiny_model_directory("ptlab/quickstart")
        assert directory is not None
        problems = [training_problem(0, 0, index) for index in range(16)]
        prompts = [load_tokenizer(str(directory)).encode(chat_prompt(question)) for question, _ in problems]
        answers, max_tokens = [answer for _, answer in problems], 64
    else:
        directory = root / "model"
        tokenizer = train_tokenizer(tokenizer_texts(), TOKENIZER_SIZE)
        save_model(new_model(VARIANTS["small"].shape, tokenizer, seed=0), tokenizer, directory)
        prompts = make_sequences(VARIANTS["small"]).prompts[::8]
        answers, max_tokens = ["0"] * len(prompts), 32
    rewards = np.random.default_rng(0).normal(size=8 * len(prompts)).tolist()
    item = {"prompts": prompts, "answers": answers, "rewards": rewards, "group_size": 8}
    item |= {"max_tokens": max_tokens, "fixed_length": name != "quickstart"}
    (root / "item.json").write_text(json.dumps(item), encoding="utf-8")
    return directory, root / "item.json"


def in_turns(workers: dict[str, WorkerProcess], repeats: int, item: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The counted steps of each worker. Raises: EngineError if one did not sample and train on all that it was asked to."""
    steps: dict[str, list[dict[str, Any]]] = {system: [] for system in workers}
    most = len(item["rewards"]) * item["max_tokens"]
    for turn in range(repeats + 1):
        for system, worker in workers.items():
            step = worker.ask("step")
            if step["sequences"] != len(item["rewards"]) or (item["fixed_length"] and step["sampled_tokens"] != most):
                found = f"{step['sampled_tokens']} tokens sampled, {step['sequences']} sequences trained on"
                raise EngineError(f"{system}: {found}; {most} and {len(item['rewards'])} were asked for", operation="benchmark")
            if turn:
                steps[system].append(step)
    return steps


def split_rows(name: str, steps: dict[str, list[dict[str, Any]]]) -> list[list[object]]:
    """One row a system; every column is a median of its own, so a row need not add up."""
    rows: list[list[object]] = []
    for system, taken in steps.items():
        parts = [f"{median(step['parts'][part] for step in taken):.3f}" for part in PARTS]
        tokens = round(median(step["sampled_tokens"] for step in taken))
        speed = median(step["sampled_tokens"] / step["cpu_s"] for step in taken)
        whole = f"{median(step['cpu_s'] for step in taken):.3f}"
        rows.append([name, system, whole, *parts, tokens, speed, f"{max(step['peak_mb'] for step in taken):.0f}"])
    return rows


def ratio_row(name: str, steps: dict[str, list[dict[str, Any]]]) -> list[object]:
    """TRL / ptlab in CPU-seconds per sampled token: of the whole step, of sampling and of training; and in peak memory."""

    def ratio(seconds: Callable[[dict[str, Any]], float]) -> str:
        per_token = {system: median(seconds(step) / step["sampled_tokens"] for step in taken) for system, taken in steps.items()}
        return f"{per_token['TRL'] / per_token[OURS]:.2f}x"

    peak = {system: max(step["peak_mb"] for step in taken) for system, taken in steps.items()}
    ratios = [ratio(lambda step: step["cpu_s"]), ratio(lambda step: step["parts"]["sampling"]), ratio(lambda step: step["parts"]["train"])]
    return [name, *ratios, f"{peak['TRL'] / peak[OURS]:.2f}x"]


def measure(names: Sequence[str], args: argparse.Namespace) -> tuple[list[list[object]], list[list[object]], list[dict[str, Any]]]:
    """Rows of the split, rows of the ratios, and all counted steps for JSON lines."""
    splits: list[list[object]] = []
    ratios: list[list[object]] = []
    lines: list[dict[str, Any]] = []
    for name in names:
        with tempfile.TemporaryDirectory() as root, ExitStack() as stack:
            model, file = write_item(name, Path(root))
            item = json.loads(file.read_text(encoding="utf-8"))
            common = [str(model), str(file), "--rank", str(RANK)]
            trl_options = ["--micro-batch", str(args.micro_batch or FASTEST_MICRO_BATCH[name])]
            commands = {
                OURS: [sys.executable, str(ROOT / "benchmarks" / "ptlab_step_worker.py"), *common],
                "TRL": [str(args.trl_python), str(ROOT / "benchmarks" / "trl_step_worker.py"), *common, *trl_options],
            }
            workers = {system: stack.enter_context(WorkerProcess(command)) for system, command in commands.items()}
            steps = in_turns(workers, args.repeats, item)
        splits += split_rows(name, steps)
        ratios.append(ratio_row(name, steps))
        lines += [{"item": name, "system": system, **step} for system, taken in steps.items() for step in taken]
        print(f"{name}: {ratios[-1][1]}", flush=True)
    return splits, ratios, lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", nargs="+", choices=list(FASTEST_MICRO_BATCH), default=list(FASTEST_MICRO_BATCH))
    parser.add_argument("--repeats", type=int, default=5, help="counted steps; medians are reported")
    parser.add_argument("--micro-batch", type=int, help=f"sequences in one training pass of TRL; default {FASTEST_MICRO_BATCH}")
    parser.add_argument("--trl-python", type=Path, default=ROOT / ".venv-trl" / "bin" / "python", help="of the environment with TRL")
    parser.add_argument("--out", type=Path, help="JSONL file for the results")
    args = parser.parse_args()

    def run() -> int:
        if not args.trl_python.exists():
            raise ConfigError(f"{args.trl_python} does not exist; make it: scripts/setup_trl_venv.sh (or make bench)")
        about = provenance()
        print(f"{about['hardware']['cpu']}, one thread, torch {about['versions']['torch']}, commit {about['git']}", flush=True)
        splits, ratios, lines = measure(args.items, args)
        if args.out is not None:
            write_jsonl(args.out, about, lines)
        header = ["item", "system", "CPU-s", *PARTS, "sampled tokens", "tokens/CPU-s", "peak MB"]
        print("\n" + markdown_table(header, splits))
        print("\n" + markdown_table(["item", "one step", "sampling", "train", "memory"], ratios))
        return 0

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())
