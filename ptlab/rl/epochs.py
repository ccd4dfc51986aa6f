"""Which rows of a fixed data set a step trains on: a pure function of (seed, step), so that a resumed run meets what it would have met."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ptlab.errors import InvalidRequestError
from ptlab.rl.seeds import stable_seed


def epoch_order(num_rows: int, *, seed: int, epoch: int) -> list[int]:
    """The rows 0 .. num_rows - 1 in the order of this pass; every pass has an order of its own."""
    order = list(range(num_rows))
    random.Random(stable_seed(seed, "epoch", epoch)).shuffle(order)
    return order


def rows_of_step(num_rows: int, rows_per_step: int, *, seed: int, step: int) -> list[int]:
    """The `rows_per_step` rows of a step. Every pass goes through all rows once; batches run on from one pass into the next."""
    if num_rows < 1 or rows_per_step < 1:
        raise InvalidRequestError(f"rows_of_step: {rows_per_step} rows per step of {num_rows}; both must be at least 1")
    first = step * rows_per_step
    epochs = range(first // num_rows, (first + rows_per_step - 1) // num_rows + 1)
    orders = {epoch: epoch_order(num_rows, seed=seed, epoch=epoch) for epoch in epochs}
    return [orders[position // num_rows][position % num_rows] for position in range(first, first + rows_per_step)]


class TokenBatches:
    """Rows of a step, as many as fit into a number of tokens; at least one. The stream of rows is that of rows_of_step.

    Step s begins where step s - 1 ended, so step s is found by walking there from step 0; what was walked is remembered.

    Args:
        tokens_N: tokens of each row.
        tokens_per_step: most tokens of a step; a longer row is a step of its own.
    """

    def __init__(self, tokens_N: Sequence[int], tokens_per_step: int, *, seed: int) -> None:
        if not tokens_N or tokens_per_step < 1:
            raise InvalidRequestError(f"TokenBatches: {tokens_per_step} tokens per step of {len(tokens_N)} rows; both must be at least 1")
        self._tokens_N = list(tokens_N)
        self._tokens_per_step = tokens_per_step
        self._seed = seed
        self._starts = [0]
        self._order = (0, epoch_order(len(tokens_N), seed=seed, epoch=0))

    def rows_of_step(self, step: int) -> list[int]:
        while len(self._starts) <= step:
            self._starts.append(self._starts[-1] + len(self._rows_from(self._starts[-1])))
        return self._rows_from(self._starts[step])

    def _rows_from(self, position: int) -> list[int]:
        rows = [self._row_at(position)]
        room = self._tokens_per_step - self._tokens_N[rows[0]]
        while True:
            row = self._row_at(position + len(rows))
            room -= self._tokens_N[row]
            if room < 0:
                return rows
            rows.append(row)

    def _row_at(self, position: int) -> int:
        epoch, index = divmod(position, len(self._tokens_N))
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(len(self._tokens_N), seed=self._seed, epoch=epoch))
        return self._order[1][index]
