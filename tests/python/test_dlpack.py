"""Arrays of any framework, in and out over DLPack; and producers that lie."""

from __future__ import annotations

import ctypes
import importlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import octavo
import pytest

ROOT = Path(__file__).resolve().parents[2]

# What octavo reads or writes: (struct, field). The standard's names.
FIELDS = [
    ("DLPackVersion", "minor"),
    ("DLDevice", "device_id"),
    ("DLDataType", "lanes"),
    *[("DLTensor", field) for field in ("data", "device", "ndim", "dtype", "shape", "strides", "byte_offset")],
    *[("DLManagedTensor", field) for field in ("dl_tensor", "manager_ctx", "deleter")],
    *[("DLManagedTensorVersioned", field) for field in ("version", "manager_ctx", "deleter", "flags", "dl_tensor")],
    *[
        ("DLPackExchangeAPI", field)
        for field in (
            "header",
            "managed_tensor_from_py_object_no_sync",
            "managed_tensor_to_py_object_no_sync",
            "dltensor_from_py_object_no_sync",
            "current_work_stream",
        )
    ],
]


def layout(compiler: str, header: Path, folder: Path) -> str:
    """Sizes and offsets of the structs that `header` declares, as a compiled program prints them."""
    lines = [f'std::printf("{s} %zu\\n", sizeof({s}));' for s in dict.fromkeys(s for s, _ in FIELDS)]
    lines += [f'std::printf("{s}.{f} %zu\\n", offsetof({s}, {f}));' for s, f in FIELDS]
    source = folder / "layout.cpp"
    source.write_text(
        f'#include "{header}"\n#include <cstddef>\n#include <cstdio>\nint main() {{ {" ".join(lines)} }}\n'
    )
    program = folder / "layout"
    subprocess.run([compiler, "-std=c++20", str(source), "-o", str(program)], check=True)
    return subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout


def test_structs_match_the_standard_header(tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler on the path")
    tvm_ffi = pytest.importorskip("tvm_ffi", reason="apache-tvm-ffi, which carries the header, is not installed")
    standard = next(Path(tvm_ffi.__file__).parent.rglob("include/dlpack/dlpack.h"))
    ours = layout(compiler, ROOT / "bindings" / "dlpack.hpp", tmp_path)
    assert ours.count("\n") > len(FIELDS)
    assert ours == layout(compiler, standard, tmp_path)


X = np.array([[1.0, -2.0, 7.0, 0.5], [0.0, 3.0, -9.0, 1.5], [2.0, 0.25, 0.5, -4.0]], np.float32)
W = np.array([[1.0, 2.0, 3.0, 4.0], [-1.0, 0.5, 0.25, 2.0]], np.float32)


class Producer:
    """An array of no known framework: DLPack and nothing else, of version 1 or of before."""

    def __init__(self, array: Any, *, legacy: bool = False) -> None:
        self._array, self._legacy = array, legacy

    def __dlpack__(self, **options: Any) -> Any:
        if self._legacy and options:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        device: tuple[int, int] = self._array.__dlpack_device__()
        return device


def own(framework: str) -> tuple[Callable[[np.ndarray[Any, Any]], Any], type]:
    """How a framework makes an array of NumPy's, and the type that results have."""
    module = importlib.import_module(framework.split()[0])
    if framework == "jax":
        return module.numpy.asarray, module.Array
    if framework == "tensorflow":
        return module.constant, module.Tensor
    if framework == "paddle":
        return module.to_tensor, module.Tensor
    if framework == "tvm_ffi":
        return module.from_dlpack, module.Tensor
    if framework == "pyarrow":
        return module.Tensor.from_numpy, octavo.DLPackArray
    return module.from_numpy, module.Tensor


@pytest.mark.parametrize("framework", ["jax", "tensorflow", "paddle", "tvm_ffi", "pyarrow", "torch"])
def test_frameworks(framework: str) -> None:
    pytest.importorskip(framework, reason=f"{framework} is not installed")
    make, kind = own(framework)
    weight = octavo.quantize_weight(make(W), outlier_columns=[2])
    expected = octavo.linear(X, octavo.quantize_weight(W, outlier_columns=[2]), W[:, 0].copy())
    y = octavo.linear(make(X), weight, make(W[:, 0].copy()))
    for array in (y, weight.codes, weight.scale, weight.outlier_weight, octavo.find_outliers(make(X))):
        assert isinstance(array, kind)
    np.testing.assert_array_equal(np.from_dlpack(y), expected)
    np.testing.assert_array_equal(np.from_dlpack(octavo.find_outliers(make(X))), [2])
    np.testing.assert_array_equal(np.from_dlpack(weight.outlier_weight), W[:, [2]])
    codes = octavo.quantize(make(X), exclude=[2])
    np.testing.assert_array_equal(np.from_dlpack(codes.codes), octavo.quantize(X, exclude=[2]).codes)
    # Frameworks mix, on one device.
    np.testing.assert_array_equal(octavo.linear(X, weight, make(W[:, 0].copy())), expected)


def test_extents_of_what_has_dlpack_alone() -> None:
    """Rotated codes have other extents than the weight, and columns are checked against its own."""
    options = octavo.Options(rotation=16)
    weight = octavo.quantize_weight(Producer(W), outlier_columns=[2], options=options)
    expected = octavo.quantize_weight(W, outlier_columns=[2], options=options)
    assert weight.shape == expected.shape == W.shape
    y = octavo.linear(Producer(X), weight, options=options)
    np.testing.assert_array_equal(np.from_dlpack(y), octavo.linear(X, expected, options=options))
    assert octavo.quantize_weight(Producer(W), options=options, out=octavo.quantize_weight(W, options=options))
    with pytest.raises(ValueError, match=r"quantize_weight: outlier_columns: expected columns in \[0, 4\), got 4"):
        octavo.quantize_weight(Producer(W), outlier_columns=[4])
    codes, of_numpy = (octavo.quantize(x, exclude=[2], rotation=16) for x in (Producer(X), X))
    np.testing.assert_array_equal(np.from_dlpack(octavo.dequantize(codes)), octavo.dequantize(of_numpy))


@pytest.mark.parametrize("legacy", [False, True])
def test_what_has_dlpack_is_an_array(legacy: bool) -> None:
    weight = octavo.quantize_weight(Producer(W, legacy=legacy))
    assert isinstance(weight.scale, octavo.DLPackArray)
    y = octavo.linear(Producer(X, legacy=legacy), weight)
    assert (y.shape, y.dtype, y.nbytes, len(y)) == ((3, 2), "float32", 24, 3)
    assert repr(y) == "<octavo.DLPackArray of shape (3, 2), float32: give it to a framework's from_dlpack>"
    np.testing.assert_array_equal(np.from_dlpack(y), octavo.linear(X, octavo.quantize_weight(W)))
    assert np.asarray(y, np.float64).dtype == np.float64
    np.testing.assert_array_equal(np.asarray(y), np.from_dlpack(y))
    assert np.shares_memory(np.asarray(y, copy=False), np.from_dlpack(y))
    assert not np.shares_memory(np.array(y), np.from_dlpack(y))
    del weight
    strided = np.zeros((2, 3, 5, 4), np.float32)[:, :, ::2, ::-1]
    strided[...] = np.arange(72).reshape(strided.shape)
    codes = octavo.quantize(Producer(strided)).codes
    np.testing.assert_array_equal(np.from_dlpack(codes), octavo.quantize(strided).codes)

    out = np.zeros((3, 2), np.float32)
    if legacy:
        with pytest.raises(ValueError, match=r"^linear: out: expected a writable array, got .*Producer"):
            octavo.linear(X, octavo.quantize_weight(W), out=Producer(out, legacy=True))
    else:
        octavo.linear(X, octavo.quantize_weight(W), out=Producer(out))
        np.testing.assert_array_equal(out, np.from_dlpack(y))
        out.flags.writeable = False
        with pytest.raises(ValueError, match=r"^linear: out: expected a writable array, got a read-only one"):
            octavo.linear(X, octavo.quantize_weight(W), out=Producer(out))


def test_bfloat16_of_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x, w = X.astype(ml_dtypes.bfloat16), W.astype(ml_dtypes.bfloat16)
    weight = octavo.quantize_weight(w, outlier_columns=[2])
    y = octavo.linear(x, weight)
    assert y.dtype == weight.outlier_weight.dtype == weight.dequantize("bfloat16").dtype == x.dtype
    same = octavo.linear(
        torch.from_numpy(X).bfloat16(), octavo.quantize_weight(torch.from_numpy(W).bfloat16(), outlier_columns=[2])
    )
    np.testing.assert_array_equal(y.astype(np.float32), same.float().numpy())


def test_other_devices_are_refused() -> None:
    class Elsewhere(Producer):
        def __dlpack_device__(self) -> tuple[int, int]:
            return 8, 0  # Metal

    class OnGpu(Producer):
        def __dlpack__(self, **options: Any) -> Any:
            raise BufferError(f"on stream {options.get('stream')}")

        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 0

    with pytest.raises(ValueError, match=r"^find_outliers: x: .* or a CUDA device, got .* 8"):
        octavo.find_outliers(Elsewhere(X))
    with pytest.raises(TypeError, match=r"^find_outliers: x: expected an array that DLPack can describe, .* stream 1"):
        octavo.find_outliers(OnGpu(X))


def test_classes_that_only_call_themselves_arrays() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    for module, name, base in (("numpy", "ndarray", np.ndarray), ("torch", "Tensor", torch.Tensor)):
        members = {"__module__": module, "__torch_dispatch__": torch.Tensor.__torch_dispatch__}
        for extra in ({}, {"__class__": property(lambda self, base=base: base)}):
            fake = type(name, (), {**members, **extra})()
            with pytest.raises(TypeError, match=r"^find_outliers: x: expected an array"):
                octavo.find_outliers(fake)
    exchange = {"__dlpack_c_exchange_api__": getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)}
    fake = type("Tensor", (Producer,), {"__module__": "torch", **exchange})(X)
    np.testing.assert_array_equal(np.from_dlpack(octavo.find_outliers(fake)), [2])
    # A framework that is told by the module's name alone is not imported for it.
    fake = type("Array", (Producer,), {"__module__": "tensorflow"})(X)
    assert octavo.find_outliers(fake).shape == (1,)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("where", ["__dlpack__", "__dlpack_device__"])
def test_interrupts_are_not_swallowed(interrupt: type[BaseException], where: str) -> None:
    def raises(self: Any, **options: Any) -> Any:
        raise interrupt

    with pytest.raises(interrupt):
        octavo.find_outliers(type("Array", (Producer,), {where: raises})(X))


@pytest.mark.parametrize("device", [None, 1, (), (1,), ("cpu", 0), (2**40, 0)])
def test_devices_that_are_none(device: Any) -> None:
    fake = type("Array", (Producer,), {"__dlpack_device__": lambda self: device})(X)
    with pytest.raises((TypeError, ValueError), match=r"^find_outliers: x: "):
        octavo.find_outliers(fake)


class Header(ctypes.Structure):
    """DLTensor with what comes before it in a DLManagedTensorVersioned, and nothing to delete."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("offset", ctypes.c_uint64),
    )


LIES: dict[str, dict[str, Any]] = {
    "no shape": {"shape": None},
    "negative extent": {"shape": (-3, 4)},
    "negative extents": {"shape": (-3, -4)},
    "wrapping": {"shape": (2**40, 2**40)},
    "wrapping without strides": {"shape": (2**40, 2**40), "strides": None},
    "wrapping to 0": {"shape": (2**32, 2**32)},
    "wrapping strides": {"strides": (2**62, 1)},
    "least stride": {"strides": (-(2**63), 1)},
    "negative rank": {"ndim": -1},
    "no rank": {"ndim": 0},
    "rank": {"ndim": 2**30},
    "no data": {"data": None},
    "lanes": {"lanes": 4},
    "bits": {"bits": 64},
    "no version": {"major": 0},
    "version": {"major": 2},
    "device": {"device": (14, 0)},
}


def lying(told: dict[str, Any]) -> Any:
    """An array whose capsule says what is told; what nobody tells is that of 12 float32 numbers as [3, 4]."""
    told = {"shape": (3, 4), "strides": (4, 1), "ndim": 2, "lanes": 1, "bits": 32, "major": 1, "offset": 0, **told}
    memory = {name: told[name] and (ctypes.c_int64 * len(told[name]))(*told[name]) for name in ("shape", "strides")}
    addresses = {name: ctypes.addressof(numbers) if numbers else None for name, numbers in memory.items()}
    header = Header(**{"code": 2, "device": (1, 0), **told, **addresses})
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    capsule = new(ctypes.addressof(header), b"dltensor_versioned", None)
    members = {"__dlpack__": lambda self, **options: capsule, "memory": (memory, header)}
    return type("Array", (Producer,), members)(X)


@pytest.mark.parametrize("lie", LIES)
def test_capsules_that_lie(lie: str) -> None:
    values = np.ones(12, np.float32)
    with pytest.raises((TypeError, ValueError), match=r"^find_outliers: x: expected "):
        octavo.find_outliers(lying({"data": values.ctypes.data, **LIES[lie]}))


def test_random_capsules() -> None:
    """Views of any strides, offsets and ranks are read as NumPy reads them; whatever lies is refused.

    OCTAVO_FUZZ_SECONDS is for how long; a failure names the seed.
    """
    end = time.monotonic() + float(os.environ.get("OCTAVO_FUZZ_SECONDS", "1"))
    memory = np.random.default_rng(0).normal(size=4096).astype(np.float32)
    seed = refused = 0
    while time.monotonic() < end or seed < 200:
        seed += 1
        numbers = np.random.default_rng(seed)
        shape = tuple(numbers.integers(0, 9, numbers.integers(1, 5)).tolist())
        strides = tuple(numbers.integers(-40, 41, len(shape)).tolist())
        steps = [(n - 1) * step for n, step in zip(shape, strides, strict=True)] if all(shape) else [0]
        low, high = sum(min(step, 0) for step in steps), sum(max(step, 0) for step in steps)
        first = int(numbers.integers(-low, memory.size - high))
        offset = 4 * int(numbers.integers(0, first + 1))
        told: dict[str, Any] = {"shape": shape, "strides": strides, "ndim": len(shape), "offset": offset}
        told["data"] = memory.ctypes.data + 4 * first - offset
        lie = str(numbers.choice(list(LIES))) if numbers.random() < 0.3 else None
        if lie is None:
            view = np.lib.stride_tricks.as_strided(memory[first:], shape, [4 * step for step in strides])
            expected = np.flatnonzero((np.abs(view) >= 2).any(tuple(range(len(shape) - 1))))
            got = np.from_dlpack(octavo.find_outliers(lying(told), threshold=2.0))
            np.testing.assert_array_equal(got, expected, err_msg=f"seed {seed}")
        else:
            with pytest.raises((TypeError, ValueError), match=r"^find_outliers: x: expected "):
                octavo.find_outliers(lying({**told, "shape": (3, 4), "strides": (4, 1), "ndim": 2, **LIES[lie]}))
            refused += 1
    assert 0 < refused < seed / 2


@pytest.mark.parametrize("given", [None, 3, "dltensor", object()])
def test_capsules_that_are_none(given: Any) -> None:
    fake = type("Array", (Producer,), {"__dlpack__": lambda self, **options: given})(X)
    with pytest.raises(TypeError, match=r"^find_outliers: x: expected a capsule of DLPack from __dlpack__, got "):
        octavo.find_outliers(fake)


def test_used_capsules_are_refused() -> None:
    capsule = X.__dlpack__(max_version=(1, 0))
    fake = type("Array", (Producer,), {"__dlpack__": lambda self, **options: capsule})(X)
    octavo.find_outliers(fake)
    with pytest.raises(TypeError, match=r"^find_outliers: x: expected a capsule of DLPack"):
        octavo.find_outliers(fake)
