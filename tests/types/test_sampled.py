"""Sampling results: lists and arrays are two views of one thing."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from ptlab.types import MASK_LOGPROB, SampledSequence, SampleResponse, TopkLogprobs, prompt_logprobs_to_numpy


def test_a_sequence_from_lists_and_from_arrays_reads_the_same() -> None:
    topk = TopkLogprobs.from_lists([[(5, -0.5), (6, -1.5)], None], 2)
    ours = SampledSequence.from_lists([5, 6], [-0.5, -1.5], stop_reason="stop", sequence_id="a", topk_logprobs=topk, policy_version=3)
    theirs = SampledSequence(
        "stop", "a", _tokens_list=[5, 6], _logprobs_list=[-0.5, -1.5], _topk_logprobs_list=[[(5, -0.5), (6, -1.5)], None]
    )
    for sequence in (ours, theirs):
        assert sequence.tokens == [5, 6] and sequence.logprobs == [-0.5, -1.5]
        assert sequence.topk_logprobs == [[(5, -0.5), (6, -1.5)], None]
        assert all(type(token) is int for token in sequence.tokens)
    assert ours.tokens_np is not None and ours.tokens_np.dtype == np.int32
    assert ours.logprobs_np is not None and ours.logprobs_np.dtype == np.float32
    assert ours.policy_version == 3 and theirs.policy_version is None


def test_what_was_not_asked_for_is_none() -> None:
    sequence = SampledSequence.from_lists([1], None, stop_reason="length", sequence_id="a")
    assert sequence.logprobs is None and sequence.topk_logprobs is None and SampledSequence("stop", "a").tokens == []
    response = SampleResponse([sequence])
    assert response.prompt_logprobs is None and response.topk_prompt_logprobs is None
    assert response.target_prompt_logprobs is None and response.prompt_alt_tokens is None and response.prompt_cache_hit_tokens == 0


def test_tokens_are_no_constructor_argument() -> None:
    with pytest.raises(TypeError):
        SampledSequence(stop_reason="stop", sequence_id="a", tokens=[1])  # type: ignore[call-arg]


def test_prompt_logprobs_have_none_where_the_array_has_nan() -> None:
    response = SampleResponse([], prompt_logprobs_to_numpy([None, -1.5, None]))
    assert response.prompt_logprobs == [None, -1.5, None]
    assert SampleResponse([], _prompt_logprobs_list=[None, -2.0]).prompt_logprobs == [None, -2.0]


def test_topk_rows_end_at_the_empty_cell() -> None:
    topk = TopkLogprobs(
        np.array([[7, 0], [0, 0], [0, 3], [5, 0]], dtype=np.int32),
        np.array([[-1.0, MASK_LOGPROB], [MASK_LOGPROB, MASK_LOGPROB], [-0.25, -2.0], [-0.5, -0.75]], dtype=np.float32),
    )
    assert topk.to_lists() == [
        [(7, -1.0)],
        None,
        [(0, -0.25), (3, -2.0)],
        [(5, -0.5), (0, -0.75)],
    ]  # token 0 with a real logprob is a token
    again = TopkLogprobs.from_lists(topk.to_lists(), 2)
    assert np.array_equal(again.token_ids, topk.token_ids) and np.array_equal(again.logprobs, topk.logprobs)
    assert TopkLogprobs.from_lists([], 2).to_lists() == []
    assert SampleResponse([], topk_prompt_logprobs_np=topk).topk_prompt_logprobs == topk.to_lists()


def test_pickle_and_deepcopy_also_after_the_lists_were_read() -> None:
    response = SampleResponse([SampledSequence.from_lists([1, 2], [-1.0, -2.0], stop_reason="stop", sequence_id="a")])
    _ = response.sequences[0].tokens
    for twin in (pickle.loads(pickle.dumps(response)), copy.deepcopy(response)):
        assert twin.sequences[0].tokens == [1, 2] and twin.sequences[0].logprobs == [-1.0, -2.0]
