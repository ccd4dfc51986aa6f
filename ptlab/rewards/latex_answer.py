r"""A small reader of answers: normalised LaTeX or plain mathematics -> a tree of numbers, symbols and named operations.

Model text is never handed to `eval`, to `sympy.sympify` or to `sympy.parse_expr` (both of which call eval). The reader knows a fixed
list of commands; everything else is Unreadable, and such an answer is compared as a string.

The size of the tree is bounded here: MAX_NODES nodes, MAX_DEPTH levels, MAX_DIGITS digits in a literal. Nothing is computed.

How ambiguous forms are read:
    1\frac{4}{5}, 1 4/5   a mixed number, 9/5, if the fraction is a proper one of two integers; 2\frac{x}{3} is a product
    2^10, \sqrt13         the whole number, as people mean it (TeX would take one digit); \frac12 is 1/2, as in TeX
    1/2x                  (1/2)x, from left to right
    \sin 2x \cos x        (\sin 2x)(\cos x): an argument without brackets ends at the next function, + or -
    \log                  the natural logarithm unless it has a base; \lg has base 10
    3e5                   3 * 10^5 where the digits touch the e; otherwise e is Euler's number, and i the imaginary unit
    (1,2)                 a tuple; the same as the open interval.  [5] and (5) are 5.
    30°                   30, but pi/6 inside the argument of a function
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_NODES = 400
MAX_DEPTH = 24
MAX_DIGITS = 1000
MAX_TEN_EXPONENT = 1000


class Unreadable(Exception):
    """The text is no formula this reader knows. Stays inside ptlab.rewards."""


@dataclass(frozen=True, slots=True)
class Number:
    value: Fraction


@dataclass(frozen=True, slots=True)
class Symbol:
    name: str


@dataclass(frozen=True, slots=True)
class Apply:
    """`op` on `args`. Ops: add neg mul inv pow root abs factorial binom floor ceil plusminus minusplus and FUNCTIONS (log: value, base);
    structures: "()" "[]" "(]" "[)" (two or more parts), set, union, cap, setminus, row, matrix (of rows), determinant (of rows);
    relations: = < > <= >= != in (two parts each), chain (of relations)."""

    op: str
    args: tuple[Node, ...]


Node = Number | Symbol | Apply


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


FUNCTIONS = _names("sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan arccot arcsinh arccosh arctanh ln lg log exp")
INVERSES = {"sin": "arcsin", "cos": "arccos", "tan": "arctan", "cot": "arccot", "sinh": "arcsinh", "cosh": "arccosh", "tanh": "arctanh"}
NAMES = _names(
    "alpha beta gamma delta epsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega "
    "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell pi infty emptyset RR ZZ QQ NN CC"
)
PLAIN_NAMES = {name: name for name in NAMES - _names("nu ell RR ZZ QQ NN CC")} | {"infinity": "infty", "oo": "infty"}
RELATIONS = {"=": "=", "<": "<", ">": ">", r"\leq": "<=", r"\geq": ">=", r"\neq": "!=", r"\in": "in", "<=": "<=", ">=": ">="}
SET_OPERATIONS = {r"\cup": "union", r"\cap": "cap", r"\setminus": "setminus"}
MATRIX_KINDS = {name: "matrix" for name in _names("matrix pmatrix bmatrix Bmatrix smallmatrix array")} | {"vmatrix": "determinant"}
STARTING_COMMANDS = (r"\frac", r"\sqrt", r"\binom", r"\begin")
CLOSERS = {"(": ")", "[": "]", "{": "}", r"\{": r"\}", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}

TOKEN = re.compile(
    r"\s*(?:(?P<command>\\[A-Za-z]+|\\[{}\\])"
    r"|(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,4}(?![\w.^]))?)"
    r"|(?P<letters>[A-Za-z]+)"
    r"|(?P<mark><=|>=|\*\*|[-+*/^_!|=<>()\[\]{},&°]))"
)
ONE = Number(Fraction(1))
DEGREE = Apply("mul", (Symbol("pi"), Number(Fraction(1, 180))))


def read(text: str) -> Node:
    """The tree of one normalised answer item. Raises: Unreadable."""
    reader = _Reader(text)
    node = reader.statement()
    if reader.token():
        raise Unreadable(f"'{reader.token()}' is left over")
    return node


class _Reader:
    """Recursive descent: statement > union > total > product > signed > power > atom."""

    def __init__(self, text: str) -> None:
        self.tokens = _tokens(text)
        self.position = 0
        self.depth = 0
        self.num_nodes = 0
        self.open_bars = 0
        self.in_function = 0

    # -- tokens

    def token(self, ahead: int = 0) -> str:
        """The token at the cursor, "" at the end."""
        index = self.position + ahead
        return self.tokens[index] if index < len(self.tokens) else ""

    def take(self) -> str:
        token = self.token()
        self.position += 1
        return token

    def expect(self, wanted: str) -> None:
        if self.take() != wanted:
            raise Unreadable(f"'{wanted}' is missing")

    def make(self, op: str, *args: Node) -> Node:
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES:
            raise Unreadable(f"more than {MAX_NODES} operations")
        return Apply(op, args)

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable(f"nested deeper than {MAX_DEPTH}")

    # -- grammar

    def statement(self) -> Node:
        members, relations = [self.union()], list[str]()
        while self.token() in RELATIONS:
            relations.append(RELATIONS[self.take()])
            members.append(self.union())
        if not relations:
            return members[0]
        pairs = tuple(self.make(op, left, right) for op, left, right in zip(relations, members, members[1:], strict=False))
        return pairs[0] if len(pairs) == 1 else self.make("chain", *pairs)

    def union(self) -> Node:
        node = self.total()
        while self.token() in SET_OPERATIONS:
            op = SET_OPERATIONS[self.take()]
            right = self.total()
            parts = node.args if isinstance(node, Apply) and node.op == op == "union" else (node,)
            node = self.make(op, *parts, right)
        return node

    def total(self) -> Node:
        parts = [self.product()]
        while self.token() in ("+", "-", r"\pm", r"\mp"):
            sign = self.take()
            right = self.product()
            parts.append(right if sign == "+" else self.make({"-": "neg", r"\pm": "plusminus", r"\mp": "minusplus"}[sign], right))
        return parts[0] if len(parts) == 1 else self.make("add", *parts)

    def product(self) -> Node:
        parts = [self.signed()]
        while True:
            token = self.token()
            if token == "*":
                self.take()
                parts.append(self.signed())
            elif token == "/":
                self.take()
                parts.append(self.make("inv", self.signed()))
            elif self.starts_atom(token) and not _is_number(token):
                parts.append(self.power())
            else:
                break
        return parts[0] if len(parts) == 1 else self.make("mul", *parts)

    def signed(self) -> Node:
        signs = list[str]()
        while self.token() in ("+", "-", r"\pm", r"\mp"):
            signs.append(self.take())
        if len(signs) > 2:
            raise Unreadable("three signs in a row")
        node = self.power()
        if signs.count("-") % 2:
            node = self.make("neg", node)
        for sign in signs:
            if sign in (r"\pm", r"\mp"):
                node = self.make("plusminus" if sign == r"\pm" else "minusplus", node)
        return node

    def power(self) -> Node:
        node = self.atom()
        if self.token() == "!":
            self.take()
            node = self.make("factorial", node)
        if self.token() == "^":
            self.take()
            node = self.make("pow", node, self.exponent())
        if self.token() == "°":
            self.take()
            node = self.make("mul", node, DEGREE) if self.in_function else node
        return node

    def exponent(self) -> Node:
        self.deeper()
        node = self.group() if self.token() == "{" else self.signed()
        self.depth -= 1
        return node

    def starts_atom(self, token: str) -> bool:
        if token == "|":
            return not self.open_bars
        return token.isalpha() or _is_number(token) or _is_name(token) or token in CLOSERS or token in STARTING_COMMANDS

    def atom(self) -> Node:
        self.deeper()
        node = self.atom_inside()
        self.depth -= 1
        return node

    def atom_inside(self) -> Node:
        token = self.token()
        if _is_number(token):
            return self.number()
        if token.isalpha():
            return self.letters()
        if token in ("(", "[", "{", r"\{"):
            return self.group()
        self.take()
        if token == "|":
            self.open_bars += 1
            inside = self.total()
            self.open_bars -= 1
            self.expect("|")
            return self.make("abs", inside)
        if token in (r"\lfloor", r"\lceil"):
            inside = self.total()
            self.expect(CLOSERS[token])
            return self.make("floor" if token == r"\lfloor" else "ceil", inside)
        if token == r"\frac":
            numerator = self.argument()
            return self.make("mul", numerator, self.make("inv", self.argument()))
        if token == r"\binom":
            return self.make("binom", self.argument(), self.argument())
        if token == r"\sqrt":
            return self.root()
        if token == r"\begin":
            return self.matrix()
        if _is_name(token):
            return self.name(token[1:])
        raise Unreadable(f"'{token}' begins no formula" if token else "the formula ends too early")

    def number(self) -> Node:
        whole = self.take()
        mixed = self.mixed_part(whole)
        if mixed is not None:
            return Number(_literal(whole) + mixed)
        if _is_number(self.token()):
            raise Unreadable(f"two numbers side by side: {whole} {self.token()}")
        return Number(_literal(whole))

    def mixed_part(self, whole: str) -> Fraction | None:
        r"""The 4/5 of "1 4/5" and of "1\frac{4}{5}", consumed; None where no proper fraction follows the integer."""
        if not whole.isdigit():
            return None
        start, tokens = self.position, list(self.tokens)
        parts: list[str] = []
        if _is_number(self.token()) and self.token(1) == "/":
            parts = [self.take(), (self.take(), self.take())[1]]
        elif self.token() == r"\frac":
            self.take()
            parts = [self.integer_argument(), self.integer_argument()]
        if len(parts) == 2 and all(part.isdigit() for part in parts) and 0 < _literal(parts[0]) < _literal(parts[1]):
            return Fraction(int(parts[0]), int(parts[1]))
        self.position, self.tokens = start, tokens
        return None

    def integer_argument(self) -> str:
        if self.token() == "{":
            if self.token(2) != "}":
                return ""
            self.take()
            return (self.take(), self.take())[0]
        self.split_argument()
        return self.take()

    def letters(self) -> Node:
        run = self.take()
        for length in range(len(run), 1, -1):
            head = run[:length]
            if head in FUNCTIONS or head in PLAIN_NAMES or head == "sqrt":
                if length < len(run):
                    self.tokens.insert(self.position, run[length:])
                return self.root() if head == "sqrt" else self.name(PLAIN_NAMES.get(head, head))
        if len(run) > 1:
            self.tokens.insert(self.position, run[1:])
        return self.subscripted(run[0])

    def name(self, name: str) -> Node:
        return self.function(name) if name in FUNCTIONS else self.subscripted(name)

    def subscripted(self, name: str) -> Node:
        if self.token() != "_":
            return Symbol(name)
        self.take()
        if self.token() == "{":
            self.take()
            parts = list[str]()
            while self.token() not in ("}", ""):
                parts.append(self.take())
            self.expect("}")
            return Symbol(f"{name}_{''.join(parts)}")
        self.split_argument()
        if not self.token().isalnum():
            raise Unreadable("a subscript is missing")
        return Symbol(f"{name}_{self.take()}")

    def function(self, name: str) -> Node:
        base: Node | None = None
        exponent: Node | None = None
        if name == "log" and self.token() == "_":
            self.take()
            base = self.argument(whole_number=True)
        if self.token() == "^":
            self.take()
            exponent = self.exponent()
            if exponent in (Number(Fraction(-1)), Apply("neg", (ONE,))) and name in INVERSES:
                name, exponent = INVERSES[name], None
        self.in_function += 1
        inside = self.function_argument()
        self.in_function -= 1
        if name == "lg":
            name, base = "log", Number(Fraction(10))
        node = self.make("log", inside, base) if base else self.make("ln" if name == "log" else name, inside)
        return self.make("pow", node, exponent) if exponent else node

    def function_argument(self) -> Node:
        if self.token() in ("(", "{", "["):
            return self.atom()
        parts = [self.signed()]
        while self.starts_atom(token := self.token()) and not token.removeprefix("\\").startswith((*FUNCTIONS, *"0123456789.")):
            parts.append(self.power())
        return parts[0] if len(parts) == 1 else self.make("mul", *parts)

    def root(self) -> Node:
        degree: Node = Number(Fraction(2))
        if self.token() == "[":
            self.take()
            degree = self.total()
            self.expect("]")
        return self.make("root", self.argument(whole_number=True), degree)

    def argument(self, *, whole_number: bool = False) -> Node:
        r"""A braced group, or what TeX takes without braces: one digit, letter or command (`whole_number`: all digits)."""
        if not whole_number or (self.token().isalpha() and self.token() not in PLAIN_NAMES):
            self.split_argument()
        if _is_number(self.token()):
            return Number(_literal(self.take()))
        if self.token() in ("+", "-", "*", "/", "^", "_", ""):
            raise Unreadable("an argument is missing")
        return self.group() if self.token() == "{" else self.atom()

    def split_argument(self) -> None:
        r"""Make the first digit or letter of the next token a token of its own: \frac12 -> \frac 1 2."""
        token = self.token()
        if len(token) > 1 and token.isascii() and token.isalnum():
            self.tokens[self.position : self.position + 1] = [token[0], token[1:]]

    def group(self) -> Node:
        opening = self.take()
        self.deeper()
        bars, self.open_bars = self.open_bars, 0
        parts = list[Node]()
        if self.token() != CLOSERS[opening]:
            parts.append(self.statement())
        while self.token() == ",":
            self.take()
            parts.append(self.statement())
        closing = self.take()
        self.open_bars = bars
        self.depth -= 1
        if closing != CLOSERS[opening] and opening + closing not in ("(]", "[)"):
            raise Unreadable(f"'{opening}' is closed by '{closing}'")
        if opening == r"\{":
            return self.make("set", *parts) if parts else Symbol("emptyset")
        if not parts:
            raise Unreadable(f"nothing between '{opening}' and '{closing}'")
        if len(parts) == 1:
            return parts[0]
        return self.make("set" if opening == "{" else opening + closing, *parts)

    def matrix(self) -> Node:
        self.expect("{")
        environment = self.take()
        self.expect("}")
        if environment not in MATRIX_KINDS:
            raise Unreadable(f"unknown environment '{environment}'")
        if environment == "array" and self.token() == "{":
            while self.take() not in ("}", ""):
                pass
        rows, cells = list[Node](), [self.statement()]
        while True:
            token = self.take()
            if token == "&":
                cells.append(self.statement())
                continue
            rows.append(self.make("row", *cells))
            if token == r"\\" and self.token() != r"\end":
                cells = [self.statement()]
                continue
            if token == r"\\":
                self.take()
            elif token != r"\end":
                raise Unreadable(f"'{token}' inside a matrix")
            break
        self.expect("{")
        self.expect(environment)
        self.expect("}")
        return self.make(MATRIX_KINDS[environment], *rows)


def _tokens(text: str) -> list[str]:
    tokens = list[str]()
    position = 0
    text = text.rstrip()
    while position < len(text):
        match = TOKEN.match(text, position)
        if match is None:
            raise Unreadable(f"no token begins at '{text[position : position + 10]}'")
        token = match[match.lastgroup or 0]
        tokens.append("^" if token == "**" else token)
        position = match.end()
    return tokens


def _is_number(token: str) -> bool:
    return token[:1].isdigit() or (token[:1] == "." and len(token) > 1)


def _is_name(token: str) -> bool:
    return token.startswith("\\") and (token[1:] in NAMES or token[1:] in FUNCTIONS)


def _literal(token: str) -> Fraction:
    if token.isdigit() and len(token) <= MAX_DIGITS:
        return Fraction(int(token))
    mantissa, _, exponent = token.lower().partition("e")
    if len(mantissa) > MAX_DIGITS or abs(int(exponent or "0")) > MAX_TEN_EXPONENT:
        raise Unreadable(f"a number of more than {MAX_DIGITS} digits")
    return Fraction(mantissa.removesuffix(".")) * Fraction(10) ** int(exponent or "0")
