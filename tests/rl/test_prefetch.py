"""Which batch starts when and on which weights, where a failure shows, and that nothing is left running."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from ptlab.rl.prefetch import Prefetch


class Sampling:
    """Stands for rollouts: writes down (step, weights) at the start, is finished by the test, and counts what is running."""

    def __init__(self) -> None:
        self.started: list[tuple[int, str]] = []
        self.running: set[int] = set()
        self.may_end = [asyncio.Event() for _ in range(10)]
        self.fails_at: dict[int, Exception] = {}

    async def __call__(self, step: int, weights: str) -> str:
        self.started.append((step, weights))
        self.running.add(step)
        try:
            await self.may_end[step].wait()
            if step in self.fails_at:
                raise self.fails_at[step]
            return f"batch {step} of {weights}"
        finally:
            await asyncio.sleep(0)  # giving up takes a moment, as it does with requests in an engine
            self.running.discard(step)

    def finish(self, *steps: int) -> None:
        for step in steps:
            self.may_end[step].set()


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def and_nothing_is_left() -> None:
        await asyncio.wait_for(main(), timeout=20)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(and_nothing_is_left())


@pytest.mark.parametrize(
    ("ahead", "weights"),
    [(0, ["v3", "v4", "v5", "v6"]), (1, ["v3", "v3", "v4", "v5"]), (2, ["v3", "v3", "v3", "v4"]), (9, ["v3", "v3", "v3", "v3"])],
)
def test_a_batch_is_of_the_newest_weights_that_there_are_so_many_steps_before_it(ahead, weights):
    async def main():
        sampling = Sampling()
        sampling.finish(*range(10))
        taken = []
        async with Prefetch(sampling, first=3, end=7, ahead=ahead) as batches:
            for step in range(3, 7):
                taken.append((await batches.take(step, f"v{step}"))[0])
                await asyncio.sleep(0)
                assert {started for started, _ in sampling.started} == set(range(3, min(step + ahead, 6) + 1))  # none earlier, none at 7
        assert taken == [f"batch {3 + i} of {version}" for i, version in enumerate(weights)]
        assert len(sampling.started) == 4  # each once

    run(main)


def test_the_next_batch_runs_while_the_step_works_and_a_take_waits_for_its_own_only():
    async def main():
        sampling = Sampling()
        async with Prefetch(sampling, first=0, end=9, ahead=2) as batches:
            sampling.finish(0)
            assert (await batches.take(0, "v0"))[0] == "batch 0 of v0"
            assert sampling.running == {1, 2}
            sampling.finish(2)  # overtakes 1
            waiting = asyncio.create_task(batches.take(1, "v1"))
            await asyncio.sleep(0.01)
            assert not waiting.done() and sampling.running == {1, 3}
            sampling.finish(1)
            assert (await waiting)[0] == "batch 1 of v0"
            assert (await batches.take(2, "v2"))[0] == "batch 2 of v0"
        assert sampling.running == set()

    run(main)


def test_a_batch_that_was_taken_is_not_kept_and_its_weights_neither():
    class Kept:
        pass

    async def sample(step, weights):
        return Kept()

    async def main():
        async with Prefetch(sample, first=0, end=9, ahead=0) as batches:
            weights = Kept()
            batch, _ = await batches.take(0, weights)
            left = weakref.ref(batch), weakref.ref(weights)
            del batch, weights
            await asyncio.sleep(0)
            gc.collect()
            assert [ref() for ref in left] == [None, None]

    run(main)


def test_the_seconds_are_those_of_the_batch_and_not_of_the_wait():
    async def main():
        sampling = Sampling()
        sampling.finish(0)
        async with Prefetch(sampling, first=0, end=2, ahead=1) as batches:
            await batches.take(0, "v0")
            await asyncio.sleep(0.05)
            sampling.finish(1)
            await asyncio.sleep(0.05)  # done before it is asked for
            _, seconds = await batches.take(1, "v1")
        assert 0.04 < seconds < 0.099

    run(main)


def test_a_failure_shows_in_the_step_that_needs_the_batch_as_itself():
    async def main():
        sampling = Sampling()
        sampling.fails_at = {1: ValueError("out of memory")}
        sampling.finish(0, 1, 2)
        async with Prefetch(sampling, first=0, end=9, ahead=3) as batches:
            await batches.take(0, "v0")
            await asyncio.sleep(0.01)  # it has failed by now
            with pytest.raises(ValueError, match="out of memory"):
                await batches.take(1, "v1")
            assert 3 in sampling.running
        assert sampling.running == set()

    run(main)


def test_a_failure_that_nobody_waited_for_is_told_when_it_is_abandoned(caplog):
    async def main():
        sampling = Sampling()
        sampling.fails_at = {1: ValueError("out of memory")}
        sampling.finish(0, 1)
        with pytest.raises(KeyError, match="the step's own"):
            async with Prefetch(sampling, first=0, end=9, ahead=2) as batches:
                await batches.take(0, "v0")
                await asyncio.sleep(0.01)
                raise KeyError("the step's own")

    with caplog.at_level(logging.WARNING):
        run(main)
    [record] = caplog.records
    assert record.getMessage() == "the batch of step 1, abandoned now, had failed: ValueError('out of memory')"


def test_a_failure_that_was_raised_is_not_told_again(caplog):
    async def main():
        sampling = Sampling()
        sampling.fails_at = {0: ValueError("out of memory")}
        sampling.finish(0)
        with pytest.raises(ValueError, match="out of memory"):
            async with Prefetch(sampling, first=0, end=9, ahead=1) as batches:
                await batches.take(0, "v0")

    run(main)
    assert caplog.records == []


def test_cancelling_a_take_abandons_its_batch_and_leaving_the_rest():
    async def main():
        sampling = Sampling()
        async with Prefetch(sampling, first=0, end=9, ahead=2) as batches:
            waiting = asyncio.create_task(batches.take(0, "v0"))
            await asyncio.sleep(0.01)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert sampling.running == {1, 2}
        assert sampling.running == set()

    run(main)
