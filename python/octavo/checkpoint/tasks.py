"""What is made of each tensor of a checkpoint, decided from headers alone, before any data is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from octavo import file_format as names
from octavo._sizes import shown
from octavo._types import Array, column_indices, rotated_size
from octavo.checkpoint.files import TORCH_DTYPES, Entry, Shard
from octavo.checkpoint.layers import Chosen
from octavo.checkpoint.source import Source
from octavo.options import Options

Format = Literal["octavo", "bitsandbytes"]
_FLOATS = ("F32", "F16", "BF16")  # what octavo quantizes


@dataclass(frozen=True)
class Task:
    """A tensor of the source and what is made of it.

    Attributes:
        entry: the tensor.
        shape: ``(n, k)`` of a weight that becomes int8; None for a tensor that is copied.
        is_transposed: whether the tensor is ``[k, n]``.
        columns: that are kept in 16 bit.
        outputs: by part the name, dtype and shape of each tensor that is made; a copy is the part "".
    """

    entry: Entry
    shape: tuple[int, int] | None
    is_transposed: bool
    columns: Array | None
    outputs: dict[str, tuple[str, str, tuple[int, ...]]]


def plan_tasks(
    source: Source,
    chosen: Chosen,
    options: Options,
    outlier_columns: Mapping[str, Sequence[int]] | None,
    format: Format,
) -> list[list[Task]]:
    """For each shard what is to be done with each of its tensors.

    Raises:
        ValueError: a weight of another dtype, columns of other layers or none where they are needed, a name that is
            needed and taken.
    """
    columns = _columns_by_weight(source, chosen, outlier_columns or {})
    tasks = [
        [
            _task(entry, chosen, columns, options, format)
            for name, entry in shard.entries.items()
            if name not in shard.ties
        ]
        for shard in source.shards
    ]
    seen: set[str] = set()
    for task in (task for own in tasks for task in own):
        if options.outliers == "static" and task.shape and task.columns is None:
            raise ValueError(
                "quantize: outliers: expected outlier columns of every layer for 'static', got none of "
                f"{shown(task.entry.name)}"
            )
        for name, _, _ in task.outputs.values():
            if name in seen:
                raise ValueError(
                    f"quantize: {shown(name)}: expected a name that is free for int8 tensors, got one in use"
                )
            seen.add(name)
    return tasks


def _columns_by_weight(
    source: Source, chosen: Chosen, columns: Mapping[str, Sequence[int]]
) -> dict[str, Sequence[int]]:
    """The columns under the names that are stored: layers that share a weight keep the columns of each."""
    ties = {name: first for shard in source.shards for name, first in shard.ties.items()}
    result: dict[str, Sequence[int]] = {}
    for layer, own in columns.items():
        name = layer if layer in chosen.int8 else f"{layer}.weight"
        if name not in chosen.int8:
            raise ValueError(
                f"quantize: outlier_columns: expected layers that are quantized, got {shown(repr(layer))} (include and "
                "skip choose those)"
            )
        first = ties.get(name, name)
        result[first] = [*result.get(first, ()), *own]
    return result


def _task(entry: Entry, chosen: Chosen, columns: Mapping[str, Sequence[int]], options: Options, format: Format) -> Task:
    if entry.name not in chosen.int8:
        return Task(entry, None, False, None, {"": (entry.name, entry.dtype, entry.shape)})
    if entry.dtype not in _FLOATS:
        raise ValueError(f"{entry.where}: expected a weight of {', '.join(_FLOATS)}, got {entry.dtype}")
    is_transposed = chosen.int8[entry.name]
    n, k = entry.shape[::-1] if is_transposed else entry.shape
    kept = None
    if entry.name in columns:
        kept = column_indices("quantize", f"outlier_columns of {shown(entry.name)}", columns[entry.name], k)
    groups = n if options.granularity == "vector" else 1
    parts: dict[str, tuple[str, tuple[int, ...]]] = {names.CODES: ("I8", (n, rotated_size(k, options.rotation)))}
    if format == "bitsandbytes":
        parts |= {names.ABSMAX: ("F32", (n,)), names.LAYOUT: ("U8", ())}
    else:
        parts[names.SCALE] = "F32", (groups,)
        if options.scheme == "zeropoint":
            parts[names.ZEROPOINT] = "F32", (groups,)
        if kept is not None:
            parts[names.OUTLIER_COLUMNS] = "I32", (len(kept),)
            parts[names.OUTLIER_WEIGHT] = entry.dtype, (n, len(kept))
        parts[names.OPTIONS] = "U8", (len(names.encode_options(options, TORCH_DTYPES[entry.dtype], k)),)
    outputs = {part: (names.stored_name(entry.name, part, format), *own) for part, own in parts.items()}
    return Task(entry, (n, k), is_transposed, kept, outputs)


def tied_outputs(shard: Shard, tasks: list[Task]) -> dict[str, str]:
    """By name that is not in the file, the name of the tensor it shares."""
    made = {task.entry.name: task for task in tasks}
    tied = {}
    for name, first in shard.ties.items():
        for output, _, _ in made[first].outputs.values():
            tied[name + output.removeprefix(first) if made[first].shape else name] = output
    return tied
