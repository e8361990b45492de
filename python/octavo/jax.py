"""octavo in JAX: the same core inside and outside of ``jax.jit``, through XLA's foreign function interface.

``weight = octavo.jax.quantize_weight(w)`` and ``octavo.jax.linear(x, weight)`` work eagerly, under ``jit``, ``vmap``,
``grad`` and ``shard_map``. A weight is a pytree: a model's parameters may hold it.

Under ``vmap`` each example is a call of its own: with the policy "columns" its outliers are looked for in it alone.
Sharded by the compiler itself (``jit`` without ``shard_map``), an operation is computed whole on each device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

import octavo
from octavo import _core
from octavo._text import unexpected
from octavo._types import rotated_size
from octavo.options import WEIGHT_OPTIONS, Options
from octavo.weight import ARRAYS

__all__ = ["Int8Weight", "find_outliers", "int8_matmul", "linear", "linear_backward", "linear_many", "quantize_weight"]

for _platform, _targets in _core.jax_targets().items():
    for _name, _target in _targets.items():
        jax.ffi.register_ffi_target(_name, _target, platform=_platform)

_FLOATS = (jnp.float32, jnp.float16, jnp.bfloat16)


@partial(jax.tree_util.register_dataclass, data_fields=list(ARRAYS), meta_fields=["in_features", "options"])
@dataclass(frozen=True)
class Int8Weight:
    """A weight ``[n, k]`` as int8 codes, ``weight ~ (codes + zeropoint) * scale``, and a pytree of arrays.

    Attributes:
        codes: int8: ``[n, k']``, or, on the CPU, in packed order ``[ceil(n / 16), ceil(k' / 64) * 16, 16, 4]``; see
            `octavo.Int8Weight`.
        scale, code_sums, zeropoint, outlier_columns, outlier_weight: as there.
        in_features: k.
        options: what the weight was quantized with, and what `linear` runs with unless told otherwise.
    """

    codes: Array
    scale: Array
    code_sums: Array
    zeropoint: Array | None = None
    outlier_columns: Array | None = None
    outlier_weight: Array | None = None
    in_features: int = 0
    options: Options = field(default_factory=Options)

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, k)``."""
        return self.code_sums.shape[0], self.in_features

    @classmethod
    def from_int8_weight(cls, weight: octavo.Int8Weight, options: Options | None = None) -> Int8Weight:
        """The same weight from one of `octavo`, in JAX's memory."""
        own: dict[str, Any] = {name: getattr(weight, name) for name in WEIGHT_OPTIONS}
        arrays = {name: None if array is None else jnp.asarray(array) for name, array in weight._arrays().items()}
        return cls(**arrays, in_features=weight.shape[1], options=replace(options or Options(), **own))

    def specs(self, axis: str) -> Int8Weight:
        """How `shard_map` divides the weight by output features: a pytree of PartitionSpecs.

        Args:
            axis: name of the mesh's axis. n must be a multiple of 16 times its size.
        """
        rows, whole = PartitionSpec(axis), PartitionSpec()
        of_scale = rows if self.options.granularity == "vector" else whole
        others = {"scale": of_scale, "zeropoint": of_scale, "outlier_columns": whole}
        specs: dict[str, Any] = {**dict.fromkeys(ARRAYS, rows), **others}
        return replace(self, **{name: own for name, own in specs.items() if getattr(self, name) is not None})

    def dequantize(self) -> Array:
        """``(codes + zeropoint) * scale``, float32 ``[n, k]``, rotated back. Kept outlier columns are not put in."""
        result = [jax.ShapeDtypeStruct(self.shape, jnp.float32)]
        (values,) = _weight_call("octavo_dequantize", result, [self], self.options)
        return values


def quantize_weight(
    weight: Array, *, options: Options | None = None, outlier_columns: Array | None = None
) -> Int8Weight:
    """`octavo.quantize_weight` of ``[n, k]``, the transpose of a Flax kernel. `outlier_columns` are int32 ``[r]``."""
    options = options or Options()
    weight = _array("quantize_weight", "weight", weight, _FLOATS)
    if weight.ndim != 2:
        raise ValueError(f"quantize_weight: weight: expected two dimensions, got {weight.ndim}")
    n, k = weight.shape
    width = rotated_size(k, options.rotation)
    packed = (-(-n // 16), -(-width // 64) * 16, 16, 4)
    scales = jax.ShapeDtypeStruct((n if options.granularity == "vector" else 1,), jnp.float32)
    results = [
        jax.ShapeDtypeStruct(packed if jax.default_backend() == "cpu" else (n, width), jnp.int8),
        scales,
        jax.ShapeDtypeStruct((n,), jnp.int32),
        *([scales] if options.scheme == "zeropoint" else []),
    ]
    made = dict(zip(ARRAYS, _call("octavo_quantize_weight", results, weight, options=options.text), strict=False))
    if outlier_columns is not None:
        columns = jnp.sort(_array("quantize_weight", "outlier_columns", outlier_columns, (jnp.int32,)))
        made |= {"outlier_columns": columns, "outlier_weight": weight[:, columns]}
    return Int8Weight(**made, in_features=k, options=options)


def linear(x: Array, weight: Int8Weight, bias: Array | None = None, *, options: Options | None = None) -> Array:
    """`octavo.linear`, ``[..., k]`` -> ``[..., n]`` in the dtype of x. Differentiable in x and bias.

    `options` are what to run with, by default the weight's; scheme, granularity and rotation must be the weight's.
    Raises TypeError or ValueError for arguments that do not fit each other.
    """
    return _checked("linear", x, [weight], [bias], options)[0]


def linear_many(
    x: Array,
    weights: Sequence[Int8Weight],
    biases: Sequence[Array | None] | None = None,
    *,
    options: Options | None = None,
) -> list[Array]:
    """`octavo.linear_many` in one operation: `linear` of one x for several weights, all with the same options.

    `biases`: for each weight ``[n_i]`` or None; default: none. Returns for each ``[..., n_i]``.
    """
    biases = [None] * len(weights) if biases is None else list(biases)
    if len(biases) != len(weights):
        raise unexpected("linear_many: biases", f"{len(weights)} of them, as of weights", len(biases))
    return _checked("linear_many", x, list(weights), biases, options) if weights else []


def _checked(
    function: str, x: Array, weights: list[Int8Weight], biases: list[Array | None], options: Options | None
) -> list[Array]:
    options = options or weights[0].options
    x = _array(function, "x", x, _FLOATS)
    for weight in weights:
        if options.of_weight != weight.options.of_weight:
            of_weight = f"{', '.join(WEIGHT_OPTIONS)} of the weight, {weight.options}"
            raise unexpected(f"{function}: options", of_weight, options)
        _, k = weight.shape
        if x.ndim == 0 or x.shape[-1] != k:
            raise ValueError(f"{function}: x: expected k = {k} columns, got shape {x.shape}")
    y: list[Array] = _linear(options, x, weights, biases)
    return y


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(options: Options, x: Array, weights: list[Int8Weight], biases: list[Array | None]) -> list[Array]:
    results = [jax.ShapeDtypeStruct((*x.shape[:-1], weight.shape[0]), x.dtype) for weight in weights]
    return _weight_call("octavo_linear", results, weights, options, x, biases=biases)


def _forward(options: Options, x: Array, weights: list[Int8Weight], biases: list[Array | None]) -> tuple[Any, Any]:
    return _linear(options, x, weights, biases), (weights, biases)


def _backward(options: Options, held: Any, grads: list[Array]) -> tuple[Array, None, list[Array | None]]:
    weights, biases = held
    of_x = [linear_backward(grad, weight, options=options) for grad, weight in zip(grads, weights, strict=True)]
    of_biases = [
        None if bias is None else grad.sum(tuple(range(grad.ndim - 1))).astype(bias.dtype)
        for grad, bias in zip(grads, biases, strict=True)
    ]
    return sum(of_x[1:], of_x[0]), None, of_biases


_linear.defvjp(_forward, _backward)


def linear_backward(grad: Array, weight: Int8Weight, *, options: Options | None = None) -> Array:
    """The gradient of `linear` with respect to x: ``grad W`` in float32 sums, W dequantized with its kept columns.

    ``[..., n]`` -> ``[..., k]`` in the dtype of grad. `options` are what the product ran with.
    """
    grad = _array("linear_backward", "grad", grad, _FLOATS)
    result = [jax.ShapeDtypeStruct((*grad.shape[:-1], weight.in_features), grad.dtype)]
    (of_x,) = _weight_call("octavo_linear_backward", result, [weight], options or weight.options, grad)
    return of_x


def find_outliers(x: Array, *, options: Options | None = None, size: int | None = None) -> Array:
    """`octavo.find_outliers`: the outlier columns of x ``[..., k]``, int32, ascending, by threshold, relative and cap.

    `size`: how many to return, as for ``jnp.nonzero``: the rest is k. Under ``jit`` it must be given.
    """
    x = _array("find_outliers", "x", x, _FLOATS)
    k = x.shape[-1]
    results = [jax.ShapeDtypeStruct((k,), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)]
    columns, count = _call("octavo_find_outliers", results, x, options=(options or Options()).text)
    if size is None:
        return columns[: int(count[0])]
    columns = jnp.where(jnp.arange(k) < count[0], columns, k)
    return jnp.pad(columns, (0, max(size - k, 0)), constant_values=k)[:size]


def int8_matmul(a: Array, b: Array) -> Array:
    """The exact product ``a b^T`` of int8 ``[..., k]`` and ``[n, k]``, int32 ``[..., n]``."""
    a, b = (_array("int8_matmul", name, array, (jnp.int8,)) for name, array in (("a", a), ("b", b)))
    if a.ndim == 0 or b.ndim != 2 or a.shape[-1] != b.shape[-1]:
        raise ValueError(f"int8_matmul: b: expected [n, k] with the k of a {a.shape}, got {b.shape}")
    return _call("octavo_int8_matmul", jax.ShapeDtypeStruct((*a.shape[:-1], b.shape[0]), jnp.int32), a, b)


def _call(target: str, results: Any, *arrays: Array, **attributes: Any) -> Any:
    return jax.ffi.ffi_call(target, results, vmap_method="sequential")(*arrays, **attributes)


def _weight_call(
    target: str,
    results: Any,
    weights: Sequence[Int8Weight],
    options: Options,
    *arrays: Array,
    biases: Sequence[Array | None] = (None,),
) -> list[Array]:
    """An operation whose last arguments are the arrays of weights and their biases; letters say which there are."""
    words = []
    for weight, bias in zip(weights, biases, strict=True):
        optional = {"z": [weight.zeropoint], "o": [weight.outlier_columns, weight.outlier_weight], "b": [bias]}
        given = {letter: own for letter, own in optional.items() if own[0] is not None}
        arrays += (weight.codes, weight.scale, weight.code_sums, *(each for own in given.values() for each in own))
        words.append(("p" if weight.codes.ndim == 4 else "") + "".join(given))
    attributes = {"options": options.text, "weight": ",".join(words), "in_features": np.int64(weights[0].in_features)}
    made: list[Array] = _call(target, results, *arrays, **attributes)
    return made


def _array(function: str, name: str, given: Any, dtypes: tuple[Any, ...]) -> Array:
    if not hasattr(given, "dtype") or given.dtype not in dtypes:
        names = ", ".join(jnp.dtype(dtype).name for dtype in dtypes)
        got = getattr(given, "dtype", type(given).__name__)
        raise TypeError(f"{function}: {name}: expected an array of {names}, got {got}")
    return jnp.asarray(given)
