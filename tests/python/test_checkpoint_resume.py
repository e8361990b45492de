"""octavo.checkpoint.quantize under kill -9, and how much memory it takes. All in processes of their own."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from octavo import checkpoint
from octavo.checkpoint.tensors import header_bytes
from octavo.checkpoint.writer import Journal

FILES = ("config.json", "model.safetensors", "tokenizer.json")


def write_model(folder: Path, shapes: dict[str, tuple[int, int]], dtype: str = "F16", **config: Any) -> Path:
    """A checkpoint of random weights, without PyTorch."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header_bytes([(name, dtype, shape) for name, shape in shapes.items()], {"format": "pt"}))
        for n, k in shapes.values():
            for rows in np.array_split(np.arange(n), max(1, n * k // 4_000_000)):
                block = rng.standard_normal((len(rows), k), np.float32)
                if dtype == "BF16":
                    file.write((block.view(np.uint32) >> 16).astype(np.uint16).tobytes())
                else:
                    file.write(block.astype({"F16": np.float16, "F32": np.float32}[dtype]).tobytes())
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny", **config}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


# Each child is a fork of a process that has only imported octavo; it kills itself before its n-th system call that
# changes a file.
KILLED_EVERYWHERE = """
    import os, shutil, signal, sys
    from octavo import checkpoint

    model, folder, repeated = sys.argv[1], sys.argv[2], sys.argv[3] == "repeated"
    CALLS = ("pwrite", "write", "ftruncate", "fsync", "rename", "unlink", "mkdir")

    def convert(output, die_before=None):
        if pid := os.fork():
            return os.waitpid(pid, 0)[1]
        count = 0
        def counted(call):
            def wrapper(*args, **kwargs):
                nonlocal count
                count += 1
                if count == die_before:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)
            return wrapper
        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        checkpoint.quantize(model, output, jobs=1, progress=False, memory=4000)
        os._exit(0)

    for point in range(1, 10_000):
        output = folder if repeated else f"{folder}/{point}"
        status = convert(output, point)
        if os.path.exists(output):
            print("complete", sorted(os.listdir(output)))
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        if not repeated:
            assert convert(output) == 0
    print("points", point)
"""


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("how", ["once", "repeated"])
def test_killed_before_every_change_of_a_file(tmp_path: Path, how: str) -> None:
    """Once: each kill is followed by a whole run. Repeated: every run is killed, a little later than the last."""
    model = write_model(tmp_path / "m", {"embed.weight": (50, 16), "a.fc.weight": (70, 32), "b.fc.weight": (30, 90)})
    checkpoint.quantize(model, tmp_path / "whole", progress=False)
    whole = content(tmp_path / "whole")
    assert set(whole) == set(FILES)

    folder = tmp_path / "killed"
    if how == "once":
        folder.mkdir()
    result = run(KILLED_EVERYWHERE, model, folder, how)
    assert result.returncode == 0, result.stderr
    points = int(result.stdout.splitlines()[-1].split()[1])
    assert points > (25 if how == "once" else 5)
    outputs = [folder / str(point) for point in range(1, points + 1)] if how == "once" else [folder]
    for output in outputs:
        assert content(output) == whole, output
        assert not output.with_name(output.name + ".partial").exists()
    # Under its final name the folder was complete, but for the journal that is removed last.
    for line in result.stdout.splitlines()[:-1]:
        assert set(FILES) <= set(json.loads(line.removeprefix("complete ").replace("'", '"')))


def test_the_command_killed_while_it_works(tmp_path: Path) -> None:
    """Two jobs, killed again and again after some more tensors; then it finishes without doing those again."""
    model = write_model(tmp_path / "m", {f"layers.{i}.fc.weight": (600, 600) for i in range(24)})
    checkpoint.quantize(model, tmp_path / "whole", progress=False)
    output = tmp_path / "out"
    code = """
        import os, signal, sys, threading
        from octavo import checkpoint
        from octavo.checkpoint.writer import Journal
        model, output, left = sys.argv[1], sys.argv[2], int(sys.argv[3])
        add, lock = Journal.add, threading.Lock()

        def add_or_die(*args):
            global left
            add(*args)
            with lock:
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        Journal.add = add_or_die
        print(checkpoint.quantize(model, output, jobs=2, memory=400_000, progress=False).resumed)
    """
    for more in (1, 4, 7):
        assert run(code, model, output, more).returncode == -signal.SIGKILL
        assert not output.exists()
    result = run(code, model, output, 1000)
    assert result.returncode == 0, result.stderr
    assert 12 <= int(result.stdout) < 24
    assert content(output) == content(tmp_path / "whole")


class TestGoingOn:
    def begun(self, tmp_path: Path) -> tuple[Path, Path]:
        """A model, and a conversion of it that was killed after its first tensor."""
        model = write_model(tmp_path / "m", {"a.fc.weight": (60, 40), "b.fc.weight": (50, 40), "c.fc.weight": (40, 40)})
        code = """
            import os, sys
            from octavo import checkpoint
            from octavo.checkpoint.writer import Journal
            add = Journal.add
            Journal.add = lambda *args: (add(*args), os._exit(9))
            checkpoint.quantize(sys.argv[1], sys.argv[2], jobs=1, progress=False)
        """
        assert run(code, model, tmp_path / "out").returncode == 9
        checkpoint.quantize(model, tmp_path / "whole", progress=False)
        return model, tmp_path / "out"

    def test_what_was_done_is_not_done_again(self, tmp_path: Path) -> None:
        model, output = self.begun(tmp_path)
        assert checkpoint.quantize(model, output, progress=False).resumed == 1
        assert content(output) == content(tmp_path / "whole")

    def test_what_was_damaged_is_done_again(self, tmp_path: Path) -> None:
        model, output = self.begun(tmp_path)
        entry = checkpoint.Checkpoint(tmp_path / "whole", framework="numpy").entries["a.fc.weight"]
        with (tmp_path / "out.partial" / "model.safetensors").open("r+b") as file:
            file.seek(entry.offset + 5)
            file.write(b"damage")
        assert checkpoint.quantize(model, output, progress=False).resumed == 0
        assert content(output) == content(tmp_path / "whole")

    def test_a_torn_line_of_the_journal(self, tmp_path: Path) -> None:
        model, output = self.begun(tmp_path)
        with (tmp_path / "out.partial" / ".octavo-journal").open("ab") as file:
            file.write(b'{"tensor": "b.fc.wei')
        assert checkpoint.quantize(model, output, progress=False).resumed == 1
        assert content(output) == content(tmp_path / "whole")

    def test_a_damaged_line_of_the_journal(self, tmp_path: Path) -> None:
        """Its tensor is made again; where the first one is damaged, it is not known what was begun: named."""
        model, output = self.begun(tmp_path)
        journal = tmp_path / "out.partial" / ".octavo-journal"
        first, done = journal.read_bytes().splitlines(keepends=True)
        others = [b"null\n", b"[1]\n", b'{"tensor": 3}\n', b'{"tensor": "a.fc.weight", "crc32": {"other": "00"}}\n']
        for damaged in (done.replace(b":", b"?"), b"\xff\n", b"\n", *others):
            journal.write_bytes(first + damaged)
            assert checkpoint.quantize(model, output, progress=False).resumed == 0
            assert content(output) == content(tmp_path / "whole")
            output.rename(tmp_path / "out.partial")
        journal.write_bytes(first + b"?\n" + done)
        assert checkpoint.quantize(model, output, progress=False).resumed == 1
        output.rename(tmp_path / "out.partial")
        journal.write_bytes(b"?" + first + done)
        with pytest.raises(ValueError, match=r"out\.partial: expected the beginning of this conversion"):
            checkpoint.quantize(model, output, progress=False)

    def test_short_writes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write = os.write
        monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:7]))
        journal = Journal(tmp_path / "journal", {"job": 1})
        journal.add("a.weight", {"a.weight": "0" * 8})
        journal.close()
        monkeypatch.undo()
        journal = Journal(tmp_path / "journal", {"job": 1})
        assert journal.done == {"a.weight": {"a.weight": "0" * 8}}
        journal.close()

    def test_a_folder_of_somebody_else(self, tmp_path: Path) -> None:
        """What is called like the folder that is worked in, and is not, is neither taken nor removed."""
        model = write_model(tmp_path / "m", {"a.fc.weight": (6, 4)})
        (tmp_path / "out.partial").mkdir()
        (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
        with pytest.raises(FileExistsError, match=r"out\.partial: expected the beginning of a conversion, or nothing"):
            checkpoint.quantize(model, tmp_path / "out", progress=False)
        assert content(tmp_path / "out.partial") == {"thesis.txt": b"mine"}
        (tmp_path / "out.partial" / "thesis.txt").unlink()
        checkpoint.quantize(model, tmp_path / "out", progress=False)
        assert not (tmp_path / "out.partial").exists()

    def test_two_that_end_at_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The journal is gone when it is to be removed: another run has found the output complete."""
        model = write_model(tmp_path / "m", {"a.fc.weight": (6, 4)})
        rename = os.rename

        def then_another(source: Path, target: Path) -> None:
            rename(source, target)
            assert checkpoint.quantize(model, tmp_path / "out", progress=False).resumed == 1

        monkeypatch.setattr(os, "rename", then_another)
        assert checkpoint.quantize(model, tmp_path / "out", progress=False).resumed == 0
        assert set(content(tmp_path / "out")) == set(FILES)

    def test_other_options_are_refused(self, tmp_path: Path) -> None:
        model, output = self.begun(tmp_path)
        with pytest.raises(ValueError, match="expected the beginning of this conversion"):
            checkpoint.quantize(model, output, progress=False, scheme="zeropoint")
        os.utime(model / "model.safetensors")  # a changed model
        with pytest.raises(ValueError, match="expected the beginning of this conversion"):
            checkpoint.quantize(model, output, progress=False)

    def test_only_one_at_a_time(self, tmp_path: Path) -> None:
        import fcntl

        model, output = self.begun(tmp_path)
        handle = os.open(tmp_path / "out.partial", os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            with pytest.raises(BlockingIOError, match="another octavo quantize"):
                checkpoint.quantize(model, output, progress=False)
        finally:
            os.close(handle)
        assert checkpoint.quantize(model, output, progress=False).resumed == 1


PEAK = """
    import os, sys
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
        ("F16", {}, 2, {"outlier_columns": {"a.c_fc": [1, 2, 3]}}),
        ("F32", {"model_type": "gpt2"}, 1, {}),
        ("F32", {"model_type": "gpt2"}, 3, {"granularity": "tensor", "scheme": "zeropoint"}),
        ("BF16", {}, 2, {"format": "bitsandbytes"}),
        ("BF16", {"file": "pytorch_model.bin"}, 2, {}),
    ],
    ids=["bf16", "4 jobs", "kept columns", "transposed", "one scale", "bitsandbytes", "pytorch file"],
)
def test_peak_memory(tmp_path: Path, dtype: str, config: dict[str, str], jobs: int, options: dict[str, Any]) -> None:
    """At most 1.1 times the float32 size of the largest tensor, however many tensors and jobs."""
    shapes = {"a.c_fc.weight": (1500, 4000), "b.c_fc.weight": (4000, 1500), "c.c_fc.weight": (6000, 1000)}
    shapes["embed.weight"] = (3000, 1000)
    file = config.pop("file", "") if config else ""
    small = write_model(tmp_path / "small", dict.fromkeys(shapes, (8, 8)), dtype, **config)
    large = write_model(tmp_path / "large", shapes, dtype, **config)
    if file:
        if importlib.util.find_spec("torch") is None:
            pytest.skip("torch is not installed")
        import safetensors.torch
        import torch

        for model in (small, large):
            torch.save(safetensors.torch.load_file(model / "model.safetensors"), model / file)
            (model / "model.safetensors").unlink()
    result = run(PEAK, small, large, tmp_path / "out", jobs, options)
    assert result.returncode == 0, result.stderr
    peak, limit = int(result.stdout), 1.1 * 4 * 6_000_000
    print(f"peak {peak / 2**20:.1f} MiB, limit {limit / 2**20:.1f} MiB")
    assert 0 < peak <= limit
    assert sum(path.stat().st_size for path in large.iterdir()) > 1.5 * peak  # the model itself would not fit
