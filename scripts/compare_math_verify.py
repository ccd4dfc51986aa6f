r"""Compare ptlab's grader with math-verify, on the graded pairs of the tests and on MATH-500's gold answers in 20 spellings.

    python -m venv /tmp/mv && /tmp/mv/bin/pip install 'math-verify[antlr4_13_2]'
    python scripts/compare_math_verify.py --python /tmp/mv/bin/python

math-verify runs in a Python of its own, so that nothing of it is installed beside ptlab. Prints the share of equal verdicts and every pair
on which the two differ; docs/recipes/math.md says why they do.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path

ROOT = Path(__file__).parents[1]
MATH_500 = ROOT.parent / "shared" / "data" / "math" / "math500_test.jsonl"

WORKER = r"""
import json, logging, sys
logging.disable(logging.CRITICAL)
from math_verify import parse, verify
def read(text):
    return parse("\\boxed{" + text + "}")
for line in sys.stdin:
    given, truth = json.loads(line)
    try:
        verdict = bool(verify(read(truth), read(given)))
    except Exception:
        verdict = False
    print(json.dumps(verdict), flush=True)
"""


def _decimal(match: re.Match[str]) -> str:
    value = Fraction(int(match[1]), int(match[2])) if int(match[2]) else None
    if value is None:
        return match[0]
    places = next((n for n in range(1, 7) if (value * 10**n).denominator == 1), None)
    return match[0] if places is None else f"{float(value):.{places}f}"


def _fraction(match: re.Match[str]) -> str:
    return rf"\frac{{{3 * int(match[1])}}}{{3}}"


def _thousands(match: re.Match[str]) -> str:
    return f"{int(match[0]):,}".replace(",", "{,}")


SIMPLE = re.compile(r"[-\d.]+|\\frac\{\d+\}\{\d+\}")
FRACTION = r"\\d?frac\{(\d+)\}\{(\d+)\}"

VARIANTS: Mapping[str, Callable[[str], str]] = {
    "dfrac": lambda a: a.replace(r"\frac", r"\dfrac"),
    "tfrac": lambda a: re.sub(r"\\d?frac", r"\\tfrac", a),
    "no spaces": lambda a: re.sub(r"(?<![A-Za-z]) | (?![A-Za-z])", "", a) if r"\text" not in a else a,
    "more spaces": lambda a: "  " + re.sub(r"([+=]|,(?![\d\\ ]))", r" \1 ", a) + " ",
    "no left and right": lambda a: a.replace(r"\left", "").replace(r"\right", ""),
    "left and right": lambda a: re.sub(r"([(\[])(.*)([)\]])", r"\\left\1\2\\right\3", a.replace(r"\left", "").replace(r"\right", "")),
    "full stop": lambda a: a + ".",
    "dollar signs": lambda a: f"${a}$",
    "brackets of display": lambda a: rf"\[ {a} \]",
    "text around": lambda a: rf"\text{{{a}}}" if re.fullmatch(r"[-\w. ]+", a) else a,
    "mathrm for text": lambda a: a.replace(r"\text", r"\mathrm").replace(r"\mbox", r"\mathrm"),
    "textbf for text": lambda a: a.replace(r"\text", r"\textbf"),
    "a unit": lambda a: a + r"\text{ units}" if SIMPLE.fullmatch(a) else a,
    "a counted noun": lambda a: a + " apples" if SIMPLE.fullmatch(a) else a,
    "decimals": lambda a: re.sub(r"(?<![\d}])(?<!\d )" + FRACTION + r"(?![\d\\({])", _decimal, a),
    "slash": lambda a: re.sub(r"^(-?)" + FRACTION + "$", r"\1\2/\3", a),
    "expanded fraction": lambda a: re.sub(r"^(\d{1,9})$", _fraction, a),
    "thousands": lambda a: re.sub(r"^\d{4,9}$", _thousands, a),
    "named": lambda a: "x = " + a if "=" not in a and "," not in a and r"\text" not in a else a,
    "thin spaces": lambda a: re.sub(r"([+-]) ", r"\1\\, ", a),
    "displaystyle": lambda a: r"\displaystyle " + a,
    "unicode": lambda a: a.replace(r"\pi", "π").replace(r"\infty", "∞").replace("^\\circ", "°").replace("-", "\u2212"),
}
"""Name -> another spelling of the same answer; an answer the spelling does not apply to stays as it is."""


def math_verify_verdicts(pairs: list[tuple[str, str]], python: str) -> list[bool]:
    """Verdicts of math-verify on (given, truth) pairs, in the Python at `python`."""
    lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
    done = subprocess.run([python, "-c", WORKER], input=lines, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def compare(title: str, pairs: list[tuple[str, str]], wanted: list[bool], python: str, show: int) -> None:
    from ptlab.rewards.math_answer import grade_answer

    ours, theirs = [grade_answer(given, truth) for given, truth in pairs], math_verify_verdicts(pairs, python)
    differ = [(pair, want, o, t) for pair, want, o, t in zip(pairs, wanted, ours, theirs, strict=True) if o != t]
    right = [sum(verdict == want for verdict, want in zip(side, wanted, strict=True)) for side in (ours, theirs)]
    share = 1 - len(differ) / len(pairs)
    print(f"{title}: {len(pairs)} pairs, agreement {share:.1%}; as they should be: ptlab {right[0]}, math-verify {right[1]}")
    for (given, truth), want, _, theirs_says in differ[:show]:
        verdict, comment = "right" if theirs_says else "wrong", "as wanted" if want == theirs_says else "not as wanted"
        print(f"  math-verify: {verdict} ({comment}): {given!r} ~ {truth!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="interpreter with math-verify installed")
    parser.add_argument("--show", type=int, default=40, help="differing pairs to print per part")
    args = parser.parse_args()
    for name in ("math_pairs", "graded_pairs"):
        rows = [json.loads(line) for line in (ROOT / f"tests/rewards/{name}.jsonl").read_text(encoding="utf-8").split("\n") if line]
        compare(name, [(row["given"], row["truth"]) for row in rows], [row["right"] for row in rows], args.python, args.show)
    golds = [json.loads(line)["answer"] for line in MATH_500.read_text(encoding="utf-8").split("\n") if line]
    others = [(other, gold) for gold, other in itertools.pairwise(golds) if other != gold]
    compare("MATH-500, the next problem's answer", others, [False] * len(others), args.python, args.show)
    for variant, spell in VARIANTS.items():
        pairs = [(spell(gold), gold) for gold in golds if spell(gold) != gold]
        compare(f"MATH-500, {variant}", pairs, [True] * len(pairs), args.python, min(args.show, 3))


if __name__ == "__main__":
    main()
