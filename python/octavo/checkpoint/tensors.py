"""Where tensors lie in files, reading them piece by piece, and the safetensors container.

A safetensors file is 8 bytes (the header's length, little endian), the header (JSON: for each tensor its dtype, shape
and byte range, and ``__metadata__``, a map of strings) and the data. It is read and written here, and not through the
``safetensors`` package, because that one reads and writes whole tensors: a conversion may hold blocks of rows only.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# The bytes of an element. NumPy has no bfloat16: it is read as its bits.
ITEM_BYTES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8, "BOOL": 1},
    **{"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1},
}
NUMPY_DTYPES = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "C64": "<c8", "BOOL": "|b1"},
    **{"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1"},
}
FLOATS = ("F32", "F16", "BF16")  # what octavo quantizes
_HEADER_LIMIT = 100_000_000  # the format's own
_METADATA = "__metadata__"

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Entry:
    """A tensor in a file.

    Attributes:
        name, dtype, shape: as in a safetensors header ("BF16").
        path: the file.
        offset: of its first byte in the file.
        transposed: the file holds a matrix ``[n, k]`` column by column (a PyTorch file can).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    transposed: bool = False

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.numel * ITEM_BYTES[self.dtype]


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a safetensors file in the order of their data, and its metadata.

    Raises ValueError, naming the file and where possible the tensor, unless the header describes exactly the bytes
    that are there.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT):
            raise ValueError(
                f"{path}: expected a safetensors header of {length} bytes, got a file of {size}: truncated?"
            )
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_repetitions)
        metadata = header.pop(_METADATA, None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError(f"expected {_METADATA} as an object of strings, got something else")
        entries = [_entry(path, name, fields, 8 + length) for name, fields in header.items()]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: expected a safetensors header, got one that is corrupt: {error}") from error
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    position = 8 + length
    for entry in entries:
        if entry.offset != position:
            raise ValueError(
                f"{path}: {entry.name}: expected data from byte {position}, got {entry.offset}: the header is corrupt"
            )
        position += entry.nbytes
        if position > size:
            raise ValueError(
                f"{path}: {entry.name}: expected data up to byte {position}, got a file of {size}: truncated"
            )
    if position != size:
        raise ValueError(f"{path}: expected {position} bytes, got {size}: corrupt, or not a safetensors file")
    return {entry.name: entry for entry in entries}, metadata


def _without_repetitions(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


def _entry(path: Path, name: str, fields: Mapping[str, Any], data_start: int) -> Entry:
    begin, end = (int(offset) for offset in fields["data_offsets"])
    shape = tuple(int(extent) for extent in fields["shape"])
    if fields["dtype"] not in ITEM_BYTES:
        raise ValueError(f"{name}: expected a dtype of {', '.join(ITEM_BYTES)}, got {fields['dtype']}")
    entry = Entry(name, fields["dtype"], shape, path, data_start + begin)
    if begin < 0 or any(extent < 0 for extent in shape) or entry.nbytes != end - begin:
        raise ValueError(f"{name}: expected {entry.nbytes} bytes for {entry.dtype} {list(shape)}, got {end - begin}")
    return entry


def header_bytes(tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a safetensors file, up to its data, of tensors (name, dtype, shape) in the order of the data.

    Its length is a multiple of 8. `in_order` gives the order in which every tensor is aligned.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    position = 0
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _HEADER_LIMIT:
        raise ValueError(f"safetensors: expected a header of at most {_HEADER_LIMIT} bytes, got {len(text)}")
    return len(text).to_bytes(8, "little") + text


def in_order(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> list[tuple[str, str, tuple[int, ...]]]:
    """Wide elements first, then by name: so each tensor begins at a multiple of its element's size."""
    return sorted(tensors, key=lambda tensor: (-ITEM_BYTES[tensor[1]], tensor[0]))


# --- reading and writing at a place -----------------------------------------------------------------------------------


def read_into(file: int, buffer: Array, offset: int, entry: Entry) -> None:
    """Fill a contiguous `buffer` from the open file of `entry`. Raises ValueError where the file ends before.

    Not by mapping the file: mapped pages count as memory of the process.
    """
    view = _bytes_of(buffer)
    while len(view):
        count = os.preadv(file, [view], offset)
        if count == 0:
            raise ValueError(f"{entry.path}: {entry.name}: expected data up to byte {offset + len(view)}: truncated")
        view = view[count:]
        offset += count


def read_rows(file: int, entry: Entry, first: int, last: int, *, transpose: bool = False) -> Array:
    """Rows [first, last) of a matrix, or of its transpose; bfloat16 as uint16 bits.

    The result is a view of another layout where rows of the result are columns in the file.
    """
    dtype = NUMPY_DTYPES[entry.dtype]
    if transpose == entry.transposed:
        width = entry.shape[0] if transpose else entry.shape[1]
        block = np.empty((last - first, width), dtype)
        read_into(file, block, entry.offset + first * width * block.itemsize, entry)
        return block
    height, width = entry.shape[::-1] if entry.transposed else entry.shape  # as it lies in the file
    block = np.empty((height, last - first), dtype)
    for row in range(height):
        read_into(file, block[row], entry.offset + (row * width + first) * block.itemsize, entry)
    return block.T


def read_all(file: int, entry: Entry) -> Array:
    """The whole tensor; dtypes that NumPy has not as unsigned integers of their bits."""
    dtype = NUMPY_DTYPES.get(entry.dtype, f"<u{ITEM_BYTES[entry.dtype]}")
    array = np.empty(entry.shape[::-1] if entry.transposed else entry.shape, dtype)
    read_into(file, array, entry.offset, entry)
    return array.T if entry.transposed else array


def write_at(file: int, data: Any, offset: int) -> None:
    """Write contiguous bytes or an array at a place of an open file."""
    view = _bytes_of(data) if isinstance(data, np.ndarray) else memoryview(data)
    while len(view):
        count = os.pwrite(file, view, offset)
        view = view[count:]
        offset += count


def _bytes_of(array: Any) -> memoryview:
    """The memory of a contiguous array."""
    return memoryview(array.reshape(-1).view(np.uint8))
