"""Futures: every way to wait, and the client futures of 0.38 that act as the client."""

from __future__ import annotations

import asyncio
import concurrent.futures

import tinker
from checks import (
    BASE_MODEL,
    OLD_SDK,
    WAIT_S,
    Refused,
    adam,
    check,
    close,
    data,
    make_training_client,
    prompt_of,
    public_methods,
    raises,
    run_checks,
    scores,
    service,
    works_or_refused,
)
from tinker import types


@check("APIFuture.result", "APIFuture.result_async")
def a_future_gives_its_value_as_often_as_wanted():
    client = make_training_client()
    future = client.forward(data(), "cross_entropy")
    assert isinstance(future, tinker.APIFuture)
    first = future.result(WAIT_S)
    assert future.result() is first or future.result().metrics == first.metrics

    async def awaited():
        return (
            await future,
            await future.result_async(timeout=WAIT_S),
            await asyncio.wait_for(asyncio.shield(future.result_async()), WAIT_S),
        )

    for one in asyncio.run(awaited()):
        assert one.metrics == first.metrics
    for one in asyncio.run(awaited()):  # in another loop
        assert one.metrics == first.metrics
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(one.metrics == first.metrics for one in pool.map(lambda _: future.result(WAIT_S), range(8)))


@check("APIFuture.result", "APIFuture.result_async")
def a_timeout_does_not_cancel_a_training_request():
    client = make_training_client()
    futures = [client.forward_backward(data(), "cross_entropy") for _ in range(10)]
    raises(TimeoutError, lambda: futures[-1].result(timeout=0.0001))  # an *awaited* timeout cancels, and then the SDK sends nothing more
    assert client.optim_step(adam()).result(WAIT_S) is not None
    assert client.forward(data(), "cross_entropy").result(WAIT_S).metrics["loss:sum"] > 0


@check("APIFuture.future", "APIFuture.coroutine")
def a_future_is_taken_by_standard_tools():
    client = make_training_client()
    futures = [client.forward(data(), "cross_entropy") for _ in range(3)]
    done, pending = concurrent.futures.wait([f.future() for f in futures], timeout=WAIT_S)
    assert len(done) == 3 and not pending
    called = []
    futures[0].future().add_done_callback(lambda f: called.append(f.result().metrics))
    assert len(called) == 1

    async def as_task():
        return await asyncio.create_task(client.forward(data(), "cross_entropy").coroutine())

    close(asyncio.run(as_task()).metrics["loss:sum"], called[0]["loss:sum"], rtol=1e-6)


def used_as_a_client(future, calls):
    """Call every public method of the client on the future of it; the methods called."""
    for name, arguments in calls.items():
        result = getattr(future, name)(*arguments)
        if asyncio.iscoroutine(result):

            async def twice(result=result):
                value = await result
                return await value if isinstance(value, tinker.APIFuture) else value

            asyncio.run(twice())
        elif isinstance(result, tinker.APIFuture):
            result.result(WAIT_S)
    return set(calls)


def methods_of(class_name):
    return tuple(name for name, _ in public_methods() if name.startswith(class_name + "."))


OF_THE_FUTURE = {"future", "result", "result_async", "coroutine"}


@check(*methods_of("BackcompatTrainingClientFuture") or ("BackcompatTrainingClientFuture.result",))
def a_future_of_a_training_client_acts_as_the_client():
    made = service().create_lora_training_client(BASE_MODEL, rank=8, seed=1)
    assert isinstance(made, tinker.TrainingClient) and isinstance(made, tinker.APIFuture)
    batch = data()

    def custom(data, logprobs_list):
        return -sum(lp.sum() for lp in logprobs_list), {"n": float(len(data))}

    before = made.forward(batch, "cross_entropy").result(WAIT_S).metrics["loss:sum"]
    path, sampler_path = f"tinker://{made.model_id}/weights/f", f"tinker://{made.model_id}/sampler_weights/f"
    calls = {
        "forward": (batch, "cross_entropy"),
        "forward_async": (batch, "cross_entropy"),
        "forward_backward": (batch, "cross_entropy"),
        "forward_backward_async": (batch, "cross_entropy"),
        "forward_backward_custom": (batch, custom),
        "forward_backward_custom_async": (batch, custom),
        "optim_step": (adam(),),
        "optim_step_async": (adam(),),
        "save_state": ("f",),
        "save_state_async": ("g",),
        "save_weights_for_sampler": ("f",),
        "save_weights_for_sampler_async": ("g",),
        "save_weights_and_get_sampling_client": (),
        "save_weights_and_get_sampling_client_async": (),
        "create_sampling_client": (sampler_path,),
        "create_sampling_client_async": (sampler_path,),
        "load_state": (path,),
        "load_state_async": (path,),
        "load_state_with_optimizer": (path,),
        "load_state_with_optimizer_async": (path,),
        "get_info": (),
        "get_info_async": (),
        "get_tokenizer": (),
        "get_telemetry": (),
        "get_console_url": (),
    }
    called = used_as_a_client(made, calls)
    try:
        works_or_refused(lambda: used_as_a_client(made, {"save_weights_external": ("f",), "save_weights_external_async": ("g",)}))
        outside = "works"
    except Refused as refusal:
        outside = str(refusal)
    missing = {m.split(".")[1] for m in methods_of("BackcompatTrainingClientFuture")} - called - OF_THE_FUTURE
    assert missing <= {"save_weights_external", "save_weights_external_async"}, f"not called: {missing}"
    assert type(made.result(WAIT_S)) is tinker.TrainingClient and made.future().done()
    assert asyncio.run(made.coroutine()).model_id == asyncio.run(made.result_async()).model_id == made.model_id
    assert scores(made.result()).sum() > -before
    return None if outside == "works" else f"save_weights_external: {outside}"


@check(*methods_of("BackcompatSamplingClientFuture") or ("BackcompatSamplingClientFuture.result",))
def a_future_of_a_sampling_client_acts_as_the_client():
    from tinker.lib.api_future_impl import QueueState

    made = service().create_sampling_client(base_model=BASE_MODEL)
    assert isinstance(made, tinker.SamplingClient) and isinstance(made, tinker.APIFuture)
    prompt, params = prompt_of([5, 6, 7, 8]), types.SamplingParams(max_tokens=2, seed=1)
    calls = {
        "sample": (prompt, 1, params),
        "sample_async": (prompt, 1, params),
        "compute_logprobs": (prompt,),
        "compute_logprobs_async": (prompt,),
        "get_base_model": (),
        "get_base_model_async": (),
        "get_sampler_handle": (),
        "get_tokenizer": (),
        "get_telemetry": (),
        "on_queue_state_change": (QueueState.ACTIVE, None),
    }
    called = used_as_a_client(made, calls)
    clone = made.from_sampler_handle(made.get_sampler_handle())
    assert clone.get_base_model() == made.create(made.holder, base_model=BASE_MODEL).result(WAIT_S).get_base_model() == BASE_MODEL
    missing = {m.split(".")[1] for m in methods_of("BackcompatSamplingClientFuture")} - called - OF_THE_FUTURE
    assert missing == {"create", "from_sampler_handle"}, f"not called: {missing}"
    assert type(made.result(WAIT_S)) is tinker.SamplingClient and made.future().done()
    assert type(asyncio.run(made.coroutine())) is type(asyncio.run(made.result_async())) is tinker.SamplingClient
    assert clone.compute_logprobs(prompt).result(WAIT_S)[1:] == made.compute_logprobs(prompt).result(WAIT_S)[1:]


@check("APIFuture.result")
def a_future_of_a_client_that_cannot_be_made_says_why():
    if OLD_SDK:
        raises(tinker.TinkerError, lambda: service().create_lora_training_client("nobody/nothing"), "nobody/nothing")
        return
    made = service().create_lora_training_client("nobody/nothing")
    raises(tinker.TinkerError, lambda: made.result(WAIT_S), "nobody/nothing")
    raises(tinker.TinkerError, lambda: made.forward(data(), "cross_entropy").result(WAIT_S), "nobody/nothing")
    assert made.future().exception() is not None


if __name__ == "__main__":
    run_checks()
