from __future__ import annotations

import pytest

from ptlab.rewards.answer_text import Item, comparison_key, folded, is_wordy, normalise, peel, split_items


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"( 3, \frac{\pi}{2} )"),
        (r"11,\! 111,\! 111,\! 100", "11111111100"),
        ("58,500", "58500"),
        ("(100,200)", "(100,200)"),
        ("1,2", "1,2"),
        ("1,234,5", "1,234,5"),
        (r"90^{\circ}", "90°"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"1 \text{ or } 2", "1, 2"),
        (r"5\text{ m}", "5 meters"),
        (r"\$18.90", "18.90 dollars"),
        ("= 5.", "5"),
        (".5", ".5"),
        (r"\boxed{4210_{5}}", "4210_{5}"),
        (r"0.1\overline{6}", r"(\frac{15}{90})"),
        ("{1}{2}", "{1}{2}"),
    ],
)
def test_one_spelling(text: str, normal: str):
    assert normalise(text) == normal
    assert normalise(normal) == normal


@pytest.mark.parametrize(
    ("text", "item"),
    [
        ("15 cm ^2", Item("15", False, "cm^2")),
        ("15 square centimeters", Item("15", False, "cm^2")),
        ("5cm", Item("5", False, "cm")),
        ("20 miles", Item("20", False, "mile")),
        ("3 red apples", Item("3 red apples", False, "")),  # "red" might be r*e*d
        ("3 green apples", Item("3", False, "")),
        ("60 miles per hour", Item("60", False, "mph")),
        ("8%", Item("8", True, "")),
        (r"8\pi cm", Item(r"8\pi", False, "cm")),
        ("2xy", Item("2xy", False, "")),
        ("x^2", Item("x^2", False, "")),
        ("2 x", Item("2 x", False, "")),
        ("3x^2", Item("3x^2", False, "")),
        (r"\sin x", Item(r"\sin x", False, "")),
        ("Evelyn", Item("Evelyn", False, "")),
        ("Area = 12 cm", Item("12", False, "cm")),
        ("", Item("", False, "")),
    ],
)
def test_units_come_off_and_variables_stay(text: str, item: Item):
    assert peel(text) == item


def test_items_are_cut_outside_of_brackets_only():
    assert split_items(r"(1,2), \{3,4\}, [5,6); 7") == ["(1,2)", r"\{3,4\}", "[5,6)", "7"]
    assert split_items(r"\begin{matrix} 1, & 2 \end{matrix}, 3") == [r"\begin{matrix} 1, & 2 \end{matrix}", "3"]
    assert split_items(" , ,") == []


def test_a_space_between_digits_is_kept():
    assert comparison_key("1 4/5") != comparison_key("14/5")
    assert comparison_key("( 1 , 2 )") == "(1,2)"


def test_words_are_told_from_mathematics():
    assert [is_wordy(text) for text in ("east", "sinx", "abc", r"\frac{x}{y}", r"\begin{pmatrix} 1 \end{pmatrix}", "no solution")] == [
        True,
        False,
        False,
        False,
        False,
        True,
    ]
    assert folded("The x-axis.") == folded("the X axis")
    assert folded("-5 pears") != folded("5 pears")
