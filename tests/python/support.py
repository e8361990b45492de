"""What the tests share: backends (which framework and device an array lives on), views, and generated data."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import octavo
import reference as ref
from hypothesis import strategies as st

Array = npt.NDArray[Any]
HAS_TORCH: Final = importlib.util.find_spec("torch") is not None
HAS_CUPY: Final = importlib.util.find_spec("cupy") is not None  # or the stand-in of tests/simt/python


def _torch() -> Any:
    import torch

    return torch


@dataclass(frozen=True)
class Backend:
    """A framework on a device. Makes native arrays from values, and values from native arrays."""

    framework: str
    device: str = "cpu"

    @property
    def name(self) -> str:
        return self.framework if self.framework == "numpy" else f"{self.framework}-{self.device}"

    @property
    def on_numpy(self) -> bool:
        """Whether arrays have NumPy's interface: views of any stride, dtypes of NumPy."""
        return self.framework in {"numpy", "cupy"}

    @property
    def dtypes(self) -> tuple[str, ...]:
        return ref.DTYPES if self.framework == "torch" else ("float32", "float16")

    @property
    def missing(self) -> str | None:
        """Why this backend cannot be tested here, or None."""
        if self.framework == "torch" and not HAS_TORCH:
            return "torch is not installed"
        if self.framework == "cupy" and not HAS_CUPY:
            return "CuPy is not installed"
        if self.device not in octavo.info()["backends"]:
            return str(octavo.info()[self.device]["missing"])
        if self.framework == "torch" and self.device == "cuda" and not _torch().cuda.is_available():
            return "no GPU for PyTorch: torch.cuda.is_available() is False"
        return None

    def dtype(self, name: str) -> Any:
        """The framework's dtype object."""
        return getattr(_torch() if self.framework == "torch" else np, name)

    def device_array(self, values: Array) -> Any:
        """A NumPy array's values as CuPy has them."""
        import cupy  # type: ignore[import-not-found]

        return cupy.asarray(values)

    def array(self, values: Array, dtype: str | None = None) -> Any:
        """A fresh native array. Floats must be exact in `dtype` (default: the dtype of `values`)."""
        name = dtype or values.dtype.name
        if name in ref.DTYPES:
            values = np.asarray(values, np.float32)
            assert np.array_equal(ref.round_to(values, name), values, equal_nan=True), f"not {name} values"
        if name == "bfloat16":
            torch = _torch()
            bits = ref.float32_to_bfloat16(values).reshape(values.shape).view(np.int16)
            return torch.from_numpy(bits.copy()).view(torch.bfloat16).clone().to(self.device)  # clone: not a view
        native = np.array(values, dtype=name, order="C", copy=True)
        if self.framework == "cupy":
            return self.device_array(native)
        return _torch().from_numpy(native).to(self.device) if self.framework == "torch" else native

    def as_strided(self, array: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
        """A view of the array's memory, with strides in elements."""
        if self.framework == "torch":
            return array.as_strided(shape, strides)
        tricks = np.lib.stride_tricks
        if self.framework == "cupy":
            import cupy

            tricks = cupy.lib.stride_tricks
        return tricks.as_strided(array, shape, tuple(array.itemsize * stride for stride in strides))

    def broadcast(self, array: Any, shape: tuple[int, ...]) -> Any:
        """A view with strides of zero."""
        if self.framework == "torch":
            return array.expand(shape)
        if self.framework == "cupy":
            import cupy

            return cupy.broadcast_to(array, shape)
        return np.broadcast_to(array, shape)

    def host(self, array: Any) -> Array:
        """The values of a native array: floats as float32, integers as they are."""
        if self.framework == "torch":
            torch = _torch()
            assert isinstance(array, torch.Tensor), f"expected a torch.Tensor, got {type(array)}"
            assert array.device.type == self.device, f"expected device {self.device}, got {array.device}"
            array = array.detach().cpu()
            if array.dtype == torch.bfloat16:
                bits = array.contiguous().view(torch.int16).numpy().view(np.uint16)
                return ref.bfloat16_to_float32(bits)
            array = array.numpy()
        if self.framework == "cupy":
            import cupy

            assert isinstance(array, cupy.ndarray), f"expected a cupy.ndarray, got {type(array)}"
            array = array.get()
        assert isinstance(array, np.ndarray), f"expected a numpy.ndarray, got {type(array)}"
        return np.array(array, dtype=np.float32 if array.dtype.kind == "f" else array.dtype, order="C")

    def dtype_name(self, array: Any) -> str:
        return str(array.dtype).removeprefix("torch.")

    def weight(self, weight: Any) -> ref.Weight:
        """The oracle's weight with what an octavo.Int8Weight holds."""

        def values(array: Any) -> Array | None:
            return None if array is None else self.host(array)

        codes, scale = self.host(weight.codes), self.host(weight.scale)
        kept = values(weight.outlier_columns), values(weight.outlier_weight)
        return ref.Weight(codes, scale, values(weight.zeropoint), *kept)


NUMPY: Final = Backend("numpy")
TORCH: Final = Backend("torch")
CUDA: Final = Backend("torch", "cuda")
CUPY: Final = Backend("cupy", "cuda")
ALL_BACKENDS: Final = (NUMPY, TORCH, CUDA, CUPY)
BACKENDS: Final = tuple(backend for backend in ALL_BACKENDS if not backend.missing)  # those of this machine


@dataclass(frozen=True)
class Typed:
    """A backend and a float dtype it has."""

    backend: Backend
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.backend.name}-{self.dtype}"

    def array(self, values: Array) -> Any:
        return self.backend.array(np.asarray(values, np.float32), self.dtype)

    def host(self, array: Any) -> Array:
        return self.backend.host(array)

    def round(self, values: Any) -> ref.Floats:
        return ref.round_to(np.asarray(values), self.dtype)


# Each kernel once: on the CPU, bfloat16 alone needs torch; what else torch's arrays take is the same code.
TYPED: Final = tuple(
    Typed(backend, dtype) for backend in BACKENDS for dtype in (("bfloat16",) if backend == TORCH else backend.dtypes)
)


# ---------------------------------------------------------------------------------------------------------------
# Views: the same values, laid out otherwise. Padding is NaN (77 in integers), so that reading it shows.


def _buffer(backend: Backend, like: Any, shape: tuple[int, ...]) -> Any:
    name = backend.dtype_name(like)
    floating = name in ref.DTYPES
    fill = np.full(shape, np.nan if floating else 77, np.float32 if floating else name)
    return backend.array(fill, name)


def _sliced(grow: Callable[[int], int], index: slice, axis: int) -> Callable[[Backend, Any], Any]:
    def view(backend: Backend, x: Any) -> Any:
        shape = list(x.shape)
        shape[axis] = grow(shape[axis])
        where: list[Any] = [slice(None)] * len(shape)
        where[axis] = index
        out = _buffer(backend, x, tuple(shape))[tuple(where)]
        out[...] = x
        return out

    return view


def _permuted(backend: Backend, x: Any) -> Any:
    buffer = _buffer(backend, x, tuple(x.shape)[::-1])
    out = buffer.permute(*reversed(range(len(x.shape)))) if backend.framework == "torch" else buffer.T
    out[...] = x
    return out


def _offset(backend: Backend, x: Any) -> Any:
    size = int(np.prod(tuple(x.shape)))
    out = _buffer(backend, x, (size + 3,))[3:].reshape(tuple(x.shape))  # a view, off its alignment
    out[...] = x
    return out


VIEWS: Final[dict[str, Callable[[Backend, Any], Any]]] = {
    "padded rows": _sliced(lambda k: k + 5, slice(0, -5), -1),
    "columns from 1": _sliced(lambda k: k + 1, slice(1, None), -1),
    "every second column": _sliced(lambda k: 2 * k, slice(0, None, 2), -1),
    "every third row": _sliced(lambda m: 3 * m, slice(0, None, 3), 0),
    "transposed": _permuted,
    "offset": _offset,
    "columns reversed": _sliced(lambda k: k, slice(None, None, -1), -1),
    "rows reversed": _sliced(lambda m: m, slice(None, None, -1), 0),
}


def views(backend: Backend) -> tuple[str, ...]:
    """The views a framework can express: torch has no negative strides."""
    return tuple(v for v in VIEWS if backend.on_numpy or "reversed" not in v)


@contextlib.contextmanager
def unchanged(backend: Backend, *arrays: Any) -> Iterator[None]:
    """Assert that the values of `arrays` are afterwards what they were before."""
    given = [a for a in arrays if a is not None]
    before = [backend.host(a) for a in given]
    yield
    for array, values in zip(given, before, strict=True):
        np.testing.assert_array_equal(backend.host(array), values, err_msg="an input was modified")


def equal(a: Array, b: Array, case: str = "") -> None:
    """Assert that shapes, dtypes and values are the same; NaN equals NaN. `case` is what a failure names."""
    assert a.dtype == b.dtype, (case, a.dtype, b.dtype)
    np.testing.assert_array_equal(a, b, case, strict=True)


def names(error: BaseException, prefix: str) -> None:
    """Assert the house's form of messages, "<function>: <argument>: expected ..., got ..."; `prefix` is a pattern."""
    form = rf"^{prefix}: expected .+, got .+"
    assert re.match(form, str(error), re.DOTALL), f"{str(error)!r} does not match {form!r}"


# ---------------------------------------------------------------------------------------------------------------
# Generated data

# 1, primes, multiples and non-multiples of 4 and 16, either side of a vector register and of a cache tile.
SIZES: Final = (1, 2, 3, 4, 5, 7, 8, 13, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 97, 127, 128, 131)
MAX: Final = {"float32": 3.4028234663852886e38, "float16": 65504.0, "bfloat16": 3.3895313892515355e38}
SMALLEST: Final = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}


def _with_outliers(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    x = rng.normal(size=shape)
    if x.size:
        columns = rng.choice(shape[-1], size=1 + shape[-1] // 16, replace=False)
        x[..., columns] *= 20
    return x


def _zero_rows(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    return rng.normal(size=shape) * rng.integers(0, 2, size=(*shape[:-1], 1))


def _nonfinite(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    x = rng.normal(size=shape)
    bad = rng.random(shape) < 0.5 / max(1, shape[-1])  # about every second row
    return np.where(bad, rng.choice([np.nan, np.inf, -np.inf], size=shape), x)


def _steps(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    # Halves with a largest element of 127: every quotient is a tie or an integer.
    x = rng.integers(-254, 255, size=shape) / 2
    x[..., :1] = 127
    return x


KINDS: Final[dict[str, Callable[[np.random.Generator, tuple[int, ...], str], Array]]] = {
    "normal": lambda rng, shape, _: rng.normal(size=shape),
    "outliers": _with_outliers,
    "zero rows": _zero_rows,
    "zeros": lambda rng, shape, _: np.zeros(shape) * rng.choice([-1, 1], size=shape),
    "positive": lambda rng, shape, _: np.abs(rng.normal(size=shape)) + 3,
    "relu": lambda rng, shape, _: np.maximum(rng.normal(size=shape) - 1, 0),
    "constant rows": lambda rng, shape, _: np.broadcast_to(rng.normal(size=(*shape[:-1], 1)), shape),
    "narrow": lambda rng, shape, _: 100 + rng.random(shape),
    "threshold": lambda rng, shape, dtype: rng.choice(around(6.0, dtype), size=shape),
    "ties": _steps,
    "tiny": lambda rng, shape, dtype: rng.integers(-300, 301, size=shape) * SMALLEST[dtype],
    "huge": lambda rng, shape, dtype: rng.uniform(-1, 1, size=shape) * MAX[dtype],
    "wide": lambda rng, shape, dtype: rng.normal(size=shape) * 2.0 ** rng.integers(-14, 13, size=shape),
    "nonfinite": _nonfinite,
}
FINITE_KINDS: Final = tuple(kind for kind in KINDS if kind != "nonfinite")


EPSILON: Final = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}  # one ulp of 1


def around(value: float, dtype: str) -> Array:
    """Plus and minus `value`, its two neighbors in `dtype`, and 0.5."""
    ulp = 2.0 ** np.floor(np.log2(value)) * EPSILON[dtype]
    return np.array([sign * v for sign in (1, -1) for v in (value, value - ulp, value + ulp, 0.5)])


def make(kind: str, shape: tuple[int, ...], dtype: str, seed: int = 0) -> ref.Floats:
    """Values of one kind, exact in `dtype`. Only "nonfinite" has NaN or Inf."""
    values = KINDS[kind](np.random.default_rng([seed, *kind.encode()]), shape, dtype)
    values = ref.round_to(values, dtype)
    return values if kind == "nonfinite" else np.clip(values, np.float32(-MAX[dtype]), np.float32(MAX[dtype]))


sizes: Final = st.sampled_from(SIZES)
seeds: Final = st.integers(0, 2**32 - 1)
kinds: Final = st.sampled_from(tuple(KINDS))
finite_kinds: Final = st.sampled_from(FINITE_KINDS)

DTYPES_16: Final = ("float16", "bfloat16")


def values_16(dtype: str) -> ref.Floats:
    """All positive finite values of a 16-bit float, ascending: 31743 for float16, 32639 for bfloat16."""
    if dtype == "float16":
        return np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    return ref.bfloat16_to_float32(np.arange(1, 0x7F80, dtype=np.uint16))
