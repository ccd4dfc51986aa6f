"""What one RL step has to cost, from the shape of the model and the lengths of the batch: FLOPs, bytes, and the floor on a device.

Letters: H hidden size, Q = heads x head_dim, KV = key heads x head_dim, I MLP size, L layers, V vocabulary, r LoRA rank, e bytes per
element; N = L (2 H (Q + KV) + 3 H I), the weights of the layers' matrices. A product of [T, a] and [a, b] is 2 T a b FLOPs.

Training on T tokens of which U positions learn (the loss looks at them) and the others only report their log-probability:

    body       4 N T                2 forward, 2 for the gradient that goes back through; none for the frozen weights themselves
    LoRA       6 r (in + out) T     over the seven matrices of a layer: 2 forward, 2 for A's and B's gradients, 2 to go back through
    attention  12 Q L P             P = pairs of a query and a key it sees; 2 products forward, 4 backward, 2 Q each
    head       4 V H U              log-probability and gradient; with LoRA on the head 6 r (H + V) U more
    scored     2 V H (T - U)        log-probability alone; with LoRA 2 r (H + V) (T - U) more

With shared prompts T, P and U are those of the stream of unique tokens (engines/prefix_tree.py): T = sum of the segments' lengths,
P = sum over its tokens of (position + 1).

Memory traffic of training, if every product and each fused step between two products reads and writes its operands once:

    weights      2 e (N + V H) per micro-batch                      once forward, once backward
    activations  3 e L (10 H + 6 Q + 6 KV + 6 I) T                  forward once, backward twice
    logits       e V (4 U + 2 (T - U))                              written, read; their gradient written, read

Sampling S sequences of a prompt of p and a completion of c tokens, every sequence one token a step, the prompts prefilled once each:

    weights      e (N + V H + LoRA) (c - 1)     read once a step, however many sequences there are
    keys, values 2 e KV L x (p + s) summed over the sequences and steps s = 1 .. c - 1
    FLOPs        2 (N + V H) S (c - 1) + 4 Q L x (p + s) summed likewise
    prefill      (2 N + 4 Q L (p + 1) / 2) p per prompt, bound by FLOPs

The floor of a part is the larger of FLOPs / peak and bytes / bandwidth; the parts of a step follow one another. Left out: recomputed scores
(a flash kernel's backward does a fifth product), norms, softmax, the optimizer (16 bytes per LoRA parameter), reward and transport.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ptlab.engines.memory_costs import ModelShape, kv_bytes_per_token, lora_parameters
from ptlab.engines.prefix_tree import build_stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What a machine can do at most: measured rates, not data sheets."""

    name: str
    flops: float
    """Per second, of large matrix products in the compute type."""
    bytes_per_s: float
    """Memory."""
    element_bytes: int
    """Of the compute type."""
    file_bytes_per_s: float = 5e9
    """To where the sampler picks up an adapter: a RAM disk."""


H200 = Device(name="H200, bf16", flops=790e12, bytes_per_s=4.3e12, element_bytes=2)
CPU_FP32 = Device(name="one core, fp32", flops=160e9, bytes_per_s=13e9, element_bytes=4)
CPU_BF16 = Device(name="one core, bf16", flops=1.2e12, bytes_per_s=13e9, element_bytes=2)
"""A core of the Xeon with AMX that ptlab's CPU figures come from: torch.mm, and a copy of 256 MiB with one thread."""


def _shape(hidden: int, inner: int, layers: int, heads: int, vocab: int, *, tied: bool, qk_norm: bool, context: int) -> ModelShape:
    return ModelShape(
        num_parameters=0, num_layers=layers, hidden_size=hidden, intermediate_size=inner, num_heads=heads, num_kv_heads=8, head_dim=128,
        vocab_size=vocab, tied=tied, qk_norm=qk_norm, max_context_length=context,
    ).counted()  # fmt: skip


MODELS = {
    "Qwen3-0.6B": _shape(1024, 3072, 28, 16, 151936, tied=True, qk_norm=True, context=40960),
    "Qwen3-1.7B": _shape(2048, 6144, 28, 16, 151936, tied=True, qk_norm=True, context=40960),
    "Qwen3-4B": _shape(2560, 9728, 36, 32, 151936, tied=True, qk_norm=True, context=40960),
    "Llama-3.1-8B": _shape(4096, 14336, 32, 32, 128256, tied=False, qk_norm=False, context=131072),
}
"""From the models' config.json."""


def body_weights(shape: ModelShape) -> int:
    """N: numbers in the matrices of all layers."""
    attention = 2 * shape.hidden_size * (shape.query_size + shape.kv_size)
    return shape.num_layers * (attention + 3 * shape.hidden_size * shape.intermediate_size)


def head_weights(shape: ModelShape) -> int:
    return shape.vocab_size * shape.hidden_size


def _lora_split(shape: ModelShape, rank: int) -> tuple[int, int]:
    """LoRA parameters of the body and of the head."""
    head = rank * (shape.hidden_size + shape.vocab_size)
    return lora_parameters(shape, rank) - head, head


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What a training step computes, counted. An input row of p + c - 1 tokens predicts each next token; the last c of them learn."""

    tokens: int
    """T: through the layers."""
    pairs: int
    """P: of a query and a key it attends to."""
    loss_rows: int
    """U: positions of the stream whose gradient the head is asked for."""

    @classmethod
    def of_sequences(cls, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], *, share: bool) -> Batch:
        """Counted in the stream that a trainer makes of these tokens."""
        rows = [np.array([*prompt, *completion][:-1], dtype=np.int64) for prompt, completion in zip(prompts, completions, strict=True)]
        stream = build_stream(rows, share=share)
        learns_T = np.zeros(len(stream.tokens_T), dtype=bool)
        for places, prompt in zip(stream.places_D, prompts, strict=True):
            learns_T[places[len(prompt) - 1 :]] = True
        return cls(tokens=len(learns_T), pairs=int((stream.positions_T + 1).sum()), loss_rows=int(learns_T.sum()))

    @classmethod
    def of_samples(cls, problems: int, samples: int, prompt: int, completion: int, *, share: bool) -> Batch:
        """`samples` completions of each of `problems` prompts, all of the same lengths and with nothing but the prompt in common."""
        rows, row = problems * samples, prompt + completion - 1
        prompt_pairs, row_pairs = prompt * (prompt + 1) // 2, row * (row + 1) // 2
        if not share:
            return cls(tokens=rows * row, pairs=rows * row_pairs, loss_rows=rows * completion)
        return cls(
            tokens=problems * prompt + rows * (completion - 1),
            pairs=problems * prompt_pairs + rows * (row_pairs - prompt_pairs),
            loss_rows=problems + rows * (completion - 1),  # the prompt's last position predicts every sample's first token
        )

    @classmethod
    def padded(cls, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Batch:
        """As TRL lays it out: prompts padded to the longest prompt, completions to the longest completion, the head on all completions."""
        completion = max(map(len, completions))
        row = max(map(len, prompts)) + completion
        return cls(tokens=len(prompts) * row, pairs=len(prompts) * row * (row + 1) // 2, loss_rows=len(prompts) * completion)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainCost:
    """FLOPs of one forward_backward by part, and the bytes it moves."""

    body: float
    lora: float
    attention: float
    head: float
    scored: float
    bytes: float

    @property
    def flops(self) -> float:
        return self.body + self.lora + self.attention + self.head + self.scored

    def seconds(self, device: Device) -> float:
        """The floor."""
        return max(self.flops / device.flops, self.bytes / device.bytes_per_s)


def train_cost(
    shape: ModelShape, rank: int, batch: Batch, *, element_bytes: int, micro_batch_tokens: int = 16384, head_lora: bool = True
) -> TrainCost:
    """See the module's text. `head_lora`: the adapter is on the output head too (train_unembed)."""
    body_lora, full_head_lora = _lora_split(shape, rank)
    on_head = full_head_lora if head_lora else 0
    head, scored_rows = head_weights(shape), batch.tokens - batch.loss_rows
    query, kv, layers = shape.query_size, shape.kv_size, shape.num_layers
    micro_batches = -(-batch.tokens // micro_batch_tokens)
    activations = 3 * layers * (10 * shape.hidden_size + 6 * query + 6 * kv + 6 * shape.intermediate_size) * batch.tokens
    logits = shape.vocab_size * (4 * batch.loss_rows + 2 * scored_rows)
    return TrainCost(
        body=4.0 * body_weights(shape) * batch.tokens,
        lora=6.0 * body_lora * batch.tokens + 6.0 * on_head * batch.loss_rows,
        attention=12.0 * query * layers * batch.pairs,
        head=4.0 * head * batch.loss_rows,
        scored=(2.0 * head + 2.0 * on_head) * scored_rows,
        bytes=float(element_bytes) * (2 * micro_batches * (body_weights(shape) + head) + activations + logits),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleCost:
    """Of drawing a batch's completions."""

    prefill_flops: float
    decode_flops: float
    weight_bytes: float
    kv_bytes: float

    def seconds(self, device: Device) -> float:
        """The floor: prefill bound by FLOPs, then decode by whichever is slower."""
        decode = max(self.decode_flops / device.flops, (self.weight_bytes + self.kv_bytes) / device.bytes_per_s)
        return self.prefill_flops / device.flops + decode


def sample_cost(
    shape: ModelShape,
    rank: int,
    *,
    problems: int,
    samples: int,
    prompt: int,
    completion: int,
    element_bytes: int,
    read_prompts_once: bool = False,
) -> SampleCost:
    """All sequences at once.

    Args:
        read_prompts_once: a kernel reads a prompt's keys and values once a step for all its samples, as none that ptlab uses does.
    """
    sequences, steps = problems * samples, completion - 1  # the first token comes out of the prefill
    query_width, head = 4 * shape.query_size * shape.num_layers, head_weights(shape)
    own = sequences * steps * completion // 2  # sum of s over the steps, for each sequence
    seen = sequences * steps * prompt + own
    read = problems * steps * prompt + own if read_prompts_once else seen
    prompt_pairs = prompt * (prompt + 1) // 2
    return SampleCost(
        prefill_flops=float(problems * (2 * body_weights(shape) * prompt + query_width * prompt_pairs)),
        decode_flops=2.0 * (body_weights(shape) + head) * sequences * steps + float(query_width * seen),
        weight_bytes=float(element_bytes * steps * (body_weights(shape) + head + lora_parameters(shape, rank))),
        kv_bytes=float(read * kv_bytes_per_token(shape, element_bytes)),
    )


def adapter_bytes(shape: ModelShape, rank: int, element_bytes: int) -> int:
    """What a weight sync carries: the adapter in the compute type."""
    return element_bytes * lora_parameters(shape, rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFloor:
    """Seconds no program can go below without changing what is computed; the parts follow one another."""

    train_s: float
    sample_s: float
    sync_s: float

    @property
    def step_s(self) -> float:
        return self.train_s + self.sample_s + self.sync_s


def step_floor(
    shape: ModelShape, device: Device, *, rank: int, problems: int, samples: int, prompt: int, completion: int, share: bool
) -> StepFloor:
    """One RL step: draw, train once, make the new weights samplable."""
    batch = Batch.of_samples(problems, samples, prompt, completion, share=share)
    drawn = sample_cost(
        shape, rank, problems=problems, samples=samples, prompt=prompt, completion=completion, element_bytes=device.element_bytes
    )
    return StepFloor(
        train_s=train_cost(shape, rank, batch, element_bytes=device.element_bytes).seconds(device),
        sample_s=drawn.seconds(device),
        sync_s=adapter_bytes(shape, rank, device.element_bytes) / device.file_bytes_per_s,
    )
