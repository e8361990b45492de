"""A stand-in for CuPy whose device is the emulated GPU, so that the Python tests can run on it.

It has what octavo and its tests use of CuPy, on NumPy's memory, which is that GPU's memory too; what it hands out over
DLPack says that it is on CUDA device 0. Found only where tests/simt/python is on the path.
"""

from __future__ import annotations

import ctypes
import types
from typing import Any

import numpy as np

__version__ = "0+simt"
dtype = np.dtype
_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype = ctypes.c_void_p
_pointer_of.argtypes = [ctypes.py_object, ctypes.c_char_p]

# DLDevice in a DLManagedTensorVersioned, and in a DLManagedTensor (bindings/dlpack.hpp).
_DEVICE_OFFSETS = {b"dltensor_versioned": 40, b"dltensor": 8}
_CUDA = (2, 0)


class Device:
    """CUDA device 0, the only one."""

    def __init__(self, index: int = 0) -> None:
        if index != 0:
            raise ValueError(f"no device {index}")
        self.id = index

    def use(self) -> Device:
        return self

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *error: object) -> None:
        """There is no other device to go back to."""

    def __str__(self) -> str:
        return "<CUDA Device 0>"


class _Stream:
    ptr = 0

    def synchronize(self) -> None:
        """All work is done when it is enqueued."""


class ndarray:  # noqa: N801 - CuPy's name
    """An array on the device. Holds a NumPy array of the same memory."""

    def __init__(self, host: np.ndarray[Any, Any]) -> None:
        self._host = host

    def __getattr__(self, name: str) -> Any:
        if name not in {"shape", "strides", "dtype", "ndim", "size", "nbytes", "itemsize", "flags"}:
            raise AttributeError(name)
        return getattr(self._host, name)

    device = Device()

    @property
    def base(self) -> ndarray | None:
        return None if self._host.base is None else ndarray(self._host.base)

    @property
    def T(self) -> ndarray:  # noqa: N802 - CuPy's name
        return ndarray(self._host.T)

    def __len__(self) -> int:
        return len(self._host)

    def __getitem__(self, index: Any) -> ndarray:
        index = tuple(i._host if isinstance(i, ndarray) else i for i in index) if isinstance(index, tuple) else index
        return ndarray(np.asarray(self._host[index]))

    def __setitem__(self, index: Any, value: Any) -> None:
        self._host[index] = value._host if isinstance(value, ndarray) else value

    def __array__(self, *args: Any, **options: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`.")

    def reshape(self, *shape: Any) -> ndarray:
        return ndarray(self._host.reshape(*shape))

    def view(self, *args: Any) -> ndarray:
        return ndarray(self._host.view(*args))

    def copy(self, order: str = "C") -> ndarray:
        return ndarray(self._host.copy(order))

    def astype(self, *args: Any, **options: Any) -> ndarray:
        return ndarray(self._host.astype(*args, **options))

    def sum(self) -> ndarray:
        return ndarray(np.asarray(self._host.sum()))

    def __int__(self) -> int:
        return int(self._host)

    def to_device(self, device: Any) -> ndarray:
        return self

    def __reduce__(self) -> Any:
        return ndarray, (self._host,)

    def get(self) -> np.ndarray[Any, Any]:
        return self._host.copy()

    def item(self) -> Any:
        return self._host.item()

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CUDA

    def __dlpack__(self, *, stream: int | None = None, max_version: tuple[int, int] | None = None) -> Any:
        if stream != -1:
            raise AssertionError(f"octavo uses CuPy's own stream, expected stream=-1, got {stream}")
        capsule = self._host.__dlpack__(max_version=max_version)
        name = b"dltensor_versioned" if max_version else b"dltensor"
        device = ctypes.cast(_pointer_of(capsule, name) + _DEVICE_OFFSETS[name], ctypes.POINTER(ctypes.c_int32))
        device[0], device[1] = _CUDA
        return capsule


# What CuPy says of itself: octavo looks at it to tell frameworks apart.
ndarray.__module__ = "cupy"


def empty(shape: Any, dtype: Any = np.float32) -> ndarray:
    """Uninitialized memory: filled with what shows where it is not written."""
    host = np.empty(shape, dtype)
    host.view(np.uint8).fill(0xA5) if host.ndim and host.size else host.fill(77)
    return ndarray(host)


def asarray(values: Any, dtype: Any = None) -> ndarray:
    return ndarray(np.array(values._host if isinstance(values, ndarray) else values, dtype, order="C"))


def broadcast_to(array: ndarray, shape: Any) -> ndarray:
    return ndarray(np.broadcast_to(array._host, shape))


def _as_strided(array: ndarray, shape: Any, strides: Any) -> ndarray:
    return ndarray(np.lib.stride_tricks.as_strided(array._host, shape, strides))


def asnumpy(array: ndarray) -> np.ndarray[Any, Any]:
    return array.get()


def get_current_stream(device_id: int | None = None) -> _Stream:
    return _Stream()


class _MemoryPointer:
    """What CuPy's allocators give."""

    used = 0  # bytes of all of them

    def __init__(self, size: int) -> None:
        self._host = np.full(size + 256, 0xA5, np.uint8)
        self.ptr = (self._host.ctypes.data + 255) // 256 * 256
        _MemoryPointer.used += self._host.nbytes

    def __del__(self) -> None:
        _MemoryPointer.used -= self._host.nbytes


_pool = types.SimpleNamespace(malloc=_MemoryPointer, used_bytes=lambda: _MemoryPointer.used)
_allocator = [_pool.malloc]


def get_default_memory_pool() -> Any:
    return _pool


def _set_allocator(allocator: Any) -> None:
    _allocator[0] = allocator


lib = types.SimpleNamespace(stride_tricks=types.SimpleNamespace(as_strided=_as_strided))
cuda = types.SimpleNamespace(
    Device=Device,
    get_current_stream=get_current_stream,
    alloc=lambda size: _allocator[0](size),
    set_allocator=_set_allocator,
    runtime=types.SimpleNamespace(getDeviceCount=lambda: 1),
)
