"""The facts of the machine and of the software that a measurement has to be read with."""

import datetime
import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import octavo
import torch

# What makes a machine another one: set before Python starts, they bound octavo's and torch's instruction sets.
VARIABLES = ("OCTAVO_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
PACKAGES = ("octavo", "torch", "transformers", "numpy")  # that run models


def available_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Facts:
    """Made when a run begins, read when it ends: what its report says of command, commit, machine and time."""

    def __init__(self, command: str, threads: int) -> None:
        self._begin = time.perf_counter()
        self._facts: dict[str, Any] = {
            "command": command,
            "commit": commit(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "cpu": cpu_model(),
            "cores": available_cores(),
            "threads": threads,
            "load": os.getloadavg(),
            "instruction_set": octavo.info()["cpu"]["instruction_set"],
            "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
            "environment": {name: os.environ.get(name) for name in VARIABLES},
            "system": platform.platform(),
            "python": platform.python_version(),
            "packages": {name: found for name in PACKAGES if (found := installed(name)) is not None},
        }

    def add(self, **more: Any) -> None:
        """Facts that are known from now on."""
        self._facts |= more

    def now(self, **more: Any) -> dict[str, Any]:
        """The facts, with `more`, the seconds since the beginning, and the load of the machine now."""
        return {**self._facts, **more, "seconds": time.perf_counter() - self._begin, "load_at_end": os.getloadavg()}


def installed(package: str) -> str | None:
    """Its version; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str:
    """The commit that this file is of, with "-dirty" where files differ from it; "unknown" where it is of none."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    git = subprocess.run(words, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return git.stdout.strip() or "unknown"


def cpu_model() -> str:
    """The processor's name, as the system tells it."""
    facts = Path("/proc/cpuinfo")
    for line in facts.read_text(encoding="utf-8", errors="replace").splitlines() if facts.exists() else []:
        if line.startswith("model name"):
            return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()
