"""Write an environment in messages; the adapter turns it into one of tokens.

class ReverseEnv(MessageEnv):                                       # a whole environment
    def __init__(self, word: str) -> None:
        self.word = word

    async def initial_observation(self) -> list[Message]:
        return [{"role": "user", "content": f"Spell {self.word} backwards."}]

    async def step(self, reply: Message) -> MessageStep:
        right = text_of(reply).strip() == self.word[::-1]
        return MessageStep(reward=float(right), done=True, metrics={"correct": float(right)})
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from ptlab.renderers import Message, Renderer
from ptlab.rl.types import Action, ActionExtra, Env, Logs, Metrics, Observation, StepResult, StopCondition
from ptlab.types import ModelInput


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageStep:
    """What a MessageEnv answers to one reply of the model."""

    reward: float
    done: bool
    messages: Sequence[Message] = ()
    """What the model reads next, after its own reply; ignored if done."""
    metrics: Metrics = field(default_factory=dict)
    logs: Logs = field(default_factory=dict)


class MessageEnv(ABC):
    """One attempt at one problem, in messages. Used once."""

    @abstractmethod
    async def initial_observation(self) -> list[Message]:
        """The conversation before the model's first reply."""

    @abstractmethod
    async def step(self, reply: Message) -> MessageStep:
        """Judge a reply that the model finished, and say what comes next."""

    async def close(self) -> None:
        """Called once when the attempt has ended, however it ended: an environment that others wait for tells them here."""
        return None

    async def step_cut_off(self, reply: Message) -> MessageStep:
        """Judge a reply without a proper end: cut off at the token limit, or not in the renderer's form. Unless overridden the attempt
        ends with reward 0.0."""
        return MessageStep(reward=0.0, done=True, metrics={"correct": 0.0, "format": 0.0})


class EnvFromMessageEnv(Env):
    """The token environment around a MessageEnv: renders the conversation, parses the replies."""

    def __init__(self, message_env: MessageEnv, renderer: Renderer) -> None:
        self.message_env = message_env
        self.renderer = renderer
        self.conversation: list[Message] = []

    async def initial_observation(self) -> tuple[Observation, StopCondition]:
        self.conversation = await self.message_env.initial_observation()
        return self._observe()

    async def step(self, action: Action, *, extra: ActionExtra | None = None) -> StepResult:
        reply, well_formed = self.renderer.parse_response(action)
        finished = well_formed and (extra is None or extra.get("stop_reason") != "length")
        result = await (self.message_env.step(reply) if finished else self.message_env.step_cut_off(reply))
        self.conversation = [*self.conversation, reply, *result.messages]
        observation, stop = (ModelInput.empty(), None) if result.done else self._observe()
        return StepResult(
            reward=result.reward,
            episode_done=result.done,
            next_observation=observation,
            next_stop_condition=stop,
            metrics={"cut_off": float(not finished), **result.metrics},
            logs=result.logs,
        )

    async def close(self) -> None:
        await self.message_env.close()

    def _observe(self) -> tuple[Observation, StopCondition]:
        return self.renderer.build_generation_prompt(self.conversation), self.renderer.get_stop_sequences()
