"""The one core behind both faces: sessions, models, sampling sessions; one coroutine per operation.

Invariants kept here, so that no face has to: one writer per model; a model's requests run by seq_id, waiting for gaps, each at most
once; datums are checked before they reach an engine; a failed request changes nothing; what is sampled is what was published.
All coroutines run on one event loop; blocking work happens on the trainers' threads or in worker threads.
"""

from __future__ import annotations

import asyncio
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from ptlab.backend.catalog import Catalog
from ptlab.backend.checkpoints import CheckpointPath, Checkpoints, Kind, Manifest, Probe, checked, expiry
from ptlab.backend.records import Model, Session, check_adam, digest
from ptlab.backend.runs import Runs
from ptlab.backend.sampling import SamplingSession, SamplingSessions
from ptlab.backend.served import ServedModel
from ptlab.engines.protocols import AdapterRef, Engines, lora_alpha
from ptlab.errors import CheckpointError, InvalidRequestError, NotFoundError, WeightSyncError
from ptlab.losses import check_datum, resolve_loss
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

LossConfig = Mapping[str, float | str] | None


class Backend:
    """See the module text.

    Args:
        data_dir: checkpoints and runs live here and are found again by the next process.
        scratch_dir: for versions that live only while someone samples from them; a RAM disk serves best. Emptied on close.
        open_engines: makes the engines of a base model by name (blocking). Raises InvalidRequestError for names it cannot serve.
        on_metrics: told the `sync/*` metrics of each weight sync.
        base_models: names to show as supported before anyone has asked for them.
        unembed: what to do about train_unembed where the sampler cannot serve it: "auto" = train without and warn, "require" = refuse.
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
    ) -> None:
        self._unembed = unembed
        self._checkpoints = Checkpoints(data_dir)
        self._runs = Runs(data_dir, self._checkpoints)
        self._scratch = scratch_dir
        self._open_engines = open_engines
        self._on_metrics = on_metrics
        self._served: dict[str, asyncio.Task[ServedModel]] = {}
        self._sessions: dict[str, Session] = {}
        self._models: dict[str, Model] = {}
        self.sampling = SamplingSessions(self._checkpoints, self._serve)
        self.catalog = Catalog(self._checkpoints, self._runs, base_models, self._opened)

    async def close(self) -> None:
        """End every engine and delete what was only for this process."""
        self.sampling.forget_all()  # their versions end with the engines
        for task in self._served.values():
            if task.done() and not task.cancelled() and task.exception() is None:
                await task.result().close()
            else:
                task.cancel()
        self._served.clear()
        await asyncio.to_thread(shutil.rmtree, self._scratch, ignore_errors=True)

    # -- sessions and base models

    async def create_session(
        self, *, user_metadata: dict[str, str] | None = None, project_id: str | None = None, display_name: str | None = None
    ) -> str:
        del project_id  # one user, one project
        session = Session(str(uuid.uuid4()), user_metadata, display_name)
        self._sessions[session.session_id] = session
        return session.session_id

    async def finish_session(self, session_id: str, *, status: str, detail: str | None = None) -> None:
        """The first status wins. Models stay until the process ends: their checkpoints may still be asked for."""
        session = self._session(session_id)
        if session.finished is None:
            session.finished = status if detail is None else f"{status}: {detail}"
        for sampler_id in self.sampling.ids_of(session_id):
            await self.sampling.release_sampling_session(sampler_id)

    async def get_session(self, session_id: str) -> GetSessionResponse:
        session = self._session(session_id)
        return GetSessionResponse(
            training_run_ids=session.model_ids,
            sampler_ids=self.sampling.ids_of(session_id),
            user_metadata=session.user_metadata,
            display_name=session.display_name,
        )

    async def list_sessions(self, limit: int, offset: int) -> ListSessionsResponse:
        """Newest first."""
        return ListSessionsResponse(sessions=list(self._sessions)[::-1][offset : offset + limit])

    def _session(self, session_id: str) -> Session:
        if session_id not in self._sessions:
            raise NotFoundError(f"no session {session_id!r}")
        return self._sessions[session_id]

    async def _serve(self, base_model: str) -> ServedModel:
        """The engines of a base model, opened once; everyone who asks meanwhile waits for the same opening."""
        task = self._served.get(base_model)
        if task is None:
            task = asyncio.create_task(ServedModel.open(lambda: self._open_engines(base_model), self._on_metrics))
            self._served[base_model] = task
        try:
            return await asyncio.shield(task)
        except Exception:
            if self._served.get(base_model) is task and task.done():
                del self._served[base_model]  # the next request may try again
            raise

    def _opened(self) -> list[ServedModel]:
        return [t.result() for t in self._served.values() if t.done() and not t.cancelled() and t.exception() is None]

    async def get_tokenizer(self, base_model: str) -> Any:
        return (await self._serve(base_model)).engines.tokenizer

    # -- models

    async def create_model(
        self, *, session_id: str, model_seq_id: int, base_model: str, lora: LoraConfig, user_metadata: dict[str, str] | None = None
    ) -> str:
        model = self._register(session_id, model_seq_id, base_model, lora)

        async def create() -> str:
            served = await self._serve(base_model)
            model.lora = served.servable(lora, self._unembed)
            await served.run_in_trainer(lambda: served.engines.trainer.create_adapter(model.model_id, model.lora))
            await asyncio.to_thread(self._runs.record, model.model_id, base_model, model.lora, user_metadata)
            model.served = served
            return model.model_id

        return await self._create(model, create)

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
        model = self._register(session_id, model_seq_id, base_model or "", LoraConfig(rank=1))

        async def create() -> str:
            manifest, directory = await self._readable_state(path, with_optimizer)
            if base_model is not None and base_model != manifest.base_model:
                raise CheckpointError(
                    f"{path} was trained on {manifest.base_model}, not on {base_model}; leave base_model out or name that one"
                )
            served = await self._serve(manifest.base_model)

            def load() -> None:
                served.engines.trainer.create_adapter(model.model_id, manifest.lora)
                try:
                    served.engines.trainer.load_state(model.model_id, directory, with_optimizer=with_optimizer)
                except BaseException:
                    served.engines.trainer.remove_adapter(model.model_id)
                    raise

            await served.run_in_trainer(load)
            await asyncio.to_thread(self._runs.record, model.model_id, manifest.base_model, manifest.lora, user_metadata)
            model.served, model.base_model, model.lora, model.step = served, manifest.base_model, manifest.lora, manifest.step
            return model.model_id

        return await self._create(model, create)

    def _register(self, session_id: str, model_seq_id: int, base_model: str, lora: LoraConfig) -> Model:
        model_id = f"{session_id}:train:{model_seq_id}"
        session = self._session(session_id)
        if model_id in self._models:
            raise InvalidRequestError(f"model {model_id} exists already")
        model = self._models[model_id] = Model(model_id, base_model, lora)
        session.model_ids.append(model_id)
        return model

    async def _create(self, model: Model, create: Callable[[], Any]) -> str:
        async def remembering_failure() -> str:
            try:
                created: str = await create()
            except Exception as err:
                model.failure = err
                raise
            finally:
                model.created.set()
            return created

        model_id: str = await model.sequencer.run(0, "create", remembering_failure)
        return model_id

    def _model(self, model_id: str) -> Model:
        if model_id not in self._models:
            raise NotFoundError(
                f"no model {model_id!r} in this process; to go on with a saved one use create_training_client_from_state(path)"
            )
        return self._models[model_id]

    async def _ready(self, model_id: str) -> tuple[Model, ServedModel]:
        """The model once it exists. Call it inside a sequenced operation, so that creation has finished."""
        model = self._model(model_id)
        if model.failure is not None:
            raise model.failure
        assert model.served is not None
        return model, model.served

    async def get_info(self, model_id: str) -> GetInfoResponse:
        model = self._model(model_id)
        await model.created.wait()
        model, served = await self._ready(model_id)
        name = model.base_model
        return GetInfoResponse(
            model_data=ModelData(arch=served.info.arch, model_name=name, tokenizer_id=name),
            model_id=model_id,
            is_lora=True,
            lora_rank=model.lora.rank,
            model_name=name,
        )

    # -- training

    async def forward(
        self, *, model_id: str, seq_id: int, data: Sequence[Datum], loss_fn: str, loss_fn_config: LossConfig = None
    ) -> ForwardBackwardOutput:
        return await self._pass("forward", model_id, seq_id, data, loss_fn, loss_fn_config)

    async def forward_backward(
        self, *, model_id: str, seq_id: int, data: Sequence[Datum], loss_fn: str, loss_fn_config: LossConfig = None
    ) -> ForwardBackwardOutput:
        return await self._pass("forward_backward", model_id, seq_id, data, loss_fn, loss_fn_config)

    async def _pass(
        self, kind: str, model_id: str, seq_id: int, data: Sequence[Datum], loss_fn: str, loss_fn_config: LossConfig
    ) -> ForwardBackwardOutput:
        async def run() -> ForwardBackwardOutput:
            _, served = await self._ready(model_id)
            loss = resolve_loss(loss_fn, loss_fn_config)
            if not data:
                raise InvalidRequestError(f"{kind} needs at least one datum, got none")
            trainer, info = served.engines.trainer, served.info

            def work() -> ForwardBackwardOutput:
                for index, datum in enumerate(data):
                    check_datum(datum, loss, index=index, vocab_size=info.vocab_size, max_tokens=info.max_context_length)
                return (trainer.forward if kind == "forward" else trainer.forward_backward)(model_id, data, loss)

            return await served.run_in_trainer(work)

        fingerprint = f"{kind} {loss_fn} {dict(loss_fn_config or {})} {digest(data)}"
        output: ForwardBackwardOutput = await self._model(model_id).sequencer.run(seq_id, fingerprint, run)
        return output

    async def optim_step(self, *, model_id: str, seq_id: int, adam: AdamParams) -> OptimStepResponse:
        async def run() -> OptimStepResponse:
            model, served = await self._ready(model_id)
            check_adam(adam)
            response = await served.run_in_trainer(lambda: served.engines.trainer.optim_step(model_id, adam))
            skipped = (response.metrics or {}).get("skipped:sum", 0.0) > 0  # there was no gradient: the same weights, so the same version
            model.step += not skipped
            return response

        response: OptimStepResponse = await self._model(model_id).sequencer.run(seq_id, f"optim_step {adam}", run)
        return response

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
        async def run() -> SaveWeightsResponse:
            model, served = await self._ready(model_id)
            path = _path(model_id, "weights", name)
            manifest = self._manifest(model, ttl_seconds, user_metadata)
            trainer = served.engines.trainer
            await served.run_in_trainer(
                lambda: self._checkpoints.write(path, manifest, lambda d: trainer.save_state(model_id, d), overwrite=overwrite)
            )
            return SaveWeightsResponse(path=str(path), type="save_weights")

        response: SaveWeightsResponse = await self._model(model_id).sequencer.run(
            seq_id, f"save_state {name} {ttl_seconds} {overwrite}", run
        )
        return response

    async def load_state(self, *, model_id: str, seq_id: int, path: str, with_optimizer: bool) -> LoadWeightsResponse:
        async def run() -> LoadWeightsResponse:
            model, served = await self._ready(model_id)
            manifest, directory = await self._readable_state(path, with_optimizer)
            ours = (model.base_model, model.lora.model_copy(update={"seed": None}))
            theirs = (manifest.base_model, manifest.lora.model_copy(update={"seed": None}))
            if ours != theirs:
                raise CheckpointError(f"{path} holds an adapter for {theirs[0]} ({theirs[1]}), this model is {ours[0]} ({ours[1]})")
            await served.run_in_trainer(lambda: served.engines.trainer.load_state(model_id, directory, with_optimizer=with_optimizer))
            model.step = manifest.step
            return LoadWeightsResponse(path=path, model_id=model_id, type="load_weights")

        response: LoadWeightsResponse = await self._model(model_id).sequencer.run(seq_id, f"load_state {path} {with_optimizer}", run)
        return response

    async def save_weights_for_sampler(
        self, *, model_id: str, seq_id: int, name: str, ttl_seconds: int | None = None, user_metadata: dict[str, str] | None = None
    ) -> SaveWeightsForSamplerResponse:
        """A durable, named version that the sampler holds and has proved when this returns."""

        async def run() -> SaveWeightsForSamplerResponse:
            model, served = await self._ready(model_id)
            path = _path(model_id, "sampler_weights", name)
            manifest = self._manifest(model, ttl_seconds, user_metadata)

            def write(fill: Callable[[Path], None], probe: Callable[[], Probe]) -> AdapterRef:
                written = self._checkpoints.write(path, manifest.model_copy(update={"probe": probe()}), fill)
                return self.sampling.named_ref(path, written)

            try:
                ref = await served.sync.publish(model_id, write, ephemeral=False)
            except WeightSyncError:
                if self._checkpoints.exists(path):
                    await asyncio.to_thread(self._checkpoints.delete, path)
                raise
            previous, model.held = model.held, ref
            if previous is not None:
                await served.sync.release(previous)
            return SaveWeightsForSamplerResponse(path=str(path), type="save_weights_for_sampler")

        fingerprint = f"save_weights_for_sampler {name} {ttl_seconds}"
        response: SaveWeightsForSamplerResponse = await self._model(model_id).sequencer.run(seq_id, fingerprint, run)
        return response

    async def save_weights_for_ephemeral_sampler(self, *, model_id: str, seq_id: int, sampling_session_id: str) -> None:
        """A version that lives as long as the sampling session it opens, and the requests in flight on it."""

        async def run() -> None:
            model, served = await self._ready(model_id)
            name = f"{model_id}@{model.step}-{uuid.uuid4().hex[:12]}"
            ref = AdapterRef(name=name, version=model.step, path=self._scratch / name)

            def write(fill: Callable[[Path], None], probe: Callable[[], Probe]) -> AdapterRef:
                temporary = ref.path.with_name(f".{name}")
                temporary.mkdir(parents=True)
                fill(temporary)
                probe()
                temporary.rename(ref.path)
                return ref

            await served.sync.publish(model_id, write, ephemeral=True)
            self.sampling.add(SamplingSession(sampling_session_id, model.base_model, served, ref, None))

        await self._model(model_id).sequencer.run(seq_id, f"save_weights_for_sampler {sampling_session_id}", run)

    async def save_weights_external(
        self, *, model_id: str, seq_id: int, name: str, ttl_seconds: int | None = None
    ) -> SaveWeightsExternalResponse:
        """The adapter in the layout that PEFT and other servers read, to be taken elsewhere."""

        async def run() -> SaveWeightsExternalResponse:
            model, served = await self._ready(model_id)
            path = _path(model_id, "external_weights", name)
            manifest = self._manifest(model, ttl_seconds, None)
            trainer = served.engines.trainer
            await served.run_in_trainer(lambda: self._checkpoints.write(path, manifest, lambda d: trainer.save_adapter(model_id, d)))
            return SaveWeightsExternalResponse(path=str(path), type="save_weights_external")

        response: SaveWeightsExternalResponse = await self._model(model_id).sequencer.run(
            seq_id, f"save_weights_external {name} {ttl_seconds}", run
        )
        return response

    def _manifest(self, model: Model, ttl_seconds: int | None, user_metadata: dict[str, str] | None) -> Manifest:
        return Manifest(
            base_model=model.base_model,
            lora=model.lora,
            alpha=lora_alpha(model.lora.rank),
            step=model.step,
            created=datetime.now(UTC),
            expires_at=expiry(ttl_seconds),
            user_metadata=user_metadata,
        )

    async def _readable_state(self, path: str, with_optimizer: bool) -> tuple[Manifest, Path]:
        parsed = CheckpointPath.parse(path)
        if with_optimizer and parsed.kind != "weights":
            raise InvalidRequestError(
                f"{path} holds weights without optimizer state; use a path from save_state, or load the weights alone"
            )
        manifest, directory = await asyncio.to_thread(self._checkpoints.read, parsed)
        if manifest.alpha != lora_alpha(manifest.lora.rank):
            ours = lora_alpha(manifest.lora.rank)
            raise CheckpointError(f"{path} was trained with LoRA alpha {manifest.alpha}, this ptlab uses {ours}; it cannot go on")
        return manifest, directory


def _path(model_id: str, kind: Kind, name: str) -> CheckpointPath:
    return CheckpointPath(model_id=model_id, kind=kind, name=checked(name, "checkpoint name"))
