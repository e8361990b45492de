"""`octavo quantize`: a 16/32-bit checkpoint into an int8 one, in blocks of rows.

What each tensor becomes is decided first, from headers alone (`octavo.checkpoint.tasks`); so every output has its place
before any data is read, and tensors can be converted in any order, by several threads, and again after a kill. All
happens in ``OUT.partial``, which becomes ``OUT`` by one rename at the end.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

import octavo
from octavo._types import Granularity, Outliers, Scheme
from octavo._types import Path as ProductPath
from octavo.checkpoint import format as names
from octavo.checkpoint.blocks import block_elements, convert_tensor
from octavo.checkpoint.format import Options, quantization_config
from octavo.checkpoint.layers import LayerChoice
from octavo.checkpoint.source import Source, open_source
from octavo.checkpoint.tasks import Format, Task, plan_tasks, tied_outputs
from octavo.checkpoint.writer import Journal, OutputFile


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
            at most 64 MiB of it, and at least what one row takes.
        progress: show a progress bar on stderr.

    Returns:
        Report.

    Raises:
        OSError: files that cannot be read or written, no space, or `output` exists, or ``<output>.partial`` and is
            none of a conversion.
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
    if memory is not None and memory < 1:
        raise ValueError(f"quantize: memory: expected at least 1 byte, got {memory}")
    output = Path(output)
    if output.name in ("", ".."):
        raise ValueError(f"quantize: output: expected the name of a folder to make, got {str(output)!r}")

    source = open_source(model)
    tasks, left = plan_tasks(source, options, LayerChoice(source.config, include, skip), outlier_columns, format)
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
    if (output / names.JOURNAL).exists():  # killed after the last rename, before the journal went
        Journal(output / names.JOURNAL, job).close()
        # Whoever made the output may be alive, and about to do the same.
        (output / names.JOURNAL).unlink(missing_ok=True)
        return report(len(all_tasks))
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise FileExistsError(f"{output}: expected a folder that is not there yet, got one: remove it or name another")

    partial.mkdir(parents=True, exist_ok=True)
    with _locked(partial):
        if not (partial / names.JOURNAL).exists():
            if any(partial.iterdir()):
                raise FileExistsError(
                    f"{partial}: expected the beginning of a conversion, or nothing, got a folder of other files: "
                    "remove it or name another output"
                )
            _check_space(partial, sum(file.nbytes for file in files))
        journal = Journal(partial / names.JOURNAL, job)
        try:
            for file in files:
                file.open()
            resumed = _run(
                source, tasks, files, options, journal, jobs, block_elements(all_tasks, jobs, memory), progress
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
        (output / names.JOURNAL).unlink(missing_ok=True)
    return report(resumed)


# --- the work ---------------------------------------------------------------------------------------------------------


def _output_files(
    folder: Path, source: Source, tasks: list[list[Task]], options: Options, format: Format
) -> list[OutputFile]:
    """One for each shard of the source."""
    count = len(source.shards)
    files = []
    for number, (shard, own) in enumerate(zip(source.shards, tasks, strict=True), start=1):
        name = "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
        metadata = options.metadata() if format == "octavo" else {"format": "pt"}
        if shard.ties:
            metadata[names.TIED_KEY] = json.dumps(tied_outputs(shard, own))
        outputs = [output for task in own for output in task.outputs]
        files.append(OutputFile(folder / name, outputs, metadata))
    return files


def _run(
    source: Source,
    tasks: list[list[Task]],
    files: list[OutputFile],
    options: Options,
    journal: Journal,
    jobs: int,
    block: int,
    progress: bool,
) -> int:
    """Convert what is not in the journal; returns how many tensors were there already."""
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

        def convert(task: Task, output: OutputFile) -> int:
            """1 where the task was done already."""
            made = journal.done.get(task.entry.name)
            complete = made is not None and set(made) == {name for name, _, _ in task.outputs}
            if made is not None and complete and all(output.crc32(name) == crc for name, crc in made.items()):
                advance(task.entry.nbytes)
                return 1
            crc32 = convert_tensor(task, inputs[task.entry.path], output, options, block, advance)
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
    tasks: list[list[Task]],
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
