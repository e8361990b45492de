"""The tensors of a PyTorch file (``torch.save`` of a state dict: .bin, .pt, .pth), found without loading them.

Such a file is an uncompressed zip archive: a pickle that names storages, and each storage's bytes. ``torch.load`` maps
the whole file, and mapped pages that were read count as memory of the process; here the pickle is read to learn where
each tensor lies, so that it can be read in blocks. As with ``weights_only=True``, the pickle may name nothing but
tensors in dicts: whatever else it asks for is refused, never called.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.checkpoint.tensors import ITEM_BYTES, Entry

_STORAGES = {
    **{"DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16"},
    **{"LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8"},
    "BoolStorage": "BOOL",
}
_CHUNK = 1 << 20


@dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int  # in elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor(storage: Any, offset: int, shape: Any, strides: Any, *_: Any) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    return _Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


class _Unpickler(pickle.Unpickler):
    """Knows dicts and tensors; tensors become `_Tensor`."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _rebuild_parameter
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"{module}.{name}, which is no tensor")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, *_ = pid
        if kind != "storage" or dtype not in ITEM_BYTES:
            raise pickle.UnpicklingError(f"a storage of an unknown kind, {dtype!r}")
        return _Storage(dtype, str(key))


def read_torch_file(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a state dict in its order, and ties: name -> the earlier name of the very same tensor.

    Every byte of every storage is read once, against the archive's CRC-32.

    Raises ValueError, naming the file and where possible the tensor: not a PyTorch file of today's format, truncated,
    corrupt, or holding anything but a flat dict of tensors.
    """
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            begun = file.read(4) == b"PK\x03\x04"
        raise ValueError(
            f"{path}: expected a PyTorch zip file, got "
            + (
                f"the beginning of one, {path.stat().st_size} bytes without the list of its records, which comes last: "
                "truncated"
                if begun
                else "something else: not of PyTorch, or saved before PyTorch 1.6 (load it and save it again)"
            )
        )
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
            if pickled is None:
                raise ValueError(f"{path}: expected a PyTorch file, got a zip archive without data.pkl")
            folder = pickled.removesuffix("data.pkl")
            if folder + "byteorder" in archive.namelist() and archive.read(folder + "byteorder") != b"little":
                raise ValueError(f"{path}: expected little-endian data, got another byte order")
            with archive.open(pickled) as file:
                state = _Unpickler(file).load()
            return _entries(path, archive, folder, state)
    except OSError:
        raise
    except Exception as error:  # damage fails in whatever way its bytes lead to; nothing but `_Unpickler` is called
        if str(error).startswith(f"{path}: "):
            raise
        said = str(error) if isinstance(error, pickle.UnpicklingError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: expected a PyTorch file with a state dict, got {said}") from error


def _entries(path: Path, archive: zipfile.ZipFile, folder: str, state: Any) -> tuple[dict[str, Entry], dict[str, str]]:
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected a state dict, got {type(state).__name__}")
    entries: dict[str, Entry] = {}
    ties: dict[str, str] = {}
    first_name: dict[_Tensor, str] = {}
    data_starts: dict[str, int] = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            raise ValueError(
                f"{path}: {name}: expected a tensor, got {type(tensor).__name__}: save the state dict alone"
            )
        key = tensor.storage.key
        if key not in data_starts:
            data_starts[key] = _checked_data_start(path, archive, f"{folder}data/{key}", name)
        if first_name.setdefault(tensor, name) != name:
            ties[name] = first_name[tensor]
        entries[name] = _entry(path, archive, f"{folder}data/{key}", name, tensor, data_starts[key])
    return entries, ties


def _entry(path: Path, archive: zipfile.ZipFile, record: str, name: str, tensor: _Tensor, data_start: int) -> Entry:
    dtype, shape = tensor.storage.dtype, tensor.shape
    transposed = len(shape) == 2 and min(shape) > 1 and tensor.strides == (1, shape[0])
    expected = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    relevant = [axis for axis, extent in enumerate(shape) if extent > 1]
    if not transposed and 0 not in shape and any(tensor.strides[axis] != expected[axis] for axis in relevant):
        raise ValueError(
            f"{path}: {name}: expected a contiguous or transposed tensor, got strides {tensor.strides} for {shape}"
        )
    entry = Entry(name, dtype, shape, path, data_start + tensor.offset * ITEM_BYTES[dtype], transposed)
    available = archive.getinfo(record).file_size - tensor.offset * ITEM_BYTES[dtype]
    if tensor.offset < 0 or any(extent < 0 for extent in shape) or entry.nbytes > available:
        raise ValueError(f"{path}: {name}: expected {entry.nbytes} bytes, got {available}: truncated")
    return entry


def _checked_data_start(path: Path, archive: zipfile.ZipFile, record: str, name: str) -> int:
    """The place in the file of a record's first byte, after its bytes were compared with its checksum."""
    try:
        info = archive.getinfo(record)
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{path}: {name}: expected uncompressed data, got a compressed record")
        with archive.open(info) as file:
            while file.read(_CHUNK):
                pass
    except (KeyError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(
            f"{path}: {name}: expected data with its CRC-32, got {error}: corrupt, or saved with checksums switched off"
        ) from error
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)  # the local header's lengths: they may differ from the directory's
        lengths = file.read(4)
    return info.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
