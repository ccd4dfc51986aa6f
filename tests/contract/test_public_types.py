"""Our types against the installed official SDK's: same names, same fields in the same order, same defaults."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from ptlab import types

sdk: Any = pytest.importorskip("tinker", reason="tinker (dev extra) is not installed").types

FIELDS_OF_OURS_ALONE = {"SampledSequence": {"policy_version": "optimizer steps behind the weights that sampled it"}}
DEFAULTS_THAT_DIFFER: dict[str, set[str]] = {
    "TensorData": {"_numpy"},  # private
}
SHARED = sorted(
    name
    for name in types.__all__
    if isinstance(getattr(types, name), type)
    and name in dir(sdk)
    and (issubclass(getattr(types, name), BaseModel) or dataclasses.is_dataclass(getattr(types, name)))
)


def fields_and_defaults(kind: type) -> dict[str, Any]:
    if issubclass(kind, BaseModel):
        return {
            name: "required" if field.is_required() else field.get_default(call_default_factory=True)
            for name, field in kind.model_fields.items()
        }
    result = {}
    for field in dataclasses.fields(kind):
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        result[field.name] = "required" if default is dataclasses.MISSING else default
    return result


def comparable(value: Any) -> Any:
    return value.model_dump() if isinstance(value, BaseModel) else value


def test_enough_types_are_shared() -> None:
    needed = {
        "AdamParams",
        "Checkpoint",
        "Datum",
        "DmelChunk",
        "EncodedTextChunk",
        "ForwardBackwardOutput",
        "ImageChunk",
        "LoraConfig",
        "ModelInput",
        "OptimStepRequest",
        "OptimStepResponse",
        "ParsedCheckpointTinkerPath",
        "PromptProvenanceSpan",
        "SampledProvenanceSpan",
        "SampledSequence",
        "SampleRequest",
        "SampleResponse",
        "SamplingParams",
        "TensorData",
        "TrainingRun",
        "DimuonParams",
        "GetInfoResponse",
    }
    assert needed <= set(SHARED)


@pytest.mark.parametrize("name", SHARED)
def test_fields_order_and_defaults(name: str) -> None:
    theirs, ours = fields_and_defaults(getattr(sdk, name)), fields_and_defaults(getattr(types, name))
    for extra in FIELDS_OF_OURS_ALONE.get(name, {}):
        del ours[extra]
    if issubclass(getattr(sdk, name), BaseModel) or name in ("TensorData", "PromptProvenanceSpan", "SampledProvenanceSpan"):
        assert set(ours) == set(theirs)  # made by keyword: the order shows only in the repr
    else:
        assert list(ours) == list(theirs)
    for field in set(theirs) - DEFAULTS_THAT_DIFFER.get(name, set()):
        assert comparable(ours[field]) == comparable(theirs[field]), field


@pytest.mark.parametrize(
    "name", ["TensorData", "ModelInput", "Datum", "SamplingParams", "SampledSequence", "SampleResponse", "ParsedCheckpointTinkerPath"]
)
def test_methods_of_theirs_exist_with_the_same_parameters(name: str) -> None:
    theirs, ours = getattr(sdk, name), getattr(types, name)
    for method, function in inspect.getmembers(theirs):
        if method.startswith("_") or method.startswith("model_") or method in dir(BaseModel):
            continue
        assert method in dir(ours), method
        if inspect.isfunction(function) or inspect.ismethod(function):
            assert list(inspect.signature(getattr(ours, method)).parameters) == list(inspect.signature(function).parameters), method


def test_the_constructor_of_tensor_data_has_the_same_order() -> None:
    assert list(inspect.signature(types.TensorData).parameters) == list(inspect.signature(sdk.TensorData).parameters)


def test_the_names_of_the_losses_are_the_same() -> None:
    assert get_args(types.LossFnType) == get_args(sdk.LossFnType)


def test_importing_the_types_needs_neither_torch_nor_transformers() -> None:
    check = (
        "import sys, types; package = types.ModuleType('ptlab'); package.__path__ = sys.argv[1:]; sys.modules['ptlab'] = package\n"
        "import ptlab.types, ptlab.futures, ptlab.errors\n"  # without ptlab/__init__.py, which offers the clients too
        "print(sorted({'torch', 'transformers', 'tinker'} & set(sys.modules)))"
    )
    directory = str(Path(types.__file__).parents[1])
    found = subprocess.run([sys.executable, "-c", check, directory], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
