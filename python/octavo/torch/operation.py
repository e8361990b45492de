"""The operations ``torch.ops.octavo.*``: what PyTorch is told about them, so that it can trace and differentiate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import octavo
from octavo._types import Granularity, Outliers, ProductPath, Scheme
from octavo.torch.packing import is_packed, unpack
from octavo.weight import Int8Weight

if TYPE_CHECKING:
    from octavo.torch.tensor import Arrays

_library = torch.library.Library("octavo", "DEF")
_library.define(
    "linear(Tensor x, Tensor codes, Tensor scale, Tensor code_sums, Tensor? zeropoint, Tensor? outlier_columns, "
    "Tensor? outlier_weight, Tensor? bias, str scheme, str granularity, float threshold, str outliers, str path, "
    "SymInt? in_features=None) -> Tensor"
)
_library.define(
    "float_product(Tensor x, Tensor codes, Tensor scale, Tensor? zeropoint, Tensor? outlier_columns, "
    "Tensor? outlier_weight, SymInt out_features, SymInt in_features, bool transpose) -> Tensor"
)


def linear(x: Tensor, arrays: Arrays, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` by `octavo.linear`, ``[..., k]`` -> ``[..., n]``."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    options = arrays.options
    result: Tensor = torch.ops.octavo.linear.default(
        x,
        arrays.codes,
        arrays.scale,
        arrays.code_sums,
        arrays.zeropoint,
        arrays.outlier_columns,
        arrays.outlier_weight,
        bias,
        options.scheme,
        options.granularity,
        options.threshold,
        options.outliers,
        options.path,
        arrays.shape[1],
    )
    return result


def float_product(x: Tensor, arrays: Arrays, *, transpose: bool) -> Tensor:
    """``x @ weight.T`` (`transpose`) or ``x @ weight`` with the dequantized weight, a block of it at a time."""
    own = (arrays.codes, arrays.scale, arrays.zeropoint, arrays.outlier_columns, arrays.outlier_weight)
    result: Tensor = torch.ops.octavo.float_product.default(x, *own, *arrays.shape, transpose)
    return result


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zeropoint: Tensor | None,
    outlier_columns: Tensor | None,
    outlier_weight: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``(codes + zeropoint) * scale`` of codes ``[n, k]``, in float32, kept columns put in, rounded once to `dtype`."""
    weight = codes.to(torch.float32)
    if zeropoint is not None:
        weight += zeropoint[:, None]
    weight *= scale[:, None]
    if outlier_columns is not None and outlier_weight is not None:
        weight[:, outlier_columns.long()] = outlier_weight.to(torch.float32)
    return weight.to(dtype)


# --- linear -----------------------------------------------------------------------------------------------------------


def _linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    code_sums: Tensor,
    zeropoint: Tensor | None,
    outlier_columns: Tensor | None,
    outlier_weight: Tensor | None,
    bias: Tensor | None,
    scheme: Scheme,
    granularity: Granularity,
    threshold: float,
    outliers: Outliers,
    path: ProductPath,
    in_features: int | None = None,  # k, of packed codes, whose shape is that of the next multiple of 64
) -> Tensor:
    if is_packed(codes) and in_features is None:
        raise ValueError("octavo::linear: in_features: expected a number with packed codes, got None")
    weight = Int8Weight(
        codes,
        scale,
        shape=(code_sums.shape[0], in_features) if is_packed(codes) and in_features is not None else None,
        pack=False,
        zeropoint=zeropoint,
        outlier_columns=outlier_columns,
        outlier_weight=outlier_weight,
        code_sums=code_sums,
        scheme=scheme,
        granularity=granularity,
    )
    with torch.no_grad():  # autograd, where it is wanted, is registered below
        return octavo.linear(  # type: ignore[no-any-return]
            x, weight, bias, threshold=threshold, outliers=outliers, path=path
        )


def _linear_fake(x: Tensor, codes: Tensor, scale: Tensor, code_sums: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], code_sums.shape[0]))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scale, code_sums, zeropoint, outlier_columns, outlier_weight, *_ = inputs
    ctx.save_for_backward(codes, scale, zeropoint, outlier_columns, outlier_weight)
    ctx.shape = (code_sums.shape[0], x.shape[-1])


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Gradients of x, through the dequantized weight, and of the bias."""
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.octavo.float_product(grad, *ctx.saved_tensors, *ctx.shape, False)
    if ctx.needs_input_grad[7]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return (grad_x, *[None] * 6, grad_bias, *[None] * 6)


_library.impl("linear", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("octavo::linear", _linear_fake, lib=_library)
torch.library.register_autograd("octavo::linear", _linear_backward, setup_context=_save_for_backward, lib=_library)

# --- float_product ----------------------------------------------------------------------------------------------------

_BLOCKS = 16  # of the weight, of which one is dequantized at a time


def _float_product(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zeropoint: Tensor | None,
    outlier_columns: Tensor | None,
    outlier_weight: Tensor | None,
    n: int,
    k: int,
    transpose: bool,
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).to(torch.float32)
    result = rows.new_zeros((rows.shape[0], n if transpose else k))
    step = max(16, -(-n // (_BLOCKS * 16)) * 16)
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        count = part.stop - start
        own = unpack(codes[start // 16 : -(-part.stop // 16)], count, k) if is_packed(codes) else codes[part]
        of_rows = (array if array is None or array.shape[0] != n else array[part] for array in (scale, zeropoint))
        kept = None if outlier_weight is None else outlier_weight[part]
        block = dequantize(own, *of_rows, outlier_columns, kept, torch.float32)
        if transpose:
            torch.mm(rows, block.t(), out=result[:, part])
        else:
            result.addmm_(rows[:, part], block)
    return result.to(x.dtype).reshape(*x.shape[:-1], result.shape[1])


def _float_product_fake(
    x: Tensor, codes: Tensor, scale: Tensor, zeropoint: Any, columns: Any, kept: Any, n: int, k: int, transpose: bool
) -> Tensor:
    return x.new_empty((*x.shape[:-1], n if transpose else k))


def _save_for_float_product(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *arrays, ctx.n, ctx.k, ctx.transpose = inputs
    ctx.save_for_backward(*arrays)


def _float_product_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_x = torch.ops.octavo.float_product(grad, *ctx.saved_tensors, ctx.n, ctx.k, not ctx.transpose)
    return (grad_x, *[None] * 8)


_library.impl("float_product", _float_product, "CompositeExplicitAutograd")
torch.library.register_fake("octavo::float_product", _float_product_fake, lib=_library)
torch.library.register_autograd(
    "octavo::float_product", _float_product_backward, setup_context=_save_for_float_product, lib=_library
)
