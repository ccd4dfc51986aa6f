"""The one core behind both faces: sessions, models, sampling sessions; one coroutine per operation.

Invariants kept here, so that no face has to: one writer per model; a model's requests run by seq_id, waiting for gaps, each at most
once; datums are checked before they reach an engine; a failed request changes nothing; what is sampled is what was published.
All coroutines run on one event loop; blocking work happens on the trainers' threads or in worker threads.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import shutil
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from ptlab.backend.catalog import Catalog
from ptlab.backend.checkpoints import CheckpointPath, Checkpoints, Manifest, Probe, expiry
from ptlab.backend.imports import import_adapter
from ptlab.backend.models import Models, Replayable, TrainingPass
from ptlab.backend.parking import Parking
from ptlab.backend.records import LOCAL_OWNER, Model, Session, digest
from ptlab.backend.runs import Runs
from ptlab.backend.sampling import SamplingSession, SamplingSessions
from ptlab.backend.sequences import Sequences
from ptlab.backend.served import ServedModel, ServedModels
from ptlab.backend.store import LossRow, RequestRow, SessionRow, Store
from ptlab.engines.protocols import AdapterRef, Engines, lora_alpha
from ptlab.errors import InvalidRequestError, NotFoundError, WeightSyncError
from ptlab.loss_graph import LossGraph
from ptlab.losses import LossCall, resolve_loss
from ptlab.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    GetInfoResponse,
    GetSessionResponse,
    ListSessionsResponse,
    LoadWeightsResponse,
    LoraConfig,
    ModelData,
    OptimStepResponse,
    SaveWeightsExternalResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
)

T = TypeVar("T")
LossConfig = Mapping[str, float | str] | None
logger = logging.getLogger(__name__)


class Backend:
    """See the module text.

    Args:
        data_dir: checkpoints, runs and parked models live here and are found again by the next process.
        scratch_dir: for versions that live only while someone samples from them; a RAM disk serves best.
        open_engines: makes the engines of a base model by name (blocking). Raises InvalidRequestError for names it cannot serve.
        on_metrics: told the `sync/*` metrics of each weight sync.
        base_models: names to show as supported before anyone has asked for them.
        unembed: what to do about train_unembed where the sampler cannot serve it: "auto" = train without and warn, "require" = refuse.
        max_lora_rank: largest rank of a new adapter; None = any the sampler takes.
        store: what survives this process besides files; None = nothing does, and the scratch directory is emptied on close.
        read_journal: what a stored request did to its model; the face that stores requests knows (backend/requests.py).
        seed: draws and first adapter weights for which no client gave a seed follow from it; None = they are random.
        strict_losses: refuse losses whose formula is ptlab's own although the hosted service has one of that name.
    """

    def __init__(
        self,
        *,
        data_dir: Path,
        scratch_dir: Path,
        open_engines: Callable[[str], Engines],
        on_metrics: Callable[[Mapping[str, float]], None],
        base_models: Sequence[str] = (),
        unembed: Literal["auto", "require"] = "auto",
        max_lora_rank: int | None = None,
        store: Store | None = None,
        read_journal: Callable[[RequestRow], Replayable] | None = None,
        seed: int | None = None,
        strict_losses: bool = False,
    ) -> None:
        self._durable = store is not None
        self.store = store or Store.open(None)
        self._checkpoints = Checkpoints(data_dir)
        self._runs = Runs(data_dir, self._checkpoints)
        self._scratch = scratch_dir
        self._seed = seed
        self._strict_losses = strict_losses
        self.served = ServedModels(open_engines, on_metrics)
        self._sessions: dict[str, Session] = {}
        sequences = Sequences(self.store)
        self.sampling = SamplingSessions(self._checkpoints, self.store, sequences, self.served.get)
        self.models = Models(
            store=self.store,
            checkpoints=self._checkpoints,
            runs=self._runs,
            sequences=sequences,
            serve=self.served.get,
            resolve_loss=self._resolve_loss,
            read_journal=read_journal or (lambda _: None),
            settled=_nothing_to_settle,
            parking=Parking(data_dir),
            durable=self._durable,
            unembed=unembed,
            max_lora_rank=max_lora_rank,
            by_id={},
        )
        self.catalog = Catalog(self._checkpoints, self._runs, base_models, self.served.opened)

    async def close(self) -> None:
        """End every engine and delete what was only for this process."""
        self.sampling.forget_all()  # their versions end with the engines
        await self.served.close()
        if not self._durable:
            await asyncio.to_thread(shutil.rmtree, self._scratch, ignore_errors=True)
        await asyncio.to_thread(self.store.close)

    async def restore(self) -> None:
        """What earlier processes with the same store left: sessions, parked models, sampling sessions."""
        for row in await self.store.sessions():
            session = Session(row.session_id, row.ordinal, row.owner, row.user_metadata, row.display_name, row.project_id, row.created)
            session.finished = row.finished
            self._sessions[row.session_id] = session
        for model in await self.store.models():
            await self.models.restore(model, self._sessions[model.session_id])
        versions = set()
        for sampler in await self.store.samplers():
            self.sampling.restore(sampler)
            versions.add(Path(sampler.version["path"]).name if sampler.version else "")
        self._scratch.mkdir(parents=True, exist_ok=True)
        for directory in self._scratch.iterdir():
            if directory.name not in versions:
                await asyncio.to_thread(shutil.rmtree, directory)

    # -- sessions and base models

    async def create_session(
        self,
        *,
        user_metadata: dict[str, str] | None = None,
        project_id: str | None = None,
        display_name: str | None = None,
        owner: str = LOCAL_OWNER,
        tags: Sequence[str] = (),
    ) -> str:
        now = time.time()
        row = await self.store.add_session(
            SessionRow(
                session_id=str(uuid.uuid4()),
                ordinal=0,
                owner=owner,
                user_metadata=user_metadata,
                display_name=display_name,
                project_id=project_id,
                tags=list(tags),
                created=now,
                last_seen=now,
                finished=None,
            )
        )
        session = Session(row.session_id, row.ordinal, owner, user_metadata, display_name, project_id)
        self._sessions[session.session_id] = session
        return session.session_id

    async def heartbeat(self, session_id: str) -> None:
        """The client is still there. Raises: NotFoundError for a session that is unknown or finished."""
        session = self.session(session_id)
        if session.finished is not None:
            raise NotFoundError(f"session {session_id!r} is finished ({session.finished})")
        session.last_seen = time.time()

    async def finish_session(self, session_id: str, *, status: str, detail: str | None = None) -> None:
        """The first status wins. Models stay: their checkpoints may still be asked for."""
        session = self.session(session_id)
        if session.finished is None:
            session.finished = status if detail is None else f"{status}: {detail}"
            await self.store.set_session(session_id, finished=session.finished)
        for sampler_id in self.sampling.ids_of(session_id):
            await self.sampling.release_sampling_session(sampler_id)

    async def get_session(self, session_id: str) -> GetSessionResponse:
        session = self.session(session_id)
        return GetSessionResponse(
            training_run_ids=session.model_ids,
            sampler_ids=self.sampling.ids_of(session_id),
            user_metadata=session.user_metadata,
            display_name=session.display_name,
        )

    async def list_sessions(self, limit: int, offset: int, owner: str | None = None) -> ListSessionsResponse:
        """Newest first; of one owner, or of all."""
        ids = [session.session_id for session in self._sessions.values() if owner in (None, session.owner)]
        return ListSessionsResponse(sessions=ids[::-1][offset : offset + limit])

    def session(self, session_id: str) -> Session:
        """Raises: NotFoundError."""
        if session_id not in self._sessions:
            raise NotFoundError(f"no session {session_id!r}")
        return self._sessions[session_id]

    def live_sessions(self) -> list[Session]:
        return [session for session in self._sessions.values() if session.finished is None]

    async def get_tokenizer(self, base_model: str) -> Any:
        return (await self.served.get(base_model)).engines.tokenizer

    def seed_for(self, *what: object) -> int | None:
        """A seed in 0 .. 2**63 - 1 that follows from the backend's own, or None if that has none."""
        if self._seed is None:
            return None
        return int.from_bytes(hashlib.blake2b(repr((self._seed, *what)).encode(), digest_size=8).digest()) >> 1

    # -- models

    async def create_model(
        self, *, session_id: str, model_seq_id: int, base_model: str, lora: LoraConfig, user_metadata: dict[str, str] | None = None
    ) -> str:
        session = self.session(session_id)
        if lora.seed is None:  # chosen here, so that a model can be made again after a crash
            seed = self.seed_for("lora", session.ordinal, model_seq_id)
            lora = lora.model_copy(update={"seed": secrets.randbits(31) if seed is None else seed & 0x7FFFFFFF})
        return await self.models.create(session, model_seq_id, base_model, lora, user_metadata)

    async def create_model_from_state(
        self,
        *,
        session_id: str,
        model_seq_id: int,
        path: str,
        with_optimizer: bool,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
    ) -> str:
        """A new model with the weights of a checkpoint and its rank and flags; with_optimizer it continues bit for bit."""
        session = self.session(session_id)
        return await self.models.create_from_state(session, model_seq_id, path, with_optimizer, base_model, user_metadata)

    async def get_info(self, model_id: str) -> GetInfoResponse:
        model = self.models.get(model_id)
        await model.created.wait()
        if model.failure is not None:
            raise model.failure
        name = model.base_model
        return GetInfoResponse(
            model_data=ModelData(arch=(await self.served.get(name)).info.arch, model_name=name, tokenizer_id=name),
            model_id=model_id,
            is_lora=True,
            lora_rank=model.lora.rank,
            model_name=name,
        )

    async def _in_order(self, model_id: str, seq_id: int, fingerprint: str, operation: Callable[[Model, ServedModel], Awaitable[T]]) -> T:
        """Run an operation on a live model when its number's turn has come."""

        async def run() -> T:
            return await operation(*await self.models.ready(model_id))

        result: T = await self.models.get(model_id).sequencer.run(seq_id, fingerprint, run)
        return result

    # -- training

    async def forward(
        self, *, model_id: str, seq_id: int, data: Sequence[Datum], loss_fn: str, loss_fn_config: LossConfig = None
    ) -> ForwardBackwardOutput:
        return await self._pass(model_id, seq_id, TrainingPass(data=data, loss_fn=loss_fn, loss_fn_config=loss_fn_config, backward=False))

    async def forward_backward(
        self, *, model_id: str, seq_id: int, data: Sequence[Datum], loss_fn: str, loss_fn_config: LossConfig = None
    ) -> ForwardBackwardOutput:
        return await self._pass(model_id, seq_id, TrainingPass(data=data, loss_fn=loss_fn, loss_fn_config=loss_fn_config, backward=True))

    async def _pass(self, model_id: str, seq_id: int, call: TrainingPass) -> ForwardBackwardOutput:
        kind = "forward_backward" if call.backward else "forward"
        fingerprint = f"{kind} {call.loss_fn} {dict(call.loss_fn_config or {})} {digest(call.data)}"
        return await self._in_order(model_id, seq_id, fingerprint, lambda model, served: self.models.run_pass(model, served, call))

    async def _resolve_loss(self, owner: str, name: str, config: LossConfig) -> LossCall:
        graph = None
        if name == "custom":
            loss_id = (config or {}).get("loss_id")
            row = await self.store.loss(loss_id) if isinstance(loss_id, str) else None
            if row is None or row.owner != owner:
                raise InvalidRequestError(f"loss 'custom' needs the loss_id of an uploaded loss (create_custom_loss), found {loss_id!r}")
            graph = LossGraph.parse(name=row.name, inputs=row.inputs, graph=row.graph)
        return resolve_loss(name, config, graph=graph, strict=self._strict_losses)

    async def create_custom_loss(
        self, *, session_id: str, name: str, inputs: Sequence[Mapping[str, Any]], graph: Mapping[str, Any], custom_loss_seq_id: int = 0
    ) -> str:
        """Keep an uploaded loss graph; returns the id that forward_backward(data, "custom", {"loss_id": id}) takes."""
        session = self.session(session_id)
        LossGraph.parse(name=name, inputs=inputs, graph=graph)
        loss_id = f"{session_id}:loss:{custom_loss_seq_id}"
        await self.store.add_loss(
            LossRow(
                loss_id=loss_id,
                session_id=session_id,
                owner=session.owner,
                name=name,
                inputs=[dict(item) for item in inputs],
                graph=dict(graph),
                created=time.time(),
            )
        )
        return loss_id

    async def optim_step(self, *, model_id: str, seq_id: int, adam: AdamParams) -> OptimStepResponse:
        return await self._in_order(
            model_id, seq_id, f"optim_step {adam}", lambda model, served: self.models.run_optim_step(model, served, adam)
        )

    # -- saving and loading

    async def save_state(
        self,
        *,
        model_id: str,
        seq_id: int,
        name: str,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: dict[str, str] | None = None,
    ) -> SaveWeightsResponse:
        async def run(model: Model, served: ServedModel) -> SaveWeightsResponse:
            path = CheckpointPath.of(model_id, "weights", name)
            manifest = _manifest(model, seq_id, ttl_seconds, user_metadata)
            trainer = served.engines.trainer
            if not self._written_before(path, seq_id):
                await served.run_in_trainer(
                    lambda: self._checkpoints.write(path, manifest, lambda d: trainer.save_state(model_id, d), overwrite=overwrite)
                )
            return SaveWeightsResponse(path=str(path), type="save_weights")

        return await self._in_order(model_id, seq_id, f"save_state {name} {ttl_seconds} {overwrite}", run)

    async def load_state(self, *, model_id: str, seq_id: int, path: str, with_optimizer: bool) -> LoadWeightsResponse:
        return await self._in_order(
            model_id,
            seq_id,
            f"load_state {path} {with_optimizer}",
            lambda model, served: self.models.run_load_state(model, served, seq_id, path, with_optimizer),
        )

    async def save_weights_for_sampler(
        self, *, model_id: str, seq_id: int, name: str, ttl_seconds: int | None = None, user_metadata: dict[str, str] | None = None
    ) -> SaveWeightsForSamplerResponse:
        """A durable, named version that the sampler holds and has proved when this returns."""

        async def run(model: Model, served: ServedModel) -> SaveWeightsForSamplerResponse:
            path = CheckpointPath.of(model_id, "sampler_weights", name)
            manifest = _manifest(model, seq_id, ttl_seconds, user_metadata)

            def write(fill: Callable[[Path], None], probe: Callable[[], Probe]) -> AdapterRef:
                written = self._checkpoints.write(path, manifest.model_copy(update={"probe": probe()}), fill)
                return self.sampling.named_ref(path, written)

            if not self._written_before(path, seq_id):
                try:
                    ref, _ = await served.sync.publish(model_id, write, ephemeral=False)
                except WeightSyncError:
                    if self._checkpoints.exists(path):
                        await asyncio.to_thread(self._checkpoints.delete, path)
                    raise
                previous, model.held = model.held, ref
                if previous is not None:
                    await served.sync.release(previous)
            return SaveWeightsForSamplerResponse(path=str(path), type="save_weights_for_sampler")

        return await self._in_order(model_id, seq_id, f"save_weights_for_sampler {name} {ttl_seconds}", run)

    async def save_weights_for_ephemeral_sampler(self, *, model_id: str, seq_id: int, sampling_session_id: str) -> None:
        """A version that lives as long as the sampling session it opens, and the requests in flight on it."""

        async def run(model: Model, served: ServedModel) -> None:
            if self._durable and self.sampling.is_open(sampling_session_id):
                return  # opened by an earlier process that died before it could say so
            name = f"{model_id}@{model.step}-{uuid.uuid4().hex[:12]}"
            ref = AdapterRef(name=name, version=model.step, path=self._scratch / name)

            def write(fill: Callable[[Path], None], probe: Callable[[], Probe]) -> AdapterRef:
                temporary = ref.path.with_name(f".{name}")
                temporary.mkdir(parents=True)
                fill(temporary)
                probe()
                temporary.rename(ref.path)
                return ref

            _, probe = await served.sync.publish(model_id, write, ephemeral=True)
            await self.sampling.add(
                SamplingSession(
                    sampling_session_id=sampling_session_id,
                    base_model=model.base_model,
                    owner=model.owner,
                    ref=ref,
                    probe=probe,
                    loaded=True,
                )
            )

        await self._in_order(model_id, seq_id, f"save_weights_for_sampler {sampling_session_id}", run)

    async def save_weights_external(
        self, *, model_id: str, seq_id: int, name: str, ttl_seconds: int | None = None
    ) -> SaveWeightsExternalResponse:
        """The adapter in the layout that PEFT and other servers read, to be taken elsewhere."""

        async def run(model: Model, served: ServedModel) -> SaveWeightsExternalResponse:
            path = CheckpointPath.of(model_id, "external_weights", name)
            manifest = _manifest(model, seq_id, ttl_seconds, None)
            trainer = served.engines.trainer
            if not self._written_before(path, seq_id):
                await served.run_in_trainer(lambda: self._checkpoints.write(path, manifest, lambda d: trainer.save_adapter(model_id, d)))
            return SaveWeightsExternalResponse(path=str(path), type="save_weights_external")

        return await self._in_order(model_id, seq_id, f"save_weights_external {name} {ttl_seconds}", run)

    async def import_adapter(self, directory: Path, base_model: str | None = None) -> str:
        """tinker:// path of a copy of the adapter in a directory of this machine; see backend/imports.py."""
        return await import_adapter(self._checkpoints, self.served.get, directory, base_model)

    def _written_before(self, path: CheckpointPath, seq_id: int) -> bool:
        """Whether this very request has written its checkpoint already, in a process that died before it could say so."""
        return self._durable and self._checkpoints.exists(path) and self._checkpoints.manifest(path).seq_id == seq_id


async def _nothing_to_settle(_: str) -> None:
    """In-process nothing is journaled: every answer was given where it was computed."""


def _manifest(model: Model, seq_id: int, ttl_seconds: int | None, user_metadata: dict[str, str] | None) -> Manifest:
    return Manifest(
        base_model=model.base_model,
        lora=model.lora,
        alpha=lora_alpha(model.lora.rank),
        step=model.step,
        seq_id=seq_id,
        created=datetime.now(UTC),
        expires_at=expiry(ttl_seconds),
        user_metadata=user_metadata,
    )
