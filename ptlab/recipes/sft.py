"""Supervised fine-tuning: imitate conversations. One loop, read top to bottom.

The loss of a step is the mean negative log-likelihood of its trained tokens: each weighs 1 / (trained tokens of the step), so a step with
long answers is no larger step, and learning_rate means the same for every batch size. Held-out conversations are scored alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ptlab.config.sft import ConversationsConfig, SftConfig
from ptlab.envs.conversations import Conversation, conversation_datums, load_conversations, num_trained
from ptlab.envs.made_sums import made_sums
from ptlab.errors import ConfigError
from ptlab.recipes.held_out import HeldOut
from ptlab.recipes.interrupt import StopRequestedError, stop_on_signals
from ptlab.recipes.models import ServiceModels, run_renderer
from ptlab.recipes.training import Clock, RunResult, adam_params, finished, interrupted, open_training_client, save_checkpoint
from ptlab.renderers import Renderer, TrainOnWhat
from ptlab.rl import diagnostics
from ptlab.rl.epochs import TokenBatches, rows_of_step
from ptlab.runlog import RunLog
from ptlab.types import Datum, TensorData

if TYPE_CHECKING:
    from ptlab.client.service import ServiceClient
    from ptlab.client.training import TrainingClient

DEFAULT_CONVERSATIONS_PER_STEP = 32


async def run(
    config: SftConfig, service_client: ServiceClient, log: RunLog, *, side_metrics: Callable[[], dict[str, float]] = dict
) -> RunResult:
    """Train as `config` says, from the log's last checkpoint if it has one; every step leaves a row in the log.

    Row s holds the batch of step s, scored by the weights after s steps, and, where one is due, an evaluation of these weights; the row
    after the last step holds an evaluation only. SIGINT or SIGTERM ends the run with a checkpoint.

    Raises: ConfigError for conversations that are missing or cannot be trained on; EngineError and its kin.
    """
    training_client, start = await open_training_client(config, service_client, log)
    tokenizer = training_client.get_tokenizer()
    renderer = run_renderer(config.model, tokenizer)
    max_length = await max_tokens(config, ServiceModels(service_client, config.model, renderer))
    train_rows, test_rows = load(config)
    test_D = datums_of(test_rows, config, renderer, max_length)
    if not test_D:
        raise ConfigError(f"{test_rows[0][0]}: no held-out conversation has a trained token among its first {max_length}; raise max_length")
    rows_at = plan_batches(train_rows, config, renderer, max_length)
    held_out = None
    if config.eval.env is not None:
        held_out = await HeldOut.open(
            config.eval.env,
            config.eval.rollout,
            config.eval,
            seed=config.seed,
            model=config.model,
            renderer=renderer,
            service_client=service_client,
            tokenizer=tokenizer,
        )

    async def evaluate(step: int) -> dict[str, float]:
        scores = await nll_metrics(training_client, test_D)
        return scores if held_out is None else scores | await held_out.of_trainer(training_client, log, step)

    with stop_on_signals() as stop:
        done, num_seen = start, sum(len(rows_at(step)) for step in range(start))  # steps; conversations
        try:
            for step in range(start, config.steps):
                clock = Clock()
                row = {"optim/learning_rate": config.optim.learning_rate_at(step, config.steps)}
                if config.eval.every and step % config.eval.every == 0:
                    row |= await stop.unless_requested(evaluate(step))
                    clock.lap("eval")

                batch = [train_rows[index] for index in rows_at(step)]
                data_D = datums_of(batch, config, renderer, max_length)
                num_seen += len(batch)
                row |= batch_metrics(batch, data_D, epoch=num_seen / len(train_rows))

                if data_D:
                    trained = training_client.forward_backward(token_mean(data_D), "cross_entropy")  # both queued
                    updated = training_client.optim_step(adam_params(config, step))  # before either is awaited
                    output, optim = await trained, await updated
                    row |= {"train/nll": output.metrics["loss:sum"], **diagnostics.optim_metrics(optim)}  # before the update
                clock.lap("train")

                log.write(step, row | clock.metrics() | side_metrics())
                done = step + 1
                if stop.requested:
                    raise StopRequestedError
                if config.checkpoint.every and done % config.checkpoint.every == 0 and done < config.steps:
                    await save_checkpoint(training_client, log, done)

            if config.eval.every:
                clock = Clock()
                row = await stop.unless_requested(evaluate(done))
                clock.lap("eval")
                log.write(done, row | clock.metrics() | side_metrics())
        except StopRequestedError:  # nothing of the step under way has reached the trainer
            return await interrupted(training_client, log, done)

        return await finished(training_client, log, done)


# -------------------------------------------------------------------------------------------------------------------- data

Located = Sequence[tuple[str, Conversation]]
"""Conversations with where each stands, for messages."""


def load(config: SftConfig) -> tuple[Located, Located]:
    """Training and held-out conversations, disjoint. Raises: ConfigError."""
    data = config.data
    if not isinstance(data, ConversationsConfig):
        train, test = made_sums(data.num_train, data.num_test, seed=config.seed, shuffled=data.answers == "shuffled")
        return [(f"sum {index}", item) for index, item in enumerate(train)], [(f"sum {index}", item) for index, item in enumerate(test)]
    has_test = data.test_path is not None or (data.train_path is None and data.test_split is not None)
    limit = None if data.num_train is None else data.num_train + (0 if has_test else data.num_test)
    train_rows = load_conversations(data.train_path, hub_name=data.hub_name, split=data.split, subset=data.subset, limit=limit)
    if has_test:
        split = data.test_split or data.split
        test_rows = load_conversations(data.test_path, hub_name=data.hub_name, split=split, subset=data.subset, limit=data.num_test)
        return train_rows, test_rows
    if len(train_rows) <= data.num_test:
        raise ConfigError(
            f"{data.train_path or data.hub_name}: {len(train_rows)} conversations, of which data.num_test would hold out {data.num_test}; "
            f"lower data.num_test or set data.test_path"
        )
    return train_rows[: -data.num_test], train_rows[-data.num_test :]


async def max_tokens(config: SftConfig, models: ServiceModels) -> int | None:
    """Most tokens of a conversation: the config's limit or the model's, which reads all but the last token."""
    context_length = await models.context_length()
    limits = [config.max_length, None if context_length is None else context_length + 1]
    return min((limit for limit in limits if limit is not None), default=None)


def datums_of(rows: Located, config: SftConfig, renderer: Renderer, max_length: int | None) -> list[Datum]:
    """The datums of these conversations in order, weight 1.0 on what trains; one that max_length leaves nothing of has none."""
    train_on_what = TrainOnWhat(config.train_on_what)
    return [
        datum for where, conversation in rows for datum in conversation_datums(where, conversation, renderer, train_on_what, max_length)
    ]


def plan_batches(rows: Located, config: SftConfig, renderer: Renderer, max_length: int | None) -> Callable[[int], list[int]]:
    """Step -> the conversations of its batch. A limit in tokens needs the length of every conversation, so all are rendered once."""
    if config.batch.tokens is not None:
        data_N = [datums_of([row], config, renderer, max_length) for row in rows]
        tokens_N = [sum(datum.model_input.length for datum in data_D) for data_D in data_N]
        return TokenBatches(tokens_N, config.batch.tokens, seed=config.seed).rows_of_step
    per_step = config.batch.conversations or DEFAULT_CONVERSATIONS_PER_STEP
    return lambda step: rows_of_step(len(rows), per_step, seed=config.seed, step=step)


# ----------------------------------------------------------------------------------------------------------- loss and metrics


def token_mean(batch_D: Sequence[Datum]) -> list[Datum]:
    """The same datums with weights that add up to 1, so that the sum over tokens that cross_entropy takes is a mean."""
    total = math.fsum(num_trained(datum) for datum in batch_D)
    return [_with_weights(datum, datum.loss_fn_inputs["weights"].to_numpy() / total) for datum in batch_D]


def _with_weights(datum: Datum, weights_T: np.ndarray[tuple[int, ...], np.dtype[np.floating]]) -> Datum:
    weights = TensorData.from_numpy(weights_T.astype(np.float32))
    return Datum(model_input=datum.model_input, loss_fn_inputs={**datum.loss_fn_inputs, "weights": weights})


async def nll_metrics(training_client: TrainingClient, test_D: Sequence[Datum]) -> dict[str, float]:
    """eval/nll: nats per trained token of the held-out conversations, all tokens alike; eval/perplexity = exp of it."""
    output = await training_client.forward(list(test_D), "cross_entropy")
    scores_D = [outputs["logprobs"].to_numpy().astype(np.float64) for outputs in output.loss_fn_outputs]
    weights_D = [datum.loss_fn_inputs["weights"].to_numpy().astype(np.float64) for datum in test_D]
    total = math.fsum(float(weights_T.sum()) for weights_T in weights_D)
    nll = -math.fsum(float(logprobs_T @ weights_T) for logprobs_T, weights_T in zip(scores_D, weights_D, strict=True)) / total
    return {"eval/nll": nll, "eval/perplexity": math.exp(min(nll, 700.0))}


def batch_metrics(batch: Located, data_D: Sequence[Datum], *, epoch: float) -> dict[str, float]:
    """batch/skipped: nothing in it trains, because max_length cut every trained token off."""
    return {
        "data/epoch": epoch,
        "batch/conversations": float(len(batch)),
        "batch/datums": float(len(data_D)),
        "batch/tokens": float(sum(datum.model_input.length for datum in data_D)),
        "batch/trained_tokens": math.fsum(num_trained(datum) for datum in data_D),
        "batch/skipped": float(not data_D),
    }
