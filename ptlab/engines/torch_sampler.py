"""The embedded Sampler on transformers: an async front, and one worker thread that owns the model.

Requests that arrive together are merged into one batch: the worker waits until a short time has passed without a new arrival, then takes
all that is queued. A request runs on exactly the adapter it names or not at all.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from ptlab.engines.adapter_slots import ENGINE, AdapterSlots
from ptlab.engines.base_model import eos_token_ids, load_base_model, load_tokenizer
from ptlab.engines.decode_attention import use_decode_attention
from ptlab.engines.decode_step import DecoderStep, DecodeStep, ModelStep
from ptlab.engines.decoder import can_decode
from ptlab.engines.generation import Draw, generate
from ptlab.engines.kv_cache import bytes_per_token
from ptlab.engines.logprobs import log_softmax
from ptlab.engines.protocols import AdapterRef, BaseModelInfo, SampleCall, SamplerCapabilities
from ptlab.engines.sample_batches import Batch, BatchInputs, Job, plan_batches
from ptlab.engines.sample_checks import check_call
from ptlab.engines.sampler_errors import as_engine_error, closed, not_loaded
from ptlab.engines.stop import StopRule, StopTexts, resolve_stop
from ptlab.engines.token_draw import SEED_MASK
from ptlab.errors import EngineError
from ptlab.types import SampleResponse


@dataclass(slots=True)
class _Command:
    """Something else the worker does between batches: load or unload an adapter."""

    operation: str
    run: Callable[[], frozenset[str]]
    future: Future[frozenset[str]]


class TorchSampler:
    """See `ptlab.engines.protocols.Sampler`. Usable from any thread and any event loop.

    Args:
        path: local directory or hub name of any transformers causal LM; the sampler loads a copy of its own.
        name: what clients call it; None = path.
        dtype: compute type; "auto" = float32 on the CPU, bfloat16 on a GPU. Adapters are float32 always.
        device: None = the first GPU where there is one, else the CPU.
        max_rows: most sequences in one batch.
        max_kv_bytes: most memory for keys and values of one batch; None = 1 GiB on the CPU, 40 % of what is free on a GPU.
        prefill_tokens: prompt tokens, padding included, in one forward pass.
        gather_quiet_s, gather_max_s: a batch starts when no request has arrived for gather_quiet_s, or gather_max_s after the first.
            A burst that is split gives the same draws up to float rounding, the same bits only if it is not split.

    Raises: ConfigError if there is no such model; EngineError if batched decoding gets other numbers from it than a plain forward pass.
    """

    def __init__(
        self,
        path: str,
        *,
        name: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        max_rows: int = 256,
        max_kv_bytes: int | None = None,
        prefill_tokens: int = 8192,
        gather_quiet_s: float = 0.008,
        gather_max_s: float = 0.25,
    ) -> None:
        self._model, self._info = load_base_model(path, name=name, dtype=dtype, device=device)
        tokenizer = load_tokenizer(path)
        use_decode_attention(self._model)
        self._eos_token_ids = eos_token_ids(self._model, tokenizer)
        self._stop_texts = StopTexts(tokenizer, self._info.vocab_size)
        by_decoder = self._model.device.type == "cpu" and can_decode(self._model)  # on a GPU its formulas would first be compiled
        self._step: DecodeStep = DecoderStep(self._model) if by_decoder else ModelStep(self._model)
        check_decoding(self._model, self._info, self._stop_texts, self._step)
        self._slots = AdapterSlots(self._model)
        self._max_rows = max_rows
        self._max_tokens = max(1, _kv_budget(max_kv_bytes, self._model.device) // bytes_per_token(self._model))
        self._prefill_tokens = prefill_tokens
        self._gather_quiet_s, self._gather_max_s = gather_quiet_s, gather_max_s

        self._changed = threading.Condition()  # guards the fields below
        self._queue: deque[Job | _Command] = deque()
        self._last_arrival = 0.0
        self._loaded: set[AdapterRef] = set()
        self._in_flight: Counter[AdapterRef] = Counter()
        self._closing = False
        self._worker = threading.Thread(target=self._work, name="ptlab-torch-sampler", daemon=True)
        self._worker.start()

    @property
    def info(self) -> BaseModelInfo:
        return self._info

    @property
    def capabilities(self) -> SamplerCapabilities:
        return SamplerCapabilities(max_lora_rank=None, lora_on_head=True, prompt_logprobs_with_head=True, arbitrary_prompt_scores=True)

    # -- the front: any thread, any loop

    async def sample(self, call: SampleCall) -> SampleResponse:
        """See the protocol. Cancelling the awaiting task takes the request out of the queue or the running batch.

        Raises: InvalidRequestError on a request that can never work; EngineError if call.adapter is not loaded or the model failed.
        """
        checked = check_call(call, self._info)
        stop = resolve_stop(call.params.stop, self._eos_token_ids, self._info.vocab_size)
        seed = secrets.randbits(63) if call.params.seed is None else call.params.seed & SEED_MASK
        job = Job(call, checked, stop, seed, Future())
        with self._changed:
            if call.adapter is not None:
                if call.adapter not in self._loaded:
                    raise not_loaded(call.adapter, ENGINE)
                self._in_flight[call.adapter] += 1
            try:
                self._enqueue(job)
            except EngineError:
                self._settle(call.adapter)
                raise
        job.future.add_done_callback(lambda _: self._settle(call.adapter))
        return await asyncio.wrap_future(job.future)

    async def load_adapter(self, adapter: AdapterRef) -> frozenset[str]:
        """See the protocol; loading a ref that is loaded checks it again.

        Raises: CheckpointError if the directory is missing, torn, or not a LoRA of this model; EngineError if the values in the model are
        not the file's, or the name is taken by another ref.
        """
        names = await self._command("load_adapter", lambda: self._slots.load(adapter))
        with self._changed:
            self._loaded.add(adapter)
        return names

    async def unload_adapter(self, adapter: AdapterRef) -> None:
        """See the protocol. New requests on the adapter are refused from now on; an unknown adapter is fine."""
        with self._changed:
            self._loaded.discard(adapter)

        def unload() -> frozenset[str]:
            self._slots.unload(adapter)
            return frozenset()

        while True:  # commands run between batches, in order of arrival, so what is in flight now has ended by the first turn
            with self._changed:
                in_flight = self._in_flight[adapter]
            if not in_flight:
                break
            await self._command("unload_adapter", frozenset)
        await self._command("unload_adapter", unload)

    async def close(self) -> None:
        """Fail what is queued or running, stop the thread. May be called again."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        await asyncio.to_thread(self._worker.join)

    async def _command(self, operation: str, run: Callable[[], frozenset[str]]) -> frozenset[str]:
        command = _Command(operation, run, Future())
        with self._changed:
            self._enqueue(command)
        return await asyncio.shield(asyncio.wrap_future(command.future))

    def _enqueue(self, item: Job | _Command) -> None:
        """Call with the lock held. Raises: EngineError once close() was called."""
        if self._closing:
            raise closed(ENGINE)
        self._queue.append(item)
        self._last_arrival = time.monotonic()
        self._changed.notify_all()

    def _settle(self, adapter: AdapterRef | None) -> None:
        if adapter is not None:
            with self._changed:
                self._in_flight[adapter] -= 1

    # -- the worker thread

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closing:
                    self._changed.wait()
                if self._closing:
                    waiting = list(self._queue)
                    self._queue.clear()
                    break
                head = self._queue[0]
                if isinstance(head, _Command):
                    self._queue.popleft()
            if isinstance(head, _Command):
                self._run_command(head)
            else:
                self._run_jobs(self._gather())
        for item in waiting:
            if item.future.set_running_or_notify_cancel():
                item.future.set_exception(closed(ENGINE))

    def _gather(self) -> list[Job]:
        """The jobs at the head of the queue, up to the next command, once the burst they belong to is over."""
        with self._changed:
            deadline = time.monotonic() + self._gather_max_s
            while not self._closing:
                now = time.monotonic()
                left = min(deadline, self._last_arrival + self._gather_quiet_s) - now
                if left <= 0:
                    break
                self._changed.wait(left)
            jobs: list[Job] = []
            while self._queue and isinstance(self._queue[0], Job):
                item = self._queue.popleft()
                assert isinstance(item, Job)
                jobs.append(item)
        return [job for job in jobs if not job.future.cancelled()]

    def _run_command(self, command: _Command) -> None:
        if not command.future.set_running_or_notify_cancel():
            return
        try:
            result = command.run()
        except Exception as err:
            command.future.set_exception(as_engine_error(err, command.operation, ENGINE))
        else:
            command.future.set_result(result)

    def _run_jobs(self, jobs: list[Job]) -> None:
        """Every job is answered, cancelled or failed when this returns."""
        try:
            for batch in plan_batches(jobs, max_tokens=self._max_tokens, max_rows=self._max_rows):
                self._run_batch(batch)
        except Exception as err:  # planning failed; a batch's own failure is dealt with there
            _fail(jobs, err)
        _fail(jobs, closed(ENGINE))  # none is left unless close() broke off the generation

    def _run_batch(self, batch: Batch) -> None:
        """Answer the jobs this batch completes; a failure fails the jobs of this batch only. Out of memory runs it in halves."""
        live = Batch(batch.adapter, tuple((job, sample) for job, sample in batch.draws if not job.future.done()))
        if not live.draws or self._closing:
            return
        try:
            self._generate(live)
        except torch.OutOfMemoryError as err:
            if len(live.draws) == 1:
                _fail(live.jobs, err)
                return
        except Exception as err:
            _fail(live.jobs, err)
            return
        else:
            return
        torch.cuda.empty_cache()
        for half in live.halves():
            self._run_batch(half)

    def _generate(self, batch: Batch) -> None:
        self._step.use(self._slots.activate(batch.adapter))
        inputs = BatchInputs(batch, self._model.device)
        results = generate(
            self._model,
            inputs.prompts,
            inputs.draws,
            stop_texts=self._stop_texts,
            chunk_tokens=self._prefill_tokens,
            score=inputs.score if inputs.has_scorers else None,
            abandoned=lambda: range(len(inputs.jobs)) if self._closing else inputs.gone(),
            next_logits=self._step,
        )
        inputs.deliver(batch, results)


def _fail(jobs: Sequence[Job], err: Exception) -> None:
    """Those of the jobs that are not answered yet."""
    for job in jobs:
        if not job.future.done() and job.future.set_running_or_notify_cancel():
            job.future.set_exception(as_engine_error(err, "sample", ENGINE))


def _kv_budget(asked: int | None, device: torch.device) -> int:
    if asked is not None:
        return asked
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * 0.4)
    return 2**30


def check_decoding(model: Any, info: BaseModelInfo, stop_texts: StopTexts, step: DecodeStep) -> None:
    """Compare padded, cached, batched decoding with plain forward passes on a few tokens.

    Raises: EngineError if they differ: the architecture does something this sampler does not know.
    """
    prompts = [[i % info.vocab_size for i in range(1, 1 + length)] for length in (2, 7)]
    greedy = {"seed": 0, "stream": 0, "temperature": 0.0, "top_k": -1, "top_p": 1.0, "max_tokens": 3, "stop": StopRule(frozenset(), ())}
    draws = [Draw(prompt=i, owner=i, **greedy) for i in range(len(prompts))]  # type: ignore[arg-type]
    gap = 0.0
    found = generate(model, prompts, draws, stop_texts=stop_texts, chunk_tokens=6, next_logits=step)
    for prompt, drawn in zip(prompts, found, strict=True):
        assert drawn is not None
        tokens_T = torch.from_numpy(drawn.tokens_T).long().to(model.device)
        with torch.inference_mode():
            logits_TV = model(input_ids=torch.tensor([[*prompt, *tokens_T.tolist()]], device=model.device)).logits[0]
        logprobs_T = log_softmax(logits_TV.float())[len(prompt) - 1 : -1].gather(1, tokens_T[:, None])[:, 0]
        gap = max(gap, float((logprobs_T.cpu() - torch.from_numpy(drawn.logprobs_T)).abs().max()))
    if not gap < (1e-3 if info.dtype == "float32" else 0.5):
        raise EngineError(
            f"{info.name} ({info.arch}): batched decoding differs from a plain forward pass by {gap:.3g} nats; "
            f"its attention or positions do something this sampler does not know, and samples from it would be wrong",
            engine=ENGINE,
            operation="load",
        )
