"""What sampling gives: sequences, their log-probabilities, and scores of the prompt. All log-probabilities in nats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from ptlab.types.tensor_data import TensorData, as_tensor_data

StopReason: TypeAlias = Literal["length", "stop"]
TopkRow: TypeAlias = list[tuple[int, float]] | None
"""(token, logprob), most likely first; None = this position was not scored."""

MASK_LOGPROB: Final = -99999.0
"""Log-probability (with token 0) of an empty cell in TopkLogprobs."""


@dataclass(frozen=True, slots=True, eq=False)
class TopkLogprobs:
    """The k most likely tokens of n positions as two [n, k] arrays; an empty cell is token 0 with logprob -99999."""

    token_ids: npt.NDArray[Any]
    """int32 [n, k]."""
    logprobs: npt.NDArray[Any]
    """float32 [n, k]."""

    @classmethod
    def from_lists(cls, rows: Sequence[Sequence[tuple[int, float]] | None], k: int) -> TopkLogprobs:
        token_ids = np.zeros((len(rows), k), dtype=np.int32)
        logprobs = np.full((len(rows), k), MASK_LOGPROB, dtype=np.float32)
        for index, row in enumerate(rows):
            for column, (token, logprob) in enumerate((row or ())[:k]):
                token_ids[index, column] = token
                logprobs[index, column] = logprob
        return cls(token_ids, logprobs)

    def to_lists(self) -> list[TopkRow]:
        """One list per position without its empty cells at the end; None where the first cell is empty."""
        rows: list[TopkRow] = []
        for tokens, logprobs in zip(self.token_ids.tolist(), self.logprobs.tolist(), strict=True):
            cells = list(zip(tokens, logprobs, strict=True))
            while cells and cells[-1] == (0, MASK_LOGPROB):
                cells.pop()
            rows.append(cells or None)
        return rows


@dataclass(frozen=True)
class PromptAltTokens:
    """k draws for every prompt position after the first; row i holds alternatives to prompt[i + 1]."""

    tokens: TensorData
    """int64 [len(prompt) - 1, k]."""
    logprobs: TensorData
    """float32 [len(prompt) - 1, k]."""


@dataclass(frozen=True, eq=False)
class SampledSequence:
    """One draw. The stop token, if any, is its last token."""

    stop_reason: StopReason
    sequence_id: str
    """Unique; names this draw in provenance spans."""
    tokens_np: npt.NDArray[Any] | None = field(default=None, repr=False)
    """int32 [num_tokens]."""
    logprobs_np: npt.NDArray[Any] | None = field(default=None, repr=False)
    """float32 [num_tokens], under the temperature-scaled distribution; None = not asked for."""
    topk_logprobs_np: TopkLogprobs | None = field(default=None, repr=False)
    """[num_tokens, k]; None = not asked for."""
    _tokens_list: list[int] | None = field(default=None, repr=False)
    _logprobs_list: list[float] | None = field(default=None, repr=False)
    _topk_logprobs_list: list[TopkRow] | None = field(default=None, repr=False)
    policy_version: int | None = None
    """Optimizer steps behind the weights that sampled it; 0 = as initialised or the base model, None = unknown. ptlab's own field."""

    @classmethod
    def from_lists(
        cls,
        tokens: Sequence[int],
        logprobs: Sequence[float] | None,
        *,
        stop_reason: StopReason,
        sequence_id: str,
        topk_logprobs: TopkLogprobs | None = None,
        policy_version: int | None = None,
    ) -> SampledSequence:
        return cls(
            stop_reason=stop_reason,
            sequence_id=sequence_id,
            tokens_np=np.array(tokens, dtype=np.int32),
            logprobs_np=None if logprobs is None else np.array(logprobs, dtype=np.float32),
            topk_logprobs_np=topk_logprobs,
            policy_version=policy_version,
        )

    @cached_property
    def tokens(self) -> list[int]:
        if self._tokens_list is not None:
            return self._tokens_list
        return [] if self.tokens_np is None else [int(token) for token in self.tokens_np.tolist()]

    @cached_property
    def logprobs(self) -> list[float] | None:
        """As many as tokens; None = not asked for."""
        if self._logprobs_list is not None:
            return self._logprobs_list
        return None if self.logprobs_np is None else [float(logprob) for logprob in self.logprobs_np.tolist()]

    @cached_property
    def topk_logprobs(self) -> list[TopkRow] | None:
        if self._topk_logprobs_list is not None:
            return self._topk_logprobs_list
        return None if self.topk_logprobs_np is None else self.topk_logprobs_np.to_lists()


@dataclass(frozen=True, eq=False)
class SampleResponse:
    """The draws of one request, and what was asked about its prompt."""

    sequences: Sequence[SampledSequence]
    prompt_logprobs_np: npt.NDArray[Any] | None = field(default=None, repr=False)
    """float32 [len(prompt)] at temperature 1, NaN where not scored (always the first); None = not asked for."""
    topk_prompt_logprobs_np: TopkLogprobs | None = field(default=None, repr=False)
    """[len(prompt), k]; None = not asked for."""
    target_prompt_logprobs: TensorData | None = None
    """float32 in the shape and layout of the request's target_prompt_logprobs, 0.0 where that was -1."""
    prompt_cache_hit_tokens: int = 0
    prompt_alt_tokens: PromptAltTokens | None = None
    _prompt_logprobs_list: list[float | None] | None = field(default=None, repr=False)
    _topk_prompt_logprobs_list: list[TopkRow] | None = field(default=None, repr=False)

    @cached_property
    def prompt_logprobs(self) -> list[float | None] | None:
        """One per prompt token, the first None: element i is log p(prompt[i] | prompt[:i])."""
        if self._prompt_logprobs_list is not None:
            return self._prompt_logprobs_list
        if self.prompt_logprobs_np is None:
            return None
        return [None if np.isnan(logprob) else float(logprob) for logprob in self.prompt_logprobs_np]

    @cached_property
    def topk_prompt_logprobs(self) -> list[TopkRow] | None:
        if self._topk_prompt_logprobs_list is not None:
            return self._topk_prompt_logprobs_list
        return None if self.topk_prompt_logprobs_np is None else self.topk_prompt_logprobs_np.to_lists()


def prompt_logprobs_to_numpy(logprobs: Sequence[float | None]) -> npt.NDArray[np.float32]:
    """float32 with NaN for None, as SampleResponse.prompt_logprobs_np holds them."""
    return np.array([np.nan if logprob is None else logprob for logprob in logprobs], dtype=np.float32)


@runtime_checkable
class SampleResponseLike(Protocol):
    """The structure of the official SDK's SampleResponse, old and new."""

    @property
    def sequences(self) -> Any: ...
    @property
    def prompt_logprobs(self) -> Any: ...
    @property
    def topk_prompt_logprobs(self) -> Any: ...


@runtime_checkable
class _RecentSampleResponseLike(SampleResponseLike, Protocol):
    @property
    def target_prompt_logprobs(self) -> Any: ...
    @property
    def prompt_alt_tokens(self) -> Any: ...
    @property
    def prompt_cache_hit_tokens(self) -> Any: ...


@runtime_checkable
class _RecentSequenceLike(Protocol):
    @property
    def sequence_id(self) -> Any: ...
    @property
    def topk_logprobs(self) -> Any: ...


def as_sample_response(value: Any) -> SampleResponse:
    """Ours, unchanged, or ours made from the official SDK's by structure (policy_version None: it does not tell)."""
    if isinstance(value, SampleResponse):
        return value
    if not isinstance(value, SampleResponseLike):
        raise TypeError(f"expected a SampleResponse, got {type(value).__name__}")
    rest: Mapping[str, Any] = {}
    if isinstance(value, _RecentSampleResponseLike):
        target, alternatives = value.target_prompt_logprobs, value.prompt_alt_tokens
        rest = {
            "prompt_cache_hit_tokens": value.prompt_cache_hit_tokens,
            "target_prompt_logprobs": None if target is None else as_tensor_data(target),
            "prompt_alt_tokens": None
            if alternatives is None
            else PromptAltTokens(as_tensor_data(alternatives.tokens), as_tensor_data(alternatives.logprobs)),
        }
    logprobs = value.prompt_logprobs
    return SampleResponse(
        sequences=[_own_sequence(sequence, index) for index, sequence in enumerate(value.sequences)],
        prompt_logprobs_np=None if logprobs is None else prompt_logprobs_to_numpy(logprobs),
        topk_prompt_logprobs_np=_own_topk(value.topk_prompt_logprobs),
        **rest,
    )


def _own_sequence(sequence: Any, index: int) -> SampledSequence:
    recent = isinstance(sequence, _RecentSequenceLike)
    return SampledSequence.from_lists(
        sequence.tokens,
        sequence.logprobs,
        stop_reason=sequence.stop_reason,
        sequence_id=sequence.sequence_id if recent else str(index),
        topk_logprobs=_own_topk(sequence.topk_logprobs) if recent else None,
    )


def _own_topk(rows: Sequence[Sequence[tuple[int, float]] | None] | None) -> TopkLogprobs | None:
    return None if rows is None else TopkLogprobs.from_lists(rows, max((len(row) for row in rows if row), default=0))
