"""Programs in C++, whose sources are in the repository's bench/cpp: they are compiled where they are used."""

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

# The repository: that which this file is in or, where the laboratory is installed, the folder that one works in.
_HERE = Path(__file__).resolve().parents[3]
ROOT = _HERE if (_HERE / "bench" / "cpp").is_dir() else Path.cwd()


def compile_program(name: str, folder: Path, include: Iterable[Path], *more: Path | str) -> Path:
    """bench/cpp/NAME.cpp, compiled into a folder with more words, of which paths are files that it needs.

    Raises RuntimeError, which says what is missing or wrong.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError("expected a C++ compiler, got none")
    source, program = ROOT / "bench" / "cpp" / f"{name}.cpp", folder / name
    for path in (source, *more):
        if isinstance(path, Path) and not path.is_file():
            raise RuntimeError(f"expected {path}, got none")
    words = [compiler, "-std=c++20", "-O3", *(f"-I{each}" for each in include), source, *more, "-o", program]
    try:
        subprocess.run(list(map(str, words)), capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"{error}: {getattr(error, 'stderr', '')}".strip()) from None
    return program
