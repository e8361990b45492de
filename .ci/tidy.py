"""Run clang-tidy over C++ sources, as many at a time as there are processors: tidy.py BUILD_FOLDER SOURCE..."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor


def tidy(build_folder: str, source: str) -> bool:
    """Check one source; prints what clang-tidy finds and returns whether it found nothing."""
    command = ["clang-tidy", "-p", build_folder, "--quiet", "--warnings-as-errors=*", source]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    print(f"{source}: {'ok' if result.returncode == 0 else 'FAILED'}", flush=True)
    if result.returncode != 0:
        print(result.stdout + result.stderr, flush=True)
    return result.returncode == 0


if __name__ == "__main__":
    folder, *sources = sys.argv[1:]
    if not sources:
        sys.exit("tidy.py: expected sources to check, got none")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sys.exit(0 if all(list(pool.map(lambda source: tidy(folder, source), sources))) else 1)
