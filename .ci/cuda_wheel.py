"""Check a wheel with the CUDA backend on a machine without a GPU: cuda_wheel.py WHEEL.

The wheel holds the extension and the library for C and C++, which know nothing of CUDA, and the backend. That shows one
function, brings the CUDA runtime along, and finds cuBLASLt in NVIDIA's package next to octavo's. Imported, octavo says
what is missing: a driver, and, with a stand-in for libcuda.so.1 (cuda_driver.c), a device, or a newer driver. Then the
machine code is checked (cuda_machine_code.py).
"""

from __future__ import annotations

import ctypes.util
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import cuda_machine_code

HERE = Path(__file__).resolve().parent
BACKEND = "liboctavo_cuda.so"
OTHERS = {"liboctavo.so", "libonnx_ops.so"}  # for C and C++, for ONNX Runtime
# What every Linux has, or the compiler brings.
SYSTEM = {
    "libc",
    "libm",
    "libdl",
    "librt",
    "libpthread",
    "libstdc++",
    "libgcc_s",
    "ld-linux-x86-64",
    "ld-linux-aarch64",
}


def main(words: Sequence[str]) -> int:
    """Check, print, return the exit status."""
    if len(words) != 1:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with zipfile.ZipFile(words[0]) as wheel:
            wheel.extractall(folder)
        found = [*linkage(folder / "octavo"), *causes(folder)]
        for fault in found:
            print(fault, file=sys.stderr)
        print(f"the wheel: {len(found)} faults")
        status = cuda_machine_code.main([str(folder / "octavo" / BACKEND)])
    return 1 if found else status


def linkage(package: Path) -> list[str]:
    """What is wrong with the shared objects."""
    objects = {path.name: path for path in sorted(package.rglob("*.so"))}
    unknown = {name for name in objects if not name.startswith("_core.")} - {BACKEND, *OTHERS}
    if unknown or BACKEND not in objects or not any(name.startswith("_core.") for name in objects):
        return [f"expected _core.*.so, {BACKEND} and {', '.join(sorted(OTHERS))}, got {list(objects)}"]
    found = []
    for name, path in objects.items():
        dynamic = output("readelf", "--dynamic", "--wide", str(path))
        needed = {each.split(".so")[0] for each in re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)}
        found += [f"{name}: expected no need of {each}" for each in sorted(needed - SYSTEM)]
        runpath = re.findall(r"\((?:RUNPATH|RPATH)\).*\[(.*)\]", dynamic)
        expected = ["$ORIGIN/../nvidia/cu13/lib"] if name == BACKEND else []
        if runpath != expected:
            found.append(f"{name}: expected the runpath {expected}, got {runpath}")
    symbols = output("nm", "--dynamic", "--defined-only", "--format=posix", str(package / BACKEND))
    # Weak symbols (V, W) are type information of exceptions and the standard library's templates, the same everywhere.
    shown = [name for name, kind, *_ in (line.split() for line in symbols.splitlines()) if kind not in "VWu"]
    if shown != ["octavo_cuda_backend"]:
        found.append(f"{BACKEND}: expected to show octavo_cuda_backend alone, got {shown[:10]}")
    return found


def output(*command: str) -> str:
    """What a command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def causes(folder: Path) -> list[str]:
    """What octavo should have said of what is missing, and did not."""
    stub = folder / "stub"
    stub.mkdir()
    compiler = os.environ.get("CC", "cc")
    flags = ["-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(
        [compiler, *flags, str(HERE / "cuda_driver.c"), "-o", str(stub / "libcuda.so.1"), "-ldl"], check=True
    )
    with_stub = {"LD_LIBRARY_PATH": str(stub)}
    expected = [
        ("a driver without a device", with_stub, r"^CUDA: a driver, but no device that this process can use$"),
        ("an old driver", {**with_stub, "STUB_VERSION": "12000"}, r"^CUDA: the driver is older than CUDA 13 needs \("),
        ("another error", {**with_stub, "STUB_INIT": "999"}, r"^CUDA: cudaGetDeviceCount: cudaErrorUnknown \("),
    ]
    if ctypes.util.find_library("cuda"):
        print("a machine without a driver: left out, because this one has a driver")
    else:
        pattern = r"^CUDA: no driver on this machine \(libcuda\.so\.1 not found\)$"
        expected.append(("a machine without a driver", {}, pattern))
    found = []
    for what, environment, pattern in expected:
        said = missing(folder, environment)
        print(f"{what}: {said}")
        if not re.search(pattern, said):
            found.append(f"{what}: expected octavo to say '{pattern}', got '{said}'")
    return found


def missing(folder: Path, environment: dict[str, str]) -> str:
    """What octavo of this folder says is missing, imported by a process of its own."""
    code = (
        "import octavo, pathlib, sys\n"
        "assert pathlib.Path(octavo.__file__).is_relative_to(sys.argv[1]), octavo.__file__\n"
        "print(octavo.info()['cuda'].get('missing', 'nothing'))"
    )
    clean = {name: value for name, value in os.environ.items() if name != "OCTAVO_CUDA_LIBRARY"}
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True, text=True, check=False, env={**clean, "PYTHONPATH": str(folder), **environment},
    )  # fmt: skip
    return result.stdout.strip() if result.returncode == 0 else result.stderr.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
