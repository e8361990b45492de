"""Where the tensors of a file lie, and their bytes: safetensors files, and PyTorch's (``torch.save`` of a state dict).

The safetensors package opens the former and refuses what its format forbids; PyTorch the latter, without calling what a
pickle names. Bytes are read with ``pread``: mapped pages would count as memory of the process, safetensors' slices read
the whole tensor for each slice, and NumPy, which is enough for a conversion, has no bfloat16.
"""

import errno
import json
import math
import mmap
import os
import stat
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from octavo._text import shown, unexpected
from octavo._types import Array

# By the name of a dtype in a safetensors header: NumPy's (where NumPy has none: of the bits), and PyTorch's.
DTYPES = {
    "F64": ("<f8", "float64"), "F32": ("<f4", "float32"), "F16": ("<f2", "float16"), "BF16": ("<u2", "bfloat16"),
    "F8_E4M3": ("|u1", "float8_e4m3fn"), "F8_E5M2": ("|u1", "float8_e5m2"), "F8_E8M0": ("|u1", "float8_e8m0fnu"),
    "F8_E4M3FNUZ": ("|u1", "float8_e4m3fnuz"), "F8_E5M2FNUZ": ("|u1", "float8_e5m2fnuz"), "C64": ("<c8", "complex64"),
    "I64": ("<i8", "int64"), "I32": ("<i4", "int32"), "I16": ("<i2", "int16"), "I8": ("|i1", "int8"),
    "U64": ("<u8", "uint64"), "U32": ("<u4", "uint32"), "U16": ("<u2", "uint16"), "U8": ("|u1", "uint8"),
    "BOOL": ("|b1", "bool"),
}  # fmt: skip
TORCH_SUFFIXES = (".bin", ".pt", ".pth")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Entry:
    """A tensor in a file; name, dtype and shape are as a safetensors header has them ("BF16")."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int  # of its first byte in the file
    strides: tuple[int, ...] | None = None  # in elements; None: it is contiguous (a PyTorch file may hold others)

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.numel * itemsize(self.dtype)

    @property
    def end(self) -> int:
        """The file's byte after the last one of the tensor."""
        span = self.numel
        if self.strides is not None and span:
            span = 1 + sum((extent - 1) * stride for extent, stride in zip(self.shape, self.strides, strict=True))
        return self.offset + span * itemsize(self.dtype)

    @property
    def where(self) -> str:
        """The file and the tensor, for errors."""
        return f"{self.path}: {shown(self.name)}"

    def chunks(self, file: int) -> Iterator[Array]:
        """The bytes from the tensor's first to its last, a MiB at a time, each in the place of the one before."""
        memory = _memory(np.dtype(np.uint8), min(_CHUNK, self.end - self.offset))
        for first in range(self.offset, self.end, _CHUNK):
            chunk = memory[: self.end - first]
            self._read_into(file, chunk, first)
            yield chunk

    def read(self, file: int) -> tuple[Array, Array]:
        """The whole tensor, from the open file, and the memory that holds it, in the file's order."""
        dtype = np.dtype(DTYPES[self.dtype][0])
        flat = _memory(dtype, (self.end - self.offset) // dtype.itemsize)
        self._read_into(file, flat.view(np.uint8), self.offset)
        if self.strides is None:
            return flat.reshape(self.shape), flat
        return as_strided(flat, self.shape, [stride * dtype.itemsize for stride in self.strides]), flat

    def _read_into(self, file: int, buffer: Array, offset: int) -> None:
        view = memoryview(buffer)
        while len(view):
            count = os.preadv(file, [view], offset)
            if count == 0:
                raise unexpected(self.where, f"data up to byte {offset + len(view)}", "a file that is truncated")
            view, offset = view[count:], offset + count


def itemsize(dtype: str) -> int:
    """Bytes of an element."""
    return np.dtype(DTYPES[dtype][0]).itemsize


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
    """The tensors of a file, in the order of their data. Raises OSError, or ValueError where it is damaged."""
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _open_torch_file(path)
    raise unexpected(path, f".safetensors, {', '.join(TORCH_SUFFIXES)} or .index.json", repr(path.suffix))


def identity(path: Path) -> tuple[int, ...]:
    """What changes when a regular file does; raises ValueError for what is none, such as a pipe."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise unexpected(path, "a file", "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, device or socket")
    # st_ctime: the system sets it whatever was written, and lets nobody set it, as st_mtime is by `touch -r`.
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev


def check_unchanged(identities: Mapping[Path, tuple[int, ...]]) -> None:
    """Raise RuntimeError, naming it, where one of the files has another `identity` than it had."""
    for path, before in identities.items():
        if not path.exists() or identity(path) != before:
            raise RuntimeError(f"{path}: expected a file at rest, got one that changed meanwhile: run again")


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """The file, open; `explained`."""
    with explained(path):
        file = os.open(path, flags, 0o666)
        try:
            yield file
        finally:
            os.close(file)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Name the file, and what to do, where the disk or the process's open files are at their limit."""
    try:
        yield
    except OSError as error:
        advice, name = "", path
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice = "free some space and run again: what is finished is kept"
        elif error.errno in (errno.EMFILE, errno.ENFILE):
            advice, name = "allow more open files (ulimit -n) and run again", error.filename or path
        if not advice or advice in str(error):
            raise
        raise OSError(error.errno, f"{os.strerror(error.errno or 0)}: {advice}", str(name)) from error


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
            raise unexpected(path, "a safetensors file", f"one that is truncated or corrupt: {error}") from error
        except OSError as error:  # it names no file
            raise OSError(f"{path}: {error}") from error
    entries = {}
    for name, dtype, shape in found:
        if dtype not in DTYPES:
            raise unexpected(f"{path}: {shown(name)}", f"a dtype of {', '.join(DTYPES)}", dtype)
        entries[name] = Entry(name, dtype, shape, path, offset)
        offset = entries[name].end
    # As safetensors.torch.save_model notes a tensor that it stored under another name.
    ties = {name: first for name, first in metadata.items() if first in entries and name not in entries}
    entries |= {name: replace(entries[first], name=name) for name, first in ties.items()}
    return Shard(path, entries, ties, metadata)


def header_bytes(tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """The beginning of a safetensors file, up to its data, of tensors (name, dtype, shape) in the order of the data.

    The data begin at a multiple of 64 bytes, which is what processors read at a time.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * itemsize(dtype)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


# --- PyTorch's files --------------------------------------------------------------------------------------------------


def _open_torch_file(path: Path) -> Shard:
    records = _records(path)
    try:
        import torch
    except ImportError as error:
        raise RuntimeError(f'{path}: needs PyTorch to be read: pip install "octavo[torch]"') from error
    try:
        # On the meta device: no data is read, and each storage says where its data lie in the file.
        state = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # damage fails in whatever way its bytes lead to
        said = f"{type(error).__name__}: {error}"
        raise unexpected(path, "a PyTorch file with a state dict", said) from error
    if not isinstance(state, dict):
        raise unexpected(path, "a state dict", type(state).__name__)
    kinds = {getattr(torch, name): dtype for dtype, (_, name) in DTYPES.items() if hasattr(torch, name)}
    entries: dict[str, Entry] = {}
    ties: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, tensor in state.items():
        where = f"{path}: {shown(str(name))}"
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise unexpected(where, "a tensor", f"{type(tensor).__name__}: save the state dict alone")
        if tensor.layout != torch.strided or tensor.dtype not in kinds:
            raise unexpected(where, "a dense tensor", f"{tensor.layout} of {tensor.dtype}")
        start = tensor.untyped_storage()._checkpoint_offset
        if start is None:
            raise RuntimeError(f"{path}: needs PyTorch 2.8 or later to be read, or safetensors")
        strides = None if tensor.is_contiguous() else tensor.stride()
        offset = start + int(tensor.storage_offset()) * tensor.itemsize
        entry = Entry(name, kinds[tensor.dtype], tuple(tensor.shape), path, offset, strides)
        if entry.end > start + records.get(start, 0):
            raise unexpected(where, f"a record with {entry.end - start} bytes", f"{records.get(start, 0)}: corrupt")
        entries[name] = entry
        earlier = first.setdefault((offset, entry.dtype, entry.shape, strides), name) if entry.numel else name
        if earlier != name:
            ties[name] = earlier
    return Shard(path, entries, ties)


def _records(path: Path) -> dict[int, int]:
    """The sizes of the records of an archive by the places of their data in the file.

    They must be uncompressed, so that what it takes to read them is bounded by the file's size.
    """
    sizes = {}
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            stored, size = sum(record.file_size for record in records), path.stat().st_size
            if any(record.compress_type != zipfile.ZIP_STORED for record in records) or stored > size:
                said = f"a file of {size} bytes that unpacks to {stored}"
                raise unexpected(path, "uncompressed records, as torch.save writes them", said)
            damaged = archive.testzip()
            for record in records:
                file.seek(record.header_offset + 26)  # the local header's lengths of its name and what follows it
                start = record.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
                sizes[start] = record.file_size
            orders = [archive.read(record) for record in records if record.filename.endswith("/byteorder")]
    except (zipfile.BadZipFile, struct.error, EOFError, RuntimeError, UnicodeError) as error:  # all of them zipfile's
        said = f"truncated or corrupt, or saved before PyTorch 1.6 (load it and save it again): {error}"
        raise unexpected(path, "a PyTorch zip file", f"one that is {said}") from error
    if damaged is not None:
        raise unexpected(f"{path}: {shown(damaged)}", "data with its CRC-32", "others: corrupt")
    if any(order != b"little" for order in orders):
        raise unexpected(path, "little-endian data", "another byte order")
    return sizes
