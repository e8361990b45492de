"""Types that annotations share, and the normalization of small arguments."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal, TypeAlias

import numpy as np

from octavo import _core

# An array of any framework: numpy.ndarray, torch.Tensor, cupy.ndarray, or whatever has `__dlpack__`.
Array: TypeAlias = Any
Scheme: TypeAlias = Literal["absmax", "zeropoint"]
Granularity: TypeAlias = Literal["tensor", "row", "vector"]
Outliers: TypeAlias = Literal["columns", "rows", "static", "none"]
ProductPath: TypeAlias = Literal["auto", "int8", "weight_only"]
Columns: TypeAlias = Array | Sequence[int]


_MOST_COLUMNS = 1 << 24  # of a weight


def dtype_name(dtype: Any) -> Any:
    """The name of a dtype of any framework: ``torch.float16``, ``numpy.float16`` and "float16" give "float16".

    What has no such name is returned as it is, for the core to refuse.
    """
    if dtype is None:
        return "float32"
    if isinstance(dtype, str):
        return dtype
    try:
        return np.dtype(dtype).name
    except Exception:  # of whatever kind an object that is no dtype raises
        return str(dtype).rpartition(".")[2] if type(dtype).__name__.lower() == "dtype" else dtype


def rotated_size(k: int, rotation: int) -> int:
    """Codes in a row of k features: with `rotation`, k up to whole blocks."""
    return k if rotation == 0 else -(-k // rotation) * rotation


def shape_of(array: Array) -> tuple[int, ...]:
    """The extents, also of what has nothing but ``__dlpack__``; () of what is no array, which the core refuses."""
    shape = getattr(array, "shape", None)
    if shape is None:
        with suppress(TypeError, ValueError):
            shape = _core.shape_of(array)
    return tuple(map(int, shape or ()))


def columns_of(array: Array) -> int:
    """The extent of the last dimension; 0 where there is none."""
    return (shape_of(array) or (0,))[-1]


def column_indices(function: str, name: str, columns: Columns, count: int) -> np.ndarray:
    """Columns as an ascending int32 array without repetitions.

    Raises TypeError where they are no integers, ValueError where they are not of rank 1 or not in [0, count).
    """
    try:
        array = np.asarray(columns) if isinstance(columns, (Sequence, np.ndarray)) else on_host(columns)
    except (TypeError, ValueError, BufferError, RuntimeError) as error:
        raise TypeError(f"{function}: {name}: expected integers, got {type(columns).__name__} ({error})") from None
    if array.ndim != 1:
        raise ValueError(f"{function}: {name}: expected an array of rank 1, got rank {array.ndim}")
    if array.size == 0:
        return np.empty(0, np.int32)
    if array.size > _MOST_COLUMNS:
        raise ValueError(f"{function}: {name}: expected at most {_MOST_COLUMNS} columns, got {array.size}")
    if array.dtype.kind not in "iu":
        raise TypeError(f"{function}: {name}: expected integers, got {array.dtype}")
    if array.min() < 0 or array.max() >= count:
        wrong = array.min() if array.min() < 0 else array.max()
        raise ValueError(f"{function}: {name}: expected columns in [0, {count}), got {wrong}")
    return np.unique(array).astype(np.int32)


def _is_torch(array: Array) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def on_host(array: Array) -> np.ndarray:
    """A NumPy array of the values of an array of any framework."""
    if _is_torch(array):
        array = array.detach().cpu()
    elif type(array).__module__ == "cupy":
        array = array.get()
    return np.from_dlpack(array) if hasattr(array, "__dlpack__") else np.asarray(array)


def to_framework_of(array: Array, indices: np.ndarray) -> Array:
    """The indices as an array on the device of `array`: of its framework if that is PyTorch or CuPy, else of NumPy."""
    if _is_torch(array):
        import torch

        return torch.from_numpy(indices).to(array.device)
    if type(array).__module__ == "cupy":
        import cupy

        with array.device:
            return cupy.asarray(indices)
    return indices


def take_columns(weight: Array, indices: np.ndarray) -> tuple[Array, Array]:
    """The indices in the framework of `weight`, and a contiguous copy of those columns."""
    columns = to_framework_of(weight, indices)
    if _is_torch(weight):  # outside autograd
        return columns, weight.detach().index_select(1, columns).contiguous()
    if type(weight).__module__ == "cupy":
        return columns, weight[:, columns].copy(order="C")
    return _core.take_columns(weight, columns)
