"""Minibatches of a batch, and one report of several updates."""

from __future__ import annotations

import numpy as np
import pytest

from ptlab.rl.updates import joined_output, joined_steps, minibatches
from ptlab.types import Datum, ForwardBackwardOutput, ModelInput, OptimStepResponse, TensorData


def data(count: int) -> list[Datum]:
    return [Datum(model_input=ModelInput.from_ints([index]), loss_fn_inputs={}) for index in range(count)]


@pytest.mark.parametrize(
    ("num_datums", "count", "sizes"), [(12, 4, [3, 3, 3, 3]), (10, 4, [2, 3, 2, 3]), (3, 4, [1, 1, 1]), (5, 1, [5]), (0, 4, [])]
)
def test_every_datum_is_in_one_minibatch_in_order(num_datums: int, count: int, sizes: list[int]) -> None:
    data_D = data(num_datums)
    parts = minibatches(data_D, count)
    assert [len(part) for part in parts] == sizes
    assert [datum for part in parts for datum in part] == data_D


def output(logprob: float, **metrics: float) -> ForwardBackwardOutput:
    outputs = [{"logprobs": TensorData.from_numpy(np.array([logprob], dtype=np.float32))}]
    return ForwardBackwardOutput("ArrayRecord", outputs, {name.replace("__", ":"): value for name, value in metrics.items()})


def test_metrics_are_put_together_by_their_reduction() -> None:
    first = output(-1.0, loss__sum=2.0, tokens__sum=30.0, ratio__mean=1.0, ratio__max=1.5, ratio__min=0.5)
    second = output(-2.0, loss__sum=-5.0, tokens__sum=10.0, ratio__mean=2.0, ratio__max=3.0, ratio__min=0.9)
    nothing = output(-3.0, loss__sum=0.0, tokens__sum=0.0)  # no token counts: no mean, no extremes
    joined = joined_output([first, second, nothing])
    assert joined.metrics == {"loss:sum": -3.0, "tokens:sum": 40.0, "ratio:mean": 1.25, "ratio:max": 3.0, "ratio:min": 0.5}
    assert [item["logprobs"].to_numpy().item() for item in joined.loss_fn_outputs] == [-1.0, -2.0, -3.0]
    assert joined_output([first]) is first


def test_a_mean_over_minibatches_is_that_of_the_whole() -> None:
    """As the losses define it: over the tokens that count."""
    ratios = np.array([1.0, 2.0, 4.0, 1.0, 0.5])
    parts = [output(0.0, tokens__sum=float(len(part)), ratio__mean=float(part.mean())) for part in (ratios[:1], ratios[1:])]
    assert joined_output(parts).metrics["ratio:mean"] == pytest.approx(ratios.mean(), rel=1e-12)


def test_optimizer_steps_are_averaged_and_counted() -> None:
    steps = [OptimStepResponse(metrics={"grad_norm:mean": norm, "skipped:sum": 0.0}) for norm in (1.0, 3.0)]
    skipped = OptimStepResponse(metrics={"skipped:sum": 1.0})
    joined = joined_steps([*steps, skipped])
    assert joined.metrics == {"grad_norm:mean": 2.0, "skipped:sum": 1.0, "updates:sum": 2.0}
    assert joined_steps([OptimStepResponse(metrics=None)]).metrics == {"skipped:sum": 0.0, "updates:sum": 1.0}
