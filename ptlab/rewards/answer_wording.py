r"""What people write around and instead of an answer: sentences, markdown, colours, "no solution", "5th", "3 million", "base two".

Two passes of plain rewriting, each pattern with its reason beside it. `before_commands` sees the LaTeX as written, `after_commands` sees it
with \text{} and its kin opened. Every pattern is bounded, so a hostile text of MAX_ANSWER_CHARS costs at most some milliseconds.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\u00ad"))
NUMBER = r"-?\d{1,30}(?:\.\d{1,30})?"
Rule = tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]


def _rule(pattern: str, replacement: str | Callable[[re.Match[str]], str], flags: int = 0) -> Rule:
    return re.compile(pattern, flags), replacement


def _dotted(match: re.Match[str]) -> str:
    return r"\overline{" + match[1] + (match[2] or "") + (match[3] or "") + "}"


BEFORE: tuple[Rule, ...] = (
    _rule(r"^\s*(\*\*|`|__)(.{1,200}?)\1\s*$", r"\2"),  # **5**
    _rule(r"\\(?:text)?color\s*\{[^{}]{0,30}\}", ""),
    _rule(r"\\(?:h|v)?phantom\s*\{[^{}]{0,80}\}|\\[hv]space\*?\s*\{[^{}]{0,30}\}", " "),
    _rule(r"\{\s*([^{}\\]{1,40}?)\s*\\choose\s*([^{}\\]{1,40}?)\s*\}", r"\\binom{\1}{\2}"),
    _rule(r"\\dot\s*\{?(\d)\}?(?:(\d{0,40})\\dot\s*\{?(\d)\}?)?", _dotted),  # 0.\dot{1}4285\dot{7}
    _rule(r"(\d)\.\((\d{1,40})\)", r"\1.\\overline{\2}"),  # 0.(3); 2.5(3) stays a product
    _rule(r"\.(\d{0,20}?)(\d{1,12}?)\2{2,40}(?:\.{3}|…|\\[lc]?dots)", r".\1\\overline{\2}"),  # 0.1666...
    _rule(r"\\overline\s*\{\s*([A-Z]{1,3})\s*\}", r"\1"),  # a segment
    _rule(r"\\\$\s*(-?\d[\d,]{0,40}(?:\.\d{1,20})?)(?![\w\\^/*+.-])", r"\1 dollars"),  # \$36; a lone $ is math mode
    _rule(r"\\\$\s*(-?\d[\d,]{0,40}(?:\.\d{1,20})?)(?=\.?\s*$)", r"\1 dollars"),
    _rule(r"(?:\\\\\s*)+$", ""),  # a line break at the end
)

_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "twelve": 12, "sixteen": 16}
_BASE = "|".join(_BASES)
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PAIRS = "|".join(
    ("hours? minutes?", "minutes? seconds?", "feet inches", "foot inches", "pounds? ounces?", "years? months?", "days? hours?")
)
_PAIR = "|".join(rf"({first})[\s,]*(?:and\s+)?({NUMBER})\s*({second})" for first, second in (pair.split() for pair in _PAIRS.split("|")))


def _scaled(match: re.Match[str]) -> str:
    value = Fraction(match[1]) * _SCALES[match[2].lower()]
    return str(value.numerator) if value.denominator == 1 else match[0]


def _based(match: re.Match[str]) -> str:
    base = match[1].lower()
    return f"_{{{_BASES.get(base, base)}}}"


AFTER: tuple[Rule, ...] = (
    # "so the answer is 5"; of "the answer is not 5" stays "not 5", which is no number
    _rule(r"^[A-Za-z][A-Za-z ,']{0,60}\b(?:is|are|equals)(?: equal to| exactly| approximately)?\s*:?\s+(?=\S)", "", re.IGNORECASE),
    _rule(r"^(?:the\s+)?(?:final\s+)?answer\s*:\s*", "", re.IGNORECASE),
    _rule(r"^(?:USD|US|EUR|GBP|INR|Rs\.?)\s*(?=-?\d)", ""),
    _rule(rf"({NUMBER})\s*(thousand|million|billion|trillion)\b", _scaled, re.IGNORECASE),
    _rule(r"(?<=[\d}])\s*per\s?cent\b", "%", re.IGNORECASE),
    _rule(r"(?<=\d)\s*(?:\^\s*\{?\s*)?(?:st|nd|rd|th)\b\s*\}?", " "),  # 21^{st}
    _rule(rf"_\s*\{{?\s*({_BASE})\b\s*\}}?", _based, re.IGNORECASE),  # 1101_{two}
    _rule(rf"(?<=[0-9A-F])\s*\(?\s*(?:in\s+)?base[\s-]+(\d{{1,2}}|{_BASE})\s*\)?\s*$", _based),
    _rule(r"^\(\s*([0-9A-Fa-f]{1,40})\s*\)\s*(?=_)", r"\1"),  # (1101)_2
    _rule(r"\(?\s*\\?[pb]?mod\b\s*(?:\(|\{)?\s*(\d{1,20})\s*(?:\)|\})?\s*\)?", r" mod \1"),
    _rule(r"^[A-Za-z]\s*\\equiv\s*(?=.*\bmod\b)", ""),  # x \equiv 2 \pmod 5
    _rule(rf"(?<=\d)\s*(?:{_PAIR})", lambda match: " " + " ".join(part for part in match.groups() if part)),  # 3 hours and 20 minutes
    _rule(r"(\d{1,2}:[0-5]\d)\s*([ap])\.?\s*m\.?(?![A-Za-z])", r"\1 \2m", re.IGNORECASE),
    _rule(r"^\s*(\d{1,9})\s+to\s+(\d{1,9})\s*$", r"\1:\2"),
    _rule(r"^(\\\{)\s*([A-Za-z])\s*(?:\\in\s*\\RR\s*)?(?:\||:)\s*(.{1,200})\\\}$", r"\3"),  # \{x : x > 3\}
    _rule(r"^\]\s*([^\[\]]{1,80},[^\[\]]{1,80})\[$", r"(\1)"),  # ]2,5[ and its kin
    _rule(r"^\]\s*([^\[\]]{1,80},[^\[\]]{1,80})\]$", r"(\1]"),
    _rule(r"^\[\s*([^\[\]]{1,80},[^\[\]]{1,80})\[$", r"[\1)"),
)

_NOTHING = re.compile(r"(?:there (?:is|are) )?(?:no (?:real )?solutions?|none|(?:the )?empty set)", re.IGNORECASE)
_ALL_REALS = re.compile(r"(?:all|any) real(?: number)?s?|all real values", re.IGNORECASE)
_RELATION = r"[^,;]{0,60}(?:<|>|\\leq|\\geq)[^,;]{0,60}"
_BOTH = re.compile(rf"^({_RELATION})\s(?:and)\s({_RELATION})$")


def before_commands(text: str) -> str:
    """First pass, on the text as it was written."""
    text = text.translate(INVISIBLE)
    for pattern, replacement in BEFORE:
        text = pattern.sub(replacement, text)
    return text


def after_commands(text: str) -> str:
    r"""Second pass, on one line without \text{}; "and" and "or" are still words."""
    text = text.strip().rstrip("?").strip()
    for pattern, replacement in AFTER:
        text = pattern.sub(replacement, text)
    if _NOTHING.fullmatch(text.strip(" .")):
        return r"\emptyset "
    if _ALL_REALS.fullmatch(text.strip(" .")):
        return r"\RR "
    both = _BOTH.match(text)
    return rf"({both[1]}) \cap ({both[2]})" if both else text


CHOICE = re.compile(
    r"(?:(?:option|choice|answer)\b\s*:?\s*)?(?:\(([A-Ha-h])\)|([A-H])[.):])(?:\s+([^-+*/^=<>!_,].{0,200}))?", re.IGNORECASE | re.DOTALL
)
NAMED_CHOICE = re.compile(r"(?:option|choice|answer)\s*:?\s*([A-H])", re.IGNORECASE)
LONE_LETTER = re.compile(r"[A-Ha-h]")
OTHER_CHOICE = re.compile(r"\([A-H]\)|(?<![A-Za-z\\])[A-H](?![A-Za-z])")


def choice_letter(text: str) -> str | None:
    """C of "(C)", "(C) 12", "C. 12", "option C": a form that only a multiple-choice answer has; None for any other text."""
    named = NAMED_CHOICE.fullmatch(text.strip())
    if named:
        return named[1].upper()
    match = CHOICE.fullmatch(text.strip())
    if match is None or OTHER_CHOICE.search(match[3] or ""):
        return None
    return (match[1] or match[2]).upper()
