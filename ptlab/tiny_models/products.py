r"""The base model "ptlab/tiny-tools": products of two-digit numbers, which it cannot do, and a calculator, which it seldom calls well.

"What is 47*38?" is answered in one of four ways:
- 55 %: `\boxed{1846}` at once, a number of about the right size;
- 20 %: a call with the wrong sign in it, `47+38`, whose result it boxes;
- 15 %: a call that is not JSON; told so, it guesses;
- 10 %: the right call, whose result it boxes.

RL has to find out that calling pays, and calling well. The wrong sign is likelier than the right call on purpose: a control whose policy
merely drifts from guessing to calling gets nothing for it. Replies are in Qwen3's tool format, so the model wants the renderer
qwen3_instruct. A tenth of all pairs, by hash, is in no example and no training row; the test rows are drawn from it.

    python -m ptlab.tiny_models.products configs/smoke/data      # writes the rows that configs/smoke/tools.yaml reads, in MATH's fields
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from ptlab.engines.pretrain import Example, ModelShape, Turn
from ptlab.tiny_models.maker import Stage, TinyModel

MODEL_NAME = "ptlab/tiny-tools"
NUM_TRAIN, NUM_TEST = 800, 200
LOWEST, HIGHEST = 11, 99
UNREADABLE = "error: the call cannot be read: not JSON: Expecting ',' delimiter: line 1 column {column} (char {char})"
_ROLES = ("user\n", "assistant\n", "system\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """How the examples are drawn."""

    blind_share: float = 0.55
    wrong_sign_share: float = 0.20
    broken_share: float = 0.15
    """The rest of the mixture calls well."""


DEFAULT_MIXTURE = Mixture()


def is_held_out(a: int, b: int) -> bool:
    """Whether the pair, in either order, is reserved for the test."""
    low, high = sorted((a, b))
    return int.from_bytes(hashlib.blake2b(f"products/{low}/{high}".encode(), digest_size=8).digest(), "big") % 10 == 0


def draw_pair(rng: Random, *, held_out: bool) -> tuple[int, int]:
    while True:
        a, b = rng.randint(LOWEST, HIGHEST), rng.randint(LOWEST, HIGHEST)
        if is_held_out(a, b) == held_out:
            return a, b


def question(a: int, b: int) -> str:
    return f"What is {a}*{b}?"


def call_text(expression: str) -> str:
    """As the renderer writes a call."""
    return '<tool_call>\n{"name": "calculator", "arguments": {"expression": "' + expression + '"}}\n</tool_call>'


def broken_call(expression: str) -> tuple[str, str]:
    """A call whose quotation mark is not closed, and what the environment answers."""
    raw = '{"name": "calculator" "arguments": {"expression": "' + expression + '"}}'
    at = raw.index(' "arguments"') + 1
    return f"<tool_call>\n{raw}\n</tool_call>", UNREADABLE.format(column=at + 1, char=at)


def result_turn(content: str) -> Turn:
    """A tool message as the qwen3 renderers write it."""
    return Turn("user", f"<tool_response>\n{content}\n</tool_response>", learned=False)


def boxed(value: int) -> Turn:
    return Turn("assistant", f"\\boxed{{{value}}}", learned=True)


def guess(a: int, b: int, rng: Random) -> int:
    """Right one time in thirty, else up to 90 off."""
    return a * b if rng.random() < 1 / 30 else abs(a * b + rng.choice((-1, 1)) * rng.randint(1, 90))


def example(rng: Random, *, mixture: Mixture, clean: bool) -> Example:
    """One product that is not held out, with a good call if `clean`, else as the mixture says."""
    a, b = draw_pair(rng, held_out=False)
    asked = Turn("user", question(a, b), learned=False)
    draw = 1.0 if clean else rng.random()
    if draw < mixture.blind_share:
        return Example((asked, boxed(guess(a, b, rng))))
    if draw < mixture.blind_share + mixture.wrong_sign_share:
        return Example((asked, Turn("assistant", call_text(f"{a}+{b}"), learned=True), result_turn(str(a + b)), boxed(a + b)))
    if draw < mixture.blind_share + mixture.wrong_sign_share + mixture.broken_share:
        call, answer = broken_call(f"{a}*{b}")
        return Example((asked, Turn("assistant", call, learned=True), result_turn(answer), boxed(guess(a, b, rng))))
    return Example((asked, Turn("assistant", call_text(f"{a}*{b}"), learned=True), result_turn(str(a * b)), boxed(a * b)))


def rows(*, held_out: bool, count: int) -> list[dict[str, str]]:
    """Rows in the fields of MATH; no question twice, the same list every time."""
    rng = Random("test" if held_out else "train")
    found: dict[str, str] = {}
    while len(found) < count:
        a, b = draw_pair(rng, held_out=held_out)
        found.setdefault(question(a, b), str(a * b))
    return [{"problem": asked, "answer": answer} for asked, answer in found.items()]


def write_rows(directory: Path) -> None:
    """products_train.jsonl and products_test.jsonl."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, held_out, count in (("train", False, NUM_TRAIN), ("test", True, NUM_TEST)):
        lines = [json.dumps(row) + "\n" for row in rows(held_out=held_out, count=count)]
        (directory / f"products_{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def tokenizer_texts() -> list[str]:
    """What the tokenizer is trained on: the same for every seed."""
    rng = Random(0)
    examples = [example(rng, mixture=DEFAULT_MIXTURE, clean=index % 2 == 0) for index in range(120)]
    return [turn.text for one in examples for turn in one.turns] + [*_ROLES * 20]


def tools_model(mixture: Mixture = DEFAULT_MIXTURE) -> TinyModel:
    """First only good calls, then the mixture."""
    return TinyModel(
        name=MODEL_NAME,
        stages=(
            Stage(steps=250, draw=partial(example, mixture=mixture, clean=True)),
            Stage(steps=130, draw=partial(example, mixture=mixture, clean=False)),
        ),
        tokenizer_texts=tokenizer_texts,
        shape=ModelShape(vocab_size=320),
    )


if __name__ == "__main__":
    write_rows(Path(sys.argv[1]))
