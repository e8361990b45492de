"""`Int8Tensor`: an int8 weight that PyTorch, and every tool built on it, takes for the 16-bit one it replaces."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_map

import octavo
from octavo.checkpoint import format
from octavo.options import Options
from octavo.torch import operation
from octavo.torch.packing import pack, unpack
from octavo.weight import Int8Weight

aten: Any = torch.ops.aten

_DEFAULT = Options()
_NAMES = ("codes", "scale", "code_sums", "zeropoint", "outlier_columns", "outlier_weight")


@dataclass(slots=True, eq=False)
class Arrays:
    """The arrays of a weight ``[n, k]``, as in `octavo.Int8Weight`. Tensors that share memory share one of these."""

    codes: Tensor  # packed in CPU memory
    scale: Tensor
    code_sums: Tensor
    zeropoint: Tensor | None
    outlier_columns: Tensor | None
    outlier_weight: Tensor | None
    shape: tuple[int, int]
    options: Options
    _int8_weight: Int8Weight | None = None  # made when it is first needed

    @classmethod
    def of(cls, weight: Int8Weight, options: Options) -> Arrays:
        """Those of a weight that `octavo.quantize_weight` made."""
        packed = weight.packed
        codes = pack(weight.codes) if packed is None else packed
        others = (getattr(weight, name) for name in _NAMES[1:])
        return cls(codes, *others, shape=weight.shape, options=options)

    @property
    def int8_weight(self) -> Int8Weight:
        """The weight as `octavo.linear` takes it; it reads the same memory."""
        if self._int8_weight is None:
            self._int8_weight = Int8Weight(
                **{name: getattr(self, name) for name in _NAMES},
                scheme=self.options.scheme,
                granularity=self.options.granularity,
                shape=self.shape if self.codes.dim() == 4 else None,
            )
        return self._int8_weight

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The arrays in the order in which the operations take them."""
        return tuple(getattr(self, name) for name in _NAMES)

    def map(self, change: Callable[[Tensor], Tensor]) -> Arrays:
        """The same weight with every array changed."""
        arrays = (None if array is None else change(array) for array in self.tensors())
        return Arrays(*arrays, shape=self.shape, options=self.options)  # type: ignore[arg-type]

    def to(self, device: torch.device, non_blocking: bool = False) -> Arrays:
        """The weight on another device, its codes in the order of that."""
        if device.type != "cpu" and self.codes.dim() == 4:
            rows = replace(self, codes=unpack(self.codes, *self.shape), _int8_weight=None)
            return rows.to(device, non_blocking)
        moved = self.map(lambda array: array.to(device, non_blocking=non_blocking))
        moved.codes = pack(moved.codes)
        return moved

    def rows(self, part: slice) -> Arrays:
        """Some of the output features, in memory of their own."""

        def of_rows(per_output: Tensor | None) -> Tensor | None:
            one_for_all = per_output is None or per_output.shape[0] != self.shape[0]
            return per_output if one_for_all else per_output[part].clone()  # type: ignore[index]

        codes = unpack(self.codes, *self.shape)[part]
        scale, sums = of_rows(self.scale), of_rows(self.code_sums)
        assert scale is not None
        assert sums is not None
        shape = (codes.shape[0], self.shape[1])
        kept = None if self.outlier_weight is None else self.outlier_weight[part].clone()
        return Arrays(
            pack(codes.contiguous()),
            scale,
            sums,
            of_rows(self.zeropoint),
            self.outlier_columns,
            kept,
            shape,
            self.options,
        )

    def take(self, other: Arrays) -> None:
        """Become `other`, for all tensors that share these arrays; where that fits, in the same memory."""
        for name in _NAMES:
            own, new = getattr(self, name), getattr(other, name)
            if own is not None and new is not None and own.shape == new.shape and own.dtype == new.dtype:
                own.copy_(new)
            else:
                setattr(self, name, new if new is None else new.to(self.scale.device, copy=True))
        self.options = other.options
        self._int8_weight = None


class Int8Tensor(torch.Tensor):
    """A weight of a linear layer, held in int8: ``weight ~ (codes + zeropoint) * scale``.

    It has the shape and the dtype of the weight that it replaces, ``[n, k]``, and is to be used like it, also as an
    ``nn.Parameter``. It never requires grad.

    - Products with it (``F.linear``, ``x @ weight.t()``, ``addmm``) are those of ``torch.ops.octavo.linear``, which is
      `octavo.linear`: LLM.int8() with the tensor's `options`.
    - It stays int8 where it is moved, copied, cast, transposed, cut or put together along n, or multiplied by a number.
      A cast changes the dtype that it says it has, and nothing else.
    - Values that are copied into it are quantized.
    - Every other operation computes with the dequantized weight, and warns once, naming the operation. What such an
      operation returns is another tensor: to change that does not change this one.

    Made by `from_float`, `from_int8_weight`, `from_parts`.
    """

    _arrays: Arrays
    _transposed: bool

    @staticmethod
    def __new__(cls, arrays: Arrays | Int8Tensor, dtype: torch.dtype | None = None, transposed: bool = False, **_: Any):  # type: ignore[no-untyped-def] # noqa: D102
        if isinstance(arrays, Int8Tensor):  # as nn.Parameter is called with a tensor
            return arrays.detach()
        shape = arrays.shape[::-1] if transposed else arrays.shape
        assert dtype is not None
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=arrays.scale.device)
        self._arrays = arrays
        self._transposed = transposed
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    # --- making one, and taking it apart ------------------------------------------------------------------------------

    @classmethod
    def from_float(
        cls, weight: Tensor, options: Options = _DEFAULT, outlier_columns: Tensor | Sequence[int] | None = None
    ) -> Int8Tensor:
        """Quantize ``[n, k]``, float32, float16 or bfloat16.

        Args:
            outlier_columns: input features whose original weights are kept; see `octavo.quantize_weight`.

        Raises TypeError or ValueError as `octavo.quantize_weight` does.
        """
        made = octavo.quantize_weight(
            weight.detach(),
            scheme=options.scheme,
            granularity=options.granularity,
            outlier_columns=outlier_columns,
        )
        return cls(Arrays.of(made, options), weight.dtype)

    @classmethod
    def from_int8_weight(cls, weight: Int8Weight, dtype: torch.dtype, options: Options) -> Int8Tensor:
        """The tensor of a weight of PyTorch arrays, whose memory it shares; `dtype` is that of the original weight."""
        if (options.scheme, options.granularity) != (weight.scheme, weight.granularity):
            raise ValueError(
                f"Int8Tensor: options: expected those of the weight, {weight.scheme!r} and {weight.granularity!r}, got "
                f"{options.scheme!r} and {options.granularity!r}"
            )
        return cls(Arrays.of(weight, options), dtype)

    def parts(self) -> dict[str, Tensor]:
        """The tensor as plain ones, as a file holds it.

        Returns:
            codes int8 ``[n, k]`` (also of a transposed weight), scale, where there are such zeropoint, outlier_columns
            and outlier_weight, and options, JSON as uint8.
        """
        dtype = str(self.dtype).removeprefix("torch.")
        return format.disassemble(self.int8_weight, self.options, dtype)

    @classmethod
    def from_parts(
        cls, parts: Mapping[str, Tensor], dtype: torch.dtype | None = None, options: Options | None = None
    ) -> Int8Tensor:
        """The inverse of `parts`; `dtype` and `options` in place of those that the parts name."""
        weight, named, original = format.assemble(parts, "Int8Tensor")
        dtype = dtype or getattr(torch, original or "float32")
        return cls(Arrays.of(weight, options or named), dtype)

    @property
    def int8_weight(self) -> Int8Weight:
        """The weight ``[n, k]`` as `octavo.linear` takes it; it shares the tensor's memory."""
        return self._arrays.int8_weight

    @property
    def options(self) -> Options:
        """What products with this tensor are made with."""
        return self._arrays.options

    @options.setter
    def options(self, options: Options) -> None:
        mine = self._arrays.options
        if (options.scheme, options.granularity) != (mine.scheme, mine.granularity):
            raise ValueError("Int8Tensor: options: scheme and granularity are fixed when a weight is quantized")
        self._arrays.options = options

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:  # type: ignore[override]
        """``(codes + zeropoint) * scale`` with the original values of kept columns, a plain tensor.

        Args:
            dtype: default the tensor's own.
        """
        arrays = self._arrays
        weight = operation.dequantize(
            unpack(arrays.codes, *arrays.shape),
            arrays.scale,
            arrays.zeropoint,
            arrays.outlier_columns,
            arrays.outlier_weight,
            dtype or self.dtype,
        )
        return weight.t() if self._transposed else weight

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.to_dict().items())
        return f"Int8Tensor(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}', {options})"

    # --- copies -------------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Tensor:
        if id(self) in memo:
            return memo[id(self)]  # type: ignore[no-any-return]
        memo[id(self)] = copied = _with_flags(self, self.clone())
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        arrays = self._arrays
        held = {name: getattr(arrays, name) for name in _NAMES}
        is_parameter = getattr(self, "_is_param", False)
        return _rebuild, (held, arrays.shape, self.options.to_dict(), self.dtype, self._transposed, is_parameter)

    def share_memory_(self) -> Int8Tensor:
        """Move the arrays to memory that other processes can read."""
        self._arrays.take(self._arrays.map(torch.Tensor.share_memory_))
        return self

    # --- as PyTorch takes it apart ------------------------------------------------------------------------------------

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        names = [f"_{name}" for name in _NAMES if getattr(self._arrays, name) is not None]
        return names, (self._arrays.shape, self.options, self.dtype, self._transposed)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> Int8Tensor:
        shape, options, dtype, transposed = context
        return Int8Tensor(Arrays(*(inner.get(f"_{name}") for name in _NAMES), shape, options), dtype, transposed)  # type: ignore[arg-type]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handler = _FUNCTIONS.get(func)
        if handler is not None:
            return handler(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = _OPERATIONS.get(func)
        result = NotImplemented if handler is None else handler(*args, **(kwargs or {}))
        return _dequantized(func, args, kwargs or {}) if result is NotImplemented else result


for _name in _NAMES:
    setattr(Int8Tensor, f"_{_name}", property(lambda self, name=_name: getattr(self._arrays, name)))


def _rebuild(
    held: dict[str, Any], shape: tuple[int, int], options: dict[str, Any], dtype: Any, transposed: bool, parameter: bool
) -> Int8Tensor:
    """An Int8Tensor from a pickle."""
    arrays = Arrays(**held, shape=shape, options=Options.from_dict(options))
    if arrays.codes.device.type == "cpu":
        arrays.codes = pack(arrays.codes)
    elif arrays.codes.dim() == 4:
        arrays.codes = unpack(arrays.codes, *shape)
    tensor = Int8Tensor(arrays, dtype, transposed)
    return torch.nn.Parameter(tensor, requires_grad=False) if parameter else tensor  # type: ignore[return-value]


torch.serialization.add_safe_globals([_rebuild])


def _with_flags(source: Tensor, made: Int8Tensor) -> Int8Tensor:
    """`made`, a parameter where `source` is one."""
    if getattr(source, "_is_param", False):
        made._is_param = True  # type: ignore[attr-defined]
    return made


# --- products ---------------------------------------------------------------------------------------------------------


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``."""
    if not isinstance(weight, Int8Tensor) or isinstance(x, Int8Tensor) or isinstance(bias, Int8Tensor):
        return functional.linear(*map(_plain, (x, weight, bias)))
    if weight._transposed:
        return _biased(operation.float_product(x, weight._arrays, transpose=False), bias)
    return operation.linear(x, weight._arrays, bias)


def _biased(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``."""
    if isinstance(a, Int8Tensor) and isinstance(b, Int8Tensor):
        b = _plain(b)
    if isinstance(b, Int8Tensor):
        return _linear(a, b.t())
    return _linear(b.mT, a).mT if b.dim() > 1 else _linear(b, a)  # type: ignore[no-any-return]


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``beta * bias + alpha * (a @ b)``."""
    if isinstance(b, Int8Tensor) and b._transposed and beta == alpha == 1 and bias.shape == b.shape[1:]:
        return _linear(a, b.t(), bias)
    return beta * _plain(bias) + alpha * _matmul(a, b)


# --- what keeps it int8 -----------------------------------------------------------------------------------------------


def _alias(x: Int8Tensor, *_: Any) -> Int8Tensor:
    return Int8Tensor(x._arrays, x.dtype, x._transposed)


def _clone(x: Int8Tensor, **_: Any) -> Int8Tensor:
    return Int8Tensor(x._arrays.map(torch.clone), x.dtype, x._transposed)


def _to_copy(x: Int8Tensor, *, dtype: Any = None, device: Any = None, non_blocking: bool = False, **_: Any) -> Any:
    dtype = dtype or x.dtype
    if not dtype.is_floating_point:
        return NotImplemented
    target = torch.device(device or x.device)
    arrays = x._arrays.map(torch.clone) if target == x.device else x._arrays.to(target, non_blocking)
    return Int8Tensor(arrays, dtype, x._transposed)


def _transpose(x: Int8Tensor, *dims: Any) -> Any:
    order = [dim % 2 for dim in (dims[0] if len(dims) == 1 else dims)]  # permute takes a list, transpose two numbers
    if order in ([0, 0], [1, 1]) or (order == [0, 1] and len(dims) == 1):
        return _alias(x)
    return Int8Tensor(x._arrays, x.dtype, not x._transposed)


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(target, Int8Tensor):
        return target.copy_(source.dequantize(target.dtype))  # type: ignore[attr-defined]
    if isinstance(source, Int8Tensor) and source._transposed == target._transposed:
        target._arrays.take(source._arrays)
        return target
    values = _plain(source).to(target.device, target.dtype).expand(target.shape)
    made = Int8Tensor.from_float(values.t() if target._transposed else values, target.options)
    target._arrays.take(made._arrays)
    return target


def _scale_by(factor: Any, x: Int8Tensor, other: Any) -> Any:
    """``x * other`` or ``x / other`` in place, of a number."""
    if isinstance(other, Tensor) and (other.dim() != 0 or isinstance(other, Int8Tensor)):
        return NotImplemented
    for array in (x._arrays.scale, x._arrays.outlier_weight):
        if array is not None:
            factor(array, other)
    x._arrays._int8_weight = None
    return x


def _scaled(in_place: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, other: in_place(_clone(x), other) if isinstance(x, Int8Tensor) else NotImplemented


def _multiply_(x: Any, other: Any) -> Any:
    return _scale_by(torch.Tensor.mul_, x, other) if isinstance(x, Int8Tensor) else NotImplemented


def _divide_(x: Any, other: Any) -> Any:
    return _scale_by(torch.Tensor.div_, x, other) if isinstance(x, Int8Tensor) else NotImplemented


def _slice(x: Int8Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    if dim % 2 != int(x._transposed) or step != 1:
        return (
            NotImplemented if (start or 0) > 0 or (end is not None and end < x.shape[dim]) or step != 1 else _alias(x)
        )
    part = slice(*slice(start, end).indices(x.shape[dim]))
    if part == slice(0, x.shape[dim], 1):
        return _alias(x)
    return Int8Tensor(x._arrays.rows(part), x.dtype, x._transposed)


def _split(x: Int8Tensor, size: int | Sequence[int], dim: int = 0) -> Any:
    if dim % 2 != int(x._transposed):
        return NotImplemented
    length = x.shape[dim]
    sizes = [min(size, length - start) for start in range(0, length, size)] if isinstance(size, int) else size
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [_slice(x, dim, end - own, end) for own, end in zip(sizes, ends, strict=True)]


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Any:
    first = tensors[0]
    if not all(isinstance(tensor, Int8Tensor) for tensor in tensors) or not isinstance(first, Int8Tensor):
        return NotImplemented
    arrays = [tensor._arrays for tensor in tensors]  # type: ignore[attr-defined]
    alike = all(
        own.options == first.options
        and own.options.granularity == "vector"
        and tensor._transposed == first._transposed  # type: ignore[attr-defined]
        and _same(own.outlier_columns, arrays[0].outlier_columns)
        for tensor, own in zip(tensors, arrays, strict=True)
    )
    if dim % 2 != int(first._transposed) or not alike:
        return NotImplemented

    def joined(name: str) -> Tensor | None:
        each = [getattr(own, name) for own in arrays]
        return None if each[0] is None else torch.cat(each)

    codes = torch.cat([unpack(own.codes, *own.shape) for own in arrays])
    names = ("scale", "code_sums", "zeropoint")
    columns, kept = arrays[0].outlier_columns, joined("outlier_weight")
    whole = Arrays(pack(codes), *map(joined, names), columns, kept, tuple(codes.shape), first.options)  # type: ignore[arg-type]
    return Int8Tensor(whole, first.dtype, first._transposed)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _empty_like(x: Int8Tensor, *, dtype: Any = None, device: Any = None, **_: Any) -> Any:
    arrays = x._arrays.to(torch.device("meta"))
    empty = arrays.map(lambda array: torch.zeros_like(array, device=device or x.device))
    empty.codes = pack(empty.codes)
    return Int8Tensor(empty, dtype or x.dtype, x._transposed)


_OPERATIONS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _alias,
    aten.alias.default: _alias,
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten.t.default: lambda x: Int8Tensor(x._arrays, x.dtype, not x._transposed),
    aten.transpose.int: _transpose,
    aten.permute.default: _transpose,
    aten.copy_.default: _copy,
    aten.mul_.Tensor: _multiply_,
    aten.mul_.Scalar: _multiply_,
    aten.div_.Tensor: _divide_,
    aten.div_.Scalar: _divide_,
    aten.mul.Tensor: _scaled(_multiply_),
    aten.mul.Scalar: _scaled(_multiply_),
    aten.div.Tensor: _scaled(_divide_),
    aten.div.Scalar: _scaled(_divide_),
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.cat.default: _cat,
    aten.empty_like.default: _empty_like,
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten.mm.default: _matmul,
    aten.addmm.default: _addmm,
}

_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    functional.linear: _linear,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    torch.addmm: _addmm,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.Tensor.__rmatmul__: lambda a, b: _matmul(b, a),
    torch.Tensor.mm: _matmul,
    torch.Tensor.addmm: _addmm,
}


# --- everything else --------------------------------------------------------------------------------------------------

_warned: set[str] = set()


def _plain(value: Any) -> Any:
    return value.dequantize() if isinstance(value, Int8Tensor) else value


def _dequantized(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`func` of the dequantized weights; one that it writes to is quantized again."""
    name = str(func)
    if name not in _warned:
        _warned.add(name)
        warnings.warn(
            f"octavo: {name} is not known to Int8Tensor: it is computed with a dequantized copy of the weight",
            stacklevel=3,
        )
    written: list[tuple[Int8Tensor, Tensor]] = []

    def plain(argument: Any, value: Any) -> Any:
        def one(leaf: Any) -> Any:
            if not isinstance(leaf, Int8Tensor):
                return leaf
            values = leaf.dequantize()
            if argument.alias_info is not None and argument.alias_info.is_write:
                written.append((leaf, values))
            return values

        return tree_map(one, value)

    declared = {argument.name: argument for argument in func._schema.arguments}
    positional = [plain(argument, value) for argument, value in zip(declared.values(), args, strict=False)]
    named = {key: plain(declared[key], value) for key, value in kwargs.items()}
    result = func(*positional, **named)
    for tensor, values in written:
        _copy(tensor, values)
        result = tensor if result is values else result
    return result


assert {field.name for field in fields(Arrays)} >= set(_NAMES)
