"""What goes wrong is said at once, by the right class of error, and harms nothing else."""

from __future__ import annotations

import pickle
import threading
import time

import numpy as np
import tinker
from checks import (
    BASE_MODEL,
    OLD_SDK,
    SENTENCES,
    VOCAB_SIZE,
    WAIT_S,
    adam,
    check,
    close,
    cross_entropy_datum,
    data,
    make_sampling_client,
    make_training_client,
    prompt_of,
    raises,
    ready,
    reason_of,
    refusal_of,
    rest,
    rl_datum,
    run_checks,
    scores,
    train_a_step,
)
from tinker import types


def failure(future):
    """The error of a request that was accepted and then failed through its future: the user's, with words."""
    error = raises(tinker.RequestFailedError, lambda: future.result(WAIT_S))
    assert str(error.category) == "user", f"{error.category}: {error}"
    assert pickle.loads(pickle.dumps(error)).category == error.category
    return str(error)


@check("TrainingClient.forward_backward")
def a_bad_datum_fails_its_own_request_only():
    client, plain = make_training_client(), make_training_client()
    tokens = SENTENCES[0]
    n = len(tokens) - 1

    def datum(**inputs):
        return types.Datum(model_input=prompt_of(tokens[:-1]), loss_fn_inputs=inputs)

    bad = {
        "short weights": (datum(target_tokens=tokens[1:], weights=[1.0] * (n - 1)), "cross_entropy", "weights"),
        "no targets": (datum(weights=[1.0] * n), "cross_entropy", "target_tokens"),
        "token out of range": (datum(target_tokens=[VOCAB_SIZE + 9] * n, weights=[1.0] * n), "cross_entropy", str(VOCAB_SIZE + 9)),
        "no advantages": (datum(target_tokens=tokens[1:], logprobs=[0.0] * n), "ppo", "advantages"),
        "NaN": (rl_datum(tokens, logprobs=[-1.0] * n, advantages=[float("nan")] * n), "importance_sampling", "advantages"),
        "too long": (cross_entropy_datum([5] * 400), "cross_entropy", "256"),
        "empty": (types.Datum(model_input=prompt_of([]), loss_fn_inputs={"target_tokens": [], "weights": []}), "cross_entropy", "empty"),
    }
    client.forward_backward(data(), "cross_entropy").result(WAIT_S)
    for name, (one, loss, word) in bad.items():
        message = failure(client.forward_backward([cross_entropy_datum(tokens), one], loss))
        assert word in message, f"{name}: {message}"
    client.optim_step(adam()).result(WAIT_S)  # applies what was accepted, and nothing of the refused ones
    train_a_step(plain)
    close(scores(client), scores(plain), atol=1e-5)
    return f"{len(bad)} kinds of bad datums: user errors that name the field, and no trace in the gradient"


@check("TrainingClient.forward_backward")
def unknown_losses_and_settings_are_refused():
    client = make_training_client()
    assert "made_up" in failure(client.forward_backward(data(), "made_up"))
    n = len(SENTENCES[0]) - 1
    good = [rl_datum(SENTENCES[0], logprobs=[-1.0] * n, advantages=[1.0] * n)]
    assert "clip_hihg" in failure(client.forward_backward(good, "ppo", {"clip_hihg": 1.0}))
    raises(ValueError, lambda: client.forward_backward([], "cross_entropy"))
    train_a_step(client)


@check("TrainingClient.optim_step")
def impossible_steps_are_refused():
    client = make_training_client()
    before = scores(client)
    for params in (adam(-1.0), adam(beta1=1.5), adam(eps=-1e-8), adam(grad_clip_norm=-1.0)):
        client.forward_backward(data(), "cross_entropy")
        future = client.optim_step(params)
        refusal_of(lambda future=future: future.result(WAIT_S))
    close(scores(client), before, atol=1e-6)
    client.optim_step(adam()).result(WAIT_S)


@check("TrainingClient.optim_step")
def a_step_without_a_gradient_is_answered():
    client = make_training_client()
    before = scores(client)
    try:
        client.optim_step(adam()).result(WAIT_S)
        said = "a step on nothing changes nothing"
    except tinker.RequestFailedError as error:
        assert str(error.category) == "user", error
        said = f"refused: {error}"
    close(scores(client), before, atol=1e-6)
    train_a_step(client)
    return said


@check("TrainingClient.forward_backward_custom", new_only=True)
def a_failed_custom_loss_poisons_its_client_only():
    client, other = make_training_client(), make_training_client()

    def broken(data, logprobs_list):
        raise KeyError("in the user's loss")

    raises(KeyError, lambda: client.forward_backward_custom(data(), broken).result(WAIT_S))
    raises(RuntimeError, lambda: client.forward_backward(data(), "cross_entropy").result(WAIT_S), "poisoned")
    train_a_step(other)


@check("SamplingClient.sample")
def a_refused_sample_is_the_users_error():
    client = make_sampling_client()
    reason = refusal_of(lambda: client.sample(prompt_of([VOCAB_SIZE + 1]), 1, types.SamplingParams(max_tokens=1)).result(WAIT_S))
    assert str(VOCAB_SIZE + 1) in reason, reason
    long = prompt_of([5] * 300)
    assert "256" in refusal_of(lambda: client.sample(long, 1, types.SamplingParams(max_tokens=1)).result(WAIT_S))
    assert "256" in refusal_of(lambda: client.compute_logprobs(long).result(WAIT_S))


@check("RestClient.get_training_run")
def what_is_not_there_is_not_found():
    error = raises(tinker.NotFoundError, lambda: rest().get_training_run("nobody:train:0").result(WAIT_S))
    assert error.status_code == 404 and reason_of(error)
    raises(tinker.NotFoundError, lambda: rest().get_session("nobody").result(WAIT_S))
    raises(tinker.NotFoundError, lambda: rest().get_sampler("nobody:sample:0").result(WAIT_S))
    raises(tinker.APIStatusError, lambda: rest().list_checkpoints("nobody:train:0").result(WAIT_S))


@check("ServiceClient.create_lora_training_client")
def a_key_of_the_wrong_form_never_leaves_the_client():
    raises(tinker.TinkerError, lambda: ready(tinker.ServiceClient(api_key="no-such-prefix").create_sampling_client(base_model=BASE_MODEL)))


@check("TrainingClient.forward_backward", "SamplingClient.sample")
def the_longest_sequence_fits():
    client = make_training_client()
    rng = np.random.default_rng(0)
    tokens = [int(t) for t in rng.integers(3, VOCAB_SIZE, 257)]
    assert scores(client, [tokens]).shape == (256,)
    sampler = make_sampling_client()
    prompt = prompt_of(tokens[:255])
    assert len(sampler.sample(prompt, 1, types.SamplingParams(max_tokens=1, stop=[])).result(WAIT_S).sequences[0].tokens) == 1
    assert "context" in refusal_of(lambda: sampler.sample(prompt, 1, types.SamplingParams(max_tokens=2)).result(WAIT_S))


@check("SamplingClient.sample", "TrainingClient.forward_backward")
def sampling_and_training_at_once():
    """Samples come back while the trainer works, and neither changes the other's numbers."""
    client, sampler, plain = make_training_client(), make_sampling_client(), make_training_client()
    params = types.SamplingParams(max_tokens=16, seed=2, stop=[])
    wanted = [s.tokens for s in sampler.sample(prompt_of(SENTENCES[1]), 4, params).result(WAIT_S).sequences]
    stop, drawn = threading.Event(), []

    def draw():
        while not stop.is_set():
            drawn.append([s.tokens for s in sampler.sample(prompt_of(SENTENCES[1]), 4, params).result(WAIT_S).sequences])

    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    for _ in range(4):
        train_a_step(client)
    stop.set()
    thread.join(WAIT_S)
    for _ in range(4):
        train_a_step(plain)
    close(scores(client), scores(plain), atol=1e-5)
    assert drawn and all(d == wanted for d in drawn)


@check("ServiceClient.create_lora_training_client")
def answers_are_quick():
    """No refusal and no small request may run into the SDK's silent retries."""
    client = make_training_client()
    started = time.monotonic()
    for _ in range(20):
        client.forward([cross_entropy_datum(SENTENCES[0])], "cross_entropy").result(WAIT_S)
    seconds = (time.monotonic() - started) / 20
    assert seconds < 1.0, f"{seconds:.2f} s for each small forward"
    assert OLD_SDK or client.get_info().model_id == client.model_id


if __name__ == "__main__":
    run_checks()
