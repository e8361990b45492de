"""bench/gpu.py and bench/gpu.sh as far as a machine without a GPU can run them.

So that little can go wrong on one that has one: the plan, the checks and the table, on the CPU; the script, with
stand-ins for the programs that it calls.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from octavo_bench.layers import contest
from octavo_bench.turns import Evict

import gpu  # isort: skip

FOUND = {"octavo int8", "octavo int8 path", "octavo weight-only", "torch float16"}


def measured(*words: str, seconds: float = 1e9) -> list[tuple[gpu.Kind, list[contest.Case]]]:
    small = [
        "--no-llama",
        "--no-variants",
        "--widths",
        "64",
        "--rows",
        "1",
        "5",
        "--outliers",
        "0",
        "3",
        "--calls",
        "2",
    ]
    args = gpu.arguments([*small, *words])
    groups = gpu.plan(args)
    for kind, cases in groups:
        gpu.measure_group(kind, cases, args.calls, Evict(64), time.perf_counter() + seconds, device="cpu")
    return groups


def test_the_plan_is_the_whole_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "k=4096 n=16384 m=256 outliers=6 tensor", "k=4098 n=16384 m=256 outliers=6",
        "k=4096 n=16384 m=256 outliers=6 zeropoint",
    ]  # fmt: skip
    assert len(lines) == len(set(lines)) == 3 + 21 * 9 * 3
    assert "k=12288 n=49152 m=4096 outliers=64" in lines


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--rows", "0"], "argument --rows: expected a whole number of at least 1"),
        (["--calls", "1"], "argument --calls: expected a whole number of at least 2"),
        (["--widths", "--no-llama"], "expected shapes"),
        (["--widths", "32"], "no more --outliers than the least k"),
    ],
)
def test_arguments_that_make_no_sense(words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.arguments(words)
    assert complaint in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the message for machines without has no place")
def test_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_contenders_are_checked_and_timed() -> None:
    groups = measured()
    cases = [case for _, own in groups for case in own]
    assert all(set(case.times) == FOUND and not case.left_out for case in cases), cases[0].left_out
    assert all(0 < error < 0.05 for case in cases for error in case.error.values())
    assert gpu.status(cases) == 0
    table = gpu.table(groups, {"bytes_per_second": 1e12, "int8_operations_per_second": 1e15})
    assert [row[:3] for row in table.rows[:3]] == [["64 x 256", 1, 0], ["64 x 256", 1, 3], ["64 x 256", 5, 0]]
    assert "octavo is faster than torch float16 in " in table.note


@pytest.mark.parametrize("kind", [kind for kind, _ in gpu.VARIANTS])
def test_other_kinds_are_right(kind: gpu.Kind) -> None:
    case = contest.Case(66, 32, 40, 3)
    gpu.measure_group(kind, [case], 2, Evict(64), time.perf_counter() + 1e9, device="cpu")
    assert set(case.times) == FOUND, case.left_out


def test_what_goes_wrong_costs_a_shape_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError("no memory")

    late = [case for _, own in measured(seconds=-1) for case in own]
    assert {reason for case in late for reason in case.left_out.values()} == {contest.LATE}
    assert gpu.status(late) == 0
    monkeypatch.setattr(contest, "problem", fail)
    broken = [case for _, own in measured() for case in own]
    assert all(case.left_out == {"all": "MemoryError: no memory"} for case in broken)
    assert gpu.status(broken) == 1


# ---------------------------------------------------------------------------------------------------------------
# bench/gpu.sh

# Stands in for every program that the script calls: notes the call, and does the little that the script relies on. What
# fails, hangs or is missing is named by the environment.
STAND_IN = r"""#!/usr/bin/env bash
name=$(basename "$0")
printf '%s\n' "$name $*" >>"$CALLS"
case "$name $*" in
  *"-m venv"*) mkdir -p "${@: -1}/bin" "${@: -1}/lib"; cp "$0" "${@: -1}/bin/python" ;;
  *'sep="\n"'*) printf '/outer\n/outer\n' ;;
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
    benchmark = next(call for call in calls if "bench/gpu.py" in call)
    assert re.search(r"--output \S+/out --seconds 260$", benchmark)  # of the 300 that the step may take
    _, _, calls = script(OCTAVO_GPU_SECONDS="200")
    assert 0 < int(next(call for call in calls if "bench/gpu.py" in call).split()[-1]) <= 160


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
     ("bench/gpu.py", "benchmark")],
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
    assert not any("bench/gpu.py" in call for call in calls)
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
