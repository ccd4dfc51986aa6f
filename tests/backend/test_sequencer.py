"""Order, gaps, duplicates and failures of one model's requests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from ptlab.backend.sequencer import Sequencer
from ptlab.errors import OrderError


def recording(log: list[int], number: int) -> Callable[[], Awaitable[int]]:
    async def operation() -> int:
        await asyncio.sleep(0)  # lets a wrong scheduler start the next one
        log.append(number)
        return number * 10

    return operation


def test_runs_by_number_whatever_the_order_of_arrival() -> None:
    async def scenario() -> tuple[list[int], list[Any]]:
        sequencer, log = Sequencer(), list[int]()
        waiting = [asyncio.create_task(sequencer.run(n, str(n), recording(log, n))) for n in (2, 3, 1)]
        await asyncio.sleep(0.01)
        assert log == []  # 0 is missing: nothing may run
        answers = [await sequencer.run(0, "0", recording(log, 0)), *await asyncio.gather(*waiting)]
        return log, answers

    assert asyncio.run(scenario()) == ([0, 1, 2, 3], [0, 20, 30, 10])


def test_a_repeated_number_gets_the_first_answer_and_runs_once() -> None:
    async def scenario() -> None:
        sequencer, log = Sequencer(), list[int]()
        first, second = await asyncio.gather(*(sequencer.run(0, "same", recording(log, 7)) for _ in range(2)))
        third = await sequencer.run(0, "same", recording(log, 7))
        assert (first, second, third, log) == (70, 70, 70, [7])

    asyncio.run(scenario())


def test_another_request_under_a_used_number_is_refused() -> None:
    async def scenario() -> None:
        sequencer, log = Sequencer(), list[int]()
        await sequencer.run(0, "optim_step lr=1", recording(log, 0))
        with pytest.raises(OrderError, match=r"seq_id 0 was used before for optim_step lr=1, now for optim_step lr=2"):
            await sequencer.run(0, "optim_step lr=2", recording(log, 0))

    asyncio.run(scenario())


def test_an_answer_that_is_no_longer_kept_is_refused_not_computed_again() -> None:
    async def scenario() -> None:
        sequencer, log = Sequencer(remember=2), list[int]()
        for n in range(5):
            await sequencer.run(n, str(n), recording(log, n))
        with pytest.raises(OrderError, match="no longer kept"):
            await sequencer.run(1, "1", recording(log, 1))
        assert await sequencer.run(4, "4", recording(log, 4)) == 40
        assert log == [0, 1, 2, 3, 4]

    asyncio.run(scenario())


def test_a_failure_is_the_answer_and_the_next_number_runs() -> None:
    async def scenario() -> None:
        sequencer, log = Sequencer(), list[int]()

        async def failing() -> None:
            raise ValueError("broken")

        after = asyncio.create_task(sequencer.run(1, "1", recording(log, 1)))
        for _ in range(2):
            with pytest.raises(ValueError, match="broken"):
                await sequencer.run(0, "0", failing)
        assert await after == 10

    asyncio.run(scenario())


def test_a_cancelled_caller_does_not_stop_the_work() -> None:
    async def scenario() -> None:
        sequencer, log, gate = Sequencer(), list[int](), asyncio.Event()

        async def slow() -> None:
            await gate.wait()
            log.append(0)

        caller = asyncio.create_task(sequencer.run(0, "0", slow))
        await asyncio.sleep(0)
        caller.cancel()
        gate.set()
        await sequencer.run(1, "1", recording(log, 1))
        assert log == [0, 1]

    asyncio.run(scenario())


def test_it_goes_on_where_an_earlier_process_stopped(tmp_path):
    del tmp_path

    async def scenario() -> None:
        ran: list[int] = []
        sequencer = Sequencer.after(3, [5])

        def operation(number):
            async def run():
                ran.append(number)
                return number

            return run

        later = asyncio.create_task(sequencer.run(6, "six", operation(6)))
        await asyncio.sleep(0)
        assert sequencer.gap == [4]
        assert await sequencer.run(4, "four", operation(4)) == 4
        assert await later == 6
        assert ran == [4, 6]
        for done in (3, 5):
            with pytest.raises(OrderError):
                await sequencer.run(done, "again", operation(done))

    asyncio.run(scenario())


def test_what_runs_between_requests_runs_alone_and_knows_how_far_they_are():
    async def scenario() -> None:
        sequencer, inside, log = Sequencer(), asyncio.Event(), []

        async def slow():
            log.append("request begins")
            await asyncio.sleep(0.01)
            log.append("request ends")

        async def between(last):
            log.append(f"between, after {last}")
            inside.set()
            await asyncio.sleep(0.01)
            log.append("between ends")

        first = asyncio.create_task(sequencer.run(0, "0", slow))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        pause = asyncio.create_task(sequencer.between(between))
        second = asyncio.create_task(sequencer.run(1, "1", slow))
        await asyncio.gather(first, pause, second)
        assert log == ["request begins", "request ends", "between, after 0", "between ends", "request begins", "request ends"]

    asyncio.run(scenario())


def test_a_number_that_will_not_come_is_passed_over_once_only():
    async def scenario() -> None:
        sequencer = Sequencer()

        async def one():
            return 1

        waiting = asyncio.create_task(sequencer.run(2, "2", one))
        await asyncio.sleep(0)
        assert sequencer.gap == [0, 1]
        sequencer.pass_over([0, 1, 2])  # 2 has come: it is not passed over
        assert await waiting == 1
        assert sequencer.gap == []
        assert sequencer.next_seq_id == 3

    asyncio.run(scenario())
