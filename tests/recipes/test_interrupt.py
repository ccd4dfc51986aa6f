"""Stopping on request: at once where nothing is lost, by signal, and the second signal is the user's last word."""

from __future__ import annotations

import asyncio
import os
import signal
import threading

import pytest

from ptlab.recipes.interrupt import StopRequest, StopRequestedError, stop_on_signals


def test_work_that_ends_first_gives_its_result():
    async def main():
        async def work():
            await asyncio.sleep(0)
            return 5

        return await StopRequest().unless_requested(work())

    assert asyncio.run(main()) == 5


def test_an_error_of_the_work_comes_out_as_itself():
    async def main():
        async def work():
            raise ValueError("x")

        await StopRequest().unless_requested(work())

    with pytest.raises(ValueError, match="x"):
        asyncio.run(main())


def test_a_request_cancels_the_work_and_waits_until_it_is_gone():
    async def main():
        cleaned = []

        async def work():
            try:
                await asyncio.sleep(60)
            finally:
                await asyncio.sleep(0)
                cleaned.append(True)

        stop = StopRequest()
        asyncio.get_running_loop().call_later(0.01, stop.request)
        with pytest.raises(StopRequestedError):
            await stop.unless_requested(work())
        return cleaned, stop.requested

    assert asyncio.run(main()) == ([True], True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_gives_the_second_back_to_the_system(number, capsys):
    async def main():
        with stop_on_signals() as stop:
            os.kill(os.getpid(), number)
            await asyncio.wait_for(stop._event.wait(), timeout=5)
            return stop.requested, signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    assert asyncio.run(main()) == (True, signal.default_int_handler, signal.SIG_DFL)
    assert "a checkpoint is written" in capsys.readouterr().err


def test_off_the_main_thread_it_works_without_signals():
    seen = []

    async def main():
        with stop_on_signals() as stop:
            seen.append(stop.requested)

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    thread.join()
    assert seen == [False]
