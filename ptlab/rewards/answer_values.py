"""What a tree of `latex_answer` is worth: exactly as a fraction, or to 400 digits at chosen points.

Two trees are equal if their exact values are, or else if they agree at every sample point. Agreement is tested, not proved: a formula
of this size that is not identically zero misses 340 digits of zero at a random point with a probability nobody will live to see, while
symbolic simplification (sympy.simplify) has no bound on its time and often fails on true identities. The numbers come from mpmath, which
is sympy's own arithmetic; the tests compare the verdicts with sympy's.

Why no worker process and no alarm: every operation here has bounded operands (EXACT_BITS, LARGEST_BITS, DIGITS), trees have a
bounded number of nodes, and the CPU clock of the calling thread is read before each node. So a verdict costs at most the time limit plus
one operation (below 10 ms), from any thread, inside a running event loop, with nothing to start, kill or close. The clock counts the CPU
seconds of this thread, not wall time: a busy machine must not change a reward.
"""

from __future__ import annotations

import functools
import hashlib
import math
import threading
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from ptlab.rewards.latex_answer import Node, Number, Symbol

EXACT_BITS = 20_000  # numerators and denominators up to about 6,000 digits
LARGEST_FACTORIAL = 1500  # 1500! has 13,700 bits
DIGITS = 400
LARGEST_BITS = 1000  # magnitudes from 1e-300 to 1e300: 100 digits are left behind the point of the largest value
ZERO_BITS = 1130  # a difference 340 digits below the largest intermediate value is rounding (400 digits less 60 for lost ones)
NUM_POINTS = 5

CONSTANTS = frozenset({"pi", "e", "i"})

# mpmath keeps pi and log 2 in caches that two threads must not fill at once. Held for one evaluation, bounded as above.
_MPMATH_LOCK = threading.Lock()


class Undecidable(Exception):
    """No verdict within the limits, or a value that does not exist (1/0). Stays inside ptlab.rewards; the answer counts as wrong."""


class WorkLimit:
    """CPU seconds of the calling thread that one grading may use."""

    def __init__(self, timeout_s: float) -> None:
        self.deadline_s = time.thread_time() + timeout_s

    def check(self) -> None:
        """Raises: Undecidable once the time is used up."""
        if time.thread_time() > self.deadline_s:
            raise Undecidable("the time limit is reached")


def equal_values(left: Node, right: Node, limit: WorkLimit) -> bool:
    """Whether two formulas have the same value, for all values of their symbols. Raises: Undecidable."""
    exact_left, exact_right = exact_value(left, limit), exact_value(right, limit)
    if exact_left is not None and exact_right is not None:
        return exact_left == exact_right
    return _vanishes(lambda point: point.value(left) - point.value(right), free_symbols(left) | free_symbols(right), limit)


def approximate(node: Node, limit: WorkLimit, *, digits: int) -> str:
    """The real value of a formula without variables, to so many digits. Raises: Undecidable."""
    if symbols := free_symbols(node):
        raise Undecidable(f"the value of {', '.join(sorted(symbols))[:80]} is not known")
    with _MPMATH_LOCK:
        point = _Point(0, limit)
        value = point.value(node)
        if not point.is_zero(point.context.im(value)):
            raise Undecidable("it is not real")
        return str(point.context.nstr(point.context.re(value), digits))


def proportional(left: Node, right: Node, limit: WorkLimit) -> bool:
    """Whether left == c * right for one constant c != 0 and neither is identically zero: then left = 0 and right = 0 are one equation."""
    symbols = free_symbols(left)
    if symbols != free_symbols(right) or not symbols:
        return False
    with _MPMATH_LOCK:
        first = _Point(0, limit)
        left_0, right_0 = first.value(left), first.value(right)
        if first.is_zero(left_0) or first.is_zero(right_0):
            return False

    def cross(point: _Point) -> Any:
        return point.seen(left_0) * point.value(right) - point.seen(right_0) * point.value(left)

    return _vanishes(cross, symbols, limit)


def real_order(nodes: Sequence[Node], limit: WorkLimit) -> list[int]:
    """The place of each value among all different ones, from 0 for the smallest. Raises: Undecidable, also if one is not real."""
    with _MPMATH_LOCK:
        point = _Point(0, limit)
        values = [point.value(node) for node in nodes]
        if any(not point.is_zero(point.context.im(value)) for value in values):
            raise Undecidable("a value that is not real has no place on the line")
        reals = [point.context.re(value) for value in values]
        ranks, rank = [0] * len(reals), -1
        previous: Any = None
        for index in sorted(range(len(reals)), key=lambda index: reals[index]):
            if previous is None or not point.is_zero(reals[index] - previous):
                rank += 1
            previous, ranks[index] = reals[index], rank
        return ranks


def free_symbols(node: Node) -> frozenset[str]:
    """Names of the variables in a tree. Infinity is one of them: it is equal to itself and to nothing else."""
    if isinstance(node, Symbol):
        return frozenset() if node.name in CONSTANTS else frozenset({node.name})
    if isinstance(node, Number):
        return frozenset()
    return frozenset[str]().union(*(free_symbols(arg) for arg in node.args))


def exact_value(node: Node, limit: WorkLimit) -> Fraction | None:
    """The rational value, or None if it is irrational, symbolic, undefined or too long (EXACT_BITS)."""
    limit.check()
    if isinstance(node, Number):
        return node.value
    if isinstance(node, Symbol):
        return None
    args: list[Fraction] = []
    for arg in node.args:
        value = exact_value(arg, limit)
        if value is None:
            return None
        args.append(value)
    result = _exact_operation(node.op, args)
    return None if result is None or _bits(result) > EXACT_BITS else result


def _exact_operation(op: str, args: Sequence[Fraction]) -> Fraction | None:
    match op, args:
        case "add", _:
            return _bounded_fold(lambda x, y: x + y, args)
        case "mul", _:
            return _bounded_fold(lambda x, y: x * y, args)
        case "neg", [x]:
            return -x
        case "abs", [x]:
            return abs(x)
        case "inv", [x] if x != 0:
            return 1 / x
        case "pow", [x, y]:
            return _exact_power(x, y)
        case "root", [x, n] if n.denominator == 1 and 2 <= n <= 64:
            return _exact_root(x, int(n))
        case "factorial", [x] if x.denominator == 1 and 0 <= x <= LARGEST_FACTORIAL:
            return Fraction(math.factorial(int(x)))
        case "binom", [n, k] if n.denominator == k.denominator == 1 and k >= 0 and 0 <= n <= LARGEST_FACTORIAL:
            return Fraction(math.comb(int(n), int(k)))
        case "floor", [x]:
            return Fraction(math.floor(x))
        case "ceil", [x]:
            return Fraction(math.ceil(x))
    return None


def _bounded_fold(operation: Callable[[Fraction, Fraction], Fraction], args: Sequence[Fraction]) -> Fraction | None:
    total = args[0]
    for arg in args[1:]:
        total = operation(total, arg)
        if _bits(total) > EXACT_BITS:
            return None
    return total


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator != 1:
        root = _exact_root(base, exponent.denominator) if base >= 0 and exponent.denominator <= 64 else None
        return None if root is None else _exact_power(root, Fraction(exponent.numerator))
    if base in (0, 1):
        return base if exponent > 0 or base == 1 else (Fraction(1) if exponent == 0 else None)
    if abs(exponent) * _bits(base) > EXACT_BITS:
        return None
    return Fraction(base ** int(exponent))


def _exact_root(x: Fraction, n: int) -> Fraction | None:
    if x < 0:
        root = _exact_root(-x, n) if n % 2 else None
        return None if root is None else -root
    parts = [_integer_root(part, n) for part in (x.numerator, x.denominator)]
    return None if None in parts else Fraction(parts[0] or 0, parts[1] or 1)


def _integer_root(x: int, n: int) -> int | None:
    """The integer whose n-th power is x, or None. Bisection on at most EXACT_BITS / n bits."""
    low, high = 0, 1 << (x.bit_length() // n + 1)
    if n == 2:
        low = high = math.isqrt(x)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if middle**n < x else (low, middle)
    return low if low**n == x else None


def _bits(x: Fraction) -> int:
    return max(x.numerator.bit_length(), x.denominator.bit_length())


def _vanishes(difference: Callable[[_Point], Any], symbols: frozenset[str], limit: WorkLimit) -> bool:
    with _MPMATH_LOCK:
        for index in range(NUM_POINTS if symbols else 1):
            point = _Point(index, limit)
            if not point.is_zero(difference(point)):
                return False
    return True


@functools.cache
def _arithmetic() -> tuple[Any, dict[str, Callable[[Any], Any]]]:
    """mpmath with DIGITS digits, and its functions under our names. A context of its own, so that nobody else's precision is changed.

    Used under _MPMATH_LOCK.
    """
    import mpmath

    mp = mpmath.ctx_mp.MPContext()
    mp.dps = DIGITS
    functions: dict[str, Callable[[Any], Any]] = {
        "exp": mp.exp, "sin": mp.sin, "cos": mp.cos, "tan": mp.tan, "cot": mp.cot, "sec": mp.sec, "csc": mp.csc,
        "sinh": mp.sinh, "cosh": mp.cosh, "tanh": mp.tanh, "arcsin": mp.asin, "arccos": mp.acos, "arctan": mp.atan, "arccot": mp.acot,
        "arcsinh": mp.asinh, "arccosh": mp.acosh, "arctanh": mp.atanh,
    }  # fmt: skip
    return mp, functions


class _Point:
    """Evaluates trees with every variable set to one value; the largest intermediate magnitude tells rounding from difference.

    Point 0 has positive values only, point 1 negative ones only, the others mixed, so that |x| is not x and sqrt(x^2) is not x.
    """

    def __init__(self, index: int, limit: WorkLimit) -> None:
        self.index = index
        self.limit = limit
        self.context, self.functions = _arithmetic()
        self.largest_bits = -LARGEST_BITS

    def value(self, node: Node) -> Any:
        """The complex value at this point. Raises: Undecidable where it does not exist or is beyond the limits."""
        self.limit.check()
        if isinstance(node, Number):
            return self.seen(self.context.mpf(node.value.numerator) / node.value.denominator)
        if isinstance(node, Symbol):
            return self.seen(self.symbol(node.name))
        if node.op in ("factorial", "binom"):
            exact = exact_value(node, self.limit)
            if exact is None:
                raise Undecidable(f"{node.op} of something that is no small integer")
            return self.seen(self.context.mpf(exact.numerator))
        args = [self.value(arg) for arg in node.args]
        try:
            return self.seen(self.operation(node.op, args))
        except (ArithmeticError, ValueError, self.context.NoConvergence) as err:
            raise Undecidable(f"{node.op}: {err}") from err

    def symbol(self, name: str) -> Any:
        if name in CONSTANTS:
            return {"pi": +self.context.pi, "e": +self.context.e, "i": self.context.j}[name]
        digest = hashlib.blake2b(f"{self.index}/{name}".encode(), digest_size=9).digest()
        size = 0.5 + 2 * int.from_bytes(digest[:8], "big") / 2.0**64
        negative = self.index == 1 or (self.index > 1 and digest[8] % 2 == 1)
        return self.context.mpf(-size if negative else size)

    def seen(self, x: Any) -> Any:
        if not self.context.isfinite(x):
            raise Undecidable("a value is not finite")
        if x != 0:
            bits = int(self.context.mag(x))
            if bits > LARGEST_BITS:
                raise Undecidable(f"a value beyond 2^{LARGEST_BITS}")
            self.largest_bits = max(self.largest_bits, bits)
        return x

    def is_zero(self, x: Any) -> bool:
        return bool(x == 0) or int(self.context.mag(x)) <= self.largest_bits - ZERO_BITS

    def operation(self, op: str, args: Sequence[Any]) -> Any:
        mp = self.context
        match op, args:
            case "add", _:
                return mp.fsum(args)
            case "mul", _:
                return functools.reduce(lambda x, y: self.seen(x * y), args)
            case "neg", [x]:
                return -x
            case "inv", [x]:
                return 1 / self.non_zero(x)
            case "abs", [x]:
                return abs(x)
            case "pow", [x, y]:
                return self.power(x, y)
            case "root", [x, n]:
                return self.root(x, n)
            case (("floor" | "ceil"), [x]):
                return self.rounded(op, x)
            case "log", [x, base]:
                return mp.log(self.non_zero(x)) / self.non_zero(mp.log(self.non_zero(base)))
            case "ln", [x]:
                return mp.log(self.non_zero(x))
            case _, [x] if op in self.functions:
                if op in ("exp", "sinh", "cosh", "tanh") and x != 0 and mp.mag(x) > 11:
                    raise Undecidable(f"{op} of a large value")
                return self.functions[op](x)
        raise Undecidable(f"'{op}' is not a number")

    def non_zero(self, x: Any) -> Any:
        if self.is_zero(x):
            raise Undecidable("division by zero, or the logarithm of zero")
        return x

    def power(self, base: Any, exponent: Any) -> Any:
        mp = self.context
        if self.is_zero(base):
            if mp.re(exponent) > 0:
                return mp.mpf(0)
            raise Undecidable("zero to a power that is not positive")
        if exponent == 0:
            return mp.mpf(1)
        if mp.mag(exponent) > 40 or float(abs(exponent)) * max(1, abs(int(mp.mag(base)))) > 4 * LARGEST_BITS:
            raise Undecidable("a power beyond the limits")
        return mp.power(base, int(exponent.real)) if mp.isint(exponent) else mp.power(base, exponent)

    def root(self, x: Any, degree: Any) -> Any:
        """The principal root; for an odd degree of a negative number the real one, as schools mean it."""
        mp = self.context
        if not mp.isint(degree):  # the n-th root of a formula in n
            return self.power(x, 1 / self.non_zero(degree))
        if not 2 <= degree.real <= 1000:
            raise Undecidable("a root of a strange degree")
        n = int(degree.real)
        if self.is_zero(mp.im(x)):
            x = mp.re(x)
            return -mp.root(-x, n) if x < 0 and n % 2 else mp.root(x, n)
        return mp.root(x, n)

    def rounded(self, op: str, x: Any) -> Any:
        nearest = self.context.nint(self.context.re(x))
        if self.is_zero(x - nearest):
            return nearest
        return self.context.floor(x) if op == "floor" else self.context.ceil(x)
