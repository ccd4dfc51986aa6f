"""The quickstart's base model "ptlab/quickstart": a tiny model that can add in three ways, most of them bad.

Its answers to "What is 347+586?" are mixed on purpose:
- 55 %: a number at once, right one time in ten;
- 30 %: column by column, forgetting the carries;
- 15 %: column by column with carries, each column wrong with probability 0.04.

RL then has to find the good way and to stop slipping. It chooses among skills the base has; it teaches no arithmetic.

ptlab makes the model itself on first use (about three quarters of a minute of one CPU core) and keeps it in its cache directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Literal

from ptlab.engines.pretrain import Example, ModelShape, PretrainSettings, new_model, pretrain, save_model, train_tokenizer
from ptlab.envs.addition import HIGHEST, LOWEST, QUESTION_TEMPLATES, is_held_out, question_text

MODEL_NAME = "ptlab/quickstart"

RECIPE_VERSION = 1
"""Raise it when pretrain.py changes so that the same settings and texts give another model; the rest of the recipe is hashed."""

Style = Literal["blind", "forgetful", "careful"]

_COLUMN_NAMES = ("Ones", "Tens", "Hundreds")
_ROLES = ("user\n", "assistant\n", "system\n")
_PROSE = "Please reason step by step, and put your final answer within \\boxed{}."
_REPORT_EVERY_STEPS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class QuickstartRecipe:
    """All that decides the model, besides the seed."""

    clean_steps: int = 400
    """First only right column sums. Noise from the first step on ruins the skill: greedy stalls at .55 and RL cannot pass it."""
    mixture_steps: int = 200
    blind_share: float = 0.55
    forgetful_share: float = 0.30
    """The rest of the mixture is careful."""
    blind_right: float = 0.10
    """How often the number given at once is the right one."""
    blind_error: int = 99
    """A wrong number given at once lies at most this far from the right one."""
    column_slip: float = 0.04
    """Probability that a column of a careful answer is one too high or too low."""
    shape: ModelShape = field(default_factory=ModelShape)
    training: PretrainSettings = field(default_factory=PretrainSettings)


def ensure_quickstart_model(seed: int = 0, cache_dir: Path | None = None, progress: Callable[[str], object] = print) -> Path:
    """Directory of the base model with this pretraining seed, made now if the cache does not hold it yet.

    Args:
        seed: another seed gives another model with the same skills; the tokenizer is the same.
        cache_dir: where made models are kept; None = $PTLAB_CACHE/models, else $XDG_CACHE_HOME/ptlab/models, else ~/.cache/ptlab/models.
        progress: called with one line of text now and then while the model is made, never on a cache hit.

    The directory appears complete or not at all, also when two processes make the same model at once or one is killed.
    """
    root = cache_dir if cache_dir is not None else default_cache_dir()
    recipe = QuickstartRecipe()
    directory = root / f"quickstart-seed{seed}-{recipe_digest(recipe, seed)}"
    if directory.is_dir():
        return directory
    progress(f"making the base model {MODEL_NAME} (seed {seed}), once; it will be kept in {directory}")
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=root) as scratch:
        made = Path(scratch) / "model"
        make_quickstart_model(made, seed, recipe, progress)
        try:
            made.rename(directory)
        except OSError:
            if not directory.is_dir():  # otherwise another process was faster; its model is the same as ours
                raise
    return directory


def make_quickstart_model(directory: Path, seed: int, recipe: QuickstartRecipe, progress: Callable[[str], object]) -> None:
    """Pretrain the model and write it to `directory` in the Hugging Face layout. Not atomic; see ensure_quickstart_model."""
    num_steps = recipe.clean_steps + recipe.mixture_steps

    def report(step: int, loss: float) -> None:
        if step % _REPORT_EVERY_STEPS == 0 or step == num_steps:
            progress(f"  pretraining step {step}/{num_steps}: {loss:.3f} nats per answer token")

    tokenizer = train_tokenizer(tokenizer_texts(), recipe.shape.vocab_size)
    model = new_model(recipe.shape, tokenizer, seed)
    pretrain(model, tokenizer, corpus(recipe, seed), recipe.training, progress=report)
    save_model(model, tokenizer, directory)


def default_cache_dir() -> Path:
    """Where made models are kept unless the caller says otherwise."""
    own = os.environ.get("PTLAB_CACHE")
    if own:
        return Path(own).expanduser() / "models"
    cache_home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache_home).expanduser() / "ptlab" / "models"


def recipe_digest(recipe: QuickstartRecipe, seed: int) -> str:
    """12 hex digits that change whenever the settings, the seed, or the texts change; names the cached model."""
    rng = Random(seed)
    probe = [corpus_example(recipe, rng, clean=index % 4 == 0) for index in range(400)]
    content = {
        "version": RECIPE_VERSION,
        "seed": seed,
        "recipe": asdict(recipe),
        "tokenizer": tokenizer_texts(),
        "probe": [asdict(example) for example in probe],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def corpus(recipe: QuickstartRecipe, seed: int) -> list[Example]:
    """The pretraining examples in order: the clean phase, then the mixture. Never a held-out pair."""
    rng = Random(seed)
    num_clean = recipe.clean_steps * recipe.training.batch_size
    num_mixture = recipe.mixture_steps * recipe.training.batch_size
    return [corpus_example(recipe, rng, clean=index < num_clean) for index in range(num_clean + num_mixture)]


def corpus_example(recipe: QuickstartRecipe, rng: Random, *, clean: bool) -> Example:
    """One question that is not held out, and its answer: without slips and careful if `clean`, else in the mixture's style."""
    a, b = rng.randint(LOWEST, HIGHEST), rng.randint(LOWEST, HIGHEST)
    while is_held_out(a, b):
        a, b = rng.randint(LOWEST, HIGHEST), rng.randint(LOWEST, HIGHEST)
    question = question_text(a, b, rng.randrange(len(QUESTION_TEMPLATES)))
    if clean:
        return Example(question, careful_answer(a, b, rng, column_slip=0.0))
    match draw_style(recipe, rng):
        case "blind":
            return Example(question, blind_answer(a, b, rng, right=recipe.blind_right, max_error=recipe.blind_error))
        case "forgetful":
            return Example(question, forgetful_answer(a, b))
        case "careful":
            return Example(question, careful_answer(a, b, rng, column_slip=recipe.column_slip))


def draw_style(recipe: QuickstartRecipe, rng: Random) -> Style:
    """How the next answer of the mixture is given."""
    draw = rng.random()
    if draw < recipe.blind_share:
        return "blind"
    if draw < recipe.blind_share + recipe.forgetful_share:
        return "forgetful"
    return "careful"


def blind_answer(a: int, b: int, rng: Random, *, right: float, max_error: int) -> str:
    """`\\boxed{931}` at once: the sum with probability `right`, else a number 1 .. max_error above or below it."""
    if rng.random() < right:
        return f"\\boxed{{{a + b}}}"
    return f"\\boxed{{{a + b + rng.choice((-1, 1)) * rng.randint(1, max_error)}}}"


def forgetful_answer(a: int, b: int) -> str:
    """Column by column without carries: `Ones: 7+6=13. Tens: 4+8=12. Hundreds: 3+5=8. \\boxed{823}`."""
    columns = [x + y for x, y in zip(_digits(a), _digits(b), strict=True)]
    steps = [f"{name}: {x}+{y}={x + y}. " for name, x, y in zip(_COLUMN_NAMES, _digits(a), _digits(b), strict=True)]
    ones, tens, hundreds = columns
    return "".join(steps) + f"\\boxed{{{hundreds}{tens % 10}{ones % 10}}}"


def careful_answer(a: int, b: int, rng: Random, *, column_slip: float) -> str:
    """Column by column with carries: `Ones: 7+6=13. Tens: 4+8+1=13. Hundreds: 3+5+1=9. \\boxed{933}`.

    Each column is one too high or too low with probability `column_slip`; the rest follows from the wrong value.
    """
    steps: list[str] = []
    written = ""
    carry = 0
    for index, (x, y) in enumerate(zip(_digits(a), _digits(b), strict=True)):
        total = x + y + carry
        term = f"{x}+{y}+{carry}" if carry else f"{x}+{y}"
        if rng.random() < column_slip:
            total += rng.choice((-1, 1)) if total > 0 else 1
        steps.append(f"{_COLUMN_NAMES[index]}: {term}={total}. ")
        last = index == len(_COLUMN_NAMES) - 1
        written = (str(total) if last else str(total % 10)) + written
        carry = total // 10
    return "".join(steps) + f"\\boxed{{{written}}}"


def tokenizer_texts() -> list[str]:
    """What the tokenizer is trained on: the same for every seed and recipe, so that all base models share one vocabulary."""
    rng = Random(0)
    recipe = QuickstartRecipe()
    examples = [corpus_example(recipe, rng, clean=index % 2 == 0) for index in range(60)]
    return [text for example in examples for text in (example.question, example.answer)] + [*_ROLES * 20, _PROSE]


def _digits(number: int) -> tuple[int, int, int]:
    """Ones, tens, hundreds."""
    return number % 10, number // 10 % 10, number // 100
