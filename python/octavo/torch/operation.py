"""The operations ``torch.ops.octavo.*``, and what PyTorch is told about them, so that it can trace and transform them.

``linear`` is `octavo.linear`; ``linear_backward`` is the gradient of its x. Their kernels are C++
(bindings/torch_op.cpp).
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.utils.flop_counter import register_flop_formula

from octavo import _core
from octavo.options import Options
from octavo.torch import onnx
from octavo.torch.arrays import Arrays

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_library = torch.library.Library("octavo", "DEF")
_WEIGHT = (
    "Tensor codes, Tensor scale, Tensor code_sums, Tensor? zeropoint, Tensor? outlier_columns, Tensor? outlier_weight"
)
# `options` is `Arrays.text`: every argument costs a call 0.1 to 0.4 us.
_library.define(f"linear(Tensor x, {_WEIGHT}, Tensor? bias, str options) -> Tensor")
# `arrays`: for each layer those of its weight, and its bias. ``octavo.torch.compilation`` makes it of `linear`.
_library.define("linear_many(Tensor x, Tensor?[] arrays, str options) -> Tensor[]")
_library.define(f"linear_backward(Tensor grad, {_WEIGHT}, str options) -> Tensor")
_linear_op: Any = torch.ops.octavo.linear.default
_backward_op: Any = torch.ops.octavo.linear_backward.default


@lru_cache
def _read(text: str) -> tuple[int, Options]:
    """The width k and the options of an `Arrays.text`."""
    k, _, options = text.partition(" ")
    return int(k), Options.from_text(options)


@lru_cache
def _with(text: str, **changes: Any) -> str:
    """The text of changed options."""
    k, options = _read(text)
    return f"{k} {replace(options, **changes).text}"


def linear(x: Tensor, arrays: Arrays, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` by `octavo.linear`, ``[..., k]`` -> ``[..., n]``."""
    if not is_dynamo_compiling():
        y = arrays.product(x, bias)
        if y is not None:
            return y
    if x.is_nested:
        return torch.nested.as_nested_tensor([linear(part, arrays, bias) for part in x.unbind()], layout=x.layout)
    if onnx.is_exporting():
        return onnx.linear(x, arrays, bias)
    if x.dtype not in FLOAT_DTYPES and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"linear: x: expected float32, float16 or bfloat16, got {x.dtype}")
    return _linear_op(x, *arrays.tensors(), bias, arrays.text)  # type: ignore[no-any-return]


def transposed_linear(x: Tensor, arrays: Arrays) -> Tensor:
    """``x @ weight`` with the dequantized weight and its kept columns, ``[..., n]`` -> ``[..., k]``."""
    text = _with(arrays.text, path="auto", outliers="columns")
    return _backward_op(x, *arrays.tensors(), text)  # type: ignore[no-any-return]


def _dequantized_linear(x: Tensor, arrays: Any, text: str) -> Tensor:
    """``x @ weight.T`` with the dequantized weight, in which are the kept columns that `linear` reads."""
    columns, kept = arrays[4:]
    weight_only = (None, _with(text, path="weight_only"))
    _, options = _read(text)
    if columns is None or options.path == "weight_only" or options.outliers == "none":
        return _linear_op(x, *arrays, *weight_only)  # type: ignore[no-any-return]
    others = _linear_op(x.index_fill(-1, columns.long(), 0), *arrays, *weight_only)
    return others + x.index_select(-1, columns.long()) @ kept.t().to(x.dtype)  # type: ignore[no-any-return]


# --- shapes and work --------------------------------------------------------------------------------------------------


@torch.library.register_fake("octavo::linear", lib=_library)  # type: ignore[untyped-decorator]
def _linear_fake(x: Tensor, codes: Tensor, scale: Tensor, code_sums: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], code_sums.shape[0]))


@torch.library.register_fake("octavo::linear_many", lib=_library)  # type: ignore[untyped-decorator]
def _linear_many_fake(x: Tensor, arrays: list[Tensor], options: str) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], code_sums.shape[0])) for code_sums in arrays[2::7]]


@torch.library.register_fake("octavo::linear_backward", lib=_library)  # type: ignore[untyped-decorator]
def _backward_fake(grad: Tensor, *rest: Any) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], _read(rest[-1])[0]))


@register_flop_formula([torch.ops.octavo.linear, torch.ops.octavo.linear_backward])
def _flops(x_shape: Any, codes: Any, scale: Any, code_sums_shape: Any, *rest: Any, **named: Any) -> int:
    """Multiplications and additions, as of a dense product."""
    return 2 * torch.Size(x_shape[:-1]).numel() * int(code_sums_shape[0]) * _read(rest[-1])[0]


# --- derivatives ------------------------------------------------------------------------------------------------------


class _Function(torch.autograd.Function):
    """An operation and its derivatives, which are operations, too; of its arguments x is the first, a text the last."""

    operation: Any

    @classmethod
    def kernel(cls, *args: Any) -> Tensor:
        """What PyTorch calls of the operation."""
        wanted = torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
        if wanted or forward_ad._current_level >= 0:
            with enable_single_level_autograd_function():
                # Not Function's own `apply`: that would have torch.func take the call apart a second time, which it
                # has done before this kernel is called.
                return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc, no-any-return]
        return cls._below_autograd(*args)

    @classmethod
    def _below_autograd(cls, *args: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return cls.operation(*args)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.text = inputs[-1]
        ctx.save_for_backward(*inputs[1:7])
        ctx.save_for_forward(*inputs[1:7])


class _Linear(_Function):
    """y = x @ W.T + b: gradients and tangents of x through the dequantized weight, and those of the bias."""

    operation = _linear_op

    @staticmethod
    def forward(*args: Any) -> Tensor:
        with _outer_derivatives():
            return _Linear._below_autograd(*args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _backward_op(grad, *ctx.saved_tensors, ctx.text)
        if ctx.needs_input_grad[7]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return (grad_x, *[None] * 6, grad_bias, None)

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, *tangents: Any) -> Any:
        bias = tangents[6]
        if x is None:
            return bias
        with _outer_derivatives():
            y = _dequantized_linear(x, ctx.saved_tensors, ctx.text)
            return y if bias is None else y + bias


class _LinearBackward(_Function):
    """Linear in the gradient; its transpose is the product with the dequantized weight."""

    operation = _backward_op

    @staticmethod
    def forward(*args: Any) -> Tensor:
        with _outer_derivatives():
            return _LinearBackward._below_autograd(*args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (_dequantized_linear(grad, ctx.saved_tensors, ctx.text), *[None] * 7)

    @staticmethod
    def jvp(ctx: Any, grad: Tensor, *_: Any) -> Any:
        with _outer_derivatives():
            return _backward_op(grad, *ctx.saved_tensors, ctx.text)


@contextlib.contextmanager
def _outer_derivatives() -> Iterator[None]:
    """Turns on what Function turns off while it runs: an outer torch.func differentiates the same operations."""
    active = torch._C._are_functorch_transforms_active()
    grad, tangents = torch.is_grad_enabled() or active, torch._C._is_fwd_grad_enabled() or active
    with torch.set_grad_enabled(grad), forward_ad._set_fwd_grad_enabled(tangents):
        yield


_core.register_torch_operations(_Linear.kernel)
_library.impl("linear", _core.torch_linear, "Autograd")
_library.impl("linear_backward", _LinearBackward.kernel, "Autograd")


# --- autocast and vmap ------------------------------------------------------------------------------------------------


def _cast(device: str, key: torch._C.DispatchKey) -> Callable[..., Tensor]:
    def kernel(x: Tensor, *args: Any) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return _linear_op(x.to(torch.get_autocast_dtype(device)), *args)  # type: ignore[no-any-return]

    return kernel


_library.impl("linear", _cast("cpu", torch._C.DispatchKey.AutocastCPU), "AutocastCPU")
_library.impl("linear", _cast("cuda", torch._C.DispatchKey.AutocastCUDA), "AutocastCUDA")


def _mapped(op: Any, by_row: Callable[[Options], bool]) -> Callable[..., tuple[Tensor, int]]:
    """The rule of vmap: one call where only x is mapped and rows do not depend on each other, else one per example."""

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        x_dim, *others = in_dims
        if x_dim is not None and all(dim is None for dim in others) and by_row(_read(args[-1])[1]):
            return op(args[0].movedim(x_dim, 0), *args[1:]), 0

        def example(i: int) -> Any:
            return (arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True))

        return torch.stack([op(*example(i)) for i in range(info.batch_size)]), 0

    return rule


def _rows_are_independent(options: Options) -> bool:
    return options.path == "weight_only" or (options.outliers != "columns" and options.granularity != "tensor")


torch.library.register_vmap("octavo::linear", _mapped(_linear_op, _rows_are_independent), lib=_library)
torch.library.register_vmap("octavo::linear_backward", _mapped(_backward_op, lambda _: True), lib=_library)
