"""What a trainer and vLLM keep on one card, in bytes, from the shape of the model. Arithmetic only: no torch, no card.

The activations are those of decoder.py, tensor for tensor (a test counts what it keeps on the CPU). vLLM's workspace and what CUDA itself
takes are allowances, set high and not measured; see each constant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ptlab.errors import ConfigError

GB = 10**9
MASTER_BYTES = 4
"""LoRA weights, their gradients and AdamW's moments are float32, whatever the base is in."""
CONTEXT_BYTES = 600 * 2**20
"""Allowance per process for its CUDA context, loaded kernels and cuBLAS workspaces. Assumed."""
GRAPH_BYTES = 2**30
"""Allowance for vLLM's CUDA graphs. Assumed; vLLM 0.32 measures its own and takes them out of the KV cache."""
HEAD_BYTES = 2**29 + 2**26 * 4
"""The output head: one chunk of logits (head_pass.CHUNK_BYTES) and a block of it in float32 (BLOCK_ELEMENTS)."""
Recompute = Literal["nothing", "mlp", "layers"]
"""What the backward pass computes again instead of finding it kept: gate and up of each layer (about 1.15 x the time, half of the memory),
or each layer from its input (1.5 x the time; memory of one layer and all inputs)."""
MIXTURE_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
QK_NORM_MODELS = ("qwen3", "qwen3_moe", "olmo2", "gemma3_text")
"""Families (model_type) that normalise queries and keys, and keep a float32 copy of both for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes that memory depends on."""

    num_parameters: int
    """All weights; tied ones once."""
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    """The output head is the embedding matrix."""
    qk_norm: bool
    max_context_length: int

    @classmethod
    def of(cls, config: Any, num_parameters: int | None = None) -> ModelShape:
        """From a transformers config.

        Args:
            num_parameters: counted in the loaded model; None = reckoned from the config: embeddings, attention, gated MLP and norms, right
                to a few thousandths for dense models of the Llama and Qwen families (biases left out).

        Raises: ConfigError for a mixture of experts whose parameters were not counted.
        """
        text = config.get_text_config()
        values: dict[str, Any] = text.to_dict()
        mixture = [key for key in MIXTURE_KEYS if values.get(key)]
        if mixture and num_parameters is None:
            raise ConfigError(
                f"memory plan: {text.model_type} is a mixture of experts ({mixture[0]} = {values[mixture[0]]}), whose weights cannot be "
                f"reckoned from the config; pass num_parameters, counted in the loaded model"
            )
        shape = cls(
            num_parameters=num_parameters or 0,
            num_layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_heads=text.num_attention_heads,
            num_kv_heads=values.get("num_key_value_heads") or text.num_attention_heads,
            head_dim=values.get("head_dim") or text.hidden_size // text.num_attention_heads,
            vocab_size=text.vocab_size,
            tied=bool(config.tie_word_embeddings),
            qk_norm=text.model_type in QK_NORM_MODELS,
            max_context_length=text.max_position_embeddings,
        )
        return shape if num_parameters else shape.counted()

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of the keys; the values have the same."""
        return self.num_kv_heads * self.head_dim

    def counted(self) -> ModelShape:
        """With num_parameters reckoned from the other fields: V H embeddings (twice if untied), and per layer the four attention matrices
        2 H (Q + KV), the three MLP matrices 3 H I, two norms 2 H and with qk_norm 2 head_dim; one last norm H."""
        hidden = self.hidden_size
        attention = 2 * hidden * (self.query_size + self.kv_size)
        norms = 2 * hidden + (2 * self.head_dim if self.qk_norm else 0)
        layer = attention + 3 * hidden * self.intermediate_size + norms
        total = self.vocab_size * hidden * (1 if self.tied else 2) + self.num_layers * layer + hidden
        return ModelShape(**{name: getattr(self, name) for name in ModelShape.__slots__} | {"num_parameters": total})


def lora_parameters(shape: ModelShape, rank: int) -> int:
    """Numbers in one adapter on everything the three flags select: rank x (in + out) for each of seven matrices per layer and the head."""
    hidden, query, kv, inner = shape.hidden_size, shape.query_size, shape.kv_size, shape.intermediate_size
    attention = 2 * (hidden + query) + 2 * (hidden + kv)
    return rank * (shape.num_layers * (attention + 3 * (hidden + inner)) + hidden + shape.vocab_size)


def lora_state_bytes(shape: ModelShape, rank: int) -> int:
    """One trainable adapter at rest: weights, the two AdamW moments, and the gradient that adds up, 4 bytes each: 16 a parameter."""
    return 4 * MASTER_BYTES * lora_parameters(shape, rank)


def lora_slot_bytes(shape: ModelShape, rank: int, element_bytes: int) -> int:
    """One of vLLM's adapter slots, allocated in full at start: an adapter as above, and one on the embeddings, in the compute type.

    Source: vllm/lora/layers/base_linear.py, logits_processor.py, vocab_parallel_embedding.py (0.32): zeros of [max_loras, max_rank, ...].
    """
    return element_bytes * (lora_parameters(shape, rank) + rank * (shape.hidden_size + shape.vocab_size))


def kv_bytes_per_token(shape: ModelShape, element_bytes: int) -> int:
    """Keys and values of one token in all layers: 2 x layers x kv heads x head_dim x bytes (Llama-3.1-8B in bfloat16: 131,072)."""
    return 2 * shape.num_layers * shape.kv_size * element_bytes


def kept_bytes_per_token(shape: ModelShape, rank: int, element_bytes: int, recompute: Recompute) -> int:
    """What decoder.py keeps of one token in one layer between forward and backward, in e bytes each (decoder_layer.Kept):

        the layer's input                   H         all that is left with `recompute` layers
        q k v, rotated in place             Q + 2 KV
        q and k before their norm (qk_norm) Q + KV
        output of attention                 Q
        middle of the residual stream       H
        gate and up                         2 I       not with `recompute` mlp; in bfloat16 2 r wider, for the adapters' share

    Norms and the inputs of linear layers are computed again from these; the frozen matrices need none of their inputs for a gradient.
    """
    hidden, query, kv = shape.hidden_size, shape.query_size, shape.kv_size
    if recompute == "layers":
        return element_bytes * hidden
    rest = 2 * hidden + 2 * query + 2 * kv + (query + kv if shape.qk_norm else 0)
    return element_bytes * (rest + (_gate_up_size(shape, rank, element_bytes) if recompute == "nothing" else 0))


def _gate_up_size(shape: ModelShape, rank: int, element_bytes: int) -> int:
    return 2 * shape.intermediate_size + (0 if element_bytes == MASTER_BYTES else 2 * rank)


def activation_bytes(shape: ModelShape, rank: int, element_bytes: int, *, tokens: int, recompute: Recompute) -> int:
    """Peak of one forward and backward pass over `tokens` tokens, above the weights and lora_state_bytes: an estimate from above for models
    that decoder.py computes (others keep about twice as much; where it matters a trial decides).

    Kept over the pass: kept_bytes_per_token of every layer, with `recompute` layers in full of the one being computed again. Working set of
    the backward pass: gradients of the residual stream, of q k v twice and of the attention's output, SwiGLU's output and its gradient
    (2 I), inputs of linear layers and their gradients (3 H), gate and up where they are computed again. Then the hidden states and their
    gradients before and after the head (4 H), one chunk of the head, one layer's merged weights in float32, and two sets of fresh LoRA
    gradients (8 bytes a parameter: the micro-batch's and the call's).
    """
    hidden, query, kv, inner = shape.hidden_size, shape.query_size, shape.kv_size, shape.intermediate_size
    kept = shape.num_layers * kept_bytes_per_token(shape, rank, element_bytes, recompute)
    if recompute == "layers":
        kept += kept_bytes_per_token(shape, rank, element_bytes, "nothing")
    elif recompute == "mlp":
        kept += element_bytes * _gate_up_size(shape, rank, element_bytes)
    working = element_bytes * (8 * hidden + 2 * inner + 3 * query + 4 * kv)
    layer = 2 * hidden * (query + kv) + 3 * hidden * inner
    merged = MASTER_BYTES * layer if element_bytes == MASTER_BYTES else 0
    return tokens * (kept + working) + HEAD_BYTES + merged + 2 * MASTER_BYTES * lora_parameters(shape, rank)


def vllm_workspace_bytes(shape: ModelShape, element_bytes: int, *, batched_tokens: int, num_sequences: int) -> int:
    """vLLM's own activations at their peak, which it finds by a profiling run at start: an estimate from above.

    One layer on `batched_tokens` tokens (residual and input 2 H, q k v and attention output 2 Q + 2 KV, MLP 3 I), and drawing from
    `num_sequences` rows of logits: compute type and float32, log-softmax, and sorted values with int64 indices for top-k and top-p, 24
    bytes each.
    """
    token = 2 * shape.hidden_size + 2 * shape.query_size + 2 * shape.kv_size + 3 * shape.intermediate_size
    return batched_tokens * token * element_bytes + num_sequences * shape.vocab_size * 24
