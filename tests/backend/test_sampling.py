"""Where a request is answered when the sampler cannot, and what happens to it when the engine dies."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

from ptlab.backend.served import ServedModel
from ptlab.engines.protocols import Engines, SampleCall
from ptlab.engines.scripted import ScriptedSampler, ScriptedTrainer
from ptlab.errors import EngineLostError, InvalidRequestError
from ptlab.types import LoraConfig, ModelInput, SampleResponse, SamplingParams
from tests.backend.test_weight_sync import World


class Dying(ScriptedSampler):
    """Loses its first requests with its engine."""

    deaths = 0

    async def sample(self, call: SampleCall) -> SampleResponse:
        if self.deaths > 0:
            self.deaths -= 1
            raise EngineLostError("the engine died", engine="scripted sampler", operation="sample")
        return await super().sample(call)


async def draw(world: World, **asked: Any) -> SampleResponse:
    return await world.backend.sampling.sample(
        sampling_session_id="s:sample:0",
        prompt=ModelInput.from_ints([1, 2, 3]),
        num_samples=2,
        params=SamplingParams(max_tokens=4, seed=5),
        **asked,
    )


def test_a_request_lost_with_its_engine_is_answered_by_the_next_as_if_nothing_had_been(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        world.sampler = Dying()
        await world.start()
        await world.publish("s:sample:0")
        unbroken = await draw(world)
        world.sampler.deaths = 2
        again = await draw(world)
        assert [s.tokens for s in again.sequences] == [s.tokens for s in unbroken.sequences]
        world.sampler.deaths = 3
        with pytest.raises(EngineLostError):  # an engine that dies of this very request must not take it for ever
            await draw(world)

    asyncio.run(scenario())


def test_prompt_scores_that_the_sampler_gets_wrong_come_from_the_trainer_under_the_sampled_version(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        await world.start()
        await world.publish("s:sample:0")
        right = (await draw(world, include_prompt_logprobs=True)).prompt_logprobs
        world.sampler.scores_prompts = False  # it refuses, so an answer can only come from the trainer
        session = world.backend.sampling._open["s:sample:0"]
        world.backend.served.opened()[0].sync._live[session.ref.name].tensors = frozenset({"base_model.model.lm_head.lora_B.weight"})  # type: ignore[union-attr]
        await world.train()  # the trainer has moved on
        scored = await draw(world, include_prompt_logprobs=True)
        assert scored.prompt_logprobs is not None and right is not None
        assert scored.prompt_logprobs[1:] == pytest.approx(right[1:], abs=1e-6)
        assert len(scored.sequences) == 2 and scored.sequences[0].policy_version == 1

    asyncio.run(scenario())


class Unloading(ScriptedSampler):
    """While it draws, the last version that trains the head goes."""

    world: World

    async def sample(self, call: SampleCall) -> SampleResponse:
        answer = await super().sample(call)
        for live in self.world.backend.served.opened()[0].sync._live.values() if not self.scores_prompts else ():
            live.tensors = frozenset()
        return answer


def test_scores_that_were_asked_for_come_although_the_reason_to_ask_the_trainer_has_gone_meanwhile(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        sampler = Unloading()
        sampler.world, world.sampler = world, sampler
        await world.start()
        await world.publish("s:sample:0")
        (live,) = world.backend.served.opened()[0].sync._live.values()
        live.tensors = frozenset({"base_model.model.lm_head.lora_B.weight"})
        sampler.scores_prompts = False
        assert (await draw(world, include_prompt_logprobs=True)).prompt_logprobs is not None

    asyncio.run(scenario())


def served(**sampler: Any) -> ServedModel:
    return ServedModel(Engines(trainer=ScriptedTrainer(), sampler=ScriptedSampler(**sampler), tokenizer=None), lambda metrics: None)


def test_an_output_head_that_cannot_be_served_is_left_out_with_a_warning_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    model = served(lora_on_head=False)
    with caplog.at_level(logging.WARNING):
        assert model.servable(LoraConfig(rank=4), "auto") == LoraConfig(rank=4, train_unembed=False)
    assert "output head of scripted/unigram: training without it" in caplog.text
    for lora, unembed in ((LoraConfig(rank=4), "require"), (LoraConfig(rank=4, train_attn=False, train_mlp=False), "auto")):
        with pytest.raises(InvalidRequestError, match="cannot serve an adapter on the output head of unigram models"):
            model.servable(lora, unembed)  # type: ignore[arg-type]
    assert served().servable(LoraConfig(rank=4), "auto") == LoraConfig(rank=4)


def test_the_dropped_head_shows_in_what_is_saved(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        world.sampler.lora_on_head = False
        await world.start()
        path = (await world.backend.save_state(model_id=world.model_id, seq_id=world.next(), name="s")).path
        assert (await world.backend.catalog.get_weights_info(path)).train_unembed is False

    asyncio.run(scenario())
