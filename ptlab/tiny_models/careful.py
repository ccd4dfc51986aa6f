"""The smoke run's teacher, "ptlab/tiny-careful": the quickstart's model after its first stage, which has only ever added with carries.

It shares tokenizer and shape with ptlab/quickstart, so it can score that model's tokens (on-policy distillation).
"""

from __future__ import annotations

from functools import partial

from ptlab.tiny_models.maker import Stage, TinyModel
from ptlab.tiny_models.quickstart import DEFAULT_MIXTURE, corpus_example, tokenizer_texts

MODEL_NAME = "ptlab/tiny-careful"


def careful_model() -> TinyModel:
    """Right column sums and nothing else."""
    stage = Stage(steps=500, draw=partial(corpus_example, mixture=DEFAULT_MIXTURE, clean=True))
    return TinyModel(name=MODEL_NAME, stages=(stage,), tokenizer_texts=tokenizer_texts)
