"""Stored things and their names."""

from __future__ import annotations

import copy
import pickle
from datetime import UTC, datetime

import pytest
from pydantic import ValidationError

from ptlab.types import (
    AdamOptimizerConfig,
    Checkpoint,
    ForwardBackwardOutput,
    GetInfoResponse,
    ModelData,
    ParsedCheckpointTinkerPath,
    RequestErrorCategory,
    SaveWeightsResponse,
    TensorData,
    WeightsInfoResponse,
)


@pytest.mark.parametrize(("segment", "kind"), [("weights", "training"), ("sampler_weights", "sampler"), ("external_weights", "external")])
def test_a_path_has_run_kind_and_name(segment: str, kind: str) -> None:
    parsed = ParsedCheckpointTinkerPath.from_tinker_path(f"tinker://s:train:0/{segment}/step_1")
    assert parsed.training_run_id == "s:train:0" and parsed.checkpoint_type == kind and parsed.checkpoint_id == f"{segment}/step_1"


@pytest.mark.parametrize(
    "path",
    [
        "",
        "run/weights/a",
        "http://run/weights/a",
        "tinker://run/a",
        "tinker://run/weights/a/b",
        "tinker://run/other/a",
        "tinker:///weights/a",
        "tinker://run/weights/",
    ],
)
def test_other_paths_are_refused_with_the_form_that_is_needed(path: str) -> None:
    with pytest.raises(ValueError, match=r"tinker://<training run>/<weights\|sampler_weights\|external_weights>/<name>"):
        ParsedCheckpointTinkerPath.from_tinker_path(path)


def test_results_drop_what_they_do_not_know_and_do_not_change() -> None:
    saved = SaveWeightsResponse.model_validate({"path": "tinker://r/weights/a", "new_field": 1})
    assert saved == SaveWeightsResponse(path="tinker://r/weights/a") and saved.get_console_url() == saved.path
    with pytest.raises(ValidationError, match="frozen"):
        saved.path = "x"


def test_defaults_of_nested_results() -> None:
    info = GetInfoResponse(model_data=ModelData(arch="qwen3"), model_id="m")
    assert info.optimizer_config == AdamOptimizerConfig() == WeightsInfoResponse(base_model="b", is_lora=True).optimizer_config
    checkpoint = Checkpoint(
        checkpoint_id="weights/a", checkpoint_type="training", time=datetime.now(UTC), tinker_path="tinker://r/weights/a"
    )
    assert checkpoint.public is False and checkpoint.expires_at is None
    assert pickle.loads(pickle.dumps(checkpoint)) == copy.deepcopy(checkpoint) == checkpoint


def test_a_forward_backward_output_is_a_plain_value_without_a_loss_field() -> None:
    output = ForwardBackwardOutput("x", [{"logprobs": TensorData([-1.0], "float32")}])
    assert output.metrics == {} and "loss" not in ForwardBackwardOutput.__dataclass_fields__
    assert pickle.loads(pickle.dumps(output)).loss_fn_outputs[0]["logprobs"].data == [-1.0]


def test_error_categories_are_lower_case_on_the_wire() -> None:
    assert [category.value for category in RequestErrorCategory] == ["unknown", "server", "user"]
