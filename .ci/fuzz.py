"""Random calls of the C ABI, guided by libFuzzer, and random DLPack capsules, under sanitizers: fuzz.py SECONDS.

libFuzzer is Clang's (Debian: apt install clang libclang-rt-dev), and keeps what it has found in build/fuzz/corpus. The
capsules go to the installed package, with an extension built by GCC for AddressSanitizer in place of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"


def main() -> None:
    """The C ABI for so many seconds, which has far more to find, and capsules for a third of them."""
    seconds = int(sys.argv[1])
    fuzz_c_api(seconds)
    fuzz_dlpack(seconds / 3)


def fuzz_c_api(seconds: int) -> None:
    """The C ABI (tests/cpp/fuzz_c_api.cpp)."""
    empty = 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }'
    trial = ["clang++", "-fsanitize=fuzzer", "-x", "c++", "-", "-o", os.devnull]
    if not shutil.which("clang++") or subprocess.run(trial, input=empty, text=True, capture_output=True).returncode:
        print("left out: no Clang with libFuzzer (Debian: apt install clang libclang-rt-dev)", flush=True)
        return
    build("fuzz")
    corpus = BUILD / "fuzz" / "corpus"
    corpus.mkdir(exist_ok=True)
    run(
        BUILD / "fuzz" / "tests" / "cpp" / "fuzz_c_api",
        "-seed=1",  # fixed: a change should not fail for what it has not done
        f"-max_total_time={seconds}",
        "-max_len=400",
        "-print_final_stats=1",
        f"-artifact_prefix={corpus.parent}/",
        corpus,
    )


def fuzz_dlpack(seconds: float) -> None:
    """What reads DLPack, by the tests of it (tests/python/test_dlpack.py)."""
    build("fuzz-dlpack", f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
    folder = BUILD / "fuzz-dlpack"
    (installed,) = (Path(sys.prefix) / "lib").glob("python*/site-packages/octavo")
    shutil.copytree(installed, folder / "package" / "octavo", dirs_exist_ok=True)
    (extension,) = folder.glob("_core.*.so")
    shutil.copy(extension, folder / "package" / "octavo")
    libraries = [
        subprocess.run(["g++", f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True).stdout
        for name in ("asan", "ubsan")
    ]
    variables = {
        "PYTHONPATH": str(folder / "package"),
        "LD_PRELOAD": " ".join(map(str.strip, libraries)),
        "ASAN_OPTIONS": "detect_leaks=0",  # of Python's own at its end
        "OCTAVO_FUZZ_SECONDS": str(seconds),
    }
    run(sys.executable, "-m", "pytest", "-q", "-k", "not frameworks", "tests/python/test_dlpack.py", **variables)


def build(preset: str, *words: str) -> None:
    """What a preset of CMakePresets.json builds."""
    run("cmake", "--preset", preset, *words)
    run("cmake", "--build", "--preset", preset)


def run(*words: str | Path, **variables: str) -> None:
    """A command in the project's folder, which must succeed."""
    subprocess.run(list(map(str, words)), cwd=ROOT, env={**os.environ, **variables}, check=True)


if __name__ == "__main__":
    main()
