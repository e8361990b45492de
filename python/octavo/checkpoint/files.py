"""Where the tensors of a file lie, and their bytes: safetensors files, and PyTorch's (``torch.save`` of a state dict).

The safetensors package opens the former and refuses what its format forbids; PyTorch the latter, without calling what a
pickle names. Bytes are read with ``pread``: mapped pages would count as memory of the process, safetensors' slices read
the whole tensor for each slice, and NumPy, which is enough for a conversion, has no bfloat16.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from octavo._sizes import shown
from octavo._types import Array

# What NumPy reads a dtype as: one that it has not, as the bits.
NUMPY_DTYPES = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "C64": "<c8", "BOOL": "|b1"},
    **{"F8_E4M3": "|u1", "F8_E5M2": "|u1", "F8_E8M0": "|u1", "F8_E4M3FNUZ": "|u1", "F8_E5M2FNUZ": "|u1"},
    **{"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1"},
}
# PyTorch's names of dtypes that NumPy has not, or names otherwise.
TORCH_DTYPES = {
    **{"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"},
    **{"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F64": "float64", "F32": "float32"},
    **{"F16": "float16", "C64": "complex64", "BOOL": "bool", "I64": "int64", "I32": "int32", "I16": "int16"},
    **{"I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8"},
}
TORCH_SUFFIXES = (".bin", ".pt", ".pth")
CHUNK = 1 << 20


@dataclass(frozen=True)
class Entry:
    """A tensor in a file.

    Attributes:
        name, dtype, shape: as a safetensors header has them ("BF16").
        path: the file.
        offset: of its first byte in the file.
        strides: in elements; None where the tensor is contiguous (a PyTorch file may hold others).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.numel * np.dtype(NUMPY_DTYPES[self.dtype]).itemsize

    @property
    def where(self) -> str:
        """The file and the tensor, for errors."""
        return f"{self.path}: {shown(self.name)}"

    def bytes_in_file(self, file: int) -> Iterator[Array]:
        """The file's bytes that hold the tensor, in their order, a MiB at a time, each in the place of the last."""
        end = self.offset + self._span() * np.dtype(NUMPY_DTYPES[self.dtype]).itemsize
        memory = _memory(np.dtype(np.uint8), min(CHUNK, end - self.offset))
        for first in range(self.offset, end, CHUNK):
            chunk = memory[: end - first]
            self._read_into(file, chunk, first)
            yield chunk

    def read(self, file: int) -> tuple[Array, Array]:
        """The whole tensor, from the open file, and the memory that holds it, in the file's order."""
        flat = _memory(np.dtype(NUMPY_DTYPES[self.dtype]), self._span())
        self._read_into(file, flat.view(np.uint8), self.offset)
        if self.strides is None:
            return flat.reshape(self.shape), flat
        return as_strided(flat, self.shape, [stride * flat.itemsize for stride in self.strides]), flat

    def crc32(self, file: int) -> str:
        """Of a contiguous tensor's bytes, as eight digits."""
        crc = 0
        for chunk in self.bytes_in_file(file):
            crc = zlib.crc32(chunk, crc)
        return f"{crc:08x}"

    def _span(self) -> int:
        """Elements from the first to the last one."""
        if self.strides is None or 0 in self.shape:
            return self.numel
        return 1 + sum((extent - 1) * stride for extent, stride in zip(self.shape, self.strides, strict=True))

    def _read_into(self, file: int, buffer: Array, offset: int) -> None:
        view = memoryview(buffer)
        while len(view):
            count = os.preadv(file, [view], offset)
            if count == 0:
                raise ValueError(f"{self.where}: expected data up to byte {offset + len(view)}: truncated")
            view, offset = view[count:], offset + count


def _memory(dtype: Any, count: int) -> Array:
    """An array that is given back to the system when it goes: the allocator would keep some for each thread."""
    memory = mmap.mmap(-1, max(1, count * dtype.itemsize), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, dtype, count)


@dataclass(frozen=True)
class Shard:
    """A file: its tensors by name, which names share the data of an earlier one (by name, that one's), its metadata."""

    path: Path
    entries: dict[str, Entry]
    ties: dict[str, str]
    metadata: dict[str, str] = field(default_factory=dict)


def open_shard(path: Path) -> Shard:
    """The tensors of a file, in the order of their data.

    Raises:
        OSError: it cannot be opened.
        ValueError: names the file: it is no regular file, truncated, corrupt, or of another format.
    """
    identity(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _open_torch_file(path)
    raise ValueError(f"{path}: expected .safetensors, {', '.join(TORCH_SUFFIXES)} or .index.json, got {path.suffix!r}")


def identity(path: Path) -> tuple[int, ...]:
    """What changes when a regular file does; raises ValueError for what is none, such as a pipe."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        kind = "folder" if stat.S_ISDIR(found.st_mode) else "pipe, device or socket"
        raise ValueError(f"{path}: expected a file, got a {kind}")
    return found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """The file, open; ``explained``."""
    with explained(path):
        file = os.open(path, flags, 0o666)
        try:
            yield file
        finally:
            os.close(file)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Name the file, and what to do, where the disk or the process's open files are at their limit."""
    advice = {
        **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space and run again: finished files are kept"),
        **dict.fromkeys((errno.EMFILE, errno.ENFILE), "allow more open files (ulimit -n) and run again"),
    }
    try:
        yield
    except OSError as error:
        if error.errno not in advice or advice[error.errno] in str(error):
            raise
        said = f"{os.strerror(error.errno)}: {advice[error.errno]}"
        raise OSError(error.errno, said, str(error.filename or path)) from error


# --- safetensors ------------------------------------------------------------------------------------------------------


def _open_safetensors(path: Path) -> Shard:
    try:
        import safetensors
    except ImportError as error:
        raise RuntimeError(f"{path}: needs the package safetensors to be read: pip install safetensors") from error
    with opened(path) as handle:
        offset = 8 + int.from_bytes(os.pread(handle, 8, 0), "little")
        try:
            with safetensors.safe_open(path, "numpy") as file:
                metadata: dict[str, str] = file.metadata() or {}
                tensors = [(name, file.get_slice(name)) for name in file.offset_keys()]
                found = [(name, each.get_dtype(), tuple(each.get_shape())) for name, each in tensors]
        except safetensors.SafetensorError as error:
            said = f"truncated or corrupt: {shown(str(error), 300)}"
            raise ValueError(f"{path}: expected a safetensors file, got one that is {said}") from error
        except OSError as error:  # it names no file
            raise OSError(f"{path}: {error}") from error
    entries = {}
    for name, dtype, shape in found:
        if dtype not in NUMPY_DTYPES:
            raise ValueError(f"{path}: {shown(name)}: expected a dtype of {', '.join(NUMPY_DTYPES)}, got {dtype}")
        entries[name] = Entry(name, dtype, shape, path, offset)
        offset += entries[name].nbytes
    # As safetensors.torch.save_model notes a tensor that it stored under another name.
    ties = {name: first for name, first in metadata.items() if first in entries and name not in entries}
    for name, first in ties.items():
        own = entries[first]
        entries[name] = Entry(name, own.dtype, own.shape, path, own.offset)
    return Shard(path, entries, ties, metadata)


def header_bytes(tensors: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """The beginning of a safetensors file, up to its data, of tensors (name, dtype, shape) in the order of the data."""
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * np.dtype(NUMPY_DTYPES[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


# --- PyTorch's files --------------------------------------------------------------------------------------------------


def _open_torch_file(path: Path) -> Shard:
    _check_archive(path)
    try:
        import torch
    except ImportError as error:
        raise RuntimeError(f'{path}: needs PyTorch to be read: pip install "octavo[torch]"') from error
    try:
        # On the meta device: no data is read, and each storage says where its data lie in the file.
        state = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # damage fails in whatever way its bytes lead to
        said = shown(f"{type(error).__name__}: {error}", 300)
        raise ValueError(f"{path}: expected a PyTorch file with a state dict, got {said}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected a state dict, got {type(state).__name__}")
    size = path.stat().st_size
    kinds = {getattr(torch, name): dtype for dtype, name in TORCH_DTYPES.items() if hasattr(torch, name)}
    entries: dict[str, Entry] = {}
    ties: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            said = f"{shown(str(name))}: expected a tensor, got {type(tensor).__name__}: save the state dict alone"
            raise ValueError(f"{path}: {said}")
        if tensor.layout != torch.strided or tensor.dtype not in kinds:
            raise ValueError(f"{path}: {shown(name)}: expected a dense tensor, got {tensor.layout} of {tensor.dtype}")
        start = tensor.untyped_storage()._checkpoint_offset
        if start is None:
            raise RuntimeError(f"{path}: needs PyTorch 2.8 or later to be read, or safetensors")
        strides = None if tensor.is_contiguous() else tensor.stride()
        offset = start + int(tensor.storage_offset()) * tensor.itemsize
        entry = Entry(name, kinds[tensor.dtype], tuple(tensor.shape), path, offset, strides)
        if offset + entry._span() * tensor.itemsize > size:
            raise ValueError(f"{entry.where}: expected data up to byte {offset + entry.nbytes}: truncated")
        entries[name] = entry
        earlier = first.setdefault((offset, entry.dtype, entry.shape, strides), name) if entry.numel else name
        if earlier != name:
            ties[name] = earlier
    return Shard(path, entries, ties)


def _check_archive(path: Path) -> None:
    """Raise ValueError unless the file is an archive of uncompressed records whose checksums are right.

    So what it takes to read it is bounded by its size.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            stored = sum(record.file_size for record in records)
            if any(record.compress_type != zipfile.ZIP_STORED for record in records) or stored > path.stat().st_size:
                raise ValueError(
                    f"{path}: expected uncompressed records, as torch.save writes them, got a file of "
                    f"{path.stat().st_size} bytes that unpacks to {stored}"
                )
            damaged = archive.testzip()
            order = next(
                (archive.read(record) for record in records if record.filename.endswith("/byteorder")), b"little"
            )
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{path}: expected a PyTorch zip file, got one that is truncated or corrupt, or saved before PyTorch 1.6 "
            f"(load it and save it again): {error}"
        ) from error
    if damaged is not None:
        raise ValueError(f"{path}: {shown(damaged)}: expected data with its CRC-32, got others: corrupt")
    if order != b"little":
        raise ValueError(f"{path}: expected little-endian data, got another byte order")
