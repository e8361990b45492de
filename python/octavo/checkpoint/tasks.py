"""What is made of each tensor of a checkpoint, decided from headers alone before any data is read; and the making."""

import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import octavo
from octavo import _core
from octavo import file_format as names
from octavo._text import shown, unexpected
from octavo._types import Array, column_indices, rotated_size
from octavo.checkpoint.files import DTYPES, Entry, header_bytes, itemsize
from octavo.checkpoint.layers import Chosen
from octavo.checkpoint.reader import Checkpoint
from octavo.file_format import Format
from octavo.options import Options

Output = tuple[str, str, tuple[int, ...]]  # name, dtype and shape of a tensor
_FLOATS = ("F32", "F16", "BF16")  # what octavo quantizes


@dataclass(frozen=True)
class Task:
    """A tensor of the source and what is made of it."""

    entry: Entry
    outputs: dict[str, Output]  # by part; a copy is the part ""
    options: Options | None = None  # of a weight that becomes int8; None: it is copied
    is_transposed: bool = False  # the tensor is [k, n]
    columns: Array | None = None  # that are kept in 16 bit

    def tied_outputs(self, name: str) -> dict[str, str]:
        """Where the source has this tensor as `name`, too: by name that is not in the file the one that is."""
        own = [output for output, _, _ in self.outputs.values()]
        return {name + output.removeprefix(self.entry.name) if self.options else name: output for output in own}

    def identity(self) -> bytes:
        """All that decides, with the tensor's data, what is made."""
        columns = None if self.columns is None else self.columns.tolist()
        options = None if self.options is None else self.options.to_dict()
        return json.dumps(
            (self.entry.name, self.entry.dtype, self.entry.shape, self.is_transposed, columns, self.outputs, options)
        ).encode()


def plan_tasks(
    model: Checkpoint,
    chosen: Chosen,
    options: Options,
    layer_options: Mapping[str, Options | None],
    outlier_columns: Mapping[str, Sequence[int]],
    format: Format,
) -> list[list[Task]]:
    """For each shard what is to be done with each of its tensors; raises ValueError for what does not fit."""
    columns = _columns_by_weight(model, chosen, outlier_columns)

    def tasks_of(entry: Entry) -> Iterator[Task]:
        if entry.name in chosen.int8:
            own = layer_options.get(entry.name.removesuffix(".weight")) or options
            yield _int8_task(entry, own, chosen.int8[entry.name], columns.get(entry.name), format)
        else:
            yield Task(entry, {"": (entry.name, entry.dtype, entry.shape)})
        if head := chosen.heads.get(entry.name):
            own = layer_options.get(head.removesuffix(".weight")) or options
            yield _int8_task(replace(entry, name=head), own, False, columns.get(head), format)

    tasks = [
        [task for name, each in shard.entries.items() if name not in shard.ties for task in tasks_of(each)]
        for shard in model.shards
    ]
    seen: set[str] = set()
    for name, _, _ in (output for own in tasks for each in own for output in each.outputs.values()):
        if name in seen:
            raise unexpected(f"quantize: {shown(name)}", "a name that is free for int8 tensors", "one in use")
        seen.add(name)
    return tasks


def _columns_by_weight(
    model: Checkpoint, chosen: Chosen, columns: Mapping[str, Sequence[int]]
) -> dict[str, Sequence[int]]:
    """The columns under the names that are stored: layers that share a weight keep the columns of each."""
    result: dict[str, Sequence[int]] = {}
    for layer, own in columns.items():
        name = layer if layer in chosen.int8 else f"{layer}.weight"
        if name not in chosen.int8 and name not in chosen.heads.values():
            got = f"{shown(repr(layer))} (include and skip choose those)"
            raise unexpected("quantize: outlier_columns", "layers that are quantized", got)
        first = model.ties.get(name, name)
        result[first] = [*result.get(first, ()), *own]
    return result


def _int8_task(
    entry: Entry, options: Options, is_transposed: bool, columns: Sequence[int] | None, format: Format
) -> Task:
    if entry.dtype not in _FLOATS:
        raise unexpected(entry.where, f"a weight of {', '.join(_FLOATS)}", entry.dtype)
    n, k = entry.shape[::-1] if is_transposed else entry.shape
    kept, options = None, options.keeping(columns)
    if columns is not None:
        kept = column_indices("quantize", f"outlier_columns of {shown(entry.name)}", columns, k)
    elif options.outliers == "static":
        raise unexpected("quantize: outliers", "outlier columns of every layer for 'static'", f"none of {entry.name}")
    groups = n if options.granularity == "vector" else 1
    width, is_packed = rotated_size(k, options.rotation), format == "packed"
    codes: tuple[int, ...] = (-(-n // 16), -(-width // 64) * 16, 16, 4) if is_packed else (n, width)
    parts: dict[str, tuple[str, tuple[int, ...]]] = {names.CODES: ("I8", codes)}
    if format == "bitsandbytes":
        parts |= {names.ABSMAX: ("F32", (n,)), names.LAYOUT: ("U8", ())}
    else:
        parts |= {names.SCALE: ("F32", (groups,))} | ({names.CODE_SUMS: ("I32", (n,))} if is_packed else {})
        if options.scheme == "zeropoint":
            parts[names.ZEROPOINT] = "F32", (groups,)
        if kept is not None:
            parts |= {names.OUTLIER_COLUMNS: ("I32", kept.shape), names.OUTLIER_WEIGHT: (entry.dtype, (n, len(kept)))}
        parts[names.OPTIONS] = "U8", (len(_json(entry, options, k, n if is_packed else None)),)
    outputs = {part: (names.stored_name(entry.name, part, format), *own) for part, own in parts.items()}
    return Task(entry, outputs, options, is_transposed, kept)


def _json(entry: Entry, options: Options, k: int, n: int | None) -> bytes:
    return names.encode_options(options, DTYPES[entry.dtype][1], k, n)


# --- the output -------------------------------------------------------------------------------------------------------


class Writer:
    """A safetensors file under construction. What it will hold is known, so every tensor has its place at once.

    The header, which carries the CRC-32 of each tensor and what the file was made of, is written by `finish`.
    """

    def __init__(self, file: int, outputs: Iterable[Output], metadata: dict[str, str]) -> None:
        self._file = file
        # Packed codes first, which are whole KiB and are mapped as they lie; then wide elements, so that each tensor
        # begins at a multiple of its element's size.
        self._outputs = sorted(outputs, key=lambda o: ((o[1], len(o[2])) != ("I8", 4), -itemsize(o[1]), o[0]))
        self._metadata = metadata
        self._crc32 = {name: 0 for name, _, _ in self._outputs}
        position = len(self._header("0" * 64))
        self._places: dict[str, int] = {}
        for name, dtype, shape in self._outputs:
            self._places[name] = position
            position += itemsize(dtype) * math.prod(shape)
        os.ftruncate(file, position)

    def write(self, name: str, data: Any) -> None:
        """Write what follows of a tensor: an array, or bytes."""
        data = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else np.ascontiguousarray(data)
        view = memoryview(data.reshape(-1).view(np.uint8))
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


# --- one tensor -------------------------------------------------------------------------------------------------------


def convert(task: Task, file: int, writer: Writer, block: int) -> bytes:
    """Convert or copy one tensor, which is read once, `block` elements at a time; returns the hash of its bytes.

    A copy takes a MiB of memory, a weight its own size and 9 bytes for each element of a block. Raises ValueError,
    which names file and tensor, for NaN or Inf, and where the file ends before.
    """
    entry = task.entry
    if task.options is None and entry.strides is None:
        return hash_of(entry, file, lambda chunk: writer.write(entry.name, chunk))
    data, flat = entry.read(file)
    if task.options is None:
        step = max(1, block * len(data) // max(1, entry.numel))
        for first in range(0, len(data), step):
            writer.write(entry.name, data[first : first + step])
    else:
        _quantize(task, task.options, data.T if task.is_transposed else data, writer, block)
    return hashlib.blake2b(flat.view(np.uint8), digest_size=32).digest()


def hash_of(entry: Entry, file: int, copy: Callable[[Array], None] = lambda chunk: None) -> bytes:
    """The hash of a tensor's bytes in the file; `copy` gets each chunk of them."""
    read = hashlib.blake2b(digest_size=32)
    for chunk in entry.chunks(file):
        read.update(chunk)
        copy(chunk)
    return read.digest()


def _quantize(task: Task, options: Options, data: Array, writer: Writer, block: int) -> None:
    """Eq. 1-3 of the paper, block by block.

    A scale of the whole weight depends on the weight's extremes only. So where one is wanted, each block is quantized
    together with two rows that hold the extremes.
    """
    (n, k), dtype = data.shape, task.entry.dtype
    output = {part: name for part, (name, _, _) in task.outputs.items()}
    whole = options.granularity != "vector"
    # What a rotation makes of the extremes only the whole weight tells.
    step = n if whole and options.rotation else max(1, block // k)
    if names.CODE_SUMS in output:
        step = -(-step // 16) * 16  # rows that are packed together
    blocks = [slice(first, first + step) for first in range(0, n, step)]
    extremes: Array | None = None
    if whole and len(blocks) > 1:
        found = np.array([_extremes(_as_numbers(data[rows], dtype)) for rows in blocks])
        extremes = np.array([found[:, 0].min(), found[:, 1].max()])  # a NaN is one, for quantize_weight to refuse
    every = (names.SCALE, names.ZEROPOINT, names.CODE_SUMS, names.ABSMAX)
    small: dict[str, list[Array]] = {part: [] for part in every if part in output}

    def convert_rows(rows: Array) -> None:  # a function, so that nothing of a block is left when the next one is read
        if task.columns is not None:
            writer.write(output[names.OUTLIER_WEIGHT], rows[:, task.columns])
        values = _as_numbers(rows, dtype)
        if names.ABSMAX in small:
            small[names.ABSMAX].append(np.maximum(values.max(1), -values.min(1)).astype(np.float32))
        if extremes is not None:
            values = np.concatenate([values, np.broadcast_to(extremes[:, None], (2, k))])
        try:
            weight = octavo.quantize_weight(values, **options.of_weight)
        except ValueError as error:
            raise ValueError(f"{task.entry.where}: {error}") from error
        codes = weight.codes[: len(rows)]
        writer.write(output[names.CODES], _core.pack(codes) if names.CODE_SUMS in output else codes)
        for part in small.keys() - {names.ABSMAX}:
            small[part].append(getattr(weight, part)[: len(rows)])

    for rows in blocks:
        convert_rows(data[rows])
    parts: dict[str, Any] = {names.LAYOUT: bytes([names.ROW_MAJOR]), names.OUTLIER_COLUMNS: task.columns}
    parts[names.OPTIONS] = _json(task.entry, options, k, n if names.CODE_SUMS in output else None)
    for part, arrays in small.items():
        parts[part] = arrays[0] if whole and part != names.CODE_SUMS else np.concatenate(arrays)
    for part in output.keys() & parts.keys():
        writer.write(output[part], parts[part])


def _extremes(values: Array) -> tuple[Any, Any]:
    return values.min(), values.max()


def _as_numbers(raw: Array, dtype: str) -> Array:
    """Contiguous; bfloat16 as float32, which has all its values, what NumPy knows as it is."""
    if dtype != "BF16":
        return np.ascontiguousarray(raw)
    bits = raw.astype(np.uint32, order="C")
    bits <<= 16
    return bits.view(np.float32)
