from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ptlab.engines.token_draw import RowParams, UniformStreams, distribution, inverse_cdf, pick

LOGITS = torch.tensor([[math.log(p) for p in (0.5, 0.2, 0.2, 0.1)]])


def probs(temperature: float = 1.0, top_k: int = -1, top_p: float = 1.0, logits: torch.Tensor = LOGITS) -> list[float]:
    params = RowParams.build([(temperature, top_k, top_p)] * len(logits), logits.shape[1], logits.device)
    return [round(p, 5) for p in distribution(logits, params)[0].exp().tolist()]


def test_distributions_by_hand() -> None:
    assert probs() == [0.5, 0.2, 0.2, 0.1]
    assert probs(temperature=0.5) == pytest.approx([0.25 / 0.34, 0.04 / 0.34, 0.04 / 0.34, 0.01 / 0.34], abs=1e-5)
    assert probs(temperature=0.0) == [0.5, 0.2, 0.2, 0.1]  # greedy reports temperature 1
    assert probs(temperature=0.0, top_k=1) == [0.5, 0.2, 0.2, 0.1]
    assert probs(top_k=1) == [1, 0, 0, 0]
    assert probs(top_k=2) == pytest.approx([5 / 7, 2 / 7, 0, 0], abs=1e-5)  # a tie goes to the lower id
    assert probs(top_k=9) == [0.5, 0.2, 0.2, 0.1]
    assert probs(top_p=0.45) == [1, 0, 0, 0]
    assert probs(top_p=0.55) == pytest.approx([5 / 7, 2 / 7, 0, 0], abs=1e-5)
    assert probs(top_p=0.95) == [0.5, 0.2, 0.2, 0.1]
    assert probs(top_p=1e-9) == [1, 0, 0, 0]
    assert probs(top_k=3, top_p=0.7) == pytest.approx([5 / 7, 2 / 7, 0, 0], abs=1e-5)  # of the three: 5/9, 7/9: two are enough


def test_rows_keep_their_own_parameters_in_any_order() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    rows = [(1.0, -1, 1.0), (0.5, 3, 1.0), (0.0, -1, 1.0), (2.0, -1, 0.5)]
    together = distribution(logits, RowParams.build(rows, 50, logits.device))
    for i, row in enumerate(rows):
        alone = distribution(logits[i : i + 1], RowParams.build([row], 50, logits.device))
        torch.testing.assert_close(together[i], alone[0])
        assert together[i].exp().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_bfloat16_logits_are_normalised_in_float32() -> None:
    logits = torch.randn(2, 4000, dtype=torch.bfloat16)
    logprobs = distribution(logits, RowParams.build([(1.0, -1, 1.0)] * 2, 4000, logits.device))
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, torch.log_softmax(logits.double(), -1).float())


def test_inverse_cdf_by_hand_and_at_the_edges() -> None:
    logprobs = torch.tensor([[-torch.inf, math.log(0.25), -torch.inf, math.log(0.75), -torch.inf]])
    uniforms = torch.tensor([[0.0, 0.2499, 0.2501, 0.9999, 1.0 - 2.0**-53]], dtype=torch.float64)
    assert inverse_cdf(logprobs, uniforms).tolist() == [[1, 1, 3, 3, 3]]  # never a token of probability 0


def test_pick_is_greedy_only_where_asked() -> None:
    params = RowParams.build([(0.0, -1, 1.0), (1.0, -1, 1.0)], 4, LOGITS.device)
    logprobs = distribution(LOGITS.repeat(2, 1), params)
    assert pick(logprobs, torch.tensor([0.95, 0.95], dtype=torch.float64), params).tolist() == [0, 3]


def test_streams_depend_on_seed_and_number_alone() -> None:
    streams = UniformStreams([(7, 0), (7, 1), (8, 0)])
    first = streams.next(5)
    assert len(np.unique(first)) == 15
    np.testing.assert_array_equal(first[1], UniformStreams([(7, 1)]).next(5)[0])
    streams.keep([2, 0])
    more = UniformStreams([(8, 0), (7, 0)]).next(9)
    np.testing.assert_array_equal(streams.next(4), more[:, 5:])
    np.testing.assert_array_equal(UniformStreams([(7 + 2**63, 0)]).next(5)[0], first[0])
    np.testing.assert_array_equal(UniformStreams([(-1, 0)]).next(2), UniformStreams([(2**63 - 1, 0)]).next(2))
