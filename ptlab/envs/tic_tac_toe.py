"""Tic-tac-toe: against the learner itself, a random or a perfect player, or any other model.

Against itself ("self") both players of a game are attempts that train: a group is `group_size` games, so twice as many attempts, and the
players of a game wait for each other. Against all others a group is `group_size` attempts from the same side of the board; the opponent
answers the same board in the same way throughout a group, so that the attempts differ by the learner's moves only.

Rewards (of the config; here the defaults). The end of a game pays, through the group, so that a player who was cut off is paid as well:

    won 1, drawn 0, lost -1
    illegal     -1.5  a square that is taken, no number, or a reply that did not come to its end: lost, less format_penalty
    left        -1    out of turns, tokens or time when it was its turn: lost
    walkover     0    the other's move was illegal, or the other left: nothing was won by playing. Also for leaving while the other thinks
    (never moved)     the group's mean, so that nothing is learnt from what a player said to a game that was over before its first move
"""

from __future__ import annotations

import random
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from pydantic import Field, model_validator

from ptlab.envs.attempts import MadeDataset
from ptlab.envs.env_section import EnvSection, TaskSetting
from ptlab.envs.message_env import EnvFromMessageEnv, MessageEnv, MessageStep
from ptlab.envs.speakers import Speaker, SpeakerConfig, open_speaker
from ptlab.envs.tic_tac_toe_board import (
    EMPTY_BOARD,
    Mark,
    best_squares,
    board_text,
    free_squares,
    is_over,
    other,
    place,
    random_board,
    to_move,
    winner,
)
from ptlab.envs.turns import Turns
from ptlab.renderers import Message, Renderer, text_of
from ptlab.rl.seeds import stable_seed
from ptlab.rl.types import Env, EnvGroupBuilder, Metrics, Task, Trajectory

Outcome = Literal["won", "drawn", "lost", "illegal", "left", "walkover"]
_NUMBER = re.compile(r"[0-9]+")
_SQUARES = tuple("123456789")


@dataclass(frozen=True, slots=True, kw_only=True)
class Payment:
    """Reward of each way a game can end."""

    won: float = 1.0
    drawn: float = 0.0
    lost: float = -1.0
    format_penalty: float = 0.5
    walkover: float = 0.0

    def of(self, outcome: Outcome) -> float:
        match outcome:
            case "won":
                return self.won
            case "drawn":
                return self.drawn
            case "lost" | "left":
                return self.lost
            case "illegal":
                return self.lost - self.format_penalty
            case "walkover":
                return self.walkover


class Game:
    """One game: the board, whose turn it is, and how it ended for each."""

    def __init__(self, board: str = EMPTY_BOARD) -> None:
        self.board = board
        self.turns: Turns[Mark] = Turns(to_move(board))
        self.outcomes: dict[Mark, Outcome] = {}
        """Of both players once the game is over, before that empty."""

    @property
    def over(self) -> bool:
        return bool(self.outcomes)

    def play(self, mark: Mark, square: int | None) -> None:
        """The move of the player whose turn it is; None or a taken square is illegal and ends the game."""
        assert not self.over and to_move(self.board) == mark, f"{mark} moves out of turn on {self.board}"
        if square is None or square not in free_squares(self.board):
            self._end(mark, "illegal", "walkover")
            return
        self.board = place(self.board, square)
        if not is_over(self.board):
            self.turns.pass_to(to_move(self.board))
        elif winner(self.board) is None:
            self._end(mark, "drawn", "drawn")
        else:
            self._end(mark, "won", "lost")

    def leave(self, mark: Mark) -> None:
        """This player will not move again; nothing if the game is over."""
        if not self.over:
            self._end(mark, "left" if to_move(self.board) == mark else "walkover", "walkover")

    def _end(self, mark: Mark, outcome: Outcome, of_other: Outcome) -> None:
        self.outcomes = {mark: outcome, other(mark): of_other}
        self.turns.end()


def parse_move(text: str) -> int | None:
    """Square 0 to 8 of the last number in the text; None if there is none, or it is not 1 to 9."""
    numbers = _NUMBER.findall(text)
    return int(numbers[-1]) - 1 if numbers and numbers[-1] in _SQUARES else None


def situation(board: str, mark: Mark, *, explain: bool) -> str:
    """What a player reads before its move; with the rules if it is the first."""
    rules = (
        "We play tic-tac-toe. X moves first, three in a line win. Squares are numbered 1 to 9; a free square shows its number. Reply with "
        "the number of the square you take, the last number in your reply. A square that is taken, or no number, loses the game.\n\n"
    )
    return f"{rules if explain else ''}{board_text(board)}\nYou are {mark}."


class Opponent(Protocol):
    """Plays one side of one game."""

    async def choose(self, board: str) -> int | None:
        """Square 0 to 8; None for what is no move."""


class RandomOpponent:
    """Any free square; the same for the same board and seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    async def choose(self, board: str) -> int | None:
        return random.Random(stable_seed(self.seed, board)).choice(free_squares(board))


class MinimaxOpponent:
    """Never loses; any of the best moves, the same for the same board and seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    async def choose(self, board: str) -> int | None:
        return random.Random(stable_seed(self.seed, board)).choice(best_squares(board))


class SpeakerOpponent:
    """Somebody else's model, which reads what the learner would read in its place."""

    def __init__(self, speaker: Speaker, seed: int, *, explain: bool) -> None:
        self.speaker = speaker
        self.seed = seed
        self.explain = explain
        self.conversation: list[Message] = []

    async def choose(self, board: str) -> int | None:
        asked = situation(board, to_move(board), explain=self.explain and not self.conversation)
        self.conversation.append(Message(role="user", content=asked))
        said = await self.speaker.reply(self.conversation, seed=stable_seed(self.seed, board))
        self.conversation.append(Message(role="assistant", content=said))
        return parse_move(said)


class PlayerEnv(MessageEnv):
    """One side of one game.

    Args:
        opponent: who plays the other side; None = another PlayerEnv of the same game, which is waited for.
    """

    def __init__(self, game: Game, mark: Mark, opponent: Opponent | None, *, explain: bool) -> None:
        self.game = game
        self.mark: Mark = mark
        self.opponent = opponent
        self.explain = explain
        self.num_moves = 0

    async def initial_observation(self) -> list[Message]:
        await self._until_my_turn()
        return [Message(role="user", content=situation(self.game.board, self.mark, explain=self.explain))]

    async def step(self, reply: Message) -> MessageStep:
        return await self._move(parse_move(text_of(reply)), text_of(reply))

    async def step_cut_off(self, reply: Message) -> MessageStep:
        return await self._move(None, text_of(reply))

    async def close(self) -> None:
        self.game.leave(self.mark)

    async def _move(self, square: int | None, said: str) -> MessageStep:
        logs = {"board": self.game.board, "mark": self.mark, "reply": said}
        if not self.game.over:  # else it was over before the first move, or the other left while this player thought
            self.num_moves += 1
            self.game.play(self.mark, square)
            await self._until_my_turn()
        if self.game.over:
            return MessageStep(reward=0.0, done=True, logs={**logs, "outcome": self.game.outcomes[self.mark], "end": self.game.board})
        seen = Message(role="user", content=situation(self.game.board, self.mark, explain=False))
        return MessageStep(reward=0.0, done=False, messages=[seen], logs=logs)

    async def _until_my_turn(self) -> None:
        if self.opponent is None:
            await self.game.turns.wait_for(self.mark)
        elif not self.game.over and to_move(self.game.board) != self.mark:
            self.game.play(other(self.mark), await self.opponent.choose(self.game.board))


@dataclass(frozen=True, slots=True, kw_only=True)
class TicTacToeGroupBuilder(EnvGroupBuilder):
    """`group_size` games.

    Args:
        make_opponent: one for each game; None = the learner plays both sides, and both are attempts of the group.
        mark: the learner's side where it plays one.
        opening: the board that every game begins with.
        coin_seed: pay won or lost by tosses of this seed instead (the negative control); metrics stay true.
    """

    make_opponent: Callable[[], Opponent] | None
    mark: Mark
    opening: str
    group_size: int
    renderer: Renderer
    payment: Payment
    explain: bool
    tag: str
    coin_seed: int | None = None

    async def make_envs(self) -> Sequence[Env]:
        players: list[PlayerEnv] = []
        for game in [Game(self.opening) for _ in range(self.group_size)]:
            if self.make_opponent is None:
                marks: Sequence[Mark] = ("X", "O")
                players += [PlayerEnv(game, mark, None, explain=self.explain) for mark in marks]
            else:
                players.append(PlayerEnv(game, self.mark, self.make_opponent(), explain=self.explain))
        return [EnvFromMessageEnv(player, self.renderer) for player in players]

    async def compute_group_rewards(self, trajectory_group: list[Trajectory], env_group: Sequence[Env]) -> list[tuple[float, Metrics]]:
        players_G = [_player(env) for env in env_group]
        paid_G = [self._reward(player, index) for index, player in enumerate(players_G)]
        moved = [reward for reward, player in zip(paid_G, players_G, strict=True) if player.num_moves]
        mean = statistics.fmean(moved) if moved else 0.0
        return [(reward if player.num_moves else mean, outcome_metrics(player)) for reward, player in zip(paid_G, players_G, strict=True)]

    def attempts_depend(self) -> bool:
        return self.make_opponent is None

    def logging_tags(self) -> list[str]:
        return [self.tag]

    def _reward(self, player: PlayerEnv, index: int) -> float:
        if self.coin_seed is not None:
            return self.payment.of("won" if random.Random(stable_seed(self.coin_seed, index)).random() < 0.5 else "lost")
        return self.payment.of(player.game.outcomes[player.mark])


def outcome_metrics(player: PlayerEnv) -> Metrics:
    """correct (won), format (not illegal); won, drawn, lost and walkover, which make up all games; illegal, a part of what was lost."""
    outcome = player.game.outcomes[player.mark]
    return {
        "correct": float(outcome == "won"),
        "format": float(outcome != "illegal"),
        "won": float(outcome == "won"),
        "drawn": float(outcome == "drawn"),
        "lost": float(outcome in ("lost", "illegal", "left")),
        "walkover": float(outcome == "walkover"),
        "illegal": float(outcome == "illegal"),
        "moves": float(player.num_moves),
    }


def _player(env: Env) -> PlayerEnv:
    assert isinstance(env, EnvFromMessageEnv) and isinstance(env.message_env, PlayerEnv)
    return env.message_env


class TicTacToeConfig(EnvSection):
    kind: Literal["tic_tac_toe"] = "tic_tac_toe"
    """Tic-tac-toe against itself or others; nothing to download."""
    opponent: Literal["self", "random", "minimax", "speaker"] = "self"
    """"self": both players are the learner and train; group_size is then games, with two attempts each. "speaker": the model of `speaker`,
    a frozen version for instance."""
    speaker: SpeakerConfig | None = None
    """The opponent where `opponent` is "speaker": {kind: model, path: "tinker://..."} or {kind: openai, ...}."""
    opening_marks: int = Field(default=0, ge=0, le=4)
    """Training games begin with up to so many random marks on the board, a group with the same ones. Self-play from the empty board
    soon knows a single game."""
    won: float = 1.0
    """Reward for a win."""
    drawn: float = 0.0
    """Reward for a draw."""
    lost: float = -1.0
    """Reward for a loss."""
    format_penalty: float = Field(default=0.5, ge=0)
    """An illegal move, or a reply without a move, loses and costs this much more."""
    walkover: float = 0.0
    """Reward of a player whose opponent moved illegally or was cut off."""
    explain: bool = True
    """State the rules in the first message; false = only the board, for a model that knows the game."""
    reward: Literal["outcome", "random"] = "outcome"
    """"random" pays a win or a loss by coin toss: the negative control, which must not learn."""

    @model_validator(mode="after")
    def _opponent_is_there(self) -> TicTacToeConfig:
        if (self.opponent == "speaker") != (self.speaker is not None):
            given = "is not set" if self.speaker is None else "is set"
            raise ValueError(
                f"opponent is {self.opponent!r} and speaker {given}; they go together: set opponent: speaker and speaker: {{...}}"
            )
        if not self.lost <= self.drawn <= self.won:
            raise ValueError(
                f"won {self.won}, drawn {self.drawn}, lost {self.lost}: a win must not pay less than a draw, a draw not less than a loss"
            )
        return self

    async def make_task(self, setting: TaskSetting) -> Task:
        """The test is `num_test` games, half against the random and half against the perfect player ("vs_random", "vs_minimax")."""
        payment = Payment(won=self.won, drawn=self.drawn, lost=self.lost, format_penalty=self.format_penalty, walkover=self.walkover)
        speaker = None if self.speaker is None else await open_speaker(self.speaker, setting.models)

        def builder(
            opponent: str, number: int, group_size: int, seed: int, opening: str = EMPTY_BOARD, coin_seed: int | None = None
        ) -> TicTacToeGroupBuilder:
            return TicTacToeGroupBuilder(
                make_opponent=self._opponent_maker(opponent, speaker, seed),
                mark="X" if number % 2 == 0 else "O",
                opening=opening,
                group_size=group_size,
                renderer=setting.renderer,
                payment=payment,
                explain=self.explain,
                tag=f"vs_{opponent}",
                coin_seed=coin_seed,
            )

        def builders_at(step: int) -> Sequence[EnvGroupBuilder]:
            numbers = range(step * self.groups_per_step, (step + 1) * self.groups_per_step)
            seeds = [stable_seed(setting.seed, "tic_tac_toe", number) for number in numbers]
            coins = [stable_seed(seed, "coin") if self.reward == "random" else None for seed in seeds]
            drawn = [random.Random(stable_seed(seed, "opening")) for seed in seeds]
            openings = [random_board(rng, rng.randint(0, self.opening_marks)) for rng in drawn]
            return [
                builder(self.opponent, number, self.group_size, seed, opening, coin)
                for number, seed, opening, coin in zip(numbers, seeds, openings, coins, strict=True)
            ]

        tests = [
            builder(
                "random" if number < (self.num_test + 1) // 2 else "minimax",
                number,
                setting.test_attempts,
                stable_seed("tic_tac_toe", number),
            )
            for number in range(self.num_test)
        ]
        return Task(train=MadeDataset(builders_at=builders_at, num_batches=1), test_P=tests)

    def _opponent_maker(self, opponent: str, speaker: Speaker | None, seed: int) -> Callable[[], Opponent] | None:
        match opponent:
            case "random":
                return lambda: RandomOpponent(seed)
            case "minimax":
                return lambda: MinimaxOpponent(seed)
            case _ if opponent == "speaker" and speaker is not None:
                return lambda: SpeakerOpponent(speaker, seed, explain=self.explain)
            case _:
                return None
