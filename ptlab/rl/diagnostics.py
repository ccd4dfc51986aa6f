"""What a step looked like, as metrics: rewards, answers, groups, the gap between sampler and trainer, staleness.

Keys are `area/name[_unit]`. Everything here is a pure function of the step's values, so a resumed run reports the same numbers; wall
clock (`time/*`) is the recipe's.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ptlab.rl.types import Metrics, Trajectory, TrajectoryGroup
from ptlab.types import Datum, EncodedTextChunk, ForwardBackwardOutput, ModelInput, OptimStepResponse

Floats = npt.NDArray[np.float64]


def summarise(
    groups_P: Sequence[TrajectoryGroup], data_D: Sequence[Datum], output: ForwardBackwardOutput | None, *, num_updates: int | None
) -> dict[str, float]:
    """All of a step.

    Args:
        output: of forward_backward on data_D; None if the batch was skipped.
        num_updates: optimizer steps behind the trainer's weights when it read the batch; None = not known.
    """
    metrics = {
        **reward_metrics(groups_P),
        **answer_metrics(groups_P),
        **group_metrics(groups_P),
        **({} if num_updates is None else staleness_metrics(groups_P, num_updates)),
        "batch/skipped": float(not data_D),
        "batch/datums": float(len(data_D)),
        "batch/tokens": float(sum(datum.model_input.length for datum in data_D)),
    }
    if output is not None:
        metrics |= gap_metrics(data_D, output)
        metrics |= {f"loss/{name.replace(':', '_').removeprefix('loss_')}": value for name, value in output.metrics.items()}
    return metrics


def reward_metrics(groups_P: Sequence[TrajectoryGroup]) -> dict[str, float]:
    """reward/mean, reward/std over all trajectories; reward/<tag>/mean; train/accuracy, train/format; env/<name> for what else
    environments report (the last value of a trajectory counts)."""
    rewards = [reward for group in groups_P for reward in group.rewards_G]
    if not rewards:
        return {}
    metrics = {"reward/mean": statistics.fmean(rewards), "reward/std": statistics.pstdev(rewards)}
    tags = sorted({tag for group in groups_P for tag in group.tags})
    for tag in tags if len(tags) > 1 else ():
        tagged = [reward for group in groups_P if tag in group.tags for reward in group.rewards_G]
        metrics |= {f"reward/{tag}/mean": statistics.fmean(tagged)} if tagged else {}
    keys = {"correct": "train/accuracy", "format": "train/format"}
    return metrics | {keys.get(name, f"env/{name}"): value for name, value in reported_means(groups_P).items()}


def reported_means(groups_P: Sequence[TrajectoryGroup]) -> dict[str, float]:
    """What environments report, each name averaged over the trajectories that report it (the last value of a trajectory counts);
    `correct` and `format` over all trajectories, where some report them."""
    reports = [
        {**last_metrics(trajectory), **group_report}
        for group in groups_P
        for trajectory, group_report in zip(group.trajectories_G, group.metrics_G, strict=True)
    ]
    names = sorted({name for report in reports for name in report})
    return {name: _mean(report.get(name, 0.0) for report in reports if name in report or name in ("correct", "format")) for name in names}


def answer_metrics(groups_P: Sequence[TrajectoryGroup]) -> dict[str, float]:
    """How long the attempts were, how they ended, and how sure the sampler was of its tokens."""
    trajectories = [trajectory for group in groups_P for trajectory in group.trajectories_G]
    transitions = [transition for trajectory in trajectories for transition in trajectory.transitions]
    if not transitions:
        return {"answer/tokens_sum": 0.0}
    logprobs = np.concatenate([np.asarray(t.sampling_logprobs_T, dtype=np.float64) for t in transitions])
    lengths = [trajectory.num_sampled_tokens for trajectory in trajectories]
    return {
        "answer/tokens_mean": statistics.fmean(lengths),
        "answer/tokens_max": float(max(lengths)),
        "answer/tokens_sum": float(sum(lengths)),
        "answer/turns_mean": statistics.fmean(len(trajectory.transitions) for trajectory in trajectories),
        "answer/cut_off_frac": _mean(t.stop_reason == "length" for t in transitions),
        "answer/limited_frac": _mean(trajectory.stop_reason != "done" for trajectory in trajectories),
        "policy/entropy_nats": float(-logprobs.mean()) if logprobs.size else 0.0,
    }


def group_metrics(groups_P: Sequence[TrajectoryGroup]) -> dict[str, float]:
    """groups/skipped counts groups whose attempts all earned the same (or were all lost): no advantage, no datums."""
    lost = sum(len(group.errors) for group in groups_P)
    return {
        "groups/total": float(len(groups_P)),
        "groups/skipped": float(sum(len(set(group.rewards_G)) <= 1 for group in groups_P)),
        "groups/all_right": float(sum(_all_report(group, lambda value: value >= 1.0) for group in groups_P)),
        "groups/all_wrong": float(sum(_all_report(group, lambda value: value <= 0.0) for group in groups_P)),
        "rollout/env_errors": float(lost),
    }


def staleness_metrics(groups_P: Sequence[TrajectoryGroup], num_updates: int) -> dict[str, float]:
    """Optimizer steps between the weights that sampled and the weights that train; 0 in a synchronous loop. Absent where the server
    does not say which weights sampled."""
    ages = [
        num_updates - transition.policy_version
        for group in groups_P
        for trajectory in group.trajectories_G
        for transition in trajectory.transitions
        if transition.policy_version is not None
    ]
    return {"policy/staleness_mean_steps": statistics.fmean(ages), "policy/staleness_max_steps": float(max(ages))} if ages else {}


def gap_metrics(data_D: Sequence[Datum], output: ForwardBackwardOutput) -> dict[str, float]:
    """How far the trainer's log p is from the sampler's log q, on the sampled tokens that train.

    Before the first update after a sync both engines hold the same weights: what is left is their numerical noise (and, away from
    temperature 1, the temperature). gap/kl_sampler_trainer_nats is the mean of q - p, an unbiased estimate of KL(sampler || trainer)
    that may come out below 0; gap/kl_k3_nats the mean of r - 1 - log r with r = p/q, never negative (Schulman 2020,
    joschu.net/blog/kl-approx.html).
    """
    differences = [
        difference
        for datum, outputs in zip(data_D, output.loss_fn_outputs, strict=True)
        for difference in [_on_sampled(datum, outputs["logprobs"].to_numpy())]
    ]
    log_ratio_T = np.concatenate(differences) if differences else np.zeros(0)
    if not log_ratio_T.size:
        return {}
    ratio_T = np.exp(log_ratio_T)
    return {
        "gap/kl_sampler_trainer_nats": float(-log_ratio_T.mean()),
        "gap/kl_k3_nats": float((ratio_T - 1.0 - log_ratio_T).mean()),
        "gap/max_nats": float(np.abs(log_ratio_T).max()),
        "gap/ratio_mean": float(ratio_T.mean()),
        "gap/ratio_max": float(ratio_T.max()),
        "gap/ratio_min": float(ratio_T.min()),
    }


def optim_metrics(response: OptimStepResponse) -> dict[str, float]:
    """optim/grad_norm and what else the optimizer reports ("grad_norm:mean" on the wire: one step, so the reduction says nothing)."""
    return {f"optim/{name.partition(':')[0]}": value for name, value in (response.metrics or {}).items()}


def newest_version(groups_P: Sequence[TrajectoryGroup]) -> int | None:
    """The highest policy_version that sampled a transition; None where the server does not say."""
    versions = [
        transition.policy_version
        for group in groups_P
        for trajectory in group.trajectories_G
        for transition in trajectory.transitions
        if transition.policy_version is not None
    ]
    return max(versions, default=None)


def transcript_rows(
    groups_P: Sequence[TrajectoryGroup], split: str, decode: Callable[[list[int]], str]
) -> Iterator[dict[str, str | int | float | None]]:
    """The first attempt of each group as text. A turn's own logs may bring a shorter `prompt` and `response` than its tokens."""
    for group in groups_P:
        for trajectory, reward in list(zip(group.trajectories_G, group.rewards_G, strict=True))[:1]:
            turns = trajectory.transitions
            yield {
                "split": split,
                "prompt": decode(_text_tokens(turns[0].observation)) if turns else "",
                "response": "\n".join(decode(list(turn.action)) for turn in turns),
                "reward": reward,
                "tokens": trajectory.num_sampled_tokens,
                "stop_reason": trajectory.stop_reason,
                "policy_version": turns[-1].policy_version if turns else None,
                **(turns[-1].logs if turns else {}),
            }


def last_metrics(trajectory: Trajectory) -> Metrics:
    """Each metric's last value over the turns of a trajectory."""
    merged: dict[str, float | int] = {}
    for transition in trajectory.transitions:
        merged.update(transition.metrics)
    return merged


def accuracy(groups_P: Sequence[TrajectoryGroup]) -> float:
    """Share of attempts whose last turn reports `correct` >= 1; attempts lost to a broken environment count as wrong."""
    num_right = sum(num_correct(group) for group in groups_P)
    num_attempts = sum(len(group.trajectories_G) + len(group.errors) for group in groups_P)
    return num_right / num_attempts if num_attempts else 0.0


def num_correct(group: TrajectoryGroup) -> int:
    """Attempts whose last turn reports `correct` >= 1."""
    return sum(last_metrics(trajectory).get("correct", 0.0) >= 1.0 for trajectory in group.trajectories_G)


def sampled_tokens(datum: Datum) -> npt.NDArray[np.bool_]:
    """Where the datum trains, [T]: its weights say so, or else its advantages, which are 0.0 off the sampled tokens."""
    marks_T = datum.loss_fn_inputs["weights" if "weights" in datum.loss_fn_inputs else "advantages"].to_numpy()
    return np.asarray(marks_T != 0)


def _on_sampled(datum: Datum, target_logprobs_T: npt.NDArray[np.floating]) -> Floats:
    """log p - log q where the datum trains."""
    sampling_logprobs_T = datum.loss_fn_inputs["logprobs"].to_numpy()
    difference: Floats = (target_logprobs_T.astype(np.float64) - sampling_logprobs_T)[sampled_tokens(datum)]
    return difference


def _text_tokens(observation: ModelInput) -> list[int]:
    return [token for chunk in observation.chunks if isinstance(chunk, EncodedTextChunk) for token in chunk.tokens]


def _all_report(group: TrajectoryGroup, holds: Callable[[float], bool]) -> bool:
    reports = [last_metrics(trajectory) for trajectory in group.trajectories_G]
    return bool(reports) and all("correct" in report and holds(report["correct"]) for report in reports)


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)
