"""One number for one reply: how a language model with an adapter becomes a reward model.

After the conversation and the reply the user asks `Is this a good reply? Answer Yes or No.`, and

    score = log p("Yes") - log p("No")     at the place of the answer.

The softmax's normaliser cancels, so the score is a difference of two logits: a linear head on the last hidden state, which the two rows of
the output matrix initialise. It needs no new parameters, trains through forward_backward_custom on any server, and is read through
compute_logprobs of any sampler. Bradley-Terry sees differences of scores only: 0 has no meaning, +1 is e times better odds to be chosen.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from ptlab.errors import EngineError, InvalidRequestError
from ptlab.renderers import Message, Renderer, text_of
from ptlab.types import Datum, ModelInput, TensorData

if TYPE_CHECKING:
    from ptlab.client.sampling import SamplingClient

QUESTION = "Is this a good reply? Answer Yes or No."
YES, NO = "Yes", "No"


class VerdictPrompt:
    """How a reward model reads a reply, in one model's chat format. Training and scoring must use the same.

    Raises: InvalidRequestError if the format writes the two answers alike.
    """

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer
        yes, no = (self._written([{"role": "user", "content": QUESTION}], answer) for answer in (YES, NO))
        # some formats write more before an answer than a sample's prompt has (an empty thinking block): it is part of the question
        at = next((index for index, (a, b) in enumerate(zip(yes, no, strict=False)) if a != b), None)
        if at is None:
            raise InvalidRequestError(f"renderer {renderer.name!r} writes the verdicts {YES!r} and {NO!r} with the same first token")
        self.yes, self.no = yes[at], no[at]
        self._from_end = len(yes) - at

    def tokens(self, conversation: Sequence[Message], reply: Message) -> list[int]:
        """All tokens before the verdict."""
        # the text alone: a policy's thinking or tool calls may have no place in the reward model's format
        said = [*conversation, {"role": "assistant", "content": text_of(reply)}, {"role": "user", "content": QUESTION}]
        written = self._written(cast("list[Message]", said), YES)
        if written[-self._from_end] != self.yes:
            raise InvalidRequestError(
                f"renderer {self.renderer.name!r} writes the end of a conversation differently after another beginning"
            )
        return written[: -self._from_end]

    def datum(self, conversation: Sequence[Message], reply: Message) -> Datum:
        """For forward_backward_custom: target_tokens [N, 2] hold Yes and No in the last row; what stands above is not read."""
        tokens = self.tokens(conversation, reply)
        targets_NK = np.zeros((len(tokens), 2), dtype=np.int64)
        targets_NK[-1] = self.yes, self.no
        weights_NK = np.zeros((len(tokens), 2), dtype=np.float32)
        weights_NK[-1] = 1.0, 1.0  # marks the row for `score_of`; a custom loss is not weighed by it
        inputs = {"target_tokens": TensorData.from_numpy(targets_NK), "weights": TensorData.from_numpy(weights_NK)}
        return Datum(model_input=ModelInput.from_ints(tokens), loss_fn_inputs=inputs)

    def _written(self, messages: Sequence[Message], answer: str) -> list[int]:
        written, _ = self.renderer.build_supervised_example([*messages, {"role": "assistant", "content": answer}])
        return written.to_ints()


def score_of(logprobs_NK: Tensor) -> Tensor:
    """The score, a scalar with gradient, from the log-probabilities [N, 2] of a datum of VerdictPrompt."""
    if logprobs_NK.dim() != 2 or logprobs_NK.shape[1] != 2:
        raise InvalidRequestError(f"log-probabilities of a verdict have shape {list(logprobs_NK.shape)}; [N, 2] is needed")
    return logprobs_NK[-1, 0] - logprobs_NK[-1, 1]


def scores_of(logprobs_D: Sequence[Tensor]) -> Tensor:
    """[D] scores."""
    return torch.stack([score_of(logprobs_NK) for logprobs_NK in logprobs_D])


class RewardModel:
    """Scores replies with a trained reward model through a sampler.

    Each score is two requests, the prompt with Yes and with No at its end: every server that speaks Tinker can answer them.
    """

    def __init__(self, sampling_client: SamplingClient, renderer: Renderer) -> None:
        self._client = sampling_client
        self._prompt = VerdictPrompt(renderer)

    async def score(self, conversation: Sequence[Message], reply: Message) -> float:
        """log p(Yes) - log p(No), nats. Raises: what the sampler raises, e.g. InvalidRequestError for a reply longer than its context."""
        tokens = self._prompt.tokens(conversation, reply)
        yes, no = await asyncio.gather(self._last(tokens, self._prompt.yes), self._last(tokens, self._prompt.no))
        return yes - no

    async def win_matrix(self, conversation: Sequence[Message], replies_G: Sequence[Message]) -> list[list[float]]:
        """[G, G]: probability that reply i is preferred to reply j, under Bradley-Terry."""
        scores_G = torch.tensor(await asyncio.gather(*[self.score(conversation, reply) for reply in replies_G]), dtype=torch.float64)
        matrix: list[list[float]] = torch.sigmoid(scores_G[:, None] - scores_G[None, :]).tolist()
        return matrix

    async def _last(self, tokens: Sequence[int], verdict: int) -> float:
        logprobs = await self._client.compute_logprobs(ModelInput.from_ints([*tokens, verdict]))
        last = logprobs[-1]
        if last is None:
            raise EngineError("the last prompt token has no log-probability", engine="sampler", operation="compute_logprobs")
        return last
