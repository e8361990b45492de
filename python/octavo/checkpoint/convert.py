"""`octavo quantize`: a 16/32-bit checkpoint into an int8 one, shard by shard.

What each tensor becomes is decided first, from headers alone (`octavo.checkpoint.tasks`). A shard is written under a
hidden name, says what it was made of, and gets its own name when it is on the disk: that is all that a second run needs
to know. All happens in ``OUT.partial``, which becomes ``OUT`` by one rename at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

import octavo
from octavo import file_format as names
from octavo._types import Granularity, Outliers, ProductPath, Scheme
from octavo.checkpoint.files import Shard, explained, open_shard, opened
from octavo.checkpoint.layers import Chosen, choose
from octavo.checkpoint.reader import Checkpoint
from octavo.checkpoint.source import JOB, Source, open_source
from octavo.checkpoint.tasks import Format, Task, plan_tasks, tied_outputs
from octavo.checkpoint.writer import Writer, convert
from octavo.options import DEFAULT, Options, options_of

_SMALLEST_BLOCK, _LARGEST_BLOCK = 1 << 14, 1 << 22  # elements: beyond, nothing gets faster


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
        reasons: why each of `left` stays.
        not_copied: links in the model's folder that lead out of it.
    """

    output: str
    layers: int
    left: list[str]
    tensors: int
    resumed: int
    source_bytes: int
    output_bytes: int
    seconds: float
    reasons: dict[str, str] = field(default_factory=dict)
    not_copied: list[str] = field(default_factory=list)


def quantize(
    model: str | Path,
    output: str | Path,
    *,
    options: Options | None = None,
    scheme: Scheme = DEFAULT,
    granularity: Granularity = DEFAULT,
    threshold: float = DEFAULT,
    outliers: Outliers = DEFAULT,
    path: ProductPath = DEFAULT,
    include: Sequence[str] | None = None,
    skip: Sequence[str] | None = None,
    outlier_columns: Mapping[str, Sequence[int]] | None = None,
    format: Format = "octavo",
    jobs: int | None = None,
    memory: int | None = None,
    progress: bool = True,
) -> Report:
    """Convert a checkpoint's linear layers to int8.

    Run again after an interruption, with the same arguments, it goes on with the first shard that is not finished;
    finished ones are compared with what they were made of, and with their checksums. The result has the same bytes,
    whatever was interrupted and however many jobs there are.

    Args:
        model: a folder as Hugging Face lays it out, or a file: safetensors, sharded or not, or a PyTorch state dict.
        output: the folder to make. It appears when it is complete; until then there is ``<output>.partial``.
        options: see `octavo.Options`; threshold, outliers and path are what the layers compute with unless whoever
            loads them says otherwise.
        scheme, granularity, threshold, outliers, path: single options, in the place of `options`.
        include, skip: patterns of layer names; see `octavo.checkpoint.layers`.
        outlier_columns: by layer, input features whose 16-bit weights are kept; from `calibrate` or elsewhere.
        format: "octavo", or "bitsandbytes" for its ``Linear8bitLt`` (absmax, vector, no kept columns).
        jobs: tensors converted at a time, as far as `memory` allows; default: octavo's threads, at most 8.
        memory: bytes for the weights that are converted at a time; default: those of the largest tensor in float32, and
            at least those of the largest weight as it is stored.
        progress: show a progress bar on stderr.

    Returns:
        Report.

    Raises:
        OSError: files that cannot be read or written, no space, or `output` exists, or ``<output>.partial`` and is
            none of a conversion.
        RuntimeError: a file of the model changed meanwhile.
        ValueError: a file that is truncated or corrupt, a weight with NaN or Inf (both name the tensor), a checkpoint
            that is quantized already or has no linear layers, options that do not exist or fit each other. The partial
            output is removed where this model cannot be converted.
    """
    started = time.monotonic()
    single = {"scheme": scheme, "granularity": granularity, "threshold": threshold, "outliers": outliers, "path": path}
    options = options_of("quantize", options, **single)
    if format not in ("octavo", "bitsandbytes"):
        raise ValueError(f"quantize: format: expected 'octavo' or 'bitsandbytes', got {format!r}")
    theirs = (options.scheme, options.granularity, options.rotation, outlier_columns) == ("absmax", "vector", 0, None)
    if format == "bitsandbytes" and not theirs:
        raise ValueError(
            "quantize: format: expected scheme absmax, granularity vector, no rotation and no outlier columns for "
            f"'bitsandbytes', got {options} and {'some' if outlier_columns else 'no'} columns"
        )
    jobs = min(8, octavo.get_num_threads()) if jobs is None else jobs
    for argument, value in (("jobs", jobs), ("memory", memory)):
        if value is not None and value < 1:
            raise ValueError(f"quantize: {argument}: expected at least 1, got {value}")
    output = Path(output)
    if output.name in ("", ".."):
        raise ValueError(f"quantize: output: expected the name of a folder to make, got {str(output)!r}")

    source = open_source(model)
    chosen = choose(source, include, skip)
    tasks = plan_tasks(source, chosen, options, outlier_columns, format)
    all_tasks = [task for own in tasks for task in own]
    run = _Run(source, chosen, tasks, options, format, output.with_name(output.name + ".partial"), jobs, memory)
    return Report(
        output=str(output),
        layers=sum(task.shape is not None for task in all_tasks),
        left=list(chosen.kept),
        tensors=len(all_tasks),
        resumed=run.into(output, progress),
        source_bytes=sum(task.entry.nbytes for task in all_tasks),
        output_bytes=sum(path.stat().st_size for path in output.glob("*.safetensors")),
        seconds=time.monotonic() - started,
        reasons=chosen.kept,
        not_copied=source.elsewhere,
    )


@dataclass
class _Run:
    """A conversion, under way in the folder `partial`."""

    source: Source
    chosen: Chosen
    tasks: list[list[Task]]
    options: Options
    format: Format
    partial: Path
    jobs: int
    memory: int | None

    def into(self, output: Path, progress: bool) -> int:
        """Do it; returns how many tensors were there already."""
        partial, self._lock = self.partial, threading.Lock()
        self._job = json.dumps({"format": self.format, **self.options.to_dict()})
        # Killed after the last rename, before this file went.
        if (output / JOB).exists() and (output / JOB).read_text() == self._job:
            (output / JOB).unlink(missing_ok=True)
            return sum(map(len, self.tasks))
        if output.is_file() or (output.is_dir() and any(output.iterdir())):
            said = "expected a folder that is not there yet, got one: remove it or name another"
            raise FileExistsError(f"{output}: {said}")
        with explained(partial):
            partial.mkdir(parents=True, exist_ok=True)
        total = sum(task.entry.nbytes for own in self.tasks for task in own)
        bar = tqdm(total=total, desc="quantize", unit="B", unit_scale=True, disable=not progress)
        with _locked(partial), bar as self._bar, _threads_shared_by(self.jobs):
            self._begin()
            try:
                resumed = sum(map(self._shard, range(len(self.tasks))))
                self._write_companions()
                self.source.check_unchanged()
            except ValueError:
                shutil.rmtree(partial)  # no second run would get further
                raise
            except BaseException:
                if not any(partial.glob("[!.]*.safetensors")):
                    shutil.rmtree(partial)
                raise
            os.rename(partial, output)
            _sync(output.parent)
            (output / JOB).unlink(missing_ok=True)
        return resumed

    def _begin(self) -> None:
        """Leave in the partial output what is finished, and the description of the job."""
        job = self.partial / JOB
        if not job.exists():
            if any(not path.name.startswith(".octavo-") for path in self.partial.iterdir()):
                raise FileExistsError(
                    f"{self.partial}: expected the beginning of a conversion, or nothing, got a folder of other files: "
                    "remove it or name another output"
                )
            all_tasks = [task for own in self.tasks for task in own]
            needed = sum(task.entry.numel if task.shape else task.entry.nbytes for task in all_tasks)
            free = shutil.disk_usage(self.partial).free
            if free < needed:
                self.partial.rmdir()
                raise OSError(f"{self.partial}: expected {needed} bytes of free space, got {free}")
            with explained(job):
                job.with_suffix(".new").write_text(self._job)
            os.replace(job.with_suffix(".new"), job)
        elif job.read_text() != self._job:
            raise ValueError(
                f"{self.partial}: expected the beginning of this conversion, got one with other options: remove that "
                "folder to start anew, or give the same options again"
            )
        finished = [self._file(number).name for number in range(len(self.tasks))]
        for path in self.partial.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in (JOB, *finished):
                path.unlink()

    def _file(self, number: int) -> Path:
        is_diffusers = self.source.shards[0].path.name.startswith("diffusion_pytorch_model")
        stem, count = "diffusion_pytorch_model" if is_diffusers else "model", len(self.tasks)
        part = "" if count == 1 else f"-{number + 1:05}-of-{count:05}"
        return self.partial / f"{stem}{part}.safetensors"

    # --- a shard ------------------------------------------------------------------------------------------------------

    def _shard(self, number: int) -> int:
        """Convert a shard, if it is not there; returns how many of its tensors were."""
        shard, tasks, path = self.source.shards[number], self.tasks[number], self._file(number)
        if path.exists() and self._is_finished(path, shard, tasks):
            return len(tasks)
        every = [task for own in self.tasks for task in own]
        memory = self.memory or 4 * max(task.entry.numel for task in every)
        jobs = max(1, min(self.jobs, memory // max(task.entry.nbytes for task in every if task.shape)))
        block = max(1 if self.memory else _SMALLEST_BLOCK, min(_LARGEST_BLOCK, memory // (200 * jobs)))
        hidden = path.with_name(f".octavo-{path.name}")
        layers = {task.entry.name.removesuffix(".weight") for task in tasks}
        kept = {layer: why for layer, why in self.chosen.kept.items() if layer in layers}
        metadata = dict(names.METADATA) if self.format == "octavo" else {"format": "pt"}
        metadata |= {names.KEPT_KEY: json.dumps(kept)} if kept else {}
        metadata |= {names.TIED_KEY: json.dumps(tied_outputs(shard, tasks))} if shard.ties else {}
        try:
            with opened(shard.path) as file, opened(hidden, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as out:
                outputs = [output for task in tasks for output in task.outputs.values()]
                writer = Writer(out, outputs, metadata)

                def one(task: Task) -> bytes:
                    return convert(task, file, writer, self.options, block, self._advance)

                hashes = _in_turns(one, tasks, jobs)
                self.source.check_unchanged()
                writer.finish(self._made_of(tasks, hashes))
            os.replace(hidden, path)
        except BaseException:
            hidden.unlink(missing_ok=True)
            raise
        _sync(path.parent)
        return 0

    def _is_finished(self, path: Path, shard: Shard, tasks: list[Task]) -> bool:
        """Whether a file was made, undamaged, of what the shard holds now, which is read for that."""
        try:
            made_of = open_shard(path).metadata.get(names.MADE_OF_KEY)
            Checkpoint(path, framework="numpy").verify()
        except (OSError, ValueError):
            return False
        with opened(shard.path) as file:

            def one(task: Task) -> bytes:
                read = hashlib.blake2b(digest_size=32)
                for chunk in task.entry.bytes_in_file(file):
                    read.update(chunk)
                    self._advance(chunk.nbytes)
                return read.digest()

            hashes = _in_turns(one, tasks, self.jobs)
        if made_of == self._made_of(tasks, hashes):
            return True
        self._advance(-sum(task.entry.nbytes for task in tasks))
        return False

    def _made_of(self, tasks: list[Task], hashes: list[bytes]) -> str:
        """A hash of what a shard is made of, and how."""
        read = hashlib.blake2b(self._job.encode(), digest_size=32)
        for task, content in zip(tasks, hashes, strict=True):
            columns = None if task.columns is None else task.columns.tolist()
            made = (task.entry.name, task.entry.dtype, task.entry.shape, task.is_transposed, columns, task.outputs)
            read.update(json.dumps(made).encode() + content)
        return read.hexdigest()

    def _advance(self, count: int) -> None:
        with self._lock:
            self._bar.update(count)

    # --- what is beside -----------------------------------------------------------------------------------------------

    def _write_companions(self) -> None:
        """The index of shards, config.json with what was done, and copies of all that is no weight."""
        partial, source = self.partial, self.source
        files = [self._file(number) for number in range(len(self.tasks))]
        if len(files) > 1:
            weight_map = {
                name: file.name
                for file, own in zip(files, self.tasks, strict=True)
                for name in sorted(name for task in own for name, _, _ in task.outputs.values())
            }
            index = {"metadata": {"total_size": sum(file.stat().st_size for file in files)}, "weight_map": weight_map}
            stem = files[0].name.partition("-0")[0]
            _write_json(partial / f"{stem}.safetensors.index.json", index)
        for name, path in source.companions.items():
            if name != "config.json" and not path.is_relative_to(
                partial
            ):  # the output may be inside of the model's folder
                with explained(partial / name):
                    (partial / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, partial / name)
        if source.config:
            config = names.quantization_config(
                self.options, self.chosen.kept, bitsandbytes=self.format == "bitsandbytes"
            )
            _write_json(partial / "config.json", {**source.config, "quantization_config": config})
        for path in {*partial.rglob("*")} - {*files}:
            _sync(path)
        _sync(partial)


# --- helpers ----------------------------------------------------------------------------------------------------------


def _in_turns(function: Any, tasks: Sequence[Task], jobs: int) -> list[bytes]:
    """`function` of each task, some at a time; of several that fail, the first one's error is raised."""
    if jobs == 1:
        return [function(task) for task in tasks]
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(function, task) for task in tasks]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(cancel_futures=True)
        # In the order of the source, so that the same fault gives the same message.
        return [future.result() for future in futures if not future.cancelled()]


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

    with opened(folder) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                f"{folder}: expected to be alone, got another octavo quantize at work here"
            ) from error
        yield


def _write_json(path: Path, value: Any) -> None:
    with explained(path):
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    with opened(path) as handle:
        os.fsync(handle)
