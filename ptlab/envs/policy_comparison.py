"""Two policies answer the same prompts; a judge says whose replies are better, and the first says how far it is from the second."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ptlab.envs.judges import Judge
from ptlab.errors import EngineError
from ptlab.renderers import Message, Renderer
from ptlab.rl.seeds import stable_seed
from ptlab.rl.win_rate import WinRate, win_rate
from ptlab.types import ModelInput, SamplingParams

if TYPE_CHECKING:
    from ptlab.client.sampling import SamplingClient


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A sampled reply."""

    message: Message
    prompt: ModelInput
    tokens: Sequence[int]
    """T, the stop token included."""
    logprob: float
    """log p of all its tokens under the policy that drew it, nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyComparison:
    """First policy against second."""

    wins: WinRate
    tokens: tuple[float, float]
    """Mean tokens per reply of each."""
    kl: float
    """KL(first || second) in nats per reply, estimated on the first's replies."""


async def draw_replies(
    client: SamplingClient, renderer: Renderer, prompts_N: Sequence[Sequence[Message]], *, max_tokens: int, seed: int
) -> list[Reply]:
    """One reply per prompt at temperature 1; the same seed draws the same replies."""

    async def draw(index: int) -> Reply:
        prompt = renderer.build_generation_prompt(prompts_N[index])
        params = SamplingParams(max_tokens=max_tokens, seed=stable_seed(seed, index), stop=renderer.get_stop_sequences(), temperature=1.0)
        [sequence] = (await client.sample(prompt=prompt, num_samples=1, sampling_params=params)).sequences
        if sequence.logprobs is None:
            raise EngineError("a sampled sequence has no logprobs", engine="sampler", operation="sample")
        message, _ = renderer.parse_response(sequence.tokens)
        return Reply(message=message, prompt=prompt, tokens=list(sequence.tokens), logprob=sum(sequence.logprobs))

    return list(await asyncio.gather(*[draw(index) for index in range(len(prompts_N))]))


async def logprob_under(client: SamplingClient, reply: Reply) -> float:
    """log p of the reply's tokens under another policy, nats."""
    logprobs = await client.compute_logprobs(ModelInput.from_ints([*reply.prompt.to_ints(), *reply.tokens]))
    found = [value for value in logprobs[-len(reply.tokens) :] if value is not None]
    if len(found) != len(reply.tokens):
        raise EngineError("a prompt token has no log-probability", engine="sampler", operation="compute_logprobs")
    return sum(found)


async def compare_policies(
    first: SamplingClient,
    second: SamplingClient,
    renderer: Renderer,
    judge: Judge,
    prompts_N: Sequence[Sequence[Message]],
    *,
    max_tokens: int,
    seed: int = 0,
) -> PolicyComparison:
    """Both answer every prompt once. A tie (the judge finds neither better) counts half."""
    ours, theirs = await asyncio.gather(
        draw_replies(first, renderer, prompts_N, max_tokens=max_tokens, seed=stable_seed(seed, "first")),
        draw_replies(second, renderer, prompts_N, max_tokens=max_tokens, seed=stable_seed(seed, "second")),
    )
    pairs = list(zip(prompts_N, ours, theirs, strict=True))
    matrices = await asyncio.gather(*[judge.win_matrix(prompt, [mine.message, other.message]) for prompt, mine, other in pairs])
    wins = [0.5 if matrix[0][1] == 0.5 else float(matrix[0][1] > 0.5) for matrix in matrices]
    away = await asyncio.gather(*[logprob_under(second, reply) for reply in ours])
    lengths = [[len(reply.tokens) for reply in side] for side in (ours, theirs)]
    return PolicyComparison(
        wins=win_rate(wins, *lengths),
        tokens=(sum(lengths[0]) / len(ours), sum(lengths[1]) / len(theirs)),
        kl=sum(reply.logprob - other for reply, other in zip(ours, away, strict=True)) / len(ours),
    )
