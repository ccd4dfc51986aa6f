"""TensorData: dense and CSR there and back, copies at both ends, and what it refuses."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptlab.errors import InvalidRequestError
from ptlab.types import TensorData


def test_dense_values_shape_and_types() -> None:
    tensor = TensorData([1, 2, 3, 4, 5, 6], "int64", [2, 3])
    assert tensor.data == [1, 2, 3, 4, 5, 6] and tensor.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert tensor.to_numpy().dtype == np.int64 and tensor.to_torch().dtype == torch.int64
    assert TensorData([1, 2], "float32").shape is None and TensorData([1, 2], "float32").to_numpy().dtype == np.float32
    assert TensorData(dtype="float32").data == []
    assert TensorData([[1.5], [2.5]], "float32").tolist() == [[1.5], [2.5]]  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.array([1, -2], dtype=np.int8), "int64"),
        (np.array([1.5, 2.5], dtype=np.float16), "float32"),
        (np.array([1.5, 2.5], dtype=np.float64), "float32"),
    ],
)
def test_numpy_types_widen_by_kind(array: np.ndarray[Any, Any], dtype: str) -> None:
    tensor = TensorData.from_numpy(array)
    assert tensor.dtype == dtype and tensor.tolist() == array.tolist() and tensor.shape == [2]


@pytest.mark.parametrize(
    ("tensor", "dtype"),
    [
        (torch.tensor([1.5, -2.0], dtype=torch.bfloat16), "float32"),
        (torch.tensor([1.5, -2.0], dtype=torch.half), "float32"),
        (torch.tensor([1.5, -2.0], dtype=torch.float64), "float32"),
        (torch.tensor([1, 2], dtype=torch.int32), "int64"),
    ],
)
def test_torch_types_widen_by_kind(tensor: torch.Tensor, dtype: str) -> None:
    assert TensorData.from_torch(tensor).dtype == dtype
    assert TensorData.from_torch(tensor).tolist() == tensor.tolist()


@pytest.mark.parametrize("array", [np.array([True]), np.array([1], dtype=np.uint8), np.array(["a"]), np.array([1j])])
def test_other_arrays_are_refused(array: np.ndarray[Any, Any]) -> None:
    with pytest.raises(ValueError, match=r"dtype .* cannot become TensorData"):
        TensorData.from_numpy(array)


def test_torch_bool_and_requires_grad_are_refused() -> None:
    with pytest.raises(ValueError, match="bool"):
        TensorData.from_torch(torch.tensor([True]))
    for make in (TensorData.from_torch, TensorData.from_torch_sparse):
        with pytest.raises(RuntimeError, match="requires grad"):
            make(torch.ones(2, 2, requires_grad=True))


def test_constructor_refusals() -> None:
    with pytest.raises(TypeError, match="dtype"):
        TensorData([1])
    with pytest.raises(ValueError, match="float64"):
        TensorData([1.0], "float64")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"3 values do not fill the shape \[2, 2\]"):
        TensorData([1, 2, 3], "int64", [2, 2])


def test_arrays_are_copied_in_and_out_and_are_writable() -> None:
    array = np.array([1.0, 2.0], dtype=np.float32)
    tensor = TensorData.from_numpy(array)
    array[0] = 9
    tensor.to_numpy()[0] = 8
    out = tensor.to_torch()
    out[0] = 7
    assert tensor.data == [1.0, 2.0]
    frozen = np.array([1, 2])
    frozen.flags.writeable = False
    TensorData.from_numpy(frozen).to_torch().add_(1)  # no warning, no error
    source = torch.tensor([1.0])
    from_torch = TensorData.from_torch(source)
    source[0] = 5
    assert from_torch.data == [1.0]


def test_csr_lists_what_is_not_padding() -> None:
    dense = torch.tensor([[0] * 9 + [5], [0] * 10, [7] + [0] * 9])
    tensor = TensorData.from_torch_sparse(dense)
    assert tensor.data == [5, 7] and tensor.sparse_crow_indices == [0, 1, 1, 2] and tensor.sparse_col_indices == [9, 0]
    assert tensor.shape == [3, 10] and torch.equal(tensor.to_torch(), dense)
    assert tensor.tolist(pad_value=-1)[1] == [-1] * 10


def test_csr_only_where_it_is_smaller() -> None:
    one_dim = TensorData.from_torch_sparse(torch.zeros(100))
    full = TensorData.from_torch_sparse(torch.ones(10, 10))
    even = TensorData.from_torch_sparse(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))  # (1 + 1) + 2 * 1 = 4 is not < 4
    smaller = TensorData.from_torch_sparse(torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]]))
    assert [t.sparse_crow_indices is None for t in (one_dim, full, even, smaller)] == [True, True, True, False]


@given(rows=st.integers(0, 4), cols=st.integers(0, 12), pad=st.sampled_from([0, -1, 3]), data=st.data(), real=st.booleans())
def test_sparse_there_and_back_gives_the_same(rows: int, cols: int, pad: int, data: st.DataObject, real: bool) -> None:
    cell = st.sampled_from([pad, pad, pad, pad, 1, 2, -7])
    values = data.draw(st.lists(st.lists(cell, min_size=cols, max_size=cols), min_size=rows, max_size=rows))
    dense = torch.tensor(values, dtype=torch.float32 if real else torch.int64).reshape(rows, cols)
    assert torch.equal(TensorData.from_torch_sparse(dense, pad_value=pad).to_torch(pad_value=pad), dense)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparse_crow_indices": [0, 1]}, "come together"),
        ({"sparse_crow_indices": [0, 1], "sparse_col_indices": [0], "shape": None}, "needs shape"),
        ({"sparse_crow_indices": [0, 1, 1], "sparse_col_indices": [0]}, "need 2 offsets"),
        ({"sparse_crow_indices": [1, 1], "sparse_col_indices": [0]}, "rising from 0"),
        ({"sparse_crow_indices": [0, 2], "sparse_col_indices": [0, 1]}, "all three must agree"),
        ({"sparse_crow_indices": [0, 1], "sparse_col_indices": [3]}, r"outside 0\.\.2"),
        ({"data": [1, 2], "sparse_crow_indices": [0, 2], "sparse_col_indices": [1, 1]}, "row 0 must rise"),
    ],
)
def test_a_csr_structure_that_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        TensorData(**{"data": [5], "dtype": "int64", "shape": [1, 3], **arguments})


@pytest.mark.parametrize("pad_value", [True, 0.5, "0"])
def test_pad_values_are_integers(pad_value: Any) -> None:
    with pytest.raises(TypeError, match="pad_value"):
        TensorData.from_torch_sparse(torch.zeros(2, 9), pad_value)


def test_pickle_and_deepcopy_and_identity() -> None:
    for tensor in (TensorData([1.0], "float32"), TensorData.from_torch_sparse(torch.eye(9))):
        for twin in (pickle.loads(pickle.dumps(tensor)), copy.deepcopy(tensor)):
            assert np.array_equal(twin.to_numpy(), tensor.to_numpy()) and twin.dtype == tensor.dtype
            assert twin != tensor  # equality is identity
        with pytest.raises(AttributeError):
            tensor.dtype = "int64"
