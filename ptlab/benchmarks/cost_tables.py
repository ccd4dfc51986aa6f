"""The cost model's tables for docs/performance.md: floors on an H200 and on a CPU core, and what each technique takes away."""

from __future__ import annotations

from collections.abc import Sequence

from ptlab.benchmarks.cost_model import (
    CPU_BF16,
    CPU_FP32,
    H200,
    MODELS,
    Batch,
    TrainCost,
    adapter_bytes,
    body_weights,
    sample_cost,
    step_floor,
    train_cost,
)
from ptlab.benchmarks.tables import markdown_table
from ptlab.benchmarks.work_items import LORA_RANK, VARIANTS, Variant, make_sequences
from ptlab.engines import pretrain
from ptlab.engines.memory_costs import ModelShape

PROBLEMS, SAMPLES, PROMPT, COMPLETION, RANK = 128, 16, 200, 256, 32
"""The GSM8K-shaped step."""
CPU_ITEMS = ("small", "unshared", "vocab", "medium", "long")


def shape_of(made: pretrain.ModelShape) -> ModelShape:
    """Of a random Qwen3 model that ptlab makes: tied head."""
    return ModelShape(
        num_parameters=0, num_layers=made.num_layers, hidden_size=made.hidden_size, intermediate_size=made.intermediate_size,
        num_heads=made.num_heads, num_kv_heads=made.num_kv_heads, head_dim=made.head_dim, vocab_size=made.vocab_size, tied=True,
        qk_norm=True, max_context_length=made.max_context_length,
    ).counted()  # fmt: skip


def variant_batch(variant: Variant, *, share: bool) -> Batch:
    sequences = make_sequences(variant)
    return Batch.of_sequences(sequences.prompts, sequences.completions, share=share)


def h200_table() -> str:
    """Floors of a GSM8K-shaped step."""
    rows: list[list[object]] = []
    for name, shape in MODELS.items():
        packed, shared = (
            step_floor(
                shape, H200, rank=RANK, problems=PROBLEMS, samples=SAMPLES, prompt=PROMPT, completion=COMPLETION, share=share
            )
            for share in (False, True)
        )  # fmt: skip
        once = sample_cost(
            shape, RANK, problems=PROBLEMS, samples=SAMPLES, prompt=PROMPT, completion=COMPLETION, element_bytes=2, read_prompts_once=True
        ).seconds(H200)
        sync = f"{adapter_bytes(shape, RANK, 2) / 1e6:.0f} MB, {1000 * shared.sync_s:.0f} ms"
        seconds = (packed.train_s, shared.train_s, shared.sample_s, once)
        rows.append([name, *(f"{s:.1f} s" for s in seconds), sync, f"{shared.step_s:.1f} / {packed.step_s:.1f} s"])
    header = [
        "model",
        "trainer, packed",
        "trainer, shared prompts",
        "sampler",
        "sampler, prompts read once",
        "adapter",
        "step, shared / packed",
    ]
    return markdown_table(header, rows)


def parts_table() -> str:
    """Where the trainer's FLOPs are, with shared prompts; percent."""
    rows: list[list[object]] = []
    for name, shape in MODELS.items():
        cost = train_cost(shape, RANK, Batch.of_samples(PROBLEMS, SAMPLES, PROMPT, COMPLETION, share=True), element_bytes=2)
        parts = (cost.body, cost.lora, cost.attention, cost.head, cost.scored)
        traffic = f"{cost.bytes / H200.bytes_per_s:.1f} s"
        rows.append([name, f"{cost.flops / 1e15:.2f}", *(f"{100 * part / cost.flops:.1f}" for part in parts), traffic])
    return markdown_table(["model", "PFLOP", "body", "LoRA", "attention", "head", "scored", "memory traffic"], rows)


def cpu_table() -> str:
    """Floors of the trainer's work items on one core."""
    rows: list[list[object]] = []
    for variant in (VARIANTS[name] for name in CPU_ITEMS):
        shape, batch = shape_of(variant.shape), variant_batch(variant, share=True)
        cells: list[object] = []
        for device in (CPU_FP32, CPU_BF16):
            cost = train_cost(shape, LORA_RANK, batch, element_bytes=device.element_bytes, head_lora=False)
            cells += [f"{cost.flops / device.flops:.2f} s", f"{cost.bytes / device.bytes_per_s:.2f} s"]
        total = make_sequences(variant).num_tokens
        rows.append([variant.name, f"{body_weights(shape) / 1e6:.1f} M", total, batch.tokens, f"{cost.flops / 1e9:.0f}", *cells])
    header = ["work item", "N", "tokens", "unique inputs", "GFLOP", "fp32 products", "fp32 traffic", "bf16 products", "bf16 traffic"]
    return markdown_table(header, rows)


def techniques(
    shape: ModelShape, rank: int, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], *, head_lora: bool
) -> list[tuple[str, float]]:
    """FLOPs of one forward_backward, from a plain trainer (padding, checkpointing, the head everywhere) to ours; each line does one thing
    less than the line above."""

    def cost(batch: Batch) -> TrainCost:
        return train_cost(shape, rank, batch, element_bytes=2, head_lora=head_lora)

    padded = Batch.padded(prompts, completions)
    everywhere = cost(Batch(tokens=padded.tokens, pairs=padded.pairs, loss_rows=padded.tokens))
    body_forward = everywhere.body / 2 + (everywhere.lora + everywhere.attention) / 3
    return [
        ("padded, old log-probabilities by a second forward", everywhere.flops + 2 * body_forward + everywhere.head / 2),
        ("without the second forward", everywhere.flops + body_forward),
        ("without recomputed activations", everywhere.flops),
        ("the head's gradient where the loss looks", cost(padded).flops),
        ("without padding", cost(Batch.of_sequences(prompts, completions, share=False)).flops),
        ("each distinct prompt once", cost(Batch.of_sequences(prompts, completions, share=True)).flops),
    ]


def techniques_table(name: str) -> str:
    """`name`: a work item on one core in fp32, or a model of MODELS on an H200 with every completion of its full length."""
    if name in MODELS:
        shape, device, head_lora = MODELS[name], H200, True
        texts = [[p] * PROMPT for p in range(PROBLEMS) for _ in range(SAMPLES)]
        answers = [[i] * COMPLETION for i in range(len(texts))]
    else:
        sequences = make_sequences(VARIANTS[name])
        shape, device, head_lora = shape_of(VARIANTS[name].shape), CPU_FP32, False
        texts, answers = sequences.prompts, sequences.completions
    lines = techniques(shape, RANK, texts, answers, head_lora=head_lora)
    last = lines[-1][1]
    rows = [[text, _flops(flops), f"{flops / device.flops:.2f} s", f"{flops / last:.2f}"] for text, flops in lines]
    return markdown_table([f"{name}, {device.name}", "FLOP", "at the peak", "times the last"], rows)


def _flops(flops: float) -> str:
    return f"{flops / 1e15:.2f} P" if flops > 1e15 else f"{flops / 1e9:.0f} G"


def device_table() -> str:
    rows = [
        [d.name, f"{d.flops / 1e12:g} TFLOP/s", f"{d.bytes_per_s / 1e9:,.0f} GB/s", f"{d.flops / d.bytes_per_s:.0f}"]
        for d in (H200, CPU_FP32, CPU_BF16)
    ]
    return markdown_table(["device", "products", "memory", "FLOP per byte"], rows)


def all_tables() -> dict[str, str]:
    """Title and table, in the order of docs/performance.md."""
    return {
        "Devices": device_table(),
        "Floors of one GSM8K-shaped step: 128 x 16, prompt 200, completion 256, rank 32": h200_table(),
        "Where the trainer's FLOPs are, shared prompts, percent": parts_table(),
        "Floors of the trainer's work items on one core, shared prompts": cpu_table(),
        "What each technique takes away": techniques_table("Qwen3-4B"),
        "What each technique takes away, ragged": techniques_table("small"),
    }
