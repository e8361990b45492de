"""The facts of the machine and of the software that a measurement has to be read with."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import octavo


def available_cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_threads(threads: int) -> None:
    """The threads of torch's operations and of octavo's."""
    torch.set_num_threads(threads)
    octavo.set_num_threads(threads)


def facts(threads: int) -> dict[str, Any]:
    """Machine, versions and date."""
    return {
        "cpu": cpu_model(),
        "cores": available_cores(),
        "threads": threads,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "octavo": octavo.__version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "octavo_info": octavo.info(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def cpu_model() -> str:
    """The processor's name, as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()
