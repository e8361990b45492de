#!/usr/bin/env python3
"""Everything a developer does, each as one command that also does its own set-up.

    python3 dev.py demo        build, install and run the demo
    python3 dev.py test        build, install and run all tests, C++ and Python
    python3 dev.py check       formatting, lint and type checks
    python3 dev.py docs        the documentation, with the report of bench/results, into build/site
    python3 dev.py evidence    train a small language model, and make the paper's tables of it, in minutes

Needs Python >= 3.10 and a C++20 compiler (tested: Python 3.11, GCC 12, Clang 14); uses nothing else of the
system and installs nothing outside this folder: packages go to .venv, builds to build/. Running a command again is
quick.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / "python"
LABORATORY = "./bench"  # octavo-bench
CONSTRAINTS = ROOT / ".ci" / "constraints.txt"
MACHINE_CODE = ROOT / ".ci" / "machine_code.py"
CUDA_WHEEL = ROOT / ".ci" / "cuda_wheel.py"
# Of CUDA, tests/simt needs the headers only. They are those of pyproject.toml's compiler.
CUDA_HEADERS = ("nvidia-cuda-runtime==13.0.*", "nvidia-cuda-crt==13.0.*", "nvidia-cuda-cccl==13.0.*")
# The files of tests/python with tests that run on every backend.
EMULATED_FILES = ("dequantize", "errors", "gemm", "linear", "outlier", "quantize", "threads", "weight")
CPP_FOLDERS = ("cpp", "cuda", "bindings", "tests/cpp", "tests/simt", "examples", "bench")
PYTHON_FOLDERS = ("python", "tests", "examples", "bench", ".ci", "docs/hooks.py", "docs/docstrings.py", "dev.py")


def main() -> int:
    """Run the chosen command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{demo,test,check,docs,evidence}")
    commands.add_parser("demo", help="build, install and run the demo", add_help=False).set_defaults(run=demo)
    commands.add_parser("test", help="build, install and run all tests").set_defaults(run=test)
    check_parser = commands.add_parser("check", help="formatting, lint and type checks")
    check_parser.add_argument("--fix", action="store_true", help="reformat instead of complaining")
    check_parser.set_defaults(run=check)
    commands.add_parser("docs", help="build the documentation, warnings as errors").set_defaults(run=docs)
    commands.add_parser("evidence", help="a small language model and the paper's tables of it").set_defaults(
        run=evidence
    )
    args, rest = parser.parse_known_args()
    if rest and args.command != "demo":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    started = time.monotonic()
    try:
        args.run(args)
    except subprocess.CalledProcessError as error:
        print(f"\ndev.py {args.command}: failed: {' '.join(map(str, error.cmd))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(f"\ndev.py {args.command}: done in {time.monotonic() - started:.0f} s")
    return 0


def demo(args: argparse.Namespace) -> None:
    """Install octavo with what the demo needs, and run it; further arguments are the demo's own."""
    prepare()
    install("torch", LABORATORY)
    step("Running the demo: MiniLM in int8")
    run(BIN / "octavo", "demo", *args.rest)


def test(_: argparse.Namespace) -> None:
    """C++ tests (release, sanitized, emulated GPU, Arm), examples; the Python tests against the installed wheel."""
    prepare()
    for preset in ("release", "cpu-debug"):
        step(f"C++ tests, preset {preset}")
        run(BIN / "cmake", "--preset", preset)
        run(BIN / "cmake", "--build", "--preset", preset)
        run(BIN / "ctest", "--preset", preset)
    emulated = test_emulated_gpu()
    test_arm()
    install("test", f"{LABORATORY}[test]")
    step("Python tests")
    run(PYTHON, "-m", "pytest", "-q", "-rs")
    if emulated:
        step("Python tests on the emulated GPU")
        # A stand-in for CuPy, whose device is that GPU; few generated cases, because it is slow.
        run(
            PYTHON,
            *("-m", "pytest", "-q", "-rs", "-k", "cupy"),
            *(f"tests/python/test_{name}.py" for name in EMULATED_FILES),
            PYTHONPATH="tests/simt/python",
            OCTAVO_CUDA_LIBRARY=str(ROOT / "build" / "release" / "tests" / "simt" / "liboctavo_cuda_simt.so"),
            OCTAVO_TEST_EXAMPLES="4",
        )
    step("Python examples")
    for example in sorted((ROOT / "examples").glob("*.py")):
        run(PYTHON, example)


def test_emulated_gpu() -> bool:
    """The CUDA backend on the emulated GPU of tests/simt, in the builds of release and cpu-debug.

    False where it cannot be built.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        step("C++ tests on the emulated GPU")
        print(f"left out: tests/simt needs Linux on x86_64, this is {platform.system()} on {platform.machine()}")
        return False
    pip(*CUDA_HEADERS)
    for preset in ("simt", "simt-asan"):
        step(f"C++ tests on the emulated GPU, preset {preset}")
        run(BIN / "cmake", "--preset", preset)
        run(BIN / "cmake", "--build", "--preset", preset)
        run(BIN / "ctest", "--preset", preset, "--parallel", str(os.cpu_count() or 1))
    return True


def test_arm() -> None:
    """The C++ tests on an emulated Arm processor, and the machine code of its kernels."""
    step("C++ tests, preset aarch64")
    if platform.machine() in {"aarch64", "arm64"}:
        print("left out: this processor is an Arm, and preset release has tested it")
        return
    tools = ("aarch64-linux-gnu-g++", "qemu-aarch64-static")
    missing = [tool for tool in tools if not shutil.which(tool)]
    if missing:
        reason = f"no {' and no '.join(missing)} (Debian, Ubuntu: apt install g++-aarch64-linux-gnu qemu-user-static)"
        if os.environ.get("CI") == "true":
            sys.exit(f"dev.py test: CI=true requires the Arm tests: {reason}")
        print(f"left out: {reason}")
        return
    run(BIN / "cmake", "--preset", "aarch64")
    run(BIN / "cmake", "--build", "--preset", "aarch64")
    run(BIN / "ctest", "--preset", "aarch64")
    run(PYTHON, MACHINE_CODE, ROOT / "build" / "aarch64", "aarch64-linux-gnu-objdump")


def check(args: argparse.Namespace) -> None:
    """The formatters, linters and type checks that pyproject.toml pins, and the machine code of the kernels."""
    prepare()
    install("dev", f"{LABORATORY}[test]")
    sources = [
        str(path.relative_to(ROOT))
        for folder in CPP_FOLDERS
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in {".c", ".h", ".cpp", ".hpp", ".cu", ".cuh"}
    ]
    step("clang-format")
    run(BIN / "clang-format", *(["-i"] if args.fix else ["--dry-run", "-Werror"]), *sources)
    step("ruff")
    folders = [folder for folder in PYTHON_FOLDERS if (ROOT / folder).exists()]
    run(BIN / "ruff", "format", *([] if args.fix else ["--check"]), *folders)
    run(BIN / "ruff", "check", *(["--fix"] if args.fix else []), *folders)
    step("mypy")
    run(PYTHON, "-m", "mypy")
    run(PYTHON, "-m", "mypy.stubtest", "octavo._core", "--allowlist", ".ci/stubtest-allowlist.txt")
    step("Machine code of the kernels")
    run(BIN / "cmake", "--preset", "release")
    run(BIN / "cmake", "--build", "--preset", "release")
    run(PYTHON, MACHINE_CODE, ROOT / "build" / "release")
    step("clang-tidy")  # after the build: some sources are found only when built
    checked = ["cpp/src", "tests/cpp"]
    if (ROOT / "build" / "release" / "bench" / "bench_linear").exists():
        checked.append("bench")
    else:
        print("bench/ is left out: it was not built, for want of google-benchmark (Debian, Ubuntu: libbenchmark-dev)")
    translation_units = [source for source in sources if source.startswith(tuple(checked)) and source.endswith(".cpp")]
    run(PYTHON, ROOT / ".ci" / "tidy.py", ROOT / "build" / "release", *translation_units)
    check_cuda()


def check_cuda() -> None:
    """The wheel with the CUDA backend, built for every architecture with nothing but packages of PyPI; what it holds.

    Here and not among the tests, because it is about code that no machine without a GPU can run, and takes a compiler
    of 100 MB and minutes: whoever runs the tests need not wait for it.
    """
    step("CUDA backend, for every architecture")
    if platform.system() != "Linux" or platform.machine() not in {"x86_64", "aarch64"}:
        print(f"left out: NVIDIA has no compiler for {platform.system()} on {platform.machine()}")
        return
    # The compiler comes as packages: another one that this machine has is not to be found.
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        os.environ.pop(name, None)
    wheels = ROOT / "build" / "cuda-wheel"
    shutil.rmtree(wheels, ignore_errors=True)
    os.environ.update(OCTAVO_CUDA="1", OCTAVO_WERROR="ON")
    try:
        run(PYTHON, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps", "-w", wheels, ".")
    finally:
        del os.environ["OCTAVO_CUDA"], os.environ["OCTAVO_WERROR"]
    pip("nvidia-cuda-cuobjdump==13.*", "nvidia-cuda-nvdisasm==13.*")
    run(PYTHON, CUDA_WHEEL, *wheels.glob("*.whl"))


def docs(_: argparse.Namespace) -> None:
    """The site, into build/site. It fails on any warning, broken link, or public name that the reference lacks."""
    prepare()
    install("docs", LABORATORY)
    step("Documentation")
    os.environ["NO_MKDOCS_2_WARNING"] = "1"  # a notice about other versions, meant for whoever chooses them
    run(PYTHON, "-m", "mkdocs", "build", "--strict", "--quiet")
    print(f"{ROOT / 'build' / 'site' / 'index.html'}")


def evidence(_: argparse.Namespace) -> None:
    """What bench/results/evidence was made by, small: less training, fewer windows."""
    prepare()
    install("torch", f"{LABORATORY}[peers]")
    lm, output = ROOT / "build" / "lm", ROOT / "build" / "evidence"
    step("Training a small language model on the documentation of this machine")
    started = time.monotonic()
    run(PYTHON, "bench/train_lm.py", "--setting", "small", "--output", lm)
    print(f"trained in {time.monotonic() - started:.0f} s")
    step("The paper's tables")
    small = {"windows": 30, "close-windows": 200, "questions": 40, "analyzed": 10, "sentences": 50}
    small |= {"draws": 2, "seconds": 2}
    options = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    run(PYTHON, "bench/evidence.py", "--lm", lm, "--output", output, *options)


def prepare() -> None:
    """Make .venv, with the build tools that the C++ presets use."""
    if sys.version_info < (3, 10):  # noqa: UP036 - whoever runs this file may have any Python
        sys.exit(f"dev.py: needs Python 3.10 or newer, this is {sys.version.split()[0]}")
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++")):
        sys.exit("dev.py: needs a C++20 compiler (Debian, Ubuntu: apt install g++)")
    if not PYTHON.exists():
        step(f"Making a virtual environment in {VENV.relative_to(ROOT)}/")
        venv.create(VENV, with_pip=True)
    step("Installing the build tools")
    pip("cmake>=3.25", "ninja")


def install(extra: str, *others: str) -> None:
    """Build the wheel and install it, with an extra of pyproject.toml; other packages of this folder with it."""
    step(f"Building and installing octavo[{extra}]")
    pip(f".[{extra}]", *others)


def pip(*requirements: str) -> None:
    run(
        PYTHON,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-compile",  # of torch and transformers little is ever imported; Python compiles that when it is
        "-c",
        CONSTRAINTS,
        *requirements,
    )


def step(title: str) -> None:
    print(f"\n=== {title}", flush=True)


def run(*command: str | Path, **variables: str) -> None:
    """Run a command of this folder, with more in its environment, showing what it prints.

    Raises CalledProcessError where it fails.
    """
    # The tools of .venv come first: ninja, for one, is found by CMake on the path.
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}", **variables}
    words: Sequence[str] = [str(word) for word in command]
    subprocess.run(words, cwd=ROOT, env=environment, check=True)


if __name__ == "__main__":
    sys.exit(main())
