"""The facts of the machine and of the software that a measurement has to be read with."""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import octavo
import torch

# What makes a machine another one: set before Python starts, they bound octavo's and torch's instruction sets.
VARIABLES = ("OCTAVO_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
PACKAGES = ("octavo", "torch", "transformers", "numpy")  # of what runs models


def available_cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_threads(threads: int) -> None:
    """The threads of torch's operations and of octavo's."""
    torch.set_num_threads(threads)
    octavo.set_num_threads(threads)


def facts(threads: int, packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Machine, load, instruction sets, environment, date, and the versions of the packages that took part."""
    info = octavo.info()
    return {
        "cpu": cpu_model(),
        "caches": caches(),
        "cores": available_cores(),
        "threads": threads,
        "load": os.getloadavg(),
        "instruction_set": info["cpu"]["instruction_set"],
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "environment": {name: os.environ.get(name) for name in VARIABLES},
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: installed(name) for name in packages},
        "octavo_info": info,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def installed(package: str) -> str:
    """Its version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def cpu_model() -> str:
    """The processor's name, as the system tells it."""
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()


def caches() -> dict[str, str]:
    """Sizes of the data caches of the first core, by level, where Linux tells them."""
    sizes = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if _read(folder / "type").strip() != "Instruction":
            sizes[f"L{_read(folder / 'level').strip()}"] = _read(folder / "size").strip()
    return sizes


def taken(cores: float | None) -> str:
    """What `Others.cores` found, in words."""
    return "other programs' use unknown" if cores is None else f"other programs took {cores:.2f} cores"


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


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
