"""`Int8Tensor`: an int8 weight that PyTorch, and every tool built on it, takes for the 16-bit one it replaces."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_map

import octavo
from octavo import file_format
from octavo.options import WEIGHT_OPTIONS, Options
from octavo.torch import operation
from octavo.torch.arrays import Arrays, has_memory, pack
from octavo.weight import ARRAYS as NAMES
from octavo.weight import Int8Weight

aten: Any = torch.ops.aten
_DEFAULT = Options()


class Int8Tensor(torch.Tensor):
    """A weight of a linear layer, held in int8: ``weight ~ (codes + zeropoint) * scale``.

    It has the shape and the dtype of the weight that it replaces, ``[n, k]``, and is to be used like it, also as an
    ``nn.Parameter``. It never requires grad.

    - Products with it (``F.linear``, ``x @ weight.t()``, ``addmm``) are those of ``torch.ops.octavo.linear``, which is
      `octavo.linear`: LLM.int8() with the tensor's `options`.
    - It stays int8 where it is moved, copied, cast, transposed, cut or put together along n, or multiplied by a number.
      A cast changes the dtype that it says it has, and nothing else. A part that is cut out is a copy.
    - Values that are copied into it are quantized.
    - Every other operation computes with the dequantized weight, and warns once, naming the operation. What such an
      operation returns is another tensor: to change that does not change this one.

    Made by `from_float`, `from_int8_weight`, `from_parts`.
    """

    _arrays: Arrays
    _transposed: bool

    @staticmethod
    def __new__(  # noqa: D102
        cls, arrays: Arrays | Int8Tensor, dtype: torch.dtype | None = None, transposed: bool = False, **_: Any
    ) -> Int8Tensor:
        if isinstance(arrays, Int8Tensor):  # as tools call the class of a parameter: with another one
            return torch.nn.Parameter(arrays, requires_grad=False)  # type: ignore[return-value]
        if not isinstance(arrays, Arrays) or dtype is None:
            raise TypeError(
                f"Int8Tensor: expected an Int8Tensor, got {type(arrays).__name__} (a tool that holds weights as plain "
                "arrays, as accelerate's disk_offload does?); from_float quantizes one"
            )
        shape = arrays.shape[::-1] if transposed else arrays.shape
        with torch.inference_mode(False):  # a view of a weight that is no inference tensor is none either
            self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=arrays.scale.device)
        self._arrays = arrays
        self._transposed = transposed
        return self

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    # --- making one, and taking it apart ------------------------------------------------------------------------------

    @classmethod
    def from_float(
        cls, weight: Tensor, options: Options = _DEFAULT, outlier_columns: Tensor | Sequence[int] | None = None
    ) -> Int8Tensor:
        """Quantize ``[n, k]``, float32, float16 or bfloat16.

        Args:
            outlier_columns: input features whose original weights are kept; see `octavo.quantize_weight` and, for the
                options, `octavo.Options.keeping`.

        Raises TypeError or ValueError as `octavo.quantize_weight` does.
        """
        made = octavo.quantize_weight(weight.detach(), options=options, outlier_columns=outlier_columns)
        return cls(Arrays.of(made, options.keeping(outlier_columns)), weight.dtype)

    @classmethod
    def from_int8_weight(cls, weight: Int8Weight, dtype: torch.dtype, options: Options) -> Int8Tensor:
        """The tensor of a weight of PyTorch arrays, whose memory it shares; `dtype` is that of the original weight."""
        own = {name: getattr(weight, name) for name in WEIGHT_OPTIONS}
        if options.of_weight != own:
            raise ValueError(f"Int8Tensor: options: expected those of the weight, {own}, got {options.of_weight}")
        return cls(Arrays.of(weight, options), dtype)

    def parts(self) -> dict[str, Tensor]:
        """The tensor as plain ones, as a file holds it: see `octavo.file_format`.

        Returns:
            codes int8 ``[n, k]`` (also of a transposed weight), scale, where there are such zeropoint, outlier_columns
            and outlier_weight, and options, JSON as uint8.
        """
        return file_format.disassemble(self.int8_weight, self.options, str(self.dtype).removeprefix("torch."))

    @classmethod
    def from_parts(
        cls, parts: Mapping[str, Tensor], dtype: torch.dtype | None = None, options: Options | None = None
    ) -> Int8Tensor:
        """The inverse of `parts`; `dtype` and `options` in place of those that the parts name."""
        weight, named, original = file_format.assemble(parts, "Int8Tensor")
        return cls.from_int8_weight(weight, dtype or getattr(torch, original or "float32"), options or named)

    @property
    def int8_weight(self) -> Int8Weight:
        """The weight ``[n, k]`` as `octavo.linear` takes it; it shares the tensor's memory."""
        return self._arrays.int8_weight

    @property
    def options(self) -> Options:
        """What products with this tensor are made with; scheme, granularity and rotation cannot be changed."""
        return self._arrays.options

    @options.setter
    def options(self, options: Options) -> None:
        if options.of_weight != self._arrays.options.of_weight:
            raise ValueError("Int8Tensor: options: scheme, granularity and rotation are fixed when it is quantized")
        self._arrays.options = options
        self._arrays.forget()

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """``(codes + zeropoint) * scale`` with the original values of kept columns, a plain tensor.

        Args:
            dtype: default the tensor's own.
        """
        weight = self._arrays.dequantize(dtype or self.dtype).contiguous()  # without a rotation's padding
        return weight.t() if self._transposed else weight

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.to_dict().items())
        return f"Int8Tensor(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}', {options})"

    # --- as PyTorch handles it ----------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Tensor:
        if id(self) not in memo:
            memo[id(self)] = _parameter(_clone(self), self)
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        arrays, is_parameter = self._arrays, getattr(self, "_is_param", False)
        options = arrays.options.to_dict()
        stored = replace(arrays, code_sums=None).tensors()  # type: ignore[arg-type]  # they are computed anew
        return _rebuild, (stored, arrays.shape, options, self.dtype, self._transposed, is_parameter)

    def data_ptr(self) -> int:
        """Of the codes: what accelerate knows weights that are tied by."""
        return self._arrays.codes.data_ptr()

    def element_size(self) -> int:
        """Bytes of a code: what tools take a model's memory from."""
        return 1

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of all that it holds."""
        return sum(array.nbytes for array in self._arrays.tensors() if array is not None)

    def is_shared(self) -> bool:
        """Whether other processes can read its memory."""
        return bool(self._arrays.codes.is_shared())

    def share_memory_(self) -> Int8Tensor:
        """Move the arrays to memory that other processes can read."""
        for array in self._arrays.tensors():
            if array is not None:
                array.share_memory_()
        self._arrays.forget()
        return self

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        names = [f"_{name}" for name in NAMES if getattr(self._arrays, name) is not None]
        return names, (self._arrays.shape, self.options, self.dtype, self._transposed)

    def _stable_hash_for_caching(self) -> str:
        """All of it that compiled code depends on, by which `torch.compile` finds what it has compiled earlier."""
        held = [array for array in self._arrays.tensors() if array is not None]
        return repr((self.__tensor_flatten__(), [(x.dtype, x.device, x.shape, x.stride()) for x in held]))

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> Int8Tensor:
        shape, options, dtype, transposed = context
        arrays = Arrays.named((inner.get(f"_{name}") for name in NAMES), shape, options)
        return Int8Tensor(arrays, dtype, transposed)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handler = _FUNCTIONS.get(func)
        if handler is not None and "out" not in kwargs:
            return handler(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # In inference mode PyTorch has not taken apart what consists of other operations.
        handler = _OPERATIONS.get(func, func.decompose)
        result = handler(*args, **(kwargs or {}))
        return _dequantized(func, args, kwargs or {}) if result is NotImplemented else result


for _name in NAMES:
    setattr(Int8Tensor, f"_{_name}", property(operator.attrgetter(f"_arrays.{_name}")))


def _parameter(made: Int8Tensor, like: Any) -> Int8Tensor:
    """`made`, a parameter where `like` is one, or true."""
    if like is True or getattr(like, "_is_param", False):
        made._is_param = True
    return made


def _rebuild(
    arrays: Any, shape: tuple[int, int], options: dict[str, Any], dtype: Any, transposed: bool, parameter: bool
) -> Int8Tensor:
    """An Int8Tensor from a pickle."""
    held = Arrays.named(arrays, shape, Options.from_dict(options))
    held.code_sums = held.sums()
    return _parameter(Int8Tensor(held.to(held.scale.device), dtype, transposed), parameter)


torch.serialization.add_safe_globals([_rebuild])

# --- products ---------------------------------------------------------------------------------------------------------


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``input @ weight.T + bias``."""
    if not isinstance(weight, Int8Tensor) or isinstance(input, Int8Tensor) or isinstance(bias, Int8Tensor):
        return functional.linear(*map(_plain, (input, weight, bias)))
    if input.device != weight._arrays.scale.device:
        raise ValueError(f"Int8Tensor: expected x on the device of the weight, {weight.device}, got {input.device}")
    if not weight._transposed:
        return operation.linear(input, weight._arrays, bias)
    y = operation.transposed_linear(input, weight._arrays)
    return y if bias is None else y + bias


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``."""
    if isinstance(b, Int8Tensor):
        return _linear(_plain(a), _transposed(b))
    return _linear(b.mT, a).mT if b.dim() > 1 else _linear(b, a)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``beta * bias + alpha * (a @ b)``."""
    if isinstance(b, Int8Tensor) and b._transposed and beta == alpha == 1 and bias.shape == b.shape[1:]:
        return _linear(a, _transposed(b), bias)
    return beta * _plain(bias) + alpha * _matmul(a, b)  # type: ignore[no-any-return]


# --- what keeps it int8 -----------------------------------------------------------------------------------------------


def _alias(x: Int8Tensor, *_: Any) -> Int8Tensor:
    return Int8Tensor(x._arrays, x.dtype, x._transposed)


def _transposed(x: Int8Tensor) -> Int8Tensor:
    return Int8Tensor(x._arrays, x.dtype, not x._transposed)


def _transpose(x: Int8Tensor, a: int, b: int) -> Int8Tensor:
    return _alias(x) if (a - b) % 2 == 0 else _transposed(x)


def _clone(x: Int8Tensor, **_: Any) -> Int8Tensor:
    return Int8Tensor(x._arrays.map(torch.clone), x.dtype, x._transposed)


def _to_copy(x: Int8Tensor, *, dtype: Any = None, device: Any = None, non_blocking: bool = False, **_: Any) -> Any:
    dtype, target = dtype or x.dtype, torch.device(device or x.device)
    if not dtype.is_floating_point:
        return NotImplemented
    arrays = x._arrays.map(torch.clone) if target == x.device else x._arrays.to(target, non_blocking)
    return Int8Tensor(arrays, dtype, x._transposed)


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False, columns: Tensor | None = None) -> Tensor:
    if not isinstance(target, Int8Tensor):
        return target.copy_(_plain(source))
    if not isinstance(source, Int8Tensor) or source._transposed != target._transposed:
        values = _plain(source).to(target.device, target.dtype).expand(target.shape)
        source = Int8Tensor.from_float(values.t() if target._transposed else values, target.options, columns)
    target._arrays.take(source._arrays)
    return target


def _change(target: Tensor, values: Tensor) -> None:
    """Take over values that were computed from the weight, such as a merged adapter's, and say what that costs."""
    if not isinstance(target, Int8Tensor) or isinstance(values, Int8Tensor):
        _copy(target, values)
        return
    if values.dtype == target.dtype and values.device == target.device and torch.equal(target.dequantize(), values):
        return  # quantized anew it would not be quite the same
    _copy(target, values, columns=target._arrays.outlier_columns)  # what was kept in 16 bit is kept of these, too
    error = (target.dequantize(torch.float32) - values).norm() / values.norm().clamp_min(1e-30)
    warnings.warn(
        f"octavo: an int8 weight was changed and quantized anew: its relative error is now about {error.item():.1g}",
        stacklevel=4,
    )


def _scale(in_place: Callable[..., Any], is_copy: bool) -> Callable[..., Any]:
    """``x * factor`` or ``x / factor``, of a positive number: on the scales and the kept columns."""

    def handler(x: Any, factor: Any) -> Any:
        if isinstance(factor, Tensor) and factor.dim() == 0 and has_memory(factor):
            factor = factor.item()
        if not isinstance(x, Int8Tensor) or not isinstance(factor, float | int) or not 0 < factor < math.inf:
            return NotImplemented
        x = _clone(x) if is_copy else x
        x._arrays.check_writable()
        for array in (x._arrays.scale, x._arrays.outlier_weight):
            if array is not None:
                in_place(array, factor)
        x._arrays.forget()  # below autograd PyTorch does not count that they were written to
        return x

    return handler


def _slice(x: Int8Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    part = range(*slice(start, end, step).indices(x.shape[dim]))
    if part == range(x.shape[dim]):
        return _alias(x)
    if dim % 2 != int(x._transposed):  # along k
        return NotImplemented
    return Int8Tensor(x._arrays.rows(slice(part.start, part.stop, step)), x.dtype, x._transposed)


def _split(x: Int8Tensor, size: int | Sequence[int], dim: int = 0) -> Any:
    starts = range(0, x.shape[dim], size) if isinstance(size, int) else [sum(size[:i]) for i in range(len(size))]
    sizes = [size] * len(starts) if isinstance(size, int) else size
    parts = [_slice(x, dim, start, start + own) for start, own in zip(starts, sizes, strict=True)]
    return NotImplemented if any(part is NotImplemented for part in parts) else parts


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Any:
    int8 = [tensor for tensor in tensors if isinstance(tensor, Int8Tensor)]
    if len(int8) < len(tensors) or any(tensor._transposed != bool(dim % 2) for tensor in int8):
        return NotImplemented
    whole = Arrays.together([tensor._arrays for tensor in int8])
    return NotImplemented if whole is None else Int8Tensor(whole, int8[0].dtype, int8[0]._transposed)


def _empty_like(x: Int8Tensor, *, dtype: Any = None, device: Any = None, **_: Any) -> Int8Tensor:
    empty = x._arrays.to(torch.device("meta")).map(lambda array: torch.zeros_like(array, device=device or x.device))
    empty.codes = pack(empty.codes)
    return Int8Tensor(empty, dtype or x.dtype, x._transposed)


_OPERATIONS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((aten.detach.default, aten.alias.default), _alias),
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten.t.default: _transposed,
    aten.transpose.int: _transpose,
    aten.permute.default: lambda x, dims: _transpose(x, 0, dims[0]),
    aten.copy_.default: _copy,
    aten.mul_.Tensor: _scale(torch.Tensor.mul_, is_copy=False),
    aten.div_.Tensor: _scale(torch.Tensor.div_, is_copy=False),
    aten.mul.Tensor: _scale(torch.Tensor.mul_, is_copy=True),
    aten.div.Tensor: _scale(torch.Tensor.div_, is_copy=True),
    aten.slice.Tensor: _slice,
    **dict.fromkeys((aten.split.Tensor, aten.split_with_sizes.default), _split),
    aten.cat.default: _cat,
    aten.empty_like.default: _empty_like,
    aten.is_pinned.default: lambda *_: False,
    aten.linear.default: _linear,
    **dict.fromkeys((aten.matmul.default, aten.mm.default), _matmul),
    aten.addmm.default: _addmm,
}

# --- what PyTorch does before its dispatcher, or past it --------------------------------------------------------------


def _set_item(x: Tensor, key: Any, value: Any) -> None:
    if isinstance(x, Int8Tensor):
        values = x.dequantize()
        values[key] = _plain(value)
        _copy(x, values)
    else:
        x[key] = _plain(value)


def _set_data(x: Tensor, value: Tensor) -> None:
    if isinstance(x, Int8Tensor) and isinstance(value, Int8Tensor):
        with torch._C.DisableTorchFunctionSubclass():
            torch.Tensor.data.__set__(x, value)  # type: ignore[attr-defined]
        x._arrays, x._transposed = value._arrays, value._transposed
        return
    with torch.no_grad():
        _change(x, value)


def _set_requires_grad(x: Tensor, value: bool = True) -> Tensor:
    if value:
        _warn("requires_grad", "an int8 weight is not trained: it stays False")
    return x


def _no_memory(x: Tensor, *_: Any, **__: Any) -> Any:
    raise RuntimeError(
        "Int8Tensor: expected a tensor with memory of its own, got an int8 weight, which consists of several: use its "
        "parts(), or dequantize()"
    )


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    functional.linear: _linear,
    **dict.fromkeys((torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.mm), _matmul),
    torch.Tensor.__rmatmul__: lambda a, b: _matmul(b, a),
    **dict.fromkeys((torch.addmm, torch.Tensor.addmm), _addmm),
    torch.Tensor.__setitem__: _set_item,
    torch.Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    torch.Tensor.requires_grad_: _set_requires_grad,
    torch.Tensor.requires_grad.__set__: _set_requires_grad,  # type: ignore[attr-defined]
    torch.Tensor.numpy: lambda x, **_: x.dequantize().numpy(),
    torch.Tensor.tolist: lambda x: x.dequantize().tolist(),
    **dict.fromkeys((torch.Tensor.storage, torch.Tensor.__dlpack__, torch.Tensor.__dlpack_device__), _no_memory),
}

# --- everything else --------------------------------------------------------------------------------------------------


@cache  # once
def _warn(name: str, text: str) -> None:
    warnings.warn(f"Int8Tensor: {name}: {text}", stacklevel=4)


def _plain(value: Any) -> Any:
    return value.dequantize() if isinstance(value, Int8Tensor) else value


def _dequantized(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`func` of the dequantized weights; one that it writes to is quantized again."""
    _warn(str(func), "not known of int8 weights, so it is computed with a dequantized copy")
    written: list[tuple[Int8Tensor, Tensor]] = []

    def plain(argument: Any, value: Any) -> Any:
        def one(leaf: Any) -> Any:
            values = _plain(leaf)
            if values is not leaf and argument.alias_info is not None and argument.alias_info.is_write:
                written.append((leaf, values))
            return values

        return tree_map(one, value)

    declared = {argument.name: argument for argument in func._schema.arguments}
    positional = [plain(argument, value) for argument, value in zip(declared.values(), args, strict=False)]
    result = func(*positional, **{name: plain(declared[name], value) for name, value in kwargs.items()})
    for tensor, values in written:
        _change(tensor, values)
        result = tensor if result is values else result
    return result
