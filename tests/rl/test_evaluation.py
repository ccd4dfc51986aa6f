"""Evaluation asks each problem once at temperature and once greedily, with the same seeds every time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from ptlab.rl.evaluation import evaluate
from ptlab.rl.rollout import RolloutSettings
from ptlab.rl.types import Env, EnvGroupBuilder, StepResult
from ptlab.types import ModelInput, SampledSequence, SampleResponse, SamplingParams

SETTINGS = RolloutSettings(max_tokens=4, temperature=0.7, top_k=5, top_p=0.9)


@dataclass
class Client:
    """Answers 1 greedily and the parity of the seed at temperature."""

    params: list[SamplingParams] = field(default_factory=list)

    async def sample(self, prompt: ModelInput, num_samples: int, sampling_params: SamplingParams) -> SampleResponse:
        self.params.append(sampling_params)
        token = 1 if sampling_params.temperature == 0 else sampling_params.seed % 2
        sequence = SampledSequence.from_lists([token] * (1 + token), [-0.5] * (1 + token), stop_reason="stop", sequence_id="0")
        return SampleResponse(sequences=[sequence])


class OneIsRight(Env):
    async def initial_observation(self):
        return ModelInput.from_ints([5]), None

    async def step(self, action, *, extra=None):
        right = float(action[0] == 1)
        metrics = {"correct": right}
        return StepResult(reward=right, episode_done=True, next_observation=ModelInput.empty(), next_stop_condition=None, metrics=metrics)


class Builder(EnvGroupBuilder):
    async def make_envs(self):
        return [OneIsRight()]


def test_accuracy_at_temperature_and_greedy_with_fixed_seeds():
    client = Client()
    first = asyncio.run(evaluate([Builder()] * 20, client, SETTINGS, seed=3))
    sampled, greedy = client.params[:20], client.params[20:]
    assert {(p.temperature, p.top_k, p.top_p) for p in sampled} == {(0.7, 5, 0.9)}
    assert {(p.temperature, p.top_k, p.top_p) for p in greedy} == {(0.0, -1, 1.0)}
    odd = sum(p.seed % 2 for p in sampled)
    assert 0 < odd < 20
    assert first.metrics == {
        "eval/accuracy": odd / 20,
        "eval/accuracy_greedy": 1.0,
        "eval/tokens_mean": 1 + odd / 20,
        "eval/tokens_mean_greedy": 2.0,
    }
    again, other = Client(), Client()
    assert asyncio.run(evaluate([Builder()] * 20, again, SETTINGS, seed=3)).metrics == first.metrics
    asyncio.run(evaluate([Builder()] * 20, other, SETTINGS, seed=4))
    assert [p.seed for p in again.params] == [p.seed for p in client.params]
    assert not {p.seed for p in client.params} & {p.seed for p in other.params}


def test_greedy_can_be_left_out():
    client = Client()
    evaluation = asyncio.run(evaluate([Builder()] * 2, client, SETTINGS, seed=3, greedy=False))
    assert len(client.params) == 2 and evaluation.greedy_P == [] and set(evaluation.metrics) == {"eval/accuracy", "eval/tokens_mean"}
