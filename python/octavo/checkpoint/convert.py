"""`octavo quantize`: a 16/32-bit checkpoint into an int8 one, in blocks of rows.

What each tensor becomes is decided first, from headers alone (`_tasks`); so every output has its place before any
data is read, and tensors can be converted in any order, by several threads, and again after a kill. All happens in
``OUT.partial``, which becomes ``OUT`` by one rename at the end.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

import octavo
from octavo._types import Granularity, Outliers, Scheme, column_indices
from octavo._types import Path as ProductPath
from octavo.checkpoint import format as names
from octavo.checkpoint.format import Options, quantization_config
from octavo.checkpoint.layers import LayerChoice, candidate
from octavo.checkpoint.source import Shard, Source, open_source
from octavo.checkpoint.tensors import FLOATS, Array, Entry, read_rows
from octavo.checkpoint.writer import Journal, OutputFile

Format = Literal["octavo", "bitsandbytes"]
_JOURNAL = ".octavo-journal"
# While an element is converted it takes at most 4 bytes as read, 4 widened or beside the tensor's extremes and 1 of
# codes; a quarter of the memory is for what the allocator holds on to.
_BYTES_PER_ELEMENT = 12
_LARGEST_BLOCK = 1 << 22  # elements: beyond, nothing gets faster


@dataclass(frozen=True)
class Report:
    """What `quantize` did.

    Attributes:
        output: the folder.
        layers: linear layers that are int8 now.
        left: linear layers, and stacks of experts' weights, that stay in 16/32 bit.
        tensors: of the source.
        resumed: tensors that an interrupted run had already converted.
        source_bytes, output_bytes: of all tensors, before and after.
        seconds: of this run.
    """

    output: str
    layers: int
    left: list[str]
    tensors: int
    resumed: int
    source_bytes: int
    output_bytes: int
    seconds: float


@dataclass(frozen=True)
class _Task:
    """A tensor of the source and what becomes of it."""

    entry: Entry
    layer: str | None  # None: copied
    transpose: bool
    columns: Array | None
    outputs: list[tuple[str, str, tuple[int, ...]]]


def quantize(
    model: str | Path,
    output: str | Path,
    *,
    scheme: Scheme = "absmax",
    granularity: Granularity = "vector",
    threshold: float = 6.0,
    outliers: Outliers = "columns",
    path: ProductPath = "auto",
    include: Sequence[str] | None = None,
    skip: Sequence[str] | None = None,
    outlier_columns: Mapping[str, Sequence[int]] | None = None,
    format: Format = "octavo",
    jobs: int | None = None,
    memory: int | None = None,
    progress: bool = True,
) -> Report:
    """Convert a checkpoint's linear layers to int8.

    Run again after an interruption, with the same arguments, it goes on where it was: what was written is read back and
    compared with its CRC-32. The result has the same bytes, whatever was interrupted and however many jobs there are.

    Args:
        model: a folder as Hugging Face lays it out, or a file: safetensors, sharded or not, or a PyTorch state dict.
        output: the folder to make. It appears when it is complete; until then there is ``<output>.partial``.
        scheme, granularity: see `octavo.quantize_weight`.
        threshold, outliers, path: recorded for the layers; see `octavo.linear`.
        include, skip: patterns of layer names; see `octavo.checkpoint.layers`.
        outlier_columns: by layer, input features whose 16-bit weights are kept; from `calibrate` or elsewhere.
        format: "octavo", or "bitsandbytes" for its ``Linear8bitLt`` (absmax, vector, no kept columns).
        jobs: tensors converted at a time; default: octavo's threads, at most 8. Jobs share `memory`, so more of them
            work on smaller blocks.
        memory: bytes for the blocks of all jobs together; default: those of the largest tensor in float32. A job uses
            at most 48 MiB of it, and at least what one row takes.
        progress: show a progress bar on stderr.

    Returns:
        Report.

    Raises:
        OSError: files that cannot be read or written, no space, or `output` exists.
        ValueError: a file that is truncated or corrupt, a weight with NaN or Inf (both name the tensor), a checkpoint
            that is quantized already or has no linear layers, options that do not exist or fit each other. The partial
            output is removed where this model cannot be converted.
    """
    started = time.monotonic()
    options = Options(scheme, granularity, float(threshold), outliers, path)
    if format not in ("octavo", "bitsandbytes"):
        raise ValueError(f"quantize: format: expected 'octavo' or 'bitsandbytes', got {format!r}")
    if format == "bitsandbytes" and (scheme, granularity, outlier_columns) != ("absmax", "vector", None):
        raise ValueError(
            "quantize: format: expected scheme absmax, granularity vector, no outlier columns for 'bitsandbytes', "
            f"got {scheme}, {granularity} and {'some' if outlier_columns else 'no'} columns"
        )
    if jobs is None:
        jobs = min(8, octavo.get_num_threads())
    if jobs < 1:
        raise ValueError(f"quantize: jobs: expected at least 1, got {jobs}")

    source = open_source(model)
    tasks, left = _tasks(source, options, LayerChoice(source.config, include, skip), outlier_columns, format)
    job = {
        "format_version": names.FORMAT_VERSION,
        "format": format,
        **asdict(options),
        "layers": [task.layer for shard_tasks in tasks for task in shard_tasks if task.layer],
        "outlier_columns": {layer: [int(c) for c in columns] for layer, columns in (outlier_columns or {}).items()},
        "files": [
            [shard.path.name, stat.st_size, stat.st_mtime_ns] for shard in source.shards for stat in [shard.path.stat()]
        ],
    }
    job = json.loads(json.dumps(job))  # as the journal gives it back
    all_tasks = [task for shard_tasks in tasks for task in shard_tasks]
    output = Path(output)
    partial = output.with_name(output.name + ".partial")

    def report(resumed: int) -> Report:
        return Report(
            str(output),
            sum(task.layer is not None for task in all_tasks),
            left,
            len(all_tasks),
            resumed,
            sum(task.entry.nbytes for task in all_tasks),
            sum(file.nbytes for file in files),
            time.monotonic() - started,
        )

    files = _output_files(partial, source, tasks, options, format)
    if (output / _JOURNAL).exists():  # killed after the last rename, before the journal went
        Journal(output / _JOURNAL, job).close()
        (output / _JOURNAL).unlink()
        return report(len(all_tasks))
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise FileExistsError(f"{output}: expected a folder that is not there yet, got one: remove it or name another")

    partial.mkdir(parents=True, exist_ok=True)
    with _locked(partial):
        if not (partial / _JOURNAL).exists():
            _check_space(partial, sum(file.nbytes for file in files))
        journal = Journal(partial / _JOURNAL, job)
        try:
            for file in files:
                file.open()
            resumed = _run(
                source, tasks, files, options, journal, jobs, _block_elements(all_tasks, jobs, memory), progress
            )
            for file, shard_tasks in zip(files, tasks, strict=True):
                own = {name for task in shard_tasks for name, _, _ in task.outputs}
                crc32 = {name: crc for made in journal.done.values() for name, crc in made.items() if name in own}
                file.finish(crc32)
        except ValueError:
            shutil.rmtree(partial)  # no second run would get further
            raise
        finally:
            journal.close()
            for file in files:
                file.close()
        _write_companions(
            partial, source, files, tasks, quantization_config(options, left, bitsandbytes=format != "octavo")
        )
        os.rename(partial, output)
        _sync(output.parent)
        (output / _JOURNAL).unlink()
    return report(resumed)


# --- what becomes of each tensor --------------------------------------------------------------------------------------


def _tasks(
    source: Source,
    options: Options,
    choice: LayerChoice,
    outlier_columns: Mapping[str, Sequence[int]] | None,
    format: Format,
) -> tuple[list[list[_Task]], list[str]]:
    """For each shard what is to be done with each of its tensors, and the linear layers that stay as they are."""
    if "quantization_config" in source.config:
        method = source.config["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else method
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
        left += [name for name, entry in shard.entries.items() if len(entry.shape) == 3 and "experts" in name]
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
            raise ValueError(f"quantize: outlier_columns: expected layers that are quantized, got {layer!r}")
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
) -> _Task:
    if layer is None:
        return _Task(entry, None, False, None, [(entry.name, entry.dtype, entry.shape)])
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
        return _Task(entry, layer, transpose, None, outputs)
    outputs.append((f"{layer}.{names.SCALE}", "F32", (groups,)))
    if options.scheme == "zeropoint":
        outputs.append((f"{layer}.{names.ZEROPOINT}", "F32", (groups,)))
    if columns is not None:
        outputs.append((f"{layer}.{names.OUTLIER_COLUMNS}", "I32", (len(columns),)))
        outputs.append((f"{layer}.{names.OUTLIER_WEIGHT}", entry.dtype, (n, len(columns))))
    outputs.append((f"{layer}.{names.EXTRA_STATE}", "U8", (len(options.extra_state()),)))
    return _Task(entry, layer, transpose, columns, outputs)


def _output_files(
    folder: Path, source: Source, tasks: list[list[_Task]], options: Options, format: Format
) -> list[OutputFile]:
    """One for each shard of the source."""
    count = len(source.shards)
    files = []
    for number, (shard, own) in enumerate(zip(source.shards, tasks, strict=True), start=1):
        name = "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
        metadata = options.metadata() if format == "octavo" else {"format": "pt"}
        if shard.ties:
            metadata[names.TIED_KEY] = json.dumps(_tied_outputs(shard, own))
        outputs = [output for task in own for output in task.outputs]
        files.append(OutputFile(folder / name, outputs, metadata))
    return files


def _tied_outputs(shard: Shard, tasks: list[_Task]) -> dict[str, str]:
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


def quantized_layers(source: Source) -> set[str]:
    """The layers that are quantized unless asked otherwise, tied ones under each of their names."""
    choice = LayerChoice(source.config)
    return {layer for shard in source.shards for layer in _layers(shard, choice).values() if layer}


# --- the work ---------------------------------------------------------------------------------------------------------


def _block_elements(tasks: list[_Task], jobs: int, memory: int | None) -> int:
    """How many elements a job may hold at a time."""
    if memory is None:
        memory = 4 * max(task.entry.numel for task in tasks)
    return max(1, min(_LARGEST_BLOCK, memory // (jobs * _BYTES_PER_ELEMENT)))


def _run(
    source: Source,
    tasks: list[list[_Task]],
    files: list[OutputFile],
    options: Options,
    journal: Journal,
    jobs: int,
    block: int,
    progress: bool,
) -> int:
    """Convert what is not in the journal; returns how many tensors were."""
    total = sum(task.entry.nbytes for own in tasks for task in own)
    lock = threading.Lock()
    resumed = 0
    with (
        _inputs(source) as inputs,
        tqdm(total=total, desc="quantize", unit="B", unit_scale=True, disable=not progress) as bar,
        _threads_shared_by(jobs),
    ):

        def advance(count: int) -> None:
            with lock:
                bar.update(count)

        def convert(task: _Task, output: OutputFile) -> int:
            """1 where the task was done already."""
            made = journal.done.get(task.entry.name)
            if made is not None and all(output.crc32(name) == crc for name, crc in made.items()):
                advance(task.entry.nbytes)
                return 1
            crc32 = _convert(task, inputs[task.entry.path], output, options, block, advance)
            journal.add(task.entry.name, crc32)
            journal.done[task.entry.name] = crc32
            return 0

        work = [(task, file) for own, file in zip(tasks, files, strict=True) for task in own]
        if jobs == 1:
            return sum(convert(*each) for each in work)
        with ThreadPoolExecutor(jobs) as pool:
            futures: list[Future[int]] = [pool.submit(convert, *each) for each in work]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
                # In the order of the source, so that the same fault gives the same message.
                for future in futures:
                    if future.done() and not future.cancelled():
                        resumed += future.result()
            finally:
                pool.shutdown(cancel_futures=True)
    return resumed


def _convert(
    task: _Task, file: int, output: OutputFile, options: Options, block: int, advance: Callable[[int], None]
) -> dict[str, str]:
    """Convert or copy one tensor; returns the CRC-32 of each tensor that was made."""
    if task.layer is None:
        return _copy(task, file, output, block, advance)
    if any(name.endswith(f".{names.BNB_ABSMAX}") for name, _, _ in task.outputs):
        return _quantize_for_bitsandbytes(task, file, output, block, advance)
    return _quantize(task, file, output, options, block, advance)


def _copy(task: _Task, file: int, output: OutputFile, block: int, advance: Callable[[int], None]) -> dict[str, str]:
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
    task: _Task, file: int, output: OutputFile, options: Options, block: int, advance: Callable[[int], None]
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
    task: _Task, file: int, output: OutputFile, block: int, advance: Callable[[int], None]
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


def _quantized(task: _Task, values: Array, options: Options) -> octavo.Int8Weight:
    try:
        return octavo.quantize_weight(values, scheme=options.scheme, granularity=options.granularity)
    except ValueError as error:
        raise ValueError(f"{task.entry.path}: {task.entry.name}: {error}") from error


def _extremes(task: _Task, file: int, block: int) -> Array:
    """The smallest and the largest element. A NaN is returned as one, for quantize_weight to refuse."""

    def extremes_of_rows(first: int, last: int) -> Array:
        values = _as_numbers(_read_block(task, file, first, last), task.entry)
        return np.array([values.min(), values.max()])

    found = np.stack([extremes_of_rows(first, last) for first, last in _row_ranges(task, block)])
    return np.array([found[:, 0].min(), found[:, 1].max()])


def _row_ranges(task: _Task, block: int) -> Iterator[tuple[int, int]]:
    """[first, last) of each block of rows of the weight ``[n, k]``."""
    n, k = task.outputs[0][2]
    rows = max(1, block // k)
    return ((first, min(first + rows, n)) for first in range(0, n, rows))


def _read_block(task: _Task, file: int, first: int, last: int) -> Array:
    return read_rows(file, task.entry, first, last, transpose=task.transpose)


def _as_numbers(raw: Array, entry: Entry) -> Array:
    """Bfloat16 as float32, which has all its values; what NumPy knows as it is."""
    if entry.dtype != "BF16":
        return raw
    bits = raw.astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


# --- files ------------------------------------------------------------------------------------------------------------


@contextmanager
def _inputs(source: Source) -> Iterator[dict[Path, int]]:
    """The source's files, open."""
    files: dict[Path, int] = {}
    try:
        for shard in source.shards:
            files[shard.path] = os.open(shard.path, os.O_RDONLY)
        yield files
    finally:
        for file in files.values():
            os.close(file)


@contextmanager
def _threads_shared_by(jobs: int) -> Iterator[None]:
    """Divide octavo's threads among jobs."""
    threads = octavo.get_num_threads()
    octavo.set_num_threads(max(1, threads // jobs))
    try:
        yield
    finally:
        octavo.set_num_threads(threads)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Nobody else converts into this folder. The lock ends with the process, however it ends."""
    import fcntl  # here, so that the rest of octavo's commands work where there is none

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                f"{folder}: expected to be alone, got another octavo quantize at work here"
            ) from error
        yield
    finally:
        os.close(handle)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{folder}: expected {needed} bytes of free space, got {free}")


def _write_companions(
    folder: Path,
    source: Source,
    files: list[OutputFile],
    tasks: list[list[_Task]],
    quantization: Mapping[str, Any],
) -> None:
    """The index of shards, config.json with what was done, and copies of all that is no weight."""
    if len(files) > 1:
        weight_map = {
            name: file.path.name
            for file, own in zip(files, tasks, strict=True)
            for name in sorted(output for task in own for output, _, _ in task.outputs)
        }
        index = {"metadata": {"total_size": sum(file.nbytes for file in files)}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
    for name, path in source.companions.items():
        if name != "config.json" and not path.is_relative_to(folder):  # the output may be inside of the model's folder
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
    if source.config:
        _write_json(folder / "config.json", {**source.config, "quantization_config": quantization})
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
