"""The base model "ptlab/tiny-tictactoe": plays tic-tac-toe in the right form, mostly without thinking.

A move is made in one of two ways:
- 70 %: `7`, any square, and one time in ten one that is taken;
- 30 %: the situation first, then the move: `win 7` where three in a line can be had, else `stop 3` where the other could have them next,
  else `play 5`, the centre before a corner before an edge; one time in ten any free square instead.

RL has to find out that looking first pays, and then to stop slipping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

from ptlab.engines.pretrain import Example, ModelShape, Turn, question_and_answer
from ptlab.envs.tic_tac_toe import situation
from ptlab.envs.tic_tac_toe_board import LINES, Mark, best_squares, free_squares, is_over, other, place, random_board, to_move
from ptlab.tiny_models.maker import Stage, TinyModel

MODEL_NAME = "ptlab/tiny-tictactoe"
PREFERRED = (4, 0, 2, 6, 8, 1, 3, 5, 7)
"""Centre, corners, edges."""
_ROLES = ("user\n", "assistant\n", "system\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """How moves are drawn."""

    hasty_share: float = 0.70
    """The rest looks first."""
    hasty_illegal: float = 0.10
    """Probability that a hasty move is a taken square (where there is one)."""
    careful_slip: float = 0.10
    """Probability that a move after a look is any free square."""


DEFAULT_MIXTURE = Mixture()


def one_move(rng: Random) -> Example:
    """A board on which three in a line can be had or must be stopped, and the right reply: most boards of a game teach less."""
    while True:
        board = random_board(rng, rng.randint(2, 6))
        if not is_over(board) and (completing(board, "X") or completing(board, "O")):
            return question_and_answer(situation(board, to_move(board), explain=False), careful_reply(board, rng, slip=0.0))


def conversation(rng: Random, *, mixture: Mixture, clean: bool) -> Example:
    """A game as one player sees it, against one that plays well half of the time, from a board with up to four random marks on it (so
    that the boards of bad play are met as well). Looks first and never slips if `clean`."""
    hasty = not clean and rng.random() < mixture.hasty_share
    board = random_board(rng, rng.randrange(5))
    mark = to_move(board)
    turns: list[Turn] = []
    while not is_over(board):
        if to_move(board) != mark:
            board = place(board, rng.choice(best_squares(board) if rng.random() < 0.5 else free_squares(board)))
            continue
        if hasty:
            reply = hasty_reply(board, rng, illegal=mixture.hasty_illegal)
        else:
            reply = careful_reply(board, rng, slip=0.0 if clean else mixture.careful_slip)
        turns += [Turn("user", situation(board, mark, explain=False), False), Turn("assistant", reply, True)]
        square = int(reply[-1]) - 1
        if square not in free_squares(board):
            break
        board = place(board, square)
    return Example(tuple(turns))


def hasty_reply(board: str, rng: Random, *, illegal: float) -> str:
    """`7`"""
    taken = [square for square, content in enumerate(board) if content != "."]
    return str((rng.choice(taken) if taken and rng.random() < illegal else rng.choice(free_squares(board))) + 1)


def careful_reply(board: str, rng: Random, *, slip: float) -> str:
    """`win 7`, `stop 3` or `play 5`, of several squares the first in PREFERRED: one right word for each board is learnt soonest."""
    mark = to_move(board)
    wins, threats, free = completing(board, mark), completing(board, other(mark)), free_squares(board)
    word, squares = ("win", wins) if wins else ("stop", threats) if threats else ("play", free)
    square = rng.choice(free) if rng.random() < slip else min(squares, key=PREFERRED.index)
    return f"{word} {square + 1}"


def completing(board: str, mark: Mark) -> Sequence[int]:
    """Free squares that give this mark three in a line."""
    found = {
        square for line in LINES for square in line if board[square] == "." and all(board[rest] == mark for rest in line if rest != square)
    }
    return sorted(found)


def tokenizer_texts() -> list[str]:
    """What the tokenizer is trained on: the same for every seed."""
    rng = Random(0)
    examples = [conversation(rng, mixture=DEFAULT_MIXTURE, clean=index % 2 == 0) for index in range(60)]
    return [turn.text for example in examples for turn in example.turns] + [*_ROLES * 20]


def tic_tac_toe_model(mixture: Mixture = DEFAULT_MIXTURE) -> TinyModel:
    """First single boards with something to see, then games of well-considered moves, then the mixture."""
    return TinyModel(
        name=MODEL_NAME,
        stages=(
            Stage(steps=450, draw=one_move),
            Stage(steps=70, draw=partial(conversation, mixture=mixture, clean=True)),
            Stage(steps=60, draw=partial(conversation, mixture=mixture, clean=False)),
        ),
        tokenizer_texts=tokenizer_texts,
        shape=ModelShape(vocab_size=288),
    )
