"""Sequences on record, and what provenance spans may claim."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import numpy as np
import pytest

from ptlab.backend.sequences import EXPIRE_EVERY_S, RETENTION_S, Sequences
from ptlab.backend.store import Store
from ptlab.errors import EngineError, InvalidRequestError
from ptlab.losses import check_datum, resolve_loss
from ptlab.types import (
    Datum,
    ImageChunk,
    ModelInput,
    PromptProvenanceSpan,
    SampledProvenanceSpan,
    SampledSequence,
    SampleResponse,
    TensorData,
)

PROMPT = [5, 6, 7]
SAMPLED = [8, 9, 2]
LOGPROBS = [-0.5, -0.25, -1.5]
NAME = "sampler:1:0"


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def on_a_store(work: Callable[[Sequences, Store, Clock], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        store, clock = Store.open(None), Clock()
        try:
            await work(Sequences(store, clock), store, clock)
        finally:
            store.close()

    asyncio.run(run())


def sequence(name: str = NAME, tokens: Sequence[int] = SAMPLED, logprobs: Sequence[float] | None = LOGPROBS) -> SampledSequence:
    return SampledSequence.from_lists(tokens, logprobs, stop_reason="stop", sequence_id=name)


async def recorded(sequences: Sequences, owner: str = "me") -> None:
    await sequences.record(owner, PROMPT, SampleResponse(sequences=[sequence()]), 3)


def prompt(length: int, offset: int = 0, name: str = NAME) -> PromptProvenanceSpan:
    return PromptProvenanceSpan(sequence_id=name, offset=offset, length=length)


def sampled(length: int, offset: int = 0, name: str = NAME) -> SampledProvenanceSpan:
    return SampledProvenanceSpan(sequence_id=name, offset=offset, length=length)


def rl_loop_datum(**changes: Any) -> Datum:
    """As the cookbook's rl_loop makes it: placeholders 0 among the targets of the prompt."""
    fields: dict[str, Any] = {
        "tokens": [*PROMPT, *SAMPLED[:-1]],
        "target_tokens": [0, 0, *SAMPLED],
        "logprobs": [0.0, 0.0, *LOGPROBS],
        "advantages": [0.0, 0.0, 1.0, 1.0, 1.0],
        "model_input_spans": [prompt(3), sampled(2)],
        "loss_fn_input_spans": [prompt(2, offset=1), sampled(3)],
    } | changes
    inputs = {name: fields[name] for name in ("target_tokens", "logprobs", "advantages") if fields[name] is not None}
    return Datum(ModelInput.from_ints(fields["tokens"]), inputs, fields["model_input_spans"], fields["loss_fn_input_spans"])


LOSSES = ["importance_sampling", "stable_reinforce"]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_datum_of_the_cookbook_passes(loss: str) -> None:
    async def work(sequences: Sequences, store: Store, clock: Clock) -> None:
        await recorded(sequences)
        (datum,) = await sequences.attach("me", [rl_loop_datum()], loss)
        assert datum.loss_fn_inputs["logprobs"].tolist() == [0.0, 0.0, *LOGPROBS]
        check_datum(datum, resolve_loss(loss), index=0, vocab_size=10, max_tokens=10)

    on_a_store(work)


@pytest.mark.parametrize("given", [None, [0.0, 0.0, -9.0, -9.0, -9.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
def test_stable_reinforce_reads_the_record_and_not_the_datum(given: list[float] | None) -> None:
    async def work(sequences: Sequences, store: Store, clock: Clock) -> None:
        await recorded(sequences)
        datum = rl_loop_datum(logprobs=given)
        attached = await sequences.attach("me", [datum], "stable_reinforce")
        assert attached[0].loss_fn_inputs["logprobs"].tolist() == [0.0, 0.0, *LOGPROBS]
        assert attached[0].loss_fn_inputs["logprobs"].dtype == "float32"
        assert (await sequences.attach("me", [datum], "ppo"))[0] is datum  # no other loss is touched

    on_a_store(work)


def test_several_turns_take_each_their_own_record() -> None:
    """Observation [5 6 7], action [8 9 2], observation [.. 3 4], action [1 1]; the second request's prompt holds the first action."""

    async def work(sequences: Sequences, store: Store, clock: Clock) -> None:
        await recorded(sequences)
        second = sequence("sampler:2:0", [1, 1], [-2.0, -3.0])
        await sequences.record("me", [*PROMPT, *SAMPLED, 3, 4], SampleResponse(sequences=[second]), 4)
        full = [*PROMPT, *SAMPLED, 3, 4, 1, 1]
        datum = rl_loop_datum(
            tokens=full[:-1],
            target_tokens=full[1:],
            logprobs=None,
            advantages=[0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0],
            model_input_spans=[prompt(3), sampled(3), prompt(2, 6, "sampler:2:0"), sampled(1, 0, "sampler:2:0")],
            loss_fn_input_spans=[prompt(2, 1), sampled(3), prompt(2, 6, "sampler:2:0"), sampled(2, 0, "sampler:2:0")],
        )
        (attached,) = await sequences.attach("me", [datum], "stable_reinforce")
        assert attached.loss_fn_inputs["logprobs"].tolist() == [0.0, 0.0, *LOGPROBS, 0.0, 0.0, -2.0, -3.0]

    on_a_store(work)


def test_a_piece_of_a_sequence_takes_its_piece_of_the_record() -> None:
    async def work(sequences: Sequences, store: Store, clock: Clock) -> None:
        await recorded(sequences)
        datum = rl_loop_datum(
            tokens=[7, 8],
            target_tokens=[0, 9],
            logprobs=None,
            advantages=[0.0, 1.0],
            model_input_spans=[prompt(1, 2), sampled(1), prompt(0)],
            loss_fn_input_spans=[sampled(0), prompt(1, 2), sampled(1, 1)],
        )
        (attached,) = await sequences.attach("me", [datum], "stable_reinforce")
        assert attached.loss_fn_inputs["logprobs"].tolist() == [0.0, -0.25]

    on_a_store(work)


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "short model_input spans": (
        {"model_input_spans": [prompt(3), sampled(1)]},
        r"datum 1: model_input_spans cover 4 positions, the field has 5; they must tile it",
    ),
    "long target spans": (
        {"loss_fn_input_spans": [prompt(2, 1), sampled(3), sampled(1)]},
        r"datum 1: loss_fn_input_spans cover 6 positions, the field has 5",
    ),
    "spans without targets": ({"target_tokens": None}, r"datum 1: loss_fn_input_spans without 'target_tokens'"),
    "other prompt tokens": (
        {"tokens": [5, 4, 7, 8, 9]},
        r"datum 1: model_input is 4 at position 1, but token 1 of the prompt of sequence 'sampler:1:0' is 6",
    ),
    "other sampled tokens": ({"tokens": [5, 6, 7, 8, 8]}, r"model_input is 8 at position 4, but token 1 of the sampled tokens of"),
    "other targets": ({"target_tokens": [0, 0, 8, 9, 3]}, r"target_tokens is 3 at position 4, but token 2 of the sampled tokens .* is 2"),
    "a wrong offset": (
        {"loss_fn_input_spans": [prompt(2), sampled(2, 1), sampled(1, 2)]},
        r"target_tokens is 8 at position 2, but token 1",
    ),
    "a span beyond the sequence": (
        {"loss_fn_input_spans": [prompt(2, 1), sampled(3, 1)]},
        r"span at position 2: offset 1 and length 3 reach beyond the sampled tokens of sequence 'sampler:1:0', which has 3",
    ),
    "a span beyond the prompt": ({"loss_fn_input_spans": [prompt(2, 2), sampled(3)]}, r"reach beyond the prompt of sequence"),
    "prompt and sampled exchanged": (
        {"model_input_spans": [sampled(3), prompt(2)]},
        r"model_input is 5 at position 0, but token 0 of the s",
    ),
}


@pytest.mark.parametrize("loss", [*LOSSES, "cross_entropy"])
@pytest.mark.parametrize("case", BROKEN)
def test_a_claim_that_is_not_so_is_refused_for_every_loss(case: str, loss: str) -> None:
    changes, message = BROKEN[case]

    async def work(sequences: Sequences, store: Store, clock: Clock) -> None:
        await recorded(sequences)
        with pytest.raises(InvalidRequestError, match=message):
            await sequences.attach("me", [rl_loop_datum(), rl_loop_datum(**changes)], loss)

    on_a_store(work)


def test_an_unknown_sequence_is_an_error_for_stable_reinforce_only() -> None:
    async def work(sequences: Sequences, store: Store, clock: Clock) -> None:
        wrong = rl_loop_datum(target_tokens=[0, 0, 1, 1, 1])  # nobody can tell
        assert await sequences.attach("me", [wrong], "ppo") == [wrong]
        with pytest.raises(InvalidRequestError, match=r"datum 0: model_input, span at position 0: sequence 'sampler:1:0' is not on record"):
            await sequences.attach("me", [rl_loop_datum()], "stable_reinforce")

    on_a_store(work)


def test_the_tiling_of_unknown_sequences_is_checked_as_well() -> None:
    async def work(sequences: Sequences, store: Store, clock: Clock) -> None:
        with pytest.raises(InvalidRequestError, match="must tile it"):
            await sequences.attach("me", [rl_loop_datum(model_input_spans=[prompt(3)])], "ppo")

    on_a_store(work)


def test_the_sequence_of_another_owner_is_unknown() -> None:
    async def work(sequences: Sequences, store: Store, clock: Clock) -> None:
        await recorded(sequences, owner="somebody else")
        wrong = rl_loop_datum(target_tokens=[0, 0, 1, 1, 1])
        assert await sequences.attach("me", [wrong], "ppo") == [wrong]  # no word about what the tokens are
        with pytest.raises(InvalidRequestError, match=r"is not on record.*or not by you"):
            await sequences.attach("me", [rl_loop_datum()], "stable_reinforce")

    on_a_store(work)


def test_a_sequence_is_known_for_a_day_and_then_deleted() -> None:
    async def work(sequences: Sequences, store: Store, clock: Clock) -> None:
        await recorded(sequences)
        clock.now += RETENTION_S
        await sequences.attach("me", [rl_loop_datum()], "stable_reinforce")
        clock.now += 1
        with pytest.raises(InvalidRequestError, match="is not on record"):
            await sequences.attach("me", [rl_loop_datum()], "stable_reinforce")
        await sequences.attach("me", [rl_loop_datum()], "stable_reinforce", as_of=clock.now - 1)  # accepted in time, run again later
        assert list(await store.sequence([NAME])) == [NAME]
        clock.now += EXPIRE_EVERY_S
        await sequences.record("me", PROMPT, SampleResponse(sequences=[sequence("sampler:9:0")]), 3)
        assert list(await store.sequence([NAME, "sampler:9:0"])) == ["sampler:9:0"]

    on_a_store(work)


def test_a_datum_without_spans_is_left_as_it_is() -> None:
    async def work(sequences: Sequences, store: Store, clock: Clock) -> None:
        datum = rl_loop_datum(model_input_spans=None, loss_fn_input_spans=None)
        assert (await sequences.attach("me", [datum], "stable_reinforce"))[0] is datum

    on_a_store(work)


def test_an_advantage_on_a_prompt_is_refused_for_stable_reinforce() -> None:
    async def work(sequences: Sequences, store: Store, clock: Clock) -> None:
        await recorded(sequences)
        datum = rl_loop_datum(advantages=[0.0, 0.5, 1.0, 1.0, 1.0])
        await sequences.attach("me", [datum], "ppo")
        with pytest.raises(InvalidRequestError, match=r"datum 0: 'advantages' is 0.5 at position 1, which lies on a prompt span"):
            await sequences.attach("me", [datum], "stable_reinforce")

    on_a_store(work)


@pytest.mark.parametrize(
    "datum",
    [
        Datum(ModelInput(chunks=[ImageChunk(data=b"x", format="png", expected_tokens=2)]), {}, [prompt(2)], [prompt(2)]),
        rl_loop_datum(advantages=[1.0]),
        rl_loop_datum(advantages=None),
        rl_loop_datum(target_tokens=[[1, 2]] * 5),
        rl_loop_datum(target_tokens=TensorData([7], "int64", [5, 10**13], [0, 1, 1, 1, 1, 1], [0])),
        rl_loop_datum(target_tokens=TensorData([3], "int64", []), loss_fn_input_spans=[sampled(1)]),
        rl_loop_datum(tokens=[2**70, 6, 7, 8, 9], model_input_spans=[prompt(3, name="x"), sampled(2, name="x")]),
    ],
    ids=["image", "short advantages", "no advantages", "two targets", "huge claim", "one number", "huge token"],
)
def test_what_check_datum_refuses_by_name_is_left_to_it(datum: Datum) -> None:
    async def work(sequences: Sequences, store: Store, clock: Clock) -> None:
        await recorded(sequences)
        loss = "ppo" if any(span.sequence_id == "x" for span in datum.model_input_spans or ()) else "stable_reinforce"
        (attached,) = await sequences.attach("me", [datum], loss)
        with pytest.raises(InvalidRequestError, match="datum 0"):
            check_datum(attached, resolve_loss(loss), index=0, vocab_size=10, max_tokens=10)

    on_a_store(work)


def test_what_was_recorded_is_what_was_sampled() -> None:
    async def work(sequences: Sequences, store: Store, clock: Clock) -> None:
        later = SampledSequence.from_lists([4], [-0.125], stop_reason="length", sequence_id="sampler:1:1", policy_version=7)
        empty = sequence("sampler:1:2", [], [])
        await sequences.record("me", PROMPT, SampleResponse(sequences=[sequence(), later, empty]), 3)
        rows = await store.sequence([NAME, "sampler:1:1", "sampler:1:2"])
        assert [rows[name].version for name in (NAME, "sampler:1:1", "sampler:1:2")] == [3, 7, 3]
        assert np.frombuffer(rows[NAME].prompt_tokens, "<i4").tolist() == PROMPT
        assert np.frombuffer(rows["sampler:1:1"].logprobs, "<f4").tolist() == [-0.125]
        assert (rows["sampler:1:2"].tokens, rows[NAME].owner, rows[NAME].created) == (b"", "me", clock.now)

    on_a_store(work)


@pytest.mark.parametrize("logprobs", [None, [-0.5]])
def test_a_sequence_without_its_log_probabilities_is_not_recorded(logprobs: list[float] | None) -> None:
    async def work(sequences: Sequences, store: Store, clock: Clock) -> None:
        with pytest.raises(EngineError, match="without a log-probability for each of its tokens"):
            await sequences.record("me", PROMPT, SampleResponse(sequences=[sequence(logprobs=logprobs)]), 3)

    on_a_store(work)


def test_the_notice_about_the_formula_is_given_once(caplog: pytest.LogCaptureFixture) -> None:
    async def work(sequences: Sequences, store: Store, clock: Clock) -> None:
        await recorded(sequences)
        with caplog.at_level(logging.WARNING):
            await sequences.attach("me", [rl_loop_datum()], "ppo")
            assert caplog.records == []
            for _ in range(2):
                await sequences.attach("me", [rl_loop_datum()], "stable_reinforce")
        assert [record.message for record in caplog.records if "ptlab's formula, not the hosted service's" in record.message] != []
        assert len(caplog.records) == 1

    on_a_store(work)
