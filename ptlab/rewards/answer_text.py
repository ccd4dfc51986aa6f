r"""Answers as strings: one spelling for the many ways to write the same answer, and the units and lists around the values.

Nothing is computed here. `normalise` maps LaTeX, plain text and Unicode to one spelling that `latex_answer` reads;
`split_items` cuts a list at its outermost commas; `peel` takes a unit or percent sign off the end.

All functions are meant for at most MAX_ANSWER_CHARS characters (checked by the caller): some regular expressions below are
quadratic in the worst case, which at this length is microseconds.
"""

# ruff: noqa: RUF001 - the table of look-alike characters is made of them

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from ptlab.rewards.answer_wording import after_commands, before_commands

MAX_ANSWER_CHARS = 2000  # the longest gold answer of MATH-500 has 53; a longer one is not an answer but a flood

UNICODE = str.maketrans({
    "−": "-", "–": "-", "—": "-", "×": "*", "·": "*", "⋅": "*", "∗": "*", "÷": "/", "∕": "/", "⁄": "/", "∞": r"\infty ", "π": r"\pi ",
    "√": r"\sqrt ", "±": r"\pm ", "∓": r"\mp ", "≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ", "≈": "=", "∪": r"\cup ", "∈": r"\in ",
    "∅": r"\emptyset ", "º": "°", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}",
    "⁰": "^0", "¹": "^1", "²": "^2", "³": "^3", "⁴": "^4", "⁵": "^5", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "φ": r"\phi ",
    "“": '"', "”": '"', "’": "'", "£": "", "€": "",
})  # fmt: skip


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


DROPPED = _names(
    "left right middle big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr displaystyle textstyle limits angle bf rm it tt "
    "tiny small normalsize large Large LARGE huge Huge nonumber"
)
SPACES = frozenset(["quad", "qquad", ",", ";", ":", ">", " "])
WRAPPERS = _names(
    "text textbf textit textrm textsf texttt textnormal mbox hbox mathrm mathbf mathit mathsf mathtt mathcal boldsymbol bm "
    "operatorname emph underline boxed fbox ensuremath vec hat overrightarrow overleftrightarrow textup textsc"
)
RENAMED = {
    "dfrac": r"\frac", "tfrac": r"\frac", "cfrac": r"\frac", "dbinom": r"\binom", "tbinom": r"\binom", "le": r"\leq ", "leqslant": r"\leq ",
    "ge": r"\geq ", "geqslant": r"\geq ", "ne": r"\neq ", "lt": "<", "gt": ">", "cdot": "*", "times": "*", "ast": "*", "div": "/",
    "approx": "=", "lvert": "|", "rvert": "|", "vert": "|", "mid": "|", "lbrace": r"\{", "rbrace": r"\}", "lbrack": "[", "rbrack": "]",
    "degree": "°", "varnothing": r"\emptyset ", "varphi": r"\phi ",
    "varepsilon": r"\epsilon ", "backslash": r"\setminus ", "langle": "(", "rangle": ")", "dots": r"\ldots ", "cdots": r"\ldots ",
    "imath": "i", "jmath": "j", "colon": ":", "iff": ",", "$": "", "%": "%", "!": "", "#": "", "_": "_",
}  # fmt: skip

# Text in a formula is a unit far more often than a product; a lone letter is read as what it abbreviates.
LONE_UNITS = {"m": "meters", "g": "grams", "s": "seconds", "h": "hours", "L": "liters", "l": "liters"}

UNIT_NAMES = {
    alias: names.split()[0]
    for names in (
        "mm millimeter millimeters millimetre millimetres",
        "cm centimeter centimeters centimetre centimetres",
        "meter meters metre metres",
        "km kilometer kilometers kilometre kilometres",
        "inch inches in",
        "foot feet ft",
        "yard yards yd",
        "mile miles mi",
        "second seconds sec secs",
        "minute minutes min mins",
        "hour hours hr hrs",
        "day days",
        "week weeks",
        "month months",
        "year years yr yrs",
        "mg milligram milligrams",
        "gram grams",
        "kg kilogram kilograms kgs",
        "ounce ounces oz",
        "pound pounds lb lbs",
        "ml milliliter milliliters millilitre",
        "liter liters litre litres",
        "gallon gallons gal",
        "cent cents",
        "dollar dollars usd",
        "mph",
        "kph kmh",
        "rad radian radians",
    )
    for alias in names.split()
}
COMPOUNDS = {"mile/hour": "mph", "km/hour": "kph"}
TEMPERATURE = re.compile(r"°\s*([CFK])$")
UNIT_QUALIFIERS = {"square": "2", "sq": "2", "cubic": "3", "cu": "3"}

MATH_WORDS = _names(
    "arcsinh arccosh arctanh arcsin arccos arctan arccot sinh cosh tanh sin cos tan cot sec csc sqrt ln log lg exp pi infinity infty "
    "alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu xi rho sigma tau phi chi psi omega"
)
# A function may have one or two letters written right after it ("sinx"); such a run is mathematics, any other long run a word.
MATH_RUN = re.compile(rf"(?:{'|'.join(sorted(MATH_WORDS, key=len, reverse=True))})[A-Za-z]{{0,2}}")
SHORT_WORDS = frozenset(["yes", "no", "odd", "dne"])  # words, though as short as a product of letters
SAME_WORDS = {"dne": "doesnotexist"}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

COMMAND = re.compile(r"\\([A-Za-z]+|.)", re.DOTALL)
NUMBER_SETS = re.compile(r"\\(?:mathbb|Bbb)\s*(?:\{\s*([RZQNC])\s*\}|([RZQNC]))")
THIN_THOUSANDS = re.compile(r"(?<=\d)(?:,\s*\\!\s*|\{,\}\s*|\\,\s*|\\!\s*)(?=\d{3}(?!\d))")
PLAIN_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
SPACED_THOUSANDS = re.compile(r"(?<![\d.,/])\d{1,3}(?: \d{3})+(?![\d,/])")
REPEATING = re.compile(r"(\d{0,50})\.(\d{0,50})\\overline\s*(?:\{\s*(\d{1,50})\s*\}|(\d))")
DEGREE = re.compile(r"\^\s*(?:\{\s*(?:\\circ|°)\s*\}|\\circ(?![A-Za-z])|°)|\\circ(?![A-Za-z])|(?<=[\d})])\s*\bdegrees?\b")


@dataclass(frozen=True, slots=True)
class Item:
    """One value of an answer, without what was written around it.

    percent: a percent sign was taken off. unit: canonical name ("cm", "cm^2") of a known unit, "" where none is known.
    """

    text: str
    percent: bool
    unit: str


def normalise(text: str) -> str:
    r"""One spelling: \dfrac -> \frac, \left( -> (, 10,\!080 -> 10080, \text{cm} -> cm, 90^\circ -> 90°, $, spaces and the final dot gone.

    Inside brackets a plain comma always separates, since (100,200) is a point; outside of them 58,500 is one number.
    """
    text = unicodedata.normalize("NFKC", text.translate(UNICODE))[: 4 * MAX_ANSWER_CHARS]
    text = re.sub(r"\\(?:left|right)\s*\.", " ", text)
    text = DEGREE.sub("°", before_commands(THIN_THOUSANDS.sub("", text)))
    text = NUMBER_SETS.sub(lambda match: "\\" + 2 * (match[1] or match[2]) + " ", text)
    text = REPEATING.sub(_repeating_as_fraction, text)
    text = COMMAND.sub(_spell_command, text)
    for _ in range(4):  # wrappers within wrappers; deeper ones stay and the answer is then compared as a string
        text, found = re.subn(r"\\text\s*\{([^{}\\]*)\}", _unwrap, text)
        if not found:
            break
    text = re.sub(r"\\text(?![A-Za-z])\s*", " ", text)
    text = re.sub(r"\s+", " ", text.replace("~", " ").replace("$", ""))
    text = re.sub(r"\s+(?:or|and)\s+", ", ", after_commands(text))
    text = _without_outer_braces(re.sub(r"\s+", " ", text).rstrip(".,;: ").strip().removeprefix("=").strip())
    if not any(bracket in text for bracket in ("(", "[", "\\{")):
        text = PLAIN_THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
        text = SPACED_THOUSANDS.sub(lambda match: match[0].replace(" ", ""), text)
    return text.replace(";", ",")


def comparison_key(text: str) -> str:
    """The normalised text without the spaces that mean nothing; one between digits stays (1 4/5 is not 14/5)."""
    return re.sub(r"\s+(?!(?<=\d\s)\d)", "", text)


def split_items(text: str) -> list[str]:
    """Cut at commas and semicolons outside of every bracket; empty parts are dropped."""
    items: list[str] = []
    depth, start, position = 0, 0, 0
    while position < len(text):
        char = text[position]
        if char == "\\":
            if text.startswith((r"\begin", r"\{"), position):
                depth += 1
            elif text.startswith((r"\end", r"\}"), position):
                depth -= 1
            position += 2
            continue
        if char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char in ",;" and depth == 0:
            items.append(text[start:position].strip())
            start = position + 1
        position += 1
    items.append(text[start:].strip())
    return [item for item in items if item]


def peel(text: str) -> Item:
    """Take a name and '=' off the front ("Area = 5"), and a percent sign or unit ("15 cm^2", "20 miles", "3 red apples") off the end.

    A word is a unit if it stands in UNIT_NAMES or has four letters or more and is no function name; shorter ones are variables.
    """
    text = re.sub(r"^[A-Za-z][A-Za-z ]{3,40}=\s*(?=.)", "", text) if not MATH_RUN.match(text) else text
    if text.endswith("%"):
        return Item(text.removesuffix("%").strip(), True, "")
    if scale := TEMPERATURE.search(text):
        return Item(text[: scale.start()].strip(), False, f"°{scale[1]}")
    power = re.search(r"\s?\^\s?(?:([23])|\{\s?([23])\s?\})$", text)
    body = text[: power.start()] if power else text
    core = body.rstrip(LETTERS + " ./")
    tail = body[len(core) :]
    if core.endswith("\\"):  # the letters begin with the name of a command: 8\pi cm
        name = tail[: len(tail) - len(tail.lstrip(LETTERS))]
        core, tail = core + name, tail[len(name) :]
    words = [word.strip(".") for word in re.findall(r"[A-Za-z.]+|/", tail)]
    if words and not tail[0].isspace() and not _is_unit_word(words[0]):  # 3x cm: the x belongs to the value
        attached = tail[: len(tail) - len(tail.lstrip(LETTERS))]
        core, words = core + attached, words[1:]
        if len(attached) == len(core) > 1 or core in ("a", "A"):  # "an ellipse" is no number of ellipses
            return Item(text, False, "")
    if not words or not core or core[-1] in "=<>+-*/^_\\,({[" or not _is_unit_word(words[0]):
        return Item(text, False, "")
    exponent = (power[1] or power[2]) if power else ""
    while words[:1] and words[0].lower() in UNIT_QUALIFIERS:
        exponent, words = UNIT_QUALIFIERS[words[0].lower()], words[1:]
    unit = _unit_name(words)
    return Item(core.strip(), False, f"{unit}^{exponent}" if unit and exponent else unit)


def is_wordy(text: str) -> bool:
    """Whether the text holds a word (four letters or more, no function name): then it is compared as text, not as a product of letters."""
    without_commands = re.sub(r"\\(?:begin|end)\s*\{[A-Za-z]+\}|\\[A-Za-z]+", " ", text)
    return any(
        run.lower() in SHORT_WORDS or (len(run) >= 4 and not MATH_RUN.fullmatch(run)) for run in re.findall(r"[A-Za-z]+", without_commands)
    )


def folded(text: str) -> str:
    """Text without case, spaces, punctuation and a leading article: "The x-axis." == "x axis"; operators and decimal points stay."""
    text = re.sub(r"^(?:an?|the) ", "", text.casefold().strip())
    text = re.sub(r"(?<=[a-z])-(?=[a-z])|[\s\"'`,;:?()]", "", text)
    text = re.sub(r"\.(?!\d)", "", text)
    return SAME_WORDS.get(text, text)


def _without_outer_braces(text: str) -> str:
    """{4210_{5}} -> 4210_{5}, but {1}{2} as it is: the first brace must be closed by the last."""
    for _ in range(4):
        if not (text.startswith("{") and text.endswith("}")):
            return text
        depth = 0
        for position, char in enumerate(text):
            depth += (char == "{") - (char == "}")
            if depth == 0 and position < len(text) - 1:
                return text
        if depth != 0 or text.endswith("\\}"):
            return text
        text = text[1:-1].strip()
    return text


def _unit_name(words: list[str]) -> str:
    """The canonical name of one unit, or of a quotient of two ("mile/hour"); "" where one is not known."""
    parts = " ".join(words).replace("/", " per ").split(" per ")
    names = [UNIT_NAMES.get(part.strip().lower(), "") for part in parts]
    return "" if "" in names or len(names) > 2 else COMPOUNDS.get("/".join(names), "/".join(names))


def _is_unit_word(word: str) -> bool:
    lowered = word.lower()
    return lowered in UNIT_NAMES or lowered in UNIT_QUALIFIERS or (len(word) >= 4 and not MATH_RUN.fullmatch(word))


def _spell_command(match: re.Match[str]) -> str:
    name = match[1]
    if name in DROPPED:
        return ""
    if name in SPACES:
        return " "
    if name in WRAPPERS:
        return r"\text"
    if name in ("[", "]", "(", ")"):
        return " "
    return RENAMED.get(name, match[0])


def _unwrap(match: re.Match[str]) -> str:
    content = match[1].strip()
    if content in LONE_UNITS or re.fullmatch(r"[a-zA-Z]{1,3}\s?/\s?[a-zA-Z]{1,3}", content):  # m, km/h
        names = [LONE_UNITS.get(part.strip(), part.strip()) for part in content.split("/")]
        return f" {' per '.join(names)} " if match[1][:1].isspace() or len(names) > 1 else f" {content} "
    return f" {match[1]} " if match[1][:1].isspace() or len(content) > 1 else f" {content} "


def _repeating_as_fraction(match: re.Match[str]) -> str:
    whole, fixed, repeated = match[1], match[2], match[3] or match[4]
    numerator = int(whole + fixed + repeated) - int((whole + fixed) or "0")
    denominator = (10 ** len(repeated) - 1) * 10 ** len(fixed)
    return rf"(\frac{{{numerator}}}{{{denominator}}})"
