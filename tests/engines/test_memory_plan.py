"""The plan for known cards and models by hand, and what must hold for any card, model and trial."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptlab.engines.memory_costs import ModelShape, Recompute
from ptlab.engines.memory_plan import MARGIN, MemoryPlan, MicroBatch, Trial, Workload, ladder, plan_memory
from ptlab.errors import ConfigError

GB = 10**9


def model(hidden: int, inner: int, layers: int, heads: int, *, vocab: int = 151936, tied: bool = True, qk_norm: bool = True) -> ModelShape:
    shape = ModelShape(
        num_parameters=0, num_layers=layers, hidden_size=hidden, intermediate_size=inner, num_heads=heads, num_kv_heads=8, head_dim=128,
        vocab_size=vocab, tied=tied, qk_norm=qk_norm, max_context_length=40960,
    )  # fmt: skip
    return shape.counted()


QWEN3_06B = model(1024, 3072, 28, 16)
QWEN3_4B = model(2560, 9728, 36, 32)
LLAMA_8B = model(4096, 14336, 32, 32, vocab=128256, tied=False, qk_norm=False)
MODELS = (QWEN3_06B, QWEN3_4B, LLAMA_8B)


@pytest.mark.parametrize(
    ("shape", "card_gb", "mode", "tokens", "recompute", "kv_full"),
    [
        # Answers of up to 512 tokens: 256 sequences of 1024 tokens wanted (30 / 39 / 34 GB), 2560 the longest. Resident in both phases
        # 6.6 / 21.8 / 38.4 GB; a micro-batch 1.1 / 3.1 / 3.3 MB a token, of the 8B model 1.5 with gate and up recomputed.
        (QWEN3_06B, 141, "coexist", 32768, "nothing", True),
        (QWEN3_06B, 80, "coexist", 32768, "nothing", True),
        (QWEN3_06B, 24, "alternate", 8192, "nothing", False),
        (QWEN3_4B, 141, "coexist", 4096, "nothing", True),
        (QWEN3_4B, 80, "coexist", 4096, "nothing", True),
        (QWEN3_4B, 24, "refused", 0, "nothing", False),  # two copies alone are 16 GB, and the longest answer takes 2.4 of 1.5 GB
        (LLAMA_8B, 141, "coexist", 4096, "nothing", True),
        (LLAMA_8B, 80, "alternate", 4096, "nothing", True),
        (LLAMA_8B, 48, "alternate", 4096, "mlp", False),
        (LLAMA_8B, 24, "refused", 0, "nothing", False),
    ],
)
def test_known_models_on_known_cards(shape: ModelShape, card_gb: int, mode: str, tokens: int, recompute: Recompute, kv_full: bool) -> None:
    workload = Workload.of(shape, 512)
    assert (workload.longest_tokens, workload.typical_tokens) == (2560, 1024)
    if mode == "refused":
        with pytest.raises(ConfigError, match=r"are missing on a card of 24\.0 GB"):
            plan_memory(card_bytes=card_gb * GB, shape=shape, workload=workload)
        return
    plan = plan_memory(card_bytes=card_gb * GB, shape=shape, workload=workload)
    assert (plan.mode, plan.micro_batch) == (mode, MicroBatch(tokens=tokens, recompute=recompute))
    assert (plan.kv_bytes == plan.wanted_kv_bytes) is kv_full
    assert plan.engine_args["enable_sleep_mode"] is (mode == "alternate")
    assert not plan.measured


def test_what_others_hold_is_not_planned_with() -> None:
    """A second model on the card: the same plan as on a card that is smaller by that much, but shares are of the whole card."""
    load, trial = Workload.of(QWEN3_4B, 512), lambda batch: batch.tokens * 9_000_000
    alone = plan_memory(card_bytes=80 * GB, shape=QWEN3_4B, workload=load, trial=trial)
    taken = int(61 * GB * 0.97)
    beside = plan_memory(card_bytes=141 * GB, shape=QWEN3_4B, workload=load, trial=trial, taken_bytes=taken)
    assert (beside.mode, beside.micro_batch, beside.longest_tokens) == (alone.mode, alone.micro_batch, alone.longest_tokens)
    assert abs(beside.kv_bytes - alone.kv_bytes) < GB
    assert beside.gpu_memory_utilization == pytest.approx(beside.vllm_bytes / (141 * GB))
    assert max(beside.sampling_bytes, beside.training_bytes) <= 141 * GB * 0.97
    assert "of which others hold 59.2 GB" in str(beside) and "others" not in str(alone)
    with pytest.raises(ConfigError, match=r"missing on a card of 141\.0 GB of which others hold 130\.0 GB"):
        plan_memory(card_bytes=141 * GB, shape=QWEN3_4B, workload=load, trial=trial, taken_bytes=130 * GB)


def test_the_parts_of_a_plan_by_hand() -> None:
    """Llama-3.1-8B on 141 GB, every term written out; sees a part counted twice or left out."""
    shape = LLAMA_8B
    lora = 32 * (32 * 81_920 + 132_352)
    workload = Workload(longest_tokens=2048, typical_tokens=512)
    plan = plan_memory(card_bytes=141 * GB, shape=shape, workload=workload, trial=lambda batch: 30 * GB)
    base = 2 * 8_030_261_248
    slots = 4 * 2 * (lora + 32 * 132_352)
    workspace = 8192 * 2 * (2 * 4096 + 2 * 4096 + 2 * 1024 + 3 * 14336) + 256 * 128256 * 24
    kv = 256 * 512 * 131_072
    vllm = base + slots + workspace + 2**30
    assert plan.vllm_bytes == vllm + kv
    assert plan.gpu_memory_utilization == pytest.approx((vllm + kv) / (141 * GB))
    resident = vllm + base + 16 * lora + 2 * 600 * 2**20
    assert plan.resident_bytes == resident
    assert plan.sampling_bytes == plan.training_bytes == resident + kv + 30 * GB
    assert plan.measured


def test_a_shared_base_is_counted_once() -> None:
    workload = Workload(longest_tokens=2048)
    one, two = (plan_memory(card_bytes=141 * GB, shape=QWEN3_4B, workload=workload, base_copies=copies) for copies in (1, 2))
    assert two.resident_bytes - one.resident_bytes == 2 * QWEN3_4B.num_parameters


# -- what holds for any card

WORKLOADS = st.builds(
    Workload,
    longest_tokens=st.integers(16, 40960),
    typical_tokens=st.none() | st.integers(16, 4096),
    num_sequences=st.sampled_from([1, 64, 256, 1024]),
    lora_rank=st.sampled_from([1, 8, 32, 128]),
    num_adapters=st.integers(1, 4),
    lora_slots=st.integers(1, 8),
    overlap=st.booleans(),
)
CARDS = st.integers(4 * GB, 300 * GB)


@st.composite
def trials(draw: st.DrawFn) -> Trial | None:
    """None, or a trainer that takes some bytes a token (less with recomputation) and runs out of memory above a limit."""
    if draw(st.booleans()):
        return None
    full = draw(st.integers(1000, 20_000_000))
    without_mlp = draw(st.integers(100, full))
    taken = {"nothing": full, "mlp": without_mlp, "layers": draw(st.integers(100, without_mlp))}
    limit = draw(st.integers(GB, 300 * GB))

    def trial(batch: MicroBatch) -> int | None:
        peak = batch.tokens * taken[batch.recompute]
        return peak if peak <= limit else None

    return trial


def attempt(card_bytes: int, shape: ModelShape, workload: Workload, trial: Trial | None, share: float | None = None) -> MemoryPlan | None:
    try:
        return plan_memory(card_bytes=card_bytes, shape=shape, workload=workload, trial=trial, gpu_memory_utilization=share)
    except ConfigError:
        return None


@settings(max_examples=300, deadline=None)
@given(CARDS, st.sampled_from(MODELS), WORKLOADS, trials(), st.none() | st.floats(0.05, 0.99))
def test_never_plans_more_than_the_card(
    card_bytes: int, shape: ModelShape, workload: Workload, trial: Trial | None, share: float | None
) -> None:
    plan = attempt(card_bytes, shape, workload, trial, share)
    if plan is None:
        return
    assert max(plan.sampling_bytes, plan.training_bytes) <= card_bytes * (1 - MARGIN)
    assert plan.kv_tokens >= workload.longest_tokens
    assert plan.micro_batch.tokens >= workload.longest_tokens
    assert 0 < plan.gpu_memory_utilization < 1
    assert plan.mode == "coexist" or not workload.overlap
    if trial is not None:
        assert trial(plan.micro_batch) == plan.micro_batch_bytes
    if share is not None:
        assert plan.gpu_memory_utilization == pytest.approx(share, abs=1e-6)


@settings(max_examples=300, deadline=None)
@given(CARDS, CARDS, st.sampled_from(MODELS), WORKLOADS, trials())
def test_a_larger_card_is_never_worse(one: int, other: int, shape: ModelShape, workload: Workload, trial: Trial | None) -> None:
    """From refused to alternate to coexist; more KV cache; in one mode no worse a step of the ladder."""
    small, large = (attempt(card_bytes, shape, workload, trial) for card_bytes in sorted((one, other)))
    if small is None:
        return
    assert large is not None
    assert small.mode == "alternate" or large.mode == "coexist"
    assert large.kv_bytes >= small.kv_bytes
    if large.mode == small.mode:
        steps = ladder(shape, workload.longest_tokens)
        assert steps.index(large.micro_batch) <= steps.index(small.micro_batch)


@given(st.sampled_from(MODELS), st.integers(1, 100_000))
def test_the_ladder_falls_from_large_to_the_longest_sequence(shape: ModelShape, longest: int) -> None:
    steps = ladder(shape, longest)
    third = len(steps) // 3
    assert [step.recompute for step in steps] == ["nothing"] * third + ["mlp"] * third + ["layers"] * third
    for part in (steps[:third], steps[third : 2 * third], steps[2 * third :]):
        tokens = [step.tokens for step in part]
        assert tokens == sorted(tokens, reverse=True)
        assert len(set(tokens)) == len(tokens)
        assert tokens[-1] == longest


# -- the trial decides


def test_the_trial_overrules_the_formula_and_is_asked_once_for_each_size() -> None:
    asked: list[MicroBatch] = []

    def trial(batch: MicroBatch) -> int | None:
        asked.append(batch)
        return None if batch.tokens > 8192 and batch.recompute == "nothing" else 5 * GB

    workload = Workload.of(QWEN3_06B, 512)
    plan = plan_memory(card_bytes=80 * GB, shape=QWEN3_06B, workload=workload, trial=trial)
    assert plan.micro_batch == MicroBatch(tokens=8192, recompute="nothing")
    assert plan.micro_batch_bytes == 5 * GB
    assert [batch.tokens for batch in asked] == [32768, 16384, 8192]


# -- the user's share


def test_a_given_share_is_kept_and_decides_the_cache() -> None:
    workload = Workload.of(QWEN3_4B, 512)
    plan = plan_memory(card_bytes=80 * GB, shape=QWEN3_4B, workload=workload, gpu_memory_utilization=0.3)
    assert plan.gpu_memory_utilization == pytest.approx(0.3)
    assert plan.mode == "coexist"  # with 12 GB of cache instead of 39, a micro-batch of 4096 tokens fits beside it
    assert plan.kv_bytes < plan.wanted_kv_bytes
    wide = plan_memory(card_bytes=80 * GB, shape=QWEN3_4B, workload=workload, gpu_memory_utilization=0.8)
    assert wide.mode == "alternate"


@pytest.mark.parametrize(("share", "words"), [(0.1, "Set it to 0.1"), (0.95, "more than the trainer's weights leave free; set it to 0.8")])
def test_a_share_that_cannot_work_is_refused_with_one_that_can(share: float, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan_memory(card_bytes=80 * GB, shape=QWEN3_4B, workload=Workload.of(QWEN3_4B, 512), gpu_memory_utilization=share)


# -- words


def test_the_refusal_says_how_much_is_missing_and_what_to_do() -> None:
    workload = Workload.of(QWEN3_4B, 512)
    with pytest.raises(ConfigError) as refused:
        plan_memory(card_bytes=24 * GB, shape=QWEN3_4B, workload=workload)
    text = str(refused.value)
    assert "0.9 GB are missing on a card of 24.0 GB, even if KV cache and training activations take turns" in text
    assert "21.8 GB are always there (base model 8.0 GB a copy)" in text
    for advice in ("shorter sequences (now up to 2,560 tokens", "engines.sampler.max_loras, now 4", "smaller base model", "larger card"):
        assert advice in text
    enough = plan_memory(card_bytes=26 * GB, shape=QWEN3_4B, workload=workload)  # 0.9 GB of room is 0.95 of card
    assert enough.mode == "alternate"
    with pytest.raises(ConfigError, match=r"with sampling while the trainer works.*max_steps_off_policy: 0"):
        plan_memory(card_bytes=24 * GB, shape=QWEN3_4B, workload=replace(workload, overlap=True))
    with pytest.raises(ConfigError, match="the trial ran out of memory"):
        plan_memory(card_bytes=141 * GB, shape=QWEN3_4B, workload=workload, trial=lambda batch: None)


def test_the_plan_reads_as_one_paragraph() -> None:
    text = str(plan_memory(card_bytes=80 * GB, shape=LLAMA_8B, workload=Workload.of(LLAMA_8B, 2048)))
    assert "\n" not in text
    for words in ("card of 80.0 GB", "take turns", "8.03 B parameters twice", "16.1 GB each", "39.2 GB of KV cache, 2", "were wanted",
                  "without recomputed activations", "estimated, no trial was run", "Peaks: 77.6 GB sampling"):  # fmt: skip
        assert words in text, words
