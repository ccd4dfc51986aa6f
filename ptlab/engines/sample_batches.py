"""From the requests gathered by the sampler to batches, and from the draws back to responses."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ptlab.engines.generation import Draw, Drawn
from ptlab.engines.prompt_scores import PromptScorer, wants_scores
from ptlab.engines.protocols import AdapterRef, PromptScores, SampleCall
from ptlab.engines.sample_checks import CheckedCall
from ptlab.engines.stop import StopRule
from ptlab.types import SampledSequence, SampleResponse, TopkLogprobs
from ptlab.types.sampled import MASK_LOGPROB


@dataclass(slots=True)
class Job:
    """One accepted request on its way through the worker."""

    call: SampleCall
    checked: CheckedCall
    stop: StopRule
    seed: int
    future: Future[SampleResponse]
    drawn: dict[int, Drawn] = field(default_factory=dict)
    """By sample number; complete at num_samples."""
    scores: PromptScores | None = None

    def sort_key(self) -> tuple[object, ...]:
        """Canonical: batches, and so the last bits of the results, do not depend on the order of arrival."""
        params = self.call.params
        return (
            len(self.checked.tokens),
            self.checked.tokens,
            self.checked.max_tokens,
            (params.temperature, params.top_k, params.top_p),
            (sorted(self.stop.token_ids), self.stop.texts),
            self.seed,
            self.call.num_samples,
        )

    def response(self) -> SampleResponse:
        """Raises: KeyError if a draw is missing."""
        call, scores = self.call, self.scores
        return SampleResponse(
            sequences=[self._sequence(index, self.drawn[index]) for index in range(call.num_samples)],
            prompt_logprobs_np=None if scores is None else scores.logprobs_T,
            topk_prompt_logprobs_np=None if scores is None else scores.topk,
            target_prompt_logprobs=None if scores is None else scores.targets,
            prompt_alt_tokens=None if scores is None else scores.alternatives,
        )

    def _sequence(self, index: int, drawn: Drawn) -> SampledSequence:
        topk = None
        if self.call.topk_sample_logprobs:
            empty_TK = drawn.topk_logprobs_TK == -torch.inf
            drawn.topk_tokens_TK[empty_TK], drawn.topk_logprobs_TK[empty_TK] = 0, MASK_LOGPROB
            topk = TopkLogprobs(drawn.topk_tokens_TK, drawn.topk_logprobs_TK)
        return SampledSequence(
            stop_reason="stop" if drawn.stopped else "length",
            sequence_id=self.call.sequence_ids[index] if self.call.sequence_ids else str(uuid.uuid4()),
            tokens_np=drawn.tokens_T,
            logprobs_np=drawn.logprobs_T,
            topk_logprobs_np=topk,
            policy_version=0 if self.call.adapter is None else self.call.adapter.version,
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """Draws that run together: one adapter, prompts sorted by length."""

    adapter: AdapterRef | None
    draws: tuple[tuple[Job, int], ...]
    """(job, sample number)."""

    @property
    def jobs(self) -> list[Job]:
        return list({id(job): job for job, _ in self.draws}.values())

    def halves(self) -> tuple[Batch, Batch]:
        middle = len(self.draws) // 2
        return Batch(self.adapter, self.draws[:middle]), Batch(self.adapter, self.draws[middle:])


def plan_batches(jobs: Iterable[Job], *, max_tokens: int, max_rows: int) -> list[Batch]:
    """Batches of at most `max_rows` rows and, padding included, `max_tokens` tokens at full length; a larger single row runs alone.

    Requests on different adapters, and those with and without prompt scores, do not mix.
    """
    groups: dict[tuple[str, bool], list[Job]] = {}
    for job in jobs:
        adapter = job.call.adapter
        groups.setdefault(("" if adapter is None else f"{adapter.name} {adapter.path}", wants_scores(job.call)), []).append(job)
    return [batch for _, group in sorted(groups.items(), key=lambda item: item[0]) for batch in _split(group, max_tokens, max_rows)]


def _split(group: list[Job], max_tokens: int, max_rows: int) -> Iterator[Batch]:
    rows: list[tuple[Job, int]] = []
    width = answer = 0
    for job in sorted(group, key=Job.sort_key):
        for sample in range(job.call.num_samples):
            wider, longer = max(width, len(job.checked.tokens)), max(answer, job.checked.max_tokens)
            if rows and (len(rows) == max_rows or (len(rows) + 1) * (wider + longer) > max_tokens):
                yield Batch(group[0].call.adapter, tuple(rows))
                rows, wider, longer = [], len(job.checked.tokens), job.checked.max_tokens
            rows.append((job, sample))
            width, answer = wider, longer
    yield Batch(group[0].call.adapter, tuple(rows))


class BatchInputs:
    """What generate() needs for a batch: distinct prompts, one Draw per row, and scorers for jobs whose prompts are not scored yet."""

    def __init__(self, batch: Batch, device: torch.device) -> None:
        self.jobs = batch.jobs
        owners = {id(job): owner for owner, job in enumerate(self.jobs)}
        numbers: dict[tuple[int, ...], int] = {}
        for job in self.jobs:
            numbers.setdefault(tuple(job.checked.tokens), len(numbers))
        self.prompts: Sequence[Sequence[int]] = list(numbers)
        self.draws = [_draw(job, sample, numbers[tuple(job.checked.tokens)], owners[id(job)]) for job, sample in batch.draws]
        self._scorers = {
            owner: PromptScorer(job.call, job.checked.tokens, job.seed, device)
            for owner, job in enumerate(self.jobs)
            if wants_scores(job.call) and job.scores is None
        }
        self._numbers = [numbers[tuple(job.checked.tokens)] for job in self.jobs]
        self._width = max(len(prompt) for prompt in self.prompts)

    @property
    def has_scorers(self) -> bool:
        return bool(self._scorers)

    def score(self, logits_PCV: Tensor, column: int) -> None:
        """One chunk of the padded prompts' logits, to every scorer its row."""
        for owner, scorer in self._scorers.items():
            prompt = self._numbers[owner]
            scorer.add(logits_PCV[prompt], column - (self._width - len(self.prompts[prompt])))

    def gone(self) -> set[int]:
        """Owners whose request was cancelled."""
        return {owner for owner, job in enumerate(self.jobs) if job.future.cancelled()}

    def deliver(self, batch: Batch, results: Sequence[Drawn | None]) -> None:
        """Hand draws and scores to the jobs; answer those that are complete."""
        for owner, scorer in self._scorers.items():
            self.jobs[owner].scores = scorer.scores()
        for (job, sample), drawn in zip(batch.draws, results, strict=True):
            if drawn is not None:
                job.drawn[sample] = drawn
        for job in self.jobs:
            if len(job.drawn) == job.call.num_samples and job.future.set_running_or_notify_cancel():
                job.future.set_result(job.response())


def _draw(job: Job, sample: int, prompt: int, owner: int) -> Draw:
    params = job.call.params
    return Draw(
        prompt=prompt,
        owner=owner,
        seed=job.seed,
        stream=sample,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        max_tokens=job.checked.max_tokens,
        stop=job.stop,
        topk=job.call.topk_sample_logprobs,
    )
