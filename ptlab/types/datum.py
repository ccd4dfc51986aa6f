"""Datum: one training example, and the provenance of its tokens."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from ptlab.errors import InvalidRequestError
from ptlab.types.model_input import ModelInput, as_model_input
from ptlab.types.tensor_data import TensorData, TensorDtype, as_tensor_data, is_tensor_like

LossFnInputs: TypeAlias = dict[str, TensorData]
LossFnOutput: TypeAlias = dict[str, TensorData]

# Plain lists carry no dtype; arrays and tensors keep their own.
_LIST_DTYPES: Mapping[str, TensorDtype] = {
    "target_tokens": "int64",
    "weights": "float32",
    "advantages": "float32",
    "logprobs": "float32",
    "clip_low_threshold": "float32",
    "clip_high_threshold": "float32",
    "sequence_ratio_mask": "float32",
}
_SPARSE_KEYS = frozenset({"target_tokens", "weights"})


@dataclass(frozen=True, kw_only=True)
class _ProvenanceSpan:
    sequence_id: str
    """SampledSequence.sequence_id of the request or sequence the run comes from."""
    offset: int = 0
    """Position of the run there."""
    length: int
    """Consecutive tokens in the run."""

    def __post_init__(self) -> None:
        kind = type(self).__name__
        if not self.sequence_id:
            raise InvalidRequestError(f"{kind}.sequence_id is empty; it must name a sampled sequence")
        if self.length < 0 or self.offset < 0:
            raise InvalidRequestError(f"{kind}: offset {self.offset} and length {self.length} must both be >= 0")


@dataclass(frozen=True, kw_only=True)
class PromptProvenanceSpan(_ProvenanceSpan):
    """A run of tokens that stood in the prompt of the request that sampled `sequence_id`."""


@dataclass(frozen=True, kw_only=True)
class SampledProvenanceSpan(_ProvenanceSpan):
    """A run of tokens that `sequence_id` sampled."""


ProvenanceSpans: TypeAlias = list[PromptProvenanceSpan | SampledProvenanceSpan]


@dataclass(frozen=True)
class Datum:
    """One training example: N tokens read, and what the loss needs for each of them.

    Position i of every loss input belongs to position i of model_input; target_tokens[i] is the token *after* model_input[i] (the
    caller shifts). Lists, numpy arrays and torch tensors become TensorData here; their lengths are checked by the backend, which knows
    the loss.

    Raises: KeyError for a list under a name without a known dtype; TypeError for tuples, scalars and other objects; ValueError for
    ragged lists, bool and unsigned arrays; RuntimeError for a tensor that requires grad.
    """

    model_input: ModelInput
    loss_fn_inputs: LossFnInputs = field(default_factory=dict)
    model_input_spans: ProvenanceSpans | None = None
    """Runs that tile model_input in order; set by with_provenance."""
    loss_fn_input_spans: ProvenanceSpans | None = None
    """Runs that tile target_tokens in order; both span lists or neither."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "model_input", as_model_input(self.model_input))
        object.__setattr__(self, "loss_fn_inputs", {key: _to_tensor_data(key, value) for key, value in self.loss_fn_inputs.items()})
        if (self.model_input_spans is None) != (self.loss_fn_input_spans is None):
            raise InvalidRequestError("Datum: model_input_spans and loss_fn_input_spans come together; use with_provenance to set both")
        for name, spans in (("model_input_spans", self.model_input_spans), ("loss_fn_input_spans", self.loss_fn_input_spans)):
            for span in spans or ():
                if not isinstance(span, _ProvenanceSpan):
                    raise TypeError(f"{name}: entries must be PromptProvenanceSpan or SampledProvenanceSpan, got {type(span).__name__}")

    def with_provenance(self, model_input: ProvenanceSpans, loss_fn_inputs: ProvenanceSpans) -> Self:
        """A copy that says where its tokens come from.

        Raises: InvalidRequestError if the runs do not tile model_input, or (where target_tokens is 1-D) target_tokens.
        """
        _check_tiling("model_input", model_input, self.model_input.length)
        target_tokens = self.loss_fn_inputs.get("target_tokens")
        if target_tokens is not None and target_tokens.shape is not None and len(target_tokens.shape) == 1:
            _check_tiling("loss_fn_inputs", loss_fn_inputs, target_tokens.shape[0])
        return replace(self, model_input_spans=model_input, loss_fn_input_spans=loss_fn_inputs)


@runtime_checkable
class DatumLike(Protocol):
    """The structure of the official SDK's Datum."""

    @property
    def model_input(self) -> Any: ...
    @property
    def loss_fn_inputs(self) -> Any: ...


@runtime_checkable
class _SpannedDatumLike(DatumLike, Protocol):
    @property
    def model_input_spans(self) -> Any: ...
    @property
    def loss_fn_input_spans(self) -> Any: ...


def as_datum(value: Any) -> Datum:
    """Ours, unchanged, or ours made from the official SDK's by structure."""
    if isinstance(value, Datum):
        return value
    if isinstance(value, _SpannedDatumLike) and value.model_input_spans is not None:
        return Datum(value.model_input, value.loss_fn_inputs, _own_spans(value.model_input_spans), _own_spans(value.loss_fn_input_spans))
    if isinstance(value, DatumLike):
        return Datum(value.model_input, value.loss_fn_inputs)
    raise TypeError(f"expected a Datum, got {type(value).__name__}; make one with Datum(model_input=..., loss_fn_inputs={{...}})")


def _own_spans(spans: Sequence[Any] | None) -> ProvenanceSpans | None:
    """The official SDK's spans differ from ours in nothing but the class, which is known by its name."""
    if spans is None:
        return None
    kinds = {kind.__name__: kind for kind in (PromptProvenanceSpan, SampledProvenanceSpan)}
    return [kinds[type(span).__name__](sequence_id=span.sequence_id, offset=span.offset, length=span.length) for span in spans]


def _check_tiling(name: str, spans: ProvenanceSpans, needed: int) -> None:
    covered = sum(span.length for span in spans)
    if covered != needed:
        raise InvalidRequestError(f"with_provenance: the {name} spans cover {covered} positions, the field has {needed}; they must tile it")


def _to_tensor_data(key: str, value: Any) -> TensorData:
    if isinstance(value, TensorData):
        return value
    if isinstance(value, list):
        return _list_to_tensor_data(key, value)
    torch = sys.modules.get("torch")  # whoever holds a tensor has imported torch; values must not
    try:
        if isinstance(value, np.ndarray):
            return TensorData.from_numpy(value)
        if torch is not None and isinstance(value, torch.Tensor):
            sparse = key in _SPARSE_KEYS and value.ndim == 2
            return TensorData.from_torch_sparse(value) if sparse else TensorData.from_torch(value)
    except InvalidRequestError as err:
        raise InvalidRequestError(f"loss_fn_inputs[{key!r}]: {err}") from err
    except RuntimeError as err:
        raise RuntimeError(f"loss_fn_inputs[{key!r}]: {err}") from err
    if is_tensor_like(value):
        return as_tensor_data(value)
    raise TypeError(f"loss_fn_inputs[{key!r}] is a {type(value).__name__}; it must be TensorData, a list, a numpy array or a torch tensor")


def _list_to_tensor_data(key: str, value: list[Any]) -> TensorData:
    if key not in _LIST_DTYPES:
        raise KeyError(
            f"loss_fn_inputs[{key!r}] is a list, and no dtype is known for that name; pass TensorData or a numpy array, "
            f"or use one of {', '.join(_LIST_DTYPES)}"
        )
    try:
        array: npt.NDArray[Any] = np.asarray(value)
    except ValueError as err:
        raise InvalidRequestError(f"loss_fn_inputs[{key!r}]: a nested list must be rectangular; its rows differ in length") from err
    if array.dtype.kind not in "fiub":
        raise InvalidRequestError(f"loss_fn_inputs[{key!r}]: a list must hold numbers only, this one becomes an array of {array.dtype}")
    if _LIST_DTYPES[key] == "int64" and array.dtype.kind == "f":
        broken = array[~(np.isfinite(array) & (array == np.trunc(array)))]
        if broken.size:
            raise InvalidRequestError(f"loss_fn_inputs[{key!r}] is a list of token ids and needs whole numbers; found {broken[0]}")
    return TensorData(array, _LIST_DTYPES[key], list(array.shape))
