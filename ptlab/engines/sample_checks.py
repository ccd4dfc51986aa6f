"""What a sampler refuses before it queues a request, in the same words for every sampler."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ptlab.engines.protocols import BaseModelInfo, SampleCall
from ptlab.errors import InvalidRequestError

MAX_ALT_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class CheckedCall:
    """What a valid request comes down to."""

    tokens: list[int]
    """The prompt."""
    max_tokens: int
    """As asked, or all the context holds."""


def check_call(call: SampleCall, info: BaseModelInfo) -> CheckedCall:
    """Raises: InvalidRequestError naming the field, what was found and what is possible. `stop` is checked by resolve_stop()."""
    for index, chunk in enumerate(call.prompt.chunks):
        if chunk.type != "encoded_text":
            raise InvalidRequestError(f"prompt chunk {index} is of type {chunk.type!r}; {info.name} reads 'encoded_text' (token ids) only")
    tokens = call.prompt.to_ints()
    if not tokens:
        raise InvalidRequestError("the prompt is empty; give at least one token (the begin-of-text token where there is nothing to say)")
    if min(tokens) < 0 or max(tokens) >= info.vocab_size:
        position, token = next((i, t) for i, t in enumerate(tokens) if not 0 <= t < info.vocab_size)
        raise InvalidRequestError(f"prompt token {position} is {token}; {info.name} has token ids 0 .. {info.vocab_size - 1}")
    if call.num_samples < 1:
        raise InvalidRequestError(f"num_samples is {call.num_samples}; it must be at least 1 (for prompt scores alone: 1, max_tokens=1)")
    if call.sequence_ids and (len(call.sequence_ids) != call.num_samples or len(set(call.sequence_ids)) != call.num_samples):
        raise InvalidRequestError(f"sequence_ids must be {call.num_samples} different ids, one per sample; got {list(call.sequence_ids)!r}")
    _check_params(call)
    _check_scores(call, len(tokens), info)
    return CheckedCall(tokens, _max_tokens(call.params.max_tokens, len(tokens), info.max_context_length))


def _max_tokens(asked: int | None, prompt_length: int, limit: int) -> int:
    room = limit - prompt_length
    if asked is None:
        asked = max(1, room)
    if asked < 1:
        raise InvalidRequestError(f"sampling_params.max_tokens is {asked}; it must be at least 1, or None for all the context holds")
    if asked > room:
        raise InvalidRequestError(f"Prompt length plus max_tokens exceeds the model's context window: {prompt_length} + {asked} > {limit}")
    return asked


def _check_params(call: SampleCall) -> None:
    params = call.params
    if not (math.isfinite(params.temperature) and params.temperature >= 0):
        raise InvalidRequestError(f"sampling_params.temperature is {params.temperature}; it must be a finite number, 0 (greedy) or above")
    if not 0 < params.top_p <= 1:
        raise InvalidRequestError(f"sampling_params.top_p is {params.top_p}; it must be above 0 and at most 1 (1 = off)")
    if params.top_k != -1 and params.top_k < 1:
        raise InvalidRequestError(f"sampling_params.top_k is {params.top_k}; it must be at least 1, or -1 for off")


def _check_scores(call: SampleCall, prompt_length: int, info: BaseModelInfo) -> None:
    for field, k, largest in (
        ("topk_prompt_logprobs", call.topk_prompt_logprobs, info.vocab_size),
        ("topk_sample_logprobs", call.topk_sample_logprobs, info.vocab_size),
        ("prompt_alt_tokens_k", call.prompt_alt_tokens_k, MAX_ALT_TOKENS),
    ):
        if not 0 <= k <= largest:
            raise InvalidRequestError(f"{field} is {k}; it must lie in 0 .. {largest}")
    last_n = call.prompt_logprobs_last_n
    if last_n is not None and last_n < 1:
        raise InvalidRequestError(f"prompt_logprobs_last_n is {last_n}; it must be at least 1, or None for the whole prompt")
    if last_n is not None and not call.include_prompt_logprobs:
        raise InvalidRequestError("prompt_logprobs_last_n applies to prompt log-probabilities; set include_prompt_logprobs as well")
    target = call.target_prompt_logprobs
    if target is None:
        return
    if target.dtype != "int64" or target.shape is None or len(target.shape) != 2 or target.shape[0] != prompt_length - 1:
        raise InvalidRequestError(
            f"target_prompt_logprobs is {target.dtype} with shape {target.shape}; the prompt of {prompt_length} tokens needs int64 "
            f"of shape [{prompt_length - 1}, K], whose row i scores prompt position i + 1 (-1 = nothing)"
        )
    ids = target.to_numpy(pad_value=-1)
    if ids.size and not (ids.min() >= -1 and ids.max() < info.vocab_size):
        raise InvalidRequestError(
            f"target_prompt_logprobs holds token ids {ids.min()} .. {ids.max()}; {info.name} has 0 .. {info.vocab_size - 1} (-1 = nothing)"
        )
