r"""Matrices as values: 2 \begin{pmatrix} 1 \\ 2 \end{pmatrix} and sums become one matrix, small determinants their formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

from ptlab.rewards.latex_answer import Apply, Node, Number

LARGEST_DETERMINANT = 4
Cells = tuple[tuple[Node, ...], ...]


def settled(node: Node) -> Node:
    """The matrix or formula that the tree stands for; the tree itself if it has no matrix in it."""
    if isinstance(node, Apply) and node.op == "determinant":
        cells = _rows(node)
        return node if cells is None or not 1 <= len(cells) <= LARGEST_DETERMINANT or len(cells[0]) != len(cells) else _determinant(cells)
    cells = cells_of(node)
    return node if cells is None else Apply("matrix", tuple(Apply("row", row) for row in cells))


def cells_of(node: Node) -> Cells | None:
    """Rows of a matrix, of [[1,2],[3,4]], or of a sum or multiple of matrices; None if the tree is no such thing."""
    if not isinstance(node, Apply):
        return None
    match node.op, node.args:
        case "matrix", _:
            return _rows(node)
        case "[]", rows if all(isinstance(row, Apply) and row.op == "[]" for row in rows):
            return _rows(node)
        case "neg", (inside,):
            return _each(cells_of(inside), lambda cell: Apply("neg", (cell,)))
        case "mul", factors:
            found = [(index, cells) for index, factor in enumerate(factors) if (cells := cells_of(factor)) is not None]
            if len(found) != 1:
                return None
            index, cells = found[0]
            scalars = factors[:index] + factors[index + 1 :]
            return _each(cells, lambda cell: Apply("mul", (*scalars, cell)))
        case "add", terms:
            matrices = [cells_of(term) for term in terms]
            return _sum([cells for cells in matrices if cells is not None]) if None not in matrices else None
    return None


def as_tuple(cells: Cells) -> tuple[Node, ...] | None:
    """The entries of a single row or column."""
    if len(cells) == 1:
        return cells[0]
    return tuple(row[0] for row in cells) if all(len(row) == 1 for row in cells) else None


def _rows(node: Apply) -> Cells | None:
    rows = tuple(row.args for row in node.args if isinstance(row, Apply))
    return rows if len(rows) == len(node.args) and len({len(row) for row in rows}) == 1 else None


def _each(cells: Cells | None, change: Callable[[Node], Node]) -> Cells | None:
    return None if cells is None else tuple(tuple(change(cell) for cell in row) for row in cells)


def _sum(matrices: Sequence[Cells]) -> Cells | None:
    if len({(len(cells), len(cells[0])) for cells in matrices}) != 1:
        return None
    return tuple(tuple(Apply("add", cells) for cells in zip(*rows, strict=True)) for rows in zip(*matrices, strict=True))


def _determinant(cells: Cells) -> Node:
    """By the first row; 4! products at most."""
    if len(cells) == 1:
        return cells[0][0]
    terms: list[Node] = []
    for column, entry in enumerate(cells[0]):
        minor = tuple(row[:column] + row[column + 1 :] for row in cells[1:])
        terms.append(Apply("mul", (Number(Fraction((-1) ** column)), entry, _determinant(minor))))
    return Apply("add", tuple(terms))
