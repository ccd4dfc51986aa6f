"""From trajectories to training data: which tokens, shifted by one, with which logprob and advantage.

Position i of every array belongs to position i of model_input and speaks of the token *after* it. With full = observation + action,
model_input is full[:-1], target_tokens is full[1:], and logprobs and advantages are cut [1:] the same way. Worked example: observation
[5, 6, 7], action [8, 9] sampled with log-probabilities -0.5 and -0.25, advantage 2:

    model_input     5    6    7     8
    target_tokens   6    7    8     9
    logprobs        0    0   -0.5  -0.25
    advantages      0    0    2     2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ptlab.errors import InvalidRequestError
from ptlab.losses import LOSSES, Loss, resolve_loss
from ptlab.rl.types import Trajectory, TrajectoryGroup, Transition
from ptlab.types import Datum, EncodedTextChunk, ModelInput, ModelInputChunk, TensorData

Element = int | ModelInputChunk
"""A text token, or a chunk of another kind (an image), which takes `chunk.length` positions."""


def group_to_datums(
    group: TrajectoryGroup, advantages_G: Sequence[float], *, loss: str = "importance_sampling", mark_sampled: bool = False
) -> list[Datum]:
    """The datums of one group; none if every advantage is zero (the attempts agree, there is nothing to learn from).

    A trajectory of advantage zero inside a group that differs is left out as well: its gradient is exactly zero under every loss but
    dro, whose regulariser acts on it.

    Args:
        mark_sampled: for whoever adds to the advantages (rl/kl_penalty.py, which also takes the mark off again): every trajectory is
            kept, and "mask" is 1.0 at each sampled token.
    """
    if len(advantages_G) != len(group.trajectories_G):
        raise InvalidRequestError(f"group_to_datums: {len(advantages_G)} advantages for {len(group.trajectories_G)} trajectories; one each")
    if all(advantage == 0.0 for advantage in advantages_G) and not mark_sampled:
        return []
    keep_zero = policy_loss(loss).needs_all_tokens or mark_sampled
    return [
        datum
        for trajectory, advantage in zip(group.trajectories_G, advantages_G, strict=True)
        if advantage != 0.0 or keep_zero
        for datum in trajectory_to_datums(trajectory, advantage, loss=loss, mark_sampled=mark_sampled)
    ]


def trajectory_to_datums(
    trajectory: Trajectory, advantage: float, *, loss: str = "importance_sampling", mark_sampled: bool = False
) -> list[Datum]:
    """One datum while each turn's observation extends the turn before exactly; a new datum where it does not.

    A renderer that drops old thinking, or text that tokenizes differently the second time, breaks the chain; the turns then train
    separately, each on the prompt it was really sampled from.
    """
    stretches: list[_Stretch] = []
    for transition in trajectory.transitions:
        if not transition.action:
            continue
        observation = elements_of(transition.observation)
        if not stretches or not stretches[-1].is_prefix_of(observation):
            stretches.append(_Stretch())
        stretches[-1].extend(observation, transition, advantage)
    return [stretch.to_datum(loss, mark_sampled) for stretch in stretches if stretch.num_positions > 1]


def elements_of(observation: ModelInput) -> list[Element]:
    """Text chunks as single tokens (how the text was cut into chunks does not matter), other chunks as they are."""
    elements: list[Element] = []
    for chunk in observation.chunks:
        if isinstance(chunk, EncodedTextChunk):
            elements.extend(chunk.tokens)
        else:
            elements.append(chunk)
    return elements


@dataclass(slots=True)
class _Stretch:
    """Turns that extend each other; the lists below `elements` have one entry per position."""

    elements: list[Element] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    sampled: list[float] = field(default_factory=list)

    @property
    def num_positions(self) -> int:
        return len(self.tokens)

    def is_prefix_of(self, observation: list[Element]) -> bool:
        return observation[: len(self.elements)] == self.elements

    def extend(self, observation: list[Element], transition: Transition, advantage: float) -> None:
        new = observation[len(self.elements) :]
        self.elements += new
        for element in new:
            tokens = [element] if isinstance(element, int) else [0] * element.length
            self._add(tokens, logprobs=None, advantage=0.0)
        self.elements += transition.action
        self._add(list(transition.action), logprobs=list(transition.sampling_logprobs_T), advantage=advantage)

    def _add(self, tokens: list[int], *, logprobs: list[float] | None, advantage: float) -> None:
        """logprobs None: tokens that were given, not sampled."""
        if logprobs is not None and len(logprobs) != len(tokens):
            raise InvalidRequestError(f"transition: {len(tokens)} sampled tokens with {len(logprobs)} logprobs; one each is needed")
        self.tokens += tokens
        self.logprobs += [0.0] * len(tokens) if logprobs is None else logprobs
        self.advantages += [advantage] * len(tokens)
        self.sampled += [0.0 if logprobs is None else 1.0] * len(tokens)

    def to_datum(self, loss: str, mark_sampled: bool) -> Datum:
        spec = policy_loss(loss)
        inputs = {
            "target_tokens": TensorData.from_numpy(np.asarray(self.tokens[1:], dtype=np.int64)),
            "logprobs": TensorData.from_numpy(np.asarray(self.logprobs[1:], dtype=np.float32)),
            "advantages": TensorData.from_numpy(np.asarray(self.advantages[1:], dtype=np.float32)),
        }
        sampled = TensorData.from_numpy(np.asarray(self.sampled[1:], dtype=np.float32))
        if "sequence_ratio_mask" in spec.inputs:
            inputs["sequence_ratio_mask"] = sampled
        if spec.needs_all_tokens:  # dro pulls log p towards log q on every token it is not told to leave alone
            inputs["weights"] = sampled
        if mark_sampled:
            inputs["mask"] = sampled
        return Datum(model_input=_model_input(self.elements[:-1]), loss_fn_inputs=inputs)


def _model_input(elements: Sequence[Element]) -> ModelInput:
    chunks: list[ModelInputChunk] = []
    tokens: list[int] = []
    for element in [*elements, None]:
        if isinstance(element, int):
            tokens.append(element)
            continue
        if tokens:
            chunks.append(EncodedTextChunk(tokens=tokens))
            tokens = []
        if element is not None:
            chunks.append(element)
    return ModelInput(chunks=chunks)


def policy_loss(name: str) -> Loss:
    """Raises: InvalidRequestError if the loss is unknown, or does not read advantages (rewards could not reach it)."""
    resolve_loss(name)
    if "advantages" not in LOSSES[name].inputs:
        raise InvalidRequestError(
            f"loss {name!r} reads no advantages, so no reward reaches it; "
            f"use importance_sampling, ppo, cispo, dro, gspo or stable_reinforce"
        )
    return LOSSES[name]
