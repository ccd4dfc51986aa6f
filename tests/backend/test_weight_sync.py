"""A sampler that holds anything but what was published is refused, by name of the fault; versions are freed when unused.

The scripted engines make every fault possible: `sampler.load` decides what the sampler really takes in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ptlab.backend.backend import Backend
from ptlab.engines.protocols import AdapterRef, Engines
from ptlab.engines.scripted import TENSOR, ScriptedSampler, ScriptedTrainer
from ptlab.errors import NotFoundError, WeightSyncError
from ptlab.types import AdamParams, Datum, LoraConfig, ModelInput, SamplingParams

BATCH = [Datum(model_input=ModelInput.from_ints([1, 2]), loss_fn_inputs={"target_tokens": [2, 3], "weights": [1.0, 1.0]})]


class World:
    """A backend on scripted engines with one trained step behind it."""

    def __init__(self, tmp_path: Path) -> None:
        self.sampler = ScriptedSampler()
        self.metrics: list[Mapping[str, float]] = []
        self.trainer = ScriptedTrainer()
        self.backend = Backend(
            data_dir=tmp_path / "data",
            scratch_dir=tmp_path / "scratch",
            open_engines=lambda _: Engines(trainer=self.trainer, sampler=self.sampler, tokenizer=None),
            on_metrics=self.metrics.append,
        )
        self.model_id = ""
        self.seq_id = 0

    async def start(self) -> None:
        session = await self.backend.create_session()
        self.model_id = await self.backend.create_model(session_id=session, model_seq_id=0, base_model="m", lora=LoraConfig(rank=1))
        await self.train()

    def next(self) -> int:
        self.seq_id += 1
        return self.seq_id

    async def train(self, learning_rate: float = 0.5) -> None:
        await self.backend.forward_backward(model_id=self.model_id, seq_id=self.next(), data=BATCH, loss_fn="cross_entropy")
        await self.backend.optim_step(model_id=self.model_id, seq_id=self.next(), adam=AdamParams(learning_rate=learning_rate))

    async def publish(self, sampling_session_id: str) -> None:
        await self.backend.save_weights_for_ephemeral_sampler(
            model_id=self.model_id, seq_id=self.next(), sampling_session_id=sampling_session_id
        )

    async def draw(self, sampling_session_id: str) -> list[float]:
        response = await self.backend.sampling.sample(
            sampling_session_id=sampling_session_id,
            prompt=ModelInput.from_ints([1, 2, 3]),
            num_samples=1,
            params=SamplingParams(max_tokens=1),
            include_prompt_logprobs=True,
        )
        assert response.prompt_logprobs is not None
        return [v for v in response.prompt_logprobs if v is not None]


def run(tmp_path: Path, scenario: Callable[[World], object]) -> None:
    async def started() -> None:
        world = World(tmp_path)
        await world.start()
        await scenario(world)  # type: ignore[misc]
        await world.backend.close()

    asyncio.run(started())


def delta(ref: AdapterRef) -> torch.Tensor:
    return load_file(ref.path / "adapter_model.safetensors")[TENSOR]


def test_a_version_is_served_verified_and_measured(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        await world.publish("s:sample:0")
        before = await world.draw("s:sample:0")
        await world.train()
        await world.publish("s:sample:1")
        assert await world.draw("s:sample:0") == before  # the old version does not move
        after = await world.draw("s:sample:1")
        assert after != before
        expected = world.trainer.compute_logprobs(world.model_id, [1, 2, 3])[1:]
        assert after == pytest.approx(expected, abs=1e-6)
        keys = {"sync/capture_s", "sync/write_s", "sync/load_s", "sync/verify_s", "sync/latency_s", "sync/verify_gap", "sync/version"}
        assert [m.keys() for m in world.metrics] == [keys, keys]
        assert [m["sync/version"] for m in world.metrics] == [1.0, 2.0]
        assert world.metrics[0]["sync/verify_gap"] < 1e-5

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda ref: torch.zeros(8), "like the base model"),
        (lambda ref: delta(ref) * 0.9, "other weights"),
        (lambda ref: delta(ref).flip(0), "other weights"),
        (lambda ref: delta(ref) * float("nan"), "are inf nats off the trainer's"),
        (lambda ref: None, "1 of 1 saved LoRA tensors are not registered"),
    ],
    ids=["base served", "slightly wrong", "shuffled", "not a number", "missing tensor"],
)
@pytest.mark.parametrize("scores_prompts", [True, False], ids=["scored probe", "drawn probe"])
def test_a_planted_fault_is_refused_and_named(
    tmp_path: Path, fault: Callable[[AdapterRef], torch.Tensor | None], message: str, scores_prompts: bool
) -> None:
    async def scenario(world: World) -> None:
        world.sampler.scores_prompts = scores_prompts
        world.sampler.load = fault
        with pytest.raises(WeightSyncError, match=message):
            await world.publish("s:sample:0")
        with pytest.raises(NotFoundError):  # no sampler was opened: nobody can draw from wrong weights
            await world.draw("s:sample:0")
        assert world.sampler.loaded == {} and world.metrics == []
        assert list((tmp_path / "scratch").iterdir()) == []

    run(tmp_path, scenario)


@pytest.mark.parametrize("scores_prompts", [True, False], ids=["scored probe", "drawn probe"])
def test_a_sampler_stuck_on_the_previous_version_is_refused(tmp_path: Path, scores_prompts: bool) -> None:
    async def scenario(world: World) -> None:
        world.sampler.scores_prompts = scores_prompts
        await world.publish("s:sample:0")
        stuck = next(iter(world.sampler.loaded.values()))
        world.sampler.load = lambda ref: stuck
        await world.train(learning_rate=1e-3)  # a small step: the versions differ by about 1e-3 nats
        with pytest.raises(WeightSyncError, match="older version"):
            await world.publish("s:sample:1")
        world.sampler.scores_prompts = True
        await world.draw("s:sample:0")  # the good version is still there

    run(tmp_path, scenario)


def test_a_passing_fault_is_tried_once_more(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        answers = [lambda ref: torch.zeros(8), delta]
        world.sampler.load = lambda ref: answers.pop(0)(ref)
        await world.publish("s:sample:0")
        assert answers == []
        await world.draw("s:sample:0")

    run(tmp_path, scenario)


def test_a_refused_named_save_leaves_no_checkpoint_and_the_name_free(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        world.sampler.load = lambda ref: torch.zeros(8)
        with pytest.raises(WeightSyncError):
            await world.backend.save_weights_for_sampler(model_id=world.model_id, seq_id=world.next(), name="batch_1")
        world.sampler.load = delta
        await world.backend.save_weights_for_sampler(model_id=world.model_id, seq_id=world.next(), name="batch_1")

    run(tmp_path, scenario)


def test_versions_are_unloaded_with_their_last_user_and_reloaded_verified(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        path = (await world.backend.save_weights_for_sampler(model_id=world.model_id, seq_id=world.next(), name="a")).path
        await world.backend.sampling.create_sampling_session(sampling_session_id="s:sample:0", model_path=path)
        await world.train()
        await world.backend.save_weights_for_sampler(model_id=world.model_id, seq_id=world.next(), name="b")
        assert len(world.sampler.loaded) == 2  # "a" has a sampling session, "b" is the newest
        await world.backend.sampling.release_sampling_session("s:sample:0")
        await world.backend.sampling.release_sampling_session("s:sample:0")
        assert [name.split("#")[0] for name in world.sampler.loaded] == [path.removesuffix("/a") + "/b"]
        world.sampler.load = lambda ref: torch.zeros(8)
        with pytest.raises(WeightSyncError):  # loading from disk is verified against the probe saved with it
            await world.backend.sampling.create_sampling_session(sampling_session_id="s:sample:1", model_path=path)
        world.sampler.load = delta
        await world.backend.sampling.create_sampling_session(sampling_session_id="s:sample:2", model_path=path)
        await world.draw("s:sample:2")

    run(tmp_path, scenario)


def test_ephemeral_files_go_with_their_session(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        for i in range(5):
            await world.publish(f"s:sample:{i}")
            if i:
                await world.backend.sampling.release_sampling_session(f"s:sample:{i - 1}")
        assert len(list((tmp_path / "scratch").iterdir())) == 1 and len(world.sampler.loaded) == 1

    run(tmp_path, scenario)


def test_a_bfloat16_sampler_of_a_float32_trainer_is_judged_by_the_coarser_type(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        world.sampler.info = replace(world.sampler.info, dtype="bfloat16")
        await world.start()
        (served,) = world.backend.served.opened()
        assert served.sync.noise_nats == 0.05

    asyncio.run(scenario())


def test_engines_that_disagree_on_the_base_model_are_refused_at_start(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        world.sampler.info = replace(world.sampler.info, vocab_size=9)
        with pytest.raises(WeightSyncError, match="disagree on the base model"):
            await world.start()

    asyncio.run(scenario())
