"""Sampled sequences that stay known for a day, and what provenance spans say about a datum's tokens.

A client that samples with record_stability_info=True gets its sequences remembered here. A datum may then say, span by span, which of
its positions stood in the prompt of which sequence and which were sampled by it; what is claimed of a known sequence is checked, and
the loss `stable_reinforce` reads the log-probabilities on record instead of what the datum says.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ptlab.backend.store import SequenceRow, Store
from ptlab.errors import EngineError, InvalidRequestError
from ptlab.losses import OWN_FORMULA_NOTICE
from ptlab.types import Datum, EncodedTextChunk, PromptProvenanceSpan, SampledProvenanceSpan, SampleResponse, TensorData

Span = PromptProvenanceSpan | SampledProvenanceSpan
Tokens = npt.NDArray[Any]

RETENTION_S = 24 * 3600.0
EXPIRE_EVERY_S = 600.0
"""How often sequences older than RETENTION_S are deleted, at most; until then they are unknown all the same."""
STABLE_REINFORCE = "stable_reinforce"
NOT_ON_RECORD = (
    "is not on record: it was sampled without record_stability_info=True, more than a day ago, or not by you; "
    "sample from save_weights_and_get_sampling_client(record_stability_info=True)"
)
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Recorded:
    prompt_tokens: Tokens
    tokens: Tokens
    logprobs: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Run:
    """A span at its place: it covers the positions start .. start + span.length - 1 of its field."""

    span: Span
    start: int

    @property
    def positions(self) -> slice:
        return slice(self.start, self.start + self.span.length)

    def told_of(self, recorded: Tokens) -> Tokens:
        return recorded[self.span.offset : self.span.offset + self.span.length]


class Sequences:
    """See the module text.

    Args:
        now: unix seconds.
    """

    def __init__(self, store: Store, now: Callable[[], float] = time.time) -> None:
        self._store = store
        self._now = now
        self._next_expiry = 0.0
        self._notice_given = False

    async def record(self, owner: str, prompt_tokens: Sequence[int], response: SampleResponse, policy_version: int) -> None:
        """Remember the sequences of a sample for RETENTION_S.

        Args:
            policy_version: optimizer steps behind the weights, for sequences that do not say it themselves.
        """
        created, prompt = self._now(), np.asarray(prompt_tokens, dtype="<i4").tobytes()
        rows = []
        for sequence in response.sequences:
            if sequence.tokens_np is None or sequence.logprobs_np is None or len(sequence.tokens_np) != len(sequence.logprobs_np):
                raise EngineError(
                    f"sequence {sequence.sequence_id} came without a log-probability for each of its tokens; it cannot be recorded",
                    engine="sampler",
                    operation="sample",
                )
            rows.append(
                SequenceRow(
                    sequence_id=sequence.sequence_id,
                    owner=owner,
                    prompt_tokens=prompt,
                    tokens=sequence.tokens_np.astype("<i4").tobytes(),
                    logprobs=sequence.logprobs_np.astype("<f4").tobytes(),
                    version=policy_version if sequence.policy_version is None else sequence.policy_version,
                    created=created,
                )
            )
        await self._store.add_sequences(rows)
        if created >= self._next_expiry:
            self._next_expiry = created + EXPIRE_EVERY_S
            await self._store.expire_sequences(created - RETENTION_S)

    async def attach(self, owner: str, data: Sequence[Datum], loss_name: str, *, as_of: float | None = None) -> list[Datum]:
        """The data with their spans checked; for stable_reinforce, with the log-probabilities on record as `logprobs`.

        Spans must tile their fields; offsets, lengths and tokens must be those on record where the sequence is known (target_tokens on
        a prompt may be any placeholder). A sequence that is not known is an error for stable_reinforce only, and so is an advantage on
        a token that was not sampled. A datum without spans is left as it is: its own `logprobs` serve.

        Args:
            as_of: when the request was accepted (unix seconds), for one that is run again later; None = now.
        Raises: InvalidRequestError, naming the datum, the field and the span.
        """
        if loss_name == STABLE_REINFORCE and not self._notice_given:
            self._notice_given = True
            logger.warning("%s", OWN_FORMULA_NOTICE)
        named = {span.sequence_id for datum in data for span in (*(datum.model_input_spans or ()), *(datum.loss_fn_input_spans or ()))}
        known = await self._known(owner, sorted(named), self._now() if as_of is None else as_of)
        return [_attach(f"datum {index}", datum, known, loss_name == STABLE_REINFORCE) for index, datum in enumerate(data)]

    async def _known(self, owner: str, sequence_ids: Sequence[str], now: float) -> dict[str, _Recorded]:
        if not sequence_ids:
            return {}
        oldest = now - RETENTION_S
        rows = await self._store.sequence(sequence_ids)
        return {
            name: _Recorded(np.frombuffer(row.prompt_tokens, "<i4"), np.frombuffer(row.tokens, "<i4"), np.frombuffer(row.logprobs, "<f4"))
            for name, row in rows.items()
            if row.owner == owner and row.created >= oldest
        }


def _attach(where: str, datum: Datum, known: Mapping[str, _Recorded], needs_record: bool) -> Datum:
    if datum.model_input_spans is None or datum.loss_fn_input_spans is None:
        return datum
    if any(not isinstance(chunk, EncodedTextChunk) for chunk in datum.model_input.chunks):
        return datum  # check_datum refuses it by name
    read = np.asarray(datum.model_input.to_ints())
    targets = datum.loss_fn_inputs.get("target_tokens")
    if targets is None:
        raise InvalidRequestError(f"{where}: loss_fn_input_spans without 'target_tokens'; they say where target_tokens come from")
    for run in _runs(f"{where}: model_input_spans", datum.model_input_spans, len(read)):
        _check_run(f"{where}: model_input", run, read, known, needs_record)
    runs = list(_runs(f"{where}: loss_fn_input_spans", datum.loss_fn_input_spans, _rows(targets)))
    flat = targets.to_numpy() if targets.shape is None or len(targets.shape) == 1 else None
    for run in runs:
        _check_run(f"{where}: target_tokens", run, flat if isinstance(run.span, SampledProvenanceSpan) else None, known, needs_record)
    return _with_recorded(where, datum, runs, known) if needs_record and flat is not None else datum


def _rows(targets: TensorData) -> int:
    return len(targets.data) if targets.shape is None else (targets.shape[0] if targets.shape else 1)


def _runs(where: str, spans: Sequence[Span], num_positions: int) -> Iterator[_Run]:
    covered = sum(span.length for span in spans)
    if covered != num_positions:
        raise InvalidRequestError(f"{where} cover {covered} positions, the field has {num_positions}; they must tile it")
    start = 0
    for span in spans:
        yield _Run(span, start)
        start += span.length


def _check_run(where: str, run: _Run, tokens: Tokens | None, known: Mapping[str, _Recorded], needs_record: bool) -> None:
    """Args: tokens: of the whole field; None = they are not compared."""
    span, recorded = run.span, known.get(run.span.sequence_id)
    if recorded is None:
        if needs_record:
            raise InvalidRequestError(f"{where}, span at position {run.start}: sequence {span.sequence_id!r} {NOT_ON_RECORD}")
        return
    sampled = isinstance(span, SampledProvenanceSpan)
    part, source = ("sampled tokens", recorded.tokens) if sampled else ("prompt", recorded.prompt_tokens)
    if span.offset + span.length > len(source):
        raise InvalidRequestError(
            f"{where}, span at position {run.start}: offset {span.offset} and length {span.length} reach beyond the {part} of sequence "
            f"{span.sequence_id!r}, which has {len(source)}"
        )
    if tokens is None:
        return
    differs = tokens[run.positions] != run.told_of(source)
    if differs.any():
        at = int(np.argmax(differs))
        raise InvalidRequestError(
            f"{where} is {tokens[run.start + at]} at position {run.start + at}, but token {span.offset + at} of the {part} of sequence "
            f"{span.sequence_id!r} is {source[span.offset + at]}; the span belongs to other tokens"
        )


def _with_recorded(where: str, datum: Datum, runs: Sequence[_Run], known: Mapping[str, _Recorded]) -> Datum:
    """The datum with `logprobs` [N] from the record: 0.0 where nothing was sampled."""
    num_positions = sum(run.span.length for run in runs)
    logprobs, sampled = np.zeros(num_positions, dtype=np.float32), np.zeros(num_positions, dtype=bool)
    for run in runs:
        if isinstance(run.span, SampledProvenanceSpan):
            logprobs[run.positions] = run.told_of(known[run.span.sequence_id].logprobs)
            sampled[run.positions] = True
    advantages = datum.loss_fn_inputs.get("advantages")
    if advantages is not None and advantages.shape in (None, [num_positions]) and len(advantages.data) == num_positions:
        stray = (advantages.to_numpy() != 0) & ~sampled
        if stray.any():
            at = int(np.argmax(stray))
            raise InvalidRequestError(
                f"{where}: 'advantages' is {advantages.to_numpy()[at]} at position {at}, which lies on a prompt span; loss "
                f"{STABLE_REINFORCE!r} trains sampled tokens only (0.0 elsewhere)"
            )
    return replace(datum, loss_fn_inputs={**datum.loss_fn_inputs, "logprobs": TensorData.from_numpy(logprobs)})
