"""bench/gpu.sh as far as a machine without a GPU can run it, with stand-ins for the programs that it calls."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

# Stands in for every program that the script calls: notes the call, and does the little that the script relies on. What
# fails, hangs or is missing is named by the environment.
STAND_IN = r"""#!/usr/bin/env bash
name=$(basename "$0")
printf '%s\n' "$name $*" >>"$CALLS"
case "$name $*" in
  *"-m venv"*) mkdir -p "${@: -1}/bin" "${@: -1}/lib"; cp "$0" "${@: -1}/bin/python" ;;
  *'sep="\n"'*) printf '/outer\n/outer\n' ;;
  "nvidia-smi --query-gpu=compute_cap"*) [ -z "${NO_GPU-}" ] || { echo "no GPU" >&2; exit 1; }; echo 9.0 ;;
  "nvidia-smi --query"*) echo "NVIDIA H200" ;;
  *get_path*) printf '%s\n' "$(dirname "$0")/../lib" ;;
  *nvidia.__path__*|*"import nvidia"*) echo /packages/nvidia/cu13/lib ;;
  *"import xdist"*) echo "-n 8" ;;
  *prebuilt/liboctavo_cuda.so*) echo /prebuilt/liboctavo_cuda.so ;;
  *liboctavo_cuda.so*) echo /wheel/liboctavo_cuda.so ;;
  *--json*) all="$*"; file=${all#*--json }; echo "{}" >"${file%% *}" ;;
  *octavo_bench.layers.kernels*) echo kernels >"${@: -1}" ;;
  *"import pytest"*) [ -z "${NO_PYTEST-}" ] || { echo "ModuleNotFoundError: No module named 'pytest'" >&2; exit 1; } ;;
  "cmake -S"*) mkdir -p build/gpu/cpp/tests/cpp
    for test in dequantize gemm linear outlier quantize; do cp "$0" build/gpu/cpp/tests/cpp/test_$test; done ;;
  test_*) [ "$OCTAVO_TEST_DEVICE $OCTAVO_CUDA_LIBRARY" = "cuda /${BACKEND:-wheel}/liboctavo_cuda.so" ] || exit 3
    echo "$OCTAVO_CUDA_LIBRARY ${LD_LIBRARY_PATH-}" ;;
  *"pip install --no-build-isolation"*) [ -z "${OCTAVO_CUDA-}" ] || [ -z "${NO_NVCC-}" ] || exit 7
    [ "${OCTAVO_CUDA-} ${OCTAVO_CUDA_ARCHITECTURES-}" = "1 90a-real" ] || [ -n "${NO_NVCC-}" ] || exit 3 ;;
esac
if [ -n "${FAIL-}" ] && [[ "$name $*" == *$FAIL* ]]; then echo "it broke"; exit 7; fi
if [ -n "${HANG-}" ] && [[ "$name $*" == *$HANG* ]]; then exec sleep 60; fi
exit 0
"""
# A minute of the script's limits lasts 2 s.
TIMEOUT = r"""#!/usr/bin/env bash
exec "$TIMEOUT" --kill-after=1 "$(awk "BEGIN { print $2 / 30 }")" "${@:3}"
"""


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., tuple[int, str, list[str]]]:
    """Runs gpu.sh in a folder of its own; gives status, output, and the calls that it made."""
    if sys.platform == "win32":
        pytest.skip("a shell script")
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "gpu.sh").write_text((ROOT / "bench" / "gpu.sh").read_text())
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("python3", "cmake", "nvidia-smi", "compute-sanitizer"):
        (programs / name).write_text(STAND_IN)
        (programs / name).chmod(0o755)

    def run(*words: str, kill_when: str = "", fast: bool = False, **environment: str) -> tuple[int, str, list[str]]:
        calls = tmp_path / "calls.txt"
        calls.write_text("")
        clean = {name: value for name, value in os.environ.items() if not name.startswith("OCTAVO_")}
        clean.pop("PYTHON", None)
        if fast:
            (programs / "timeout").write_text(TIMEOUT)
            (programs / "timeout").chmod(0o755)
            environment["TIMEOUT"] = str(shutil.which("timeout"))
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        process = subprocess.Popen(
            ["bash", "bench/gpu.sh", *words, "out"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env={**clean, "PATH": path, "CALLS": str(calls), **environment}, start_new_session=True,
        )  # fmt: skip
        end = time.monotonic() + 60
        while kill_when and kill_when not in calls.read_text():
            assert time.monotonic() < end, calls.read_text()
            time.sleep(0.05)
        if kill_when:
            os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate(timeout=120)
        assert not re.search(r"gpu\.sh: line \d+(?!.*Killed)", errors), errors
        return process.returncode, output + errors, calls.read_text().splitlines()

    return run


Script = Callable[..., tuple[int, str, list[str]]]
TESTS = [f"test-cpp-{name}" for name in ("dequantize", "gemm", "linear", "outlier", "quantize")]
TOOLS = ["memcheck", "racecheck", "initcheck", "synccheck"]
BENCHMARK = "-m octavo_bench bench --device cuda"
FIGURES = ["wgmma", "key-figures", "mma", "no-prefetch", "graphs", "kernels"]
STEPS = {
    *("build-tests", "build-wheel", "import", *TESTS, "test-cpp-cublaslt"),
    *(*FIGURES, "test-python", *TOOLS, "benchmark"),
}


def summary(output: str) -> dict[str, str]:
    """What the last lines say of each step."""
    lines = re.split(r"^\d+ s$", output.split("=== summary\n")[1], maxsplit=1, flags=re.MULTILINE)[0].splitlines()
    return dict(line.split(None, 1) for line in lines)


def test_every_step_runs_and_the_summary_says_so(script: Script) -> None:
    status, output, calls = script()
    assert set(summary(output)) == STEPS
    assert all(what.startswith("ok, ") for what in summary(output).values()), output
    assert status == 0
    assert sum(call.startswith("test_") for call in calls) == len(TESTS) + 1
    sanitized = [call for call in calls if call.startswith("compute-sanitizer")]
    assert len({call.split()[2] for call in sanitized}) == len(TOOLS)
    assert all(re.search(r"--error-exitcode 9 build/gpu/cpp/tests/cpp/test_\w+ \w+$", call) for call in sanitized)
    benchmark = [call for call in calls if BENCHMARK in call][-1]
    assert re.search(r"--json \S+/out/nvidia-h200-\d{4}-\d\d-\d\d\.json --limit 260$", benchmark)  # of the step's 300
    _, _, calls = script(OCTAVO_GPU_SECONDS="200")
    assert 0 < int([call for call in calls if BENCHMARK in call][-1].split()[-1]) <= 160


def test_what_comes_back_is_at_most_eight_files(script: Script, tmp_path: Path) -> None:
    script()
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    day = next(name for name in names if name.endswith("-key.json")).removesuffix("-key.json")
    assert names == sorted(["logs.tgz", f"{day}-graph.json", f"{day}-kernels.txt", f"{day}-key.json", f"{day}-mma.json",
                            f"{day}-no-prefetch.json", f"{day}.json", "summary.txt"])  # fmt: skip
    with tarfile.open(tmp_path / "out" / "logs.tgz") as logs:
        assert {f"./{name}.log" for name in STEPS} <= set(logs.getnames())
        cublas = logs.extractfile("./test-cpp-cublaslt.log")
        assert cublas is not None
        assert cublas.read().decode() == "/wheel/liboctavo_cuda.so /packages/nvidia/cu13/lib\n"


def test_the_order_is_that_of_what_matters(script: Script) -> None:
    order = list(summary(script()[1]))
    places = [order.index(name) for name in ("build-wheel", "test-cpp-linear", "test-cpp-cublaslt", *FIGURES)]
    assert [*places, order.index("test-python"), order.index("memcheck"), order.index("benchmark")] == sorted(
        [*places, order.index("test-python"), order.index("memcheck"), order.index("benchmark")]
    )


@pytest.mark.parametrize(
    ("hangs", "step"),
    [("cmake -S", "build-tests"), ("pip install --no-build", "build-wheel"), ("import octavo; i", "import"),
     ("test_gemm ", "test-cpp-gemm"), ("-key.json", "key-figures"), ("-mma.json", "mma"),
     ("-no-prefetch.json", "no-prefetch"), ("--graph", "graphs"), ("kernels", "kernels"),
     ("-m pytest", "test-python"), ("initcheck", "initcheck"), ("--limit 260", "benchmark")],
)  # fmt: skip
def test_at_every_limit_the_next_step_begins(script: Script, hangs: str, step: str) -> None:
    status, output, _ = script(fast=True, HANG=hangs)
    found = summary(output)
    assert re.fullmatch(r"failed: took more than \d+ s", found[step]), output
    fatal = {"build-wheel", "import"}  # without these there is nothing to test
    assert step in fatal or set(found) == STEPS
    assert status == 1


def test_a_kill_loses_one_step_and_the_next_call_goes_on_there(script: Script, tmp_path: Path) -> None:
    script(kill_when="-m pytest", HANG="-m pytest")
    kept = dict(line.split(None, 1) for line in (tmp_path / "out" / "summary.txt").read_text().splitlines())
    before = {"build-tests", "build-wheel", "import", *TESTS, "test-cpp-cublaslt", *FIGURES}
    assert set(kept) == before
    assert all(what.startswith("ok, ") for what in kept.values())
    with tarfile.open(tmp_path / "out" / "logs.tgz") as logs:
        assert {f"./{name}.log" for name in before} <= set(logs.getnames())
    status, output, calls = script("--continue")
    found = summary(output)
    assert {name for name, what in found.items() if what == "ok, before"} == before
    assert set(found) == STEPS
    assert status == 0
    assert not any("pip install" in call or "-key.json" in call for call in calls)
    assert "ok, before" not in script()[1]  # a call without the word begins anew


def test_a_backend_that_was_built_before_serves_where_none_can_be_built(script: Script, tmp_path: Path) -> None:
    assert script(NO_NVCC="1")[0] == 1
    (tmp_path / "prebuilt").mkdir()
    (tmp_path / "prebuilt" / "liboctavo_cuda.so").touch()
    status, output, _ = script(NO_NVCC="1", BACKEND="prebuilt")
    found = summary(output)
    assert found.pop("build-wheel").startswith("failed with status 7")
    assert set(found) == STEPS - {"build-wheel"} | {"build-without-cuda"}
    assert all(what.startswith("ok, ") for what in found.values()), output
    assert status == 1  # which says that something failed


def test_the_cases_for_the_sanitizer_are_there(script: Script) -> None:
    """A filter that no test's name matches would fail on the device, where time is short."""
    for call in {call for call in script()[2] if call.startswith("compute-sanitizer --tool memcheck")}:
        name, pattern = call.split()[-2:]
        source = (ROOT / "tests" / "cpp" / f"{Path(name).name}.cpp").read_text()
        assert any(pattern in test for test in re.findall(r"^TEST\((\w+)\)", source, re.MULTILINE)), call


def test_the_files_for_pytest_are_there(script: Script) -> None:
    call = next(call for call in script()[2] if "-m pytest" in call)
    files = re.findall(r"tests/python/\S+", call)
    assert len(files) == 8
    assert all((ROOT / name).is_file() for name in files), files


@pytest.mark.parametrize(
    ("fails", "step"),
    [("test_linear ", "test-cpp-linear"), ("-m pytest", "test-python"), ("racecheck", "racecheck"),
     ("-key.json", "key-figures"), ("--limit 260", "benchmark")],
)  # fmt: skip
def test_a_step_that_fails_does_not_stop_the_others(script: Script, fails: str, step: str) -> None:
    status, output, _ = script(FAIL=fails)
    found = summary(output)
    assert set(found) == STEPS
    assert found[step].startswith("failed with status ")
    assert "it broke" in output
    others = {name for name in STEPS if name != step and not (step == "test-cpp-linear" and name in TOOLS)}
    assert all(found[name].startswith("ok, ") for name in others), output
    assert status == 1


@pytest.mark.parametrize(("fails", "last"), [("pip install --no-build", "build-wheel"), ("import octavo; i", "import")])
def test_nothing_is_tested_that_was_not_built(script: Script, fails: str, last: str) -> None:
    status, output, calls = script(FAIL=fails)
    assert summary(output)[last].startswith("failed with status 7")
    assert not any(BENCHMARK in call for call in calls)
    assert status == 1


def test_what_hangs_is_ended_in_time(script: Script) -> None:
    started = time.monotonic()
    status, output, _ = script(HANG="-m pytest", OCTAVO_GPU_SECONDS="8")
    assert time.monotonic() - started < 45
    found = summary(output)
    assert found["test-python"].startswith("failed: took more than ")
    assert found["benchmark"].startswith("failed: no time was left")
    assert status == 1


def test_what_is_missing_is_said(script: Script, tmp_path: Path) -> None:
    status, output, _ = script(NO_PYTEST="1")
    assert summary(output)["test-python"] == "left out: ModuleNotFoundError: No module named 'pytest'"
    assert status == 0
    status, output, calls = script(NO_GPU="1")
    assert summary(output) == {"setup": "failed: nvidia-smi sees no GPU"}
    assert status == 2
    assert not any("pip" in call for call in calls)


def test_wheels_are_installed_where_there_are_some(script: Script, tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "pytest-9.0-py3-none-any.whl").touch()
    _, output, calls = script()
    assert summary(output)["wheels"].startswith("ok, ")
    assert any(re.search(r"pip install --no-index --no-deps wheels/pytest-9\.0", call) for call in calls)
