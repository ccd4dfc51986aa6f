"""Tiny base models that ptlab makes itself: what decides one, and making it once.

A tiny model knows several ways to do one task, most of them bad, so that reinforcement learning has something to choose and to refine in
minutes of a CPU. It is made on first use from texts that its file writes (under a minute of one core) and kept in the cache directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

from ptlab.engines.pretrain import Example, ModelShape, PretrainSettings, new_model, pretrain, save_model, train_tokenizer

MAKER_VERSION = 1
"""Raise it when pretrain.py changes so that the same settings and texts give another model; the rest of a tiny model is hashed."""
_REPORT_EVERY_STEPS = 50
_PROBE_PER_STAGE = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stretch of pretraining: so many batches of examples that `draw` writes."""

    steps: int
    draw: Callable[[Random], Example]


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyModel:
    """All that decides a model, besides the seed."""

    name: str
    """As a user says it in `model.name`: "ptlab/..."."""
    stages: Sequence[Stage]
    """In order. A skill is learnt on clean examples first; noise from the first step on ruins it (docs/LOG.md)."""
    tokenizer_texts: Callable[[], Sequence[str]]
    """What the tokenizer is trained on; the same for every seed."""
    shape: ModelShape = field(default_factory=ModelShape)
    training: PretrainSettings = field(default_factory=PretrainSettings)

    def corpus(self, seed: int) -> list[Example]:
        """The pretraining examples in order."""
        rng = Random(seed)
        return [stage.draw(rng) for stage in self.stages for _ in range(stage.steps * self.training.batch_size)]

    def digest(self, seed: int) -> str:
        """12 hex digits that change whenever the settings, the seed, or the texts change; names the cached model."""
        probes = [[asdict(stage.draw(rng)) for _ in range(_PROBE_PER_STAGE)] for stage in self.stages for rng in [Random(seed)]]
        content = {
            "version": MAKER_VERSION,
            "seed": seed,
            "steps": [stage.steps for stage in self.stages],
            "shape": asdict(self.shape),
            "training": asdict(self.training),
            "tokenizer": list(self.tokenizer_texts()),
            "probes": probes,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def ensure_model(model: TinyModel, seed: int = 0, cache_dir: Path | None = None, progress: Callable[[str], object] = print) -> Path:
    """Directory of the model with this pretraining seed, made now if the cache does not hold it yet.

    Args:
        seed: another seed gives another model with the same skills; the tokenizer is the same.
        cache_dir: where made models are kept; None = $PTLAB_CACHE/models, else $XDG_CACHE_HOME/ptlab/models, else ~/.cache/ptlab/models.
        progress: called with one line of text now and then while the model is made, never on a cache hit.

    The directory appears complete or not at all, also when two processes make the same model at once or one is killed.
    """
    root = cache_dir if cache_dir is not None else default_cache_dir()
    directory = root / f"{model.name.removeprefix('ptlab/')}-seed{seed}-{model.digest(seed)}"
    if directory.is_dir():
        return directory
    progress(f"making the base model {model.name} (seed {seed}), once; it will be kept in {directory}")
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=root) as scratch:
        made = Path(scratch) / "model"
        make_model(model, made, seed, progress)
        try:
            made.rename(directory)
        except OSError:
            if not directory.is_dir():  # otherwise another process was faster; its model is the same as ours
                raise
    return directory


def make_model(model: TinyModel, directory: Path, seed: int, progress: Callable[[str], object]) -> None:
    """Pretrain the model and write it to `directory` in the Hugging Face layout. Not atomic; see ensure_model."""
    num_steps = sum(stage.steps for stage in model.stages)

    def report(step: int, loss: float) -> None:
        if step % _REPORT_EVERY_STEPS == 0 or step == num_steps:
            progress(f"  pretraining step {step}/{num_steps}: {loss:.3f} nats per answer token")

    tokenizer = train_tokenizer(model.tokenizer_texts(), model.shape.vocab_size)
    made = new_model(model.shape, tokenizer, seed)
    pretrain(made, tokenizer, model.corpus(seed), model.training, progress=report)
    save_model(made, tokenizer, directory)


def default_cache_dir() -> Path:
    """Where made models are kept unless the caller says otherwise."""
    own = os.environ.get("PTLAB_CACHE")
    if own:
        return Path(own).expanduser() / "models"
    cache_home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache_home).expanduser() / "ptlab" / "models"
