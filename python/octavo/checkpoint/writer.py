"""One tensor from the source's file to the output's; and the output, a safetensors file written in any order."""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

import octavo
from octavo import file_format as names
from octavo._types import Array
from octavo.checkpoint.files import NUMPY_DTYPES, TORCH_DTYPES, header_bytes
from octavo.checkpoint.tasks import Task
from octavo.options import Options

Output = tuple[str, str, tuple[int, ...]]


class Writer:
    """A safetensors file under construction. What it will hold is known, so every tensor has its place at once.

    The header, which carries the CRC-32 of each tensor, is written by `finish`.

    Args:
        file: open for writing.
        outputs: name, dtype and shape of each tensor, in any order.
        metadata: strings; those under `CRC32_KEY` and `MADE_OF_KEY` come with `finish`.
    """

    def __init__(self, file: int, outputs: Sequence[Output], metadata: dict[str, str]) -> None:
        self._file = file
        # Wide elements first, so that each tensor begins at a multiple of its element's size.
        self._outputs = sorted(outputs, key=lambda each: (-np.dtype(NUMPY_DTYPES[each[1]]).itemsize, each[0]))
        self._metadata = metadata
        self._crc32 = {name: 0 for name, _, _ in self._outputs}
        position = len(self._header("0" * 64))
        self._places: dict[str, int] = {}
        for name, dtype, shape in self._outputs:
            self._places[name] = position
            position += np.dtype(NUMPY_DTYPES[dtype]).itemsize * math.prod(shape)
        os.ftruncate(file, position)

    def write(self, name: str, data: Any) -> None:
        """Write what follows of a tensor: a contiguous array, or bytes."""
        view = memoryview(data).cast("B") if isinstance(data, bytes) else memoryview(data.reshape(-1).view(np.uint8))
        self._crc32[name] = zlib.crc32(view, self._crc32[name])
        self._write_at(view, self._places[name])
        self._places[name] += len(view)

    def finish(self, made_of: str) -> None:
        """Write the header, and wait until everything is on the disk."""
        self._write_at(memoryview(self._header(made_of)), 0)
        os.fsync(self._file)

    def _write_at(self, data: memoryview, offset: int) -> None:
        while len(data):
            count = os.pwrite(self._file, data, offset)
            data, offset = data[count:], offset + count

    def _header(self, made_of: str) -> bytes:
        crc32 = json.dumps({name: f"{crc:08x}" for name, crc in self._crc32.items()}, separators=(",", ":"))
        metadata = {**self._metadata, names.CRC32_KEY: crc32, names.MADE_OF_KEY: made_of}
        return header_bytes(self._outputs, metadata)


def convert(
    task: Task, file: int, writer: Writer, options: Options, block: int, advance: Callable[[int], None]
) -> bytes:
    """Convert or copy one tensor, which is read once.

    A copy takes a MiB of memory, a weight its own size and 9 bytes for each element of a block.

    Args:
        task: what to do.
        file: the source's, open.
        writer: of the output.
        options: of the layers.
        block: elements that are converted at a time.
        advance: is told how many bytes are done.

    Returns:
        The hash of the tensor's bytes in the file.

    Raises:
        ValueError: names file and tensor: NaN or Inf among its values, or the file ends before.
    """
    entry = task.entry
    read = hashlib.blake2b(digest_size=32)
    if task.shape is None and entry.strides is None:
        for chunk in entry.bytes_in_file(file):
            read.update(chunk)
            writer.write(entry.name, chunk)
            advance(chunk.nbytes)
        return read.digest()
    data, flat = entry.read(file)
    read.update(flat.view(np.uint8))
    if task.shape is None:
        step = max(1, block * len(data) // max(1, entry.numel))
        for first in range(0, len(data), step):
            writer.write(entry.name, np.ascontiguousarray(data[first : first + step]))
    else:
        _quantize(task, data.T if task.is_transposed else data, writer, options, block)
    advance(entry.nbytes)
    return read.digest()


def _quantize(task: Task, data: Array, writer: Writer, options: Options, block: int) -> None:
    """Eq. 1-3 of the paper, block by block.

    A scale of the whole weight depends on the weight's extremes only. So where one is wanted, each block is quantized
    together with two rows that hold the extremes.
    """
    assert task.shape is not None
    n, k = task.shape
    whole = options.granularity != "vector"
    # What a rotation makes of the extremes only the whole weight tells.
    step = n if whole and options.rotation else max(1, block // k)
    how: Any = {"scheme": options.scheme, "granularity": options.granularity, "rotation": options.rotation}
    extremes: Array | None = None
    scales: list[Array] = []
    zeropoints: list[Array] = []
    absmax: list[Array] = []
    output = {part: name for part, (name, _, _) in task.outputs.items()}

    def blocks() -> Iterator[Array]:
        return (data[first : first + step] for first in range(0, n, step))

    def convert_rows(rows: Array) -> None:  # a function, so that nothing of a block is left when the next one is read
        if task.columns is not None:
            writer.write(output[names.OUTLIER_WEIGHT], np.ascontiguousarray(rows[:, task.columns]))
        values = _as_numbers(rows, task.entry.dtype)
        if names.ABSMAX in output:
            absmax.append(np.maximum(values.max(1), -values.min(1)).astype(np.float32))
        if extremes is not None:
            values = np.concatenate([values, np.broadcast_to(extremes[:, None], (2, k))])
        try:
            weight = octavo.quantize_weight(values, **how)
        except ValueError as error:
            raise ValueError(f"{task.entry.where}: {error}") from error
        writer.write(output[names.CODES], np.ascontiguousarray(weight.codes[: len(rows)]))
        scales.append(weight.scale)
        if weight.zeropoint is not None:
            zeropoints.append(weight.zeropoint)

    if whole and step < n:
        found = np.array([_extremes(_as_numbers(rows, task.entry.dtype)) for rows in blocks()])
        extremes = np.array([found[:, 0].min(), found[:, 1].max()])  # a NaN is one, for quantize_weight to refuse
    for rows in blocks():
        convert_rows(rows)
    if names.ABSMAX in output:
        writer.write(output[names.ABSMAX], np.concatenate(absmax))
        writer.write(output[names.LAYOUT], bytes([names.ROW_MAJOR]))
        return
    writer.write(output[names.SCALE], scales[0] if whole else np.concatenate(scales))
    if zeropoints:
        writer.write(output[names.ZEROPOINT], zeropoints[0] if whole else np.concatenate(zeropoints))
    if task.columns is not None:
        writer.write(output[names.OUTLIER_COLUMNS], task.columns)
    writer.write(output[names.OPTIONS], names.encode_options(options, TORCH_DTYPES[task.entry.dtype], k))


def _extremes(values: Array) -> tuple[Any, Any]:
    return values.min(), values.max()


def _as_numbers(raw: Array, dtype: str) -> Array:
    """Contiguous; bfloat16 as float32, which has all its values, what NumPy knows as it is."""
    if dtype != "BF16":
        return np.ascontiguousarray(raw)
    bits = raw.astype(np.uint32, order="C")
    bits <<= 16
    return bits.view(np.float32)
