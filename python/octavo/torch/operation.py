"""The operations ``torch.ops.octavo.*``, and what PyTorch is told about them, so that it can trace and transform them.

``linear`` is `octavo.linear`; its kernel is C++ (bindings/torch_op.cpp). ``float_product`` multiplies with the
dequantized weight, a block of it at a time: gradients and tangents of ``linear``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from octavo import _core
from octavo._types import rotated_size
from octavo.options import Options
from octavo.torch import onnx
from octavo.torch.arrays import Arrays, unpack

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_BLOCKS = 16  # of a weight, of which one is dequantized at a time

_library = torch.library.Library("octavo", "DEF")
_ARRAYS = (
    "Tensor codes, Tensor scale, Tensor code_sums, Tensor? zeropoint, Tensor? outlier_columns, Tensor? outlier_weight"
)
_library.define(f"linear(Tensor x, {_ARRAYS}, Tensor? bias, str options, SymInt in_features) -> Tensor")
_library.define(f"float_product(Tensor x, {_ARRAYS}, SymInt in_features, bool transpose, int rotation) -> Tensor")
_core.register_torch_operation()
_options = lru_cache(Options.from_text)
_linear_op: Any = torch.ops.octavo.linear.default
_float_product_op: Any = torch.ops.octavo.float_product.default


def linear(x: Tensor, arrays: Arrays, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` by `octavo.linear`, ``[..., k]`` -> ``[..., n]``."""
    if x.is_nested:
        return torch.nested.as_nested_tensor([linear(part, arrays, bias) for part in x.unbind()], layout=x.layout)
    if onnx.is_exporting():
        return onnx.linear(x, arrays, bias)
    if x.dtype not in FLOAT_DTYPES and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"linear: x: expected float32, float16 or bfloat16, got {x.dtype}")
    return _linear_op(x, *arrays.tensors(), bias, arrays.options.text, arrays.shape[1])  # type: ignore[no-any-return]


def float_product(x: Tensor, arrays: Arrays, *, transpose: bool) -> Tensor:
    """``x @ weight.T`` (`transpose`) or ``x @ weight``, with the dequantized weight and its kept columns."""
    own = (*arrays.tensors(), arrays.shape[1])
    return _float_product_op(x, *own, transpose, arrays.options.rotation)  # type: ignore[no-any-return]


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zeropoint: Tensor | None,
    columns: Tensor | None,
    kept: Tensor | None,
    dtype: Any,
    rotation: int,
    k: int,
) -> Tensor:
    """``(codes + zeropoint) * scale`` of the codes row by row, ``[n, k]``, in float32, rounded once to `dtype`.

    Rotated back where they are rotated; kept columns are put in.
    """
    weight = codes.to(torch.float32)
    if rotation:
        weight = _rotated(weight, rotation)
    if zeropoint is not None:  # rotated back it is in the first column of each block alone
        weight[:, :: rotation or 1] += zeropoint[:, None] * math.sqrt(rotation or 1)
    weight = weight[:, :k]
    weight *= scale[:, None]  # in place: a block of the backward pass is in memory once
    if columns is not None and kept is not None:
        weight[:, columns.long()] = kept.to(torch.float32)
    return weight.to(dtype)


def _rotated(rows: Tensor, rotation: int) -> Tensor:
    """Blocks of columns times the Hadamard matrix over its root; of codes exact."""
    distance = 1
    while distance < rotation:
        pairs = rows.reshape(rows.shape[0], -1, 2, distance)
        rows = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), 2).reshape(rows.shape)
        distance *= 2
    return rows / math.sqrt(rotation)


def _float_product(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    code_sums: Tensor,
    zeropoint: Tensor | None,
    outlier_columns: Tensor | None,
    outlier_weight: Tensor | None,
    k: int,
    transpose: bool,
    rotation: int,
) -> Tensor:
    n = code_sums.shape[0]
    rows = x.reshape(-1, x.shape[-1]).to(torch.float32)
    result = rows.new_zeros((rows.shape[0], n if transpose else k))
    step = max(16, -(-n // (_BLOCKS * 16)) * 16)

    scaled = rows * scale if not transpose else rows

    def codes_of(part: slice) -> Tensor:
        if codes.dim() != 4:
            return codes[part]
        blocks = codes[part.start // 16 : -(-part.stop // 16)]
        return unpack(blocks, part.stop - part.start, rotated_size(k, rotation))

    def block(part: slice) -> Tensor:
        own_scale, own_zeropoint, kept = (
            array if array is None or array.shape[0] != n else array[part]
            for array in (scale, zeropoint, outlier_weight)
        )
        assert own_scale is not None
        return dequantize(codes_of(part), own_scale, own_zeropoint, outlier_columns, kept, torch.float32, rotation, k)

    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        if transpose:
            result[:, part] = rows @ block(part).t()
        elif rotation:
            result.addmm_(rows[:, part], block(part))
        else:  # the scales are applied to the few rows, not to the weight
            result.addmm_(scaled[:, part], codes_of(part).to(torch.float32))
    if not transpose and not rotation:
        if zeropoint is not None:
            result += (scaled * zeropoint).sum(1, keepdim=True)
        if outlier_columns is not None and outlier_weight is not None:
            result[:, outlier_columns.long()] = rows @ outlier_weight.to(torch.float32)
    return result.to(x.dtype).reshape(*x.shape[:-1], result.shape[1])


_library.impl("float_product", _float_product, "CompositeExplicitAutograd")


# --- shapes and work --------------------------------------------------------------------------------------------------


@torch.library.register_fake("octavo::linear", lib=_library)  # type: ignore[untyped-decorator]
def _linear_fake(x: Tensor, codes: Tensor, scale: Tensor, code_sums: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], code_sums.shape[0]))


@torch.library.register_fake("octavo::float_product", lib=_library)  # type: ignore[untyped-decorator]
def _float_product_fake(x: Tensor, codes: Tensor, scale: Tensor, code_sums: Tensor, *rest: Any) -> Tensor:
    k, transpose, _ = rest[-3:]
    return x.new_empty((*x.shape[:-1], code_sums.shape[0] if transpose else k))


@register_flop_formula([torch.ops.octavo.linear, torch.ops.octavo.float_product])
def _flops(x_shape: Any, codes: Any, scale: Any, code_sums_shape: Any, *rest: Any, **named: Any) -> int:
    """Multiplications and additions, as of a dense product."""
    k = next(value for value in rest if isinstance(value, int))
    rows = torch.Size(x_shape[:-1]).numel()
    return 2 * rows * int(code_sums_shape[0]) * k


# --- derivatives ------------------------------------------------------------------------------------------------------


class _Linear(torch.autograd.Function):
    """y = x @ W.T + b: gradients and tangents of x through the dequantized weight, and those of the bias."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        with _outer_derivatives():
            return _below_autograd(_linear_op, args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, *arrays, _, text, ctx.k = inputs
        ctx.rotation = _options(text).rotation
        if _options(text).path == "weight_only":  # which does not use kept columns
            arrays[4:] = None, None
        ctx.save_for_backward(*arrays)
        ctx.save_for_forward(*arrays)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _float_product_op(grad, *ctx.saved_tensors, ctx.k, False, ctx.rotation)
        if ctx.needs_input_grad[7]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return (grad_x, *[None] * 6, grad_bias, None, None)

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, *tangents: Any) -> Any:
        bias = tangents[6]
        if x is None:
            return bias
        with _outer_derivatives():
            y = _float_product_op(x, *ctx.saved_tensors, ctx.k, True, ctx.rotation)
            return y if bias is None else y + bias


class _FloatProduct(torch.autograd.Function):
    """Linear in x; its transpose is the same operation the other way."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        with _outer_derivatives():
            return _below_autograd(_float_product_op, args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, *arrays, ctx.k, ctx.transpose, ctx.rotation = inputs
        ctx.save_for_backward(*arrays)
        ctx.save_for_forward(*arrays)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_x = _float_product_op(grad, *ctx.saved_tensors, ctx.k, not ctx.transpose, ctx.rotation)
        return (grad_x, *[None] * 9)

    @staticmethod
    def jvp(ctx: Any, x: Tensor, *_: Any) -> Any:
        with _outer_derivatives():
            return _float_product_op(x, *ctx.saved_tensors, ctx.k, ctx.transpose, ctx.rotation)


def _below_autograd(op: Any, args: Any) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)  # type: ignore[no-any-return]


@contextlib.contextmanager
def _outer_derivatives() -> Iterator[None]:
    """Turns on what Function turns off while it runs: an outer torch.func differentiates the same operations."""
    active = torch._C._are_functorch_transforms_active()
    grad, tangents = torch.is_grad_enabled() or active, torch._C._is_fwd_grad_enabled() or active
    with torch.set_grad_enabled(grad), forward_ad._set_fwd_grad_enabled(tangents):
        yield


def _differentiable(op: Any, function: type[torch.autograd.Function], inputs: tuple[int, ...]) -> Callable[..., Tensor]:
    """The kernel of `op` that PyTorch asks first; `inputs`: the arguments that may require gradients."""
    # Not Function's own `apply`: that would have torch.func take the call apart a second time, which it has done before
    # this kernel is called.
    apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def kernel(*args: Any) -> Tensor:
        wanted = torch.is_grad_enabled() and any(args[i] is not None and args[i].requires_grad for i in inputs)
        if wanted or forward_ad._current_level >= 0:
            with enable_single_level_autograd_function():
                return apply(*args)  # type: ignore[no-any-return]
        return _below_autograd(op, args)

    return kernel


_library.impl("linear", _differentiable(_linear_op, _Linear, (0, 7)), "Autograd")
_library.impl("float_product", _differentiable(_float_product_op, _FloatProduct, (0,)), "Autograd")


# --- autocast and vmap ------------------------------------------------------------------------------------------------


def _cast(device: str, key: torch._C.DispatchKey) -> Callable[..., Tensor]:
    def kernel(x: Tensor, *args: Any) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return _linear_op(x.to(torch.get_autocast_dtype(device)), *args)  # type: ignore[no-any-return]

    return kernel


_library.impl("linear", _cast("cpu", torch._C.DispatchKey.AutocastCPU), "AutocastCPU")
_library.impl("linear", _cast("cuda", torch._C.DispatchKey.AutocastCUDA), "AutocastCUDA")


def _mapped(op: Any, by_row: Callable[..., bool]) -> Callable[..., tuple[Tensor, int]]:
    """The rule of vmap: one call where only x is mapped and rows do not depend on each other, else one per example."""

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        x_dim, *others = in_dims
        if x_dim is not None and all(dim is None for dim in others) and by_row(*args):
            return op(args[0].movedim(x_dim, 0), *args[1:]), 0

        def example(i: int) -> Any:
            return (arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True))

        return torch.stack([op(*example(i)) for i in range(info.batch_size)]), 0

    return rule


def _rows_are_independent(*args: Any) -> bool:
    options = _options(args[8])
    return options.path == "weight_only" or (options.outliers != "columns" and options.granularity != "tensor")


torch.library.register_vmap("octavo::linear", _mapped(_linear_op, _rows_are_independent), lib=_library)
torch.library.register_vmap("octavo::float_product", _mapped(_float_product_op, lambda *_: True), lib=_library)
