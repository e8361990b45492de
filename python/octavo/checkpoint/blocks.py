"""One tensor from the source's file to the output's, in blocks of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

import octavo
from octavo.checkpoint import format as names
from octavo.checkpoint.format import Options
from octavo.checkpoint.tasks import Task
from octavo.checkpoint.tensors import Array, Entry, read_rows
from octavo.checkpoint.writer import OutputFile

# While an element is converted it takes at most 4 bytes as read, 4 widened or beside the tensor's extremes and 1 of
# codes; the rest is for what the allocator holds on to.
_BYTES_PER_ELEMENT = 16
_LARGEST_BLOCK = 1 << 22  # elements: beyond, nothing gets faster


def block_elements(tasks: Sequence[Task], jobs: int, memory: int | None) -> int:
    """How many elements a job may hold at a time."""
    if memory is None:
        memory = 4 * max(task.entry.numel for task in tasks)
    return max(1, min(_LARGEST_BLOCK, memory // (jobs * _BYTES_PER_ELEMENT)))


def convert_tensor(
    task: Task, file: int, output: OutputFile, options: Options, block: int, advance: Callable[[int], None]
) -> dict[str, str]:
    """Convert or copy one tensor; returns the CRC-32 of each tensor that was made."""
    if task.layer is None:
        return _copy(task, file, output, block, advance)
    if any(name.endswith(f".{names.BNB_ABSMAX}") for name, _, _ in task.outputs):
        return _quantize_for_bitsandbytes(task, file, output, block, advance)
    return _quantize(task, file, output, options, block, advance)


def _copy(task: Task, file: int, output: OutputFile, block: int, advance: Callable[[int], None]) -> dict[str, str]:
    entry = task.entry
    stream = output.stream(entry.name)
    if entry.transposed:
        height, width = entry.shape
        rows = max(1, block // width)
        for first in range(0, height, rows):
            data = np.ascontiguousarray(read_rows(file, entry, first, min(first + rows, height)))
            stream.write(data)
            advance(data.nbytes)
    else:
        flat = Entry(entry.name, "U8", (entry.nbytes, 1), entry.path, entry.offset)
        chunk = max(1 << 16, 4 * block)  # bytes
        for first in range(0, entry.nbytes, chunk):
            data = read_rows(file, flat, first, min(first + chunk, entry.nbytes))
            stream.write(data)
            advance(data.nbytes)
    return {entry.name: stream.finish()}


def _quantize(
    task: Task, file: int, output: OutputFile, options: Options, block: int, advance: Callable[[int], None]
) -> dict[str, str]:
    """Eq. 1-3 of the paper, block by block.

    A scale of the whole weight depends on the weight's extremes only. So where one is wanted the weight is read twice,
    and each block quantized together with two rows that hold the extremes.
    """
    streams = {name.removeprefix(f"{task.layer}."): output.stream(name) for name, _, _ in task.outputs}
    whole = options.granularity != "vector"
    extremes = _extremes(task, file, block) if whole else None
    scales: list[Array] = []
    zeropoints: list[Array] = []

    # A function, so that nothing of a block is left when the next one is read.
    def convert_rows(first: int, last: int) -> None:
        raw = _read_block(task, file, first, last)
        if task.columns is not None:
            streams[names.OUTLIER_WEIGHT].write(np.ascontiguousarray(raw[:, task.columns]))
        values = _as_numbers(raw, task.entry)
        if extremes is not None:
            values = np.concatenate([values, np.broadcast_to(extremes[:, None], (2, values.shape[1]))])
        weight = _quantized(task, values, options)
        streams[names.WEIGHT].write(np.ascontiguousarray(weight.codes[: last - first]))
        scales.append(weight.scale)
        if weight.zeropoint is not None:
            zeropoints.append(weight.zeropoint)
        advance(raw.nbytes)

    for first, last in _row_ranges(task, block):
        convert_rows(first, last)
    streams[names.SCALE].write(scales[0] if whole else np.concatenate(scales))
    if zeropoints:
        streams[names.ZEROPOINT].write(zeropoints[0] if whole else np.concatenate(zeropoints))
    if task.columns is not None:
        streams[names.OUTLIER_COLUMNS].write(task.columns)
    streams[names.EXTRA_STATE].write(options.extra_state())
    return {f"{task.layer}.{name}": stream.finish() for name, stream in streams.items()}


def _quantize_for_bitsandbytes(
    task: Task, file: int, output: OutputFile, block: int, advance: Callable[[int], None]
) -> dict[str, str]:
    """The same codes; instead of the scale, the absmax of each row."""
    outputs = [name for name, _, _ in task.outputs]
    weight_stream, absmax_stream, layout_stream = streams = [output.stream(name) for name in outputs]
    absmax: list[Array] = []

    def convert_rows(first: int, last: int) -> None:
        raw = _read_block(task, file, first, last)
        values = _as_numbers(raw, task.entry)
        absmax.append(np.maximum(values.max(1), -values.min(1)).astype(np.float32))
        weight_stream.write(np.ascontiguousarray(_quantized(task, values, Options()).codes))
        advance(raw.nbytes)

    for first, last in _row_ranges(task, block):
        convert_rows(first, last)
    absmax_stream.write(np.concatenate(absmax))
    layout_stream.write(bytes([names.BNB_ROW_MAJOR]))
    return {name: stream.finish() for name, stream in zip(outputs, streams, strict=True)}


def _quantized(task: Task, values: Array, options: Options) -> octavo.Int8Weight:
    try:
        return octavo.quantize_weight(values, scheme=options.scheme, granularity=options.granularity)
    except ValueError as error:
        raise ValueError(f"{task.entry.path}: {task.entry.name}: {error}") from error


def _extremes(task: Task, file: int, block: int) -> Array:
    """The smallest and the largest element. A NaN is returned as one, for quantize_weight to refuse."""

    def extremes_of_rows(first: int, last: int) -> Array:
        values = _as_numbers(_read_block(task, file, first, last), task.entry)
        return np.array([values.min(), values.max()])

    found = np.stack([extremes_of_rows(first, last) for first, last in _row_ranges(task, block)])
    return np.array([found[:, 0].min(), found[:, 1].max()])


def _row_ranges(task: Task, block: int) -> Iterator[tuple[int, int]]:
    """[first, last) of each block of rows of the weight ``[n, k]``."""
    n, k = task.outputs[0][2]
    rows = max(1, block // k)
    return ((first, min(first + rows, n)) for first in range(0, n, rows))


def _read_block(task: Task, file: int, first: int, last: int) -> Array:
    return read_rows(file, task.entry, first, last, transpose=task.transpose)


def _as_numbers(raw: Array, entry: Entry) -> Array:
    """Bfloat16 as float32, which has all its values; what NumPy knows as it is."""
    if entry.dtype != "BF16":
        return raw
    bits = raw.astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)
