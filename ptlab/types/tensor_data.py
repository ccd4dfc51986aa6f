"""TensorData: the one array type of the API. Dense, or CSR for rows that are mostly padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypeGuard, runtime_checkable

import numpy as np
import numpy.typing as npt

from ptlab.errors import InvalidRequestError

if TYPE_CHECKING:
    import torch

TensorDtype: TypeAlias = Literal["int64", "float32"]


@dataclass(frozen=True, eq=False, init=False)
class TensorData:
    """An int64 or float32 array; a value: arrays are copied on the way in and on the way out.

    With `sparse_crow_indices` and `sparse_col_indices` the array is CSR: `data` holds only the listed cells, `shape` [rows, cols] is
    required, and every other cell takes the `pad_value` asked for when it is made dense.
    """

    dtype: TensorDtype
    shape: list[int] | None = None
    """None = one dimension, the length of `data`."""
    sparse_crow_indices: list[int] | None = None
    """rows + 1 offsets into data; None = dense."""
    sparse_col_indices: list[int] | None = None
    """One column per listed cell."""
    _numpy: npt.NDArray[Any] = field(init=False, repr=False)

    def __init__(
        self,
        data: Sequence[int] | Sequence[float] | npt.NDArray[Any] | None = None,
        dtype: TensorDtype | None = None,
        shape: Sequence[int] | None = None,
        sparse_crow_indices: Sequence[int] | None = None,
        sparse_col_indices: Sequence[int] | None = None,
    ) -> None:
        """Raises: TypeError without a dtype; InvalidRequestError (a ValueError) for a dtype, shape or CSR structure that cannot be."""
        if dtype is None:
            raise TypeError("TensorData needs dtype='int64' or dtype='float32'; it is not guessed from the values")
        numpy_dtype = _numpy_dtype(dtype)
        values = np.empty(0, dtype=numpy_dtype) if data is None else np.array(data, dtype=numpy_dtype, order="C")
        shape = None if shape is None else [int(size) for size in shape]
        crow = None if sparse_crow_indices is None else [int(index) for index in sparse_crow_indices]
        col = None if sparse_col_indices is None else [int(index) for index in sparse_col_indices]
        if crow is not None or col is not None:
            _check_csr(values, shape, crow, col)
        elif shape is not None and list(values.shape) != shape:
            try:
                values = values.reshape(shape)
            except ValueError as err:
                raise InvalidRequestError(f"TensorData: {values.size} values do not fill the shape {shape}") from err
            shape = list(values.shape)
        object.__setattr__(self, "dtype", dtype)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "sparse_crow_indices", crow)
        object.__setattr__(self, "sparse_col_indices", col)
        object.__setattr__(self, "_numpy", values)

    @property
    def data(self) -> list[int] | list[float]:
        """All values in row-major order; of a CSR tensor the listed cells only."""
        flat: list[int] | list[float] = self._numpy.ravel().tolist()
        return flat

    @classmethod
    def from_numpy(cls, array: npt.NDArray[Any]) -> TensorData:
        """Floats of any width become float32, signed integers int64. Raises: InvalidRequestError for bool, unsigned and the rest."""
        return cls(data=array, dtype=_tensor_dtype(array.dtype, "numpy array"), shape=list(array.shape))

    @classmethod
    def from_torch(cls, tensor: torch.Tensor) -> TensorData:
        """bfloat16, half and double become float32, integers int64.

        Raises: RuntimeError if the tensor requires grad (the graph would be cut without a word); InvalidRequestError for bool.
        """
        return cls.from_numpy(_torch_to_numpy(tensor))

    @classmethod
    def from_torch_sparse(cls, tensor: torch.Tensor, pad_value: int = 0) -> TensorData:
        """CSR without the cells equal to pad_value if the tensor is 2-D and that is smaller, otherwise dense.

        Smaller means (rows + 1) + 2 x listed cells < rows x cols.
        """
        pad_value = _check_pad_value(pad_value)
        dense = _torch_to_numpy(tensor)
        if dense.ndim != 2:
            return cls.from_numpy(dense)
        listed = dense != pad_value
        num_listed = int(listed.sum())
        if dense.shape[0] + 1 + 2 * num_listed >= dense.size:
            return cls.from_numpy(dense)
        return cls(
            data=dense[listed],
            dtype=_tensor_dtype(dense.dtype, "torch tensor"),
            shape=list(dense.shape),
            sparse_crow_indices=[0, *np.cumsum(listed.sum(axis=1)).tolist()],
            sparse_col_indices=np.nonzero(listed)[1].tolist(),
        )

    def to_numpy(self, pad_value: int = 0) -> npt.NDArray[Any]:
        """A dense, writable copy; cells that a CSR tensor does not list hold pad_value."""
        if self.sparse_crow_indices is None or self.sparse_col_indices is None or self.shape is None:
            return self._numpy.copy()
        dense = np.full(self.shape, _check_pad_value(pad_value), dtype=self._numpy.dtype)
        rows = np.repeat(np.arange(self.shape[0]), np.diff(self.sparse_crow_indices))
        dense[rows, self.sparse_col_indices] = self._numpy
        return dense

    def to_torch(self, pad_value: int = 0) -> torch.Tensor:
        """A dense, writable CPU tensor of its own memory; cells that a CSR tensor does not list hold pad_value."""
        import torch

        return torch.from_numpy(self.to_numpy(pad_value))

    def tolist(self, pad_value: int = 0) -> list[Any]:
        nested: list[Any] = self.to_numpy(pad_value).tolist()
        return nested


@runtime_checkable
class TensorLike(Protocol):
    """The structure of the official SDK's TensorData."""

    @property
    def data(self) -> Any: ...
    @property
    def dtype(self) -> Any: ...
    @property
    def shape(self) -> Any: ...
    def to_numpy(self) -> Any: ...


@runtime_checkable
class CsrLike(Protocol):
    @property
    def sparse_crow_indices(self) -> Any: ...
    @property
    def sparse_col_indices(self) -> Any: ...


def is_tensor_like(value: object) -> TypeGuard[TensorLike]:
    # numpy and torch arrays have data, dtype and shape too, but their dtype is not a string
    return isinstance(value, TensorLike) and value.dtype in ("int64", "float32") and isinstance(value.dtype, str)


def as_tensor_data(value: TensorData | TensorLike) -> TensorData:
    """Ours, unchanged, or ours made from the official SDK's by structure."""
    if isinstance(value, TensorData):
        return value
    if isinstance(value, CsrLike):
        return TensorData(value.data, value.dtype, value.shape, value.sparse_crow_indices, value.sparse_col_indices)
    return TensorData(value.data, value.dtype, value.shape)


def _numpy_dtype(dtype: str) -> type[np.int64] | type[np.float32]:
    if dtype == "int64":
        return np.int64
    if dtype == "float32":
        return np.float32
    raise InvalidRequestError(f"TensorData: dtype {dtype!r} is unknown; it must be 'int64' or 'float32'")


def _tensor_dtype(dtype: np.dtype[Any], what: str) -> TensorDtype:
    if dtype.kind == "f":
        return "float32"
    if dtype.kind == "i":
        return "int64"
    raise InvalidRequestError(
        f"a {what} of dtype {dtype} cannot become TensorData; convert it to a signed integer or float dtype first "
        "(for a mask: .astype('float32'))"
    )


def _torch_to_numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    if tensor.requires_grad:
        raise RuntimeError(
            "a torch tensor that requires grad cannot become TensorData: its gradient would be lost; pass tensor.detach(), "
            "or use forward_backward_custom for a loss with a gradient of your own"
        )
    tensor = tensor.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":  # numpy has no bfloat16
        tensor = tensor.float()
    array: npt.NDArray[Any] = tensor.contiguous().numpy()
    return array


def _check_pad_value(pad_value: object) -> int:
    if isinstance(pad_value, bool) or not isinstance(pad_value, (int, np.integer)):
        raise TypeError(f"pad_value must be an integer, got {type(pad_value).__name__}: {pad_value!r}")
    return int(pad_value)


def _check_csr(values: npt.NDArray[Any], shape: list[int] | None, crow: list[int] | None, col: list[int] | None) -> None:
    if crow is None or col is None:
        raise InvalidRequestError("TensorData: sparse_crow_indices and sparse_col_indices come together; one of them is None")
    if shape is None or len(shape) != 2:
        raise InvalidRequestError(f"TensorData: a sparse tensor needs shape [rows, cols], got {shape}")
    rows, cols = shape
    offsets, columns = np.asarray(crow, dtype=np.int64), np.asarray(col, dtype=np.int64)
    if len(offsets) != rows + 1 or offsets[0] != 0 or (np.diff(offsets) < 0).any():
        raise InvalidRequestError(f"TensorData: sparse_crow_indices of {rows} rows need {rows + 1} offsets rising from 0, got {crow[:8]}")
    if not len(columns) == values.size == offsets[-1] or values.ndim != 1:
        raise InvalidRequestError(
            f"TensorData: sparse_crow_indices ends at {crow[-1]}, but there are {values.size} values and {len(col)} column indices; "
            "all three must agree"
        )
    if ((columns < 0) | (columns >= cols)).any():
        raise InvalidRequestError(f"TensorData: a column index lies outside 0..{cols - 1}")
    row_of = np.repeat(np.arange(rows), np.diff(offsets))
    falling = (np.diff(columns) <= 0) & (row_of[1:] == row_of[:-1])
    if falling.any():
        row = int(row_of[1:][falling][0])
        indices = col[crow[row] : crow[row + 1]]
        raise InvalidRequestError(f"TensorData: column indices of row {row} must rise without repeats, got {indices[:8]}")
