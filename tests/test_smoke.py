"""What `make smoke` says of a run: reached, not reached, and a control that must not reach."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptlab.smoke import CLAIMS, Claim, verdict

RISES = Claim(config="x", metric="eval/accuracy", at_least=0.9)
FALLS = Claim(config="x", metric="eval/guesses", at_most=5.0)


@pytest.mark.parametrize(
    ("claim", "values", "reached"),
    [(RISES, [0.1, 0.9], True), (RISES, [0.95, 0.89], False), (FALLS, [9.0, 5.0], True), (FALLS, [4.0, 5.1], False)],
)
def test_the_last_value_decides_and_a_control_is_judged_the_other_way(claim: Claim, values: list[float], reached: bool) -> None:
    rows = [{"step": 0, claim.metric: values[0]}, {"step": 1, "reward/mean": 1.0}, {"step": 2, claim.metric: values[1]}, {"step": 3}]
    assert verdict(claim, rows, control=False)[0] is reached
    assert verdict(claim, rows, control=True)[0] is not reached
    assert f"{values[0]:.3f} -> {values[1]:.3f}" in verdict(claim, rows, control=False)[1]


def test_a_metric_that_was_never_measured_is_no_success_not_even_for_a_control() -> None:
    for control in (False, True):
        assert verdict(RISES, [{"step": 0, "eval/accuracy": None}], control=control) == (False, "eval/accuracy was never measured")


def test_every_smoke_config_has_a_claim_but_the_one_that_only_connects() -> None:
    configs = {path.stem for path in (Path(__file__).parents[1] / "configs" / "smoke").glob("*.yaml")}
    assert configs - {"gsm8k"} == {claim.config for claim in CLAIMS}
    assert all((claim.at_least is None) != (claim.at_most is None) for claim in CLAIMS)
