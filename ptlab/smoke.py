"""What each smoke config claims to learn, and whether a run did. The numbers behind the bounds are in docs/LOG.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A metric of an evaluation, and where a run that learns brings it."""

    config: str
    """configs/smoke/<config>.yaml."""
    metric: str
    at_least: float | None = None
    at_most: float | None = None
    control: str | None = None
    """`--set` that takes the signal away; the run must then not get there."""
    needs: Mapping[str, str] = field(default_factory=dict)
    """Keys that name another run of this table: key -> run name."""


CLAIMS: Sequence[Claim] = (
    Claim(config="sft", metric="eval/accuracy_greedy", at_least=0.9, control="data.answers=shuffled"),
    Claim(config="math", metric="eval/accuracy", at_least=0.75, control="env.reward=random"),
    Claim(config="tools", metric="eval/accuracy", at_least=0.8, control="env.reward=random"),
    Claim(config="code", metric="eval/accuracy", at_least=0.6, control="env.reward=random"),
    Claim(config="guess_number", metric="eval/guesses", at_most=5.0, control="env.reward=random"),
    Claim(config="twenty_questions", metric="eval/accuracy", at_least=0.7, control="env.reward=random"),
    Claim(config="tic_tac_toe", metric="eval/vs_random/won", at_least=0.45, control="env.reward=random"),
    Claim(config="reward_model", metric="eval/accuracy", at_least=0.7, control="data.labels=shuffled"),
    Claim(
        config="rlhf",
        metric="eval/accuracy",
        at_least=0.75,
        control="env.reward=random",
        needs={"env.judge.path": "reward_model_smoke"},
    ),
    Claim(config="dpo", metric="eval/accuracy", at_least=0.7, control="data.labels=shuffled"),
    Claim(config="offline_dro", metric="eval/accuracy", at_least=0.7, control="data.shuffle_rewards=true"),
    Claim(config="on_policy_distill", metric="eval/accuracy", at_least=0.85),
    Claim(config="prompt_distill", metric="eval/accuracy", at_least=0.85),
)


def verdict(claim: Claim, rows: Sequence[Mapping[str, Any]], *, control: bool) -> tuple[bool, str]:
    """(whether a run, or its control, is as the claim says; one line that gives the first and last value)."""
    values = [row[claim.metric] for row in rows if row.get(claim.metric) is not None]
    if not values:
        return False, f"{claim.metric} was never measured"
    reached = (claim.at_least is None or values[-1] >= claim.at_least) and (claim.at_most is None or values[-1] <= claim.at_most)
    bound = f">= {claim.at_least:g}" if claim.at_least is not None else f"<= {claim.at_most:g}"
    return reached != control, f"{claim.metric} {values[0]:.3f} -> {values[-1]:.3f} ({'not ' if control else ''}{bound})"
