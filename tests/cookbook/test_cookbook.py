"""Recipes of tinker-cookbook run unmodified against `ptlab serve`: the quickest three, and what the list of all of them relies on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cookbook.make_workdir import make_workdir
from tests.cookbook.run_recipes import AGREE, RECIPES, Place, Recipe, Row, complaints, run_recipe
from tests.cookbook.serving import Server

REPOSITORY = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("PTLAB_COOKBOOK_VENV", REPOSITORY / ".venv-cookbook")) / "bin/python"
DATA = REPOSITORY / "../shared/data"
IN_CI = ("rl_loop", "math_rl_ppo")

needs_cookbook = pytest.mark.skipif(
    not PYTHON.exists(), reason=f"{PYTHON} is not there: scripts/setup_cookbook_venv.sh makes it (PTLAB_COOKBOOK_VENV names another)"
)
needs_data = pytest.mark.skipif(not (DATA / "tokenizers/qwen3").exists(), reason="../shared/data is not beside this checkout")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A server with both models, and the directory a user would run recipes in."""
    directory = tmp_path_factory.mktemp("cookbook")
    make_workdir(directory / "workdir", DATA)
    with Server(directory / "workdir", directory / "data", directory / "server.log") as server:
        yield Place(python=PYTHON, workdir=directory / "workdir", url=server.url, logs=directory)


@pytest.mark.cookbook
@pytest.mark.slow
@needs_cookbook
@needs_data
@pytest.mark.parametrize("name", IN_CI)
def test_a_recipe_runs_unmodified(name: str, place: Place) -> None:
    recipe = next(recipe for recipe in RECIPES if recipe.name == name)
    outcome = run_recipe(recipe, place, timeout_s=300.0)
    assert outcome.complaint is None, f"{name}: {outcome.complaint}; the server said:\n{_end(place.logs / 'server.log')}"


def _end(log: Path) -> str:
    return log.read_text(errors="replace")[-3000:]


SAVED: list[Row] = [{"name": "final", "state_path": "tinker://r/weights/final", "sampler_path": "tinker://r/sampler_weights/final"}]


def test_the_judge_passes_a_good_run() -> None:
    recipe = Recipe(name="r", module="m", arguments=(), steps=2, checks=AGREE, says=("resumed",))
    rows: list[Row] = [{"step": 0, "optim/kl_sample_train_v1": -9e-4}, {"step": 1, "optim/kl_sample_train_v1": 1e-7}, {"step": 2}]
    assert complaints(recipe, rows, SAVED, "it resumed") == []


def test_the_judge_sees_a_missing_step_checkpoint_word_and_a_kl_of_either_sign() -> None:
    recipe = Recipe(name="r", module="m", arguments=(), steps=2, checks=AGREE, says=("resumed",))
    for bad in (-0.002, float("nan")):
        rows: list[Row] = [{"step": 0, "optim/kl_sample_train_v1": bad}]
        found = complaints(recipe, rows, [{"name": "final"}], "")
        assert [complaint.split(":")[0][:24] for complaint in found] == [
            "expected metrics of step",
            "expected a last checkpoi",
            "expected 'resumed' in th",
            "kl_sample_train_v1",
        ]
    assert complaints(recipe, [{"step": 0}, {"step": 1}], SAVED, "resumed") == ["kl_sample_train_v1: expected below 0.001, found None"]
    stale: list[Row] = [
        {"step": 0, "optim/kl_sample_train_v1": 1e-7, "async/staleness_max": 0},
        {"step": 1, "optim/kl_sample_train_v1": 0.003, "async/staleness_max": 1},
    ]
    assert complaints(recipe, stale, SAVED, "resumed") == []  # the policy had moved between sampling and training
    stale[0]["async/staleness_max"] = 2
    assert complaints(recipe, stale, SAVED, "resumed") == ["kl_sample_train_v1: expected below 0.001, found None"]
