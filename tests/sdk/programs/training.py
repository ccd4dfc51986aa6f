"""TrainingClient: passes, steps, losses, order. Every number is compared with one that was found another way."""

from __future__ import annotations

import asyncio

import numpy as np
import tinker
import torch
from checks import (
    BASE_MODEL,
    EOS_TOKENS,
    SENTENCES,
    WAIT_S,
    adam,
    check,
    close,
    cross_entropy_datum,
    data,
    far,
    logprobs_of,
    make_training_client,
    prompt_of,
    raises,
    refusal_of,
    rl_datum,
    run_checks,
    scores,
    service,
    train_a_step,
    works_or_refused,
)
from tinker import types


@check("TrainingClient.forward")
def forward_gives_the_log_probabilities_of_the_model_itself():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype=torch.float32)
    output = make_training_client().forward(data(), "cross_entropy").result(WAIT_S)
    for tokens, found in zip(SENTENCES, logprobs_of(output), strict=True):
        with torch.no_grad():
            logprobs = torch.log_softmax(model(torch.tensor([tokens[:-1]])).logits[0].float(), dim=-1)
        close(found, logprobs[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])], atol=1e-4)
    close(output.metrics["loss:sum"], -sum(one.sum() for one in logprobs_of(output)), atol=1e-3)
    return "a new LoRA gives the base model's log-probabilities (Hugging Face, float32)"


@check("TrainingClient.forward")
def forward_leaves_no_gradient_and_no_change():
    plain, probed = make_training_client(), make_training_client()
    before = scores(probed)
    scores(probed)
    close(scores(probed), before, atol=0, rtol=0)
    probed.forward([cross_entropy_datum([9, 8, 7, 6, 5, 4])], "cross_entropy").result(WAIT_S)  # its gradient would show after the step
    train_a_step(plain), train_a_step(probed)
    close(scores(probed), scores(plain), atol=1e-5)
    return "weights and gradients are those of a client that never called forward"


@check("TrainingClient.forward_backward", "TrainingClient.optim_step")
def a_step_raises_what_was_trained():
    client = make_training_client()
    before = scores(client)
    losses = [train_a_step(client).metrics["loss:sum"] for _ in range(4)]
    assert losses == sorted(losses, reverse=True), f"the loss does not fall: {losses}"
    after = scores(client)
    assert after.sum() > before.sum() + 1.0, f"log p rose by {after.sum() - before.sum():.3f} only"
    close(losses[0], -before.sum(), atol=1e-3)
    negative = make_training_client()
    train_a_step(negative, [cross_entropy_datum(s, [-1.0] * (len(s) - 1)) for s in SENTENCES])
    assert scores(negative).sum() < before.sum(), "negative weights must push the tokens away"


@check("TrainingClient.forward_backward")
def gradients_accumulate_until_the_step():
    at_once, in_parts = make_training_client(), make_training_client()
    train_a_step(at_once)
    for datum in data():
        in_parts.forward_backward([datum], "cross_entropy")
    in_parts.optim_step(adam()).result(WAIT_S)
    close(scores(in_parts), scores(at_once), atol=1e-4)
    train_a_step(in_parts, [cross_entropy_datum([50, 51, 52])])  # what was applied is gone: the next step starts at zero
    train_a_step(at_once, [cross_entropy_datum([50, 51, 52])])
    close(scores(in_parts), scores(at_once), atol=1e-4)
    return "four calls of one datum are one call of four"


@check("TrainingClient.forward_backward", "TrainingClient.optim_step")
def requests_run_in_the_order_of_the_calls():
    queued, awaited = make_training_client(), make_training_client()
    futures = []
    for _ in range(3):
        futures += [queued.forward_backward(data(), "cross_entropy"), queued.optim_step(adam())]
    last = queued.forward(data(), "cross_entropy")
    for future in [last, *reversed(futures)]:
        future.result(WAIT_S)
    for _ in range(3):
        train_a_step(awaited)
    close(np.concatenate(logprobs_of(last.result())), scores(awaited), atol=1e-5)
    return "seven requests queued before the first answer was read, read in reverse"


@check("TrainingClient.forward_backward")
def more_than_1024_datums_travel_in_chunks():
    sentences = [[i % 500 + 3, (7 * i) % 500 + 3, (11 * i) % 500 + 3] for i in range(1100)]
    chunked, by_hand = make_training_client(), make_training_client()
    batch = [cross_entropy_datum(s) for s in sentences]
    output = chunked.forward_backward(batch, "cross_entropy")
    chunked.optim_step(adam()).result(WAIT_S)
    found = logprobs_of(output.result(WAIT_S))
    assert len(found) == 1100
    close(output.result().metrics["loss:sum"], -sum(one.sum() for one in found), rtol=1e-4)
    for i in (0, 1, 1023, 1024, 1099):  # each datum's own answer, in its own place
        close(found[i], scores(by_hand, [sentences[i]]), atol=1e-4)
    for start in range(0, 1100, 400):
        by_hand.forward_backward(batch[start : start + 400], "cross_entropy")
    by_hand.optim_step(adam()).result(WAIT_S)
    close(scores(chunked), scores(by_hand), atol=1e-3)
    return "1100 datums: order, metrics and gradient as in smaller calls"


@check("TrainingClient.forward")
def large_results_arrive_whole():
    rng = np.random.default_rng(0)
    sentences = [[int(t) for t in rng.integers(3, 512, 257)] for _ in range(300)]
    found = logprobs_of(make_training_client().forward([cross_entropy_datum(s) for s in sentences], "cross_entropy").result(WAIT_S))
    assert [len(one) for one in found] == [256] * 300
    for i in (0, 150, 299):
        close(found[i], scores(make_training_client(), [sentences[i]]), atol=1e-4)
    return "300 KB: announced by its size first"


@check("TrainingClient.forward_backward")
def several_weighted_targets_per_position_dense_and_sparse():
    tokens = SENTENCES[0]
    n = len(tokens) - 1
    targets = torch.zeros((n, 6), dtype=torch.int64)
    weights = torch.zeros((n, 6))
    targets[:, 0], weights[:, 0] = torch.tensor(tokens[1:]), 0.75
    targets[2, 1], weights[2, 1] = 200, 0.25
    dense = types.Datum(
        model_input=prompt_of(tokens[:-1]),
        loss_fn_inputs={"target_tokens": types.TensorData.from_torch(targets), "weights": types.TensorData.from_torch(weights)},
    )
    sparse = types.Datum(model_input=prompt_of(tokens[:-1]), loss_fn_inputs={"target_tokens": targets, "weights": weights})
    assert sparse.loss_fn_inputs["weights"].sparse_crow_indices is not None
    client = make_training_client()
    single = scores(client, [tokens, [*tokens[:3], 200]])
    first, second = (client.forward([datum], "cross_entropy").result(WAIT_S) for datum in (dense, sparse))
    wanted = -(0.75 * single[:n].sum() + 0.25 * single[n + 2])
    for output in (first, second):
        assert output.loss_fn_outputs[0]["logprobs"].shape == [n, 6]
        close(output.loss_fn_outputs[0]["logprobs"].to_numpy()[:, 0], single[:n], atol=1e-4)
        close(output.metrics["loss:sum"], wanted, atol=1e-4)
    assert first.loss_fn_outputs[0]["logprobs"].to_torch().add_(1.0).shape == (n, 6)  # writable
    return "(N, K) targets, dense and CSR"


def rl_batch(client, *, shift: float = 0.1):
    """Datums whose recorded log-probabilities are off by up to `shift`, so that every ratio differs from 1."""
    batch, p, q, a = [], [], [], []
    for tokens in SENTENCES:
        n = len(tokens) - 1
        here = scores(client, [tokens])
        recorded = here + shift * np.linspace(-1, 1, n)
        advantages = np.where(np.arange(n) < 2, 0.0, np.linspace(-1.5, 2.0, n))
        recorded[:2] = 0.0  # the prompt: no log-probability, no advantage
        batch.append((tokens, recorded, advantages))
        p.append(here), q.append(recorded), a.append(advantages)
    return batch, p, q, a


@check("TrainingClient.forward_backward")
def policy_losses_are_the_documented_formulas():
    client = make_training_client()
    batch, p, q, a = rl_batch(client, shift=0.4)
    datums = [rl_datum(t, logprobs=r.tolist(), advantages=x.tolist()) for t, r, x in batch]
    p, q, a = np.concatenate(p), np.concatenate(q), np.concatenate(a)
    counts = a != 0
    ratio = np.where(counts, np.exp(np.where(counts, p - q, 0.0)), 1.0)
    clip = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
    wanted = {
        "importance_sampling": ({}, -(ratio * a).sum()),
        "ppo": (clip, -np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a).sum()),
        "cispo": (clip, -(np.clip(ratio, 0.8, 1.2) * p * a).sum()),
        "dro": ({"beta": 0.05}, -(p * a - 0.5 * 0.05 * (p - q) ** 2).sum()),
    }
    for name, (config, value) in wanted.items():
        output = client.forward(datums, name, config or None).result(WAIT_S)
        close(output.metrics["loss:sum"], value, atol=1e-3)
        close(np.concatenate(logprobs_of(output)), p, atol=1e-4)
    default = client.forward(datums, "ppo").result(WAIT_S).metrics["loss:sum"]
    close(default, wanted["ppo"][1], atol=1e-3)  # 0.8 and 1.2 are the defaults
    return "importance_sampling, ppo, cispo, dro: loss:sum against numpy"


@check("TrainingClient.forward_backward")
def policy_gradients_have_the_right_sign():
    for name in ("importance_sampling", "ppo", "cispo"):
        client = make_training_client()
        before = scores(client)
        own = np.split(before, np.cumsum([len(s) - 1 for s in SENTENCES])[:-1])
        good = [rl_datum(s, logprobs=p.tolist(), advantages=[1.0] * len(p)) for s, p in zip(SENTENCES, own, strict=True)]
        client.forward_backward(good, name)
        client.optim_step(adam()).result(WAIT_S)
        assert scores(client).sum() > before.sum(), f"{name}: an advantage of 1 must raise log p"


@check("TrainingClient.forward_backward")
def gspo_has_one_ratio_per_sequence():
    client = make_training_client()
    batch, p, _, _ = rl_batch(client, shift=0.2)
    datums, wanted = [], 0.0
    for (tokens, recorded, advantages), here in zip(batch, p, strict=True):
        mask = (np.arange(len(here)) >= 2).astype(np.float32)  # as an array: 0.25 does not know the type of a list of this name
        datums.append(rl_datum(tokens, logprobs=recorded.tolist(), advantages=advantages.tolist(), sequence_ratio_mask=mask))
        ratio = np.exp((here - recorded)[mask != 0].mean())
        wanted -= np.minimum(ratio * advantages, np.clip(ratio, 0.9, 1.1) * advantages).sum()
    config = {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}
    close(client.forward(datums, "gspo", config).result(WAIT_S).metrics["loss:sum"], wanted, atol=1e-3)


@check("TrainingClient.forward_backward", new_only=True)
def stable_reinforce_takes_recorded_sequences():
    client = make_training_client()
    sampler = client.save_weights_and_get_sampling_client(record_stability_info=True).result(WAIT_S)
    prompt = [30, 31, 32, 33]
    params = types.SamplingParams(max_tokens=6, seed=5, stop=[])
    answer = sampler.sample(prompt_of(prompt), 2, params).result(WAIT_S)
    datums = []
    for sequence, advantage in zip(answer.sequences, (1.0, -1.0), strict=True):
        tokens = prompt + list(sequence.tokens)
        unscored = len(prompt) - 1
        datum = rl_datum(
            tokens,
            logprobs=[0.0] * unscored + list(sequence.logprobs),
            advantages=[0.0] * unscored + [advantage] * len(sequence.tokens),
        )
        asked = types.PromptProvenanceSpan(sequence_id=sequence.sequence_id, length=len(prompt))
        unasked = types.PromptProvenanceSpan(sequence_id=sequence.sequence_id, offset=1, length=unscored)
        drawn = types.SampledProvenanceSpan(sequence_id=sequence.sequence_id, length=len(sequence.tokens))
        shorter = types.SampledProvenanceSpan(sequence_id=sequence.sequence_id, length=len(sequence.tokens) - 1)
        datums.append(datum.with_provenance(model_input=[asked, shorter], loss_fn_inputs=[unasked, drawn]))
    before = [scores(client, [prompt + list(s.tokens)])[len(prompt) - 1 :].sum() for s in answer.sequences]
    output = works_or_refused(lambda: client.forward_backward(datums, "stable_reinforce", {"kl_coeff": 0.0}).result(WAIT_S))
    wanted = -(before[0] - before[1])  # on-policy: weight 1, -A * log p
    close(output.metrics["loss:sum"], wanted, atol=2e-3)
    client.optim_step(adam()).result(WAIT_S)
    after = [scores(client, [prompt + list(s.tokens)])[len(prompt) - 1 :].sum() for s in answer.sequences]
    assert after[0] - before[0] > after[1] - before[1], "the rewarded sequence must gain on the other"
    return "on-policy value and direction; the formula is ptlab's own"


@check("TrainingClient.optim_step")
def adam_params_by_position_and_by_name():
    by_position, by_name = make_training_client(), make_training_client()
    for client, arguments in ((by_position, (adam(),)), (by_name, ())):
        client.forward_backward(data(), "cross_entropy")
        client.optim_step(*arguments, **({} if arguments else {"adam_params": adam()})).result(WAIT_S)
    close(scores(by_name), scores(by_position), atol=1e-5)
    still = make_training_client()
    before = scores(still)
    train_a_step(still, learning_rate=0.0)
    close(scores(still), before, atol=1e-6)
    return "a learning rate of 0 moves nothing"


@check("TrainingClient.optim_step")
def every_field_of_adam_params_counts():
    batch = data()
    plain, decayed, clipped, other_eps = (make_training_client() for _ in range(4))
    options = ({}, {"weight_decay": 5.0}, {"grad_clip_norm": 1e-6, "eps": 1e-3}, {"eps": 1e-3})
    for client, more in zip((plain, decayed, clipped, other_eps), options, strict=True):
        for _ in range(2):
            client.forward_backward(batch, "cross_entropy")
            client.optim_step(adam(**more)).result(WAIT_S)
    far(scores(decayed), scores(plain))
    far(scores(other_eps), scores(plain))
    far(scores(clipped), scores(other_eps))
    assert np.abs(scores(clipped) - scores(make_training_client())).max() < 1e-2, "a gradient clipped to nothing moves nothing"


@check("TrainingClient.optim_step", new_only=True)
def optimizers_other_than_adamw_are_refused_with_a_reason():
    client = make_training_client()
    reason = refusal_of(lambda: client.optim_step(tinker.DimuonParams(learning_rate=1e-3)).result(WAIT_S))
    close(scores(client), scores(make_training_client()), atol=1e-6)
    raises(TypeError, lambda: client.optim_step())
    return f"Adam works; Dimuon is refused: {reason}"


def custom_cross_entropy(data, logprobs_list):
    """The same loss as the built-in one, written by a user."""
    loss = sum(-(lp * torch.tensor(d.loss_fn_inputs["weights"].tolist())).sum() for d, lp in zip(data, logprobs_list, strict=True))
    return loss, {"mean_logprob": float(torch.cat(list(logprobs_list)).mean())}


@check("TrainingClient.forward_backward_custom")
def a_custom_loss_has_the_gradient_of_the_built_in_one():
    built_in, custom = make_training_client(), make_training_client()
    for _ in range(2):
        wanted = built_in.forward_backward(data(), "cross_entropy")
        built_in.optim_step(adam())
        found = custom.forward_backward_custom(data(), custom_cross_entropy)
        custom.optim_step(adam())
        close(found.result(WAIT_S).metrics["loss:sum"], wanted.result(WAIT_S).metrics["loss:sum"], rtol=1e-4)
        close(found.result().metrics["mean_logprob"], np.concatenate(logprobs_of(wanted.result())).mean(), rtol=1e-4)
    close(scores(custom), scores(built_in), atol=1e-4)


@check("TrainingClient.forward_backward_custom")
def a_custom_loss_over_pairs_of_datums():
    client = make_training_client()
    before = scores(client, [SENTENCES[0]]).sum(), scores(client, [SENTENCES[1]]).sum()

    def preference(data, logprobs_list):
        chosen, rejected = (lp.sum() for lp in logprobs_list)
        return -torch.nn.functional.logsigmoid(chosen - rejected), {"margin": float(chosen - rejected)}

    pair = [cross_entropy_datum(s) for s in SENTENCES[:2]]
    output = client.forward_backward_custom(pair, preference)
    client.optim_step(adam()).result(WAIT_S)
    close(output.result(WAIT_S).metrics["margin"], before[0] - before[1], atol=1e-3)
    after = scores(client, [SENTENCES[0]]).sum(), scores(client, [SENTENCES[1]]).sum()
    assert after[0] - after[1] > before[0] - before[1] + 0.1


@check("LossHandle.key", "LossHandle.input_names", "ServiceClient.create_custom_loss", "TrainingClient.forward_backward_custom")
def a_traced_loss_has_the_gradient_of_the_built_in_one():
    def neg_ll(logprobs, weights):
        loss = -(logprobs * weights).sum()
        return loss, {"custom/neg_ll:sum": loss, "custom/mean_logprob:mean": logprobs.mean()}

    handle = works_or_refused(lambda: service().create_custom_loss(neg_ll, {"logprobs": 1, "weights": 1}).result(WAIT_S))
    assert handle.input_names == ("weights",) and len(handle.key) == 64
    built_in, custom = make_training_client(), make_training_client()
    wanted = train_a_step(built_in)
    found = custom.forward_backward_custom(data(), handle)
    custom.optim_step(adam()).result(WAIT_S)
    close(found.result(WAIT_S).metrics["custom/neg_ll:sum"], wanted.metrics["loss:sum"], rtol=1e-4)
    close(found.result().metrics["custom/mean_logprob:mean"], np.mean([p.mean() for p in logprobs_of(wanted)]), rtol=1e-4)
    close(scores(custom), scores(built_in), atol=1e-4)
    return "run on the server" if handle.loss_id else "run by the SDK: the server takes no graphs"


@check(
    "TrainingClient.forward_async",
    "TrainingClient.forward_backward_async",
    "TrainingClient.optim_step_async",
    "TrainingClient.forward_backward_custom_async",
)
async def async_twins_give_a_future_to_await_again():
    client, wanted = make_training_client(), make_training_client()
    trained = await client.forward_backward_async(data(), "cross_entropy")
    updated = await client.optim_step_async(adam())
    custom = await client.forward_backward_custom_async(data(), custom_cross_entropy)
    again = await client.optim_step_async(adam())
    scored = await client.forward_async(data(), "cross_entropy")
    first, _, second, _, last = await asyncio.gather(trained, updated, custom, again, scored)
    assert (await trained).metrics == first.metrics, "a future can be awaited twice"
    assert "mean_logprob" in second.metrics
    train_a_step(wanted), train_a_step(wanted)
    close(np.concatenate(logprobs_of(last)), scores(wanted), atol=1e-4)


@check("TrainingClient.forward_backward", "TrainingClient.optim_step")
async def futures_can_be_awaited_directly():
    client = make_training_client()
    before = (await client.forward(data(), "cross_entropy")).metrics["loss:sum"]
    trained = client.forward_backward(data(), "cross_entropy")
    updated = client.optim_step(adam())
    close((await trained).metrics["loss:sum"], before, rtol=1e-5)
    metrics = (await updated).metrics
    assert metrics is None or all(isinstance(v, float) for v in metrics.values())
    assert (await client.forward(data(), "cross_entropy")).metrics["loss:sum"] < before


@check("TrainingClient.get_info", "TrainingClient.get_info_async", "TrainingClient.get_telemetry")
def the_server_says_what_is_trained():
    client = make_training_client(rank=4)
    for info in (client.get_info(), asyncio.run(client.get_info_async())):
        assert info.model_id == client.model_id and info.is_lora and info.lora_rank == 4
        assert info.model_data.model_name == BASE_MODEL, info
    client.get_telemetry()


@check("TrainingClient.get_tokenizer")
def the_tokenizer_is_found_by_the_name_the_server_gives():
    tokenizer = make_training_client().get_tokenizer()
    text = "Compute 100+900."
    assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.eos_token_id == EOS_TOKENS[0]


@check("TrainingClient.get_console_url")
def console_urls_are_made_by_the_sdk():
    client = make_training_client()
    assert client.model_id.split(":")[0] in client.get_console_url()
    return "an address on the hosted service's site, where a local run is not"


@check("TrainingClient.forward_backward")
def one_client_from_several_threads():
    from concurrent.futures import ThreadPoolExecutor

    client = make_training_client()
    wanted = scores(client)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: scores(client), range(8)):
            close(found, wanted, atol=1e-5)


if __name__ == "__main__":
    run_checks()
