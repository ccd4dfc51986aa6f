"""Sampling, optimizer and adapter parameters: defaults, and which of them mind a typo."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from pydantic import ValidationError

from ptlab.types import AdamParams, DimuonParams, LoraConfig, ModelInput, OptimParamsBase, OptimStepRequest, SampleRequest, SamplingParams


def test_defaults() -> None:
    assert SamplingParams().model_dump() == {
        "max_tokens": None, "seed": None, "stop": None, "temperature": 1, "top_k": -1, "top_p": 1,
    }  # fmt: skip
    assert AdamParams().model_dump() == {
        "learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12, "weight_decay": 0.0, "grad_clip_norm": 0.0,
    }  # fmt: skip
    assert LoraConfig(rank=4).model_dump() == {"rank": 4, "seed": None, "train_unembed": True, "train_mlp": True, "train_attn": True}


def test_sampling_params_ignore_what_they_do_not_know_and_the_others_refuse_it() -> None:
    assert SamplingParams(max_tokens=3, min_p=0.1) == SamplingParams(max_tokens=3)  # type: ignore[call-arg]
    for make in (lambda: AdamParams(lr=1.0), lambda: LoraConfig(rank=1, alpha=2), lambda: DimuonParams(learning_rate=1.0, beta2=0.9)):  # type: ignore[call-arg]
        with pytest.raises(ValidationError, match="extra"):
            make()


@pytest.mark.parametrize("stop", ["\n", ["a", "b"], [1, 2], [], ("a",), None])
def test_stops_that_are_taken(stop: Any) -> None:
    params = SamplingParams(stop=stop)
    assert params.stop == stop and type(params.stop) is type(stop)
    assert pickle.loads(pickle.dumps(params)) == copy.deepcopy(params) == params


@pytest.mark.parametrize("stop", [3, ["a", 1], [1, "a"], {"a": 1}])
def test_stops_that_are_refused(stop: Any) -> None:
    with pytest.raises(ValidationError):
        SamplingParams(stop=stop)


def test_they_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        SamplingParams().temperature = 0
    with pytest.raises(ValidationError, match="frozen"):
        AdamParams().learning_rate = 0


def test_other_optimizer_families_keep_their_fields() -> None:
    unknown = OptimParamsBase.model_validate({"type": "new", "momentum": 0.3})
    assert OptimStepRequest(optim_params=unknown, model_id="m").model_dump()["optim_params"] == {"type": "new", "momentum": 0.3}
    with pytest.raises(ValidationError):
        DimuonParams(learning_rate=-1.0)


def test_a_sample_request_holds_ours() -> None:
    request = SampleRequest(prompt=ModelInput.from_ints([1]), sampling_params=SamplingParams(max_tokens=1))
    assert request.num_samples == 1 and request.prompt.to_ints() == [1]
