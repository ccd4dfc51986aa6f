"""Boards, winners, and perfect play against every line of play there is."""

from __future__ import annotations

import pytest

from ptlab.envs.tic_tac_toe_board import (
    EMPTY_BOARD,
    best_squares,
    board_text,
    free_squares,
    is_over,
    other,
    place,
    to_move,
    value,
    winner,
)
from ptlab.errors import InvalidRequestError


@pytest.mark.parametrize(
    ("board", "won_by"),
    [
        ("XXX OO   ", "X"), ("OO XXX   ", "X"), ("OO    XXX", "X"), ("XO X OX  ", "X"), ("OXO X  X ", "X"), ("OOX  X  X", "X"),
        ("X O XO  X", "X"), ("XXO O OX ", "O"), ("XOXXOOOXX", None), ("         ", None), ("XX OO    ", None),
    ],
)  # fmt: skip
def test_each_line_wins_and_nothing_else(board, won_by):
    assert winner(board.replace(" ", ".")) == won_by


def test_x_begins_and_moves_alternate():
    board = EMPTY_BOARD
    for square, mark in ((4, "X"), (0, "O"), (8, "X")):
        assert to_move(board) == mark
        board = place(board, square)
    assert board == "O...X...X" and other("X") == "O" and other("O") == "X"
    assert free_squares(board) == [1, 2, 3, 5, 6, 7]


@pytest.mark.parametrize("square", [-1, 4, 9])
def test_a_square_that_is_not_free_is_refused(square):
    with pytest.raises(InvalidRequestError, match=rf"square {square} is not free; free are \[0, 1"):
        place("....X....", square)


def test_the_board_shows_the_numbers_of_the_free_squares():
    assert board_text("..X.O....") == "1|2|X\n4|O|6\n7|8|9"


def test_values_by_hand():
    assert value(EMPTY_BOARD) == 0
    assert value("XX.OO....") == 1 + 4  # X completes the row; four squares stay free
    assert value("XO.......") > 0  # an edge is no answer to a corner
    assert value("X.......O") > 0 and value("X...O....") == 0  # only the centre holds
    assert value("XOX...O.X") == -1 - 2  # two threats, O can stop one: X wins two moves later
    assert value("XXXOO....") == -1 - 4 and value("XOXXOOOXX") == 0  # over


def test_best_moves_by_hand():
    assert best_squares("X........") == [4]
    assert best_squares("XX.OO....") == [2]  # 5 wins as well, but later
    assert best_squares("XO.X.....") == [6]  # lost, but nothing else holds out as long
    assert best_squares("XXXOO....") == []
    assert best_squares(EMPTY_BOARD) == list(range(9))


@pytest.mark.parametrize("mark", ["X", "O"])
def test_perfect_play_never_loses_whatever_the_other_does_and_whichever_best_move_is_taken(mark):
    seen = set()

    def visit(board: str) -> None:
        if board in seen:
            return
        seen.add(board)
        assert winner(board) in (None, mark)
        if is_over(board):
            return
        for square in best_squares(board) if to_move(board) == mark else free_squares(board):
            visit(place(board, square))

    visit(EMPTY_BOARD)
    assert len(seen) > 100
