"""The loss benchmark: nothing but the variant differs between two runs, costs are counted right, and its tables say what was measured."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist, stdev
from typing import Any

import pytest
from matplotlib.image import imread

from benchmarks import loss_runs, loss_variants
from benchmarks.loss_figure import draw_losses
from benchmarks.loss_runs import is_finished, run_all, run_one
from benchmarks.loss_variants import FULL, LOSSES, QUICK, SETTINGS, config_of, measure, settings_that_differ, variants
from ptlab import runlog
from ptlab.benchmarks import loss_results
from ptlab.benchmarks.loss_curves import CPU_SECONDS, Curve, curve_of
from ptlab.benchmarks.loss_results import (
    Budget,
    Result,
    Variant,
    accuracy_at,
    area,
    first_gradients,
    noise,
    read_results,
    tables,
    write_results,
)
from ptlab.config import RlConfig
from ptlab.errors import ConfigError
from ptlab.runlog import read_metrics

# ------------------------------------------------------------------------------------------------------------- what is compared


def test_the_grid_holds_what_it_says() -> None:
    grid = variants()
    assert len({variant.name for variant in grid}) == len(grid) == 40
    assert {variant.loss for variant in grid} == set(LOSSES) == {"importance_sampling", "ppo", "cispo", "dro", "gspo"}
    for setting in SETTINGS:
        corrections = {variant.correction for variant in grid if variant.setting == setting}
        assert corrections == ({"none", "TIS", "MIS"} if setting[1] else {"none"})


@pytest.mark.parametrize("plan", [QUICK, FULL], ids=lambda plan: plan.name)
def test_runs_of_one_seed_differ_in_the_variant_only(plan: loss_variants.Plan, tmp_path: Path) -> None:
    configs = [config_of(plan, variant, 1, tmp_path) for variant in variants()]
    correction = {"correction.kind", "correction.level", "correction.low", "correction.high"}
    assert settings_that_differ(configs) == {"name", "loss.name", "optim.updates_per_batch", "rollout.max_steps_off_policy"} | correction
    assert {config.seed for config in configs} == {1} and {config.run_dir for config in configs} == {str(tmp_path)}
    assert settings_that_differ([config_of(plan, variants()[0], seed, tmp_path) for seed in (0, 1)]) == {"name", "seed"}
    assert all(not config.loss.config for config in configs)  # each loss with its defaults


def test_what_is_set_for_all_reaches_all_and_a_mistake_is_refused(tmp_path: Path) -> None:
    assert {config_of(QUICK, variant, 0, tmp_path, ["optim.learning_rate=7e-4"]).optim.learning_rate for variant in variants()} == {7e-4}
    with pytest.raises(ConfigError, match="learning_rate"):
        config_of(QUICK, variants()[0], 0, tmp_path, ["optim.learning_rat=7e-4"])


@pytest.fixture
def tiny_plan(tiny_qwen3_dir: Path) -> loss_variants.Plan:
    """A random model, random rewards."""
    overrides = (
        "steps=1", f"model={{name: tiny, path: '{tiny_qwen3_dir}', renderer: chatml}}", "lora.rank=4", "rollout.max_tokens=6",
        "env={kind: addition, groups_per_step: 3, group_size: 4, num_test: 3, reward: random}", "engines.sampler.kind=torch",
        "optim.learning_rate=1e-2", "eval={every: 1, greedy: false}", "logging.transcripts=0",
    )  # fmt: skip
    return replace(QUICK, overrides=overrides, seeds=(0,), jobs=1)


def test_all_variants_meet_the_same_batch_and_losses_agree_on_its_gradient(
    tiny_plan: loss_variants.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [Variant(loss, "none", 1, 0) for loss in LOSSES] + [Variant("ppo", "TIS", 4, 2)]
    monkeypatch.setattr(loss_variants, "variants", lambda: chosen)
    monkeypatch.setattr(loss_variants, "run_all", in_this_process)
    monkeypatch.setattr(runlog, "draw_curves", lambda *args, **kwargs: None)  # a second each, and not the question here
    said: list[str] = []
    results = measure(tiny_plan, tmp_path, [], said.append)
    assert [result.variant for result in results] == chosen and len(said) == len(chosen)
    assert said[-1].startswith("6/6 ppo-tis-u4-a2-s0: accuracy ")
    firsts = [read_metrics(tmp_path / f"{variant.name}-s0")[0] for variant in chosen]
    for key in ("reward/mean", "reward/std", "answer/tokens_sum", "groups/skipped", "eval/accuracy"):
        assert len({row[key] for row in firsts}) == 1, key  # equal problems, equal answers
    assert first_gradients(results) < 1e-5
    assert firsts[-1]["optim/updates"] == 4 and firsts[0]["optim/updates"] == 1
    assert "correction/truncated_frac" in firsts[-1] and "truncated" in results[-1].curve.steps


def in_this_process(configs: list[RlConfig], jobs: int) -> Any:
    """run_all without a pool: starting one takes longer than the runs."""
    for config in configs:
        run_one(config)
        yield config


def test_a_finished_run_is_not_run_again_and_a_broken_one_is_told(
    tiny_plan: loss_variants.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tiny_plan, variants()[0], 0, tmp_path)
    assert not is_finished(config)
    assert [done.name for done in run_all([config], jobs=1)] == [config.name]  # in a process of its own
    assert is_finished(config) and not is_finished(config_of(tiny_plan, variants()[0], 0, tmp_path, ["optim.learning_rate=2e-2"]))
    before = (config.directory / "metrics.jsonl").read_text()
    monkeypatch.setattr(loss_runs, "ProcessPoolExecutor", lambda *args, **kwargs: pytest.fail("nothing is left to run"))
    assert [done.name for done in run_all([config], jobs=1)] == [config.name]
    assert (config.directory / "metrics.jsonl").read_text() == before
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="learning_rate"):  # another run under its name
        list(run_all([config_of(tiny_plan, variants()[0], 0, tmp_path, ["optim.learning_rate=2e-2"])], jobs=1))


# ---------------------------------------------------------------------------------------------------------------- what a run cost


def row(step: int, *, cpu: float, seconds: float, tokens: float, evaluation: float = 0.0, **more: float) -> dict[str, float]:
    timed = {"time/step_s": seconds, "time/rollout_s": 0.1, "answer/tokens_sum": tokens, CPU_SECONDS: cpu}
    evaluated = {"eval/accuracy": more.pop("accuracy"), "time/eval_s": evaluation} if "accuracy" in more else {}
    return {"step": step, **timed, **evaluated, **{key.replace("__", "/"): value for key, value in more.items()}}


ROWS = [
    row(0, cpu=9.0, seconds=3.0, tokens=100, accuracy=0.2, evaluation=1.0, reward__mean=0.25, optim__grad_norm=3.14159),
    row(1, cpu=10.0, seconds=2.0, tokens=50, reward__mean=0.5, optim__grad_norm=2.0),
    row(2, cpu=14.0, seconds=4.0, tokens=70, accuracy=0.6, evaluation=3.0, reward__mean=0.5),
    {"step": 3, "eval/accuracy": 0.8, "time/eval_s": 5.0, "time/step_s": 5.0, CPU_SECONDS: 19.0},
]


def test_tokens_and_seconds_are_those_before_the_evaluation_and_evaluations_are_free() -> None:
    curve = curve_of(ROWS)
    assert curve.accuracy == [0.2, 0.6, 0.8]
    assert curve.tokens == [0, 150, 220]  # the weights after 0, 2 and 3 steps
    assert curve.wall_s == [0.0, 4.0, 5.0]  # 3 - 1, 2, 4 - 3
    # step 1 took 1 CPU-second, step 2 a quarter (1 s of 4) of 4; step 0, whose row also holds the opening, counts as their mean, 1
    assert curve.cpu_s == [0.0, 2.0, 3.0]
    assert curve.steps == {"reward": [0.25, 0.5, 0.5], "grad_norm": [3.142, 2.0, None]}


# -------------------------------------------------------------------------------------------------------------------- comparison


def curve(*points: tuple[int, float], cost: float = 1.0, **steps: list[float | None]) -> Curve:
    """`cost` CPU-seconds per thousand tokens, twice that on the wall."""
    tokens = [count for count, _ in points]
    seconds = [cost * count / 1000 for count in tokens]
    return Curve(tokens=tokens, cpu_s=seconds, wall_s=[2 * s for s in seconds], accuracy=[value for _, value in points], steps=steps)


def test_accuracy_between_evaluations_and_the_area_below() -> None:
    drawn = curve((0, 0.2), (1000, 0.6), (3000, 0.8))
    assert accuracy_at(drawn.tokens, drawn.accuracy, 2000) == pytest.approx(0.7)
    assert area(drawn, 2000) == pytest.approx((0.4 * 1000 + 0.65 * 1000) / 2000)
    assert area(drawn, 1000) == pytest.approx(0.4)
    assert area(drawn, 3000) == pytest.approx((0.4 * 1000 + 0.7 * 2000) / 3000)


def test_the_budget_is_what_every_run_reached() -> None:
    runs = [
        Result(Variant("ppo", "none", 1, 0), seed, c)
        for seed, c in enumerate([curve((0, 0), (900, 1)), curve((0, 0), (1000, 1), cost=0.5)])
    ]
    assert Budget.of(runs) == Budget(tokens=900, cpu_s=0.5)


def test_noise_is_the_pooled_standard_error_of_a_difference() -> None:
    groups = [[0.1, 0.2, 0.3], [0.5, 0.5, 0.5]]
    pooled = (stdev(groups[0]) ** 2 + 0.0) / 2
    assert noise(groups) == pytest.approx(NormalDist().inv_cdf(0.995) * math.sqrt(2 * pooled / 3))
    assert math.isnan(noise([[0.1], [0.2]]))


def results() -> list[Result]:
    """importance_sampling at 0.50 and 0.52 after 1000 tokens, ppo clearly above, dro clearly below, ppo + TIS within noise."""
    ends = {
        ("importance_sampling", "none"): (0.50, 0.52),
        ("ppo", "none"): (0.90, 0.92),
        ("dro", "none"): (0.10, 0.12),
        ("ppo", "TIS"): (0.51, 0.53),
    }
    steps: dict[str, list[float | None]] = {"grad_norm": [2.0, 8.0, None, 4.0], "ratio_max": [1.5], "ratio_min": [0.5], "kl_k3": [0.002]}
    made = []
    for (loss, correction), values in ends.items():
        for seed, value in enumerate(values):
            extra = {"clipped": [0.25]} if loss == "ppo" else {}
            extra |= {"truncated": [0.125]} if correction == "TIS" else {}
            made.append(Result(Variant(loss, correction, 1, 2), seed, curve((0, 0.0), (1000, value), **steps, **extra)))
    return made


def test_the_table_marks_what_is_more_than_noise() -> None:
    title, _, header, _, *lines = tables(results()).splitlines()
    assert title.startswith(
        "**1 update per batch, 2 steps off-policy** (2 seeds; budgets: 1,000 sampled tokens, 1.0 CPU-s; more than noise: 0.0"
    )
    assert [line.split(" | ")[:3] for line in lines] == [
        ["| importance_sampling", "0.510 ± 0.014", "0.255 ± 0.007"],
        ["| ppo", "0.910 ± 0.014 **+**", "0.455 ± 0.007 **+**"],
        ["| dro", "0.110 ± 0.014 **-**", "0.055 ± 0.007 **-**"],
        ["| ppo + TIS", "0.520 ± 0.014", "0.260 ± 0.007"],
    ]
    assert [line.split(" | ")[3] for line in lines[:2]] == ["0.510 ± 0.014", "0.910 ± 0.014"]  # against seconds nothing is judged
    assert lines[0].endswith("| 1.0 | 2.0 | 4 | 0.5 | 1.5 | 2 | - | - |")  # CPU-s, wall-s, median gradient norm, ratios, k3, shares
    assert lines[3].endswith("| 2 | 25.0 % | 12.5 % |")
    assert all(line.count("|") == header.count("|") for line in lines)


def test_results_are_read_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    write_results(path, {"cpu": "x"}, results())
    about, found = read_results(path)
    assert about == {"cpu": "x"} and found == results()
    path.write_text(json.dumps({"about": {}}) + "\n")
    with pytest.raises(ConfigError, match="no runs"):
        read_results(path)


def test_unlike_first_gradients_are_found() -> None:
    def run(loss: str, seed: int, norm: float) -> Result:
        return Result(Variant(loss, "none", 1, 0), seed, curve((0, 0.0), (1, 1.0), grad_norm=[norm, 9.0]))

    assert first_gradients(
        [run("importance_sampling", 0, 2.0), run("importance_sampling", 1, 4.0), run("ppo", 0, 2.0), run("ppo", 1, 4.4)]
    ) == (pytest.approx(0.1))
    assert math.isnan(first_gradients(results()))


def test_the_picture_has_a_column_per_setting_and_correction(tmp_path: Path) -> None:
    one, other = draw_losses(results(), tmp_path / "a.png"), draw_losses(results()[:6], tmp_path / "b.png")
    wide, narrow = imread(one).shape, imread(other).shape
    assert wide[1] > 1.7 * narrow[1] and wide[0] == narrow[0] and wide[0] > 900


DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_shows_the_tables_of_its_data() -> None:
    _, found = read_results(DOCS / "data" / "loss-benchmark.jsonl")
    page = (DOCS / "loss-benchmark.md").read_text(encoding="utf-8")
    assert loss_results.report(found) in page
    assert {result.variant for result in found} == set(variants()) and {result.seed for result in found} == set(QUICK.seeds)
