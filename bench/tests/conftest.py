"""The laboratory's tests use the tiny models of the library's."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# The suite runs on shared machines: torch's own threads only get in the way of what is tested.
os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "python"))
