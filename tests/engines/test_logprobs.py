"""log softmax against float64."""

from __future__ import annotations

import torch

from ptlab.engines.logprobs import log_softmax


def test_log_softmax_is_exact_where_torchs_own_is_not() -> None:
    scores_BV = torch.randn(4, 151_936, generator=torch.Generator().manual_seed(0)) * 0.1
    scores_BV[:, 7] += 17.0  # beside the largest term each of the others is below float32's resolution; together they are 0.006
    exact_BV = scores_BV.double().log_softmax(-1)
    assert (log_softmax(scores_BV) - exact_BV).abs().max() < 5e-6
    assert (scores_BV.log_softmax(-1) - exact_BV).abs().max() > 2e-5, "torch is right now: engines/logprobs.log_softmax can go"
    cut = torch.tensor([[0.5, -torch.inf, 0.25]])
    torch.testing.assert_close(log_softmax(cut), cut.log_softmax(-1))
