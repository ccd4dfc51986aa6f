"""Sampler on vLLM: an async front on the engine thread of vllm_engine.py.

Requests of all callers are batched continuously, whatever adapter they are on. Where vLLM cannot give a right answer, the request is
refused with NotServedError; `VllmSampler.capabilities` says beforehand where that is.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import secrets
import threading
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, GenerationConfig

from ptlab.engines.base_model import end_token_ids, load_tokenizer, resolve_device, resolve_dtype
from ptlab.engines.lora import ADAPTER_FILE, load_tensors, read_config
from ptlab.engines.memory_costs import ModelShape, lora_slot_bytes
from ptlab.engines.protocols import AdapterRef, BaseModelInfo, SampleCall, SamplerCapabilities
from ptlab.engines.sample_checks import check_call
from ptlab.engines.sampler_errors import name_taken, not_loaded
from ptlab.engines.stop import StopRule, StopTexts, resolve_stop
from ptlab.engines.token_draw import SEED_MASK
from ptlab.engines.vllm_engine import ENGINE, Drawing, EngineRequest, Mode, VllmEngine  # before vllm, for its environment
from ptlab.errors import EngineError, InvalidRequestError, NotServedError
from ptlab.types import SampledSequence, SampleResponse, TopkLogprobs
from ptlab.types.sampled import MASK_LOGPROB

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the maxima vLLM 0.32 accepts
MIN_TEMPERATURE = 0.01  # vLLM raises a lower one to this; the log-probabilities would be of another distribution than asked
HEAD = "lm_head"
KV_BLOCK_TOKENS = 32  # the smallest vLLM accepts on the CPU
MIN_LORA_SLOTS, MAX_LORA_SLOTS, LORA_SLOT_BYTES = 4, 32, 2**28
log = logging.getLogger(__name__)


class VllmSampler:
    """See `ptlab.engines.protocols.Sampler`. Usable from any thread and any event loop.

    Args:
        path: local directory or hub name of a causal LM that vLLM knows.
        name: what clients call it; None = path.
        dtype: "auto" = float32 on the CPU, bfloat16 on a GPU. Adapters are computed in it as well.
        mode: "inproc" = the engine runs in this process; "process" = in its own; "auto" = inproc for float32 on the CPU, else process.
            (On the CPU a bfloat16 engine in this process would switch torch's default dtype under the trainer while it loads.)
        max_context_length: most tokens of prompt and answer; None = the model's, less where the KV cache cannot hold that.
        max_lora_rank: largest rank of an adapter; each slot takes memory for it.
        max_loras: slots: adapters that can be in one batch. More live versions than that take turns, which costs throughput, not
            correctness. Fixed for the life of the engine: vLLM allots them when it starts. None = see `lora_slots`.
        max_cpu_loras: adapters kept in host memory; those beyond are read again from their path when needed.
        max_num_seqs: most sequences in one batch.
        kv_cache_bytes: memory for keys and values; None = on the CPU what max_num_seqs sequences take, at most 1 GiB unless one context
            needs more; on a GPU what gpu_memory_utilization leaves.
        gpu_memory_utilization: share of a GPU's memory for weights and KV cache together; None = vLLM's default.
        engine_args: more arguments of vllm.EngineArgs, over all of these; for tests and experiments.

    Raises: ConfigError if there is no such model, or vLLM is not installed; EngineError if vLLM cannot start.
    """

    def __init__(
        self,
        path: str,
        *,
        name: str | None = None,
        dtype: str = "auto",
        mode: Literal["auto", "inproc", "process"] = "auto",
        max_context_length: int | None = None,
        max_lora_rank: int = 32,
        max_loras: int | None = None,
        max_cpu_loras: int = 32,
        max_num_seqs: int = 256,
        kv_cache_bytes: int | None = None,
        gpu_memory_utilization: float | None = None,
        engine_args: Mapping[str, Any] | None = None,
    ) -> None:
        device = resolve_device(None)
        compute = resolve_dtype(dtype, device)
        tokenizer = load_tokenizer(path)
        config = AutoConfig.from_pretrained(path)
        text_config = config.get_text_config()
        on_cpu = device.type == "cpu"
        context = min(text_config.max_position_embeddings, max_context_length or text_config.max_position_embeddings)
        if on_cpu and kv_cache_bytes is None:
            kv_cache_bytes, context = cpu_kv_cache(text_config, compute, context, max_num_seqs)
        self._rank_limit = lora_rank_limit(max_lora_rank)
        if max_loras is None:
            max_loras = lora_slots(config, compute, self._rank_limit) if on_cpu else MIN_LORA_SLOTS
        self._mode: Mode = mode if mode != "auto" else "inproc" if on_cpu and compute == torch.float32 else "process"
        self._info = BaseModelInfo(
            name=path if name is None else name,
            arch=str(config.model_type),
            vocab_size=int(text_config.vocab_size),
            max_context_length=context,
            dtype=str(compute).removeprefix("torch."),
        )
        self._eos_token_ids = _eos_token_ids(path, config, tokenizer)
        self._stop_texts = StopTexts(tokenizer, self._info.vocab_size)
        settings: dict[str, Any] = {
            "model": path,
            "dtype": self._info.dtype,
            "max_model_len": context,
            "max_num_seqs": max_num_seqs,
            "enable_lora": True,
            "max_loras": max_loras,
            "max_lora_rank": self._rank_limit,
            "max_cpu_loras": max(max_cpu_loras, max_loras),
            "logprobs_mode": "processed_logprobs",
            "max_logprobs": -1,  # no limit but the vocabulary, as in the torch sampler
            "skip_tokenizer_init": True,  # stop texts are found by ptlab's own StopTexts
            "seed": secrets.randbits(31),
            "use_tqdm_on_load": False,
        }
        if on_cpu:
            settings |= {
                "enforce_eager": True,  # compilation is off with LoRA anyway
                "block_size": KV_BLOCK_TOKENS,
                "enable_chunked_prefill": False,  # with a seed it crashes ("CPU Generator does not use offset")
                "max_num_batched_tokens": max(context, 8192),
            }
        if kv_cache_bytes is not None:
            settings["kv_cache_memory_bytes"] = kv_cache_bytes
        if gpu_memory_utilization is not None:
            settings["gpu_memory_utilization"] = gpu_memory_utilization
        self._engine = VllmEngine(settings | dict(engine_args or {}), mode=self._mode, stop_texts=self._stop_texts)
        modules = self._engine.call("start", lambda: self._engine.rpc("ptlab_lora_modules")).result()
        self._capabilities = SamplerCapabilities(
            max_lora_rank=self._rank_limit,
            lora_on_head=any(module.split(".")[-1] == HEAD for module in modules),
            prompt_logprobs_with_head=on_cpu,
            arbitrary_prompt_scores=False,
        )

        self._changed = threading.Lock()  # guards the three below
        self._loaded: set[AdapterRef] = set()
        self._with_head: set[AdapterRef] = set()
        self._in_flight: Counter[AdapterRef] = Counter()

    @property
    def info(self) -> BaseModelInfo:
        return self._info

    @property
    def capabilities(self) -> SamplerCapabilities:
        return self._capabilities

    @property
    def num_restarts(self) -> int:
        """How often the engine broke and was started again."""
        return self._engine.num_restarts

    async def sample(self, call: SampleCall) -> SampleResponse:
        """See the protocol. Cancelling the awaiting task aborts the request in the engine.

        Raises: InvalidRequestError on a request that can never work; NotServedError on one that vLLM cannot answer rightly; EngineError if
        call.adapter is not loaded; EngineLostError if the engine broke (it restarts by itself, and the request may be sent again).
        """
        checked = check_call(call, self._info)
        stop = resolve_stop(call.params.stop, self._eos_token_ids, self._info.vocab_size)
        self._check_served(call)
        seed = call.params.seed
        if seed is None and self._mode == "inproc":
            seed = secrets.randbits(63)  # vLLM would draw from torch's global generator, which is the trainer's too
        request = EngineRequest(
            tokens=checked.tokens,
            params=[sampling_params(call, i, seed, checked.max_tokens, stop) for i in range(call.num_samples)],
            adapter=call.adapter,
            stop_texts=stop.texts,
            may_end_V=await asyncio.to_thread(self._stop_texts.may_end, stop.texts) if stop.texts else None,
            future=Future(),
        )
        with self._changed:
            if call.adapter is not None:
                if call.adapter not in self._loaded:
                    raise not_loaded(call.adapter, ENGINE)
                self._in_flight[call.adapter] += 1
        request.future.add_done_callback(lambda _: self._settle(call.adapter))
        try:
            self._engine.submit(request)
        except EngineError as err:
            request.future.set_exception(err)
        drawings: list[Drawing] = await asyncio.wrap_future(request.future)
        return response(call, drawings)

    async def load_adapter(self, adapter: AdapterRef) -> frozenset[str]:
        """See the protocol; loading a ref that is loaded checks it again.

        Raises: CheckpointError if the directory is missing, torn, or not a LoRA of this model; InvalidRequestError if its rank is above the
        engine's; EngineError if the values in the model are not the file's, or the name is taken by another ref.
        """
        with_head = await asyncio.to_thread(self._check_adapter, adapter)
        names: frozenset[str] = await asyncio.wrap_future(self._engine.call("load_adapter", lambda: self._load(adapter)))
        with self._changed:
            self._loaded.add(adapter)
            if with_head:
                self._with_head.add(adapter)
        return names

    async def unload_adapter(self, adapter: AdapterRef) -> None:
        """See the protocol. New requests on the adapter are refused from now on; an unknown adapter is fine."""
        with self._changed:
            self._loaded.discard(adapter)
        while True:
            with self._changed:
                if not self._in_flight[adapter]:
                    del self._in_flight[adapter]
                    self._with_head.discard(adapter)
                    break
            await asyncio.sleep(0.005)
        await asyncio.wrap_future(self._engine.call("unload_adapter", lambda: self._engine.unload(adapter)))

    async def close(self) -> None:
        """Fail what is queued or running, stop the engine. May be called again."""
        await asyncio.to_thread(self._engine.close)

    def _settle(self, adapter: AdapterRef | None) -> None:
        if adapter is not None:
            with self._changed:
                self._in_flight[adapter] -= 1

    def _load(self, adapter: AdapterRef) -> frozenset[str]:
        """On the engine's thread."""
        with self._changed:
            taken = any(other.name == adapter.name and other != adapter for other in self._loaded)
        if taken:
            raise name_taken(adapter, ENGINE)
        return self._engine.load(adapter)

    def _check_adapter(self, adapter: AdapterRef) -> bool:
        """Whether the adapter changes the head. Raises: as load_adapter."""
        config = read_config(adapter)
        names = load_tensors(adapter.path / ADAPTER_FILE).keys()
        rank = max([config.r, *(config.rank_pattern or {}).values()])
        if rank > self._rank_limit:
            raise InvalidRequestError(
                f"adapter {adapter.name!r} has rank {rank}; this sampler was started for ranks up to {self._rank_limit}. "
                f"Use a smaller rank, or raise max_lora_rank of the sampler"
            )
        with_head = any(f".{HEAD}." in name for name in names)
        if with_head and not self._capabilities.lora_on_head:
            raise InvalidRequestError(
                f"adapter {adapter.name!r} changes the output head ({HEAD}), which vLLM cannot serve for {self._info.arch} models; "
                f"train with train_unembed=False, or use the torch sampler"
            )
        return with_head

    def _check_served(self, call: SampleCall) -> None:
        if call.target_prompt_logprobs is not None or call.prompt_alt_tokens_k:
            what = "prompt_alt_tokens_k" if call.prompt_alt_tokens_k else "target_prompt_logprobs"
            raise NotServedError(
                f"{what}: vLLM does not score tokens other than the prompt's own; the torch sampler and the trainer can",
                engine=ENGINE,
                operation="sample",
            )
        if not self._capabilities.prompt_logprobs_with_head and call.wants_prompt_logprobs:
            with self._changed:
                head = next(iter(self._with_head), None)
            if head is not None:
                raise NotServedError(
                    f"prompt log-probabilities: on a GPU vLLM mixes up the rows of adapters on the output head, and {head.name!r} is one; "
                    f"the trainer can compute them",
                    engine=ENGINE,
                    operation="sample",
                )
        if 0 < call.params.temperature < MIN_TEMPERATURE:
            raise InvalidRequestError(
                f"sampling_params.temperature is {call.params.temperature}; vLLM draws at {MIN_TEMPERATURE} or above, or greedily at 0"
            )


# -- requests


def sampling_params(call: SampleCall, index: int, seed: int | None, max_tokens: int, stop: StopRule) -> Any:
    """vllm.SamplingParams of draw `index`. Only the first draw scores the prompt."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams  # vllm_engine must have set up the import of vllm

    params = call.params
    greedy = params.temperature == 0
    return SamplingParams(
        temperature=params.temperature,
        top_k=0 if greedy or params.top_k == -1 else params.top_k,
        top_p=1.0 if greedy else params.top_p,
        seed=None if seed is None else draw_seed(seed, index),
        max_tokens=max_tokens,
        ignore_eos=True,  # EOS is among the stop tokens where it ends a draw
        stop_token_ids=sorted(stop.token_ids),
        logprobs=call.topk_sample_logprobs,
        prompt_logprobs=call.topk_prompt_logprobs if index == 0 and call.wants_prompt_logprobs else None,
        detokenize=False,
        flat_logprobs=True,
        output_kind=RequestOutputKind.DELTA if stop.texts else RequestOutputKind.FINAL_ONLY,
    )


def draw_seed(seed: int, index: int) -> int:
    """A stream of its own for each draw: vLLM's seed + index would give draw 1 of seed 5 the numbers of draw 0 of seed 6."""
    digest = hashlib.blake2b(f"{seed & SEED_MASK} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & SEED_MASK


# -- responses


def response(call: SampleCall, drawings: Sequence[Drawing]) -> SampleResponse:
    logprobs_T, topk = prompt_scores(call, drawings[0].prompt)
    return SampleResponse(
        sequences=[_sequence(call, index, drawing) for index, drawing in enumerate(drawings)],
        prompt_logprobs_np=logprobs_T if call.include_prompt_logprobs else None,
        topk_prompt_logprobs_np=topk if call.topk_prompt_logprobs else None,
        prompt_cache_hit_tokens=drawings[0].num_cached_tokens,
    )


def _sequence(call: SampleCall, index: int, drawing: Drawing) -> SampledSequence:
    return SampledSequence(
        stop_reason="stop" if drawing.ended == "stop" else "length",
        sequence_id=call.sequence_ids[index] if call.sequence_ids else str(uuid.uuid4()),
        tokens_np=np.array(drawing.tokens, dtype=np.int32),
        logprobs_np=np.array(drawing.logprobs, dtype=np.float32),
        topk_logprobs_np=_topk(drawing.topk, call.topk_sample_logprobs) if call.topk_sample_logprobs else None,
        policy_version=0 if call.adapter is None else call.adapter.version,
    )


def prompt_scores(call: SampleCall, flat: Any) -> tuple[NDArray[np.float32], TopkLogprobs]:
    """Log-probabilities and top k of every prompt position, from vLLM's FlatLogprobs: per position the token itself, then the k best."""
    length = call.prompt.length
    logprobs_T = np.full(length, np.nan, dtype=np.float32)
    rows: list[list[tuple[int, float]]] = [[] for _ in range(length)]
    last_n = call.prompt_logprobs_last_n
    if flat is not None:
        for i in range(1 if last_n is None else max(1, length - last_n), length):
            begin, end = flat.start_indices[i], flat.end_indices[i]
            logprobs_T[i] = flat.logprobs[begin]
            rows[i] = list(zip(flat.token_ids[begin + 1 : end], flat.logprobs[begin + 1 : end], strict=True))
    return logprobs_T, _topk(rows, call.topk_prompt_logprobs)


def _topk(rows: Sequence[Sequence[tuple[int, float]]], k: int) -> TopkLogprobs:
    """Tokens that top_k or top_p cut away (-inf) become empty cells."""
    return TopkLogprobs.from_lists([[(t, value) if value != -np.inf else (0, MASK_LOGPROB) for t, value in row] for row in rows], k)


# -- settings


def lora_rank_limit(rank: int) -> int:
    """The smallest maximum rank vLLM accepts that holds `rank`. Raises: InvalidRequestError above the largest."""
    for limit in LORA_RANKS:
        if rank <= limit:
            return limit
    raise InvalidRequestError(f"LoRA rank {rank} is above {LORA_RANKS[-1]}, the largest vLLM can serve")


def lora_slots(config: Any, dtype: torch.dtype, rank: int) -> int:
    """Adapter slots on the CPU, from a transformers config: as many as 256 MiB hold at this rank, 4 to 32.

    Four hold what one training run samples from at once (the current version, the one before, an evaluation, a reference). A server of
    many has more: 64 requests over 32 versions are 1.75 times as fast on 32 slots as on 4, and slots that are not used cost memory only
    (docs/LOG.md, 2026-11-21).
    """
    shape = ModelShape.of(config, num_parameters=1)  # slots do not depend on that number, and a mixture of experts cannot reckon it
    return max(MIN_LORA_SLOTS, min(MAX_LORA_SLOTS, LORA_SLOT_BYTES // lora_slot_bytes(shape, rank, dtype.itemsize)))


def cpu_kv_cache(config: Any, dtype: torch.dtype, context: int, max_num_seqs: int) -> tuple[int, int]:
    """(bytes of the KV cache, context length it can hold) on the CPU, from a transformers text config.

    As many full contexts as max_num_seqs, at most 1 GiB; one full context if that takes more; never more than half of the free memory,
    where the context is cut down to what fits, with a warning.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads  # not in every family's config
    heads = config.num_key_value_heads
    block_bytes = 2 * config.num_hidden_layers * heads * head_dim * dtype.itemsize * KV_BLOCK_TOKENS
    blocks_per_context = -(-context // KV_BLOCK_TOKENS) + 1
    wanted = max(blocks_per_context, min(blocks_per_context * max_num_seqs, 2**30 // block_bytes)) + 1  # vLLM keeps one block empty
    free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    most = max(4, free_bytes // 2 // block_bytes)
    if wanted > most:
        shorter = min(context, (most - 2) * KV_BLOCK_TOKENS)
        if shorter < context:
            log.warning("keys and values of %d tokens do not fit into half of the free memory; the context is cut to %d", context, shorter)
        return int(most * block_bytes), int(shorter)
    return int(wanted * block_bytes), context


def _eos_token_ids(path: str, config: Any, tokenizer: Any) -> frozenset[int]:
    """As base_model.eos_token_ids(), without a loaded model: the tokenizer's EOS and those of the generation config."""
    try:
        listed = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # the model has no generation_config.json; transformers then makes one from the model's config
        listed = GenerationConfig.from_model_config(config).eos_token_id
    return end_token_ids(listed, tokenizer)
