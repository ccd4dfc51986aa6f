"""Run recipes of tinker-cookbook 0.6.1, unmodified, as a user would: two environment variables and a command line.

    scripts/setup_cookbook_venv.sh .venv-cookbook
    python -m tests.cookbook.run_recipes --python .venv-cookbook/bin/python                 # makes models and data, serves, runs all
    python -m tests.cookbook.run_recipes --python ... --url http://127.0.0.1:8000 --workdir DIR --only rl_loop,preference_dpo

A recipe passes if it ends with status 0 and its metrics.jsonl has a row per step, a final checkpoint, and numbers that are right: see
`checks` of each. Recipes run one after the other.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cookbook.make_workdir import BASE, INSTRUCT, make_workdir
from tests.cookbook.serving import Server

Row = dict[str, Any]
Check = Callable[[Sequence[Row]], str | None]
MAX_KL = 1e-3  # acceptance 2 of `ptlab serve`: sampler and trainer agree


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One command line. `arguments` are chz's name=value; the log path is added. `steps` is how many rows of metrics it must leave."""

    name: str
    module: str
    arguments: tuple[str, ...]
    steps: int
    checks: tuple[Check, ...] = ()
    says: tuple[str, ...] = ()  # words its output must hold
    resumes: str | None = None  # the recipe whose run it continues


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """`complaint` is None for a recipe that passed; `kl` is the largest |kl_sample_train_v1| of its rows, None if it logs none."""

    recipe: str
    seconds: float
    complaint: str | None
    kl: float | None


def finite(key: str) -> Check:
    """Every row that has `key` has a finite number there, and some row has it."""

    def check(rows: Sequence[Row]) -> str | None:
        values = [row[key] for row in rows if key in row]
        if values and all(math.isfinite(value) for value in values):
            return None
        return f"{key}: expected finite numbers, found {values}"

    return check


def first_is(key: str, expected: float, tolerance: float) -> Check:
    def check(rows: Sequence[Row]) -> str | None:
        found = next((row[key] for row in rows if key in row), None)
        if found is not None and abs(found - expected) <= tolerance:
            return None
        return f"{key}: expected {expected} +- {tolerance} in the first row, found {found}"

    return check


def differs(key: str) -> Check:
    """The rows do not all have the same value: the run did something."""

    def check(rows: Sequence[Row]) -> str | None:
        values = [row[key] for row in rows if key in row]
        return None if len(set(values)) > 1 else f"{key}: expected values that differ, found {values}"

    return check


def some_positive(key: str) -> Check:
    def check(rows: Sequence[Row]) -> str | None:
        values = [row[key] for row in rows if key in row]
        return None if any(value > 0 for value in values) else f"{key}: expected a positive value in some row, found {values}"

    return check


def largest_kl(rows: Sequence[Row]) -> float | None:
    """The largest |kl_sample_train_v1|, NaN if any is, of the rows whose answers were sampled from the weights that trained on them. In
    the others (the async recipe) it says how far the policy has moved meanwhile, which is no matter of sampler and trainer."""
    fresh = [row for row in rows if not row.get("async/staleness_max")]
    values = [abs(row["optim/kl_sample_train_v1"]) for row in fresh if "optim/kl_sample_train_v1" in row]
    return max(values, key=lambda value: math.inf if math.isnan(value) else value) if values else None


def sampler_and_trainer_agree(rows: Sequence[Row]) -> str | None:
    found = largest_kl(rows)
    return None if found is not None and found < MAX_KL else f"kl_sample_train_v1: expected below {MAX_KL}, found {found}"


AGREE: tuple[Check, ...] = (sampler_and_trainer_agree,)
LEARNS: tuple[Check, ...] = (some_positive("reward/total"),)
RL_LOOP = (f"model_name={BASE}", "batch_size=4", "group_size=4", "max_tokens=12", "max_steps=3", "save_every=2")
FRESH = "behavior_if_log_dir_exists=delete"
MATH_RL = (f"model_name={INSTRUCT}", "renderer_name=qwen3_disable_thinking", FRESH, "env=arithmetic", "max_tokens=6", "eval_every=0")
SMALL_MATH_RL = (*MATH_RL, "groups_per_batch=8", "group_size=4", "max_steps=3", "save_every=2")
SDFT = (f"model_name={INSTRUCT}", FRESH, "groups_per_batch=4", "max_tokens=24", "max_steps=2", "lora_rank=16", "eval_every=0")
CHAT = "renderer_name=qwen3_disable_thinking"
DISTILL = (f"model_name={BASE}", FRESH, "group_size=2", "max_tokens=24", "max_steps=2", "lora_rank=16")

RECIPES: tuple[Recipe, ...] = (
    Recipe(
        name="sl_loop",
        module="sl_loop",
        arguments=(f"model_name={BASE}", "batch_size=4", "max_length=128", "max_steps=3", "save_every=2"),
        steps=3,
        checks=(finite("train_mean_nll"), finite("train_mean_bpb")),
    ),
    Recipe(name="rl_loop", module="rl_loop", arguments=RL_LOOP, steps=3, checks=LEARNS),  # its default loss: stable_reinforce
    *(
        Recipe(name=f"rl_loop_{loss}", module="rl_loop", arguments=(*RL_LOOP, f"loss_fn={loss}"), steps=3, checks=LEARNS)
        for loss in ("importance_sampling", "cispo", "gspo")
    ),
    Recipe(
        name="rl_basic",
        module="rl_basic",
        arguments=(
            f"model_name={BASE}",
            # Its default builder (128 groups of 16) is an object, and chz changes no fields of an object: so the builder once more, small.
            "dataset_builder=tinker_cookbook.recipes.math_rl.math_env:Gsm8kDatasetBuilder",
            f"dataset_builder.model_name_for_tokenizer={BASE}",
            "dataset_builder.renderer_name=role_colon",
            "dataset_builder.batch_size=4",
            "dataset_builder.group_size=4",
            "max_tokens=12",
            "max_steps=2",
            "eval_every=2",
        ),
        steps=2,
        checks=AGREE,
    ),
    # 100 groups of 4: the recipe's own sizes, 400 outstanding samples.
    Recipe(
        name="math_rl_arithmetic",
        module="math_rl.train",
        arguments=(*MATH_RL, "max_steps=2"),
        steps=2,
        checks=AGREE,
    ),
    Recipe(
        name="math_rl_ppo",
        module="math_rl.train",
        arguments=(*SMALL_MATH_RL, "loss_fn=ppo", "loss_fn_config={'clip_low_threshold': 0.9, 'clip_high_threshold': 1.1}"),
        steps=3,
        checks=AGREE,
    ),
    # One step more, in a new process and session: the checkpoint and the run's user_metadata are read across sessions.
    Recipe(
        name="math_rl_resume",
        module="math_rl.train",
        arguments=(*SMALL_MATH_RL[:-2], "behavior_if_log_dir_exists=resume", "max_steps=4", "loss_fn=ppo"),
        steps=4,
        checks=AGREE,
        says=("Renderer metadata matches for checkpoint tinker://", "Resumed training from tinker://"),
        resumes="math_rl_ppo",
    ),
    Recipe(
        name="math_rl_async",
        module="math_rl.train",
        arguments=(*SMALL_MATH_RL, "max_steps_off_policy=2"),
        steps=3,
        checks=AGREE,
    ),
    Recipe(
        name="math_rl_stream",
        module="math_rl.train",
        arguments=(*SMALL_MATH_RL, "stream_minibatch_config.groups_per_batch=8", "stream_minibatch_config.num_minibatches=2"),
        steps=3,
        checks=AGREE,
    ),
    Recipe(
        name="guess_number",
        module="multiplayer_rl.guess_number.train",
        arguments=(f"model_name={INSTRUCT}", CHAT, FRESH, "batch_size=1", "group_size=3", "max_tokens=10", "max_steps=2", "eval_every=0"),
        steps=2,
        checks=AGREE,
    ),
    Recipe(
        name="text_arena",
        module="multiplayer_rl.text_arena.train",
        arguments=(
            f"model_name={INSTRUCT}",
            CHAT,
            FRESH,
            "batch_size=8",
            "num_train_datapoints=16",
            "num_test_datapoints=4",
            "max_tokens=10",
            "max_steps=2",
            "eval_every=1",
        ),
        steps=2,
        checks=AGREE,
    ),
    Recipe(
        name="preference_shorter",
        module="preference.shorter.train",
        arguments=(f"model_name={INSTRUCT}", CHAT, FRESH, "batch_size=4", "group_size=4", "max_tokens=12", "max_steps=2", "eval_every=0"),
        steps=2,
        checks=(*AGREE, finite("kl_pre_post_v1")),
    ),
    Recipe(
        name="preference_dpo",
        module="preference.dpo.train",
        arguments=(f"model_name={BASE}", FRESH, "batch_size=4", "max_length=384", "max_steps=3"),
        steps=3,
        # Before the first update the policy is its own reference, so the loss is -log sigmoid(0).
        checks=(first_is("dpo_loss", math.log(2.0), 1e-3), differs("dpo_loss")),
    ),
    Recipe(
        name="sdft",
        module="sdft.train",
        arguments=SDFT,
        steps=2,
        checks=(finite("sdft/mean_teacher_entropy"), some_positive("sdft/total_completion_tokens")),
    ),
    Recipe(
        name="sdft_reverse",
        module="sdft.train",
        arguments=(*SDFT, "dataset=toolalpaca", "reverse=True", "teacher_sync_every=1"),
        steps=2,
        checks=(finite("sdft/reverse_kl_mean"),),
    ),
    Recipe(
        name="distillation_on_policy",
        module="distillation.on_policy_distillation",
        arguments=(*DISTILL, f"teacher_model={INSTRUCT}", "dataset=deepmath", "groups_per_batch=4"),
        steps=2,
        checks=(*AGREE, finite("teacher_kl")),
    ),
    Recipe(
        name="distillation_self",
        module="distillation.on_policy_distillation",
        arguments=(*DISTILL, f"teacher_model={BASE}", "dataset=deepmath", "groups_per_batch=4"),
        steps=2,
        # The student starts as its teacher: what the sampler said while sampling is what compute_logprobs says.
        checks=(*AGREE, first_is("teacher_kl", 0.0, 1e-3)),
    ),
    Recipe(
        name="distillation_multi_teacher",
        module="distillation.on_policy_multi_teacher",
        arguments=(
            *DISTILL,
            f"deepmath_teacher_model={INSTRUCT}",
            f"tulu3_teacher_model={BASE}",
            "deepmath_groups_per_batch=2",
            "tulu3_groups_per_batch=2",
        ),
        steps=2,
        checks=(*AGREE, finite("teacher_kl/dataset_0"), finite("teacher_kl/dataset_1")),
    ),
    Recipe(
        name="distillation_off_policy",
        module="distillation.off_policy_reasoning",
        arguments=(
            f"model_name={INSTRUCT}",
            "renderer_name=qwen3",
            FRESH,
            "batch_size=4",
            "max_length=256",
            "max_prompts=64",
            "buffer_size=64",
            "max_steps=2",
            "lora_rank=16",
        ),
        steps=2,
        checks=(finite("train_mean_nll"),),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where recipes run: the Python of the cookbook's venv, the working directory, the server, and where logs go."""

    python: Path
    workdir: Path
    url: str
    logs: Path
    api_key: str = "tml-cookbook"

    def metrics(self, recipe: Recipe) -> Path:
        return self.logs / (recipe.resumes or recipe.name) / "metrics.jsonl"

    def output(self, recipe: Recipe) -> Path:
        return self.logs / f"{recipe.name}.out"

    def start(self, recipe: Recipe) -> subprocess.Popen[bytes]:
        """Start a recipe; standard output and errors go to `output(recipe)`. What an earlier run of it left is removed."""
        log_path = self.metrics(recipe).parent
        if recipe.resumes is None:
            shutil.rmtree(log_path, ignore_errors=True)
        self.logs.mkdir(parents=True, exist_ok=True)
        command = [str(self.python.absolute()), "-m", f"tinker_cookbook.recipes.{recipe.module}", f"log_path={log_path}", *recipe.arguments]
        environment = {
            **{name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR", "SSL_CERT_FILE") if name in os.environ},
            "TINKER_BASE_URL": self.url,
            "TINKER_API_KEY": self.api_key,
            "TINKER_COOKBOOK_RUNS_DIR": str(self.logs / "runs"),
            "HF_HOME": str(self.workdir / ".huggingface"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
        }
        with self.output(recipe).open("wb") as stream:
            return subprocess.Popen(
                command, cwd=self.workdir, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT
            )

    def judge(self, recipe: Recipe, status: int) -> str | None:
        """What is wrong with a run that ended with `status`, or None."""
        if status != 0:
            return f"status {status}; {self.last_line(recipe)}"
        directory = self.metrics(recipe).parent
        rows, checkpoints = read_rows(directory / "metrics.jsonl"), read_rows(directory / "checkpoints.jsonl")
        output = self.output(recipe).read_text(errors="replace")
        return "; ".join(complaints(recipe, rows, checkpoints, output)) or None

    def last_line(self, recipe: Recipe) -> str:
        lines = [line for line in self.output(recipe).read_text(errors="replace").splitlines() if line.strip()]
        return f"{lines[-1] if lines else 'no output'} ({self.output(recipe)})"


def run_recipe(recipe: Recipe, place: Place, *, timeout_s: float = 900.0) -> Outcome:
    """Run one recipe to its end and judge it."""
    began = time.monotonic()
    process = place.start(recipe)
    try:
        complaint = place.judge(recipe, process.wait(timeout=timeout_s))
    except subprocess.TimeoutExpired:
        complaint = f"not done after {timeout_s:.0f} s; {place.last_line(recipe)}"
    finally:
        process.kill()
        process.wait()
    return Outcome(
        recipe=recipe.name,
        seconds=time.monotonic() - began,
        complaint=complaint,
        kl=largest_kl(read_rows(place.metrics(recipe))),
    )


def complaints(recipe: Recipe, rows: Sequence[Row], checkpoints: Sequence[Row], output: str) -> list[str]:
    """What is wrong with a run that ended well."""
    found = []
    steps = {row["step"] for row in rows if "step" in row}
    if not set(range(recipe.steps)) <= steps:
        found.append(f"expected metrics of steps 0..{recipe.steps - 1}, found {sorted(steps)}")
    last = checkpoints[-1] if checkpoints else {}
    if not all(str(last.get(key, "")).startswith("tinker://") for key in ("state_path", "sampler_path")):
        found.append(f"expected a last checkpoint with state_path and sampler_path, found {last}")
    found += [f"expected {words!r} in the output" for words in recipe.says if words not in output]
    return found + [complaint for check in recipe.checks if (complaint := check(rows))]


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="of the venv that scripts/setup_cookbook_venv.sh made")
    parser.add_argument("--url", help="a running server with both models (default: start one)")
    parser.add_argument("--workdir", type=Path, help="made by tests.cookbook.make_workdir (default: make one)")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--logs", type=Path, help="where outputs and metrics go (default: a temporary directory)")
    parser.add_argument("--only", help="comma-separated names")
    parser.add_argument("--api-key", default="tml-cookbook")
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    names = [recipe.name for recipe in RECIPES]
    if arguments.list:
        print("\n".join(names))
        return 0
    chosen = arguments.only.split(",") if arguments.only else names
    if unknown := set(chosen) - set(names):
        parser.error(f"unknown recipes {sorted(unknown)}; there are {', '.join(names)}")

    logs = (arguments.logs or Path(tempfile.mkdtemp(prefix="ptlab-cookbook-"))).absolute()
    logs.mkdir(parents=True, exist_ok=True)
    workdir = (arguments.workdir or logs / "workdir").absolute()
    if not (workdir / INSTRUCT).exists():
        make_workdir(workdir, arguments.data)
    server = None if arguments.url else Server(workdir, logs / "data", logs / "server.log")
    try:
        if server is not None:
            server.start()
        url = server.url if server is not None else arguments.url
        place = Place(python=arguments.python, workdir=workdir, url=url, logs=logs, api_key=arguments.api_key)
        print(f"{url}, logs in {logs}", flush=True)
        num_failed = 0
        for recipe in RECIPES:
            if recipe.name not in chosen:
                continue
            outcome = run_recipe(recipe, place)
            num_failed += outcome.complaint is not None
            kl = "" if outcome.kl is None else f"kl {outcome.kl:.1e}"
            verdict = "ok" if outcome.complaint is None else f"FAILED: {outcome.complaint}"
            print(f"{outcome.recipe:28} {outcome.seconds:6.1f} s  {kl:10}  {verdict}", flush=True)
    finally:
        if server is not None:
            server.stop()
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
