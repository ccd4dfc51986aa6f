"""Who says how good a reply is: a trained reward model, or a model that reads a rubric. Both can also say which of two is better."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Protocol

from pydantic import Field

from ptlab.envs.env_section import OtherModels
from ptlab.envs.speakers import ModelSpeakerConfig, Speaker, SpeakerConfig, open_speaker
from ptlab.errors import ConfigError
from ptlab.renderers import Message, text_of
from ptlab.rl.seeds import stable_seed
from ptlab.rl.verdict import RewardModel
from ptlab.section import Section

DEFAULT_RUBRIC = "The reply answers what was asked, is correct, is polite, and says no more than needed."
HIGHEST_RATING = 10
_RATING = re.compile(r"rating:\s*\**\s*(\d+(?:\.\d+)?)", re.IGNORECASE)
_CHOICE = re.compile(r"better:\s*\**\s*(?:reply\s+)?([AB])\b", re.IGNORECASE)


class Judge(Protocol):
    """Judges replies. Safe to ask from many attempts at once; the same question has the same answer."""

    async def score(self, conversation: Sequence[Message], reply: Message) -> float:
        """How good the reply is; higher is better, the unit is the judge's own."""

    async def win_matrix(self, conversation: Sequence[Message], replies_G: Sequence[Message]) -> list[list[float]]:
        """[G, G]: chance that reply i is preferred to reply j; m[i][j] + m[j][i] = 1 and m[i][i] = 0.5."""


class RubricJudge:
    """Any speaker with a rubric: rates a reply from 0 to 10 (score 0..1), or chooses between two, asked in both orders.

    An answer of the judge that holds no rating, or no choice, counts against the reply (0) or for neither (0.5): a policy that learns to
    confuse its judge gains nothing. The reply stands between marks that it cannot close, so it cannot speak to the judge in the rubric's
    place; a judge may still be talked round by what it reads, which no rule here prevents.
    """

    def __init__(self, speaker: Speaker, rubric: str = DEFAULT_RUBRIC) -> None:
        self._speaker = speaker
        self._rubric = rubric

    async def score(self, conversation: Sequence[Message], reply: Message) -> float:
        task = f"Rate the reply from 0 to {HIGHEST_RATING} by the rubric. End with a line `Rating: N`."
        found = _RATING.findall(await self._ask(conversation, [("reply", reply)], task))
        rating = float(found[-1]) if found else 0.0
        return rating / HIGHEST_RATING if 0.0 <= rating <= HIGHEST_RATING else 0.0

    async def win_matrix(self, conversation: Sequence[Message], replies_G: Sequence[Message]) -> list[list[float]]:
        matrix = [[0.5] * len(replies_G) for _ in replies_G]
        pairs = [(i, j) for i in range(len(replies_G)) for j in range(i)]
        asked = [self._first_wins(conversation, replies_G[i], replies_G[j]) for i, j in pairs]
        asked += [self._first_wins(conversation, replies_G[j], replies_G[i]) for i, j in pairs]
        answers = await asyncio.gather(*asked)
        for (i, j), forward, backward in zip(pairs, answers[: len(pairs)], answers[len(pairs) :], strict=True):
            matrix[i][j] = 0.5 * (forward + 1.0 - backward)  # a judge that favours the first place cancels out
            matrix[j][i] = 1.0 - matrix[i][j]
        return matrix

    async def _first_wins(self, conversation: Sequence[Message], first: Message, second: Message) -> float:
        task = "Which reply is better by the rubric? End with a line `Better: A` or `Better: B`."
        found = _CHOICE.findall(await self._ask(conversation, [("reply A", first), ("reply B", second)], task))
        return 0.5 if not found else float(found[-1].upper() == "A")

    async def _ask(self, conversation: Sequence[Message], replies: Sequence[tuple[str, Message]], task: str) -> str:
        said = "\n".join(f"{message['role']}: {text_of(message)}" for message in conversation)
        parts = [_fenced("conversation", said), *[_fenced(name, text_of(reply)) for name, reply in replies]]
        text = "\n\n".join([*parts, f"Rubric: {self._rubric}", task])
        return await self._speaker.reply([{"role": "user", "content": text}], seed=stable_seed("judge", text))


class RewardModelJudgeConfig(Section):
    kind: Literal["reward_model"] = "reward_model"
    """A reward model trained by recipe reward_model."""
    path: str = Field(default="runs/reward_model_smoke", min_length=1)
    """Its run directory (relative to the working directory), tinker:// path, or directory with the adapter."""
    base_model: str | None = None
    """Its base model; None = the run's. Its rank must be one the sampler serves (engines.sampler.max_lora_rank)."""


class RubricJudgeConfig(Section):
    kind: Literal["rubric"] = "rubric"
    """A model that reads a rubric."""
    rubric: str = Field(default=DEFAULT_RUBRIC, min_length=1)
    """What a good reply is."""
    speaker: SpeakerConfig = ModelSpeakerConfig(max_tokens=256)
    """Who judges."""


JudgeConfig = Annotated[RewardModelJudgeConfig | RubricJudgeConfig, Field(discriminator="kind")]
"""The section of a judge."""


async def open_judge(section: RewardModelJudgeConfig | RubricJudgeConfig, models: OtherModels) -> Judge:
    """Raises: ConfigError for a reward model that is not there, with the command that makes one."""
    match section:
        case RewardModelJudgeConfig():
            if not section.path.startswith("tinker://") and not Path(section.path).is_dir():
                raise ConfigError(
                    f"env.judge.path: there is no {section.path}; name the run directory of a reward model, or train one first: "
                    "python scripts/train.py --config configs/smoke/reward_model.yaml"
                )
            return RewardModel(*await models.open(base_model=section.base_model, model_path=section.path))
        case RubricJudgeConfig():
            return RubricJudge(await open_speaker(section.speaker, models), section.rubric)


def _fenced(name: str, text: str) -> str:
    return f"<{name}>\n{text.replace('<', '&lt;')}\n</{name}>"
