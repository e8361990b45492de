"""Types that annotations share, and the normalization of small arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

# An array of a supported framework: numpy.ndarray, torch.Tensor or cupy.ndarray. Results have the type of the first
# argument.
Array: TypeAlias = Any
Scheme: TypeAlias = Literal["absmax", "zeropoint"]
Granularity: TypeAlias = Literal["tensor", "row", "vector"]
Outliers: TypeAlias = Literal["columns", "rows", "static", "none"]
ProductPath: TypeAlias = Literal["auto", "int8", "weight_only"]
Path: TypeAlias = ProductPath
Columns: TypeAlias = Array | Sequence[int]


def dtype_name(dtype: Any) -> Any:
    """The name of a dtype of any framework: ``torch.float16``, ``numpy.float16`` and "float16" give "float16".

    What has no such name is returned as it is, for the core to refuse.
    """
    if dtype is None:
        return "float32"
    if isinstance(dtype, str):
        return dtype
    if type(dtype).__module__ == "torch":
        return str(dtype).removeprefix("torch.")
    try:
        return np.dtype(dtype).name
    except TypeError:
        return dtype


def rotated_size(k: int, rotation: int) -> int:
    """Codes in a row of k features: with `rotation`, k up to whole blocks."""
    return k if rotation == 0 else -(-k // rotation) * rotation


def columns_of(array: Array) -> int:
    """The extent of the last dimension; 0 for what has none (the core will refuse it)."""
    shape: tuple[int, ...] = getattr(array, "shape", ())
    return int(shape[-1]) if shape else 0


def column_indices(function: str, name: str, columns: Columns, count: int) -> np.ndarray:
    """Columns as an ascending int32 array without repetitions.

    Raises TypeError where they are no integers, ValueError where they are not of rank 1 or not in [0, count).
    """
    if hasattr(columns, "detach"):  # torch
        columns = columns.detach().cpu()
    elif type(columns).__module__ == "cupy":
        columns = columns.get()  # type: ignore[union-attr]
    array = np.asarray(columns)
    if array.ndim != 1:
        raise ValueError(f"{function}: {name}: expected an array of rank 1, got rank {array.ndim}")
    if array.size == 0:
        return np.empty(0, np.int32)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{function}: {name}: expected integers, got {array.dtype}")
    if array.min() < 0 or array.max() >= count:
        wrong = array.min() if array.min() < 0 else array.max()
        raise ValueError(f"{function}: {name}: expected columns in [0, {count}), got {wrong}")
    return np.unique(array).astype(np.int32)


def beside(array: Array, indices: np.ndarray) -> Array:
    """The indices as an array of the framework and on the device of `array`."""
    if hasattr(array, "detach"):  # torch
        import torch

        return torch.from_numpy(indices).to(array.device)
    if type(array).__module__ == "cupy":
        import cupy

        with array.device:
            return cupy.asarray(indices)
    return indices


def take_columns(weight: Array, indices: np.ndarray) -> tuple[Array, Array]:
    """`beside` of the indices, and a contiguous copy of those columns."""
    columns = beside(weight, indices)
    if hasattr(weight, "detach"):  # torch: outside autograd
        return columns, weight.detach().index_select(1, columns).contiguous()
    return columns, weight[:, columns].copy(order="C")
