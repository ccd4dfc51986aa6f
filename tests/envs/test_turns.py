"""Players who wait for one another."""

from __future__ import annotations

import asyncio

import pytest

from ptlab.envs.turns import Turns


def test_a_player_waits_for_its_turn_and_for_nothing_else():
    async def run() -> list[str]:
        turns, order = Turns("a"), []

        async def play(name: str, following: str) -> None:
            for _ in range(3):
                await turns.wait_for(name)
                order.append(name)
                turns.pass_to(following)

        async with asyncio.timeout(5), asyncio.TaskGroup() as group:
            for name, following in (("b", "c"), ("c", "a"), ("a", "b")):
                group.create_task(play(name, following))
        return order

    assert asyncio.run(run()) == ["a", "b", "c"] * 3


@pytest.mark.parametrize("ended_before", [True, False])
def test_the_end_frees_everybody(ended_before):
    async def run() -> None:
        turns = Turns(0)
        if ended_before:
            turns.end()
        waiting = [asyncio.create_task(turns.wait_for(player)) for player in (1, 2, 3)]
        await asyncio.sleep(0)
        assert all(task.done() == ended_before for task in waiting)
        turns.end()
        async with asyncio.timeout(5):
            await asyncio.gather(*waiting)

    asyncio.run(run())


def test_a_player_that_gives_up_waiting_does_not_disturb_the_others():
    async def run() -> None:
        turns = Turns(0)
        impatient, patient = asyncio.create_task(turns.wait_for(1)), asyncio.create_task(turns.wait_for(1))
        await asyncio.sleep(0)
        impatient.cancel()
        await asyncio.sleep(0)
        turns.pass_to(2)
        await asyncio.sleep(0)
        assert impatient.cancelled() and not patient.done()
        turns.pass_to(1)
        async with asyncio.timeout(5):
            await patient

    asyncio.run(run())
