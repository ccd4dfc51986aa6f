"""RL from preferences: one reply per prompt, paid by a judge; by its score, or by comparison with the other replies of the group.

    compare: score        reward = the judge's score of the reply (a reward model: log-odds; a rubric: 0..1)
    compare: tournament   every pair of the group's replies is judged; reward = share of wins - 0.5, so it sums to 0 over a group

On held-out prompts every reply meets one reply of the start, drawn once: `correct` is 1 when it wins, so eval/accuracy is the win rate
against the start by this judge (about .5 before the first step). A policy trained against a judge pleases that judge: how much of it is
length, and how far the policy went, scripts/compare_policies.py says.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from ptlab.envs.env_section import EnvSection, TaskSetting
from ptlab.envs.judges import Judge, JudgeConfig, RewardModelJudgeConfig, open_judge
from ptlab.envs.message_env import EnvFromMessageEnv, MessageEnv, MessageStep
from ptlab.envs.policy_comparison import draw_replies
from ptlab.envs.preference_data import MadePreferencesConfig, PreferenceDataConfig, Truth, prompts_of
from ptlab.errors import ConfigError, EnvError
from ptlab.renderers import Message, Renderer, text_of
from ptlab.rl.epochs import rows_of_step
from ptlab.rl.seeds import stable_seed
from ptlab.rl.types import Env, EnvGroupBuilder, Metrics, RLDataset, Task, Trajectory

Compare = Literal["score", "tournament"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judging:
    """How replies are paid; the same for all prompts of a task."""

    judge: Judge
    compare: Compare = "score"
    cut_off_penalty: float = 1.0
    """Taken off the reward of a reply that was cut off at the token limit; in the unit of the reward."""
    truth: Truth | None = None
    """The rule behind made data, for the metric env/truth; it pays nothing."""


class PreferenceEnv(MessageEnv):
    """One reply to one conversation.

    Args:
        opponent: a reply of the start, on held-out prompts.
        coin_seed: pay 0 or 1 by a toss of this seed (the negative control); metrics stay true.
    """

    def __init__(
        self, prompt: Sequence[Message], judging: Judging, *, opponent: Message | None = None, coin_seed: int | None = None
    ) -> None:
        self.prompt = list(prompt)
        self.judging = judging
        self.opponent = opponent
        self.coin_seed = coin_seed
        self.reply: Message | None = None

    async def initial_observation(self) -> list[Message]:
        return self.prompt

    async def step(self, reply: Message) -> MessageStep:
        return await self._pay(reply, penalty=0.0)

    async def step_cut_off(self, reply: Message) -> MessageStep:
        return await self._pay(reply, penalty=self.judging.cut_off_penalty)

    async def _pay(self, reply: Message, *, penalty: float) -> MessageStep:
        self.reply = reply
        judging, metrics = self.judging, {"format": float(penalty == 0.0)}
        reward = -penalty
        if judging.compare == "score":
            metrics["score"] = await judging.judge.score(self.prompt, reply)
            reward += metrics["score"]
        if judging.truth is not None:
            metrics["truth"] = judging.truth(self.prompt, reply)
        if self.opponent is not None:
            metrics["correct"] = await self._beats(self.opponent, reply)
        if self.coin_seed is not None:
            reward = float(random.Random(self.coin_seed).random() < 0.5)
        logs = {"prompt": text_of(self.prompt[-1]), "response": text_of(reply)}
        return MessageStep(reward=reward, done=True, metrics=metrics, logs=logs)

    async def _beats(self, opponent: Message, reply: Message) -> float:
        """1.0 or 0.0; a tie is decided by a coin of the prompt, so that two equal policies win half of the time."""
        chance = (await self.judging.judge.win_matrix(self.prompt, [reply, opponent]))[0][1]
        if chance == 0.5:
            return float(random.Random(stable_seed("tie", text_of(self.prompt[-1]), text_of(opponent))).random() < 0.5)
        return float(chance > 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceGroupBuilder(EnvGroupBuilder):
    """`group_size` replies to one conversation."""

    prompt: Sequence[Message]
    judging: Judging
    renderer: Renderer
    group_size: int
    opponent: Message | None = None
    coin_seed: int | None = None

    async def make_envs(self) -> Sequence[Env]:
        coins_G = [None if self.coin_seed is None else stable_seed(self.coin_seed, index) for index in range(self.group_size)]
        envs_G = [PreferenceEnv(self.prompt, self.judging, opponent=self.opponent, coin_seed=coin) for coin in coins_G]
        return [EnvFromMessageEnv(env, self.renderer) for env in envs_G]

    async def compute_group_rewards(self, trajectory_group: list[Trajectory], env_group: Sequence[Env]) -> list[tuple[float, Metrics]]:
        """Nothing for "score". For "tournament" the share of wins against the others, less 0.5; an attempt that ended before its reply
        (a time limit) loses to all that replied."""
        if self.judging.compare == "score" or self.coin_seed is not None or len(env_group) < 2:
            return [(0.0, {}) for _ in trajectory_group]
        replies_G = [_reply_of(env) for env in env_group]
        given = [index for index, reply in enumerate(replies_G) if reply is not None]
        matrix = await self.judging.judge.win_matrix(self.prompt, [reply for reply in replies_G if reply is not None])
        rank = {index: row for row, index in enumerate(given)}

        def chance(i: int, j: int) -> float:
            if i in rank and j in rank:
                return matrix[rank[i]][rank[j]]
            return 0.5 if (i in rank) == (j in rank) else float(i in rank)

        others = range(len(replies_G))
        shares_G = [sum(chance(i, j) for j in others if j != i) / (len(replies_G) - 1) for i in others]
        return [(share - 0.5, {"win_share": share}) for share in shares_G]

    def logging_tags(self) -> list[str]:
        return ["preference"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceDataset(RLDataset):
    """Prompts by step; every pass goes through all of them once."""

    prompts: Sequence[Sequence[Message]]
    judging: Judging
    renderer: Renderer
    groups_per_step: int
    group_size: int
    seed: int
    coin: bool = False

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        rows_P = rows_of_step(len(self.prompts), self.groups_per_step, seed=self.seed, step=index)
        return [
            PreferenceGroupBuilder(
                prompt=self.prompts[row],
                judging=self.judging,
                renderer=self.renderer,
                group_size=self.group_size,
                coin_seed=stable_seed(self.seed, "coin", index, number) if self.coin else None,
            )
            for number, row in enumerate(rows_P)
        ]

    def __len__(self) -> int:
        return -(-len(self.prompts) // self.groups_per_step)


class PreferenceConfig(EnvSection):
    kind: Literal["preference"] = "preference"
    """One reply per prompt, paid by a judge: RLHF, tournaments, rubrics."""
    data: PreferenceDataConfig = MadePreferencesConfig()
    """Where the prompts come from; chosen and rejected replies are not read."""
    judge: JudgeConfig = RewardModelJudgeConfig()
    """Who pays."""
    compare: Compare = "score"
    """What is paid: the judge's score of the reply alone, or its share of wins against the others of its group."""
    cut_off_penalty: float = Field(default=1.0, ge=0)
    """Taken off a reply that hits rollout.max_tokens, in the unit of the reward."""
    start: str | None = None
    """Whose replies held-out replies are compared with: a run directory or tinker:// path; None = the base model."""
    start_max_tokens: int = Field(default=64, ge=1)
    """Longest reply of the start, tokens: as rollout.max_tokens, or lengths differ for no reason."""
    reward: Literal["preference", "random"] = "preference"
    """"random" pays by coin toss: the negative control, which must not learn."""

    def files(self) -> Mapping[str, str | None]:
        return {f"data.{key}": path for key, path in self.data.files().items()}

    async def make_task(self, setting: TaskSetting) -> Task:
        data = self.data.load(setting.seed)
        test_prompts = prompts_of(data.test)[: self.num_test]
        train_prompts = prompts_of(data.train)
        if not test_prompts or not train_prompts:
            raise ConfigError(f"env.data: {len(train_prompts)} prompts to train on and {len(test_prompts)} held out; needed some of both")
        judging = Judging(
            judge=await open_judge(self.judge, setting.models),
            compare=self.compare,
            cut_off_penalty=self.cut_off_penalty,
            truth=data.truth,
        )
        client, renderer = await setting.models.open(model_path=self.start)
        opponents = await draw_replies(
            client, renderer, test_prompts, max_tokens=self.start_max_tokens, seed=stable_seed(setting.seed, "start")
        )
        train = PreferenceDataset(
            prompts=train_prompts,
            judging=judging,
            renderer=setting.renderer,
            groups_per_step=self.groups_per_step,
            group_size=self.group_size,
            seed=setting.seed,
            coin=self.reward == "random",
        )
        test_P = [
            PreferenceGroupBuilder(
                prompt=prompt,
                judging=judging,
                renderer=setting.renderer,
                group_size=setting.test_attempts,
                opponent=opponent.message,
            )
            for prompt, opponent in zip(test_prompts, opponents, strict=True)
        ]
        return Task(train=train, test_P=test_P)


def _reply_of(env: Env) -> Message | None:
    if not (isinstance(env, EnvFromMessageEnv) and isinstance(env.message_env, PreferenceEnv)):
        raise EnvError(f"a tournament is between preference environments, found {type(env).__name__}")
    return env.message_env.reply
