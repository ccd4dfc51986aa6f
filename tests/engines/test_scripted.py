"""The stand-in trainer lets others in between as a real one does."""

from __future__ import annotations

from ptlab.engines.scripted import ScriptedTrainer
from ptlab.losses import resolve_loss
from ptlab.types import AdamParams, Datum, LoraConfig, ModelInput


def data(count: int) -> list[Datum]:
    inputs = {"target_tokens": [1, 2], "weights": [1.0, 1.0]}
    return [Datum(model_input=ModelInput.from_ints([0, 1]), loss_fn_inputs=inputs) for _ in range(count)]


def test_the_hook_comes_between_datums_and_changes_nothing() -> None:
    alone, shared = ScriptedTrainer(), ScriptedTrainer()
    seen: list[float | None] = []
    shared.between_micro_batches = lambda: seen.append(shared.compute_logprobs(None, [1, 2])[1])
    for trainer in (alone, shared):
        trainer.create_adapter("m", LoraConfig(rank=1))
        trainer.forward_backward("m", data(4), resolve_loss("cross_entropy"))
        trainer.optim_step("m", AdamParams(learning_rate=0.1))
    assert len(seen) == 3 and set(seen) == {alone.compute_logprobs(None, [1, 2])[1]}
    assert shared.compute_logprobs("m", [1, 2, 3]) == alone.compute_logprobs("m", [1, 2, 3])
