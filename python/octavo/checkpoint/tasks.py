"""What becomes of each tensor of a checkpoint, decided from headers alone, before any data is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from octavo._types import column_indices
from octavo.checkpoint import format as names
from octavo.checkpoint.format import Options
from octavo.checkpoint.layers import LayerChoice, candidate, is_stacked_experts
from octavo.checkpoint.source import Shard, Source
from octavo.checkpoint.tensors import FLOATS, Array, Entry

Format = Literal["octavo", "bitsandbytes"]


@dataclass(frozen=True)
class Task:
    """A tensor of the source and what becomes of it."""

    entry: Entry
    layer: str | None  # None: copied
    transpose: bool
    columns: Array | None
    outputs: list[tuple[str, str, tuple[int, ...]]]


def plan_tasks(
    source: Source,
    options: Options,
    choice: LayerChoice,
    outlier_columns: Mapping[str, Sequence[int]] | None,
    format: Format,
) -> tuple[list[list[Task]], list[str]]:
    """For each shard what is to be done with each of its tensors, and the linear layers that stay as they are."""
    if "quantization_config" in source.config:
        method = source.config["quantization_config"]
        if isinstance(method, dict):
            method = "octavo" if "octavo" in method else method.get("quant_method")
        raise ValueError(
            f"quantize: model: expected a 16/32-bit model, got one that {method} has quantized (config.json)"
        )
    columns = _columns_by_layer(source, outlier_columns or {})
    shard_tasks = []
    left: list[str] = []
    for shard in source.shards:
        layers = _layers(shard, choice)
        candidates = {name: candidate(name, entry.shape) for name, entry in shard.entries.items()}
        left += [layer for name, layer in candidates.items() if layer and not layers[name] and name not in shard.ties]
        left += [name for name, entry in shard.entries.items() if is_stacked_experts(name, entry.shape)]
        shard_tasks.append(
            [
                _task(entry, layers[entry.name], choice, columns, options, format)
                for entry in shard.entries.values()
                if entry.name not in shard.ties
            ]
        )
    choice.check_patterns()
    tasks = [task for own in shard_tasks for task in own]
    chosen = {task.layer for task in tasks if task.layer}
    if not chosen:
        raise ValueError(
            "quantize: model: expected linear layers (two-dimensional .weight tensors), got none to quantize"
        )
    for layer in columns:
        if layer not in chosen:
            raise ValueError(
                f"quantize: outlier_columns: expected layers that are quantized, got {layer!r} (include and skip "
                "choose those)"
            )
    if options.outliers == "static" and any(task.layer and task.columns is None for task in tasks):
        missing = next(task.layer for task in tasks if task.layer and task.columns is None)
        raise ValueError(
            f"quantize: outliers: expected outlier columns of every layer for 'static', got none of {missing}"
        )
    seen: set[str] = set()
    for name in (name for task in tasks for name, _, _ in task.outputs):
        if name in seen:
            raise ValueError(
                f"quantize: {name}: expected a name that is free for a layer's int8 tensors, got one in use"
            )
        seen.add(name)
    return shard_tasks, left


def _layers(shard: Shard, choice: LayerChoice) -> dict[str, str | None]:
    """By tensor the layer that is to be int8. Of tensors that are one, all are or none."""
    layers = {name: choice.layer(name, entry.shape) for name, entry in shard.entries.items()}
    for name, first in shard.ties.items():
        if layers[name] is None:
            layers[first] = None
    for name, first in shard.ties.items():
        layers[name] = layers[name] if layers[first] else None
    return layers


def _columns_by_layer(source: Source, columns: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """The columns under the names that are stored: layers that share a weight keep the columns of each."""
    stored = {
        name.rpartition(".")[0]: first.rpartition(".")[0]
        for shard in source.shards
        for name, first in shard.ties.items()
    }
    result: dict[str, Sequence[int]] = {}
    for layer, own in columns.items():
        first = stored.get(layer, layer)
        result[first] = [*result.get(first, ()), *own]
    return result


def _task(
    entry: Entry,
    layer: str | None,
    choice: LayerChoice,
    outlier_columns: Mapping[str, Sequence[int]],
    options: Options,
    format: Format,
) -> Task:
    if layer is None:
        return Task(entry, None, False, None, [(entry.name, entry.dtype, entry.shape)])
    if entry.dtype not in FLOATS:
        raise ValueError(f"{entry.path}: {entry.name}: expected a weight of {', '.join(FLOATS)}, got {entry.dtype}")
    transpose = choice.transposed(layer)
    n, k = entry.shape[::-1] if transpose else entry.shape
    columns = None
    if layer in outlier_columns:
        columns = column_indices("quantize", f"outlier_columns of {layer}", outlier_columns[layer], k)
    groups = n if options.granularity == "vector" else 1

    outputs: list[tuple[str, str, tuple[int, ...]]] = [(f"{layer}.{names.WEIGHT}", "I8", (n, k))]
    if format == "bitsandbytes":
        outputs += [(f"{layer}.{names.BNB_ABSMAX}", "F32", (n,)), (f"{layer}.{names.BNB_LAYOUT}", "U8", ())]
        return Task(entry, layer, transpose, None, outputs)
    outputs.append((f"{layer}.{names.SCALE}", "F32", (groups,)))
    if options.scheme == "zeropoint":
        outputs.append((f"{layer}.{names.ZEROPOINT}", "F32", (groups,)))
    if columns is not None:
        outputs.append((f"{layer}.{names.OUTLIER_COLUMNS}", "I32", (len(columns),)))
        outputs.append((f"{layer}.{names.OUTLIER_WEIGHT}", entry.dtype, (n, len(columns))))
    outputs.append((f"{layer}.{names.EXTRA_STATE}", "U8", (len(options.extra_state()),)))
    return Task(entry, layer, transpose, columns, outputs)


def tied_outputs(shard: Shard, tasks: list[Task]) -> dict[str, str]:
    """By name that is not in the file, the name of the tensor it shares."""
    made = {task.entry.name: task for task in tasks}
    tied = {}
    for name, first in shard.ties.items():
        task = made[first]
        if task.layer is None:
            tied[name] = first
        else:
            layer = name.rpartition(".")[0]
            tied.update({layer + output.removeprefix(task.layer): output for output, _, _ in task.outputs})
    return tied


def quantized_layers(source: Source, choice: LayerChoice) -> set[str]:
    """The layers that are quantized, tied ones under each of their names.

    Raises ValueError for an include pattern that none of them matches.
    """
    layers = {layer for shard in source.shards for layer in _layers(shard, choice).values() if layer}
    choice.check_patterns()
    return layers
