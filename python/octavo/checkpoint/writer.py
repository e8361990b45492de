"""A safetensors file written in pieces, in any order, whose header comes last; and the journal of what is written."""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from octavo.checkpoint.format import CRC32_KEY
from octavo.checkpoint.tensors import ITEM_BYTES, header_bytes, in_order, write_at

_CHUNK = 1 << 20


class OutputFile:
    """A safetensors file under construction. What it will hold is known, so every tensor has its place at once.

    The header, which carries a CRC-32 of each tensor (eight digits, so that its length is known before), is written by
    `finish`; until then the file does not look like one. Methods may be called from several threads.

    Args:
        path: of the file; an existing one is gone on with.
        tensors: (name, dtype, shape), in any order.
        metadata: strings.
    """

    def __init__(
        self, path: Path, tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> None:
        self.path = path
        self._tensors = in_order(tensors)
        self._metadata = metadata
        position = self._header_size = len(self._header({}))
        self._places: dict[str, tuple[int, int]] = {}  # offset, bytes
        for name, dtype, shape in self._tensors:
            size = ITEM_BYTES[dtype]
            for extent in shape:
                size *= extent
            self._places[name] = position, size
            position += size
        self.nbytes = position
        self._file = -1

    def open(self) -> None:
        """Open or make the file, in its full size; blocks of it that were not written take no space."""
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        os.ftruncate(self._file, self.nbytes)

    def stream(self, name: str) -> Stream:
        """A writer of the tensor's data from its beginning."""
        return Stream(self._file, *self._places[name])

    def crc32(self, name: str) -> str:
        """Of the tensor's data as they are in the file now."""
        offset, size = self._places[name]
        crc = 0
        for start in range(offset, offset + size, _CHUNK):
            crc = zlib.crc32(os.pread(self._file, min(_CHUNK, offset + size - start), start), crc)
        return f"{crc:08x}"

    def finish(self, crc32: Mapping[str, str]) -> None:
        """Write the header, and wait until everything is on the disk."""
        write_at(self._file, self._header(crc32), 0)
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file, finished or not."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _header(self, crc32: Mapping[str, str]) -> bytes:
        checksums = {name: crc32.get(name, "0" * 8) for name, _, _ in self._tensors}
        text = json.dumps(checksums, separators=(",", ":"))
        return header_bytes(self._tensors, {**self._metadata, CRC32_KEY: text})


class Stream:
    """Writes one tensor's data from front to back and checksums them."""

    def __init__(self, file: int, offset: int, size: int) -> None:
        self._file = file
        self._offset = offset
        self._end = offset + size
        self._crc = 0

    def write(self, data: Any) -> None:
        """Write contiguous bytes, or a contiguous array, after what was written before."""
        size = data.nbytes if hasattr(data, "nbytes") else len(data)
        assert self._offset + size <= self._end, "more data than the header has room for"
        write_at(self._file, data, self._offset)
        self._crc = zlib.crc32(data, self._crc)
        self._offset += size

    def finish(self) -> str:
        """The CRC-32, as eight digits, once all is written."""
        assert self._offset == self._end, "less data than the header announces"
        return f"{self._crc:08x}"


class Journal:
    """Which tensors are written, so that an interrupted conversion can go on. One JSON value per line.

    The first line says which conversion it belongs to; each further one names a tensor of the source and the CRC-32 of
    what was made of it. One that a kill cut short, or that is damaged, does not count: the tensor is made again.

    Args:
        path: of the journal.
        job: what the conversion is: anything JSON.

    Raises:
        ValueError: there is a journal of another conversion.
    """

    def __init__(self, path: Path, job: Any) -> None:
        self.done: dict[str, dict[str, str]] = {}
        self._lock = threading.Lock()
        complete = b""
        if path.exists():
            content = path.read_bytes()
            complete = content[: content.rfind(b"\n") + 1]
            lines = [_parsed(line) for line in complete.split(b"\n")[:-1]]
            if lines and lines[0] != job:
                raise ValueError(
                    f"{path.parent}: expected the beginning of this conversion, got one with other options or of a "
                    "changed model: remove that folder to start anew, or give the same options again"
                )
            self.done = {line["tensor"]: line["crc32"] for line in lines[1:] if _is_done(line)}
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        os.ftruncate(self._file, len(complete))
        os.lseek(self._file, 0, os.SEEK_END)
        if not complete:
            self._append(job)

    def add(self, tensor: str, crc32: Mapping[str, str]) -> None:
        """Note that everything made of a tensor is written."""
        self._append({"tensor": tensor, "crc32": dict(crc32)})

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _append(self, value: Any) -> None:
        line = memoryview(json.dumps(value).encode() + b"\n")
        with self._lock:
            while line:
                line = line[os.write(self._file, line) :]


def _parsed(line: bytes) -> Any:
    """The value of a line, or None where there is none to be read."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def _is_done(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("tensor"), str):
        return False
    crc32 = value.get("crc32")
    return isinstance(crc32, dict) and all(isinstance(crc, str) for crc in crc32.values())
