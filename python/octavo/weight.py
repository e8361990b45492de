"""An int8 weight: codes, scales and, where calibrated, the original values of its outlier columns."""

from __future__ import annotations

from collections.abc import Callable
from operator import index
from typing import Any

from octavo import _core
from octavo._text import expect
from octavo._types import Array, Granularity, Scheme, dtype_name, rotated_size, shape_of
from octavo.options import WEIGHT_OPTIONS, options_of

# All that a weight consists of, in the order in which the operations take them.
ARRAYS = ("codes", "scale", "code_sums", "zeropoint", "outlier_columns", "outlier_weight")


class Int8Weight:
    """A weight ``[n, k]`` as int8 codes, ``weight ~ (codes + zeropoint) * scale``. Made by `octavo.quantize_weight`.

    With `rotation` (see `octavo.quantize`) the codes are those of the rotated weight; there are ``k'`` in a row, k up
    to whole blocks of it. Without, ``k' = k``. In CPU memory the codes are kept in the order that its instructions
    read, and only so.

    Attributes:
        shape: ``(n, k)``: output and input features.
        codes: int8 ``[n, k']``; a new array at each access where the weight is packed.
        is_packed: whether it is.
        packed: int8 ``[ceil(n / 16), ceil(k' / 64) * 16, 16, 4]``, entry ``[i, g, j, d]`` being code
            ``[16 * i + j, 4 * g + d]``, zeros beyond n and k'; None where the weight is not packed.
        scale: float32, ``[n]`` for granularity "vector", else ``[1]``.
        zeropoint: float32 with integral values, shaped as `scale`; None for scheme "absmax".
        outlier_columns: int32 ``[r]``, ascending: the columns whose original values are kept; None if not calibrated.
        outlier_weight: ``[n, r]`` in the dtype of the original weight; None if not calibrated.
        code_sums: int32 ``[n]``, the sums of each row's codes, which the products need; made from `codes` if not given.
        scheme: "absmax" or "zeropoint".
        granularity: "tensor", "row" or "vector"; it names the product (see `octavo.quantize_weight`).
        rotation: 0, 16, 64 or 256.

    All arrays belong to one framework and device and are not to be changed: what the products need of them is read
    once, here. Codes in CPU memory are packed into an array of the weight's own, unless `pack` is false: then products
    pack them each time. Codes that are packed already are given with their `shape` ``(n, k)`` and their `code_sums`,
    and stay shared. A `shape` is also needed where ``k'`` is not k. Raises TypeError or ValueError naming the argument
    where the arrays do not fit each other.
    """

    __slots__ = ("_codes", "_native", "is_packed", "shape", *ARRAYS[1:], *WEIGHT_OPTIONS)

    def __init__(
        self,
        codes: Array,
        scale: Array,
        *,
        zeropoint: Array | None = None,
        outlier_columns: Array | None = None,
        outlier_weight: Array | None = None,
        code_sums: Array | None = None,
        scheme: Scheme = "absmax",
        granularity: Granularity = "vector",
        rotation: int = 0,
        shape: tuple[int, int] | None = None,
        pack: bool = True,
    ) -> None:
        options = options_of("Int8Weight", scheme=scheme, granularity=granularity, rotation=rotation)
        expect("Int8Weight: pack", pack, bool, "a bool")
        if shape is not None:
            shape = _extents(shape)

        def native(codes: Array, code_sums: Array | None) -> _core.Weight:
            kept = (outlier_columns, outlier_weight)
            return _core.Weight(codes, shape, scale, zeropoint, code_sums, *kept, options._native)

        self._native = native(codes, code_sums)
        self.code_sums = self._native.code_sums
        self.is_packed = shape is not None and len(shape_of(codes)) != 2
        if shape is None:
            n, k = shape_of(codes)
            shape = n, k
        if pack and not self.is_packed and self._native.is_on_cpu:
            codes = _core.pack(codes)
            self._native = native(codes, self.code_sums)
            self.is_packed = True
        self._codes = codes
        self.shape = shape
        self.scale = scale
        self.zeropoint = zeropoint
        self.outlier_columns = outlier_columns
        self.outlier_weight = outlier_weight
        self.scheme: Scheme = scheme
        self.granularity: Granularity = granularity
        self.rotation = rotation

    @property
    def codes(self) -> Array:
        """int8 ``[n, k']``; a new array at each access where the weight is packed."""
        n, k = self.shape
        return _core.unpack(self._codes, n, rotated_size(k, self.rotation)) if self.is_packed else self._codes

    @property
    def packed(self) -> Array | None:
        """The codes in packed order, or None."""
        return self._codes if self.is_packed else None

    @property
    def device(self) -> Any:
        """Where the arrays are, as their framework names it."""
        return self.scale.device

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays that are held."""
        return sum(int(array.nbytes) for array in self._arrays().values() if array is not None)

    def _arrays(self) -> dict[str, Any]:
        """Those that are held, by the names of `ARRAYS`: packed codes as they are."""
        return {"codes": self._codes, **{name: getattr(self, name) for name in ARRAYS[1:]}}

    def _arguments(self, change: Callable[[Array], Array] = lambda array: array) -> dict[str, Any]:
        """Those that make this weight, by name, the arrays changed."""
        arrays = {**self._arrays(), "codes": self.codes}
        changed = {name: None if array is None else change(array) for name, array in arrays.items()}
        return {**changed, **{name: getattr(self, name) for name in (*WEIGHT_OPTIONS, "shape")}}

    def dequantize(self, dtype: Any = None) -> Array:
        """``(codes + zeropoint) * scale``, ``[n, k]`` in `dtype` (float32, float16 or bfloat16; default float32).

        With `rotation`, rotated back. Kept outlier columns are not put in.
        """
        return _core.dequantize(self.codes, self.scale, self.zeropoint, self.rotation, self.shape[1], dtype_name(dtype))

    def to(self, device: Any) -> Int8Weight:
        """The weight on another device of its framework; itself where it is there already."""

        def move(array: Array) -> Array:
            # PyTorch; the array API standard's name
            return array.to(device) if hasattr(array, "to") else array.to_device(device)

        return self if move(self.scale) is self.scale else Int8Weight(**self._arguments(move))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._arguments(),)

    def __repr__(self) -> str:
        kept = "" if self.outlier_columns is None else f", {len(self.outlier_columns)} columns kept"
        rotated = f", rotation={self.rotation}" if self.rotation else ""
        return (
            f"Int8Weight(shape={self.shape}, scheme={self.scheme!r}, granularity={self.granularity!r}{rotated}{kept})"
        )


def _extents(shape: Any) -> tuple[int, int]:
    """`shape` as two integers that the core can hold."""
    try:
        n, k = (index(extent) for extent in shape)
    except Exception:  # of whatever kind an object that is no shape raises
        raise TypeError(f"Int8Weight: shape: expected two integers, got {shape!r:.99}") from None
    if not 0 <= min(n, k) <= max(n, k) < 1 << 62:
        raise ValueError(f"Int8Weight: shape: expected extents from 0 to 2^62, got {(n, k)}")
    return n, k


def _rebuild(arguments: dict[str, Any]) -> Int8Weight:
    """From a pickle, which has no keywords."""
    return Int8Weight(**arguments)
