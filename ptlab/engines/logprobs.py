"""Token log-probabilities from hidden states, without the [tokens x vocabulary] logits.

The output head runs on chunks of tokens. Each chunk's logits are reduced to the few numbers a loss needs (log p of the target
tokens) and dropped; the backward pass computes them again. Memory: one chunk's logits and their gradient instead of T x V of each
(T = 8192, V = 150k in float32: 4.9 GB each). Time: one extra head product per token in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**24
"""Logits alive at once: 64 MiB in float32. On the CPU smaller chunks cost fewer page faults, but glibc then keeps twice the memory
(docs/LOG.md)."""

Head = Callable[[Tensor], Tensor]


def output_head(model: Any) -> Head:
    """hidden_TH -> logits_TV of a transformers causal LM, with the scaling or soft cap that some architectures apply after lm_head.

    Reads `final_logit_softcapping` (Gemma 2/3), `logits_scaling` (Granite) and `logit_scale` (Cohere) from the model's config. The
    trainer compares the result with the model's own logits once at start-up, so an unknown variant is refused, not mistrained.
    """
    config = model.config.to_dict()
    soft_cap: float | None = config.get("final_logit_softcapping")
    scale: float = config.get("logit_scale") or 1.0 / (config.get("logits_scaling") or 1.0)

    def head(hidden_TH: Tensor) -> Tensor:
        logits_TV: Tensor = model.get_output_embeddings()(hidden_TH)
        if scale != 1.0:
            logits_TV = logits_TV * scale
        if soft_cap:
            logits_TV = torch.tanh(logits_TV / soft_cap) * soft_cap
        return logits_TV

    return head


def log_softmax(scores_BV: Tensor) -> Tensor:
    """log softmax over the last dimension; for float32 on the CPU right to 1e-6 nats.

    torch's own sums the exponentials one by one there: over a vocabulary of 151,936 it is off by up to 3.6e-4 nats, the same way for
    every token (measured against float64, torch 2.13.0). Samplers and trainer must not differ by that.
    """
    return scores_BV - scores_BV.logsumexp(dim=-1, keepdim=True)


def _chunk_logprobs(head: Head, hidden_CH: Tensor, targets_CK: Tensor) -> Tensor:
    logits_CV = head(hidden_CH).float()  # float32 before the sum over the vocabulary, whatever the compute type
    return logits_CV.gather(1, targets_CK) - logits_CV.logsumexp(dim=1, keepdim=True)


def token_logprobs(head: Head, hidden_TH: Tensor, targets_TK: Tensor, vocab_size: int, chunk_elements: int = CHUNK_ELEMENTS) -> Tensor:
    """log softmax(head(hidden))[target] at temperature 1, in nats.

    Shapes: hidden_TH in the compute type, targets_TK int64, result [T, K] float32 with gradient to the hidden states and to the
    head's own trainable weights when grad mode is on.
    """
    chunk = max(1, chunk_elements // vocab_size)
    parts = []
    for start in range(0, hidden_TH.shape[0], chunk):
        hidden_CH, targets_CK = hidden_TH[start : start + chunk], targets_TK[start : start + chunk]
        if torch.is_grad_enabled():
            part = checkpoint(_chunk_logprobs, head, hidden_CH, targets_CK, use_reentrant=False, preserve_rng_state=False)
        else:
            part = _chunk_logprobs(head, hidden_CH, targets_CK)
        parts.append(part)
    return torch.cat(parts)
