"""APIFuture: any thread, any loop, many times; a timeout leaves the operation alone, a cancel does not."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import logging
import threading
import time
import weakref

import pytest

from ptlab.futures import APIFuture


def _running() -> tuple[concurrent.futures.Future[int], APIFuture[int]]:
    source: concurrent.futures.Future[int] = concurrent.futures.Future()
    return source, APIFuture(source)


async def _get(future: APIFuture[int]) -> int:
    return await future


def test_result_and_await_give_the_value_from_every_thread_and_loop_as_often_as_asked() -> None:
    source, future = _running()
    values: list[int] = []
    waiting = [threading.Thread(target=lambda: values.append(future.result())) for _ in range(2)]
    waiting += [threading.Thread(target=lambda: values.append(asyncio.run(_get(future)))) for _ in range(2)]  # two loops at once
    for thread in waiting:
        thread.start()
    source.set_result(7)
    for thread in waiting:
        thread.join(5)
    assert values == [7, 7, 7, 7]
    assert [asyncio.run(_get(future)) for _ in range(3)] == [7, 7, 7]  # loops that come later
    assert future.result() == 7


def test_one_loop_awaits_the_same_future_twice_at_once() -> None:
    source, future = _running()

    async def main() -> list[int]:
        threading.Timer(0.02, source.set_result, [3]).start()
        return list(await asyncio.gather(future, future.coroutine(), future.result_async()))

    assert asyncio.run(main()) == [3, 3, 3]


def test_result_inside_a_running_loop_works() -> None:
    source, future = _running()

    async def main() -> int:
        threading.Timer(0.02, source.set_result, [5]).start()
        return future.result(timeout=5)

    assert asyncio.run(main()) == 5


def test_a_timeout_is_the_builtin_one_and_does_not_cancel() -> None:
    source, future = _running()
    with pytest.raises(TimeoutError):
        future.result(timeout=0.01)

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await future.result_async(timeout=0.01)

    asyncio.run(main())
    assert not source.cancelled()
    source.set_result(1)
    assert future.result() == 1


def test_cancelling_the_awaiting_task_cancels_the_operation() -> None:
    source, future = _running()

    async def main() -> None:
        task = asyncio.create_task(future.coroutine())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert source.cancelled() and future.cancelled()
    with pytest.raises(concurrent.futures.CancelledError):
        future.result()


def test_wait_for_that_runs_out_cancels_the_operation() -> None:
    source, future = _running()

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(future, 0.01)

    asyncio.run(main())
    assert source.cancelled()


def test_a_future_that_does_not_cancel_its_source_only_gives_up_the_wait() -> None:
    source: concurrent.futures.Future[int] = concurrent.futures.Future()
    future: APIFuture[int] = APIFuture(source, cancels_source=False)
    assert future.cancel()
    assert not source.cancelled()
    source.set_result(1)  # and its late outcome is no error
    assert future.cancelled()


def test_a_cancelled_source_cancels_the_future_for_all_who_wait() -> None:
    source, future = _running()

    async def main() -> None:
        threading.Timer(0.02, source.cancel).start()
        with pytest.raises(asyncio.CancelledError):
            await future

    asyncio.run(main())
    assert future.cancelled()


def test_the_exception_comes_out_every_time() -> None:
    source, future = _running()
    source.set_exception(LookupError("gone"))
    for _ in range(2):
        with pytest.raises(LookupError, match="gone"):
            future.result()
        with pytest.raises(LookupError, match="gone"):
            asyncio.run(_get(future))
    assert isinstance(future.exception(), LookupError)


def test_convert_makes_the_value_and_its_failure_is_the_outcome() -> None:
    source, _ = _running()
    good: APIFuture[str] = APIFuture(source, convert=str)
    bad: APIFuture[float] = APIFuture(source, convert=lambda value: 1 / (value - 4))
    source.set_result(4)
    assert good.result() == "4"
    with pytest.raises(ZeroDivisionError):
        bad.result()


def test_it_is_a_concurrent_future_for_wait_as_completed_and_callbacks() -> None:
    source_a, a = _running()
    _source_b, b = _running()
    seen: list[concurrent.futures.Future[int]] = []
    a.add_done_callback(seen.append)
    assert not a.done() and not a.cancelled()
    source_a.set_result(1)
    assert b.cancel() and b.cancel()  # the second time says the same
    done, pending = concurrent.futures.wait([a, b], timeout=1)
    assert done == {a, b} and not pending
    assert {f for f in concurrent.futures.as_completed([a, b], timeout=1)} == {a, b}
    assert seen == [a] and a.future() is a


def test_a_waiter_sees_a_cancel_that_comes_while_it_waits() -> None:
    _, future = _running()
    threading.Timer(0.02, future.cancel).start()
    started = time.monotonic()
    done, _pending = concurrent.futures.wait([future], timeout=5)
    assert done == {future} and time.monotonic() - started < 4


def test_result_on_the_thread_that_must_produce_it_is_refused_instead_of_waiting_for_ever() -> None:
    source: concurrent.futures.Future[int] = concurrent.futures.Future()
    future: APIFuture[int] = APIFuture(source, owner=threading.current_thread())
    with pytest.raises(RuntimeError, match="wait for ever"):
        future.result()
    source.set_result(1)
    assert future.result() == 1


def test_a_loop_that_was_closed_while_it_waited_is_forgotten_quietly(caplog: pytest.LogCaptureFixture) -> None:
    source, future = _running()

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await future.result_async(timeout=0.01)

    asyncio.run(main())
    with caplog.at_level(logging.DEBUG):
        source.set_result(2)
    assert not caplog.records and future.result() == 2


def test_finished_futures_and_their_results_go_without_the_garbage_collector() -> None:
    class Value:
        pass

    gc.collect()
    gc.disable()
    try:
        source: concurrent.futures.Future[Value] = concurrent.futures.Future()
        future: APIFuture[Value] = APIFuture(source)
        outer: APIFuture[Value] = APIFuture(future)
        value = Value()
        gone = weakref.ref(value)
        source.set_result(value)
        assert outer.result() is value
        del source, future, outer, value
        assert gone() is None
    finally:
        gc.enable()
