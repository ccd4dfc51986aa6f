"""Tic-tac-toe without anybody who plays it: boards, moves, winners, and perfect play.

A board is nine characters, row by row: "X", "O", or "." for a free square. X moves first. Squares are 0 to 8 here, 1 to 9 for players.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from random import Random
from typing import Literal

from ptlab.errors import InvalidRequestError

Mark = Literal["X", "O"]

EMPTY_BOARD = "." * 9
LINES = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6))


def to_move(board: str) -> Mark:
    """Whose mark comes next, on a board that is not decided."""
    return "X" if board.count("X") == board.count("O") else "O"


def other(mark: Mark) -> Mark:
    return "O" if mark == "X" else "X"


def free_squares(board: str) -> list[int]:
    return [square for square, content in enumerate(board) if content == "."]


def place(board: str, square: int) -> str:
    """The board after the next move. Raises: InvalidRequestError if there is no such square or it is taken."""
    if not 0 <= square < 9 or board[square] != ".":
        raise InvalidRequestError(f"tic-tac-toe board {board!r}: square {square} is not free; free are {free_squares(board)}")
    return board[:square] + to_move(board) + board[square + 1 :]


def winner(board: str) -> Mark | None:
    """Who has three in a line."""
    for a, b, c in LINES:
        if board[a] == board[b] == board[c] != ".":
            return "X" if board[a] == "X" else "O"
    return None


def is_over(board: str) -> bool:
    return winner(board) is not None or "." not in board


@cache
def value(board: str) -> int:
    """What perfect play by both is worth to the side to move: 0 = a draw, positive = a win, the sooner the larger, negative = a loss.

    A win is worth 1 + the squares then left free. There are 5,478 boards; each is looked at once (minimax).
    """
    if winner(board) is not None:  # of the side that moved last
        return -1 - board.count(".")
    if "." not in board:
        return 0
    return max(-value(place(board, square)) for square in free_squares(board))


def best_squares(board: str) -> Sequence[int]:
    """Every move of perfect play: soonest win, else draw, else latest loss. Empty if the game is over."""
    if is_over(board):
        return []
    return [square for square in free_squares(board) if -value(place(board, square)) == value(board)]


def random_board(rng: Random, num_marks: int) -> str:
    """After so many random moves, or fewer if that decides the game, which takes five at least."""
    board = EMPTY_BOARD
    while board.count(".") > 9 - num_marks and not is_over(board):
        board = place(board, rng.choice(free_squares(board)))
    return board


def board_text(board: str) -> str:
    """Three rows of three; a free square shows its number:

    1|X|3
    4|O|6
    7|8|9
    """
    shown = [str(square + 1) if content == "." else content for square, content in enumerate(board)]
    return "\n".join("|".join(shown[row : row + 3]) for row in (0, 3, 6))
