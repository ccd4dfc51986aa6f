"""Two policies whose replies and probabilities are known: who wins, how long they are, how far apart."""

from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest
from transformers import AutoTokenizer

from ptlab.envs.policy_comparison import compare_policies, draw_replies
from ptlab.renderers import get_renderer, text_of
from ptlab.types import SampledSequence, SampleResponse

PROMPTS = [[{"role": "user", "content": f"Compute {number}+{number}."}] for number in range(40)]


class Policy:
    """Replies "sum" or "the answer of the sum", each with the given probability; all tokens of a reply share its log-probability."""

    def __init__(self, renderer, long_share):
        self.renderer, self.long_share = renderer, long_share

    def encoded(self, text):
        return [*self.renderer.codec.encode(text), *self.renderer.get_stop_sequences()]

    def logprob(self, is_long):
        return math.log(self.long_share if is_long else 1 - self.long_share)

    def sample(self, prompt, num_samples, sampling_params):
        is_long = np.random.default_rng(sampling_params.seed).random() < self.long_share
        tokens = self.encoded("the answer of the sum" if is_long else "sum")
        drawn = {"tokens_np": np.asarray(tokens), "logprobs_np": np.full(len(tokens), self.logprob(is_long) / len(tokens))}

        async def answer():
            return SampleResponse(sequences=[SampledSequence(stop_reason="stop", sequence_id="s", **drawn)])

        return answer()

    def compute_logprobs(self, prompt):
        async def answer():
            tokens = prompt.to_ints()
            long = self.encoded("the answer of the sum")
            is_long = tokens[-len(long) :] == long
            reply = long if is_long else self.encoded("sum")
            before = len(tokens) - len(reply)
            return [None, *[-9.0] * (before - 1), *[self.logprob(is_long) / len(reply)] * len(reply)]

        return answer()


class LikesLong:
    async def score(self, conversation, reply):
        raise AssertionError("a comparison needs no score")

    async def win_matrix(self, conversation, replies_G):
        lengths = [len(text_of(reply)) for reply in replies_G]
        return [[0.5 if a == b else float(a > b) for b in lengths] for a in lengths]


@pytest.fixture(scope="module")
def renderer(tiny_qwen3_dir):
    return get_renderer("chatml", AutoTokenizer.from_pretrained(tiny_qwen3_dir))


def test_wins_lengths_and_kl(renderer):
    first, second = Policy(renderer, 0.9), Policy(renderer, 0.2)
    found = asyncio.run(compare_policies(first, second, renderer, LikesLong(), PROMPTS, max_tokens=20))
    replies = asyncio.run(draw_replies(first, renderer, PROMPTS, max_tokens=20, seed=3))
    assert text_of(replies[0].message) in ("sum", "the answer of the sum")
    assert 0.7 < found.wins.rate < 1.0  # expected .9 x .8 + half of the ties
    assert found.wins.length_controlled == pytest.approx(0.5, abs=0.05)  # the judge looks at nothing but length
    assert found.tokens[0] > found.tokens[1] and found.wins.length_difference == pytest.approx(found.tokens[0] - found.tokens[1])
    exact = 0.9 * math.log(0.9 / 0.2) + 0.1 * math.log(0.1 / 0.8)
    assert found.kl == pytest.approx(exact, abs=0.4)


def test_a_policy_against_itself_is_no_win_and_no_distance(renderer):
    policy = Policy(renderer, 0.5)
    found = asyncio.run(compare_policies(policy, policy, renderer, LikesLong(), PROMPTS, max_tokens=20))
    assert found.wins.rate == pytest.approx(0.5, abs=0.2) and found.kl == pytest.approx(0.0, abs=1e-9)
    again = asyncio.run(compare_policies(policy, policy, renderer, LikesLong(), PROMPTS, max_tokens=20))
    assert again == found
