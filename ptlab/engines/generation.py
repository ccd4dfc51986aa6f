"""Batched generation: read every distinct prompt once, then draw one token a step for all rows that are still running.

Pure with respect to requests: no queue, no adapters, no threads. Rows are left-padded, so all of them add their next token in one column;
positions come from the mask. Python work per step does not grow with the number of rows (but for the few whose stop text is checked).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptlab.engines.decode_step import DecodeStep, ModelStep
from ptlab.engines.kv_cache import new_cache, select_rows
from ptlab.engines.stop import StopRule, StopTexts
from ptlab.engines.token_draw import RowParams, UniformStreams, distribution, pick

UNIFORM_BLOCK = 64  # tokens' worth of random numbers made at once
OWNER_CHECK_STEPS = 8  # how often abandoned requests are looked for
COMPACT_BELOW = 0.875  # finished rows leave the batch when no more than this share is running

_GO_ON, _STOP, _CHECK_TEXT = 0, 1, 2

ScorePrompts = Callable[[Tensor, int], None]
"""Called with (logits [prompts, columns, vocabulary], first column) for every chunk of the padded prompts, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One sequence to sample."""

    prompt: int
    """Index of its prompt in the batch."""
    owner: int
    """The request it belongs to; see `abandoned` of generate()."""
    seed: int
    stream: int
    """Draw number within the request: streams of one seed are independent."""
    temperature: float
    top_k: int
    top_p: float
    max_tokens: int
    stop: StopRule
    topk: int = 0
    """How many of the most likely tokens to report per position."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """What was sampled for a Draw; T <= max_tokens."""

    tokens_T: NDArray[np.int32]
    logprobs_T: NDArray[np.float32]
    """Under the distribution the token was drawn from."""
    stopped: bool
    """False = max_tokens was reached."""
    topk_tokens_TK: NDArray[np.int32]
    topk_logprobs_TK: NDArray[np.float32]
    """Most likely first; -inf where top_k or top_p left fewer than K tokens."""


@dataclass(slots=True)
class Prefilled:
    """The state after reading P prompts, padded on the left to a common width W."""

    logits_PV: Tensor
    """For the first token to draw."""
    cache: Any
    mask_PW: Tensor
    """int64; 0 on padding."""
    lengths_P: Tensor


def prefill(
    model: Any, prompts: Sequence[Sequence[int]], *, chunk_tokens: int, score: ScorePrompts | None = None, score_elements: int = 2**25
) -> Prefilled:
    """Read the prompts in chunks of columns, at most about `chunk_tokens` tokens each; with `score`, at most `score_elements` logits each.

    The logits of the whole prompts never exist at once.
    """
    device = model.device
    lengths = [len(prompt) for prompt in prompts]
    width = max(lengths)
    ids_PW = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    lengths_P = torch.tensor(lengths, device=device)
    mask_PW = (torch.arange(width, device=device)[None, :] >= (width - lengths_P)[:, None]).long()
    positions_PW = (mask_PW.cumsum(-1) - 1).clamp_(min=0)
    padded = min(lengths) < width
    cache = new_cache(model)
    columns = max(1, chunk_tokens // len(prompts))
    if score is not None:
        vocab_size = model.get_output_embeddings().weight.shape[0]
        columns = max(1, min(columns, score_elements // (len(prompts) * vocab_size)))
    logits: Tensor | None = None
    for start in range(0, width, columns):
        end = min(start + columns, width)
        logits = model(
            input_ids=ids_PW[:, start:end],
            attention_mask=mask_PW[:, :end] if padded else None,
            position_ids=positions_PW[:, start:end],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=0 if score is not None else 1,
        ).logits
        if score is not None:
            score(logits, start)
    assert logits is not None
    return Prefilled(logits_PV=logits[:, -1], cache=cache, mask_PW=mask_PW, lengths_P=lengths_P)


class _Record:
    """What the rows of a batch sampled, [steps, rows] on the device; grows by doubling."""

    def __init__(self, rows: int, topk: int, steps: int, device: torch.device) -> None:
        self.tokens = torch.zeros((steps, rows), dtype=torch.int64, device=device)
        self.logprobs = torch.zeros((steps, rows), dtype=torch.float32, device=device)
        self.topk_tokens = torch.zeros((steps, rows, topk), dtype=torch.int64, device=device)
        self.topk_logprobs = torch.zeros((steps, rows, topk), dtype=torch.float32, device=device)

    def make_room(self, step: int) -> None:
        if step == self.tokens.shape[0]:
            self.tokens = torch.cat([self.tokens, torch.zeros_like(self.tokens)])
            self.logprobs = torch.cat([self.logprobs, torch.zeros_like(self.logprobs)])
            self.topk_tokens = torch.cat([self.topk_tokens, torch.zeros_like(self.topk_tokens)])
            self.topk_logprobs = torch.cat([self.topk_logprobs, torch.zeros_like(self.topk_logprobs)])


class _Stops:
    """Stop rules of a batch as one table: what sampling token v means to a row of rule r."""

    def __init__(self, draws: Sequence[Draw], texts: StopTexts, vocab_size: int, device: torch.device) -> None:
        rules = list(dict.fromkeys(draw.stop for draw in draws))
        table = np.full((len(rules), vocab_size), _GO_ON, dtype=np.int8)
        for row, rule in zip(table, rules, strict=True):
            if rule.texts:
                row[texts.may_end(rule.texts)] = _CHECK_TEXT
            row[[token for token in rule.token_ids if token < vocab_size]] = _STOP
        self._table = torch.from_numpy(table).to(device)
        self._has_texts = any(rule.texts for rule in rules)
        self._texts = texts
        self._draws = draws
        index = {rule: i for i, rule in enumerate(rules)}
        self.rule_R = torch.tensor([index[draw.stop] for draw in draws], device=device)

    def check(self, tokens_B: Tensor, running_B: Tensor, rows_B: Tensor, record: _Record, step: int) -> Tensor:
        """bool [B]: whether the token of this step ended its row."""
        verdict_B = self._table[self.rule_R[rows_B], tokens_B]
        ended_B = verdict_B == _STOP
        if self._has_texts:
            for index in ((verdict_B == _CHECK_TEXT) & running_B).nonzero()[:, 0].tolist():
                row = int(rows_B[index])
                rule = self._draws[row].stop
                tail = record.tokens[max(0, step + 1 - self._texts.tail_length(rule.texts)) : step + 1, row]
                if self._texts.found(rule.texts, tail.tolist()):
                    ended_B[index] = True
        return ended_B


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    draws: Sequence[Draw],
    *,
    stop_texts: StopTexts,
    chunk_tokens: int,
    score: ScorePrompts | None = None,
    abandoned: Callable[[], Collection[int]] = tuple,
    next_logits: DecodeStep | None = None,
) -> list[Drawn | None]:
    """Sample every draw after its prompt; prompts are distinct and none is empty.

    Args:
        score: see prefill().
        abandoned: owners whose draws are no longer wanted; asked every few steps. Their result is None.
        next_logits: how a token is added to the cache, with the same adapter; None = by the model itself.

    Runs under inference_mode with whatever adapter is active in the model.
    """
    with torch.inference_mode():
        state = prefill(model, prompts, chunk_tokens=chunk_tokens, score=score)
        return _decode(next_logits or ModelStep(model), state, draws, stop_texts, abandoned)


def _decode(
    next_logits: DecodeStep, state: Prefilled, draws: Sequence[Draw], stop_texts: StopTexts, abandoned: Callable[[], Collection[int]]
) -> list[Drawn | None]:
    device = state.logits_PV.device
    vocab_size = state.logits_PV.shape[-1]
    num_rows, width = len(draws), state.mask_PW.shape[1]
    topk = max(draw.topk for draw in draws)
    longest = max(draw.max_tokens for draw in draws)
    record = _Record(num_rows, topk, min(longest, 256), device)
    stops = _Stops(draws, stop_texts, vocab_size, device)
    streams = UniformStreams([(draw.seed, draw.stream) for draw in draws])
    lengths_R = torch.zeros(num_rows, dtype=torch.int64, device=device)
    stopped_R = torch.zeros(num_rows, dtype=torch.bool, device=device)

    rows_B = torch.arange(num_rows, device=device)  # the rows still in the batch
    running_B = torch.ones(num_rows, dtype=torch.bool, device=device)
    max_tokens_B = torch.tensor([draw.max_tokens for draw in draws], device=device)
    params = _params(draws, range(num_rows), vocab_size, device)
    owners = {draw.owner for draw in draws}

    prompt_B = torch.tensor([draw.prompt for draw in draws], device=device)
    if prompt_B.tolist() != list(range(len(state.lengths_P))):
        select_rows(state.cache, prompt_B)
    logits_BV, next_position_B = state.logits_PV[prompt_B], state.lengths_P[prompt_B]
    padded = bool((state.lengths_P < width).any())
    mask_BW = state.mask_PW[prompt_B]
    uniforms_BN = torch.empty((num_rows, 0), dtype=torch.float64)

    step = 0
    while True:
        if step % UNIFORM_BLOCK == 0:
            uniforms_BN = torch.from_numpy(streams.next(UNIFORM_BLOCK)).to(device)
        record.make_room(step)
        logprobs_BV = distribution(logits_BV, params)
        tokens_B = pick(logprobs_BV, uniforms_BN[:, step % UNIFORM_BLOCK], params)
        record.tokens[step, rows_B] = tokens_B
        record.logprobs[step, rows_B] = logprobs_BV.gather(1, tokens_B[:, None])[:, 0]
        if topk:
            best_BK, best_tokens_BK = logprobs_BV.topk(topk, dim=-1)
            record.topk_logprobs[step, rows_B], record.topk_tokens[step, rows_B] = best_BK, best_tokens_BK

        step += 1
        stop_B = stops.check(tokens_B, running_B, rows_B, record, step - 1) & running_B
        ended_B = (stop_B | (max_tokens_B <= step)) & running_B
        lengths_R[rows_B] = torch.where(ended_B, step, lengths_R[rows_B])
        stopped_R[rows_B] |= stop_B
        running_B = running_B & ~ended_B
        gone = owners.intersection(abandoned()) if step % OWNER_CHECK_STEPS == 0 else ()
        if gone:
            running_B = running_B & torch.tensor([draws[row].owner not in gone for row in rows_B.tolist()], device=device)
            owners = owners.difference(gone)
        num_running = int(running_B.sum())
        if num_running == 0:
            break
        if num_running <= COMPACT_BELOW * len(rows_B):
            kept = running_B.nonzero()[:, 0]
            select_rows(state.cache, kept)
            rows_B, running_B, max_tokens_B, tokens_B = rows_B[kept], running_B[kept], max_tokens_B[kept], tokens_B[kept]
            next_position_B, mask_BW, uniforms_BN = next_position_B[kept], mask_BW[kept], uniforms_BN[kept]
            streams.keep(kept.tolist())
            params = _params(draws, rows_B.tolist(), vocab_size, device)
        if padded:
            mask_BW = torch.cat([mask_BW, mask_BW.new_ones((len(rows_B), 1))], dim=1)
        logits_BV = next_logits(tokens_B, next_position_B, mask_BW if padded else None, state.cache)
        next_position_B = next_position_B + 1
    return _collect(draws, record, step, lengths_R, stopped_R)


def _params(draws: Sequence[Draw], rows: Sequence[int], vocab_size: int, device: torch.device) -> RowParams:
    return RowParams.build([(draws[row].temperature, draws[row].top_k, draws[row].top_p) for row in rows], vocab_size, device)


def _collect(draws: Sequence[Draw], record: _Record, steps: int, lengths_R: Tensor, stopped_R: Tensor) -> list[Drawn | None]:
    """The rows of the record, cut to their lengths; None for a row that was abandoned (it never ended)."""
    tokens = record.tokens[:steps].T.to("cpu", torch.int32).contiguous().numpy()
    logprobs = record.logprobs[:steps].T.cpu().contiguous().numpy()
    topk_tokens = record.topk_tokens[:steps].transpose(0, 1).to("cpu", torch.int32).numpy()
    topk_logprobs = record.topk_logprobs[:steps].transpose(0, 1).cpu().numpy()
    drawn: list[Drawn | None] = []
    for row, (draw, length, stopped) in enumerate(zip(draws, lengths_R.tolist(), stopped_R.tolist(), strict=True)):
        drawn.append(
            Drawn(
                tokens_T=tokens[row, :length].copy(),
                logprobs_T=logprobs[row, :length].copy(),
                stopped=stopped,
                topk_tokens_TK=topk_tokens[row, :length, : draw.topk].copy(),
                topk_logprobs_TK=topk_logprobs[row, :length, : draw.topk].copy(),
            )
            if length
            else None
        )
    return drawn
