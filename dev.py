#!/usr/bin/env python3
"""Everything a developer does, each as one command that also does its own set-up.

    python3 dev.py demo        build, install and run the demo
    python3 dev.py test        build, install and run the library's tests, C++ and Python, on what this machine has
    python3 dev.py test --all  also sanitizers, emulated GPU and Arm, Transformers, the laboratory
    python3 dev.py check       formatting, lint, types, machine code, the CUDA wheel
    python3 dev.py docs        the documentation into build/site
    python3 dev.py evidence    train a small language model, and make the paper's tables of it, in minutes
    python3 dev.py wheel       sdist, manylinux wheel and SBOM into build/dist, tested in a bare environment
    python3 dev.py lock        the versions and hashes of .ci/lock, anew
    python3 dev.py ci          all of it, cheapest first

Needs Python >= 3.10 and a C++20 compiler (tested: Python 3.11, GCC 12, Clang 14); uses nothing else of the
system and installs nothing outside this folder: packages go to .venv, builds to build/. Running a command again is
quick. Steps that do not wait for each other run two at a time; what each printed is in build/log.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build"
VENV = ROOT / ".venv"
BIN = VENV / "bin"
PYTHON = BIN / "python"
PIP = (PYTHON, "-m", "pip", "-qq", "--disable-pip-version-check")
CI = ROOT / ".ci"
CORES = str(os.cpu_count() or 1)
# Of CUDA, tests/simt needs the headers only. They are those of pyproject.toml's compiler.
CUDA_HEADERS = ("nvidia-cuda-runtime==13.0.*", "nvidia-cuda-crt==13.0.*", "nvidia-cuda-cccl==13.0.*")
# What CI compiles: the sources have code of their own for what is before sm_80 and for what is from there on, and
# nothing else. `dev.py check` compiles for all GPUs that the wheel is for.
CI_ARCHITECTURES = "75-real;90a-real"
# Where ccache is, what one step has compiled another does not compile again: the wheels have the same core.
CCACHE = {
    "CMAKE_CXX_COMPILER_LAUNCHER": "ccache",
    "CCACHE_DIR": str(BUILD / "ccache"),
    "CCACHE_BASEDIR": str(ROOT),
    "CCACHE_NOHASHDIR": "true",
}
# The files of tests/python with tests that run on every backend, but for threads: tests/simt/test_calls.cpp has those.
EMULATED_FILES = ("dequantize", "errors", "gemm", "linear", "outlier", "quantize", "ranges", "weight")
# Those that need more packages than NumPy, PyTorch and Transformers, or start many processes.
INTEGRATION_FILES = (
    *("checkpoint_bitsandbytes", "checkpoint_resume", "checkpoint_transformers", "diffusers", "distributed"),
    *("jax", "onnx*", "peft", "sentence_transformers", "serve", "torch_op", "transformers*"),
)
CPP_FOLDERS = ("cpp", "cuda", "bindings", "tests/cpp", "tests/simt", "examples", "bench")
PYTHON_FOLDERS = ("python", "tests", "examples", "bench", ".ci", "docs", "dev.py")


# --- steps ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """Something to do, once what it needs is done. `needs` are names of other steps; those not asked for are not done.

    The name is what is printed; the docstring of `do` says more.
    """

    name: str
    do: Callable[[], None]
    needs: tuple[str, ...] = ()


def make_environment() -> None:
    """.venv, with the tools that build."""
    if not PYTHON.exists():
        venv.create(VENV, with_pip=True)
    pip("build")


def system_packages() -> None:
    """What Arm tests, fuzzer, C++ benchmarks and fast builds need, where this is CI's machine and has them."""
    packages = ("g++-aarch64-linux-gnu", "qemu-user-static", "libbenchmark-dev", "ccache", "clang", "libclang-rt-dev")
    if os.environ.get("CI") != "true" or not shutil.which("apt-get") or os.getuid() != 0:
        say(f"left to you, as root: apt-get install {' '.join(packages)}")
        return
    try:
        run("apt-get", "update", "-q")
        run("apt-get", "install", "-q", "-y", "--no-install-recommends", *packages)
    except subprocess.CalledProcessError:
        say("not installed: the steps that need them say what they leave out")


def test_packages() -> None:
    """What the library's tests need."""
    pip("test")
    install_torch()


def octavo() -> None:
    """One build of the wheel, installed, and of the C++ tests, which are linked with the same objects."""
    settings = {
        "build-dir": "build/release",
        "cmake.define.OCTAVO_TESTS": "ON",
        "cmake.define.OCTAVO_EXAMPLES": "ON",
        "cmake.define.OCTAVO_WERROR": "ON",
    }
    run(
        *(*PIP, "install", "--no-deps", "--no-build-isolation", "--force-reinstall", "."),
        # Not -C, which the pip of Debian 12 does not know.
        *(f"--config-settings={name}={value}" for name, value in settings.items()),
    )


def cpp_tests() -> None:
    """tests/cpp on every instruction set of this processor."""
    run(BIN / "ctest", "--test-dir", "build/release", "--output-on-failure", "--no-tests=error", "-E", "simt")


def python_tests() -> None:
    """tests/python, without those that other steps run."""
    pytest("tests/python", *(f"--ignore-glob=*/test_{name}.py" for name in INTEGRATION_FILES))


def formatting() -> None:
    """clang-format and ruff complain of what they would change."""
    pip("lint")
    reformat("--dry-run", "-Werror")


def lint() -> None:
    """Ruff and mypy."""
    run(BIN / "ruff", "check", *PYTHON_FOLDERS)
    run(PYTHON, "-m", "mypy")


def stubs() -> None:
    """The stub of octavo._core against the built module."""
    run(PYTHON, "-m", "mypy.stubtest", "octavo._core", "--allowlist", CI / "stubtest-allowlist.txt")


def sanitized() -> None:
    """tests/cpp under AddressSanitizer and UndefinedBehaviorSanitizer, and the installation for C and C++."""
    preset("cpu-debug")


def emulated_gpu() -> None:
    """The CUDA backend, compiled as C++, on the emulated GPU of tests/simt: plain, and with race detection."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        say(f"left out: tests/simt needs Linux on x86_64, this is {platform.system()} on {platform.machine()}")
        return
    run(*PIP, "install", *CUDA_HEADERS)
    run(*PIP, "install", "--no-deps", "nvidia-cutlass==4.2.*")  # its headers: tests/simt/test_layouts.cpp
    preset("simt")
    # A stand-in for CuPy, whose device is that GPU; few generated cases, because it is slow.
    pytest(
        *("-k", "cupy"),
        *(f"tests/python/test_{name}.py" for name in EMULATED_FILES),
        PYTHONPATH="tests/simt/python",
        OCTAVO_CUDA_LIBRARY=str(BUILD / "release" / "tests" / "simt" / "liboctavo_cuda_simt.so"),
        OCTAVO_TEST_EXAMPLES="4",
    )


def emulated_gpu_sanitized() -> None:
    """The same under AddressSanitizer."""
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        preset("simt-asan")


def fuzzers() -> None:
    """Random calls of the C ABI and random DLPack capsules, under sanitizers."""
    run(PYTHON, CI / "fuzz.py", "60")


def arm() -> None:
    """tests/cpp on an emulated Arm processor, and the machine code of its kernels."""
    if platform.machine() in {"aarch64", "arm64"}:
        say("left out: this processor is an Arm, and the C++ tests have tested it")
        return
    missing = [tool for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64-static") if not shutil.which(tool)]
    if missing:
        say(f"left out: no {' and no '.join(missing)} (Debian: apt install g++-aarch64-linux-gnu qemu-user-static)")
        return
    preset("aarch64")
    run(PYTHON, CI / "machine_code.py", BUILD / "aarch64", "aarch64-linux-gnu-objdump")


def integration() -> None:
    """Octavo within Transformers, PEFT and others, and among processes; the examples in Python."""
    pip("integration")
    files = [path for name in INTEGRATION_FILES for path in sorted((ROOT / "tests/python").glob(f"test_{name}.py"))]
    frameworks = "tests/python/test_dlpack.py::test_frameworks"  # with those that are installed now
    # By file: what a file's tests share, such as the processes of a group, is made once.
    pytest(*files, frameworks, "--dist", "loadfile")
    for example in sorted((ROOT / "examples").glob("*.py")):
        run(PYTHON, example)


def machine_code() -> None:
    """The CPU kernels have the instructions that they are written for; clang-tidy."""
    pip("lint")
    run(PYTHON, CI / "machine_code.py", BUILD / "release")
    sources = [path for folder in ("cpp/src", "tests/cpp") for path in sorted((ROOT / folder).rglob("*.cpp"))]
    run(PYTHON, CI / "tidy.py", BUILD / "release", *sources)


def cuda_wheel(architectures: str | None = None) -> None:
    """The wheel with the CUDA backend, by default for every architecture, built with nothing but packages; its content.

    `architectures`: as CMake names them.
    """
    if platform.system() != "Linux" or platform.machine() not in {"x86_64", "aarch64"}:
        say(f"left out: NVIDIA has no compiler for {platform.system()} on {platform.machine()}")
        return
    wheels = BUILD / "cuda-wheel"
    shutil.rmtree(wheels, ignore_errors=True)
    # The compiler comes as packages: another one that this machine has is not to be found.
    hidden = dict.fromkeys(("CUDACXX", "CUDA_HOME", "CUDA_PATH"))
    wanted = {"OCTAVO_CUDA": "1", "OCTAVO_WERROR": "ON"}
    wanted |= {"OCTAVO_CUDA_ARCHITECTURES": architectures} if architectures else {}
    run(*PIP, "wheel", "--no-deps", "-w", wheels, ".", **hidden, **wanted)
    run(*PIP, "install", "nvidia-cuda-cuobjdump==13.*", "nvidia-cuda-nvdisasm==13.*")
    run(PYTHON, CI / "cuda_wheel.py", *wheels.glob("*.whl"))


def laboratory() -> None:
    """octavo-bench, which proves the library."""
    pip("laboratory")
    run(*PIP, "install", "--no-deps", "--no-build-isolation", "./bench")


def laboratory_tests() -> None:
    """bench/tests."""
    pytest("bench/tests")


def demo(*words: str) -> None:
    """A real sentence transformer in int8."""
    run(BIN / "octavo", "demo", *(words or ("--output", BUILD / "demo")))


def evidence() -> None:
    """What bench/results/evidence was made by, small: less training, fewer windows."""
    lm, output = BUILD / "lm", BUILD / "evidence"
    run(PYTHON, "-m", "octavo_bench", "train", "--setting", "small", "--output", lm)
    run(PYTHON, "-m", "octavo_bench", "evidence", "--setting", "small", "--lm", lm, "--output", output)


def docs() -> None:
    """The site. It fails on any warning, broken link, or public name that the reference lacks."""
    pip("docs")
    # A notice about other versions is meant for whoever chooses them.
    run(PYTHON, "-m", "mkdocs", "build", "--strict", "--quiet", NO_MKDOCS_2_WARNING="1")
    say(str(BUILD / "site" / "index.html"))


def wheel(*pythons: str) -> None:
    """What is released, as RELEASE.md says, tested in environments with NumPy alone."""
    pip("wheel")
    run(PYTHON, CI / "wheel.py", BUILD / "dist", *pythons)


def lock() -> None:
    """.ci/lock from the requirements of pyproject.toml and bench/pyproject.toml."""
    pip("wheel")
    run(PYTHON, CI / "lock.py")


ENVIRONMENT = Step("environment", make_environment)
INSTALLED = [
    ENVIRONMENT,
    Step("test packages", test_packages, ("environment",)),
    Step("octavo", octavo, ("environment", "system packages")),
]
TESTS = [
    *INSTALLED,
    Step("C++ tests", cpp_tests, ("octavo",)),
    Step("Python tests", python_tests, ("test packages", "C++ tests")),
]
CHECKS = [
    Step("formatting", formatting, ("environment",)),
    Step("lint and types", lint, ("formatting", "test packages")),
    Step("stubs", stubs, ("lint and types", "octavo")),
]
# Those that others wait for come first, then what takes longest.
MORE_TESTS = [
    Step("sanitizers", sanitized),
    Step("emulated GPU", emulated_gpu, ("sanitizers",)),
    Step("emulated GPU, sanitized", emulated_gpu_sanitized, ("emulated GPU",)),
    Step("Transformers and others", integration),
    Step("fuzzers", fuzzers, ("sanitizers",)),  # which has compiled some of it
    Step("emulated Arm", arm),
]
MORE_CHECKS = [
    Step("CUDA wheel", cuda_wheel, ("octavo",)),
    Step("machine code and clang-tidy", machine_code, ("octavo", "emulated GPU")),  # which configures the same build
]
LABORATORY = [
    Step("laboratory", laboratory, ("test packages",)),
    Step("laboratory tests", laboratory_tests, ("laboratory",)),
]
DEMO = Step("demo", partial(demo, "--setting", "small", "--output", str(BUILD / "demo")), ("laboratory",))
EVIDENCE = Step("evidence", evidence, ("laboratory",))
DOCS = Step("docs", docs, ("laboratory",))
WHEEL = Step("wheel", wheel)
# The cheapest first: whatever fails there is known in minutes.
STAGES = [
    [Step("system packages", system_packages), *TESTS, *CHECKS],
    [replace(MORE_CHECKS[0], do=partial(cuda_wheel, CI_ARCHITECTURES)), *MORE_TESTS, MORE_CHECKS[1]],
    [LABORATORY[0], EVIDENCE, WHEEL, LABORATORY[1], DEMO, DOCS],
]


# --- commands ---------------------------------------------------------------------------------------------------------


def main() -> int:
    """Run the chosen command; returns its exit status."""
    if sys.version_info < (3, 10):  # noqa: UP036 - whoever runs this file may have any Python
        sys.exit(f"dev.py: needs Python 3.10 or newer, this is {sys.version.split()[0]}")
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++")):
        sys.exit("dev.py: needs a C++20 compiler (Debian, Ubuntu: apt install g++)")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("demo", help="its own options follow", add_help=False)
    commands.add_parser("test").add_argument("--all", action="store_true", help="all that CI tests")
    commands.add_parser("check").add_argument("--fix", action="store_true", help="reformat instead of complaining")
    commands.add_parser("wheel").add_argument(
        "python", nargs="*", help="for which interpreters; default: that of .venv"
    )
    for name in ("docs", "evidence", "lock", "ci"):
        commands.add_parser(name)
    args, rest = parser.parse_known_args()
    if rest and args.command != "demo":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was started is ended, too
    started = time.monotonic()
    try:
        command(args, rest)
    except subprocess.CalledProcessError as error:
        print(f"\ndev.py {args.command}: failed: {' '.join(map(str, error.cmd))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        stop()
    print(f"\ndev.py {args.command}: done in {time.monotonic() - started:.0f} s")
    return 0


def command(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Do the steps of a command."""
    if args.command == "ci":
        for number, stage in enumerate(STAGES, 1):
            print(f"\n##### stage {number} of {len(STAGES)}", flush=True)
            perform(stage)
    elif args.command == "test":
        perform(TESTS)
        if args.all:
            perform([*MORE_TESTS, *LABORATORY])
    elif args.command == "check" and args.fix:
        perform([ENVIRONMENT])
        pip("lint")
        reformat("-i")
    elif args.command == "check":
        perform([*INSTALLED, *CHECKS, *MORE_CHECKS])
    elif args.command == "demo":
        perform([*INSTALLED, LABORATORY[0]])
        demo(*rest)
    elif args.command == "wheel":
        perform([ENVIRONMENT])
        wheel(*args.python)
    else:
        last = {"docs": DOCS, "evidence": EVIDENCE, "lock": Step("lock", lock)}[args.command]
        first = [ENVIRONMENT] if args.command == "lock" else [*INSTALLED, LABORATORY[0]]
        perform(first)
        perform([last])


# --- doing steps ------------------------------------------------------------------------------------------------------

# .log: where the step of this thread prints, unless on the screen; .processor_seconds: what its commands have taken
LOCAL = threading.local()
INSTALLING = threading.Lock()
PRINTING = threading.Lock()
STARTED: set[subprocess.Popen[bytes]] = set()
STOPPED = threading.Event()
STARTING = threading.Lock()  # whoever starts a process, or stops those that were started


def perform(steps: Sequence[Step]) -> None:
    """Do steps, two at a time, each after those it needs. Raises CalledProcessError of the first that fails."""
    STOPPED.clear()
    names = {step.name for step in steps}
    waiting, done = list(steps), set[str]()
    running: dict[Future[None], Step] = {}
    with ThreadPoolExecutor(2) as pool:
        try:
            while waiting or running:
                ready = [step for step in waiting if names.intersection(step.needs) <= done]
                for step in ready[: 2 - len(running)]:
                    waiting.remove(step)
                    running[pool.submit(perform_one, step)] = step
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    done.add(running.pop(future).name)
                    future.result()
        except BaseException:
            stop()  # the other one, for which the pool would wait
            raise


def perform_one(step: Step) -> None:
    """Do a step, and print what it printed when it is over."""
    path = BUILD / "log" / f"{step.name.replace(' ', '-').replace(',', '')}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    LOCAL.processor_seconds = 0.0
    result = "failed"
    try:
        with path.open("wb") as LOCAL.log:
            step.do()
        result = "done"
    finally:
        text = path.read_text(encoding="utf-8", errors="replace").rstrip()
        spent = f"{time.monotonic() - started:.0f} s, {LOCAL.processor_seconds:.0f} s of processors"
        with PRINTING:
            print(f"\n=== {step.name}\n{text}\n=== {step.name}: {result} in {spent}", flush=True)


def stop() -> None:
    """End what is still running, and what that has started."""
    with STARTING:
        STOPPED.set()
        for process in STARTED:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def run(*words: str | Path, **variables: str | None) -> None:
    """Run a command in this folder, with more in its environment, or less (None).

    Raises CalledProcessError where it fails.
    """
    # Compilers at a time: another step runs meanwhile, and ninja's own choice is more than there are processors.
    defaults = {"CMAKE_BUILD_PARALLEL_LEVEL": CORES, **(CCACHE if shutil.which("ccache") else {})}
    # The tools of .venv come first: ninja, for one, is found by CMake on the path.
    environment = {**defaults, **os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"}
    # Transformers takes ten seconds to import where Python may not keep what it has compiled.
    variables = {"PYTHONDONTWRITEBYTECODE": None, **variables}
    environment |= {name: value for name, value in variables.items() if value is not None}
    for name in (name for name, value in variables.items() if value is None):
        environment.pop(name, None)
    log: IO[bytes] | None = getattr(LOCAL, "log", None)
    command = [str(word) for word in words]
    with STARTING:
        if STOPPED.is_set():
            raise subprocess.CalledProcessError(-signal.SIGKILL, command)
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
        STARTED.add(process)
    _, status, usage = os.wait4(process.pid, 0)
    with STARTING:
        STARTED.discard(process)
    process.returncode = os.waitstatus_to_exitcode(status)
    LOCAL.processor_seconds = getattr(LOCAL, "processor_seconds", 0.0) + usage.ru_utime + usage.ru_stime
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)


def say(line: str) -> None:
    """Print a line where the step prints."""
    log: IO[bytes] | None = getattr(LOCAL, "log", None)
    if log is None:
        print(line, flush=True)
    else:
        log.write(f"{line}\n".encode())
        log.flush()


def pip(group: str) -> None:
    """Install the packages of .ci/lock/<group>.txt, each as its hash says."""
    with INSTALLING:
        install_locked("-r", CI / "lock" / f"{group}.txt")


def install_torch() -> None:
    """PyTorch, in the build that pip itself prefers: for the CPU, where it finds one.

    Told the hashes at once, it would prefer those of an index, and so the build for CUDA, of 3 GB with its packages.
    """
    locked = CI / "lock" / "torch.txt"
    version = re.search(r"^torch==\S+", locked.read_text(encoding="utf-8"), re.MULTILINE)
    assert version is not None
    wheels = BUILD / "wheels"
    with INSTALLING:
        if not list(wheels.glob("torch-*.whl")):
            run(*PIP, "download", "--no-deps", "--dest", wheels, version[0])
        install_locked("--no-index", "--find-links", wheels, "-r", locked)
        if not list(wheels.glob("torch-*+cpu-*.whl")):
            run(*PIP, "install", version[0])  # what the build for CUDA needs beyond test.txt


def install_locked(*words: str | Path) -> None:
    # --no-compile: of torch and transformers little is ever imported; Python compiles that when it is.
    run(*PIP, "install", "--no-compile", "--no-deps", "--require-hashes", *words)


def preset(name: str) -> None:
    """Configure, build and test with a preset of CMakePresets.json."""
    run(BIN / "cmake", "--preset", name)
    run(BIN / "cmake", "--build", "--preset", name)
    run(BIN / "ctest", "--preset", name, "--parallel", CORES)


def pytest(*words: str | Path, **variables: str) -> None:
    """Run tests in Python, in as many processes as there are processors; says which took longest."""
    long = ("--durations=8", "--durations-min=3")
    run(PYTHON, "-m", "pytest", "-q", "-n", CORES, "--dist", "worksteal", *long, *words, **variables)


def reformat(*how: str) -> None:
    """clang-format and ruff: `-i` changes the files, `--dry-run -Werror` complains."""
    suffixes = {".c", ".h", ".cpp", ".hpp", ".cu", ".cuh"}
    paths = [path for folder in CPP_FOLDERS for path in sorted((ROOT / folder).rglob("*"))]
    run(BIN / "clang-format", *how, *(path for path in paths if path.suffix in suffixes))
    if "-i" in how:
        run(BIN / "ruff", "check", "--fix", *PYTHON_FOLDERS)
    run(BIN / "ruff", "format", *([] if "-i" in how else ["--check"]), *PYTHON_FOLDERS)


if __name__ == "__main__":
    sys.exit(main())
