"""Make what is released of octavo, and test it: wheel.py FOLDER [PYTHON...].

The source distribution; from it, for each Python (default: this one), a wheel for every Linux with glibc 2.28; and a
list of what is in it (SBOM, CycloneDX). Each wheel is installed where there is nothing but what it asks for, NumPy,
safetensors and tqdm, and passes the tests that need no more. The .venv of dev.py has the tools (.ci/lock/wheel.txt).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ("cmake.define.OCTAVO_MANYLINUX=ON", "cmake.define.OCTAVO_WERROR=ON")
# The tests that need neither PyTorch nor a package of its own.
TESTS = ("quantize", "outlier", "gemm", "dequantize", "linear", "weight", "errors", "threads", "interpreter")


def main() -> None:
    """Make everything anew."""
    folder = Path(sys.argv[1]).resolve()
    pythons = sys.argv[2:] or [sys.executable]
    shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder)
    (source,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(source, folder / "source")  # our own: no member leads out of it
    (unpacked,) = (folder / "source").iterdir()
    for number, python in enumerate(pythons):
        wheel = repaired(build(python, unpacked, folder / "linux" / str(number)), folder)
        bare = environment(python, folder / "bare" / str(number))
        install(bare, wheel)
        if number == 0:
            describe(bare, folder / f"{source.name.removesuffix('.tar.gz')}.cdx.json")
        run(bare, ROOT / "examples" / "numpy_linear.py", cwd=folder)
        install(bare, "pytest", "hypothesis")
        tests = [ROOT / "tests" / "python" / f"test_{name}.py" for name in TESTS]
        run(bare, "-m", "pytest", "-q", *tests, OCTAVO_TEST_EXAMPLES="4")  # of what was tested with more of them
    for name in ("source", "linux", "bare"):
        shutil.rmtree(folder / name)
    for path in sorted(folder.iterdir()):
        print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")


def build(python: str, source: Path, folder: Path) -> Path:
    """The wheel as this machine builds it, from the source distribution alone.

    For this Python the tools are those of .ci/lock.
    """
    words = [f"--config-settings={setting}" for setting in SETTINGS]
    words += ["--no-build-isolation"] if python == sys.executable else []
    command = (python, "-m", "pip", "wheel", "-qq", "--no-deps", "--wheel-dir", folder)
    run(*command, *words, source)
    (wheel,) = folder.glob("*.whl")
    return wheel


def repaired(wheel: Path, folder: Path) -> Path:
    """The same for every Linux of its platform; auditwheel fails where it asks for more than that promises."""
    platform = f"manylinux_2_28_{os.uname().machine}"
    run(sys.executable, "-m", "auditwheel", "repair", "--plat", platform, "--wheel-dir", folder, wheel)
    name = f"{'-'.join(wheel.name.split('-')[:4])}-*"
    (result,) = folder.glob(name)
    return result


def environment(python: str, folder: Path) -> Path:
    """A new environment with nothing in it, not even pip: its Python."""
    run(python, "-m", "venv", "--clear", "--without-pip", folder)
    return folder / "bin" / "python"


def install(python: Path, *requirements: str | Path) -> None:
    """Install wheels only."""
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-qq", "--only-binary", ":all:")
    run(*pip, *requirements)


def describe(python: Path, path: Path) -> None:
    """Write the SBOM: the packages of an environment, and what is compiled into octavo."""
    run(
        *(sys.executable, "-m", "cyclonedx_py", "environment", "--pyproject", ROOT / "pyproject.toml"),
        *("--mc-type", "library", "--output-format", "JSON", "--output-file", path, python),
    )
    report = json.loads(path.read_text(encoding="utf-8"))
    compiler = subprocess.run(["c++", "-dumpfullversion"], capture_output=True, text=True, check=True).stdout.strip()
    for name, version, license in (
        ("pybind11", importlib.metadata.version("pybind11"), "BSD-3-Clause"),
        ("libstdc++", compiler, "GPL-3.0-or-later WITH GCC-exception-3.1"),
    ):
        component = {"type": "library", "name": name, "version": version, "licenses": [{"expression": license}]}
        report["components"].append({**component, "description": "compiled into octavo._core"})
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def run(*words: str | Path, cwd: Path = ROOT, **variables: str) -> None:
    """Run a command; the tools of this environment come first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    subprocess.run([str(word) for word in words], check=True, cwd=cwd, env={**os.environ, "PATH": path, **variables})


if __name__ == "__main__":
    main()
