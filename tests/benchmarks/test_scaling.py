"""The line and what is said of it, by hand; the sweeps change one thing each; one small point measured for real."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ptlab.benchmarks.scaling import SWEEPS, Fit, PointCost, fit_line, measure, points, sweep_table, verdicts, write_model
from ptlab.benchmarks.work_items import VARIANTS, make_sequences


def cost(sweep: str, value: int, unique: int, cpu_s: float, rest_mb: float = 100.0) -> PointCost:
    return PointCost(
        sweep=sweep, value=value, tokens=2 * unique, unique_tokens=unique, flops=1e9 * unique, cpu_s=cpu_s, rest_mb=rest_mb, peak_mb=150.0
    )


def test_a_line_through_its_points() -> None:
    assert fit_line([1, 2, 4], [3.0, 5.0, 9.0]) == Fit(pytest.approx(1.0), pytest.approx(2.0), pytest.approx(0.0), pytest.approx(3.0))


def test_a_point_off_the_line_is_reported() -> None:
    fit = fit_line([0, 1, 2], [2.0, 5.0, 2.0])  # the best line is y = 3
    assert (fit.offset, fit.slope, fit.worst) == (pytest.approx(3.0), pytest.approx(0.0), pytest.approx(0.5))


def test_verdicts_fit_unique_tokens_and_call_adapters_flat() -> None:
    costs = [cost("samples", 1, 1000, 1.1), cost("samples", 8, 500, 0.6)]
    costs += [cost("adapters", 1, 500, 0.5), cost("adapters", 32, 500, 0.55, rest_mb=100.0 + 31 * 6)]
    assert verdicts(costs) == [
        "samples: 0.10 s + 1e+03 us per unique token, points within 0 %; 833 to 909 GFLOP/s",
        "adapters: 1.10 times the cost with 32 held as with 1, 6.0 MB each, points within 0 %; 909 to 1000 GFLOP/s",
    ]


def test_a_table_has_cost_per_unique_token_and_memory_of_the_pass() -> None:
    row = sweep_table([cost("prompt", 64, 1000, 0.5)]).splitlines()[-1]
    assert row == "| 64 | 2,000 | 1,000 | 0.50 | 500 | 2000 | 50 | 150 |"


def test_samples_take_the_same_sequences_below_fewer_prompts() -> None:
    swept = points("samples", sequences=8)
    assert [p.value for p in swept] == [1, 2, 4, 8]
    made = [make_sequences(p.work) for p in swept]
    assert {s.num_tokens for s in made} == {8 * (128 + 64)}
    assert [len({tuple(prompt) for prompt in s.prompts}) for s in made] == [8, 4, 2, 1]
    assert all(any(s.advantages) for s in made)  # one sample a prompt learns too: rewards are centred over the batch


@pytest.mark.parametrize("sweep", SWEEPS)
def test_a_sweep_changes_what_it_is_named_after(sweep: str) -> None:
    swept = points(sweep)
    assert [p.value for p in swept] == sorted({p.value for p in swept})
    read = {
        "samples": lambda p: p.work.samples_per_prompt,
        "prompt": lambda p: p.work.prompt_tokens[1],
        "adapters": lambda p: p.adapters,
        "vocabulary": lambda p: p.work.shape.vocab_size,
    }
    for name, value in read.items():
        values = [value(p) for p in swept]
        assert values == [p.value for p in swept] if name == sweep else len(set(values)) == 1
    assert all(p.work.num_sequences == 32 for p in swept)


def test_a_sweep_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="sweep 'depth': known are samples, prompt, adapters, vocabulary"):
        points("depth")


def test_one_point_is_measured_through_the_trainer(tmp_path: Path) -> None:
    point = points("adapters", sequences=4)[1]
    tiny = replace(point.work, shape=VARIANTS["tiny"].shape, prompt_tokens=(12, 12), completion_tokens=(4, 4))
    model = write_model(tiny, tmp_path)
    assert write_model(tiny, tmp_path) == model  # made once
    measured = measure(replace(point, work=tiny), model, "float32", repeats=3)
    assert (measured.value, measured.tokens, measured.unique_tokens) == (2, 4 * 15, 12 + 4 * 3)
    assert measured.cpu_s > 0
    assert measured.peak_mb >= measured.rest_mb > 50
