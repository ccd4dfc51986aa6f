"""Which log-probabilities a call asks for: pairs of a place in the layout and a target token, in the order in which the head wants them.

A place is one row of the head however many targets hang on it: eight samples of a problem ask for the same prompt tokens eight times over,
and for eight first tokens after it. Places that learn come first; behind them the head needs no second product. Cost: a sort of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptlab.engines.body import Layout


@dataclass(frozen=True, slots=True)
class TargetPairs:
    """P pairs over U places, all on the CPU. A cell is one target of one token of one datum, numbered through all datums."""

    places_U: Tensor
    """The distinct places, those that may learn first."""
    num_learning: int
    """How many of them."""
    rows_P: Tensor
    """Of each pair: its place, as an index into places_U; ascending."""
    targets_P: Tensor
    order_P: Tensor
    """Of each pair: its cell."""

    @classmethod
    def of(cls, layout: Layout, targets_D: Sequence[Tensor], learns_P: Tensor | None) -> TargetPairs:
        """All cells of some datums.

        Args:
            targets_D: per datum int64 [N] or [N, K].
            learns_P: bool per cell; None = none does.
        """
        widths = [targets.numel() // len(targets) for targets in targets_D]
        places = torch.cat([torch.from_numpy(p).repeat_interleave(k) for p, k in zip(layout.places_D, widths, strict=True)])
        learns_U = torch.zeros(layout.num_places, dtype=torch.bool)
        if learns_P is not None:
            learns_U[places[learns_P]] = True
        places_U = torch.argsort(~learns_U, stable=True)
        row_of_place = torch.empty_like(places_U)
        row_of_place[places_U] = torch.arange(layout.num_places)
        rows_P, order_P = torch.sort(row_of_place[places], stable=True)
        targets_P = torch.cat([targets.reshape(-1) for targets in targets_D])[order_P]
        return cls(places_U, int(learns_U.sum()), rows_P, targets_P, order_P)

    def split(self, values_P: Tensor, targets_D: Sequence[Tensor]) -> list[Tensor]:
        """One value per pair -> per datum, in the shape of its targets."""
        cells = torch.empty_like(values_P)
        cells[self.order_P] = values_P
        parts = torch.split(cells, [targets.numel() for targets in targets_D])
        return [part.view(targets.shape) for part, targets in zip(parts, targets_D, strict=True)]
