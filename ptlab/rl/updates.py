"""Several optimizer steps on one batch: its datums are dealt into minibatches, one step each; what came of them is put together again.

    one batch, updates_per_batch 4:     [ a a a a  b b b b  c c c c ]  ->  [a a a]  [a b b]  [b b c]  [c c c]

Every datum is trained on once, so the cost is that of one update. From the second minibatch on the weights are no longer those that
sampled, and the loss must weigh that (docs/losses.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

from ptlab.types import Datum, ForwardBackwardOutput, OptimStepResponse


def minibatches(data_D: Sequence[Datum], count: int) -> list[list[Datum]]:
    """The datums in order, in `count` parts of as equal a number as can be; in as many as there are datums if those are fewer.

    Groups stay together but where a border falls into one: its baseline was taken over the whole group, so nothing is biased.
    """
    count = min(count, len(data_D))
    borders = [index * len(data_D) // count for index in range(count + 1)] if count else []
    return [list(data_D[first:last]) for first, last in pairwise(borders)]


def joined_output(outputs: Sequence[ForwardBackwardOutput]) -> ForwardBackwardOutput:
    """What one call would have said of all datums, had the weights not moved between the minibatches.

    A metric is put together by its reduction (`name:reduction`): sums are added, of minima and maxima the outermost is kept, means are
    weighed by the tokens that count (`tokens:sum`). One that some minibatches lack, for want of such tokens, is taken over the others.
    """
    if len(outputs) == 1:
        return outputs[0]
    keys = dict.fromkeys(key for output in outputs for key in output.metrics)
    return ForwardBackwardOutput(
        loss_fn_output_type=outputs[0].loss_fn_output_type,
        loss_fn_outputs=[item for output in outputs for item in output.loss_fn_outputs],
        metrics={key: _joined(key, [output.metrics for output in outputs if key in output.metrics]) for key in keys},
    )


def _joined(key: str, metrics: Sequence[dict[str, float]]) -> float:
    values = [found[key] for found in metrics]
    match key.rpartition(":")[2]:
        case "sum":
            return math.fsum(values)
        case "min":
            return min(values)
        case "max":
            return max(values)
    tokens = [found["tokens:sum"] for found in metrics]
    return math.fsum(value * weight for value, weight in zip(values, tokens, strict=True)) / math.fsum(tokens)


def joined_steps(steps: Sequence[OptimStepResponse]) -> OptimStepResponse:
    """What the optimizer steps of one batch report (`grad_norm`, ...), averaged; `skipped:sum` counts those without a gradient, which move
    nothing, `updates:sum` the others."""
    found = [step.metrics or {} for step in steps]
    keys = dict.fromkeys(key for metrics in found for key in metrics)
    means = {key: fmean(metrics[key] for metrics in found if key in metrics) for key in keys}
    skipped = math.fsum(metrics.get("skipped:sum", 0.0) for metrics in found)
    return OptimStepResponse(metrics=means | {"skipped:sum": skipped, "updates:sum": len(steps) - skipped})
