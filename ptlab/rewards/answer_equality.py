r"""Whether two answers say the same: lists, sets, tuples, intervals, matrices, equations, inequalities, text, and at the bottom values.

Decisions, where a grader has to take one:
    order      a bare list and a set are unordered (1,-2 == -2, 1 == \{-2, 1\}); a tuple is ordered; a list is no tuple
    twice      1,1 is not 1, but \{1,1\} is \{1\}
    \pm        stands for both values
    x = 5      equals 5 (a name alone on one side says nothing); two equations are equal if one is a constant times the other
    x=1, y=2   equals (1,2): each name once, in the order of the alphabet
    x > 5      equals (5, \infty);  x \in S equals S; inequalities, unions and the like are compared as sets of real numbers
    vectors    a row or a column equals the tuple of its entries, but a row is no column
    52_8       equals 52 (the question named the base) and nothing else, not 42
    percent    8\% equals 8 (a unit) and 0.08 (a number)
    units      are dropped; two known units that differ are wrong (5 cm is not 5 m, 50 cents are not \$50); nothing is converted
    2:3        equals 4:6 and 2/3; what looks like a time of day (10:30) is no ratio
    decimals   are exact: 0.33 is not 1/3 and 3.14 is not \pi
    words      compared by letters and digits, without case and a leading article; (C), "(C) 12", "C." and c are one choice
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import TypeVar

from ptlab.rewards.answer_matrices import as_tuple, cells_of, settled
from ptlab.rewards.answer_regions import is_region, same_region
from ptlab.rewards.answer_text import Item, comparison_key, folded, is_wordy, peel, split_items
from ptlab.rewards.answer_values import Undecidable, WorkLimit, equal_values, free_symbols, proportional
from ptlab.rewards.answer_wording import LONE_LETTER, choice_letter
from ptlab.rewards.latex_answer import Apply, Node, Number, Symbol, Unreadable, read

MAX_ITEMS = 40  # matching unordered lists costs the square of this

RELATIONS = ("=", "<", ">", "<=", ">=", "!=", "in", "chain")
STRUCTURES = frozenset({"()", "[]", "(]", "[)", "set", "union", "cap", "setminus", "row", "matrix", "determinant", *RELATIONS})
SWAPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
BASED = re.compile(r"([0-9A-Fa-f]{1,40})_(?:(\d{1,2})|\{(\d{1,2})\})")
TIME = re.compile(r"(\d{1,2}:[0-5]\d)(?: ([ap]m))?", re.IGNORECASE)
RATIO = re.compile(r"\d{1,30}(?:\.\d{1,30})?(?: ?: ?\d{1,30}(?:\.\d{1,30})?){1,5}")
LONE_NAME = re.compile(r"^[A-Za-z]\s*=\s*")
FUNCTION_NAMES = frozenset("fghpqFGHPQ")
INFINITY = Symbol("infty")
T = TypeVar("T")


def same_answer(given: str, truth: str, limit: WorkLimit) -> bool:
    """Compare two normalised answers. Raises: Undecidable if the work limit is reached."""
    if (choice := _same_choice(given, truth)) is not None:
        return choice
    given_items, truth_items = split_items(given), split_items(truth)
    if not given_items or not truth_items or max(len(given_items), len(truth_items)) > MAX_ITEMS:
        return False
    if len(given_items) == len(truth_items) and _match(given_items, truth_items, lambda g, t: _same_item(peel(g), peel(t), limit)):
        return True
    try:
        given_tuple, truth_tuple = _named_as_tuple(given_items, truth_items), _named_as_tuple(truth_items, given_items)
        if given_tuple or truth_tuple:
            return _same_node(read(given_tuple or given_items[0]), read(truth_tuple or truth_items[0]), limit)
        (given_parts, given_opened), (truth_parts, truth_opened) = _opened(given_items), _opened(truth_items)
        region = _same_union(given_items, truth_items, limit)
    except Unreadable:
        return False
    if region is not None:
        return region
    if not given_opened and not truth_opened:  # the items were compared already, with their units
        return False
    return _match(given_parts, truth_parts, lambda g, t: _same_node(g, t, limit))


def _same_choice(given: str, truth: str) -> bool | None:
    """Whether two multiple-choice answers name one letter; None where neither has the form of one."""
    letters = [choice_letter(given), choice_letter(truth)]
    if letters == [None, None]:
        return None
    sides = [
        letter or (text.strip().upper() if LONE_LETTER.fullmatch(text.strip()) else "")
        for letter, text in zip(letters, (given, truth), strict=True)
    ]
    return sides[0] == sides[1] if all(sides) else None


def _named_as_tuple(items: Sequence[str], others: Sequence[str]) -> str:
    """ "(1,2)" for ["y = 2", "x = 1"] where the other side is one tuple: each name once, in the order of the alphabet. Else ""."""
    if len(items) < 2 or len(others) != 1 or not others[0].startswith("("):
        return ""
    pairs = [re.fullmatch(r"([A-Za-z](?:_\{?\w\}?)?)\s*=\s*([^=<>]+)", item) for item in items]
    values = {pair[1]: pair[2] for pair in pairs if pair is not None}
    return "(" + ",".join(values[name] for name in sorted(values)) + ")" if len(values) == len(items) else ""


def _same_union(given_items: Sequence[str], truth_items: Sequence[str], limit: WorkLimit) -> bool | None:
    """Compare as sets of real numbers where one side is an inequality, a union or the like; None where that has no sense.

    Raises: Unreadable.
    """
    sides: list[list[Node]] = []
    for items in (given_items, truth_items):
        texts = [peel(item).text for item in items]
        if any(is_wordy(text) for text in texts):
            return None
        nodes = [_without_membership(read(text)) for text in texts]
        if len(nodes) > 1 and not all(is_region(node) for node in nodes):
            return None
        sides.append(nodes)
    if not any(is_region(node) for nodes in sides for node in nodes):
        return None
    return same_region(sides[0], sides[1], limit)


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
    if (clock := _same_clock_or_ratio(given.text, truth.text, limit)) is not None:
        return clock
    given_based, truth_based = (BASED.fullmatch(comparison_key(LONE_NAME.sub("", side.text))) for side in (given, truth))
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


def _same_clock_or_ratio(given: str, truth: str, limit: WorkLimit) -> bool | None:
    """10:30 a.m. is 10:30; 4:6 is 2:3 and 2/3, but what looks like a time of day is no ratio."""
    times = TIME.fullmatch(given.strip()), TIME.fullmatch(truth.strip())
    if times[0] and times[1]:
        halves = {half.lower() for half in (times[0][2], times[1][2]) if half}
        return times[0][1].lstrip("0") == times[1][1].lstrip("0") and len(halves) < 2
    if times[0] or times[1]:
        return False
    ratios = [RATIO.fullmatch(side.strip()) is not None for side in (given, truth)]
    if not any(ratios):
        return None
    parts = [
        [Fraction(part) for part in side.split(":")] if is_ratio else [] for side, is_ratio in zip((given, truth), ratios, strict=True)
    ]
    if all(ratios):
        return (
            len(parts[0]) == len(parts[1])
            and all(x * parts[1][0] == y * parts[0][0] for x, y in zip(*parts, strict=True))
            and any(parts[0])
        )
    ratio, other = (parts[0], truth) if ratios[0] else (parts[1], given)
    if len(ratio) != 2 or ratio[1] == 0:
        return False
    try:
        return _same_node(read(other), Number(ratio[0] / ratio[1]), limit)
    except Unreadable:
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
    given, truth = settled(_as_interval(_without_membership(given))), settled(_as_interval(_without_membership(truth)))
    if given == truth:
        return True
    if (is_region(given) or is_region(truth)) and (region := same_region([given], [truth], limit)) is not None:
        return region
    given_op, truth_op = _structure(given), _structure(truth)
    if given_op == truth_op == "":
        return _same_value(given, truth, limit)
    if given_op in ("=", "chain") and truth_op not in ("=", "chain"):
        return _says(given, truth, limit)
    if truth_op in ("=", "chain") and given_op not in ("=", "chain"):
        return _says(truth, given, limit)
    if {given_op, truth_op} == {"()", "matrix"}:
        return _same_vector(given, truth, limit)
    if given_op != truth_op or not isinstance(given, Apply) or not isinstance(truth, Apply):
        return False
    if given_op in ("set", "union", "cap"):
        return _match(_distinct(given.args, limit), _distinct(truth.args, limit), lambda g, t: _same_node(g, t, limit))
    if given_op == "=" and _same_equation(given, truth, limit):
        return True
    return len(given.args) == len(truth.args) and all(_same_node(g, t, limit) for g, t in zip(given.args, truth.args, strict=True))


def _distinct(nodes: Sequence[Node], limit: WorkLimit) -> list[Node]:
    """An element that is written twice is one element."""
    found: list[Node] = []
    for node in nodes:
        if not any(_same_node(node, other, limit) for other in found):
            found.append(node)
    return found


def _same_vector(given: Node, truth: Node, limit: WorkLimit) -> bool:
    """A row or column and a tuple."""
    sides: list[tuple[Node, ...]] = []
    for node in (given, truth):
        cells = cells_of(node)
        entries = as_tuple(cells) if cells is not None else node.args if isinstance(node, Apply) else None
        sides.append(entries or ())
    return len(sides[0]) == len(sides[1]) > 0 and all(_same_node(g, t, limit) for g, t in zip(*sides, strict=True))


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
    """x, x_1, (x, y), or f(x) and f(2), which read as f times x and f times 2."""
    if isinstance(node, Apply) and node.op == "()":
        return all(_is_name(arg) for arg in node.args)
    if isinstance(node, Apply) and node.op == "mul" and len(node.args) == 2:
        function, argument = node.args
        return isinstance(function, Symbol) and (
            isinstance(argument, Symbol) or (function.name in FUNCTION_NAMES and isinstance(argument, Number))
        )
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
