"""octavo.checkpoint.quantize under kill -9, with a full disk, changing files, few open files; and its memory."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from octavo import checkpoint
from octavo.checkpoint.files import header_bytes
from support import TORCH
from tqdm import tqdm

Shapes = dict[str, tuple[int, int]]
SHAPES: Shapes = {f"layers.{i}.fc.weight": (60 + i, 40) for i in range(6)} | {"embed.weight": (50, 16)}


def write_model(folder: Path, shapes: Shapes = SHAPES, *, dtype: str = "F16", shards: int = 3, **config: Any) -> Path:
    """A checkpoint of random weights, without PyTorch."""
    folder.mkdir()
    weight_map = {}
    for shard in range(shards):
        own = {name: shape for number, (name, shape) in enumerate(shapes.items()) if number % shards == shard}
        file = "model.safetensors" if shards == 1 else f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        write_shard(folder / file, own, dtype, seed=shard)
        weight_map.update(dict.fromkeys(own, file))
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def write_shard(path: Path, shapes: Shapes, dtype: str = "F16", seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(header_bytes([(name, dtype, shape) for name, shape in shapes.items()], {"format": "pt"}))
        for n, k in shapes.values():
            for rows in np.array_split(np.arange(n), max(1, n * k // 4_000_000)):
                block = rng.standard_normal((len(rows), k), np.float32)
                if dtype == "BF16":
                    file.write((block.view(np.uint32) >> 16).astype(np.uint16).tobytes())
                else:
                    file.write(block.astype({"F16": np.float16, "F32": np.float32}[dtype]).tobytes())


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def convert(model: Path, output: Path, **options: Any) -> checkpoint.Report:
    return checkpoint.quantize(model, output, progress=False, **options)


class Steps:
    """Counts the calls and returns of Python functions, in all threads, and does `at_last` when `left` have been."""

    def __init__(self, left: int = sys.maxsize, at_last: Callable[[], Any] = lambda: None) -> None:
        self.done, self.left, self.at_last = 0, left, at_last

    def __call__(self, *_: Any) -> None:
        self.done += 1
        if self.done == self.left:
            self.at_last()

    def __enter__(self) -> Steps:
        threading.setprofile(self)
        sys.setprofile(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)


def killed(work: Callable[[], Any], *, after: int) -> bool:
    """Whether a process of its own, a fork of this one, was killed after so many steps, before its work was done."""
    pid = os.fork()
    if not pid:
        try:
            with Steps(after, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_at_random_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 kills: what then finishes has the bytes of a run that nobody disturbed, and no beginning is left."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # for those who lose power, not for kills; and it is slow
    tqdm.set_lock(threading.RLock())  # else one that all processes share, which who is killed does not give back
    model = write_model(tmp_path / "m")
    with Steps() as steps:
        convert(model, tmp_path / "whole", jobs=1)
    whole = content(tmp_path / "whole")
    chance, kills, resumed = random.Random(0), 0, 0
    output = tmp_path / "out"
    while kills < 20:
        for _ in range(chance.randint(1, 6)):
            kills += killed(lambda: convert(model, output, jobs=1), after=chance.randint(1, steps.done))
            if output.exists():  # complete, as soon as it has its name
                assert whole.items() <= content(output).items()
                shutil.rmtree(output)
        report = convert(model, output, jobs=chance.choice((1, 3)))
        resumed += report.resumed
        assert content(output) == whole
        assert not (tmp_path / "out.partial").exists()
        shutil.rmtree(output)
    assert resumed > 0


class TestGoingOn:
    def begun(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
        """A model, and a conversion of it that ended when it had written two shards of three."""
        model = write_model(tmp_path / "m")
        convert(model, tmp_path / "whole")
        replace, left = os.replace, [3]  # the first is that of the job's description

        def fail(source: Path, target: Path) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", fail)
            with pytest.raises(KeyboardInterrupt):
                convert(model, tmp_path / "out")
        assert len(content(tmp_path / "out.partial")) == 3
        return model, tmp_path / "out"

    def test_what_is_finished_is_not_done_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model, output = self.begun(tmp_path, monkeypatch)
        assert convert(model, output).resumed == 5
        assert content(output) == content(tmp_path / "whole")

    def test_what_was_damaged_is_done_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model, output = self.begun(tmp_path, monkeypatch)
        for number, damage in ((1, lambda content: content[:-1] + b"?"), (2, lambda content: content[:100])):
            path = tmp_path / "out.partial" / f"model-{number:05}-of-00003.safetensors"
            path.write_bytes(damage(path.read_bytes()))
        assert convert(model, output).resumed == 0
        assert content(output) == content(tmp_path / "whole")

    def test_a_changed_model(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever rsync -t leaves as it was, size and time: what was made of the old file is made again."""
        model, output = self.begun(tmp_path, monkeypatch)
        path = model / "model-00001-of-00003.safetensors"
        before = path.stat()
        shapes = {name: SHAPES[name] for name in list(SHAPES)[::3]}
        write_shard(path, shapes, seed=9)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_size == before.st_size
        assert convert(model, output).resumed == 2
        convert(model, tmp_path / "new")
        assert content(output) == content(tmp_path / "new") != content(tmp_path / "whole")

    def test_other_options_are_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model, output = self.begun(tmp_path, monkeypatch)
        before = content(tmp_path / "out.partial")
        with pytest.raises(ValueError, match=r"out\.partial: expected the beginning of this conversion, got one with"):
            convert(model, output, scheme="zeropoint")
        assert content(tmp_path / "out.partial") == before

    def test_only_one_at_a_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import fcntl

        model, output = self.begun(tmp_path, monkeypatch)
        handle = os.open(tmp_path / "out.partial", os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            with pytest.raises(BlockingIOError, match="another octavo quantize"):
                convert(model, output)
        finally:
            os.close(handle)
        assert convert(model, output).resumed == 5

    def test_killed_after_the_last_rename(self, tmp_path: Path) -> None:
        model = write_model(tmp_path / "m")
        convert(model, tmp_path / "out")
        whole = content(tmp_path / "out")
        job = json.dumps(
            {"format": "octavo", **checkpoint.Checkpoint(tmp_path / "out").options("layers.0.fc").to_dict()}
        )
        (tmp_path / "out" / ".octavo-job.json").write_text(job)
        assert convert(model, tmp_path / "out").resumed == len(SHAPES)
        assert content(tmp_path / "out") == whole


def test_folders_of_somebody_else(tmp_path: Path) -> None:
    """What is called like the output, or the folder that is worked in, and is not, is neither taken nor removed."""
    model = write_model(tmp_path / "m")
    for name in ("out", "out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("mine")
        with pytest.raises(FileExistsError, match=r"out(\.partial)?: expected (a folder that is not|the beginning)"):
            convert(model, tmp_path / "out")
        assert content(tmp_path / name) == {"thesis.txt": b"mine"}
        (tmp_path / name / "thesis.txt").unlink()
        (tmp_path / name).rmdir()
    (tmp_path / "out").mkdir()  # an empty one is taken
    convert(model, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("change", ["replaced", "rewritten", "rewritten, with its time kept"])
@pytest.mark.parametrize("file", ["model-00002-of-00003.safetensors", "config.json", "tokenizer.json"])
def test_a_model_that_changes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, change: str
) -> None:
    """A file that is another than it was is named; nothing of it is kept, and a second run goes on."""
    from octavo.checkpoint import convert as module

    model = write_model(tmp_path / "m", version=1)
    path, other = model / file, tmp_path / "other"
    before = path.stat()
    if file.startswith("model"):
        write_shard(other, {name: SHAPES[name] for name in list(SHAPES)[1::3]}, seed=9)
    else:
        other.write_text({"config.json": '{"version": 2}', "tokenizer.json": "[]"}[file])
    assert other.stat().st_size == before.st_size
    convert_tensor, shard = module.convert, model / "model-00002-of-00003.safetensors"

    def change_then_convert(task: Any, *arguments: Any) -> bytes:
        if task.entry.path == shard and other.exists():
            if change == "replaced":
                os.replace(other, path)
            else:
                path.write_bytes(other.read_bytes())
                other.unlink()
            if change.endswith("kept"):
                os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        return convert_tensor(task, *arguments)

    monkeypatch.setattr(module, "convert", change_then_convert)
    with pytest.raises(RuntimeError, match=rf"m/{file}: expected a file at rest, got one that changed meanwhile"):
        convert(model, tmp_path / "out", jobs=1)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    finished = 1 if path == shard else 3
    assert len([*(tmp_path / "out.partial").glob("*model-*.safetensors")]) == finished
    assert convert(model, tmp_path / "out").resumed == (3 if path == shard else len(SHAPES))
    convert(model, tmp_path / "new")
    assert content(tmp_path / "out") == content(tmp_path / "new")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is named, and what to do; what is finished stays, but no beginning of nothing."""
    model = write_model(tmp_path / "m")
    convert(model, tmp_path / "whole")
    pwrite = os.pwrite
    for room, finished in ((0, 0), (4000, 0), (12_000, 1), (12_000, 2)):
        left = [room]

        def write_while_there_is_room(file: int, data: Any, offset: int, left: list[int] = left) -> int:
            left[0] -= len(data[:1000])
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return pwrite(file, data[:1000], offset)

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", write_while_there_is_room)
            with pytest.raises(OSError, match=r"No space left on device: free some space and run again.*safetensors'"):
                convert(model, tmp_path / "out", jobs=1)
        partial = tmp_path / "out.partial"
        found = content(partial) if partial.exists() else {}
        assert len(found) == (finished + 1 if finished else 0)
        assert not any(name.startswith(".octavo-model") for name in found)
    assert convert(model, tmp_path / "out").resumed == 5
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(OSError, match=r"expected \d+ bytes of free space, got 10"):
        convert(model, tmp_path / "other")
    assert not (tmp_path / "other.partial").exists()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A file system in memory, by its size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(how: str) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", how, "tmpfs", folder], capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"mounting needs root's rights: {done.stderr.decode().strip()}")
        return folder

    if shutil.which("mount") is None:
        pytest.skip("there is no program mount")
    yield mount
    while folder.is_mount():
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(("shards", "finished"), [(3, 1), (1, 0)])
def test_a_disk_that_is_really_full(tmp_path: Path, disk: Callable[[str], Path], shards: int, finished: int) -> None:
    """It has the room that is asked for at first, not that of headers and scales; with more, it goes on."""
    model = write_model(tmp_path / "m", shards=shards)
    convert(model, tmp_path / "whole")
    room = disk("size=20k")
    with pytest.raises(
        OSError, match=r"No space left on device: free some space and run again.*out\.partial/\.octavo-model"
    ) as caught:
        convert(model, room / "out", jobs=1)
    assert caught.value.errno == errno.ENOSPC
    found = sorted(path.name for path in room.rglob("*"))
    assert found == ([".octavo-job.json", f"model-00001-of-{shards:05}.safetensors", "out.partial"] if finished else [])
    disk("remount,size=1m")
    assert convert(model, room / "out").resumed == 3 * finished
    assert [path.name for path in room.iterdir()] == ["out"]
    assert content(room / "out") == content(tmp_path / "whole")


def test_a_real_limit(tmp_path: Path) -> None:
    """Of the size of files, which the system keeps to as to that of a disk: one line, no beginning of nothing."""
    model = write_model(tmp_path / "m", {"fc.weight": (600, 40)}, shards=1)
    result = subprocess.run(
        [sys.executable, "-m", "octavo", "quantize", str(model), str(tmp_path / "out"), "--quiet"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "File too large: free some space and run again" in result.stderr
    assert result.stderr.endswith("out.partial/.octavo-model.safetensors'\n")
    assert result.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


@pytest.mark.parametrize("full", [".octavo-job.json", "config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_a_disk_that_is_full_for_small_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str) -> None:
    """Whatever file it is, it is named; a folder without weights does not stay."""
    model = write_model(tmp_path / "m", model_type="tiny")
    for owner, name in ((Path, "write_text"), (shutil, "copyfile")):
        original: Any = getattr(owner, name)

        def write(*arguments: Any, original: Any = original, **more: Any) -> Any:
            if any(isinstance(each, Path) and each.name.endswith(full) for each in arguments):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*arguments, **more)

        monkeypatch.setattr(owner, name, write)
    with pytest.raises(OSError, match=rf"free some space and run again.*{full}'"):
        convert(model, tmp_path / "out")
    assert (tmp_path / "out.partial").exists() == (full != ".octavo-job.json")
    monkeypatch.undo()
    assert convert(model, tmp_path / "out").resumed == (0 if full == ".octavo-job.json" else len(SHAPES))


def test_few_files_are_open_at_a_time(tmp_path: Path) -> None:
    """More shards than a process may have open files: converted, and read; without any, the file is named."""
    shapes = {f"layers.{i}.fc.weight": (4, 4) for i in range(120)}
    model = write_model(tmp_path / "m", shapes, shards=120)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 64
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 12, limits[1]))
    try:
        assert convert(model, tmp_path / "out").layers == 120
        assert len(checkpoint.load(tmp_path / "out", framework="numpy")) == 120
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        with pytest.raises(OSError, match=r"allow more open files \(ulimit -n\) and run again.*m/"):
            checkpoint.inspect(model)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


PEAK = """
    import sys
    from octavo import checkpoint

    def peak():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024

    small, large, output, jobs, options = sys.argv[1:]
    checkpoint.quantize(small, output + "-small", jobs=int(jobs), progress=False, **eval(options))
    before = peak()
    checkpoint.quantize(large, output, jobs=int(jobs), progress=False, **eval(options))
    print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc/self/status to read the peak from")
@pytest.mark.parametrize(
    ("dtype", "config", "jobs", "options"),
    [
        ("BF16", {}, 1, {}),
        ("BF16", {}, 4, {}),
        ("F16", {}, 2, {"outlier_columns": {"a.fc": [1, 2, 3]}}),
        ("F32", {"model_type": "gpt2"}, 1, {}),
        (
            "F32",
            {"model_type": "gpt2"},
            3,
            {"granularity": "tensor", "scheme": "zeropoint", "rotation": 0},
        ),  # rotated, all of it at once
        ("BF16", {}, 2, {"format": "bitsandbytes"}),
        ("BF16", {"file": "pytorch_model.bin"}, 2, {}),
    ],
    ids=["bf16", "4 jobs", "kept columns", "transposed", "one scale", "bitsandbytes", "pytorch file"],
)
def test_peak_memory(tmp_path: Path, dtype: str, config: dict[str, str], jobs: int, options: dict[str, Any]) -> None:
    """At most 1.1 times the float32 size of the largest tensor, however many tensors and jobs."""
    leaf = "c_fc" if "model_type" in config else "fc"
    shapes = {f"a.{leaf}.weight": (1500, 4000), f"b.{leaf}.weight": (4000, 1500), f"c.{leaf}.weight": (6000, 1000)}
    shapes["embed.weight"] = (3000, 1000)
    file = config.get("file", "")
    own = {key: value for key, value in config.items() if key != "file"}
    small = write_model(tmp_path / "small", dict.fromkeys(shapes, (8, 8)), dtype=dtype, shards=1, **own)
    large = write_model(tmp_path / "large", shapes, dtype=dtype, shards=1, **own)
    if file:
        if TORCH.missing:
            pytest.skip(TORCH.missing)
        import safetensors.torch
        import torch

        for model in (small, large):
            torch.save(safetensors.torch.load_file(model / "model.safetensors"), model / file)
            (model / "model.safetensors").unlink()
    command = [sys.executable, "-c", textwrap.dedent(PEAK), *map(str, (small, large, tmp_path / "out", jobs, options))]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert result.returncode == 0, result.stderr
    peak, limit = int(result.stdout), 1.1 * 4 * 6_000_000
    print(f"peak {peak / 2**20:.1f} MiB, limit {limit / 2**20:.1f} MiB")
    assert 0 < peak <= limit
    assert sum(path.stat().st_size for path in large.iterdir()) > 1.5 * peak  # the model itself would not fit
