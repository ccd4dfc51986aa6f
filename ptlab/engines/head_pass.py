"""The output head in one pass: log-probabilities, the loss's weights, and the gradients, one chunk of rows after the other.

Every loss here is a function of log-probabilities, so the gradient of a chunk is known as soon as its log-probabilities are: nothing is
computed twice, and of the [rows x vocabulary] logits only one chunk ever exists. With x the logits of a row, e = exp(x), E = sum(e):

    log p(t) = x_t - log E
    dL/dx    = sum_k w_k onehot(t_k) - W p                              w_k = dL/dlog p(t_k), W = sum_k w_k, p = e / E
    dL/dh    = sum_k (w_k - W p_tk) weight[t_k] - W / E (e' weight)     e' = e, but 0 at the row's own targets

The last line is what is computed. W / E is one factor per row, so it is applied behind the product, to [rows, H], and the chunk is not
gone through again. The targets stand apart because p_t is often close to 1: 1 - p_t is then right to float32, while the difference of
two products rounded to bfloat16 would be noise. Their logits are dot products in float32, for the same reason.

Cost for U rows of which L have a weight that is not 0: 2 V H (U + L) FLOPs; per logit one exp in place and one sum (bfloat16: a
conversion before and behind), a few rows at a time, in the second-level cache. Memory: a chunk in the compute type and a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptlab.engines.buffers import Buffers
from ptlab.engines.lora_layers import LowRank

CHUNK_ROWS = {"cpu": 512, "cuda": 2048}
"""Each chunk reads (on a CPU: packs) the whole weight matrix; from here on that is small beside the product."""
CHUNK_BYTES = {"cpu": 2**27, "cuda": 2**29}
"""Of logits in the compute type, if that is less. A CPU takes 220 rows of 151,936 float32, at 0.8 of the speed of 512."""
BLOCK_ELEMENTS = {"cpu": 2**17, "cuda": 2**26}
"""float32 logits that go through exp and sum together: in the second-level cache, or enough to fill a GPU."""
SAFE_SUMS = (1e-20, 1e30)
"""Sums of exponentials that are right without subtracting the largest logit first: nothing that counts became 0 or infinity."""

Weigh = Callable[[int, int, Tensor], Tensor]
"""(first pair, end, log-probabilities of these pairs) -> dL/dlogprob of each, float32."""


@dataclass(frozen=True, slots=True)
class OutputHead:
    """What stands between the last hidden state and the logits: soft cap of scale * (hidden weight' + bias + LoRA)."""

    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None
    lora: LowRank | None = None

    @classmethod
    def of(cls, model: Any, lora: LowRank | None) -> OutputHead:
        """A transformers causal LM's; `lora` is what the adapter in use adds to it.

        Reads `final_logit_softcapping` (Gemma 2/3), `logits_scaling` (Granite) and `logit_scale` (Cohere) from the model's config. The
        trainer compares the result with the model's own logits once at start-up, so an unknown variant is refused, not mistrained.
        """
        config = model.config.to_dict()
        layer = model.get_output_embeddings()
        scale = config.get("logit_scale") or 1.0 / (config.get("logits_scaling") or 1.0)
        return cls(layer.weight, layer.bias, scale, config.get("final_logit_softcapping") or None, lora)

    def logits(self, hidden_UH: Tensor) -> Tensor:
        """[U, V] in the compute type, for the few rows where all of them are wanted."""
        raw = torch.nn.functional.linear(hidden_UH, self.weight_VH, self.bias_V)
        if self.lora is not None:
            low_UR = hidden_UH.float() @ self.lora.a_RI.t() * self.lora.scale
            raw = raw + (low_UR @ self.lora.b_OR.t()).to(raw.dtype)
        return self.capped(raw)

    def capped(self, raw: Tensor) -> Tensor:
        """Logits from hidden weight' + bias + LoRA."""
        scaled = raw * self.scale
        return scaled if self.soft_cap is None else torch.tanh(scaled / self.soft_cap) * self.soft_cap


def head_path(model: Any) -> str:
    """Where the output head stands among the modules of a transformers causal LM that no adapter has changed yet."""
    found: str = next(path for path, module in model.named_modules() if module is model.get_output_embeddings())
    return found


@dataclass(slots=True)
class HeadResult:
    """Gradients are None where `weigh` was None; those of the LoRA matrices also where the head has no LoRA."""

    logprobs_P: Tensor
    d_hidden_UH: Tensor | None = None
    """In the compute type; 0 for rows without weight."""
    d_a_RH: Tensor | None = None
    d_b_VR: Tensor | None = None


def head_pass(
    head: OutputHead,
    hidden_UH: Tensor,
    pair_rows_P: Tensor,
    pair_targets_P: Tensor,
    weigh: Weigh | None,
    *,
    learning_rows: int | None = None,
    buffers: Buffers | None = None,
) -> HeadResult:
    """log p(pair_targets | hidden[pair_rows]) at temperature 1 in nats, float32, and the gradients that follow from `weigh`'s answers.

    Pairs are sorted by row. Rows from `learning_rows` on are known to have no weight: `weigh`, called once per chunk and in order, is
    not asked about them (None: it is asked about all). Rows whose weights turn out to be 0 cost one product as well, but on CUDA,
    where looking would make the host wait. `buffers` keeps the chunk's memory for the next call.
    """
    if weigh is None:
        learning_rows = 0
    elif learning_rows is None:
        learning_rows = hidden_UH.shape[0]
    with torch.no_grad():
        run = _Pass(head, hidden_UH, pair_rows_P, pair_targets_P, buffers or Buffers(hidden_UH.device))
        result = HeadResult(hidden_UH.new_empty(pair_rows_P.shape, dtype=torch.float32))
        if weigh is not None:
            result.d_hidden_UH = torch.zeros_like(hidden_UH)
            if head.lora is not None:
                # B's gradient stands with its longest side last while chunks are added: the product is 1.3 times as fast
                result.d_a_RH, result.d_b_VR = torch.zeros_like(head.lora.a_RI), head.lora.b_OR.new_zeros(head.lora.b_OR.shape[::-1]).t()
        for start, end, first, last in run.chunks(learning_rows):
            chunk = run.forward(start, end, first, last, learns=start < learning_rows)
            logprobs_K = result.logprobs_P[first:last].copy_(chunk.logprobs_K)
            if weigh is not None and start < learning_rows:
                run.backward(chunk, weigh(first, last, logprobs_K), result)
        if result.d_b_VR is not None:
            result.d_b_VR = result.d_b_VR.contiguous()
    return result


@dataclass(slots=True)
class _Chunk:
    """Rows of the hidden states (C) and the pairs that belong to them (K). What the backward pass needs besides the exponentials."""

    places_C: Tensor
    """Where its rows lie in the hidden states."""
    hidden_CH: Tensor
    rows_K: Tensor
    """Within the chunk."""
    targets_K: Tensor
    first_K: Tensor
    low_CR: Tensor | None
    """scale * hidden A', float32."""
    logits_K: Tensor
    """These and the rest are float64, which costs nothing here: no overflow in exp, and a difference of logits is right to float32."""
    shift_C: Tensor
    lse_C: Tensor
    logprobs_K: Tensor


class _Pass:
    """One call's inputs and buffers."""

    def __init__(self, head: OutputHead, hidden_UH: Tensor, rows_P: Tensor, targets_P: Tensor, buffers: Buffers) -> None:
        self._head, self._hidden_UH, self._rows_P, self._targets_P, self._buffers = head, hidden_UH, rows_P, targets_P, buffers
        device, vocab_size = hidden_UH.device.type, head.weight_VH.shape[0]
        self._on_cpu = device == "cpu"
        fitting = CHUNK_BYTES[device] // (vocab_size * hidden_UH.element_size())
        self._chunk = max(1, min(hidden_UH.shape[0], CHUNK_ROWS[device], fitting))
        self._block = max(1, min(self._chunk, BLOCK_ELEMENTS[device] // vocab_size))
        self._logits_CV = buffers.take("head: logits", self._chunk, vocab_size, dtype=hidden_UH.dtype)
        self._float_BV = self._tanh_BV = None
        if hidden_UH.dtype != torch.float32:
            self._float_BV = buffers.take("head: float32", self._block, vocab_size, dtype=torch.float32)
        if head.soft_cap is not None:
            self._tanh_BV = buffers.take("head: tanh", self._block, vocab_size, dtype=torch.float32)
        self._first_P = _first_of_its_kind(rows_P, targets_P, vocab_size)
        self._b_VR = None if head.lora is None else head.lora.b_OR.to(hidden_UH.dtype)
        self._shifted = not self._on_cpu  # subtract each row's largest logit; on the CPU only once that was seen to be needed

    def chunks(self, learning_rows: int) -> list[tuple[int, int, int, int]]:
        """First row, end, first pair, end of each. The one place where the host waits for the device."""
        num_rows = self._hidden_UH.shape[0]
        starts = [*range(0, learning_rows, self._chunk), *range(learning_rows, num_rows, self._chunk)]
        edges = [*starts, num_rows]
        pairs = torch.searchsorted(self._rows_P, torch.tensor(edges, device=self._rows_P.device)).tolist()
        return list(zip(starts, edges[1:], pairs, pairs[1:], strict=False))

    def forward(self, start: int, end: int, first: int, last: int, *, learns: bool) -> _Chunk:
        """The log-probabilities of a chunk's pairs. If it learns, self._logits_CV holds e' (times the soft cap's slope) from then on."""
        head, hidden_CH, logits_CV = self._head, self._hidden_UH[start:end], self._logits_CV[: end - start]
        rows_K, targets_K, first_K = self._rows_P[first:last] - start, self._targets_P[first:last], self._first_P[first:last]
        low_CR = None if head.lora is None else hidden_CH.float() @ head.lora.a_RI.t() * head.lora.scale
        while True:
            self._products(hidden_CH, low_CR, logits_CV)
            rounded_K = head.capped(logits_CV[rows_K, targets_K].float())
            shift_C = head.capped(logits_CV.amax(1).float()) if self._shifted else hidden_CH.new_zeros(end - start, dtype=torch.float32)
            sums_C = self._exponentials(logits_CV, shift_C, learns=learns)
            if self._shifted or bool(((sums_C > SAFE_SUMS[0]) & (sums_C < SAFE_SUMS[1])).all()):
                break
            self._shifted = True  # for the chunks to come as well: a model's logits lie far from 0 everywhere or nowhere
        logits_CV[rows_K, targets_K] = 0.0
        # take the targets, as the product rounded them, out of the sums, and put them in as they are
        rest_C = sums_C.double().index_add_(0, rows_K, (rounded_K - shift_C[rows_K]).exp_() * -first_K).clamp_(min=0.0)
        logits_K, shift_C = self._target_logits(hidden_CH, low_CR, rows_K, targets_K), shift_C.double()
        lse_C = rest_C.index_add_(0, rows_K, (logits_K - shift_C[rows_K]).exp_() * first_K).log_() + shift_C
        logprobs_K = (logits_K - lse_C[rows_K]).clamp_(max=0.0)
        places_C = torch.arange(start, end, device=rows_K.device)
        return _Chunk(places_C, hidden_CH, rows_K, targets_K, first_K, low_CR, logits_K, shift_C, lse_C, logprobs_K)

    def _products(self, hidden_CH: Tensor, low_CR: Tensor | None, logits_CV: Tensor) -> None:
        weight_HV = self._head.weight_VH.t()
        if self._head.bias_V is None:
            torch.mm(hidden_CH, weight_HV, out=logits_CV)
        else:
            torch.addmm(self._head.bias_V, hidden_CH, weight_HV, out=logits_CV)
        if low_CR is not None and self._b_VR is not None:
            logits_CV.addmm_(low_CR.to(logits_CV.dtype), self._b_VR.t())

    def _target_logits(self, hidden_CH: Tensor, low_CR: Tensor | None, rows_K: Tensor, targets_K: Tensor) -> Tensor:
        """As dot products in float32."""
        head = self._head
        logits_K = hidden_CH.new_empty(rows_K.shape, dtype=torch.float32)
        for part in _parts(rows_K.shape[0], hidden_CH.shape[0]):
            rows, targets = rows_K[part], targets_K[part]
            torch.sum(head.weight_VH.index_select(0, targets).float().mul_(hidden_CH.index_select(0, rows)), 1, out=logits_K[part])
            if head.lora is not None and low_CR is not None:
                logits_K[part] += (head.lora.b_OR.index_select(0, targets) * low_CR[rows]).sum(1)
        if head.bias_V is not None:
            logits_K += head.bias_V[targets_K]
        return head.capped(logits_K.double())

    def _exponentials(self, logits_CV: Tensor, shift_C: Tensor, *, learns: bool) -> Tensor:
        """exp(capped(logits) - shift) in place, times the soft cap's slope; returns the sums of the rows without the slope."""
        head = self._head
        sums_C = torch.empty_like(shift_C)
        for part in _parts(logits_CV.shape[0], self._block):
            given_BV = logits_CV[part]
            block_BV = given_BV if self._float_BV is None else self._float_BV[: given_BV.shape[0]].copy_(given_BV)
            if head.scale != 1.0:
                block_BV.mul_(head.scale)
            if head.soft_cap is not None and self._tanh_BV is not None:
                tanh_BV = self._tanh_BV[: block_BV.shape[0]].copy_(block_BV.div_(head.soft_cap)).tanh_()
                torch.mul(tanh_BV, head.soft_cap, out=block_BV)
            if self._shifted:
                block_BV.sub_(shift_C[part, None])
            torch.sum(block_BV.exp_(), 1, out=sums_C[part])
            if learns:
                if head.soft_cap is not None:
                    block_BV.mul_(tanh_BV.square_().neg_().add_(1.0))
                if block_BV is not given_BV:
                    given_BV.copy_(block_BV)
        return sums_C

    def backward(self, chunk: _Chunk, weights_K: Tensor, result: HeadResult) -> None:
        """Adds to the gradients in `result`; the chunk's exponentials are used up."""
        head = self._head
        if self._on_cpu:
            learns_C = torch.zeros(chunk.hidden_CH.shape[0], dtype=torch.bool)
            learns_C[chunk.rows_K[weights_K != 0.0]] = True
            if not learns_C.any():
                return
            if not learns_C.all():
                weights_K = weights_K[learns_C[chunk.rows_K]]
                chunk = self._only(chunk, learns_C)
        num_rows, rows_K, targets_K = chunk.hidden_CH.shape[0], chunk.rows_K, chunk.targets_K
        exps_CV = self._logits_CV[:num_rows]

        weights_K = weights_K.double()
        weight_C = torch.zeros_like(chunk.lse_C).index_add_(0, rows_K, weights_K)
        own_K = (weights_K - weight_C[rows_K] * chunk.logprobs_K.exp() * chunk.first_K) * head.scale
        if head.soft_cap is not None:
            own_K *= 1.0 - (chunk.logits_K / head.soft_cap).square_()
        own_K1 = own_K.float()[:, None]
        factor_C1 = (weight_C * (chunk.shift_C - chunk.lse_C).exp_() * -head.scale).float()[:, None]

        assert result.d_hidden_UH is not None
        product_CH = self._buffers.take("head: product", *chunk.hidden_CH.shape, dtype=chunk.hidden_CH.dtype)
        d_CH = torch.mm(exps_CV, head.weight_VH, out=product_CH).float() * factor_C1
        for part in _parts(rows_K.shape[0], num_rows):
            d_CH.index_add_(0, rows_K[part], head.weight_VH.index_select(0, targets_K[part]).float().mul_(own_K1[part]))
        if head.lora is not None and chunk.low_CR is not None and self._b_VR is not None:
            assert result.d_a_RH is not None and result.d_b_VR is not None
            d_low_CR = torch.mm(exps_CV, self._b_VR).float() * factor_C1
            d_low_CR.index_add_(0, rows_K, head.lora.b_OR.index_select(0, targets_K) * own_K1)
            d_low_CR *= head.lora.scale
            d_CH.addmm_(d_low_CR, head.lora.a_RI)
            result.d_a_RH.addmm_(d_low_CR.t(), chunk.hidden_CH.float())
            d_b_RV = result.d_b_VR.t()
            low_RC = (chunk.low_CR * factor_C1).t()
            if low_RC.dtype == exps_CV.dtype:
                d_b_RV.addmm_(low_RC, exps_CV)
            else:
                d_b_RV += torch.mm(low_RC.to(exps_CV.dtype), exps_CV)
            d_b_RV.index_add_(1, targets_K, (chunk.low_CR[rows_K] * own_K1).t())
        result.d_hidden_UH.index_copy_(0, chunk.places_C, d_CH.to(result.d_hidden_UH.dtype))

    def _only(self, chunk: _Chunk, kept_C: Tensor) -> _Chunk:
        """The chunk without the other rows. Its exponentials move up in place: a second chunk would be the largest thing in memory."""
        rows_L = kept_C.nonzero()[:, 0]
        for place, row in enumerate(rows_L.tolist()):
            if place != row:
                self._logits_CV[place] = self._logits_CV[row]
        pairs = kept_C[chunk.rows_K]
        return _Chunk(
            places_C=chunk.places_C[rows_L],
            hidden_CH=chunk.hidden_CH[rows_L],
            rows_K=(kept_C.cumsum(0) - 1)[chunk.rows_K[pairs]],
            targets_K=chunk.targets_K[pairs],
            first_K=chunk.first_K[pairs],
            low_CR=None if chunk.low_CR is None else chunk.low_CR[rows_L],
            logits_K=chunk.logits_K[pairs],
            shift_C=chunk.shift_C[rows_L],
            lse_C=chunk.lse_C[rows_L],
            logprobs_K=chunk.logprobs_K[pairs],
        )


def _parts(number: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, number)) for start in range(0, number, size)]


def _first_of_its_kind(rows_P: Tensor, targets_P: Tensor, vocab_size: int) -> Tensor:
    """float64 [P]: 0 where an earlier pair has the same row and target (eight samples may begin with the same word), else 1."""
    keys_P, order_P = torch.sort(rows_P * vocab_size + targets_P, stable=True)
    first_P = torch.ones_like(rows_P, dtype=torch.float64)
    first_P[order_P[1:]] = (keys_P[1:] != keys_P[:-1]).double()
    return first_P
