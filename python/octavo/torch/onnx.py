"""The layer as a graph of ONNX's standard operators: what ``torch.onnx.export(..., dynamo=True)`` sees of it.

The equations are those of `octavo.linear`; the int8 product is ``MatMulInteger``. Outputs agree with octavo's within
the rounding of float32 sums.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor

from octavo._types import rotated_size
from octavo.options import Options
from octavo.torch.arrays import Arrays


def is_exporting() -> bool:
    """Whether PyTorch's ONNX exporter is at work (not the older one, which traces TorchScript)."""
    flags = sys.modules.get("torch.onnx._internal.exporter._flags")  # loaded with the exporter
    return flags is not None and bool(flags._is_onnx_exporting)


def linear(x: Tensor, arrays: Arrays, bias: Tensor | None) -> Tensor:
    """``octavo.linear(x, ...)`` of standard operators, ``[..., k]`` -> ``[..., n]``."""
    options, k = arrays.options, arrays.shape[1]
    codes, value = arrays.by_row(), x.to(torch.float32)
    if options.path == "weight_only":
        y = _rotated(value, options.rotation) @ _dequantized(arrays, codes).t()
        return (y if bias is None else y + bias).to(x.dtype)
    outlying = torch.zeros(k, dtype=torch.bool)
    if options.outliers == "static" and arrays.outlier_columns is not None:
        outlying = outlying.index_fill(0, arrays.outlier_columns.long(), True)
    elif options.outliers in ("columns", "rows"):
        outlying = _outliers(value, options)
    y = _int8_product(value, outlying, arrays, codes)
    if options.outliers != "none":
        y = y + _outlier_product(torch.where(outlying, value, 0.0), outlying, arrays, codes)
    return (y if bias is None else y + bias).to(x.dtype)


def _int8_product(value: Tensor, outlying: Tensor, arrays: Arrays, codes: Tensor) -> Tensor:
    """The product of what is not outlying, quantized."""
    options = arrays.options
    inside = _rotated(torch.where(outlying, 0.0, value), options.rotation)
    dims = list(range(value.dim())) if options.granularity == "tensor" else [-1]
    if options.scheme == "absmax":
        largest = inside.abs().amax(dims, keepdim=True)
        divisor = torch.where(largest > 0, largest, 1.0)
        scaled = inside * (127 / divisor) if options.rotation else inside * 127 / divisor
        quantized = torch.round(scaled).clamp(-127, 127).to(torch.int8)
        product: Tensor = torch.onnx.ops.symbolic(
            "MatMulInteger", (quantized, codes.t()), dtype=torch.int32, shape=(*value.shape[:-1], codes.shape[0])
        )
        # One scale after the other: the product of both is what ONNX Runtime (1.32) fuses to another operator, which is
        # wrong for an int8 X with one scale.
        return product.to(torch.float32) * (largest / 127) * arrays.scale
    left_out = torch.zeros_like(inside, dtype=torch.bool) if options.rotation else outlying
    low = torch.where(left_out, torch.inf, inside).amin(dims, keepdim=True)
    high = torch.where(left_out, -torch.inf, inside).amax(dims, keepdim=True)
    inverse = torch.where(high > low, 254 / (high - low), 1.0)
    zeropoint = torch.round(inverse * low) + 127
    rounded = (torch.round(inverse * inside) - zeropoint).clamp(-127, 127) + zeropoint
    rounded = torch.where(high > low, rounded / inverse, low)
    return torch.where(left_out, 0.0, rounded) @ _dequantized(arrays, codes).t()


def _outlier_product(apart: Tensor, outlying: Tensor, arrays: Arrays, codes: Tensor) -> Tensor:
    """The product of X where it is outlying, zero elsewhere, with kept columns or else dequantized ones."""
    columns, kept, rotation = arrays.outlier_columns, arrays.outlier_weight, arrays.options.rotation
    if columns is None or kept is None or columns.shape[0] == 0:
        columns = kept = None
    if rotation:  # a column of W is spread over its block
        if columns is None or kept is None:
            return _rotated(apart, rotation) @ _dequantized(arrays, codes).t()
        others = _rotated(apart.index_fill(-1, columns.long(), 0.0), rotation) @ _dequantized(arrays, codes).t()
        return others + apart.index_select(-1, columns.long()) @ kept.to(torch.float32).t()
    k = arrays.shape[1]
    chosen = outlying.reshape(-1, k).any(0).nonzero().flatten()
    values = _dequantized(arrays, codes.index_select(1, chosen))
    if columns is not None and kept is not None:
        places = torch.full((k,), -1).scatter(0, columns.long(), torch.arange(columns.shape[0]))
        place = places.index_select(0, chosen)
        values = torch.where(place >= 0, kept.to(torch.float32).index_select(1, place.clamp(min=0)), values)
    return apart.index_select(-1, chosen) @ values.t()


def _dequantized(arrays: Arrays, codes: Tensor) -> Tensor:
    """Codes of some columns as float32 values; those of a rotated weight are not rotated back."""
    values = codes.to(torch.float32)
    if arrays.zeropoint is not None:
        values = values + arrays.zeropoint[:, None]
    return values * arrays.scale[:, None]


def _rotated(x: Tensor, rotation: int) -> Tensor:
    """Blocks of `rotation` features times the Hadamard matrix over its root; the last block filled up with zeros."""
    if not rotation:
        return x
    k = x.shape[-1]
    x = torch.nn.functional.pad(x, (0, rotated_size(k, rotation) - k)).unflatten(-1, (-1, rotation))
    distance = 1
    while distance < rotation:
        u, v = x.unflatten(-1, (-1, 2, distance)).unbind(-2)
        x = torch.stack((u + v, u - v), -2).flatten(-3)
        distance *= 2
    return (x / math.sqrt(rotation)).flatten(-2)


# --- which elements are outliers: `octavo.find_outliers` --------------------------------------------------------------


def _outliers(value: Tensor, options: Options) -> Tensor:
    """Of "columns", bool ``[k]``; of "rows", bool ``[..., k]``, every row as a call of its own."""
    largest = value.abs()
    largest = torch.where(largest.isnan(), torch.inf, largest)
    rows: Any = 1
    if options.outliers == "columns":
        largest = largest.reshape(-1, value.shape[-1])
        rows = torch.ones_like(largest[:, 0]).sum()
        largest = largest.amax(0)
    if options.relative is None:
        outlying = ~(largest < options.threshold)
    else:
        outlying = (largest > 0) & ~(largest < options.relative * _factor(rows) * _median(largest))
    if options.cap is None:
        return outlying
    most = math.floor(options.cap * value.shape[-1])
    stays = largest.isinf()
    if most:
        places = torch.topk(torch.where(outlying, largest, -1.0), most).indices
        stays = stays | torch.zeros_like(stays).scatter(-1, places, True)
    return outlying & stays


def _factor(rows: Any) -> Any:
    """f(m) = sqrt(ln 1024 / ln 2m) for m < 512, else 1."""
    if not isinstance(rows, Tensor):  # one
        return math.sqrt(math.log(1024) / math.log(2))
    return torch.sqrt(math.log(1024) / torch.log(2 * rows.to(torch.float64))).clamp(min=1).to(torch.float32)


def _median(largest: Tensor) -> Tensor:
    """The lower median of what is above 0, each cut to its upper 16 bits, ``[..., 1]``."""
    rounded = largest.to(torch.bfloat16).to(torch.float32)
    below = (rounded * (1 - 2**-8)).to(torch.bfloat16).to(torch.float32)  # the next smaller bfloat16
    ascending = torch.sort(torch.where(rounded > largest, below, rounded)).values
    zeros = (largest == 0).sum(-1, keepdim=True)
    k = largest.shape[-1]
    place = zeros + torch.div(k - zeros - 1, 2, rounding_mode="floor")
    return ascending.gather(-1, place.clamp(max=k - 1))
