r"""Sets of real numbers: intervals, unions, intersections, differences, finite sets, inequalities and |x - a| < r, compared as sets.

The end points of both sides cut the line into points and gaps; a set is then the set of those it contains, numbered from the left (gap 0,
point 1, gap 2, ...), and union, intersection and difference are those of Python. (2,4) \cup (3,5) is (2,5), [2,3) \cup \{3\} is [2,3],
x \ne 3 is \mathbb{R} \setminus \{3\}.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction

from ptlab.rewards.answer_values import Undecidable, WorkLimit, free_symbols, real_order
from ptlab.rewards.latex_answer import Apply, Node, Number, Symbol

INTERVALS = {"()": (False, False), "[]": (True, True), "(]": (False, True), "[)": (True, False)}
INFINITY = Symbol("infty")
MINUS_INFINITY = Apply("neg", (INFINITY,))
MAX_END_POINTS = 60
FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!="}


class _NoRegion(Exception):
    """The tree is no set of real numbers with known end points."""


def is_region(node: Node) -> bool:
    """Whether the tree has the form of a set of numbers that is more than one interval or finite set: those are compared part by part."""
    if not isinstance(node, Apply):
        return node in (Symbol("RR"), Symbol("emptyset"))
    return node.op in ("union", "cap", "setminus", "chain", *FLIPPED)


def same_region(given: Sequence[Node], truth: Sequence[Node], limit: WorkLimit) -> bool | None:
    """Whether the unions of the two lists are the same set of numbers; None if one of them is no such set.

    Raises: Undecidable once the time is used up.
    """
    try:
        ends = [end for node in (*given, *truth) for end in _ends(node)]
        if len(ends) > MAX_END_POINTS:
            return None
        rank = _Ranks(ends, limit)
        return _union(given, rank) == _union(truth, rank)
    except _NoRegion:
        return None
    except Undecidable:
        limit.check()
        return None


class _Ranks:
    """Numbers the distinct end points from the left."""

    def __init__(self, ends: Sequence[Node], limit: WorkLimit) -> None:
        ranks = real_order(ends, limit)
        self.of = dict(zip(ends, ranks, strict=True))
        self.top = 2 * len(set(ranks)) + 1  # of all pieces: a gap, then a point and a gap per end point

    def point(self, end: Node) -> int:
        return 2 * self.of[end] + 1

    def between(self, low: Node, low_closed: bool, high: Node, high_closed: bool) -> frozenset[int]:
        first = 0 if low == MINUS_INFINITY else self.point(low) + (not low_closed)
        last = self.top if high == INFINITY else self.point(high) + high_closed
        if low == INFINITY or high == MINUS_INFINITY or first > last:
            raise _NoRegion  # (2, 1) is a pair
        return frozenset(range(first, last))


def _union(nodes: Sequence[Node], rank: _Ranks) -> frozenset[int]:
    return frozenset[int]().union(*(_pieces(node, rank) for node in nodes))


def _pieces(node: Node, rank: _Ranks) -> frozenset[int]:
    if node == Symbol("RR"):
        return frozenset(range(rank.top))
    if node == Symbol("emptyset"):
        return frozenset()
    if not isinstance(node, Apply):
        raise _NoRegion
    match node.op, node.args:
        case "union", args:
            return _union(args, rank)
        case "cap", (first, *others):
            return _pieces(first, rank).intersection(*(_pieces(other, rank) for other in others))
        case "setminus", (first, *others):
            return _pieces(first, rank).difference(*(_pieces(other, rank) for other in others))
        case "set", args:
            return frozenset(rank.point(arg) for arg in args)
        case (("()" | "[]" | "(]" | "[)"), (low, high)):
            low_closed, high_closed = INTERVALS[node.op]
            return rank.between(low, low_closed, high, high_closed)
        case "chain", links:
            return frozenset(range(rank.top)).intersection(*(_pieces(link, rank) for link in links))
    parts = _inequality(node)
    if parts is None:
        raise _NoRegion
    variable, op, bound = parts
    if isinstance(variable, Symbol):
        return _beyond(op, bound, rank)
    low, high = _around(variable, bound)
    match op:
        case "<" | "<=":
            return rank.between(low, op == "<=", high, op == "<=")
        case ">" | ">=":
            return frozenset(range(rank.top)) - rank.between(low, op == ">", high, op == ">")
    return frozenset(range(rank.top)) - {rank.point(low), rank.point(high)}


def _beyond(op: str, bound: Node, rank: _Ranks) -> frozenset[int]:
    match op:
        case "<" | "<=":
            return rank.between(MINUS_INFINITY, False, bound, op == "<=")
        case ">" | ">=":
            return rank.between(bound, op == ">=", INFINITY, False)
    return frozenset(range(rank.top)) - {rank.point(bound)}


def _inequality(node: Apply) -> tuple[Symbol | Apply, str, Node] | None:
    """(x or |x - a|, relation, bound) of an inequality that has a variable on one side only."""
    if node.op not in FLIPPED:
        return None
    left, right = node.args
    for variable, op, bound in ((left, node.op, right), (right, FLIPPED[node.op], left)):
        if free_symbols(bound) - {"infty"} or not free_symbols(variable):
            continue
        if isinstance(variable, Symbol) or (isinstance(variable, Apply) and variable.op == "abs" and _shift(variable.args[0]) is not None):
            return variable, op, bound
    return None


def _shift(node: Node) -> Node | None:
    """a of x - a; 0 of x."""
    if isinstance(node, Symbol):
        return Number(Fraction(0))
    if isinstance(node, Apply) and node.op == "add" and len(node.args) == 2:
        for variable, rest in (node.args, node.args[::-1]):
            if isinstance(variable, Symbol) and not free_symbols(rest):
                return Apply("neg", (rest,))
    return None


def _around(absolute: Apply, radius: Node) -> tuple[Node, Node]:
    shift = _shift(absolute.args[0])
    if shift is None:
        raise _NoRegion
    return Apply("add", (shift, Apply("neg", (radius,)))), Apply("add", (shift, radius))


def _ends(node: Node) -> Iterator[Node]:
    """The finite end points that `_pieces` will ask the rank of."""
    if not isinstance(node, Apply):
        return
    if node.op in ("union", "cap", "setminus", "chain"):
        for arg in node.args:
            yield from _ends(arg)
        return
    if node.op in FLIPPED:
        parts = _inequality(node)
        if parts is None:
            raise _NoRegion
        variable, _, bound = parts
        values: Sequence[Node] = (bound,) if isinstance(variable, Symbol) else _around(variable, bound)
    else:
        values = node.args if node.op == "set" or node.op in INTERVALS else ()
    for value in values:
        if value not in (INFINITY, MINUS_INFINITY):
            if free_symbols(value):
                raise _NoRegion
            yield value
