"""Any TextArena game of one or two players (https://github.com/LeonGuertler/TextArena), where the package `textarena` is installed.

A game's messages since a player's last reply are what it reads next; its reply, as it is, is the action (most games look for "[...]").
The reward is the game's own, paid at its end: 1, 0 or -1 in games of two, 0 to 1 in most games of one. A player who is cut off by a limit
leaves: it is paid `left`, the other one 0, for nothing was won by playing; so is whoever leaves while the other thinks.

TextArena's games draw from Python's global random numbers. Each game here has a state of its own, put in place around every call, so that
games side by side do not disturb each other and a resumed run plays as the unbroken one would have.
"""

from __future__ import annotations

import importlib
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import Field

from ptlab.envs.attempts import MadeDataset
from ptlab.envs.env_section import EnvSection, TaskSetting
from ptlab.envs.message_env import EnvFromMessageEnv, MessageEnv, MessageStep
from ptlab.envs.speakers import ModelSpeakerConfig, Speaker, SpeakerConfig, open_speaker
from ptlab.envs.turns import Turns
from ptlab.errors import ConfigError
from ptlab.renderers import Message, Renderer, text_of
from ptlab.rl.seeds import stable_seed
from ptlab.rl.types import Env, EnvGroupBuilder, Metrics, Task, Trajectory

T = TypeVar("T")
LEFT_REWARD = -1.0
"""For leaving a game of two when it is one's turn; 0 in a game of one."""


def new_environment(game: str) -> Any:
    """TextArena's environment of this name, giving messages one by one.

    Raises: ConfigError if textarena is not installed, has no such game, or the game needs something that is not there.
    """
    try:
        textarena = importlib.import_module("textarena")
    except ModuleNotFoundError as err:
        raise ConfigError(f"env.game {game!r} needs the package textarena, which is not installed: pip install textarena ({err})") from err
    raw = game if game.endswith("-raw") else f"{game}-raw"  # the variant without wrappers around it
    try:
        return textarena.make(raw)
    except (ValueError, ImportError, LookupError, OSError) as err:
        raise ConfigError(
            f"env.game {game!r}: textarena cannot make it: {err}; textarena.pprint_registry_detailed() lists the games"
        ) from err


class ArenaGame:
    """One game: TextArena's environment, who has to act, and what each player has not read yet.

    Raises: whatever the game raises; AssertionError where it is for another number of players.
    """

    def __init__(self, environment: Any, num_players: int, seed: int) -> None:
        self.environment = environment
        self.num_players = num_players
        self.rewards: dict[int, float] = {}
        """Of each player once the game is over."""
        self.invalid: dict[int, bool] = {}
        """Who ended it by an invalid move."""
        self.unread: dict[int, list[str]] = {player: [] for player in range(num_players)}
        self._random_state = random.Random(seed).getstate()
        self._drawing(lambda: environment.reset(num_players=num_players, seed=seed % 2**32))
        self.turns: Turns[int] = Turns(self._next_player())

    @property
    def over(self) -> bool:
        return bool(self.rewards)

    def act(self, player: int, action: str) -> None:
        """The reply of the player whose turn it is."""
        assert not self.over and self.turns.whose == player, f"player {player} acts out of turn"
        done, _ = self._drawing(lambda: self.environment.step(action=action))
        if not done:
            self.turns.pass_to(self._next_player())
            return
        rewards, about = self.environment.close()
        invalid = {player: bool(about[player].get("invalid_move")) for player in range(self.num_players)}
        self._end({player: float((rewards or {}).get(player, 0.0)) for player in range(self.num_players)}, invalid)

    def leave(self, player: int) -> None:
        """This player will not act again; nothing if the game is over."""
        if not self.over:
            mine = LEFT_REWARD if self.num_players > 1 and self.turns.whose == player else 0.0
            self._end({other: mine if other == player else 0.0 for other in range(self.num_players)}, {})

    def read(self, player: int) -> str:
        """What the player has not read yet."""
        text = "\n".join(self.unread[player])
        self.unread[player] = []
        return text

    def _end(self, rewards: dict[int, float], invalid: dict[int, bool]) -> None:
        self.rewards, self.invalid = rewards, invalid
        self.turns.end()

    def _next_player(self) -> int:
        """Whose turn it is, after putting what is new for that player with what it has to read."""
        player, messages = self._drawing(self.environment.get_observation)
        names: Mapping[int, str] = self.environment.state.role_mapping
        for sender, text, _ in messages:
            if sender != player:  # its own replies it has in the conversation
                self.unread[player].append(text if sender < 0 else f"{names.get(sender, f'Player {sender}')}: {text}")
        return int(player)

    def _drawing(self, call: Callable[[], T]) -> T:
        """The call, with this game's random numbers in place of everybody's."""
        outside = random.getstate()
        random.setstate(self._random_state)
        try:
            return call()
        finally:
            self._random_state = random.getstate()
            random.setstate(outside)


class ArenaPlayerEnv(MessageEnv):
    """One player of one game.

    Args:
        opponent: plays the other side; None = another ArenaPlayerEnv of the same game, or nobody.
    """

    def __init__(self, game: ArenaGame, player: int, opponent: Speaker | None = None, *, seed: int = 0) -> None:
        self.game = game
        self.player = player
        self.opponent = opponent
        self.seed = seed
        self.num_replies = 0
        self.opponent_conversation: list[Message] = []

    async def initial_observation(self) -> list[Message]:
        await self._until_my_turn()
        return [Message(role="user", content=self.game.read(self.player))]

    async def step(self, reply: Message) -> MessageStep:
        said = text_of(reply)
        if not self.game.over:
            self.num_replies += 1
            self.game.act(self.player, said)
            await self._until_my_turn()
        if self.game.over:
            return MessageStep(reward=0.0, done=True, logs={"player": self.player, "reply": said, "paid": self.game.rewards[self.player]})
        seen = Message(role="user", content=self.game.read(self.player))
        return MessageStep(reward=0.0, done=False, messages=[seen], logs={"player": self.player, "reply": said})

    async def step_cut_off(self, reply: Message) -> MessageStep:
        """The game judges what there is: an action may stand at the beginning."""
        return await self.step(reply)

    async def close(self) -> None:
        self.game.leave(self.player)

    async def _until_my_turn(self) -> None:
        if self.opponent is None:
            await self.game.turns.wait_for(self.player)
            return
        while not self.game.over and self.game.turns.whose != self.player:
            other = self.game.turns.whose
            self.opponent_conversation.append(Message(role="user", content=self.game.read(other)))
            said = await self.opponent.reply(self.opponent_conversation, seed=stable_seed(self.seed, len(self.opponent_conversation)))
            self.opponent_conversation.append(Message(role="assistant", content=said))
            self.game.act(other, said)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaGroupBuilder(EnvGroupBuilder):
    """`group_size` games from the same seed.

    Args:
        opponent: plays the other side in games of two; None = both sides are attempts of the group.
        player: the learner's side against an opponent.
        coin_seed: pay 1 or 0 by tosses of this seed instead (the negative control); metrics stay true.
    """

    game: str
    num_players: int
    seed: int
    group_size: int
    renderer: Renderer
    opponent: Speaker | None
    player: int
    coin_seed: int | None = None

    async def make_envs(self) -> Sequence[Env]:
        players: list[ArenaPlayerEnv] = []
        for _ in range(self.group_size):
            game = ArenaGame(new_environment(self.game), self.num_players, self.seed)
            sides = [self.player] if self.opponent is not None else range(self.num_players)
            players += [ArenaPlayerEnv(game, side, self.opponent, seed=self.seed) for side in sides]
        return [EnvFromMessageEnv(player, self.renderer) for player in players]

    async def compute_group_rewards(self, trajectory_group: list[Trajectory], env_group: Sequence[Env]) -> list[tuple[float, Metrics]]:
        players_G = [_player(env) for env in env_group]
        paid_G = [self._reward(player, index) for index, player in enumerate(players_G)]
        replied = [reward for reward, player in zip(paid_G, players_G, strict=True) if player.num_replies]
        mean = statistics.fmean(replied) if replied else 0.0  # of the group, for who had no turn: nothing is learnt from it
        pairs = zip(paid_G, players_G, strict=True)
        return [(reward if player.num_replies else mean, self._metrics(player)) for reward, player in pairs]

    def attempts_depend(self) -> bool:
        return self.num_players > 1 and self.opponent is None

    def logging_tags(self) -> list[str]:
        return [self.game.removesuffix("-raw")]

    def _reward(self, player: ArenaPlayerEnv, index: int) -> float:
        if self.coin_seed is not None:
            return float(random.Random(stable_seed(self.coin_seed, index)).random() < 0.5)
        return player.game.rewards[player.player]

    def _metrics(self, player: ArenaPlayerEnv) -> Metrics:
        """correct: won, or the full 1.0 in a game of one; format: not ended by an invalid action of this player."""
        paid = player.game.rewards[player.player]
        solved = paid > 0 if self.num_players > 1 else paid >= 1.0
        invalid = player.game.invalid.get(player.player, False)
        return {"correct": float(solved), "format": float(not invalid), "paid": paid, "replies": float(player.num_replies)}


def _player(env: Env) -> ArenaPlayerEnv:
    assert isinstance(env, EnvFromMessageEnv) and isinstance(env.message_env, ArenaPlayerEnv)
    return env.message_env


class TextArenaConfig(EnvSection):
    kind: Literal["text_arena"] = "text_arena"
    """A game of TextArena; needs `pip install textarena`."""
    game: str = Field(default="TicTacToe-v0", min_length=1)
    """TextArena's name of it."""
    num_players: Literal[1, 2] = 2
    """Players the game is for."""
    opponent: Literal["self", "speaker"] = "self"
    """In a game of two: "self" = both players are the learner and train, group_size is then games; "speaker" = the model of `speaker`."""
    speaker: SpeakerConfig = ModelSpeakerConfig()
    """The opponent of the test, and of the training if `opponent` is "speaker"; {kind: model} is the base model."""
    reward: Literal["game", "random"] = "game"
    """"random" pays 1 or 0 by coin toss: the negative control, which must not learn."""

    async def make_task(self, setting: TaskSetting) -> Task:
        """Every group is a game from a seed of its own; the test has other seeds, and against an opponent the learner's side alternates."""
        try:
            ArenaGame(new_environment(self.game), self.num_players, seed=0)
        except AssertionError as err:
            raise ConfigError(f"env.game {self.game!r} is not for num_players {self.num_players}: {err}") from err
        speaker = await open_speaker(self.speaker, setting.models) if self.num_players > 1 else None
        trained_against = speaker if self.opponent == "speaker" else None

        def builder(number: int, group_size: int, opponent: Speaker | None, seed: int, *, coin: bool = False) -> EnvGroupBuilder:
            return ArenaGroupBuilder(
                game=self.game,
                num_players=self.num_players,
                seed=seed,
                group_size=group_size,
                renderer=setting.renderer,
                opponent=opponent,
                player=number % self.num_players,
                coin_seed=stable_seed(seed, "coin") if coin else None,
            )

        def builders_at(step: int) -> Sequence[EnvGroupBuilder]:
            numbers = range(step * self.groups_per_step, (step + 1) * self.groups_per_step)
            coin = self.reward == "random"
            seeds = [stable_seed(setting.seed, "text_arena", number) for number in numbers]
            return [builder(n, self.group_size, trained_against, seed, coin=coin) for n, seed in zip(numbers, seeds, strict=True)]

        tests = [builder(n, setting.test_attempts, speaker, stable_seed("text_arena test", n)) for n in range(self.num_test)]
        return Task(train=MadeDataset(builders_at=builders_at, num_batches=1), test_P=tests)
