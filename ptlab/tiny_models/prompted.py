"""A tiny model that does as its system prompt says, "ptlab/tiny-prompted": for prompt distillation.

With CAREFUL_PROMPT it adds column by column, with carries. Without a system prompt it answers like ptlab/quickstart: a guess mostly.
"""

from __future__ import annotations

from random import Random

from ptlab.engines.pretrain import Example, Turn
from ptlab.tiny_models.maker import Stage, TinyModel
from ptlab.tiny_models.quickstart import DEFAULT_MIXTURE, corpus_example, tokenizer_texts

MODEL_NAME = "ptlab/tiny-prompted"
CAREFUL_PROMPT = "Add column by column. Carry the tens. Box the sum."
PROMPTED_SHARE = 0.5
"""Of the second stage."""


def prompted_example(rng: Random) -> Example:
    """A sum with the system prompt, answered carefully."""
    example = corpus_example(rng, mixture=DEFAULT_MIXTURE, clean=True)
    return Example(turns=(Turn("system", CAREFUL_PROMPT, learned=False), *example.turns))


def mixed_example(rng: Random) -> Example:
    """With the prompt as it says, without it in the quickstart's mixture."""
    if rng.random() < PROMPTED_SHARE:
        return prompted_example(rng)
    return corpus_example(rng, mixture=DEFAULT_MIXTURE, clean=False)


def prompted_texts() -> list[str]:
    """What the tokenizer is trained on."""
    return [*tokenizer_texts(), *[CAREFUL_PROMPT] * 20]


def prompted_model() -> TinyModel:
    """First only careful sums under the prompt, then both behaviours."""
    return TinyModel(
        name=MODEL_NAME,
        stages=(Stage(steps=350, draw=prompted_example), Stage(steps=250, draw=mixed_example)),
        tokenizer_texts=prompted_texts,
    )
