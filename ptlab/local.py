"""The composition root: from names and config sections to engines, a backend on its loop, and a client.

Two ways in: `open_service(config)` for a recipe (checkpoints in the run directory), and `ServiceClient()`, the class that
`import ptlab as tinker` offers (one backend per process, checkpoints in a directory of the user's). Nowhere else are engines chosen.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from ptlab.backend.backend import Backend
from ptlab.client import rest, service
from ptlab.client.connection import BackendConnection, Session
from ptlab.config import EnginesConfig, PeftTrainerConfig, RunConfig, TorchSamplerConfig, VllmSamplerConfig
from ptlab.engines.protocols import Engines, Sampler

if TYPE_CHECKING:
    from ptlab.engines.memory_plan import MemoryPlan
    from ptlab.engines.peft_trainer import PeftTrainer

SMALL_MODEL_PARAMETERS = 50_000_000
"""Below this, one CPU thread beats several: two threads on busy cores spin at their barriers (docs/LOG.md)."""
CLOSE_TIMEOUT_S = 60.0
DEFAULT_LORA_SLOTS = 4
"""Adapter versions in one batch on a GPU, where each slot takes the memory of an adapter of the largest rank."""
DEFAULT_MAX_LORA_RANK = 128
"""Where nobody says what ranks will come (`ServiceClient()`, `ptlab serve`): the largest of the cookbook. vLLM takes memory for it."""
MIN_RAM_DISK_BYTES = 2**30
"""Less is not worth it: containers often have a RAM disk of 64 MiB, an adapter of an 8B model takes 175."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LocalService:
    """A client and what else the process knows about its backend."""

    client: ServiceClient
    metrics: MetricsBox


class MetricsBox:
    """The newest `sync/*` metrics, taken out once per log row. Thread-safe: the backend's loop fills it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, float] = {}

    def put(self, metrics: Mapping[str, float]) -> None:
        with self._lock:
            self._values.update(metrics)

    def take(self) -> dict[str, float]:
        with self._lock:
            values, self._values = self._values, {}
        return values


class ServiceClient(service.ServiceClient):
    """`ServiceClient()` as the official SDK has it, served by this process.

    All instances share one backend, which opens a base model when it is first named: a hub id, a local directory, or
    "ptlab/quickstart". Checkpoints lie in $PTLAB_DATA_DIR, else $XDG_DATA_HOME/ptlab, else ~/.local/share/ptlab.
    """

    def _open_connection(self) -> BackendConnection:
        return _default_connection()


class RestClient(rest.RestClient):
    """`RestClient()` as the official SDK has it: alone it asks the backend that all `ServiceClient()` of this process share."""

    def __init__(self, _holder: Session | None = None, *, base_url: str | None = None, api_key: str | None = None) -> None:
        if _holder is None and base_url is None:
            _holder = ServiceClient().holder
        super().__init__(_holder, base_url=base_url, api_key=api_key)


@contextmanager
def open_service(config: RunConfig) -> Iterator[LocalService]:
    """A service for one run: the config's model and engines, checkpoints below the run directory. Closes everything at the end."""
    metrics = MetricsBox()
    paths = {config.model.name: config.model.path} if config.model.path else {}
    connection = _connect(
        config.directory / "checkpoints",
        config.engines,
        paths,
        metrics,
        max_lora_rank=config.lora.rank,
        base_models=(config.model.name,),
        unembed=config.lora.unembed,
    )
    try:
        with ServiceClient(connection=connection, display_name=config.name) as client:
            yield LocalService(client, metrics)
    finally:
        _disconnect(connection)


@contextmanager
def open_remote(config: RunConfig, base_url: str) -> Iterator[LocalService]:
    """The same for a run on a server: `ptlab serve`, or any that speaks Tinker. The key is TINKER_API_KEY; engines are the server's own."""
    from ptlab.client.remote import RemoteServiceClient
    from ptlab.engines.base_model import load_tokenizer

    paths = {config.model.name: config.model.path} if config.model.path else {}
    with RemoteServiceClient(
        load_tokenizer=lambda name: load_tokenizer(resolve_model(name, paths)), base_url=base_url, display_name=config.name
    ) as client:
        yield LocalService(cast("ServiceClient", client), MetricsBox())  # it has what recipes use


def data_dir() -> Path:
    """Where `ServiceClient()` keeps checkpoints."""
    if "PTLAB_DATA_DIR" in os.environ:
        return Path(os.environ["PTLAB_DATA_DIR"]).expanduser()
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "ptlab"


@cache
def _default_connection() -> BackendConnection:
    """Lives as long as the process, on daemon threads."""
    return _connect(data_dir(), default_engines(), {}, MetricsBox(), max_lora_rank=DEFAULT_MAX_LORA_RANK)


def default_engines() -> EnginesConfig:
    """vLLM where it is installed, else the torch sampler, with a warning that says what to do."""
    if find_spec("vllm") is not None:
        return EnginesConfig()
    logger.warning("vLLM is not installed: sampling with the slower torch sampler (`ptlab doctor` says more)")
    return EnginesConfig(sampler=TorchSamplerConfig())


def _connect(
    data: Path,
    engines: EnginesConfig,
    paths: Mapping[str, str],
    metrics: MetricsBox,
    *,
    max_lora_rank: int,
    base_models: tuple[str, ...] = (),
    unembed: Literal["auto", "require"] = "auto",
) -> BackendConnection:
    backend = Backend(
        data_dir=data,
        scratch_dir=_scratch_dir(engines.scratch_dir),
        open_engines=lambda name: open_engines(name, resolve_model(name, paths), engines, max_lora_rank),
        on_metrics=metrics.put,
        base_models=base_models,
        unembed=unembed,
    )
    return BackendConnection(backend)


def _disconnect(connection: BackendConnection) -> None:
    if not connection.closed:
        connection.submit(connection.backend.close()).result(timeout=CLOSE_TIMEOUT_S)
        connection.close()


def _scratch_dir(wanted: str | None) -> Path:
    """A fresh directory for versions that live only while someone samples from them: in RAM where there is room for some."""
    ram = Path("/dev/shm")
    parent = Path(wanted).expanduser() if wanted else ram
    if wanted:
        parent.mkdir(parents=True, exist_ok=True)
    elif not os.access(ram, os.W_OK) or shutil.disk_usage(ram).free < MIN_RAM_DISK_BYTES:
        parent = Path(tempfile.gettempdir())
    directory = Path(tempfile.mkdtemp(prefix="ptlab-", dir=parent))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)  # for a process that ends without closing its backend
    return directory


def resolve_model(name: str, paths: Mapping[str, str]) -> str:
    """What the engines load for a model name: its directory from the config, a tiny model's (made on first use), or the name."""
    if name in paths:
        return paths[name]
    from ptlab.tiny_models.table import tiny_model_directory  # engines are imported where they are opened: `import ptlab` stays quick

    return str(tiny_model_directory(name) or name)


def open_engines(name: str, path: str, config: EnginesConfig, max_lora_rank: int, *, own_process: bool = False) -> Engines:
    """Load trainer, sampler and tokenizer of one base model. Takes seconds to minutes.

    Args:
        max_lora_rank: largest rank the sampler must serve, unless the config says another.
        own_process: on a CPU too vLLM gets a process of its own, as it has on a GPU anyway. For the second base model of a process and
            those after it, which would sample in turns with the first. Small models gain nothing by it and stay (docs/samplers.md).
    Raises: ConfigError if there is no such model, or the sampler is not installed.
    """
    from ptlab.engines.base_model import load_tokenizer

    match config.trainer.kind:
        case "peft":
            trainer = _open_peft(name, path, config.trainer)
    mode: Literal["auto", "process"] = "process" if own_process and trainer.num_parameters >= SMALL_MODEL_PARAMETERS else "auto"
    sampler = _open_sampler(name, path, config.sampler, trainer, max_lora_rank, mode)
    return Engines(trainer=trainer, sampler=sampler, tokenizer=load_tokenizer(path))


def _open_peft(name: str, path: str, config: PeftTrainerConfig) -> PeftTrainer:
    import torch

    from ptlab.engines.peft_trainer import PeftTrainer

    on_gpu = torch.cuda.is_available()
    trainer = PeftTrainer(
        path,
        name=name,
        dtype=config.dtype,
        tokens_per_micro_batch=config.tokens_per_micro_batch,
        recompute="layers" if on_gpu else "nothing",
    )
    if not on_gpu and trainer.num_parameters < SMALL_MODEL_PARAMETERS:
        torch.set_num_threads(1)
    return trainer


def _open_sampler(
    name: str,
    path: str,
    config: TorchSamplerConfig | VllmSamplerConfig,
    trainer: PeftTrainer,
    max_lora_rank: int,
    mode: Literal["auto", "process"],
) -> Sampler:
    dtype = trainer.info.dtype if config.dtype == "auto" else config.dtype
    match config.kind:
        case "torch":
            from ptlab.engines.torch_sampler import TorchSampler

            return TorchSampler(path, name=name, dtype=dtype)
        case "vllm":
            from ptlab.engines.vllm_sampler import VllmSampler

            rank = config.max_lora_rank or max_lora_rank
            plan = _gpu_plan(path, config, trainer, rank)
            return VllmSampler(
                path,
                name=name,
                dtype=dtype,
                mode=mode,
                max_context_length=plan.longest_tokens if plan else None,
                max_loras=config.max_loras or (DEFAULT_LORA_SLOTS if plan else None),
                max_lora_rank=rank,
                engine_args=plan.engine_args if plan else None,
            )


def _gpu_plan(path: str, config: VllmSamplerConfig, trainer: PeftTrainer, lora_rank: int) -> MemoryPlan | None:
    """How trainer and vLLM share the card; None on a CPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    from ptlab.engines.memory_trial import plan_for_gpu

    return plan_for_gpu(
        trainer,
        path,
        num_parameters=trainer.num_parameters,
        lora_rank=lora_rank,
        lora_slots=config.max_loras or DEFAULT_LORA_SLOTS,
        gpu_memory_utilization=config.gpu_memory_utilization,
    )
