"""`octavo quantize`: a 16/32-bit checkpoint into an int8 one, shard by shard.

What each tensor becomes is decided first, from headers alone (`octavo.checkpoint.tasks`). A shard is written under a
hidden name, says what it was made of, and gets its own name when it is on the disk: that is all that a second run needs
to know. All happens in ``OUT.partial``, which becomes ``OUT`` by one rename at the end.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from numbers import Integral
from os import PathLike
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from tqdm import tqdm

import octavo
from octavo import file_format as names
from octavo._text import expect, expect_choice, unexpected
from octavo.checkpoint.files import Shard, check_unchanged, explained, identity, open_shard, opened
from octavo.checkpoint.folder import JOB, companions
from octavo.checkpoint.layers import Chosen, choose, head_of, keep_in_16_bit
from octavo.checkpoint.reader import Checkpoint
from octavo.checkpoint.tasks import Task, Writer, convert, hash_of, plan_tasks
from octavo.file_format import Format
from octavo.options import WHOLE_MODELS, Options, options_of

# Of each format, unless one is named: what others read knows no rotation.
RECIPES = {**dict.fromkeys(get_args(Format), WHOLE_MODELS), "bitsandbytes": "paper"}
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
    include: Sequence[str] | None = None,
    skip: Sequence[str] | None = None,
    head: bool | None = None,
    layer_options: Mapping[str, Options | None] | None = None,
    outlier_columns: Mapping[str, Sequence[int]] | None = None,
    measured: Mapping[str, str] | None = None,
    format: Format = "octavo",
    jobs: int | None = None,
    memory: int | None = None,
    progress: bool = True,
    **keywords: Any,
) -> Report:
    """Convert a checkpoint's linear layers to int8.

    Run again after an interruption, with the same arguments, it goes on with the first shard that is not finished.

    Args:
        model: a folder as Hugging Face lays it out, or a file: safetensors, sharded or not, or a PyTorch state dict.
        output: the folder to make. It appears when it is complete; until then there is ``<output>.partial``.
        options: see `octavo.Options`; those that do not belong to the weight are what the layers compute with unless
            whoever loads them says otherwise. Or single ones by name, such as ``threshold=5.0``, and ``recipe=``
            for the others (see `octavo.recipe`; that of "bitsandbytes" is "paper").
        include, skip: patterns of layer names; see `octavo.checkpoint.layers`.
        head: convert the output head, too, or not; one that is tied to the embedding gets a weight of its own beside
            it, which takes memory and makes decoding faster on CPUs. None: of a model that Transformers has, where
            `rotation` is not 0.
        layer_options: by layer, options in the place of those; None: it stays in 16 bit. From `choose_options`.
        measured: to be noted in the files, as `choose_options` gives it.
        outlier_columns: by layer, input features whose 16-bit weights are kept; from `calibrate` or elsewhere.
        format: "octavo"; "packed", whose codes a CPU uses as they lie in the mapped file; or "bitsandbytes" for its
            ``Linear8bitLt`` (absmax, vector, no rotation, no kept columns).
        jobs: tensors converted at a time, as far as `memory` allows; default: octavo's threads, at most 8.
        memory: bytes for the weights that are converted at a time; default: those of the largest tensor in float32, and
            at least those of the largest weight as it is stored.
        progress: show a progress bar on stderr.

    Raises:
        OSError: files that cannot be read or written, no space, or `output` exists, or ``<output>.partial`` and is
            none of a conversion.
        RuntimeError: a file of the model changed meanwhile.
        ValueError: a file that is truncated or corrupt, a weight with NaN or Inf (both name the tensor), a checkpoint
            that is quantized already or has no linear layers, options that do not exist or fit each other. The partial
            output is removed where this model cannot be converted.
    """
    started = time.monotonic()
    expect("quantize: model", model, (str, PathLike), "a path")
    expect("quantize: output", output, (str, PathLike), "a path")
    mappings = {"layer_options": layer_options, "outlier_columns": outlier_columns, "measured": measured}
    for name, mapping in mappings.items():
        expect(f"quantize: {name}", mapping, (Mapping, NoneType), "a mapping")
    for name, count in (("jobs", jobs), ("memory", memory)):
        expect(f"quantize: {name}", count, (Integral, NoneType), "a whole number")
        if count is not None and count < 1:
            raise unexpected(f"quantize: {name}", "at least 1", count)
    expect("quantize: head", head, (bool, NoneType), "a bool or None")
    expect_choice("quantize: format", format, get_args(Format))
    calibrated = outlier_columns is not None
    options = options_of("quantize", options, default=RECIPES[format], calibrated=calibrated, **keywords)
    if wrong := misfit(options, format, calibrated, head):
        raise ValueError(f"quantize: {wrong}")
    output = Path(output)
    if output.name in ("", ".."):
        raise unexpected("quantize: output", "the name of a folder to make", repr(str(output)))

    with explained(output):
        source = Checkpoint(model, framework="numpy")
        chosen = choose(source, include, skip, head=head_of(head, options))
        keep_in_16_bit(chosen, layer_options or {})
        shards = plan_tasks(source, chosen, options, layer_options or {}, outlier_columns or {}, format)
        tasks = [task for own in shards for task in own]
        others, elsewhere = companions(Path(model)) if Path(model).is_dir() else ({}, [])
        partial = output.with_name(output.name + ".partial")
        noted = dict(measured or {})
        jobs = min(8, octavo.get_num_threads()) if jobs is None else jobs
        run = _Run(source, chosen, shards, others, options, format, noted, partial, jobs, memory)
        resumed = run.into(output, progress)
    return Report(
        output=str(output),
        layers=sum(task.options is not None for task in tasks),
        left=list(chosen.kept),
        tensors=len(tasks),
        resumed=resumed,
        source_bytes=sum(each.nbytes for name, each in source.entries.items() if name not in source.ties),
        output_bytes=sum(path.stat().st_size for path in output.glob("*.safetensors")),
        seconds=time.monotonic() - started,
        reasons=chosen.kept,
        not_copied=elsewhere,
    )


def misfit(options: Options, format: Format, has_columns: bool, head: bool | None) -> str:
    """What of a conversion's options does not fit the format, or columns that are kept or missing; "" where all do."""
    weight = options.of_weight
    if format == "bitsandbytes" and head:
        return "head: expected none for 'bitsandbytes', whose readers tie it to the embedding, got one"
    if format == "bitsandbytes" and (weight != Options().of_weight or has_columns):
        fits = "scheme absmax, granularity vector, no rotation and no outlier columns for 'bitsandbytes'"
        return f"format: expected {fits}, got {weight} and {'some' if has_columns else 'no'} columns"
    if options.outliers == "static" and not has_columns:
        return "outliers: expected outlier columns of every layer for 'static' (calibrate), got none"
    return ""


@dataclass
class _Run:
    """A conversion, under way in the folder `partial`."""

    source: Checkpoint
    chosen: Chosen
    tasks: list[list[Task]]  # of each shard
    companions: dict[str, Path]
    options: Options
    format: Format
    measured: dict[str, str]
    partial: Path
    jobs: int
    memory: int | None

    def into(self, output: Path, progress: bool) -> int:
        """Do it; returns how many tensors were there already."""
        partial = self.partial
        # The output may be inside of the model's folder.
        self.companions = {name: at for name, at in self.companions.items() if not at.is_relative_to(partial)}
        at_first = {path: identity(path) for path in self.companions.values()}
        self._job = json.dumps({"format": self.format, **self.options.to_dict()})
        self._every = [task for own in self.tasks for task in own]
        memory = self.memory or 4 * max(task.entry.numel for task in self._every)
        largest = max(task.entry.nbytes for task in self._every if task.options)
        self.jobs = max(1, min(self.jobs, memory // largest))
        self._block = max(1 if self.memory else _SMALLEST_BLOCK, min(_LARGEST_BLOCK, memory // (200 * self.jobs)))
        # Killed after the last rename, before this file went.
        if (output / JOB).exists() and (output / JOB).read_text() == self._job:
            (output / JOB).unlink(missing_ok=True)
            return len(self._every)
        if output.is_file() or (output.is_dir() and any(output.iterdir())):
            there = "one: remove it or name another"
            raise unexpected(output, "a folder that is not there yet", there, FileExistsError)
        total = sum(task.entry.nbytes for task in self._every)
        bar = tqdm(total=total, desc="quantize", unit="B", unit_scale=True, disable=not progress)
        with _alone_in(partial), bar as self._bar:
            self._begin()
            try:
                resumed = sum(map(self._shard, range(len(self.tasks))))
                self._write_companions()
                self.source.check_unchanged()
                check_unchanged(at_first)
            except BaseException as error:
                # No second run would get further, or there is nothing to go on with.
                if isinstance(error, ValueError) or not any(partial.glob("[!.]*.safetensors")):
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
                others = "a folder of other files: remove it or name another output"
                raise unexpected(self.partial, "the beginning of a conversion, or nothing", others, FileExistsError)
            needed = sum(task.entry.numel if task.options else task.entry.nbytes for task in self._every)
            free = shutil.disk_usage(self.partial).free
            if free < needed:
                got = f"{free}: free some space and run again"
                raise unexpected(self.partial, f"{needed} bytes of free space", got, OSError)
            with explained(job):
                write_whole(job, lambda new: new.write_text(self._job))
        elif job.read_text() != self._job:
            others = "one with other options: remove that folder to start anew, or give the same options again"
            raise unexpected(self.partial, "the beginning of this conversion", others)
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
        made = {task.entry.name: task for task in tasks}
        kept = {layer: why for layer, why in self.chosen.kept.items() if {layer, f"{layer}.weight"} & made.keys()}
        ties = {name: first for name, first in shard.ties.items() if name not in made}
        tied = {n: own for name, first in ties.items() for n, own in made[first].tied_outputs(name).items()}
        metadata = names.metadata(self.format)
        noted = {names.KEPT_KEY: kept, names.TIED_KEY: tied, names.MEASURED_KEY: self.measured}
        metadata |= {key: json.dumps(value) for key, value in noted.items() if value}

        def write(hidden: Path) -> None:
            with opened(shard.path) as file, opened(hidden, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as out:
                writer = Writer(out, [output for task in tasks for output in task.outputs.values()], metadata)
                hashes = self._in_turns(lambda task: convert(task, file, writer, self._block), tasks)
                self.source.check_unchanged(shard.path)
                writer.finish(self._made_of(tasks, hashes))

        write_whole(path, write)
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
            hashes = self._in_turns(lambda task: hash_of(task.entry, file), tasks)
        if made_of == self._made_of(tasks, hashes):
            return True
        self._bar.update(-sum(task.entry.nbytes for task in tasks))
        return False

    def _in_turns(self, function: Callable[[Task], bytes], tasks: list[Task]) -> list[bytes]:
        """`function` of each task, some at a time; of several that fail, the first one's error is raised."""
        results = []
        with ThreadPoolExecutor(self.jobs) as pool:
            for task, result in zip(tasks, pool.map(function, tasks), strict=True):
                results.append(result)
                self._bar.update(task.entry.nbytes)
        return results

    def _made_of(self, tasks: list[Task], hashes: list[bytes]) -> str:
        """A hash of what a shard is made of, and how."""
        made = hashlib.blake2b(f"{self._job}{self.measured}".encode(), digest_size=32)
        for task, content in zip(tasks, hashes, strict=True):
            made.update(task.identity() + content)
        return made.hexdigest()

    # --- all else -----------------------------------------------------------------------------------------------------

    def _write_companions(self) -> None:
        """The index of shards, config.json with what was done, and copies of all that is no weight."""
        partial = self.partial
        files = [self._file(number) for number in range(len(self.tasks))]
        if len(files) > 1:
            of_file = zip((file.name for file in files), self.tasks, strict=True)
            written = {file: [name for task in own for name, _, _ in task.outputs.values()] for file, own in of_file}
            weight_map = {name: file for file, own in written.items() for name in sorted(own)}
            index = {"metadata": {"total_size": sum(file.stat().st_size for file in files)}, "weight_map": weight_map}
            _write_json(partial / f"{files[0].name.partition('-0')[0]}.safetensors.index.json", index)
        for name, path in self.companions.items():
            if name != "config.json":
                with explained(partial / name):
                    (partial / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, partial / name)
        if self.source.config:
            layers = {task.entry.name.removesuffix(".weight") for task in self._every if task.options}
            left = {*self.chosen.kept, "lm_head"} - layers  # where it is tied it is in no file
            config = names.quantization_config(self.options, left, self.format)
            _write_json(partial / "config.json", {**self.source.config, "quantization_config": config})
        for path in {*partial.rglob("*")} - {*files}:
            _sync(path)
        _sync(partial)


# --- helpers ----------------------------------------------------------------------------------------------------------


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Make a folder that nobody else converts into; left empty, it goes. The lock ends with the process, however."""
    import fcntl  # here, so that the rest of octavo's commands work where there is none

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with opened(folder) as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                another = "another octavo quantize at work here"
                raise unexpected(folder, "to be alone", another, BlockingIOError) from error
            yield
    except BaseException as error:
        if not isinstance(error, BlockingIOError):
            with suppress(OSError):
                folder.rmdir()
        raise


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Have a file written under a hidden name, and give it its own when it is complete."""
    hidden = path.with_name(f".octavo-{path.name}")
    try:
        write(hidden)
        os.replace(hidden, path)
    except BaseException:
        hidden.unlink(missing_ok=True)
        raise


def _write_json(path: Path, value: Any) -> None:
    with explained(path):
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    with opened(path) as handle:
        os.fsync(handle)
