r"""Whether two answers say the same: lists, sets, tuples, intervals, matrices, equations, inequalities, text, and at the bottom values.

Decisions, where a grader has to take one:
    order      a bare list and a set are unordered (1,-2 == -2, 1 == \{-2, 1\}); a tuple is ordered; a list is no tuple
    \pm        stands for both values
    x = 5      equals 5 (a name alone on one side says nothing); two equations are equal if one is a constant times the other
    x > 5      equals (5, \infty);  x \in S equals S
    52_8       equals 52 (the question named the base) and nothing else, not 42
    percent    8\% equals 8 (a unit) and 0.08 (a number)
    units      are dropped; two known units that differ are wrong (5 cm is not 5 m); nothing is converted
    decimals   are exact: 0.33 is not 1/3 and 3.14 is not \pi
    words      compared by letters and digits, without case; (C) equals C and c
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import TypeVar

from ptlab.rewards.answer_text import Item, comparison_key, folded, is_wordy, peel, split_items
from ptlab.rewards.answer_values import Undecidable, WorkLimit, equal_values, free_symbols, proportional
from ptlab.rewards.latex_answer import Apply, Node, Number, Symbol, Unreadable, read

MAX_ITEMS = 40  # matching unordered lists costs the square of this

RELATIONS = ("=", "<", ">", "<=", ">=", "!=", "in", "chain")
STRUCTURES = frozenset({"()", "[]", "(]", "[)", "set", "union", "cap", "setminus", "row", "matrix", "determinant", *RELATIONS})
SWAPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
BASED = re.compile(r"([0-9A-Fa-f]{1,40})_(?:(\d{1,2})|\{(\d{1,2})\})")
CHOICE = re.compile(r"\(([A-H])\)")
INFINITY = Symbol("infty")
T = TypeVar("T")


def same_answer(given: str, truth: str, limit: WorkLimit) -> bool:
    """Compare two normalised answers. Raises: Undecidable if the work limit is reached."""
    choice = CHOICE.fullmatch(truth)
    if choice:
        return given.strip("() ").upper() == choice[1]
    given_items, truth_items = split_items(given), split_items(truth)
    if not given_items or not truth_items or max(len(given_items), len(truth_items)) > MAX_ITEMS:
        return False
    if len(given_items) == len(truth_items) and _match(given_items, truth_items, lambda g, t: _same_item(peel(g), peel(t), limit)):
        return True
    try:
        (given_parts, given_opened), (truth_parts, truth_opened) = _opened(given_items), _opened(truth_items)
    except Unreadable:
        return False
    if not given_opened and not truth_opened:  # the items were compared already, with their units
        return False
    return _match(given_parts, truth_parts, lambda g, t: _same_node(g, t, limit))


def _match(given: Sequence[T], truth: Sequence[T], same: Callable[[T, T], bool]) -> bool:
    """Whether the two pair off in some order. Greedy: `same` is an equivalence but for units that one side leaves out."""
    if len(given) != len(truth):
        return False
    left = list(truth)
    for one in given:
        for index, other in enumerate(left):
            if same(one, other):
                del left[index]
                break
        else:
            return False
    return True


def _same_item(given: Item, truth: Item, limit: WorkLimit) -> bool:
    if given.unit and truth.unit and given.unit != truth.unit:
        return False
    if comparison_key(given.text) == comparison_key(truth.text) and given.percent == truth.percent:
        return True
    if is_wordy(truth.text) or is_wordy(given.text):
        return folded(given.text) == folded(truth.text) != ""
    given_based, truth_based = BASED.fullmatch(comparison_key(given.text)), BASED.fullmatch(comparison_key(truth.text))
    if given_based or truth_based:
        return _same_based(given_based or given.text, truth_based or truth.text)
    try:
        given_node, truth_node = read(given.text), read(truth.text)
    except Unreadable:
        return False
    if _same_node(given_node, truth_node, limit):
        return True
    if given.percent != truth.percent:
        hundredth = (given_node, _hundredth(truth_node)) if truth.percent else (_hundredth(given_node), truth_node)
        return _same_node(*hundredth, limit)
    return False


def _hundredth(node: Node) -> Node:
    return Apply("mul", (node, Apply("inv", (Number(Fraction(100)),))))


def _same_based(given: re.Match[str] | str, truth: re.Match[str] | str) -> bool:
    """Numbers with a base: same digits, and the same base where both name one."""
    digits, bases = list[str](), list[str]()
    for side in (given, truth):
        if isinstance(side, str):
            digits.append(side.strip().upper().lstrip("0"))
        else:
            digits.append(side[1].upper().lstrip("0"))
            bases.append(side[2] or side[3])
    return digits[0] == digits[1] and len(set(bases)) == 1


def _opened(items: Iterable[str]) -> tuple[list[Node], bool]:
    """The single values of a list, with sets, unions and plus-minus opened, and whether there was one to open. Raises: Unreadable."""
    parts: list[Node] = []
    any_opened = False
    for item in items:
        text = peel(item).text
        if is_wordy(text):
            raise Unreadable("words")
        node = _without_membership(read(text))
        members = node.args if isinstance(node, Apply) and node.op in ("set", "union") else (node,)
        values = [value for member in members for value in _both_signs(member)]
        any_opened = any_opened or values != [node]
        parts.extend(values)
    if len(parts) > MAX_ITEMS:
        raise Unreadable(f"more than {MAX_ITEMS} values")
    return parts, any_opened


def _both_signs(node: Node) -> list[Node]:
    upper, lower = _with_sign(node, upper=True), _with_sign(node, upper=False)
    return [node] if upper == node else [upper, lower]


def _with_sign(node: Node, *, upper: bool) -> Node:
    if not isinstance(node, Apply):
        return node
    args = tuple(_with_sign(arg, upper=upper) for arg in node.args)
    if node.op in ("plusminus", "minusplus"):
        return args[0] if (node.op == "plusminus") == upper else Apply("neg", args)
    return Apply(node.op, args)


def _without_membership(node: Node) -> Node:
    return node.args[1] if isinstance(node, Apply) and node.op == "in" and isinstance(node.args[0], Symbol) else node


def _same_node(given: Node, truth: Node, limit: WorkLimit) -> bool:
    limit.check()
    given, truth = _as_interval(_without_membership(given)), _as_interval(_without_membership(truth))
    if given == truth:
        return True
    given_op, truth_op = _structure(given), _structure(truth)
    if given_op == truth_op == "":
        return _same_value(given, truth, limit)
    if given_op in ("=", "chain") and truth_op not in ("=", "chain"):
        return _says(given, truth, limit)
    if truth_op in ("=", "chain") and given_op not in ("=", "chain"):
        return _says(truth, given, limit)
    if given_op != truth_op or not isinstance(given, Apply) or not isinstance(truth, Apply):
        return False
    if given_op in ("set", "union", "cap"):
        return _match(given.args, truth.args, lambda g, t: _same_node(g, t, limit))
    if given_op == "=" and _same_equation(given, truth, limit):
        return True
    return len(given.args) == len(truth.args) and all(_same_node(g, t, limit) for g, t in zip(given.args, truth.args, strict=True))


def _structure(node: Node) -> str:
    """The operation of a node that is not a value, "" for a value."""
    return node.op if isinstance(node, Apply) and node.op in STRUCTURES else ""


def _same_value(given: Node, truth: Node, limit: WorkLimit) -> bool:
    for upper in (True, False):
        try:
            if not equal_values(_with_sign(given, upper=upper), _with_sign(truth, upper=upper), limit):
                return False
        except Undecidable:
            limit.check()  # out of time ends the grading; a value that does not exist is merely not equal
            return False
    return True


def _says(equation: Node, value: Node, limit: WorkLimit) -> bool:
    """Whether "x = 2/4 = 1/2" or "2 + 3 = 5" or "5 = x" says the value: every side that is not a lone name must be it."""
    sides = _sides(equation)
    if _is_name(sides[0]):
        sides = sides[1:]
    elif _is_name(sides[-1]):
        sides = sides[:-1]
    elif any(free_symbols(side) for side in sides):
        return False
    return bool(sides) and all(_same_node(side, value, limit) for side in sides)


def _sides(node: Node) -> list[Node]:
    if isinstance(node, Apply) and node.op == "=":
        return list(node.args)
    if isinstance(node, Apply) and node.op == "chain" and all(isinstance(link, Apply) and link.op == "=" for link in node.args):
        links = [link for link in node.args if isinstance(link, Apply)]
        return [links[0].args[0], *(link.args[1] for link in links)]
    return [Symbol("x")]  # a chain of other relations: nothing is said


def _is_name(node: Node) -> bool:
    """x, x_1, or f(x), which reads as f times x."""
    if isinstance(node, Apply) and node.op == "mul":
        return len(node.args) == 2 and all(isinstance(arg, Symbol) for arg in node.args)
    return isinstance(node, Symbol) and node.name not in ("pi", "e", "i", "infty")


def _same_equation(given: Apply, truth: Apply, limit: WorkLimit) -> bool:
    differences = [Apply("add", (side.args[0], Apply("neg", (side.args[1],)))) for side in (given, truth)]
    try:
        return proportional(differences[0], differences[1], limit)
    except Undecidable:
        limit.check()
        return False


def _as_interval(node: Node) -> Node:
    r"""x > 5 -> (5, \infty);  -2 <= x < 7 -> [-2, 7);  all reals -> (-\infty, \infty);  anything else as it is."""
    if node == Symbol("RR"):
        return Apply("()", (Apply("neg", (INFINITY,)), INFINITY))
    links = node.args if isinstance(node, Apply) and node.op == "chain" else (node,)
    rising = [_rising(link) for link in links]
    if len(rising) == 1 and rising[0] is not None:
        low, strict, high = rising[0]
        if _is_variable(low) and not free_symbols(high):
            return Apply("()" if strict else "(]", (Apply("neg", (INFINITY,)), high))
        if _is_variable(high) and not free_symbols(low):
            return Apply("()" if strict else "[)", (low, INFINITY))
    if len(rising) == 2 and rising[0] is not None and rising[1] is not None:
        first, second = (rising[0], rising[1]) if rising[0][2] == rising[1][0] else (rising[1], rising[0])
        if first[2] == second[0] and _is_variable(first[2]):
            return Apply(("(" if first[1] else "[") + (")" if second[1] else "]"), (first[0], second[2]))
    return node


def _rising(node: Node) -> tuple[Node, bool, Node] | None:
    """(smaller, strictly, larger) of an inequality."""
    if not isinstance(node, Apply) or node.op not in SWAPPED:
        return None
    left, right = node.args
    return (left, node.op == "<", right) if node.op.startswith("<") else (right, node.op == ">", left)


def _is_variable(node: Node) -> bool:
    return isinstance(node, Symbol) and node.name not in ("pi", "e", "i", "infty")
