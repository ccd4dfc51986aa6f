"""The cookbook's default loss through the in-process face: sample on record, say where the tokens come from, train."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptlab import types
from ptlab.backend.backend import Backend
from ptlab.client.connection import BackendConnection
from ptlab.client.service import ServiceClient
from ptlab.engines.protocols import Engines
from ptlab.engines.scripted import ScriptedSampler, ScriptedTrainer
from ptlab.errors import InvalidRequestError


def test_what_is_sampled_on_request_is_on_record_for_stable_reinforce(tmp_path: Path) -> None:
    backend = Backend(
        data_dir=tmp_path / "data",
        scratch_dir=tmp_path / "scratch",
        open_engines=lambda name: Engines(trainer=ScriptedTrainer(), sampler=ScriptedSampler(), tokenizer=None),
        on_metrics=lambda metrics: None,
    )
    connection = BackendConnection(backend)
    service = ServiceClient(connection=connection)
    training_client = service.create_lora_training_client("scripted/unigram", rank=1)
    prompt = types.ModelInput.from_ints([1, 2])

    def trained_on(record: bool) -> types.ForwardBackwardOutput:
        client = training_client.save_weights_and_get_sampling_client(record_stability_info=record)
        sequence = client.sample(prompt, 1, types.SamplingParams(max_tokens=3, seed=0)).result().sequences[0]
        spans: list[types.PromptProvenanceSpan | types.SampledProvenanceSpan] = [
            types.PromptProvenanceSpan(sequence_id=sequence.sequence_id, offset=1, length=1),
            types.SampledProvenanceSpan(sequence_id=sequence.sequence_id, length=3),
        ]
        inputs = {"target_tokens": [2, *sequence.tokens], "logprobs": [0.0] * 4, "advantages": [0.0, 1.0, 1.0, 1.0]}
        datum = types.Datum(model_input=types.ModelInput.from_ints([1, 2, *sequence.tokens[:-1]]), loss_fn_inputs=inputs)  # type: ignore[arg-type]
        told = datum.with_provenance(
            model_input=[
                types.PromptProvenanceSpan(sequence_id=sequence.sequence_id, length=2),
                types.SampledProvenanceSpan(sequence_id=sequence.sequence_id, length=2),
            ],
            loss_fn_inputs=spans,
        )
        return training_client.forward_backward([told], "stable_reinforce").result()

    output = trained_on(record=True)
    assert output.metrics["ratio:mean"] == pytest.approx(1.0, abs=1e-5)  # the record, not the zeros that the datum says
    with pytest.raises(InvalidRequestError, match="not on record"):
        trained_on(record=False)
    connection.submit(backend.close()).result(10)
    connection.close()
