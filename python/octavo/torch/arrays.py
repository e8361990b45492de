"""The arrays of an int8 weight as PyTorch tensors, and the two orders of its codes.

In CPU memory codes are packed, in the order of `octavo.Int8Weight.packed`; on other devices they are ``[n, k]``. Rank
tells them apart: packed codes have rank 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from octavo import _core
from octavo._text import unexpected
from octavo._types import rotated_size
from octavo.options import Options
from octavo.weight import ARRAYS as NAMES
from octavo.weight import Int8Weight


def has_memory(tensor: Tensor) -> bool:
    """Whether the core can read a tensor: no fake one, none on the meta device, no wrapper."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type != "meta"


def pack(codes: Tensor) -> Tensor:
    """Codes in the order of their device: ``[n, k]`` ones in CPU memory are packed, others stay as they are."""
    if codes.dim() == 4 or codes.device.type != "cpu" or not has_memory(codes):
        return codes
    return _core.pack(codes.detach())  # type: ignore[no-any-return]


@dataclass(eq=False)
class Arrays:
    """The arrays of a weight ``[n, k]``, as in `octavo.Int8Weight`. Tensors that share memory share one of these."""

    codes: Tensor
    scale: Tensor
    code_sums: Tensor
    zeropoint: Tensor | None
    outlier_columns: Tensor | None
    outlier_weight: Tensor | None
    shape: tuple[int, int]
    options: Options
    is_part: bool = False  # a copy of some rows: whoever writes to it means the whole weight
    is_new: bool = False  # zeros to be filled by rows: a copy of some of these writes to the whole, too
    whole: tuple[Arrays, slice] | None = None  # of such rows

    @classmethod
    def of(cls, weight: Int8Weight, options: Options) -> Arrays:
        """Those of a weight; they share its memory."""
        codes, *others = weight._arrays().values()
        return cls.named([pack(codes), *others], weight.shape, options)

    @classmethod
    def named(cls, arrays: Iterable[Any], shape: tuple[int, int], options: Options, **more: Any) -> Arrays:
        """Of arrays in the order of `NAMES`."""
        return cls(**dict(zip(NAMES, arrays, strict=True)), shape=shape, options=options, **more)

    @property
    def width(self) -> int:
        """Codes in a row: k, or with rotation k up to whole blocks."""
        return rotated_size(self.shape[1], self.options.rotation)

    def by_row(self) -> Tensor:
        """The codes ``[n, width]``; themselves where they are not packed."""
        n, k = self.shape[0], self.width
        if self.codes.dim() != 4:
            return self.codes
        if self.codes.device.type == "cpu" and has_memory(self.codes):
            return _core.unpack(self.codes.detach(), n, k)  # type: ignore[no-any-return]
        blocks, groups, rows, depth = self.codes.shape
        return self.codes.permute(0, 2, 1, 3).reshape(blocks * rows, groups * depth)[:n, :k].contiguous()

    def sums(self) -> Tensor:
        """The sums of the codes of each output feature, int32 ``[n]``, computed anew."""
        return self.by_row().sum(1, dtype=torch.int32)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """``(codes + zeropoint) * scale`` in float32, rotated back, kept columns put in, rounded once to `dtype`."""
        weight, rotation = self.by_row().to(torch.float32), self.options.rotation
        weight = rotated(weight, rotation)
        if self.zeropoint is not None:  # rotated back it is in the first column of each block alone
            weight[:, :: rotation or 1] += self.zeropoint[:, None] * math.sqrt(rotation or 1)
        weight = weight[:, : self.shape[1]]
        weight *= self.scale[:, None]
        if self.outlier_columns is not None and self.outlier_weight is not None:
            weight[:, self.outlier_columns.long()] = self.outlier_weight.to(torch.float32)
        return weight.to(dtype)

    @cached_property
    def int8_weight(self) -> Int8Weight:
        """The weight as `octavo.linear` takes it; it reads the same memory."""
        return Int8Weight(**dict(zip(NAMES, self.tensors(), strict=True)), **self.options.of_weight, shape=self.shape)

    @cached_property
    def product(self) -> Callable[[Tensor, Tensor | None], Tensor | None]:
        """``product(x, bias)`` is `octavo.linear` where PyTorch wants nothing of it but its result; else None."""
        if not has_memory(self.codes):
            return lambda x, bias: None
        return _core.plain_linear(self.int8_weight._native, self.options._native)

    @cached_property
    def text(self) -> str:
        """The width k and the options, as the operations of ``torch.ops.octavo`` take them."""
        return f"{self.shape[1]} {self.options.text}"

    def forget(self) -> None:
        """Drop what was made of arrays and options that have been replaced."""
        for name in ("int8_weight", "product", "text"):
            vars(self).pop(name, None)

    def tensors(self) -> tuple[Any, ...]:
        """The arrays in the order of `NAMES`."""
        return tuple(getattr(self, name) for name in NAMES)

    def map(self, change: Callable[[Tensor], Tensor]) -> Arrays:
        """The same weight with every array changed."""
        arrays = (None if array is None else change(array) for array in self.tensors())
        return Arrays.named(arrays, self.shape, self.options)

    def to(self, device: torch.device, non_blocking: bool = False) -> Arrays:
        """The weight on a device, its codes in the order of that; arrays that are there already are shared."""
        if device.type != "cpu" and self.codes.dim() == 4:
            return replace(self, codes=self.by_row()).to(device, non_blocking)
        moved = self.map(lambda array: array.to(device, non_blocking=non_blocking))
        moved.codes = pack(moved.codes)
        return moved

    def rows(self, part: slice) -> Arrays:
        """A copy of some output features."""
        codes = self.by_row()[part].clone()
        of_rows = ["code_sums", "outlier_weight"]
        if self.options.granularity == "vector":  # otherwise one scale is for all
            of_rows += ["scale", "zeropoint"]
        others = (
            array[part].clone() if array is not None and name in of_rows else array
            for name, array in zip(NAMES[1:], self.tensors()[1:], strict=True)
        )
        arrays = [pack(codes), *others]
        shape = (codes.shape[0], self.shape[1])
        whole = (self, part) if self.is_new else None
        return Arrays.named(arrays, shape, self.options, is_part=not self.is_new, whole=whole)

    @staticmethod
    def together(parts: list[Arrays]) -> Arrays | None:
        """Weights one above the other; None where they were not made alike, with one scale for each output feature."""
        first, columns = parts[0], [own.outlier_columns for own in parts]
        alike = {(own.options, own.shape[1], own.outlier_columns is None) for own in parts}
        if len(alike) > 1 or first.options.granularity != "vector":
            return None
        if any(own is not None and not torch.equal(own, columns[0]) for own in columns):  # type: ignore[arg-type]
            return None
        codes = torch.cat([own.by_row() for own in parts])
        each: Any = zip(*(own.tensors()[1:] for own in parts), strict=True)
        scale, sums, zeropoint, _, kept = (None if own[0] is None else torch.cat(own) for own in each)
        shape = (codes.shape[0], first.shape[1])
        whole = (pack(codes), scale, sums, zeropoint, first.outlier_columns, kept)
        return Arrays.named(whole, shape, first.options)

    def take(self, other: Arrays) -> None:
        """Become `other`, for all tensors that share these arrays; where that fits, in the same memory."""
        self.check_writable()
        other = other.to(self.scale.device)
        for name in NAMES:
            own, new = getattr(self, name), getattr(other, name)
            if own is not None and new is not None and own.shape == new.shape and own.dtype == new.dtype:
                own.copy_(new)
            else:
                setattr(self, name, None if new is None else new.clone())
        self.options = other.options
        self.forget()
        if self.whole is not None:
            whole, rows = self.whole
            whole._put(rows, other)

    def _put(self, rows: slice, other: Arrays) -> None:
        """Become `other` in some output features."""
        codes = self.by_row().clone()
        codes[rows] = other.by_row()
        self.codes.copy_(pack(codes))
        for own, new in zip(self.tensors()[1:], other.tensors()[1:], strict=True):
            if own is not None and own is not self.outlier_columns:
                own[rows if own.shape[0] == self.shape[0] else slice(None)] = new
        self.forget()

    def check_writable(self) -> None:
        """Raise RuntimeError for a copy of some rows, which the weight would not see change."""
        if self.is_part:
            part = "some of its rows, which are a copy: dequantize it, change that, and copy it back"
            raise unexpected("Int8Tensor", "the whole weight to be written to", part, RuntimeError)


def rotated(x: Tensor, rotation: int) -> Tensor:
    """Blocks of `rotation` features times the Hadamard matrix over its root; the last block filled up with zeros."""
    if not rotation:
        return x
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % rotation)).unflatten(-1, (-1, rotation))
    distance = 1
    while distance < rotation:
        u, v = x.unflatten(-1, (-1, 2, distance)).unbind(-2)
        x = torch.stack((u + v, u - v), -2).flatten(-3)
        distance *= 2
    return (x / math.sqrt(rotation)).flatten(-2)
