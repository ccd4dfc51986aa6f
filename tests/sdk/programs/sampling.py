"""SamplingClient: what is drawn, what is scored, how it stops, and that it can be sent to another process."""

from __future__ import annotations

import asyncio
import concurrent.futures
import multiprocessing
import pickle
import time

import numpy as np
import torch
from checks import (
    BASE_MODEL,
    EOS_TOKENS,
    OLD_SDK,
    SENTENCES,
    VOCAB_SIZE,
    WAIT_S,
    check,
    close,
    far,
    make_sampling_client,
    make_training_client,
    prompt_of,
    raises,
    refusal_of,
    rest,
    run_checks,
    scores,
    service,
    train_a_step,
    works_or_refused,
)
from tinker import types
from tinker.lib.public_interfaces import SamplingClient

PROMPT = SENTENCES[0]


def sample(client, *, tokens=PROMPT, num_samples=1, more=None, **params):
    """The answer to one request; `params` are SamplingParams, `more` further arguments of sample()."""
    params = {"max_tokens": 8, "seed": 3, **params}
    return client.sample(prompt_of(tokens), num_samples, types.SamplingParams(**params), **(more or {})).result(WAIT_S)


def tokens_of(answer):
    return [list(sequence.tokens) for sequence in answer.sequences]


@check("SamplingClient.sample")
def several_samples_differ_and_a_seed_repeats_them():
    client = make_sampling_client()
    first, again, other = sample(client, num_samples=4), sample(client, num_samples=4), sample(client, num_samples=4, seed=4)
    assert len(first.sequences) == 4 and len({tuple(t) for t in tokens_of(first)}) > 1, tokens_of(first)
    assert tokens_of(first) == tokens_of(again)
    assert tokens_of(first) != tokens_of(other)
    for sequence in first.sequences:
        assert sequence.stop_reason in ("length", "stop")
        assert len(sequence.tokens) == len(sequence.logprobs) <= 8
        assert all(0 <= t < VOCAB_SIZE for t in sequence.tokens) and all(p <= 0.0 for p in sequence.logprobs)
    free = [sample(client, seed=None, max_tokens=16).sequences[0].tokens for _ in range(3)]
    assert len({tuple(t) for t in free}) > 1, "without a seed every request draws anew"


@check("SamplingClient.sample", new_only=True)
def every_sequence_has_an_id_of_its_own():
    client = make_sampling_client()
    ids = [s.sequence_id for _ in range(2) for s in sample(client, num_samples=3).sequences]
    assert len(set(ids)) == 6 and all(ids)


@check("SamplingClient.sample")
def log_probabilities_are_those_of_the_trainer():
    client = make_sampling_client()
    sequence = sample(client, max_tokens=12, stop=[]).sequences[0]
    whole = PROMPT + list(sequence.tokens)
    close(sequence.logprobs, scores(make_training_client(), [whole])[len(PROMPT) - 1 :], atol=1e-4)


@check("SamplingClient.sample")
def temperature_scales_the_distribution_that_is_scored():
    client = make_sampling_client()
    cold = sample(client, temperature=0.5, max_tokens=1, num_samples=8, stop=[]).sequences
    plain = {}
    for sequence in cold:
        token = sequence.tokens[0]
        plain[token] = client.compute_logprobs(prompt_of([*PROMPT, token])).result(WAIT_S)[-1]
    first = cold[0]
    for sequence in cold[1:]:  # log p_T(i) - log p_T(j) = (log p_1(i) - log p_1(j)) / T
        difference = (plain[sequence.tokens[0]] - plain[first.tokens[0]]) / 0.5
        close(sequence.logprobs[0] - first.logprobs[0], difference, atol=1e-3)


@check("SamplingClient.sample")
def temperature_zero_takes_the_most_likely_token():
    client = make_sampling_client()
    greedy = sample(client, temperature=0.0, max_tokens=6, stop=[], seed=1)
    assert tokens_of(greedy) == tokens_of(sample(client, temperature=0.0, max_tokens=6, stop=[], seed=2))
    whole = PROMPT + list(greedy.sequences[0].tokens)
    top = sample(client, tokens=whole, max_tokens=1, more={"include_prompt_logprobs": True, "topk_prompt_logprobs": 1})
    best = [row[0][0] for row in top.topk_prompt_logprobs[len(PROMPT) :]]
    assert best == list(greedy.sequences[0].tokens)
    close(greedy.sequences[0].logprobs, top.prompt_logprobs[len(PROMPT) :], atol=1e-4)  # scored at temperature 1


@check("SamplingClient.sample")
def top_k_and_top_p_cut_the_tail():
    client = make_sampling_client()
    greedy = tokens_of(sample(client, temperature=0.0, max_tokens=5, stop=[]))
    assert tokens_of(sample(client, top_k=1, max_tokens=5, stop=[])) == greedy
    assert tokens_of(sample(client, top_p=1e-6, max_tokens=5, stop=[])) == greedy


@check("SamplingClient.sample")
def every_form_of_stop():
    client = make_sampling_client()
    free = sample(client, max_tokens=12, stop=[], seed=11).sequences[0]
    assert free.stop_reason == "length" and len(free.tokens) == 12, "stop=[] turns every stop off, EOS included"
    chosen = next(t for i, t in enumerate(free.tokens) if i >= 2 and t not in free.tokens[:i] and t not in EOS_TOKENS)
    at = list(free.tokens).index(chosen)
    by_token = sample(client, max_tokens=12, stop=[int(chosen)], seed=11).sequences[0]
    assert by_token.stop_reason == "stop" and list(by_token.tokens) == list(free.tokens[: at + 1]), "the stop token is kept, once, last"
    tokenizer = client.get_tokenizer()
    for drawn in ("a", "e", "1"):  # a string that the random model soon writes; several spellings of the same request
        answers = [sample(client, max_tokens=200, stop=form, seed=12).sequences[0] for form in (drawn, [drawn], [drawn, "\x00\x01\x02"])]
        assert tokens_of_all(answers) == tokens_of_all(answers[:1]) * 3
        text = tokenizer.decode(answers[0].tokens)
        if answers[0].stop_reason == "stop" and answers[0].tokens[-1] not in EOS_TOKENS:
            assert drawn in tokenizer.decode(answers[0].tokens[-1:]) and text.count(drawn) == 1, text
            break
    else:
        raise AssertionError("no stop string was ever reached")
    with_eos = next(s for seed in range(40) if (s := sample(client, max_tokens=200, seed=seed).sequences[0]).stop_reason == "stop")
    assert with_eos.tokens[-1] in EOS_TOKENS and not set(with_eos.tokens[:-1]) & set(EOS_TOKENS), "EOS ends a sample and is kept"
    return "stop token, EOS and stop string are kept, once, last; str, list[str], list[int], [] and None"


def tokens_of_all(sequences):
    return [list(s.tokens) for s in sequences]


@check("SamplingClient.sample")
def max_tokens_left_out_goes_to_the_end_of_the_context():
    client = make_sampling_client()
    sequence = sample(client, max_tokens=None, stop=[]).sequences[0]
    assert len(sequence.tokens) == 256 - len(PROMPT), len(sequence.tokens)
    reason = refusal_of(lambda: sample(client, max_tokens=250))
    assert "context" in reason, reason


@check("SamplingClient.sample")
def prompt_logprobs_have_one_entry_per_token_and_the_first_is_none():
    client = make_sampling_client()
    answer = sample(client, more={"include_prompt_logprobs": True, "topk_prompt_logprobs": 3})
    assert len(answer.prompt_logprobs) == len(answer.topk_prompt_logprobs) == len(PROMPT)
    assert answer.prompt_logprobs[0] is None and answer.topk_prompt_logprobs[0] is None
    close(answer.prompt_logprobs[1:], scores(make_training_client(), [PROMPT]), atol=1e-4)
    for row, token, logprob in zip(answer.topk_prompt_logprobs[1:], PROMPT[1:], answer.prompt_logprobs[1:], strict=True):
        assert len(row) == 3 and [p for _, p in row] == sorted((p for _, p in row), reverse=True)
        if token in dict(row):
            close(dict(row)[token], logprob, atol=1e-4)
        else:
            assert logprob <= row[-1][1] + 1e-4
    without = sample(client)
    assert without.prompt_logprobs is None and without.topk_prompt_logprobs is None


@check("SamplingClient.compute_logprobs", "SamplingClient.compute_logprobs_async")
def compute_logprobs_scores_the_prompt():
    client = make_sampling_client()
    wanted = [scores(make_training_client(), [s]) for s in SENTENCES]
    futures = [client.compute_logprobs(prompt_of(s)) for s in SENTENCES]
    for future, sentence, right in zip(futures, SENTENCES, wanted, strict=True):
        found = future.result(WAIT_S)
        assert len(found) == len(sentence) and found[0] is None
        close(found[1:], right, atol=1e-4)
    found = asyncio.run(client.compute_logprobs_async(prompt_of(PROMPT)))
    assert found[0] is None
    close(found[1:], wanted[0], atol=1e-4)


@check("SamplingClient.sample", "SamplingClient.compute_logprobs", new_only=True)
def only_the_last_prompt_tokens_can_be_scored():
    client = make_sampling_client()
    whole = client.compute_logprobs(prompt_of(PROMPT)).result(WAIT_S)
    last = works_or_refused(lambda: client.compute_logprobs(prompt_of(PROMPT), prompt_logprobs_last_n=3).result(WAIT_S))
    assert last[:-3] == [None] * (len(PROMPT) - 3)
    close(last[-3:], whole[-3:], atol=1e-4)
    answer = sample(client, more={"include_prompt_logprobs": True, "topk_prompt_logprobs": 2, "prompt_logprobs_last_n": 2})
    assert [row is None for row in answer.topk_prompt_logprobs] == [True] * (len(PROMPT) - 2) + [False] * 2


@check("SamplingClient.sample", new_only=True)
def the_most_likely_alternatives_of_each_drawn_token():
    client = make_sampling_client()
    sequence = works_or_refused(lambda: sample(client, more={"topk_sample_logprobs": 4}, max_tokens=5, stop=[])).sequences[0]
    assert len(sequence.topk_logprobs) == len(sequence.tokens) == 5
    for row, token, logprob in zip(sequence.topk_logprobs, sequence.tokens, sequence.logprobs, strict=True):
        assert len(row) == 4 and [p for _, p in row] == sorted((p for _, p in row), reverse=True)
        if token in dict(row):
            close(dict(row)[token], logprob, atol=1e-4)


@check("SamplingClient.sample", new_only=True)
def chosen_tokens_can_be_scored_at_chosen_positions():
    client = make_sampling_client()
    ids = torch.full((len(PROMPT) - 1, 2), -1, dtype=torch.int64)
    ids[2, 0], ids[2, 1], ids[5, 0] = PROMPT[3], 99, 98
    dense, sparse = types.TensorData.from_torch(ids), types.TensorData.from_torch_sparse(ids, pad_value=-1)
    plain = client.compute_logprobs(prompt_of(PROMPT)).result(WAIT_S)
    by_hand = client.compute_logprobs(prompt_of([*PROMPT[:6], 98])).result(WAIT_S)[-1]
    for target in (dense, sparse):
        answer = works_or_refused(lambda target=target: sample(client, more={"target_prompt_logprobs": target}, max_tokens=1))
        found = answer.target_prompt_logprobs.to_numpy()
        assert found.shape == (len(PROMPT) - 1, 2)
        close(found[2, 0], plain[3], atol=1e-4)
        close(found[5, 0], by_hand, atol=1e-4)
        assert found[2, 1] < 0.0 and found[0, 0] == 0.0
    return "dense and CSR"


@check("SamplingClient.sample", new_only=True)
def alternatives_can_be_drawn_for_every_prompt_token():
    client = make_sampling_client()
    answer = works_or_refused(lambda: sample(client, more={"prompt_alt_tokens_k": 3}, max_tokens=1))
    tokens, logprobs = answer.prompt_alt_tokens.tokens.to_numpy(), answer.prompt_alt_tokens.logprobs.to_numpy()
    assert tokens.shape == logprobs.shape == (len(PROMPT) - 1, 3)
    again = client.compute_logprobs(prompt_of([*PROMPT[:4], int(tokens[3, 1])])).result(WAIT_S)[-1]
    close(logprobs[3, 1], again, atol=1e-4)


@check("SamplingClient.sample_async")
async def the_async_twin_gives_the_value():
    client = make_sampling_client()
    params = types.SamplingParams(max_tokens=5, seed=3)
    answers = await asyncio.gather(*(client.sample_async(prompt_of(s), 2, params) for s in SENTENCES))
    for sentence, answer in zip(SENTENCES, answers, strict=True):
        blocking = await asyncio.to_thread(lambda s=sentence: client.sample(prompt_of(s), 2, params).result(WAIT_S))
        assert tokens_of(answer) == tokens_of(blocking)


@check("SamplingClient.sample", new_only=True)
async def a_sample_can_be_awaited():
    client = await service().create_sampling_client(base_model=BASE_MODEL)
    answer = await client.sample(prompt_of(PROMPT), 1, types.SamplingParams(max_tokens=3, seed=3))
    logprobs = await client.compute_logprobs(prompt_of(PROMPT))
    assert len(answer.sequences) == 1 and logprobs[0] is None


@check("SamplingClient.sample")
def many_requests_at_once():
    client = make_sampling_client()
    params = [types.SamplingParams(max_tokens=4, seed=i, stop=[]) for i in range(64)]
    futures = [client.sample(prompt_of(PROMPT), 1, p) for p in params]
    plain = [f if isinstance(f, concurrent.futures.Future) else f.future() for f in futures]
    done, pending = concurrent.futures.wait(plain, timeout=WAIT_S)
    assert not pending and len(done) == 64
    for i in (0, 31, 63):
        assert tokens_of(futures[i].result()) == tokens_of(sample(client, max_tokens=4, seed=i, stop=[]))
    return "64 in flight; each answer is that of its own seed"


@check("SamplingClient.sample")
def a_snapshot_does_not_follow_later_training():
    trainer = make_training_client()
    before = scores(trainer, [PROMPT])
    client = trainer.save_weights_and_get_sampling_client()
    client = client if OLD_SDK else client.result(WAIT_S)
    train_a_step(trainer)
    close(client.compute_logprobs(prompt_of(PROMPT)).result(WAIT_S)[1:], before, atol=1e-4)
    newer = trainer.save_weights_and_get_sampling_client()
    newer = newer if OLD_SDK else newer.result(WAIT_S)
    close(newer.compute_logprobs(prompt_of(PROMPT)).result(WAIT_S)[1:], scores(trainer, [PROMPT]), atol=1e-4)
    close(client.compute_logprobs(prompt_of(PROMPT)).result(WAIT_S)[1:], before, atol=1e-4)
    far(before, scores(trainer, [PROMPT]))


@check("SamplingClient.sample")
def a_cancelled_sample_frees_its_place():
    client = make_sampling_client()
    long = types.SamplingParams(max_tokens=240, stop=[], seed=1)

    async def cancel_some():
        tasks = [asyncio.create_task(client.sample_async(prompt_of(PROMPT), 4, long)) for _ in range(4)]
        await asyncio.sleep(0.3)
        for task in tasks:
            task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert all(isinstance(r, asyncio.CancelledError) for r in asyncio.run(cancel_some()))
    started = time.monotonic()
    sample(client)
    assert time.monotonic() - started < 60, "the next sample waited for the cancelled ones"


@check("SamplingClient.sample")
def a_timeout_ends_the_wait_only():
    client = make_sampling_client()
    future = client.sample(prompt_of(PROMPT), 8, types.SamplingParams(max_tokens=200, stop=[], seed=1))
    raises(TimeoutError, lambda: future.result(timeout=0.001))
    assert len(future.result(timeout=WAIT_S).sequences) == 8


@check(
    "SamplingClient.get_base_model", "SamplingClient.get_base_model_async", "SamplingClient.get_tokenizer", "SamplingClient.get_telemetry"
)
def a_sampler_knows_its_base_model_and_tokenizer():
    trainer = make_training_client()
    path = trainer.save_weights_for_sampler("tokenizer").result(WAIT_S).path
    for client in (make_sampling_client(), make_sampling_client(model_path=path)):
        assert client.get_base_model() == BASE_MODEL and asyncio.run(client.get_base_model_async()) == BASE_MODEL
        tokenizer = client.get_tokenizer()
        assert tokenizer.decode(tokenizer.encode("Compute 1+2.")) == "Compute 1+2."
        client.get_telemetry()


@check("SamplingClient.on_queue_state_change")
def the_queue_observer_is_only_told():
    from tinker.lib.api_future_impl import QueueState

    make_sampling_client().on_queue_state_change(QueueState.ACTIVE, None)
    return "called by the SDK itself; ptlab never pauses a queue"


@check("SamplingClient.create")
def a_client_of_an_existing_sampling_session():
    client = make_sampling_client()
    made = SamplingClient.create(client.holder, base_model=BASE_MODEL).result(WAIT_S)
    assert tokens_of(sample(made)) == tokens_of(sample(client))
    if not OLD_SDK:  # 0.25 cannot tell which base model a session that it did not open has
        assert rest().get_sampler(made._sampling_session_id).result(WAIT_S).base_model == BASE_MODEL


def sample_in_another_process(pickled, handle, conn):
    client = pickle.loads(pickled) if pickled else SamplingClient.from_sampler_handle(handle)
    conn.send((tokens_of(sample(client)), [s for s in client.compute_logprobs(prompt_of(PROMPT)).result(WAIT_S)[1:]]))


def in_other_processes(number, *, pickled=None, handle=None):
    """What `number` new processes draw and score with the client they are given."""
    context = multiprocessing.get_context("spawn")
    ends = [context.Pipe() for _ in range(number)]
    processes = [context.Process(target=sample_in_another_process, args=(pickled, handle, theirs)) for _, theirs in ends]
    for process in processes:
        process.start()
    answers = []
    for ours, _ in ends:
        assert ours.poll(WAIT_S), "no answer from the other process"
        answers.append(ours.recv())
    for process in processes:
        process.join(WAIT_S)
    return answers


def trained_sampler():
    trainer = make_training_client()
    train_a_step(trainer)
    client = trainer.save_weights_and_get_sampling_client()
    return client if OLD_SDK else client.result(WAIT_S)


@check("SamplingClient.sample")
def a_pickled_client_works_in_another_process():
    client = trained_sampler()
    wanted = tokens_of(sample(client)), client.compute_logprobs(prompt_of(PROMPT)).result(WAIT_S)[1:]
    for tokens, logprobs in in_other_processes(2, pickled=pickle.dumps(client)):
        assert tokens == wanted[0]
        close(logprobs, wanted[1], atol=1e-5)
    clone = pickle.loads(pickle.dumps(client))
    assert tokens_of(sample(clone)) == wanted[0], "and in the same process, beside the original"
    assert tokens_of(sample(client)) == wanted[0]
    return "the same sampler from two processes at once"


@check("SamplingClient.get_sampler_handle", "SamplingClient.from_sampler_handle")
def a_handle_works_in_another_process():
    client = trained_sampler()
    handle = client.get_sampler_handle()
    assert isinstance(handle, str)
    wanted = tokens_of(sample(client)), client.compute_logprobs(prompt_of(PROMPT)).result(WAIT_S)[1:]
    [(tokens, logprobs)] = in_other_processes(1, handle=handle)
    assert tokens == wanted[0]
    close(logprobs, wanted[1], atol=1e-5)


@check("SamplingClient.sample")
def what_cannot_be_sampled_is_refused_at_once():
    client = make_sampling_client()
    reasons = [
        refusal_of(lambda: sample(client, num_samples=0)),
        refusal_of(lambda: sample(client, max_tokens=0)),
        refusal_of(lambda: sample(client, temperature=-1.0)),
        refusal_of(lambda: sample(client, tokens=[VOCAB_SIZE + 5])),
        refusal_of(lambda: sample(client, tokens=[])),
        refusal_of(lambda: sample(client, top_p=0.0)),
    ]
    assert all(reasons)
    image = types.ModelInput(chunks=[types.ImageChunk(data=b"\x89PNG", format="png", expected_tokens=4)])
    reason = refusal_of(lambda: client.sample(image, 1, types.SamplingParams(max_tokens=1)).result(WAIT_S))
    assert len(sample(client).sequences) == 1, "and the client goes on"
    assert np.isfinite(sample(client).sequences[0].logprobs).all()
    return f"images: {reason}"


if __name__ == "__main__":
    run_checks()
