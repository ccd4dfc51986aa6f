"""One thread that owns a vLLM engine: it steps it, loads adapters between steps, and builds it anew when it breaks.

The engine runs in this process ("inproc": the CPU, tests) or in one of its own ("process": a GPU); the code is the same. After any failure
all requests fail with EngineLostError, the engine is made again, and the live adapters are loaded into it again.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import logging
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ptlab.engines.protocols import AdapterRef
from ptlab.engines.sampler_errors import as_engine_error, closed, first_line, named, not_loaded, not_the_files
from ptlab.engines.stop import StopTexts
from ptlab.engines.vllm_child import main_module_replaced
from ptlab.engines.vllm_process import (  # before vllm itself
    ThisProcess,
    environment,
    groups_kept,
    import_warnings_hidden,
    notice_death,
    torch_untouched,
)
from ptlab.errors import CheckpointError, EngineLostError, PtlabError

with import_warnings_hidden():
    from vllm.engine.arg_utils import EngineArgs
    from vllm.inputs.engine import tokens_input
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.v1.engine.exceptions import EngineDeadError
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor import Executor

ENGINE = "vllm sampler"
EXTENSION = "ptlab.engines.vllm_patches.LoraReadBack"
EXIT_TIMEOUT_S = 20.0
Mode = Literal["inproc", "process"]
log = logging.getLogger(__name__)


@dataclass(slots=True)
class Drawing:
    """One draw as it grows."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    topk: list[list[tuple[int, float]]] = field(default_factory=list)
    """(token, logprob) of each position, likeliest first; empty if not asked for."""
    prompt: Any = None
    """vLLM's FlatLogprobs of the prompt, of the draw that asked for it."""
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache."""
    ended: Literal["", "stop", "length"] = ""


@dataclass(slots=True, eq=False)
class EngineRequest:
    """Draws after one prompt, on one adapter."""

    tokens: list[int]
    params: Sequence[Any]
    """vllm.SamplingParams, one per draw, each with n=1."""
    adapter: AdapterRef | None
    stop_texts: tuple[str, ...]
    may_end_V: NDArray[np.bool_] | None
    """StopTexts.may_end(stop_texts); None if there are no texts."""
    future: Future[list[Drawing]]
    drawings: list[Drawing] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    """The engine's ids of the draws."""

    def add(self, index: int, output: Any, found: Callable[[Sequence[int]], bool]) -> bool:
        """Take what a step made of draw `index`. Returns whether it ended by a stop text, which the engine does not know of."""
        drawing, completion = self.drawings[index], output.outputs[0]
        if output.prompt_logprobs:
            drawing.prompt = output.prompt_logprobs
        drawing.num_cached_tokens = output.num_cached_tokens or 0
        flat = completion.logprobs
        for i, token in enumerate(completion.token_ids):
            begin, end = flat.start_indices[i], flat.end_indices[i]
            drawing.tokens.append(token)
            drawing.logprobs.append(flat.logprobs[begin])
            if end > begin + 1:
                drawing.topk.append(list(zip(flat.token_ids[begin + 1 : end], flat.logprobs[begin + 1 : end], strict=True)))
            if self.may_end_V is not None and self.may_end_V[token] and found(drawing.tokens):
                drawing.ended = "stop"
                return not output.finished
        if output.finished:
            drawing.ended = "stop" if completion.finish_reason == "stop" else "length"
        return False

    @property
    def done(self) -> bool:
        return all(drawing.ended for drawing in self.drawings)


@dataclass(slots=True)
class _Command:
    operation: str
    run: Callable[[], Any]
    future: Future[Any]


class VllmEngine:
    """Usable from any thread. The constructor returns once the engine runs.

    Args:
        settings: arguments of vllm.EngineArgs.
        mode: "inproc" = in this process; "process" = in one of its own.

    Raises: EngineError if vLLM cannot start.
    """

    def __init__(self, settings: Mapping[str, Any], *, mode: Mode, stop_texts: StopTexts) -> None:
        self._settings = dict(settings)
        self._mode: Mode = mode
        self._stop_texts = stop_texts
        self._turn: AbstractContextManager[Any] = ThisProcess.turn if mode == "inproc" else nullcontext()
        self._int_ids = itertools.count(1)
        self._engine: Any = None
        self._loras: dict[AdapterRef, LoRARequest] = {}
        self._running: dict[str, tuple[EngineRequest, int]] = {}
        self.num_restarts = 0

        self._changed = threading.Condition()  # guards the two below
        self._queue: list[EngineRequest | _Command] = []
        self._closing = False
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._work, args=(started,), name="ptlab-vllm", daemon=True)
        self._thread.start()
        started.result()
        atexit.register(self.close)  # registered after vLLM's own clean-up, so called before it: that would pull the engine from under us

    # -- the front: any thread

    def submit(self, request: EngineRequest) -> None:
        """Its future gets the draws, or an EngineError (EngineLostError where the engine broke); cancelling the future aborts them.

        Raises: EngineError once close() was called.
        """
        request.future.add_done_callback(lambda future: self._abort(request) if future.cancelled() else None)
        self._enqueue(request)

    def call(self, operation: str, run: Callable[[], Any]) -> Future[Any]:
        """Run something on the engine's thread between steps. Raises: EngineError once close() was called."""
        command = _Command(operation, run, Future())
        self._enqueue(command)
        return command.future

    def close(self) -> None:
        """Fail what is queued or running, stop engine and thread. May be called again."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        atexit.unregister(self.close)

    def _enqueue(self, item: EngineRequest | _Command) -> None:
        with self._changed:
            if self._closing:
                raise closed(ENGINE)
            self._queue.append(item)
            self._changed.notify_all()

    def _abort(self, request: EngineRequest) -> None:
        with self._changed:
            if not self._closing:
                self._queue.append(_Command("abort", lambda: self._forget(request), Future()))
                self._changed.notify_all()

    # -- on the thread: adapters

    def load(self, adapter: AdapterRef) -> frozenset[str]:
        """Load an adapter and compare what the model holds with its file; again only compares. Call it through `call`.

        Returns names as they stand in the file of the tensors found with the file's values, and names of modules that hold values the file
        does not have.
        Raises: CheckpointError if vLLM refuses the adapter; EngineError if the model holds other values. It is not loaded then.
        """
        engine = self._running_engine()
        known = self._loras.get(adapter)
        # vLLM keys its prefix cache by name and path; with the id in the name, not even a rewritten directory meets old keys
        int_id = next(self._int_ids)
        lora = known or LoRARequest(lora_name=f"{adapter.name}#{int_id}", lora_int_id=int_id, lora_path=str(adapter.path))
        try:
            engine.add_lora(lora)  # of a known one: moves it into a slot again, where it can be read
            landed, wrong = _one(engine.engine_core.collective_rpc("ptlab_read_back", args=(lora.lora_int_id, lora.lora_path)))
        except EngineDeadError:
            raise
        except Exception as err:
            self._drop(adapter, lora)
            raise CheckpointError(f"{adapter.path}: vLLM cannot serve this adapter: {first_line(err)}") from err
        of_the_file = [name for name in wrong if name.endswith(".weight")]
        if of_the_file:
            self._drop(adapter, lora)
            raise not_the_files(adapter, of_the_file[0], ENGINE, count=len(of_the_file))
        self._loras[adapter] = lora
        return frozenset(landed) | frozenset(wrong)

    def unload(self, adapter: AdapterRef) -> None:
        """Unknown adapters are fine. Call it through `call`, when no request is on it."""
        if adapter in self._loras:
            self._drop(adapter, self._loras[adapter])

    def rpc(self, method: str) -> Any:
        """Result of a method of the worker extension. Call it through `call`."""
        return _one(self._running_engine().engine_core.collective_rpc(method))

    def _drop(self, adapter: AdapterRef, lora: LoRARequest) -> None:
        self._loras.pop(adapter, None)
        self._running_engine().remove_lora(lora.lora_int_id)

    # -- on the thread: the loop

    def _work(self, started: Future[None]) -> None:
        try:
            self._engine = self._start()
        except Exception as err:
            started.set_exception(as_engine_error(err, "start", ENGINE))
            return
        started.set_result(None)
        while self._turn_once():
            pass
        self._fail_all(closed(ENGINE))
        self._stop()

    def _turn_once(self) -> bool:
        """Do what is queued, then one step. False once closing."""
        with self._changed:
            while not (self._queue or self._running or self._closing):
                self._changed.wait()
            if self._closing:
                return False
            items, self._queue = self._queue, []
        for item in items:
            if isinstance(item, EngineRequest):
                self._guarded(functools.partial(self._admit, item), "sample", item.future)
            elif item.future.set_running_or_notify_cancel():
                self._guarded(functools.partial(_run_command, item), item.operation, item.future)
        if self._running:
            self._guarded(self._step, "sample", None)
        return True

    def _guarded(self, work: Callable[[], None], operation: str, future: Future[Any] | None) -> None:
        """Errors of ours belong to `future`; any other, and a dead engine, cost all requests and the engine."""
        try:
            with self._turn:
                work()
        except PtlabError as err:
            if future is None:
                raise
            _fail(future, err)
        except Exception as err:
            failure = EngineLostError(f"{operation} failed: {named(err)}", engine=ENGINE, operation=operation)
            failure.__cause__ = err
            if future is not None:
                _fail(future, failure)
            self._fail_running(failure)
            log.warning("vLLM failed (%s); it is started again with %d adapters", failure, len(self._loras))
            self._restart()

    def _admit(self, request: EngineRequest) -> None:
        if request.future.cancelled():
            return
        engine = self._running_engine()
        if request.adapter is not None and request.adapter not in self._loras:
            raise not_loaded(request.adapter, ENGINE)
        lora = None if request.adapter is None else self._loras[request.adapter]
        request.drawings = [Drawing() for _ in request.params]
        request.keys = [uuid.uuid4().hex for _ in request.params]
        for index, (key, params) in enumerate(zip(request.keys, request.params, strict=True)):
            self._running[key] = (request, index)
            engine.add_request(key, tokens_input(request.tokens), params, lora_request=lora)

    def _step(self) -> None:
        for output in self._engine.step():
            if output.request_id not in self._running:
                continue  # aborted in this very step
            request, index = self._running[output.request_id]
            if request.add(index, output, functools.partial(self._stop_texts.found, request.stop_texts)):
                self._engine.abort_request([output.request_id])
            if request.drawings[index].ended:
                del self._running[output.request_id]
                if request.done and request.future.set_running_or_notify_cancel():
                    request.future.set_result(request.drawings)

    def _forget(self, request: EngineRequest) -> None:
        keys = [key for key in request.keys if self._running.pop(key, None)]
        if keys and self._engine is not None:
            self._engine.abort_request(keys)

    def _fail_running(self, err: PtlabError) -> None:
        running, self._running = self._running, {}
        for request, _ in running.values():
            _fail(request.future, err)

    def _fail_all(self, err: PtlabError) -> None:
        self._fail_running(err)
        with self._changed:
            items, self._queue = self._queue, []
        for item in items:
            _fail(item.future, err)

    # -- on the thread: the engine's life

    def _running_engine(self) -> Any:
        """Raises: EngineError if it broke and cannot be started again."""
        if self._engine is None:
            self._engine = self._start()
            self._reload()
        return self._engine

    def _restart(self) -> None:
        """A new engine with the live adapters; if that fails too, the next request tries again."""
        self.num_restarts += 1
        self._stop()
        try:
            self._running_engine()
        except Exception as err:
            self._stop()
            log.error("vLLM cannot be started again: %s", first_line(err))

    def _reload(self) -> None:
        wanted, self._loras = list(self._loras), {}
        for adapter in wanted:
            try:
                self.load(adapter)
            except PtlabError as err:  # requests on it are refused from now on
                log.error("adapter %r is lost in the restart of vLLM: %s", adapter.name, err)

    def _start(self) -> Any:
        inproc = self._mode == "inproc"
        # parts of vLLM look at the variable rather than at multiprocess_mode; the others are for the new process, which would tell the
        # terminal about NUMA nodes and deprecated calls of its own
        variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0" if inproc else "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
        with (
            self._turn,  # an engine in a process of its own leaves those in this one running while it starts
            ThisProcess.starting,
            torch_untouched() if inproc else nullcontext(),
            main_module_replaced(),
            import_warnings_hidden(),
            environment(variables),
        ):
            config = EngineArgs(**self._settings, worker_extension_cls=EXTENSION).create_engine_config()
            engine = LLMEngine(config, Executor.get_class(config), log_stats=False, multiprocess_mode=not inproc)
            ThisProcess.num_engines += inproc
        if not inproc:
            notice_death(engine.engine_core)
        try:
            with self._turn:
                _prove(engine)
        except Exception:
            self._engine = engine
            self._stop()
            raise
        return engine

    def _stop(self) -> None:
        engine, self._engine = self._engine, None
        if engine is None:
            return
        processes = [] if self._mode == "inproc" else list(engine.engine_core.resources.engine_manager.processes)
        with self._turn:
            if self._mode == "inproc":
                ThisProcess.num_engines -= 1
            with groups_kept() if self._mode == "inproc" and ThisProcess.num_engines else nullcontext():
                try:
                    engine.engine_core.shutdown()
                except Exception as err:  # a broken engine may fail to close as well; it is not used again
                    log.warning("vLLM did not close cleanly: %s", first_line(err))
        for process in processes:  # vLLM sends the signals but does not wait for the end: a zombie would stay
            process.join(timeout=EXIT_TIMEOUT_S)


def _prove(engine: Any) -> None:
    """Draw one token: shapes that vLLM has no kernel for are found at start-up, and what it imports late is imported by now."""
    kind = RequestOutputKind.FINAL_ONLY
    params = SamplingParams(max_tokens=1, seed=1, logprobs=0, prompt_logprobs=0, detokenize=False, flat_logprobs=True, output_kind=kind)
    engine.add_request("start", tokens_input([0, 0]), params)
    while engine.has_unfinished_requests():
        engine.step()


def _run_command(command: _Command) -> None:
    command.future.set_result(command.run())


def _fail(future: Future[Any], err: PtlabError) -> None:
    if not future.done() and (future.running() or future.set_running_or_notify_cancel()):
        future.set_exception(err)


def _one(results: Sequence[Any]) -> Any:
    (result,) = results  # one worker: ptlab's vLLM runs on one device
    return result
