from __future__ import annotations

from fractions import Fraction

import pytest

from ptlab.rewards.latex_answer import MAX_DEPTH, MAX_NODES, Apply, Node, Number, Symbol, Unreadable, read


def n(value: int) -> Number:
    return Number(Fraction(value))


def over(top: Node, bottom: Node) -> Apply:
    return Apply("mul", (top, Apply("inv", (bottom,))))


X = Symbol("x")


@pytest.mark.parametrize(
    ("text", "node"),
    [
        (r"\frac12", over(n(1), n(2))),
        (r"\frac 5{19}", over(n(5), n(19))),
        (r"\frac{270}7", over(n(270), n(7))),
        (r"1\frac{4}{5}", Number(Fraction(9, 5))),
        ("1 4/5", Number(Fraction(9, 5))),
        (r"2\frac{3}{2}", Apply("mul", (n(2), over(n(3), n(2))))),  # no proper fraction: a product
        ("2^10", Apply("pow", (n(2), n(10)))),
        ("2^3^4", Apply("pow", (n(2), Apply("pow", (n(3), n(4)))))),
        ("-x^2", Apply("neg", (Apply("pow", (X, n(2))),))),
        (r"\sqrt[3]2", Apply("root", (n(2), n(3)))),
        (r"\sqrt13", Apply("root", (n(13), n(2)))),
        (r"\sin^2 x", Apply("pow", (Apply("sin", (X,)), n(2)))),
        (r"\sin^{-1} x", Apply("arcsin", (X,))),
        (r"\sin 2x \cos x", Apply("mul", (Apply("sin", (Apply("mul", (n(2), X)),)), Apply("cos", (X,))))),
        (r"\log_2 8", Apply("log", (n(8), n(2)))),
        ("xy", Apply("mul", (X, Symbol("y")))),
        ("2pi", Apply("mul", (n(2), Symbol("pi")))),
        ("x_{12}", Symbol("x_12")),
        ("|x|", Apply("abs", (X,))),
        ("2|x|", Apply("mul", (n(2), Apply("abs", (X,))))),
        ("(1,x]", Apply("(]", (n(1), X))),
        ("(x)", X),
        (r"\{1,2\}", Apply("set", (n(1), n(2)))),
        (r"x\leq 2", Apply("<=", (X, n(2)))),
        (r"\begin{pmatrix} 1 & 2 \\ 3 & x \end{pmatrix}", Apply("matrix", (Apply("row", (n(1), n(2))), Apply("row", (n(3), X))))),
        ("3e2", n(300)),
        ("5°", n(5)),
    ],
)
def test_the_tree(text: str, node: Node):
    assert read(text) == node


@pytest.mark.parametrize(
    "text",
    [
        "", "1 2", "(1", "1)", "(1,2}", r"\frac{1}", r"\unknown", "5!!", "---5", "x'", "é", "+", "2^", "x_", "|x",
        r"\begin{cases}1\end{cases}",
        "1" * 1001, "1e1001", "(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1), "+".join("x^2" for _ in range(MAX_NODES)),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(text: str):
    with pytest.raises(Unreadable):
        read(text)
