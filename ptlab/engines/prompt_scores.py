"""Scores of prompt tokens, made chunk by chunk while the prompt is read.

All at temperature 1 but prompt_alt_tokens, which are drawn (and scored) at the request's temperature. Position i of a prompt is scored
by the logits of position i - 1, so the first position has no score.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ptlab.engines.logprobs import log_softmax
from ptlab.engines.protocols import PromptScores, SampleCall
from ptlab.engines.token_draw import PROMPT_STREAM, RowParams, UniformStreams, distribution, inverse_cdf
from ptlab.types import PromptAltTokens, TensorData, TopkLogprobs
from ptlab.types.sampled import MASK_LOGPROB


def wants_scores(call: SampleCall) -> bool:
    """Whether the call asks for anything about its prompt."""
    wanted = call.wants_prompt_logprobs or call.prompt_alt_tokens_k > 0
    return wanted or call.target_prompt_logprobs is not None


class PromptScorer:
    """Collects the scores one call asks for about its prompt of T tokens."""

    def __init__(self, call: SampleCall, tokens: Sequence[int], seed: int, device: torch.device) -> None:
        self._call = call
        self._device = device
        length = len(tokens)
        self._tokens_T = torch.tensor(tokens, device=device)
        last_n = call.prompt_logprobs_last_n
        self._first = 1 if last_n is None else max(1, length - last_n)
        self._logprobs_T = np.full(length, np.nan, dtype=np.float32)
        k = call.topk_prompt_logprobs
        self._topk = TopkLogprobs(np.zeros((length, k), dtype=np.int32), np.full((length, k), MASK_LOGPROB, dtype=np.float32))
        target = call.target_prompt_logprobs
        self._targets_SK = None if target is None else target.to_numpy(pad_value=-1)  # S = T - 1
        self._target_logprobs_SK = None if self._targets_SK is None else np.zeros(self._targets_SK.shape, dtype=np.float32)
        k = call.prompt_alt_tokens_k
        self._uniforms_SK = UniformStreams([(seed, PROMPT_STREAM)]).next((length - 1) * k).reshape(length - 1, k)
        self._alt_tokens_SK = np.zeros((length - 1, k), dtype=np.int64)
        self._alt_logprobs_SK = np.zeros((length - 1, k), dtype=np.float32)

    def add(self, logits_CV: Tensor, column: int) -> None:
        """Take the logits of prompt positions column .. column + C - 1 (negative positions are padding)."""
        skip = max(0, -column)
        begin = column + skip + 1  # the prompt position that the first useful row scores
        end = min(column + logits_CV.shape[0] + 1, len(self._tokens_T))
        if begin >= end:
            return
        logits_CV = logits_CV[skip : skip + end - begin].float()
        logprobs_CV = log_softmax(logits_CV)
        if end > self._first:
            late = max(0, self._first - begin)
            where = slice(begin + late, end)
            self._logprobs_T[where] = logprobs_CV[late:].gather(1, self._tokens_T[where, None])[:, 0].cpu().numpy()
            if self._call.topk_prompt_logprobs:
                best_CK, tokens_CK = logprobs_CV[late:].topk(self._call.topk_prompt_logprobs, dim=-1)
                self._topk.token_ids[where], self._topk.logprobs[where] = tokens_CK.cpu().numpy(), best_CK.cpu().numpy()
        rows = slice(begin - 1, end - 1)
        if self._targets_SK is not None and self._target_logprobs_SK is not None:
            targets_CK = torch.from_numpy(self._targets_SK[rows]).to(self._device)
            values_CK = logprobs_CV.gather(1, targets_CK.clamp(min=0)).masked_fill(targets_CK < 0, 0.0)
            self._target_logprobs_SK[rows] = values_CK.cpu().numpy()
        if self._call.prompt_alt_tokens_k:
            self._draw_alternatives(logits_CV, rows)

    def _draw_alternatives(self, logits_CV: Tensor, rows: slice) -> None:
        params = RowParams.build([(self._call.params.temperature, -1, 1.0)] * logits_CV.shape[0], logits_CV.shape[1], self._device)
        logprobs_CV = distribution(logits_CV, params)
        tokens_CK = inverse_cdf(logprobs_CV, torch.from_numpy(self._uniforms_SK[rows]).to(self._device))
        if params.greedy:
            tokens_CK = logprobs_CV.argmax(dim=-1, keepdim=True).expand_as(tokens_CK)
        self._alt_tokens_SK[rows] = tokens_CK.cpu().numpy()
        self._alt_logprobs_SK[rows] = logprobs_CV.gather(1, tokens_CK).cpu().numpy()

    def scores(self) -> PromptScores:
        """What was asked for; call it once all chunks were added."""
        call = self._call
        return PromptScores(
            logprobs_T=self._logprobs_T if call.include_prompt_logprobs else None,
            topk=self._topk if call.topk_prompt_logprobs else None,
            targets=self._target_scores(),
            alternatives=PromptAltTokens(TensorData.from_numpy(self._alt_tokens_SK), TensorData.from_numpy(self._alt_logprobs_SK))
            if call.prompt_alt_tokens_k
            else None,
        )

    def _target_scores(self) -> TensorData | None:
        """In the layout of the request: dense, or the same CSR cells."""
        asked = self._call.target_prompt_logprobs
        if asked is None or self._target_logprobs_SK is None:
            return None
        if asked.sparse_crow_indices is None or asked.sparse_col_indices is None:
            return TensorData(self._target_logprobs_SK, dtype="float32", shape=asked.shape)
        rows = np.repeat(np.arange(len(self._target_logprobs_SK)), np.diff(asked.sparse_crow_indices))
        return TensorData(
            self._target_logprobs_SK[rows, asked.sparse_col_indices],
            dtype="float32",
            shape=asked.shape,
            sparse_crow_indices=asked.sparse_crow_indices,
            sparse_col_indices=asked.sparse_col_indices,
        )
