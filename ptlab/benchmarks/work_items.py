"""What a trainer is timed on: seeded sequences, a random model and a random adapter, written once and read by every system.

A work item is one RL step's training batch: prompts, completions, one reward a sequence, and the sampler's log-probability of every
sampled token. The loss is importance_sampling as a plain sum, sum_t -exp(p_t - q_t) A_t, with A = reward minus the mean of its group.
The work items are those of the project's performance notes: 64 ragged sequences, prompts of 40-120 tokens, completions of 20-200.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ptlab.engines.lora import ADAPTER_FILE
from ptlab.engines.peft_trainer import PeftTrainer
from ptlab.engines.pretrain import ModelShape, new_model, save_model, train_tokenizer
from ptlab.losses import resolve_loss
from ptlab.tiny_models.quickstart import tokenizer_texts
from ptlab.types import Datum, LoraConfig, ModelInput, TensorData

TOKENIZER_SIZE = 320
"""The tokenizer only lets a directory load; the sequences are random ids of the whole vocabulary."""
LORA_RANK = 32
SAMPLER_NOISE = 0.1
"""Standard deviation in nats between what the sampler and the trainer think of a token; vLLM in bfloat16 shows about a tenth of it."""


def _qwen3(vocab_size: int, *, context: int = 512, hidden: int = 256, layers: int = 6, heads: int = 4) -> ModelShape:
    return ModelShape(
        vocab_size=vocab_size, hidden_size=hidden, intermediate_size=3 * hidden, num_layers=layers, num_heads=heads,
        num_kv_heads=heads // 2, head_dim=64, max_context_length=context,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One model and the sequences it trains on."""

    name: str
    about: str
    shape: ModelShape
    num_prompts: int = 8
    samples_per_prompt: int = 8
    group_size: int = 8
    """Sequences whose rewards are centred together; TRL needs at least two, also where every prompt is another."""
    prompt_tokens: tuple[int, int] = (40, 120)
    """Shortest and longest, both of them possible."""
    completion_tokens: tuple[int, int] = (20, 200)
    row_tokens: int | None = None
    """Every sequence has so many tokens: its completion is what the prompt leaves of them, and completion_tokens means nothing."""

    @property
    def num_sequences(self) -> int:
        return self.num_prompts * self.samples_per_prompt


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(name="small", about="4.7M body, vocabulary 4k, 8 prompts x 8", shape=_qwen3(4096)),
        Variant(
            name="unshared", about="4.7M body, vocabulary 4k, 64 different prompts", shape=_qwen3(4096),
            num_prompts=64, samples_per_prompt=1,
        ),
        Variant(name="vocab", about="4.7M body, vocabulary 33k, 8 prompts x 8", shape=_qwen3(32768)),
        Variant(name="medium", about="25M body, vocabulary 8k, 8 prompts x 8", shape=_qwen3(8192, hidden=512, layers=8, heads=8)),
        Variant(
            name="long", about="4.7M body, vocabulary 4k, 2 samples of 8k tokens below a prompt of 6k", shape=_qwen3(4096, context=8192),
            num_prompts=1, samples_per_prompt=2, group_size=2, prompt_tokens=(6144, 6144), completion_tokens=(1792, 2048),
        ),
        Variant(
            name="vocab150k", about="4.7M body, vocabulary 152k, 32 different sequences of 256 tokens", shape=_qwen3(151936),
            num_prompts=32, samples_per_prompt=1, prompt_tokens=(32, 128), row_tokens=256,
        ),
        Variant(
            name="tiny", about="seconds: only to see that everything runs",
            shape=ModelShape(vocab_size=512, hidden_size=64, intermediate_size=128, head_dim=16, max_context_length=64),
            num_prompts=2, samples_per_prompt=4, group_size=4, prompt_tokens=(12, 20), completion_tokens=(4, 16),
        ),
    )
}  # fmt: skip
"""`small`, `unshared`, `vocab`, `medium` and `long` are the comparison; `vocab150k` is there for its memory."""


@dataclass(frozen=True, slots=True)
class Sequences:
    """The batch of a work item; sequence after sequence, the samples of a prompt beside each other."""

    prompts: list[list[int]]
    completions: list[list[int]]
    rewards: list[float]
    group_size: int
    sampling_logprobs: list[list[float]] = field(default_factory=list)
    """One list a completion, nats; empty until a model has scored the completions."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences, a shared prompt counted once for every sample: what both systems are asked to train on."""
        return sum(map(len, self.prompts)) + sum(map(len, self.completions))

    @property
    def advantages(self) -> list[float]:
        """Reward minus the mean of the group, one a sequence."""
        rewards_GS = np.array(self.rewards).reshape(-1, self.group_size)
        centred: list[float] = (rewards_GS - rewards_GS.mean(axis=1, keepdims=True)).reshape(-1).tolist()
        return centred

    def datums(self) -> list[Datum]:
        """For the loss importance_sampling: position i predicts token i + 1, everything is 0.0 before the first sampled one."""
        return [
            _datum(prompt, completion, logprobs=np.array(logprobs), advantages=np.full(len(completion), advantage))
            for prompt, completion, logprobs, advantage in zip(
                self.prompts, self.completions, self.sampling_logprobs, self.advantages, strict=True
            )
        ]


def _datum(prompt: list[int], completion: list[int], **sampled: np.ndarray[Any, Any]) -> Datum:
    tokens = prompt + completion
    blank = np.zeros(len(prompt) - 1, dtype=np.float32)
    arrays = {name: np.concatenate([blank, values]).astype(np.float32) for name, values in sampled.items()}
    inputs = {"target_tokens": np.array(tokens[1:])} | arrays
    return Datum(
        model_input=ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={name: TensorData.from_numpy(values) for name, values in inputs.items()},
    )


def make_sequences(variant: Variant, seed: int = 0) -> Sequences:
    """Random tokens, lengths drawn uniformly, rewards normal; no log-probabilities yet. The same for a variant and seed, everywhere."""
    rng = np.random.default_rng(seed)

    def tokens(bounds: tuple[int, int]) -> list[int]:
        drawn: list[int] = rng.integers(3, variant.shape.vocab_size, rng.integers(bounds[0], bounds[1] + 1)).tolist()
        return drawn

    prompts = [prompt for _ in range(variant.num_prompts) for prompt in [tokens(variant.prompt_tokens)] * variant.samples_per_prompt]
    lengths = [variant.completion_tokens if variant.row_tokens is None else (variant.row_tokens - len(p),) * 2 for p in prompts]
    completions = [tokens(bounds) for bounds in lengths]
    return Sequences(prompts, completions, rng.normal(size=len(prompts)).tolist(), variant.group_size)


@dataclass(frozen=True, slots=True)
class WorkItem:
    """Directories and the file that a worker opens; nothing in them changes."""

    model: Path
    adapter: Path
    sequences: Path


def write_work_item(variant: Variant, root: Path, seed: int = 0) -> WorkItem:
    """Model (float32), adapter with non-zero A and B on all linear layers but the head, and sequences.json, below root/<variant>.

    The sampler's log-probabilities are the model's own in float32 plus SAMPLER_NOISE.
    """
    item = WorkItem(root / variant.name / "model", root / variant.name / "adapter", root / variant.name / "sequences.json")
    tokenizer = train_tokenizer(tokenizer_texts(), TOKENIZER_SIZE)
    save_model(new_model(variant.shape, tokenizer, seed), tokenizer, item.model)
    trainer = PeftTrainer(str(item.model), name=variant.name, dtype="float32", device="cpu")
    trainer.create_adapter("adapter", LoraConfig(rank=LORA_RANK, seed=seed, train_unembed=False))
    item.adapter.mkdir()
    trainer.save_adapter("adapter", item.adapter)
    _fill_b(item.adapter / ADAPTER_FILE, seed)
    trainer.load_state("adapter", item.adapter, with_optimizer=False)
    sequences = score(make_sequences(variant, seed), trainer, seed)
    item.sequences.write_text(json.dumps(asdict(sequences)), encoding="utf-8")
    return item


def _fill_b(file: Path, seed: int) -> None:
    """The B matrices of a fresh adapter are 0, and so would be every gradient of A."""
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(file)
    for name in sorted(tensors):
        if ".lora_B." in name:
            tensors[name] = 0.02 * torch.randn(tensors[name].shape, generator=generator)
    save_file(tensors, file, metadata={"format": "pt"})


def score(sequences: Sequences, trainer: PeftTrainer, seed: int) -> Sequences:
    """The same sequences with the log-probabilities of a sampler that differs from the trainer's model "adapter" by SAMPLER_NOISE."""
    rng = np.random.default_rng(seed + 1)
    pairs = list(zip(sequences.prompts, sequences.completions, strict=True))
    data = [_datum(prompt, completion, weights=np.ones(len(completion))) for prompt, completion in pairs]
    outputs = trainer.forward("adapter", data, resolve_loss("cross_entropy")).loss_fn_outputs
    logprobs = []
    for (_, completion), output in zip(pairs, outputs, strict=True):
        exact = output["logprobs"].to_numpy()[-len(completion) :]
        logprobs.append((exact + SAMPLER_NOISE * rng.normal(size=len(completion))).tolist())
    return Sequences(sequences.prompts, sequences.completions, sequences.rewards, sequences.group_size, logprobs)


def read_sequences(file: Path) -> Sequences:
    return Sequences(**json.loads(file.read_text(encoding="utf-8")))
