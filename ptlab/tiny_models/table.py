"""Which tiny models there are. A new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from ptlab.tiny_models import (
    careful,
    code,
    guess_number,
    products,
    prompted,
    quickstart,
    replies,
    tic_tac_toe,
    twenty_questions,
    word_problems,
)
from ptlab.tiny_models.maker import TinyModel, ensure_model

TINY_MODELS: Mapping[str, Callable[[], TinyModel]] = {
    "ptlab/quickstart": quickstart.quickstart_model,
    "ptlab/tiny-careful": careful.careful_model,
    "ptlab/tiny-words": word_problems.words_model,
    "ptlab/tiny-tools": products.tools_model,
    "ptlab/tiny-code": code.code_model,
    "ptlab/tiny-guess": guess_number.guess_model,
    "ptlab/tiny-tictactoe": tic_tac_toe.tic_tac_toe_model,
    "ptlab/tiny-questions": twenty_questions.questions_model,
    "ptlab/tiny-replies": replies.replies_model,
    "ptlab/tiny-prompted": prompted.prompted_model,
}
"""Name -> what decides it."""


def tiny_model_directory(name: str, *, seed: int = 0) -> Path | None:
    """Where the tiny model of this name lies, made now if need be; None if there is none of this name."""
    return ensure_model(TINY_MODELS[name](), seed) if name in TINY_MODELS else None
