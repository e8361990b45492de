"""How the benchmarks measure: contenders in turns, warm or cold caches, and the facts to read the numbers with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import octavo
import torch

# What makes a machine another one: set before Python starts, they bound octavo's and torch's instruction sets.
VARIABLES = ("OCTAVO_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
PACKAGES = ("octavo", "torch", "numpy", "bitsandbytes", "torchao")


@dataclass
class Timing:
    """Milliseconds of a call: median and quartiles over `calls` calls."""

    median: float
    lower: float
    upper: float
    calls: int


def take_turns(
    calls: Mapping[str, Callable[[], object]],
    seconds: float,
    before: Callable[[str], object] = lambda name: None,
    least: int = 3,
) -> dict[str, Timing]:
    """Time `calls`, one call of each after the other, so that a change of the machine's speed meets all alike.

    `before` is given the name of the call that comes next and is not timed. Goes on for `seconds`, and until there are
    `least` (>= 2) times of each.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    turns = 0
    while turns < least or time.perf_counter() < end:
        for name, call in calls.items():
            before(name)
            begin = time.perf_counter()
            call()
            samples[name].append(1e3 * (time.perf_counter() - begin))
        turns += 1
    timings = {}
    for name, values in samples.items():
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        timings[name] = Timing(median, lower, upper, turns)
    return timings


class Evict:
    """Reads a buffer, so that what the caches held before is gone; for the `before` of `take_turns`.

    The same buffer for every contender, so it is fair whatever a contender keeps and however it lays it out.
    `mebibytes` is read by each thread: the level-2 cache of each core is emptied by some ten times its size, the shared
    level-3 cache only by more than its own.
    """

    def __init__(self, mebibytes: int, threads: int) -> None:
        self.buffer = torch.ones(mebibytes * threads << 17, dtype=torch.int64)

    def __call__(self, _: str) -> None:
        """Read the buffer."""
        self.buffer.sum()


class Others:
    """How many cores other programs, or other guests of the host, kept busy since this was made (Linux)."""

    def __init__(self) -> None:
        self.begin = time.monotonic(), self._busy(), self._own()

    def cores(self) -> float | None:
        """The average number; None where the system does not tell."""
        begin, busy, own = self.begin
        now = self._busy()
        if busy is None or now is None:
            return None
        return max(0.0, (now - busy) - (self._own() - own)) / max(time.monotonic() - begin, 1e-9)

    @staticmethod
    def _busy() -> float | None:
        """Seconds that all cores were not idle: user, nice, system, irq, softirq and steal of /proc/stat."""
        words = _read("/proc/stat").partition("\n")[0].split()
        if len(words) < 9 or words[0] != "cpu":
            return None
        ticks = [int(word) for word in words[1:9]]
        return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")

    @staticmethod
    def _own() -> float:
        """Seconds of this process and of those it has started and waited for."""
        return sum(os.times()[:4])


def set_threads(threads: int) -> None:
    """The threads of torch's operations and of octavo's."""
    torch.set_num_threads(threads)
    octavo.set_num_threads(threads)


def machine(threads: int) -> dict[str, Any]:
    """What the numbers are measured on."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = "not installed"
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parent,
    )  # fmt: skip
    return {
        "cpu": _cpu_model(),
        "caches": _caches(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load": os.getloadavg(),
        "instruction_set": octavo.info()["cpu"]["instruction_set"],
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "environment": {name: os.environ.get(name) for name in VARIABLES},
        "python": platform.python_version(),
        "packages": packages,
        "commit": git.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_model() -> str:
    lines = _read("/proc/cpuinfo").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _caches() -> dict[str, str]:
    """Sizes of the data caches of the first core, by level, where Linux tells them."""
    sizes = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if _read(folder / "type").strip() != "Instruction":
            sizes[f"L{_read(folder / 'level').strip()}"] = _read(folder / "size").strip()
    return sizes


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def write(path: Path, fill: Callable[[Path], Any]) -> None:
    """Write beside and rename, so that no half-written file is left under the name."""
    beside = path.with_name(path.name + ".part")
    fill(beside)
    beside.replace(path)
