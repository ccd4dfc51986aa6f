"""Who gets how much of one card: base weights twice, adapters, the KV cache of the sampler, the activations of the trainer.

    coexist     KV cache and activations have memory of their own; sampling and training may overlap
    alternate   they take turns on the same memory: while the trainer works, vLLM drops its KV cache, which costs it a drained pause and
                its prefix cache (a new adapter version could not have used that anyway)

The rule. Coexist if the card holds the KV cache that `Workload` wants and a micro-batch of good size (the useful one, or down to a quarter
of it) without recomputation. Otherwise alternate, and give each phase the best the card allows: recomputation costs 1.15 x (gate and up) or
1.5 x (all of a layer) training time, a pause less.
Where sampling must go on while the trainer works, coexist with smaller micro-batches, then with recomputation, then with a smaller cache.

A trial of the trainer decides what a micro-batch takes; the formulas of memory_costs.py stand in where there is none.

How an alternating sampler does it, with vLLM >= 0.32 and enable_sleep_mode: `sleep(level=0, mode="wait")` or "abort" (the pause that the
next call needs), `release_kv_cache_memory()`; the trainer works, then gives its cached memory back (`torch.cuda.empty_cache()`); then
`wake_up(["kv_cache"])`. The weights and adapters stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ptlab.engines import memory_costs as costs
from ptlab.engines.memory_costs import GB, ModelShape, Recompute
from ptlab.errors import ConfigError

MARGIN = 0.03
"""Share of the card that stays unplanned: fragments of two allocators, and what other programs take. Assumed."""
USEFUL_FLOPS = 4e13
"""Worth of a micro-batch, forward and backward, from which launches no longer count: 0.1 s at half of an H200's 790 TFLOP/s. Assumed."""
USEFUL_TOKENS = (4096, 32768)
"""Bounds of the micro-batch that follows from USEFUL_FLOPS."""
LONGEST_PROMPT_TOKENS, USUAL_PROMPT_TOKENS, UNKNOWN_TOKENS = 2048, 512, 8192
"""Prompts that a plan provides for where no one states their length, and the longest sequence where nothing is stated."""
GOOD_PART = 4
"""A micro-batch of a quarter of the useful size is still worth more than a pause of the sampler in every step. Assumed."""
SPARE_KV_TOKENS = 64
"""vLLM keeps a block empty and fills blocks of 16 or 32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What will run. The defaults are ptlab's for one training run."""

    longest_tokens: int
    """Most tokens of prompt and answer together; both engines must be able to hold one such sequence."""
    typical_tokens: int | None = None
    """Tokens of a usual sequence, by which the wanted KV cache is reckoned; None = longest_tokens."""
    num_sequences: int = 256
    """Sequences that the sampler should hold at once: vLLM's max_num_seqs."""
    batched_tokens: int = 8192
    """vLLM's max_num_batched_tokens."""
    lora_rank: int = 32
    """Largest rank; of vLLM's slots too."""
    num_adapters: int = 1
    """Adapters in training at once."""
    lora_slots: int = 4
    """vLLM's max_loras."""
    overlap: bool = False
    """Sampling goes on while the trainer works (rollout.max_steps_off_policy > 0), so they cannot alternate."""

    @classmethod
    def of(cls, shape: ModelShape, answer_tokens: int | None, **others: Any) -> Workload:
        """For a run whose answers have at most `answer_tokens` (all turns together) after prompts nobody knows yet; None = unknown as well.

        Args:
            others: further fields.
        """
        if answer_tokens is None:
            longest, typical = UNKNOWN_TOKENS, USUAL_PROMPT_TOKENS
        else:
            longest, typical = answer_tokens + LONGEST_PROMPT_TOKENS, answer_tokens + USUAL_PROMPT_TOKENS
        most = shape.max_context_length
        return cls(longest_tokens=min(longest, most), typical_tokens=min(typical, most), **others)


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """What goes through the trainer at once."""

    tokens: int
    """Unique tokens (padded ones, where rows cannot share)."""
    recompute: Recompute
    """Which activations are computed again in the backward pass."""


_RECOMPUTED: Mapping[Recompute, str] = {
    "nothing": "without recomputed activations",
    "mlp": "with gate and up recomputed",
    "layers": "with recomputed activations",
}
Trial = Callable[[MicroBatch], int | None]
"""Runs one worst-case micro-batch of exactly this size: its peak bytes above what the trainer holds at rest; None = out of memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """A plan that fits. `str(plan)` is the paragraph for the log."""

    mode: Literal["coexist", "alternate"]
    card_bytes: int
    taken_bytes: int
    """Held by others."""
    num_parameters: int
    base_bytes: int
    """One copy of the base model."""
    base_copies: int
    rest_bytes: int
    """What stays in both phases besides the base: adapters and their slots, vLLM's workspace, CUDA."""
    vllm_bytes: int
    """All of vLLM's, as it counts: weights, slots, workspace, graphs, KV cache; not its CUDA context."""
    kv_bytes: int
    kv_tokens: int
    wanted_kv_bytes: int
    longest_tokens: int
    """Give it to the sampler as its context length."""
    micro_batch: MicroBatch
    micro_batch_bytes: int
    measured: bool
    """micro_batch_bytes comes from a trial."""

    @property
    def gpu_memory_utilization(self) -> float:
        """For vllm.EngineArgs. vLLM profiles itself and gives what is left of this share to the KV cache, so it corrects our estimate of
        its workspace; do not also set kv_cache_memory_bytes, which would switch that off."""
        return self.vllm_bytes / self.card_bytes

    @property
    def resident_bytes(self) -> int:
        return self.base_copies * self.base_bytes + self.rest_bytes

    @property
    def sampling_bytes(self) -> int:
        """Most that is on the card while sampling."""
        others = self.taken_bytes + self.resident_bytes
        return others + self.kv_bytes + (self.micro_batch_bytes if self.mode == "coexist" else 0)

    @property
    def training_bytes(self) -> int:
        """Most that is on the card while the trainer works."""
        others = self.taken_bytes + self.resident_bytes
        return others + self.micro_batch_bytes + (self.kv_bytes if self.mode == "coexist" else 0)

    @property
    def engine_args(self) -> Mapping[str, Any]:
        """For VllmSampler(engine_args=...)."""
        return {"gpu_memory_utilization": self.gpu_memory_utilization, "enable_sleep_mode": self.mode == "alternate"}

    def __str__(self) -> str:
        batch, full = self.micro_batch, self.kv_bytes >= self.wanted_kv_bytes
        how = {
            "coexist": "KV cache and training activations coexist",
            "alternate": "KV cache and training activations take turns, since the card cannot hold both at their best",
        }[self.mode]
        return (
            f"memory plan for a card of {_gb(self.card_bytes)}{_beside(self.taken_bytes)}: {how}. "
            f"In both phases: the base model of {self.num_parameters / 1e9:.2f} B parameters {_times(self.base_copies)} "
            f"({_gb(self.base_bytes)} each) and {_gb(self.rest_bytes)} of adapters, vLLM workspace and CUDA. "
            f"Sampling: {_gb(self.kv_bytes)} of KV cache, {self.kv_tokens:,} tokens"
            f"{'' if full else f' ({_gb(self.wanted_kv_bytes)} were wanted, so fewer requests run at once)'}; "
            f"vLLM gets {self.gpu_memory_utilization:.3f} of the card and contexts up to {self.longest_tokens:,} tokens. "
            f"Training: micro-batches of {batch.tokens:,} tokens {_RECOMPUTED[batch.recompute]}, "
            f"{_gb(self.micro_batch_bytes)} ({'measured in a trial' if self.measured else 'estimated, no trial was run'}). "
            f"Peaks: {_gb(self.sampling_bytes)} sampling, {_gb(self.training_bytes)} training."
        )


def plan_memory(
    *,
    card_bytes: int,
    shape: ModelShape,
    workload: Workload,
    trial: Trial | None = None,
    element_bytes: int = 2,
    base_copies: Literal[1, 2] = 2,
    gpu_memory_utilization: float | None = None,
    taken_bytes: int = 0,
) -> MemoryPlan:
    """See the module text.

    Args:
        card_bytes: all of the card's memory (torch.cuda.get_device_properties().total_memory).
        trial: None = by formula. Called with ever smaller micro-batches until one fits.
        element_bytes: of the compute type of both engines: 2 = bfloat16, 4 = float32.
        base_copies: 2 = trainer and vLLM each hold the base; 1 = they share it.
        gpu_memory_utilization: vLLM's share, if the user insists; None = ptlab decides.
        taken_bytes: what others hold on the card, as another base model of the same server.

    Raises: ConfigError if it cannot fit, with what is missing and what to do.
    """
    need = _Needs.of(shape, workload, element_bytes, base_copies, trial)
    room = int(card_bytes * (1 - MARGIN)) - taken_bytes - need.resident_bytes
    """For KV cache and activations."""
    if gpu_memory_utilization is None:
        least, most = need.least_kv, need.wanted_kv
    else:
        least = most = _given_kv(need, card_bytes, room, gpu_memory_utilization)
    found = _together(need, room, least, most, overlap=workload.overlap)
    if found is None and not workload.overlap:
        found = _in_turns(need, room, least, most)
    if found is None:
        raise ConfigError(_refusal(need, card_bytes, taken_bytes, room, least, workload))
    mode, batch, kv_bytes = found
    peak = need.peak(batch)
    assert peak is not None  # it was found to fit
    return MemoryPlan(
        mode=mode,
        card_bytes=card_bytes,
        taken_bytes=taken_bytes,
        num_parameters=shape.num_parameters,
        base_bytes=need.base_bytes,
        base_copies=base_copies,
        rest_bytes=need.resident_bytes - base_copies * need.base_bytes,
        vllm_bytes=need.vllm_bytes + kv_bytes,
        kv_bytes=kv_bytes,
        kv_tokens=kv_bytes // need.kv_per_token,
        wanted_kv_bytes=need.wanted_kv,
        longest_tokens=workload.longest_tokens,
        micro_batch=batch,
        micro_batch_bytes=peak,
        measured=trial is not None,
    )


_Found = tuple[Literal["coexist", "alternate"], MicroBatch, int]


@dataclass(slots=True)
class _Needs:
    """What the workload takes, whatever the card."""

    base_bytes: int
    resident_bytes: int
    """Both phases: bases, adapters, slots, workspace, graphs, contexts."""
    vllm_bytes: int
    """vLLM's part of it, as vLLM counts."""
    kv_per_token: int
    least_kv: int
    wanted_kv: int
    ladder: list[MicroBatch]
    """Best first: without recomputation from large to small, then with that of gate and up, then of everything."""
    estimate: Callable[[MicroBatch], int]
    trial: Trial | None
    tried: dict[MicroBatch, int | None]

    @classmethod
    def of(cls, shape: ModelShape, load: Workload, element_bytes: int, base_copies: int, trial: Trial | None) -> _Needs:
        base = shape.num_parameters * element_bytes
        slots = load.lora_slots * costs.lora_slot_bytes(shape, load.lora_rank, element_bytes)
        workspace = costs.vllm_workspace_bytes(shape, element_bytes, batched_tokens=load.batched_tokens, num_sequences=load.num_sequences)
        vllm = base + slots + workspace + costs.GRAPH_BYTES
        training = (base_copies - 1) * base + load.num_adapters * costs.lora_state_bytes(shape, load.lora_rank)
        kv = costs.kv_bytes_per_token(shape, element_bytes)
        typical = load.typical_tokens or load.longest_tokens
        least = (load.longest_tokens + SPARE_KV_TOKENS) * kv
        return cls(
            base_bytes=base,
            resident_bytes=vllm + training + 2 * costs.CONTEXT_BYTES,
            vllm_bytes=vllm,
            kv_per_token=kv,
            least_kv=least,
            wanted_kv=max(least, load.num_sequences * typical * kv),
            ladder=ladder(shape, load.longest_tokens),
            estimate=lambda b: costs.activation_bytes(shape, load.lora_rank, element_bytes, tokens=b.tokens, recompute=b.recompute),
            trial=trial,
            tried={},
        )

    def peak(self, batch: MicroBatch) -> int | None:
        """By trial (once for each size) or by formula; None = out of memory in the trial."""
        if self.trial is None:
            return self.estimate(batch)
        if batch not in self.tried:
            self.tried[batch] = self.trial(batch)
        return self.tried[batch]

    def fits(self, batch: MicroBatch, room: int) -> bool:
        peak = self.peak(batch)
        return peak is not None and peak <= room


def ladder(shape: ModelShape, longest_tokens: int) -> list[MicroBatch]:
    """Micro-batches to try, best first. The smallest holds one longest sequence; larger ones than the first gain nothing."""
    useful = 2 ** round(USEFUL_FLOPS / (4 * shape.num_parameters)).bit_length()
    tokens = max(longest_tokens, min(max(useful, USEFUL_TOKENS[0]), USEFUL_TOKENS[1]))
    sizes = [tokens]
    while sizes[-1] > longest_tokens:
        sizes.append(max(sizes[-1] // 2, longest_tokens))
    levels: tuple[Recompute, ...] = ("nothing", "mlp", "layers")
    return [MicroBatch(tokens=size, recompute=level) for level in levels for size in sizes]


def _together(need: _Needs, room: int, least: int, most: int, *, overlap: bool) -> _Found | None:
    good_tokens = need.ladder[0].tokens // GOOD_PART
    good = [batch for batch in need.ladder if batch.tokens >= good_tokens and batch.recompute == "nothing"]
    for batch in need.ladder if overlap else good:
        if room >= most and need.fits(batch, room - most):
            return "coexist", batch, most
    smallest = need.ladder[-1]
    peak = need.peak(smallest) if overlap and room >= least else None
    if peak is not None and room - peak >= least:
        return "coexist", smallest, min(most, room - peak)
    return None


def _in_turns(need: _Needs, room: int, least: int, most: int) -> _Found | None:
    if room < least:
        return None
    for batch in need.ladder:
        if need.fits(batch, room):
            return "alternate", batch, min(most, room)
    return None


def _given_kv(need: _Needs, card_bytes: int, room: int, utilization: float) -> int:
    """KV bytes that vLLM makes of a share of the card. Raises: ConfigError where the share is too small or too large."""
    kv = int(utilization * card_bytes) - need.vllm_bytes
    smallest, largest = (need.vllm_bytes + need.least_kv) / card_bytes, (need.vllm_bytes + room) / card_bytes
    if kv < need.least_kv:
        raise ConfigError(
            f"engines.sampler.gpu_memory_utilization is {utilization:g}, which leaves {_gb(kv)} of KV cache beside vLLM's own "
            f"{_gb(need.vllm_bytes)}; one sequence takes {_gb(need.least_kv)}. "
            + (f"Set it to {smallest:.3f} or more, or leave it out" if room >= need.least_kv else "No share is enough on this card")
        )
    if kv > room:
        raise ConfigError(
            f"engines.sampler.gpu_memory_utilization is {utilization:g} of a card of {_gb(card_bytes)}, {_gb(kv - room)} more than the "
            f"trainer's weights leave free; set it to {largest:.3f} or less, or leave it out"
        )
    return kv


def _refusal(need: _Needs, card_bytes: int, taken_bytes: int, room: int, kv: int, workload: Workload) -> str:
    smallest = need.ladder[-1]
    peak = need.peak(smallest)
    training = need.estimate(smallest) if peak is None else peak
    both = workload.overlap
    needed = kv + training if both else max(kv, training)
    missing = max(needed - room, 1)
    todo = ["a smaller base model", "a larger card"]
    if both:
        todo.insert(0, "rollout.max_steps_off_policy: 0, so that sampling and training can take turns")
    if room > 0:
        todo.insert(0, f"shorter sequences (now up to {workload.longest_tokens:,} tokens of prompt and answer; rollout.max_tokens)")
    if workload.lora_slots > 1:
        todo.insert(len(todo) - 2, f"fewer adapter slots in vLLM (engines.sampler.max_loras, now {workload.lora_slots})")
    return (
        f"memory plan: {_gb(missing)} are missing on a card of {_gb(card_bytes)}{_beside(taken_bytes)}, "
        f"{'with sampling while the trainer works' if both else 'even if KV cache and training activations take turns'}. "
        f"{_gb(need.resident_bytes)} are always there (base model {_gb(need.base_bytes)} a copy), {_gb(int(card_bytes * MARGIN))} stay "
        f"unplanned; one longest sequence takes {_gb(need.least_kv)} of KV cache and {_gb(training)} in the trainer with recomputed "
        f"activations{' (estimated: the trial ran out of memory)' if peak is None else ''}. What helps: {'; '.join(todo)}"
    )


def _beside(taken_bytes: int) -> str:
    return f" of which others hold {_gb(taken_bytes)}" if taken_bytes else ""


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / GB:.1f} GB"


def _times(copies: int) -> str:
    return "once, shared by trainer and vLLM" if copies == 1 else "twice, for trainer and vLLM"
