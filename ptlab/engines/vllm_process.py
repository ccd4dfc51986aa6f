"""vLLM and the process it is imported into: its environment, what it changes for everyone in it, and what it keeps once per process.

The first module of ptlab to import vLLM, so that its variables are set before.
"""

from __future__ import annotations

import logging
import os
import queue
import random
import threading
import uuid
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch

from ptlab.errors import ConfigError

# vLLM reads these when it is imported. A user's own settings stand.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # else every start writes some forty lines
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
if not torch.cuda.is_available():
    # On a CPU vLLM compiles nothing but a few helpers of its sampler, which takes a C++ compiler and seconds at the first request.
    # Both ways are needed: the variable for its own processes, the setting here, where torch may have read the variable already.
    import torch._dynamo.config

    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    torch._dynamo.config.disable = True
os.environ.setdefault("VLLM_PLUGINS", "")  # no plugins: each would be imported, and may change the engine
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # a fork would copy our threads' locks, and CUDA does not survive it

DEATH_POLL_S = 0.5


@contextmanager
def import_warnings_hidden() -> Iterator[None]:
    """vLLM and what it imports warn of their own deprecated calls, which is no user's business and fails a run with -W error."""
    triton_log = logging.getLogger("torch._library.triton")
    level = triton_log.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        triton_log.setLevel(logging.ERROR)  # "Triton not available": nothing on the CPU asks for it
        try:
            yield
        finally:
            triton_log.setLevel(level)


try:
    with import_warnings_hidden():
        import vllm.v1.engine.core as vllm_core
except ImportError as err:
    raise ConfigError(
        f"the vllm sampler needs vLLM, which cannot be imported here ({err}); install ptlab with the extra 'cpu' (no GPU) or 'gpu' "
        f"(CUDA GPU), or use the sampler of kind 'torch'"
    ) from err


class ThisProcess:
    """What engines in one process share: vLLM keeps its forward context and its process groups in module variables.

    So they take turns, and only the last one to close tears the groups down.
    """

    turn: ClassVar[threading.RLock] = threading.RLock()
    starting: ClassVar[threading.RLock] = threading.RLock()
    """Held while any engine starts, also one in a process of its own: starts change the environment. Taken after `turn`, never before."""
    num_engines: ClassVar[int] = 0


@contextmanager
def torch_untouched() -> Iterator[None]:
    """Put back what starting vLLM in a process changes for everyone in it: seeds, default dtype, and torch.set_num_threads itself.

    Memory stays unbound: vLLM would bind all of the process, the trainer's part too, to one NUMA node.
    """
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    dtype, set_num_threads, num_threads = torch.get_default_dtype(), torch.set_num_threads, torch.get_num_threads()
    vllm_ops: Any = torch.ops._C
    vllm_ops.init_cpu_memory_env = lambda nodes: ""
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads  # vLLM replaces it by a function that only warns
        torch.set_num_threads(num_threads)
        torch.set_default_dtype(dtype)
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for a while."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def groups_kept() -> Iterator[None]:
    """Close an engine without the process groups, which another engine in this process still uses."""
    stock = vllm_core.cleanup_dist_env_and_memory
    vllm_core.cleanup_dist_env_and_memory = lambda: None
    try:
        yield
    finally:
        vllm_core.cleanup_dist_env_and_memory = stock


def notice_death(client: Any) -> None:
    """Let waiting calls of vLLM's process client fail when its process is gone; of a killed one they would wait for ever."""
    results = client.outputs_queue

    def get() -> Any:
        while True:
            try:
                return queue.Queue.get(results, timeout=DEATH_POLL_S)
            except queue.Empty:
                client.ensure_alive()

    def call_utility(method: str, *args: Any) -> Any:
        call_id = uuid.uuid1().int >> 64
        future: Future[Any] = Future()
        client.utility_results[call_id] = future
        client._send_input(vllm_core.EngineCoreRequestType.UTILITY, (0, call_id, method, args))
        while True:
            try:
                return future.result(timeout=DEATH_POLL_S)
            except TimeoutError:
                client.ensure_alive()

    results.get = get
    client.call_utility = call_utility
