"""The layer as a graph of ONNX's standard operators: what ``torch.onnx.export(..., dynamo=True)`` sees of it.

The equations are those of `octavo.linear`; the int8 product is ``MatMulInteger``. Outputs agree with octavo's within
the rounding of float32 sums.
"""

import math
import sys
from typing import Any

import torch
from torch import Tensor

from octavo.options import Options
from octavo.torch.arrays import Arrays, rotated


def is_exporting() -> bool:
    """Whether PyTorch's ONNX exporter is at work (not the older one, which traces TorchScript)."""
    flags = sys.modules.get("torch.onnx._internal.exporter._flags")  # loaded with the exporter
    return flags is not None and bool(flags._is_onnx_exporting)


def linear(x: Tensor, arrays: Arrays, bias: Tensor | None) -> Tensor:
    """``octavo.linear(x, ...)`` of standard operators, ``[..., k]`` -> ``[..., n]``."""
    options, k = arrays.options, arrays.shape[1]
    codes, value = arrays.by_row(), x.to(torch.float32)
    if options.path == "weight_only":
        y = rotated(value, options.rotation) @ _dequantized(arrays, codes).t()
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
    inside = rotated(torch.where(outlying, 0.0, value), options.rotation)
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
    none = torch.zeros(0, dtype=torch.int64)
    columns = none if arrays.outlier_columns is None else arrays.outlier_columns.long()
    kept = torch.zeros(0) if arrays.outlier_weight is None else arrays.outlier_weight.to(torch.float32)
    if arrays.options.rotation:  # a column of W is spread over its block
        others = apart.index_fill(-1, columns, 0.0) if len(columns) else apart
        product = rotated(others, arrays.options.rotation) @ _dequantized(arrays, codes).t()
        return product + apart.index_select(-1, columns) @ kept.t() if len(columns) else product
    k = arrays.shape[1]
    chosen = outlying.reshape(-1, k).any(0).nonzero().flatten()
    values = _dequantized(arrays, codes.index_select(1, chosen))
    if len(columns):
        place = torch.full((k,), -1).scatter(0, columns, torch.arange(len(columns))).index_select(0, chosen)
        values = torch.where(place >= 0, kept.index_select(1, place.clamp(min=0)), values)
    return apart.index_select(-1, chosen) @ values.t()


def _dequantized(arrays: Arrays, codes: Tensor) -> Tensor:
    """Codes of some columns as float32 values; those of a rotated weight are not rotated back."""
    values = codes.to(torch.float32)
    if arrays.zeropoint is not None:
        values = values + arrays.zeropoint[:, None]
    return values * arrays.scale[:, None]


# --- which elements are outliers: `octavo.find_outliers` --------------------------------------------------------------


def _outliers(value: Tensor, options: Options) -> Tensor:
    """Of "columns", bool ``[k]``; of "rows", bool ``[..., k]``, every row as a call of its own."""
    largest = value.abs()
    largest = torch.where(largest.isnan(), torch.inf, largest)
    factor: Any = math.sqrt(math.log(1024) / math.log(2))  # f(1), of f(m) = sqrt(ln 1024 / ln 2m) for m < 512, else 1
    if options.outliers == "columns":
        largest = largest.reshape(-1, value.shape[-1])
        rows = torch.ones_like(largest[:, 0]).sum().to(torch.float64)
        factor = torch.sqrt(math.log(1024) / torch.log(2 * rows)).clamp(min=1).to(torch.float32)
        largest = largest.amax(0)
    if options.relative is None:
        outlying = ~(largest < options.threshold)
    else:
        outlying = (largest > 0) & ~(largest < options.relative * factor * _median(largest))
    if options.cap is None:
        return outlying
    most = math.floor(options.cap * value.shape[-1])
    stays = largest.isinf()
    if most:
        places = torch.topk(torch.where(outlying, largest, -1.0), most).indices
        stays = stays | torch.zeros_like(stays).scatter(-1, places, True)
    return outlying & stays


def _median(largest: Tensor) -> Tensor:
    """The lower median of what is above 0, each cut to its upper 16 bits, ``[..., 1]``."""
    rounded = largest.to(torch.bfloat16).to(torch.float32)
    below = (rounded * (1 - 2**-8)).to(torch.bfloat16).to(torch.float32)  # the next smaller bfloat16
    ascending = torch.sort(torch.where(rounded > largest, below, rounded)).values
    zeros = (largest == 0).sum(-1, keepdim=True)
    k = largest.shape[-1]
    place = zeros + torch.div(k - zeros - 1, 2, rounding_mode="floor")
    return ascending.gather(-1, place.clamp(max=k - 1))
