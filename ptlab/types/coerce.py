"""One door for the official SDK's objects: recognised by structure, never imported."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from ptlab.types.datum import Datum, DatumLike, as_datum
from ptlab.types.model_input import ModelInput, as_model_input
from ptlab.types.params import AdamParams, LoraConfig, SamplingParams, as_adam_params, as_lora_config, as_sampling_params
from ptlab.types.sampled import SampleResponse, SampleResponseLike, as_sample_response
from ptlab.types.tensor_data import TensorData, as_tensor_data, is_tensor_like


def coerce(value: Any) -> Any:
    """Our value for a ModelInput, Datum, TensorData, SamplingParams, AdamParams, LoraConfig or SampleResponse of the official SDK.

    Ours pass unchanged. Raises: TypeError for anything else.
    """
    if isinstance(value, (ModelInput, Datum, TensorData, SamplingParams, AdamParams, LoraConfig, SampleResponse)):
        return value
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        if "chunks" in fields:
            return as_model_input(value)
        if "max_tokens" in fields:
            return as_sampling_params(value)
        if "learning_rate" in fields:
            return as_adam_params(value)
        if "rank" in fields:
            return as_lora_config(value)
    if isinstance(value, DatumLike):
        return as_datum(value)
    if isinstance(value, SampleResponseLike):
        return as_sample_response(value)
    if is_tensor_like(value):
        return as_tensor_data(value)
    raise TypeError(
        f"cannot make a ptlab value of {type(value).__module__}.{type(value).__name__}; known are ModelInput, Datum, TensorData, "
        "SamplingParams, AdamParams, LoraConfig and SampleResponse"
    )
