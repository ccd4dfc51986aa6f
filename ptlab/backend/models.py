"""The trainable models: creation, and their life between the trainer's memory and the disk.

A model is live (its adapter is in the trainer) or parked (a snapshot on disk, and the journal of what was asked since). A request for a
parked model brings it back; after a crash every model is parked, and coming back means: load the newest snapshot, run the journal again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ptlab.backend.checkpoints import CheckpointPath, Checkpoints, Manifest
from ptlab.backend.parking import Parking, Snapshot
from ptlab.backend.records import Model, Session, check_adam
from ptlab.backend.runs import Runs
from ptlab.backend.sequencer import Sequencer
from ptlab.backend.sequences import Sequences
from ptlab.backend.served import ServedModel
from ptlab.backend.store import ModelRow, RequestRow, Store
from ptlab.engines.protocols import lora_alpha
from ptlab.errors import CheckpointError, InvalidRequestError, NotFoundError
from ptlab.losses import LossCall, check_datum
from ptlab.types import AdamParams, Datum, ForwardBackwardOutput, LoadWeightsResponse, LoraConfig, OptimStepResponse

LossConfig = Mapping[str, float | str] | None
ResolveLoss = Callable[[str, str, LossConfig], Awaitable[LossCall]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPass:
    """A forward or forward_backward, as it was asked for."""

    data: Sequence[Datum]
    loss_fn: str
    loss_fn_config: LossConfig
    backward: bool


Replayable = TrainingPass | AdamParams | None
"""What a journal entry does to a model; None = nothing (it read, saved, or has a snapshot behind it)."""


@dataclass(slots=True, kw_only=True)
class Models:
    """All trainable models. Belongs to the backend's event loop.

    Args:
        serve: the engines of a base model by name, opened if need be.
        resolve_loss: a loss by the owner who asks for it, name and configuration.
        read_journal: what a stored request did; the face that stored it knows.
        settled: returns once every answered request of a model is in the store. A snapshot must not be ahead of the journal.
        durable: whether models outlive the process.
        max_lora_rank: largest rank of a new model, beside what the sampler can; None = any.
    """

    store: Store
    checkpoints: Checkpoints
    runs: Runs
    sequences: Sequences
    serve: Callable[[str], Awaitable[ServedModel]]
    resolve_loss: ResolveLoss
    read_journal: Callable[[RequestRow], Replayable]
    settled: Callable[[str], Awaitable[None]]
    parking: Parking
    durable: bool
    unembed: Literal["auto", "require"]
    max_lora_rank: int | None
    by_id: dict[str, Model]

    # -- creation

    async def create(self, session: Session, model_seq_id: int, base_model: str, lora: LoraConfig, user_metadata: Any) -> str:
        async def make(model: Model) -> None:
            served = await self.serve(base_model)
            model.lora = served.servable(lora, self.unembed, self.max_lora_rank)
            await served.run_in_trainer(lambda: served.engines.trainer.create_adapter(model.model_id, model.lora), urgent=True)
            await self._record(model, session, user_metadata, None, False)
            model.served = served

        return await self._create(session, model_seq_id, base_model, lora, make)

    async def create_from_state(
        self, session: Session, model_seq_id: int, path: str, with_optimizer: bool, base_model: str | None, user_metadata: Any
    ) -> str:
        async def make(model: Model) -> None:
            manifest, directory = await self.readable_state(path, with_optimizer)
            if base_model is not None and base_model != manifest.base_model:
                raise CheckpointError(
                    f"{path} was trained on {manifest.base_model}, not on {base_model}; leave base_model out or name that one"
                )
            served = await self.serve(manifest.base_model)
            served.servable(manifest.lora, "auto", self.max_lora_rank)

            def load() -> None:
                served.engines.trainer.create_adapter(model.model_id, manifest.lora)
                try:
                    served.engines.trainer.load_state(model.model_id, directory, with_optimizer=with_optimizer)
                except BaseException:
                    served.engines.trainer.remove_adapter(model.model_id)
                    raise

            await served.run_in_trainer(load, urgent=True)
            model.base_model, model.lora, model.step = manifest.base_model, manifest.lora, manifest.step
            if self.durable:  # the checkpoint may be deleted while this model lives
                await self._snapshot(model, served, 0)
            await self._record(model, session, user_metadata, path, with_optimizer)
            model.served = served

        return await self._create(session, model_seq_id, base_model or "", LoraConfig(rank=1), make)

    async def _create(
        self, session: Session, model_seq_id: int, base_model: str, lora: LoraConfig, make: Callable[[Model], Awaitable[None]]
    ) -> str:
        model_id = f"{session.session_id}:train:{model_seq_id}"
        if model_id in self.by_id:
            if not self.by_id[model_id].restored:
                raise InvalidRequestError(f"model {model_id} exists already")
            return model_id  # created by an earlier process that died before it could say so
        model = self.by_id[model_id] = Model(model_id, base_model, lora, session.owner)
        session.model_ids.append(model_id)

        async def remembering_failure() -> str:
            try:
                await make(model)
            except Exception as err:
                model.failure = err
                raise
            finally:
                model.created.set()
            return model_id

        created: str = await model.sequencer.run(0, "create", remembering_failure)
        return created

    async def _record(self, model: Model, session: Session, user_metadata: Any, from_path: str | None, with_optimizer: bool) -> None:
        await asyncio.to_thread(self.runs.record, model.model_id, model.base_model, model.lora, user_metadata, session.owner)
        await self.store.add_model(
            ModelRow(
                model_id=model.model_id,
                session_id=session.session_id,
                owner=session.owner,
                base_model=model.base_model,
                lora=model.lora.model_dump(),
                user_metadata=user_metadata,
                created=time.time(),
                step=model.step,
                from_path=from_path,
                with_optimizer=with_optimizer,
                failure=None,
            )
        )

    async def restore(self, row: ModelRow, session: Session) -> None:
        """A model of an earlier process: parked, its next number known."""
        snapshot_seq_id = await asyncio.to_thread(self.parking.newest_seq_id, row.model_id)
        finished = await self.store.finished_seq_ids(row.model_id, snapshot_seq_id)
        model = Model(row.model_id, row.base_model, LoraConfig.model_validate(row.lora), row.owner, restored=True)
        model.sequencer = Sequencer.after(snapshot_seq_id, finished)
        model.step = row.step
        model.created.set()
        self.by_id[row.model_id] = model
        session.model_ids.append(row.model_id)

    # -- use

    def get(self, model_id: str) -> Model:
        if model_id not in self.by_id:
            raise NotFoundError(
                f"no model {model_id!r} in this process; to go on with a saved one use create_training_client_from_state(path)"
            )
        return self.by_id[model_id]

    async def ready(self, model_id: str) -> tuple[Model, ServedModel]:
        """The model, live. Call it inside a sequenced operation, so that creation has finished and nothing comes between."""
        model = self.get(model_id)
        if model.failure is not None:
            raise model.failure
        model.last_used = time.monotonic()
        if model.served is None:
            await self._bring_back(model)
        assert model.served is not None
        return model, model.served

    async def run_pass(self, model: Model, served: ServedModel, call: TrainingPass, *, as_of: float | None = None) -> ForwardBackwardOutput:
        """Args: as_of: unix seconds when a replayed request came; None = it comes now."""
        loss = await self.resolve_loss(model.owner, call.loss_fn, call.loss_fn_config)
        kind = "forward_backward" if call.backward else "forward"
        if not call.data:
            raise InvalidRequestError(f"{kind} needs at least one datum, got none")
        data = await self.sequences.attach(model.owner, call.data, call.loss_fn, as_of=as_of)
        trainer, info = served.engines.trainer, served.info

        def work() -> ForwardBackwardOutput:
            for index, datum in enumerate(data):
                check_datum(datum, loss, index=index, vocab_size=info.vocab_size, max_tokens=info.max_context_length)
            return (trainer.forward_backward if call.backward else trainer.forward)(model.model_id, data, loss)

        began = time.perf_counter()
        output = await served.run_in_trainer(work)
        if call.backward:
            model.replay_cost.add(time.perf_counter() - began)
        return output

    async def run_optim_step(self, model: Model, served: ServedModel, adam: AdamParams) -> OptimStepResponse:
        check_adam(adam)
        response = await served.run_in_trainer(lambda: served.engines.trainer.optim_step(model.model_id, adam))
        skipped = (response.metrics or {}).get("skipped:sum", 0.0) > 0  # there was no gradient: the same weights, so the same version
        model.step += not skipped
        return response

    async def run_load_state(self, model: Model, served: ServedModel, seq_id: int, path: str, with_optimizer: bool) -> LoadWeightsResponse:
        manifest, directory = await self.readable_state(path, with_optimizer)
        ours = (model.base_model, model.lora.model_copy(update={"seed": None}))
        theirs = (manifest.base_model, manifest.lora.model_copy(update={"seed": None}))
        if ours != theirs:
            raise CheckpointError(f"{path} holds an adapter for {theirs[0]} ({theirs[1]}), this model is {ours[0]} ({ours[1]})")
        await served.run_in_trainer(lambda: served.engines.trainer.load_state(model.model_id, directory, with_optimizer=with_optimizer))
        model.step = manifest.step
        if self.durable:  # loading twice is harmless; what the path holds may change
            await self._snapshot(model, served, seq_id - 1)
        return LoadWeightsResponse(path=path, model_id=model.model_id, type="load_weights")

    async def readable_state(self, path: str, with_optimizer: bool) -> tuple[Manifest, Path]:
        """Manifest and directory. Raises: InvalidRequestError, NotFoundError, CheckpointError if it cannot be trained on from there."""
        parsed = CheckpointPath.parse(path)
        if with_optimizer and parsed.kind != "weights":
            raise InvalidRequestError(
                f"{path} holds weights without optimizer state; use a path from save_state, or load the weights alone"
            )
        manifest, directory = await asyncio.to_thread(self.checkpoints.read, parsed)
        if manifest.alpha != lora_alpha(manifest.lora.rank):
            ours = lora_alpha(manifest.lora.rank)
            raise CheckpointError(f"{path} was trained with LoRA alpha {manifest.alpha}, this ptlab uses {ours}; it cannot go on")
        return manifest, directory

    # -- memory and disk

    async def park(self, model_id: str) -> None:
        """Move a model that nobody uses from the trainer to the disk. Nothing is lost: its next request brings it back."""
        model = self.by_id[model_id]

        async def move(seq_id: int) -> None:
            served = model.served
            if served is None:
                return
            await self._settled_snapshot(model, served, seq_id)
            await served.run_in_trainer(lambda: served.engines.trainer.remove_adapter(model_id))
            model.served = None

        await model.sequencer.between(move)

    async def save_snapshot_if_due(self, model_id: str) -> None:
        """Bound what a restart has to do again."""
        model = self.by_id[model_id]

        async def save(seq_id: int) -> None:
            if model.served is not None and model.replay_cost.due:
                await self._settled_snapshot(model, model.served, seq_id)

        if model.replay_cost.due:
            await model.sequencer.between(save)

    async def _settled_snapshot(self, model: Model, served: ServedModel, seq_id: int) -> None:
        await self.settled(model.model_id)
        await self._snapshot(model, served, seq_id)
        await self.store.drop_bodies(model.model_id, seq_id)

    async def _snapshot(self, model: Model, served: ServedModel, seq_id: int) -> Snapshot:
        began = time.perf_counter()
        trainer = served.engines.trainer
        snapshot = await asyncio.to_thread(
            self.parking.write,
            model.model_id,
            seq_id,
            model.step,
            lambda directory: served.wait_for_trainer(lambda: trainer.save_state(model.model_id, directory)),
        )
        model.replay_cost.saved(began)
        return snapshot

    async def _bring_back(self, model: Model) -> None:
        """Live again as it was before the request whose turn it is."""
        served = await self.serve(model.base_model)
        trainer = served.engines.trainer
        snapshot = await asyncio.to_thread(self.parking.newest, model.model_id)

        def load() -> None:
            if snapshot is not None:
                trainer.load_state(model.model_id, snapshot.directory, with_optimizer=True)

        await served.run_in_trainer(lambda: trainer.create_adapter(model.model_id, model.lora))
        try:
            await served.run_in_trainer(load)
            model.step = snapshot.step if snapshot else 0
            for row in await self.store.journal(model.model_id, snapshot.seq_id if snapshot else 0):
                if row.state == "done" and row.seq_id < model.sequencer.next_seq_id:
                    await self._replay(model, served, row)
        except BaseException:
            await served.run_in_trainer(lambda: trainer.remove_adapter(model.model_id))
            raise
        model.served = served

    async def _replay(self, model: Model, served: ServedModel, row: RequestRow) -> None:
        match self.read_journal(row):
            case TrainingPass(backward=True) as call:
                await self.run_pass(model, served, call, as_of=row.created)
            case AdamParams() as adam:
                await self.run_optim_step(model, served, adam)
            case _:
                pass
