"""FSDP2 of int8 weights: ``fully_shard`` keeps of each the rows of a rank, in int8, and gathers it for a call.

A shard is an Int8Tensor in a DTensor, so that state dicts need no collective. What is here answers what
``torch.distributed.fsdp`` asks a tensor subclass for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.utils._pytree import tree_map

from octavo._text import unexpected
from octavo.torch.arrays import Arrays, pack
from octavo.torch.tensor import _OPERATIONS, Int8Tensor, _alias
from octavo.weight import Int8Weight

aten: Any = torch.ops.aten

# What belongs to a row of the weight, beside its codes, where there is such.
_OF_ROWS = ("scale", "zeropoint", "outlier_weight")


def _new(x: Int8Tensor, size: Any, **_: Any) -> Any:
    """``new_zeros``, ``new_empty``: a weight of as many columns, and of so many rows."""
    arrays = x._arrays
    if x._transposed or len(size) != 2 or size[1] != arrays.shape[1]:
        return NotImplemented
    rows = size[0]

    def zeros(name: str) -> Tensor | None:
        like: Tensor | None = getattr(arrays, name)
        return like if like is None or like.shape[0] != arrays.shape[0] else like.new_zeros((rows, *like.shape[1:]))

    codes = pack(torch.zeros(rows, arrays.width, dtype=torch.int8, device=arrays.codes.device))
    sums = arrays.code_sums.new_zeros(rows)
    scale, zeropoint, kept = (zeros(name) for name in _OF_ROWS)
    assert scale is not None
    shape = (rows, size[1])
    made = Arrays(codes, scale, sums, zeropoint, arrays.outlier_columns, kept, shape, arrays.options, is_new=True)
    return Int8Tensor(made, x.dtype)


class _Flat(Tensor):
    """``view(-1)`` of an int8 weight, which FSDP keeps and never reads; whoever reads it gets dequantized values."""

    _weight: Int8Tensor

    @staticmethod
    def __new__(cls, weight: Int8Tensor) -> _Flat:
        flat = Tensor._make_wrapper_subclass(cls, (weight.numel(),), dtype=weight.dtype, device=weight.device)
        flat._weight = weight
        return flat

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def plain(value: Any) -> Any:
            return value._weight.dequantize().reshape(-1) if isinstance(value, _Flat) else value

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


def _view(x: Int8Tensor, size: Any, stride: Any = None, offset: int | None = None) -> Any:
    if (tuple(size), tuple(stride or x.stride()), offset or 0) == (tuple(x.shape), x.stride(), 0):
        return _alias(x)
    return _Flat(x) if list(size) == [-1] and stride is None else NotImplemented


_OPERATIONS[aten.new_zeros.default] = _OPERATIONS[aten.new_empty.default] = _new
_OPERATIONS[aten.view.default] = _OPERATIONS[aten.as_strided.default] = _view


def _pre_all_gather(
    self: Int8Tensor, mesh: Any, outer_size: torch.Size, outer_stride: Any, module: Any, mp_policy: Any
) -> tuple[tuple[Tensor, ...], Any]:
    """What the ranks send each other: codes ``[rows, k]``, and the bytes of what else belongs to a row."""
    arrays = self._arrays
    n, k = outer_size
    rows = -(-n // mesh.size())  # of the first rank; what others lack of them is zeros
    of_rows = [_per_row(arrays, name) for name in _OF_ROWS]
    others = [part.contiguous().view(torch.int8) for part in of_rows if part is not None]
    tail = torch.cat(others, 1) if others else arrays.code_sums.new_zeros((arrays.shape[0], 0), dtype=torch.int8)
    if n % mesh.size():  # then FSDP expects everything to have the shape of the codes
        if tail.shape[1] > k or arrays.width != k:
            even = f"a weight whose {n} rows {mesh.size()} ranks can share evenly, or more than {tail.shape[1]} columns"
            raise unexpected("fully_shard", f"{even}, a multiple of the rotation", f"{k}: name it in ignored_params")
        tail = torch.nn.functional.pad(tail, (0, k - tail.shape[1]))
    codes = arrays.by_row()
    padded = [torch.nn.functional.pad(part, (0, 0, 0, rows - arrays.shape[0])) for part in (codes, tail)]
    return tuple(padded), (n, k)


def _per_row(arrays: Arrays, name: str) -> Tensor | None:
    array: Tensor | None = getattr(arrays, name)
    if array is None or (name != "outlier_weight" and arrays.options.granularity != "vector"):
        return None
    return array.reshape(arrays.shape[0], -1) if array.numel() else None


def _post_all_gather(
    self: Int8Tensor, outputs: tuple[Tensor, ...], metadata: Any, param_dtype: torch.dtype, *, out: Any = None
) -> Any:
    """The whole weight, from what `_pre_all_gather` of all ranks gave."""
    (n, k), own = metadata, self._arrays
    codes = outputs[0][:n].view(n, own.width)
    # PyTorch has a single rank gather the first tensor only.
    tail = outputs[1].view(outputs[0].shape[0], -1)[:n] if len(outputs) > 1 else None
    parts: dict[str, Any] = {"outlier_columns": own.outlier_columns, **own.options.of_weight}
    start = 0
    for name in _OF_ROWS:
        mine = parts[name] = getattr(own, name)
        like = _per_row(own, name)
        if like is not None and tail is not None:
            width = like.shape[1] * like.element_size()
            values = tail[:, start : start + width].contiguous().view(mine.dtype)
            parts[name] = values.reshape(n, *mine.shape[1:])
            start += width
        elif like is not None:
            parts[name] = mine.clone()
    made = Arrays.of(Int8Weight(codes.contiguous(), **parts, shape=(n, k)), own.options)
    if out is not None:
        # The backward pass reads what the forward pass read, in the same memory, gathered anew.
        held = tuple(getattr(out, name) for name in out.__tensor_flatten__()[0])
        with _unsafe_preserve_version_counter(held):
            out._arrays.take(made)
        return None
    whole = Int8Tensor(made, param_dtype)
    return whole, [made.codes, made.code_sums, *(parts[name] for name in _OF_ROWS if _per_row(own, name) is not None)]


Int8Tensor.fsdp_pre_all_gather = _pre_all_gather  # type: ignore[attr-defined]
Int8Tensor.fsdp_post_all_gather = _post_all_gather  # type: ignore[attr-defined]
