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


class Tagged(EnvGroupBuilder):
    """Four attempts; `right` of them answer 1 whatever is sampled."""

    def __init__(self, tag: str, right: int) -> None:
        self.tag, self.right = tag, right

    async def make_envs(self):
        return [Always(float(index < self.right)) for index in range(4)]

    def logging_tags(self):
        return [self.tag]


class Always(OneIsRight):
    def __init__(self, correct: float) -> None:
        self.correct = correct

    async def step(self, action, *, extra=None):
        metrics = {"correct": self.correct, "guesses": 2 * self.correct}
        nothing = ModelInput.empty()
        return StepResult(reward=0.0, episode_done=True, next_observation=nothing, next_stop_condition=None, metrics=metrics)


def test_pass_at_k_and_what_environments_report_by_tag():
    class Many(Client):
        async def sample(self, prompt, num_samples, sampling_params):
            return SampleResponse(sequences=[(await super().sample(prompt, 1, sampling_params)).sequences[0]] * num_samples)

    client = Many()
    metrics = asyncio.run(evaluate([Tagged("easy", 3), Tagged("hard", 0)], client, SETTINGS, seed=3)).metrics
    assert metrics["eval/accuracy"] == 3 / 8 and metrics["eval/pass@1"] == 3 / 8
    assert metrics["eval/pass@2"] == 0.5  # 3 of 4 right: two draws always hold a right one
    assert metrics["eval/pass@4"] == 0.5
    assert (metrics["eval/easy/accuracy"], metrics["eval/hard/accuracy"]) == (0.75, 0.0)
    assert (metrics["eval/guesses"], metrics["eval/easy/guesses"]) == (0.75, 1.5)
    assert metrics["eval/easy/accuracy_greedy"] == 1.0  # the first attempt of each, once
    assert [params.temperature for params in client.params] == [0.7, 0.7, 0.0, 0.0]
