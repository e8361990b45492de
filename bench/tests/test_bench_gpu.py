"""bench/gpu.sh as far as a machine without a GPU can run it, with stand-ins for the programs that it calls."""

from __future__ import annotations

import os
import re
import subprocess
import sys
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
  "nvidia-smi --query"*) echo "NVIDIA H200" ;;
  *get_path*) printf '%s\n' "$(dirname "$0")/../lib" ;;
  *get_device_capability*) [ -z "${NO_GPU-}" ] || { echo "no GPU" >&2; exit 1; }; echo 90-real ;;
  *liboctavo_cuda.so*) echo /wheel/liboctavo_cuda.so ;;
  *"import pytest"*) [ -z "${NO_PYTEST-}" ] || { echo "ModuleNotFoundError: No module named 'pytest'" >&2; exit 1; } ;;
  "cmake -S"*) mkdir -p build/gpu/cpp/tests/cpp
    for test in dequantize gemm linear outlier quantize; do cp "$0" build/gpu/cpp/tests/cpp/test_$test; done ;;
  test_*) [ "$OCTAVO_TEST_DEVICE $OCTAVO_CUDA_LIBRARY" = "cuda /wheel/liboctavo_cuda.so" ] || exit 3 ;;
  *"pip install --no-build-isolation"*) [ "$OCTAVO_CUDA $OCTAVO_CUDA_ARCHITECTURES" = "1 90-real" ] || exit 3 ;;
esac
if [ -n "${FAIL-}" ] && [[ "$name $*" == *$FAIL* ]]; then echo "it broke"; exit 7; fi
if [ -n "${HANG-}" ] && [[ "$name $*" == *$HANG* ]]; then exec sleep 60; fi
exit 0
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

    def run(**environment: str) -> tuple[int, str, list[str]]:
        calls = tmp_path / "calls.txt"
        calls.write_text("")
        clean = {name: value for name, value in os.environ.items() if not name.startswith("OCTAVO_")}
        clean.pop("PYTHON", None)
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        result = subprocess.run(
            ["bash", "bench/gpu.sh", "out"], cwd=tmp_path, capture_output=True, text=True, check=False,
            timeout=120, env={**clean, "PATH": path, "CALLS": str(calls), **environment},
        )  # fmt: skip
        assert not re.search(r"gpu\.sh: line \d+", result.stderr), result.stderr
        return result.returncode, result.stdout + result.stderr, calls.read_text().splitlines()

    return run


Script = Callable[..., tuple[int, str, list[str]]]
TESTS = [f"test-cpp-{name}" for name in ("dequantize", "gemm", "linear", "outlier", "quantize")]
TOOLS = ["memcheck", "racecheck", "initcheck", "synccheck"]
BENCHMARK = "-m octavo_bench bench --device cuda"
STEPS = {"build-tests", "build-wheel", "import", *TESTS, "test-python", *TOOLS, "benchmark"}


def summary(output: str) -> dict[str, str]:
    """What the last lines say of each step."""
    lines = re.split(r"^\d+ s$", output.split("=== summary\n")[1], maxsplit=1, flags=re.MULTILINE)[0].splitlines()
    return dict(line.split(None, 1) for line in lines)


def test_every_step_runs_and_the_summary_says_so(script: Script) -> None:
    status, output, calls = script()
    assert set(summary(output)) == STEPS
    assert all(what.startswith("ok, ") for what in summary(output).values()), output
    assert status == 0
    assert sum(call.startswith("test_") for call in calls) == len(TESTS)
    sanitized = [call for call in calls if call.startswith("compute-sanitizer")]
    assert len({call.split()[2] for call in sanitized}) == len(TOOLS)
    assert all(re.search(r"--error-exitcode 9 build/gpu/cpp/tests/cpp/test_\w+ \w+$", call) for call in sanitized)
    benchmark = next(call for call in calls if BENCHMARK in call)
    assert re.search(r"--json \S+/out/nvidia-h200-\d{4}-\d\d-\d\d\.json --limit 260$", benchmark)  # of the step's 300
    _, _, calls = script(OCTAVO_GPU_SECONDS="200")
    assert 0 < int(next(call for call in calls if BENCHMARK in call).split()[-1]) <= 160


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
     (BENCHMARK, "benchmark")],
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
    assert summary(output) == {"setup": "failed: python3 has no torch that sees a GPU"}
    assert status == 2
    assert not any("pip" in call for call in calls)


def test_wheels_are_installed_where_there_are_some(script: Script, tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "pytest-9.0-py3-none-any.whl").touch()
    _, output, calls = script()
    assert summary(output)["wheels"].startswith("ok, ")
    assert any(re.search(r"pip install --no-index --no-deps wheels/pytest-9\.0", call) for call in calls)
