"""Learning from comparisons: a reward model, or DPO. One loop; what differs is how a comparison becomes datums and what its loss is.

Both are client-side losses through forward_backward_custom. For the reward model that is a choice: cross_entropy on a verdict token could
only learn labels of single replies ("good", "bad"), which comparisons do not have, or of pairs put side by side into one prompt, whose
judge then gives no score of a reply alone and must be asked G^2 times for a group of G. Bradley-Terry on a difference of two scores learns
exactly what a comparison says, and leaves a score that RL can use. The price is one more forward pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor

from ptlab.config.preference import DpoConfig, PairsConfig, RewardModelConfig
from ptlab.envs.preference_data import Comparison
from ptlab.errors import ConfigError
from ptlab.recipes.interrupt import StopRequestedError, stop_on_signals
from ptlab.recipes.models import run_renderer
from ptlab.recipes.training import Clock, RunResult, adam_params, finished, interrupted, open_training_client, save_checkpoint
from ptlab.renderers import Renderer, supervised_datum
from ptlab.rl import diagnostics, preference_losses
from ptlab.rl.epochs import rows_of_step
from ptlab.rl.verdict import VerdictPrompt, scores_of
from ptlab.runlog import RunLog
from ptlab.types import Datum

if TYPE_CHECKING:
    from ptlab.client.service import ServiceClient
    from ptlab.client.training import TrainingClient

Pair: TypeAlias = tuple[Datum, Datum]
"""The conversations of a comparison with the chosen and with the rejected reply."""
LossFn: TypeAlias = "Callable[[list[Datum], list[Tensor]], tuple[Tensor, dict[str, float]]]"
EVAL_PAIRS_PER_CALL = 128


async def run(
    config: PairsConfig, service_client: ServiceClient, log: RunLog, *, side_metrics: Callable[[], dict[str, float]] = dict
) -> RunResult:
    """Train as `config` says, from the log's last checkpoint if it has one; every step leaves a row in the log.

    Row s holds the loss of step s before its update and, where one is due, eval/* of the held-out comparisons with the weights after s
    steps; the row after the last step holds these only. SIGINT or SIGTERM ends the run with a checkpoint.

    Raises: ConfigError for data that are missing or fit nowhere; EngineError and its kin.
    """
    training_client, start = await open_training_client(config, service_client, log)
    data = config.data.load(config.seed)
    objective = await open_objective(config, service_client, run_renderer(config.model, training_client.get_tokenizer()))
    test_N = fitting_pairs(data.test, objective, config.max_length)
    if config.eval.every and not test_N:
        raise ConfigError(f"max_length is {config.max_length} tokens; none of {len(data.test)} held-out comparisons is that short")

    with stop_on_signals() as stop:
        done = start  # steps
        try:
            for step in range(start, config.steps):
                clock = Clock()
                row = {"optim/learning_rate": config.optim.learning_rate_at(step, config.steps)}
                if config.eval.every and step % config.eval.every == 0:
                    row |= await stop.unless_requested(evaluate(test_N, objective, training_client))
                    clock.lap("eval")

                rows_B = rows_of_step(len(data.train), config.pairs_per_step, seed=config.seed, step=step)
                pairs_B = fitting_pairs([data.train[index] for index in rows_B], objective, config.max_length)
                data_D = [datum for pair in pairs_B for datum in pair]
                row |= {"batch/pairs": float(len(pairs_B)), "batch/tokens": float(sum(datum.model_input.length for datum in data_D))}
                if data_D:  # else all were too long
                    loss_fn = await stop.unless_requested(objective.loss_of(data_D))
                    clock.lap("prepare")
                    trained = training_client.forward_backward_custom(data_D, loss_fn)  # both queued
                    updated = training_client.optim_step(adam_params(config, step))  # before either is awaited
                    output, optim = await trained, await updated
                    clock.lap("train")
                    row |= {name: value for name, value in output.metrics.items() if "/" in name} | diagnostics.optim_metrics(optim)
                log.write(step, row | clock.metrics() | side_metrics())
                done = step + 1
                if stop.requested:
                    raise StopRequestedError
                if config.checkpoint.every and done % config.checkpoint.every == 0 and done < config.steps:
                    await save_checkpoint(training_client, log, done)

            if config.eval.every:
                clock = Clock()
                row = await stop.unless_requested(evaluate(test_N, objective, training_client))
                clock.lap("eval")
                log.write(done, row | clock.metrics() | side_metrics())
        except StopRequestedError:
            return await interrupted(training_client, log, done)

        return await finished(training_client, log, done)


class Objective(Protocol):
    """What to do with a comparison."""

    def pair(self, comparison: Comparison) -> Pair:
        """Its two datums."""

    async def loss_of(self, data_D: Sequence[Datum]) -> LossFn:
        """The loss for forward_backward_custom on these datums, chosen and rejected in turn: mean over the pairs, and metrics."""


class RewardModelObjective:
    """Bradley-Terry on the scores of rl/verdict.py."""

    def __init__(self, renderer: Renderer, *, label_smoothing: float) -> None:
        self._prompt = VerdictPrompt(renderer)
        self._label_smoothing = label_smoothing

    def pair(self, comparison: Comparison) -> Pair:
        return self._prompt.datum(comparison.prompt, comparison.chosen), self._prompt.datum(comparison.prompt, comparison.rejected)

    async def loss_of(self, data_D: Sequence[Datum]) -> LossFn:
        def loss_fn(_: list[Datum], logprobs_D: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
            scores_D = scores_of(logprobs_D)
            chosen_B, rejected_B = scores_D[::2], scores_D[1::2]
            losses_B = preference_losses.bradley_terry(chosen_B, rejected_B, label_smoothing=self._label_smoothing)
            return losses_B.mean(), {"loss/bradley_terry": losses_B.mean().item(), **pair_metrics(chosen_B, rejected_B)}

        return loss_fn


class DpoObjective:
    """DPO or IPO against a reference that never trains.

    The reference's log-probabilities come from a trainer, not a sampler: its arithmetic is the policy's, so the first loss is ln 2 to the
    last digits, and what differs later is what was learnt. Each conversation is scored once; later passes over the data reuse it.

    Args:
        reference: a training client of the base model with an adapter that is never stepped (B = 0: exactly the base model).
    """

    def __init__(self, renderer: Renderer, reference: TrainingClient, config: DpoConfig) -> None:
        self._renderer = renderer
        self._reference = reference
        self._config = config
        self._known: dict[bytes, float] = {}  # digest of a conversation -> log p_ref of its reply

    def pair(self, comparison: Comparison) -> Pair:
        chosen, rejected = ([*comparison.prompt, reply] for reply in (comparison.chosen, comparison.rejected))
        return supervised_datum(chosen, self._renderer), supervised_datum(rejected, self._renderer)

    async def loss_of(self, data_D: Sequence[Datum]) -> LossFn:
        keys_D = [conversation_key(datum) for datum in data_D]
        new = {key: datum for key, datum in zip(keys_D, data_D, strict=True) if key not in self._known}
        if new:
            scored = await self._reference.forward(list(new.values()), "cross_entropy")
            for (key, datum), output in zip(new.items(), scored.loss_fn_outputs, strict=True):
                self._known[key] = float(reply_logprob(output["logprobs"].to_torch(), datum))
        reference_D = torch.tensor([self._known[key] for key in keys_D])

        def loss_fn(_: list[Datum], logprobs_D: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
            policy_D = torch.stack([reply_logprob(logprobs, datum) for logprobs, datum in zip(logprobs_D, data_D, strict=True)])
            sides = (policy_D[::2], policy_D[1::2], reference_D[::2], reference_D[1::2])
            beta = self._config.beta
            if self._config.form == "logistic":
                losses_B = preference_losses.dpo(*sides, beta=beta, label_smoothing=self._config.label_smoothing)
            else:
                losses_B = preference_losses.ipo(*sides, beta=beta)
            rewards_D = preference_losses.implicit_rewards(policy_D, reference_D, beta=beta)
            name = {"logistic": "loss/dpo", "squared": "loss/ipo"}[self._config.form]
            return losses_B.mean(), {name: losses_B.mean().item(), **pair_metrics(rewards_D[::2], rewards_D[1::2])}

        return loss_fn


async def open_objective(config: PairsConfig, service_client: ServiceClient, renderer: Renderer) -> Objective:
    match config:
        case RewardModelConfig():
            return RewardModelObjective(renderer, label_smoothing=config.label_smoothing)
        case DpoConfig():
            reference = await service_client.create_lora_training_client(base_model=config.model.name, rank=1, seed=config.seed)
            return DpoObjective(renderer, reference, config)
    raise ConfigError(f"recipe {config.recipe!r} has no objective in recipes/preference.py")


def fitting_pairs(comparisons: Sequence[Comparison], objective: Objective, max_length: int) -> list[Pair]:
    """The pairs of which both conversations are short enough."""
    pairs_N = [objective.pair(comparison) for comparison in comparisons]
    return [pair for pair in pairs_N if max(datum.model_input.length for datum in pair) <= max_length]


async def evaluate(test_N: Sequence[Pair], objective: Objective, training_client: TrainingClient) -> dict[str, float]:
    """The metrics of the loss on held-out pairs, as eval/*, without a gradient."""
    totals: dict[str, float] = {}
    for first in range(0, len(test_N), EVAL_PAIRS_PER_CALL):
        part_N = test_N[first : first + EVAL_PAIRS_PER_CALL]
        data_D = [datum for pair in part_N for datum in pair]
        loss_fn = await objective.loss_of(data_D)
        scored = await training_client.forward(data_D, "cross_entropy")
        _, metrics = loss_fn(data_D, [output["logprobs"].to_torch() for output in scored.loss_fn_outputs])
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0.0) + value * len(part_N) / len(test_N)
    return eval_names(totals)


def eval_names(metrics: Mapping[str, float]) -> dict[str, float]:
    """loss/dpo -> eval/loss_dpo, train/accuracy -> eval/accuracy, pairs/margin -> eval/margin."""
    return {f"eval/{name.replace('loss/', 'loss_').rpartition('/')[2]}": value for name, value in metrics.items()}


def pair_metrics(chosen_B: Tensor, rejected_B: Tensor) -> dict[str, float]:
    """train/accuracy is the share of pairs with chosen above rejected (a tie is half); margin and rewards are means."""
    margin_B: Any = (chosen_B - rejected_B).detach()
    accuracy = (margin_B > 0).double().mean() + 0.5 * (margin_B == 0).double().mean()
    return {
        "train/accuracy": accuracy.item(),
        "pairs/margin": margin_B.mean().item(),
        "pairs/chosen_reward": chosen_B.detach().mean().item(),
        "pairs/rejected_reward": rejected_B.detach().mean().item(),
    }


def conversation_key(datum: Datum) -> bytes:
    """A digest of its tokens and of which of them are the reply."""
    parts = [datum.model_input.to_ints(), *(datum.loss_fn_inputs[name].tolist() for name in ("target_tokens", "weights"))]
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def reply_logprob(logprobs_T: Tensor, datum: Datum) -> Tensor:
    """log p of the whole reply: the sum over the tokens that the datum's weights mark."""
    return (logprobs_T * datum.loss_fn_inputs["weights"].to_torch()).sum()
