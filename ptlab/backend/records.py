"""What the backend keeps of its clients while the process lives: sessions and trainable models."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ptlab.backend.parking import ReplayCost
from ptlab.backend.sequencer import Sequencer
from ptlab.backend.served import ServedModel
from ptlab.engines.protocols import AdapterRef
from ptlab.errors import InvalidRequestError
from ptlab.types import AdamParams, Datum, EncodedTextChunk, LoraConfig

LOCAL_OWNER = "local"
"""Who owns what is made without an API key."""


@dataclass(slots=True)
class Session:
    """A client's connection: what it made lives until it finishes."""

    session_id: str
    ordinal: int = 0
    """1, 2, 3 ... in the order of creation, over all processes with the same data directory."""
    owner: str = LOCAL_OWNER
    user_metadata: dict[str, str] | None = None
    display_name: str | None = None
    project_id: str | None = None
    created: float = field(default_factory=time.time)
    last_seen: float = field(default_factory=time.time)
    model_ids: list[str] = field(default_factory=list)
    finished: str | None = None


@dataclass(slots=True)
class Model:
    """A trainable adapter. `served` is set once its creation (seq_id 0) has succeeded, and None while it is parked on disk."""

    model_id: str
    base_model: str
    lora: LoraConfig
    owner: str = LOCAL_OWNER
    sequencer: Sequencer = field(default_factory=Sequencer)
    served: ServedModel | None = None
    failure: Exception | None = None
    created: asyncio.Event = field(default_factory=asyncio.Event)  # set when creation has ended, well or not
    step: int = 0  # optimizer steps behind the weights
    held: AdapterRef | None = None  # the newest named sampler weights, kept live until the next: its sampling client comes at once
    restored: bool = False  # made by an earlier process
    last_used: float = field(default_factory=time.monotonic)
    replay_cost: ReplayCost = field(default_factory=ReplayCost)

    @property
    def parked(self) -> bool:
        return self.served is None and self.failure is None and self.created.is_set()


def digest(data: Sequence[Datum]) -> str:
    """Content of a batch in a few characters, to tell a repeated request from another one under the same seq_id."""
    digest = hashlib.blake2b(digest_size=16)
    for datum in data:
        for chunk in datum.model_input.chunks:
            digest.update(np.asarray(chunk.tokens).tobytes() if isinstance(chunk, EncodedTextChunk) else repr(chunk).encode())
        for key in sorted(datum.loss_fn_inputs):
            digest.update(key.encode() + datum.loss_fn_inputs[key].to_numpy().tobytes())
    return digest.hexdigest()


def check_adam(adam: AdamParams) -> None:
    """Raises: InvalidRequestError naming every field that AdamW cannot work with."""
    problems = [
        f"{name} is {value}; it must be {needed}"
        for name, value, ok, needed in [
            ("learning_rate", adam.learning_rate, 0 <= adam.learning_rate < float("inf"), "a finite number >= 0"),
            ("beta1", adam.beta1, 0 <= adam.beta1 < 1, "in [0, 1)"),
            ("beta2", adam.beta2, 0 <= adam.beta2 < 1, "in [0, 1)"),
            ("eps", adam.eps, 0 <= adam.eps < float("inf"), "a finite number >= 0"),
            ("weight_decay", adam.weight_decay, 0 <= adam.weight_decay < float("inf"), "a finite number >= 0"),
            ("grad_clip_norm", adam.grad_clip_norm, 0 <= adam.grad_clip_norm < float("inf"), "a finite number >= 0 (0 = off)"),
        ]
        if not ok
    ]
    if problems:
        raise InvalidRequestError("optim_step: " + "; ".join(problems))
