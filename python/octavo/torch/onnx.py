"""The layer as a graph of ONNX's standard operators: what ``torch.onnx.export(..., dynamo=True)`` sees of it.

The equations are those of `octavo.linear`; the int8 product is ``MatMulInteger``. Outputs agree with octavo's within
the rounding of float32 sums.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from octavo.torch.arrays import Arrays, unpack


def is_exporting() -> bool:
    """Whether PyTorch's ONNX exporter is at work (not the older one, which traces TorchScript)."""
    flags = sys.modules.get("torch.onnx._internal.exporter._flags")  # loaded with the exporter
    return flags is not None and bool(flags._is_onnx_exporting)


def linear(x: Tensor, arrays: Arrays, bias: Tensor | None) -> Tensor:
    """``octavo.linear(x, ...)`` of standard operators, ``[..., k]`` -> ``[..., n]``.

    Raises NotImplementedError for options that this graph does not have.
    """
    options, (n, k) = arrays.options, arrays.shape
    if options.rotation or options.relative is not None or options.cap is not None:
        raise NotImplementedError(
            "torch.onnx.export: expected an octavo layer without relative, cap and rotation, got one with "
            f"relative={options.relative}, cap={options.cap}, rotation={options.rotation}"
        )
    codes, value = unpack(arrays.codes, n, k), x.to(torch.float32)
    outlying = torch.zeros(k, dtype=torch.bool)
    if options.path == "weight_only":
        y = value @ _columns(arrays, codes, None).t()
        return (y if bias is None else y + bias).to(x.dtype)
    if options.outliers == "static" and arrays.outlier_columns is not None:
        outlying = outlying.index_fill(0, arrays.outlier_columns.long(), True)
    elif options.outliers in ("columns", "rows"):
        outlying = ~(value.abs() < options.threshold)
        if options.outliers == "columns":
            outlying = outlying.reshape(-1, k).any(0)
    inside = torch.where(outlying, 0.0, value)
    dims = list(range(x.dim())) if options.granularity == "tensor" else [-1]
    if options.scheme == "absmax":
        largest = inside.abs().amax(dims, keepdim=True)
        quantized = torch.round(inside * 127 / torch.where(largest > 0, largest, 1.0)).clamp(-127, 127).to(torch.int8)
        product: Tensor = torch.onnx.ops.symbolic(
            "MatMulInteger", (quantized, codes.t()), dtype=torch.int32, shape=(*x.shape[:-1], n)
        )
        # One scale after the other: the product of both is what ONNX Runtime (1.32) fuses to another operator, which is
        # wrong for an int8 X with one scale.
        y = product.to(torch.float32) * (largest / 127) * arrays.scale
    else:
        low = torch.where(outlying, torch.inf, value).amin(dims, keepdim=True)
        high = torch.where(outlying, -torch.inf, value).amax(dims, keepdim=True)
        inverse = torch.where(high > low, 254 / (high - low), 1.0)
        zeropoint = torch.round(inverse * low) + 127
        rounded = (torch.round(inverse * value) - zeropoint).clamp(-127, 127) + zeropoint
        rounded = torch.where(high > low, rounded / inverse, low)
        y = torch.where(outlying, 0.0, rounded) @ _columns(arrays, codes, None).t()
    if options.outliers != "none":
        chosen = outlying.reshape(-1, k).any(0).nonzero().flatten()
        apart = torch.where(outlying, value, 0.0).index_select(-1, chosen)
        y = y + apart @ _columns(arrays, codes, chosen).t()
    return (y if bias is None else y + bias).to(x.dtype)


def _columns(arrays: Arrays, codes: Tensor, chosen: Any) -> Tensor:
    """Columns of the dequantized weight, float32; kept ones with their original values. None: all, without those."""
    values = (codes if chosen is None else codes.index_select(1, chosen)).to(torch.float32)
    if arrays.zeropoint is not None:
        values = values + arrays.zeropoint[:, None]
    values = values * arrays.scale[:, None]
    columns, kept = arrays.outlier_columns, arrays.outlier_weight
    if chosen is None or columns is None or kept is None or columns.shape[0] == 0:
        return values
    places = torch.full((arrays.shape[1],), -1).scatter(0, columns.long(), torch.arange(columns.shape[0]))
    place = places.index_select(0, chosen)
    return torch.where(place >= 0, kept.to(torch.float32).index_select(1, place.clamp(min=0)), values)
