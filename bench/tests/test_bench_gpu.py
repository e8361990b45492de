"""bench/gpu.py and bench/gpu.sh as far as a machine without a GPU can run them.

So that little can go wrong on one that has one: the plan, the checks and the table, on the CPU with a clock that counts
calls; the script, with stand-ins for the programs that it calls.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the benchmarks compare with PyTorch, which is not installed")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import gpu
import octavo

NEVER = float("inf")


class FakeClock:
    """Its first call takes a millisecond, the second two, and so on."""

    device = "cpu"

    def __init__(self) -> None:
        self.calls = 0

    def milliseconds(self, call: Callable[[], object]) -> float:
        call()
        self.calls += 1
        return float(self.calls)


def measured(*words: str, deadline: float = NEVER) -> list[gpu.Case]:
    small = ["--no-llama", "--no-variants", "--widths", "64", "--rows", "1", "5", "--outliers", "0", "3"]
    args = gpu.arguments([*small, *words])
    cases = gpu.plan(args)
    gpu.measure_all(cases, args.calls, FakeClock(), deadline)
    return cases


# ---------------------------------------------------------------------------------------------------------------
# What is measured


def test_the_plan_is_the_whole_one() -> None:
    variants, cases = gpu.plan(gpu.arguments([]))[:3], gpu.plan(gpu.arguments([]))[3:]
    assert [(case.k, case.scheme, case.granularity, case.outliers) for case in variants] == [
        (4096, "absmax", "tensor", 6), (4098, "absmax", "vector", 6), (4096, "zeropoint", "vector", 6),
    ]  # fmt: skip
    assert all(not case.variant for case in cases)
    shapes = {(case.k, case.n) for case in cases}
    for width in (768, 1024, 2048, 2560, 4096, 5120, 12288):
        assert {(width, 4 * width), (4 * width, width)} <= shapes
    assert {(4096, 4096), (4096, 11008), (11008, 4096), (8192, 28672), (28672, 8192)} <= shapes
    assert {case.m for case in cases} == {1, 8, 16, 32, 64, 128, 256, 1024, 4096}
    assert {case.outliers for case in cases} == {0, 6, 64}
    assert len(cases) == len({(case.k, case.n, case.m, case.outliers) for case in cases}) == len(shapes) * 9 * 3


def test_the_plan_is_printed_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--plan", "--no-llama", "--widths", "8", "--rows", "2", "--outliers", "0", "6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "k=4096 n=16384 m=256 outliers=6 tensor", "k=4098 n=16384 m=256 outliers=6",
        "k=4096 n=16384 m=256 outliers=6 zeropoint",
    ]  # fmt: skip
    assert lines[3:] == [f"k={k} n={n} m=2 outliers={outliers}" for k, n in ((8, 32), (32, 8)) for outliers in (0, 6)]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--rows", "0"], "--rows: expected numbers of at least 1"),
        (["--outliers", "-1"], "--outliers: expected numbers of at least 0"),
        (["--calls", "1"], "--calls: expected at least 2, got 1"),
        (["--widths", "--no-llama"], "--widths: expected some"),
        (["--widths", "32"], "--outliers: expected at most 32, the least k, got 64"),
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


# ---------------------------------------------------------------------------------------------------------------
# Measuring


def test_contenders_are_checked_and_timed() -> None:
    cases = measured("--calls", "3")
    assert [(case.k, case.n, case.m, case.outliers) for case in cases] == [
        (k, n, m, outliers) for k, n in ((64, 256), (256, 64)) for m in (1, 5) for outliers in (0, 3)
    ]
    for case in cases:
        assert set(case.times) == {gpu.OCTAVO, gpu.INT8, gpu.WEIGHT_ONLY, gpu.PRODUCT, gpu.FLOAT16}
        assert set(case.error) == set(case.times) - {gpu.PRODUCT}
        assert all(0 < error < 0.02 for error in case.error.values())
        assert set(case.left_out) == {gpu.BITSANDBYTES}
        for lower, median, upper in case.times.values():
            assert 0 < lower < median < upper
    # Two rounds to warm up, then three: the third, fourth and fifth time that the first contender is called.
    assert cases[0].times[gpu.OCTAVO] == (13.5, 16.0, 18.5)
    assert gpu.status(cases) == 0


def test_variants_are_measured_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with a weight of its own, within the error that its scales explain."""
    given = []
    right = octavo.quantize_weight

    def quantize_weight(weight: Any, **words: Any) -> Any:
        given.append((tuple(weight.shape), words))
        return right(weight, **words)

    monkeypatch.setattr(octavo, "quantize_weight", quantize_weight)
    kinds: list[dict[str, Any]] = [{"granularity": "tensor"}, {}, {"scheme": "zeropoint"}]
    cases = [gpu.Case(64, 48, 70, 6, **kind) for kind in kinds]
    gpu.measure_all(cases, 2, FakeClock(), NEVER)
    usual = {"scheme": "absmax", "granularity": "vector"}
    assert given == [((48, 64), usual | kind) for kind in kinds]
    assert all(set(case.left_out) == {gpu.BITSANDBYTES} and len(case.times) == 5 for case in cases)
    assert [case.variant for case in cases] == ["tensor", "", "zeropoint"]


def test_the_problem_has_the_outlier_columns_asked_for() -> None:
    for outliers in (0, 6):
        x = gpu.problem(96, 20, outliers, torch.empty(1, dtype=torch.float16))
        assert (x.shape, x.dtype) == ((20, 96), torch.float16)
        assert len(octavo.find_outliers(x)) == outliers


@pytest.mark.parametrize("factor", [1.05, float("nan")])
def test_a_wrong_layer_is_not_timed_and_shows_in_the_status(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    right = octavo.linear
    monkeypatch.setattr(octavo, "linear", lambda *a, path="auto", **k: right(*a, path=path, **k) * factor)
    cases = measured()
    for case in cases:
        assert set(case.times) == {gpu.PRODUCT, gpu.FLOAT16}
        assert case.left_out[gpu.INT8].startswith("wrong: error ")
    assert gpu.status(cases) == 1


def test_a_wrong_integer_is_not_timed_and_shows_in_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    right = octavo.int8_matmul

    def wrong(a: Any, b: Any) -> Any:
        result = right(a, b)
        result[0, 3] += 1
        return result

    monkeypatch.setattr(octavo, "int8_matmul", wrong)
    cases = measured()
    assert {case.left_out[gpu.PRODUCT] for case in cases} == {
        "wrong: 1 integers of 1 rows",
        "wrong: 1 integers of 5 rows",
    }
    assert gpu.status(cases) == 1


def test_a_contender_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such kernel\nmore")

    monkeypatch.setattr(torch.nn.functional, "linear", fails)
    cases = measured()
    assert {case.left_out[gpu.FLOAT16] for case in cases} == {"RuntimeError: no such kernel"}
    assert all(gpu.OCTAVO in case.times for case in cases)
    assert gpu.status(cases) == 0  # a peer's failure is not ours


def test_what_is_late_is_left_out_and_no_failure() -> None:
    cases = measured(deadline=time.perf_counter() - 1)
    assert all(case.left_out == {"all": gpu.LATE} and not case.times for case in cases)
    assert gpu.status(cases) == 0


def test_an_error_costs_its_shape_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu.prepare

    def prepare(weight: Any, case: gpu.Case) -> Any:
        if weight.shape == (256, 64):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return right(weight, case)

    monkeypatch.setattr(gpu, "prepare", prepare)
    cases = measured()
    assert [bool(case.times) for case in cases] == [False] * 4 + [True] * 4
    assert {case.left_out["all"] for case in cases[:4]} == {"OutOfMemoryError: CUDA out of memory. Tried to allocate"}
    assert gpu.status(cases) == 1


# ---------------------------------------------------------------------------------------------------------------
# What is written


def test_the_table() -> None:
    first = gpu.Case(1000, 2000, 10, 6, times={gpu.OCTAVO: (0.009, 0.01, 0.012), gpu.FLOAT16: (0.02, 0.025, 0.026)})
    second = gpu.Case(1000, 2000, 20, 0, times={gpu.OCTAVO: (0.01, 0.02, 0.03), gpu.FLOAT16: (0.01, 0.01, 0.01)})
    second.left_out = {gpu.BITSANDBYTES: "ImportError: none"}
    lines = gpu.table([first, second], {"bytes_per_second": 4e12, "int8_operations_per_second": 1e13}).splitlines()
    assert lines[0] == "copy: 4.00 TB/s; int8 product of 8192: 10 TOPS"
    assert lines[1].split()[:4] == ["k", "n", "m", "outliers"]
    # 2 MB of codes, 20 kB of X and 40 kB of Y in 10 us are 206 GB/s; 40 million operations in it 4 TOPS.
    assert re.split(r"\s{2,}", lines[2].strip()) == [
        "1000", "2000", "10", "6", "10.0 (", "3.0)", "-", "-", "-", "25.0 (", "6.0)", "-", "2.50x", "5%", "40%",
    ]  # fmt: skip
    assert lines[3].split()[-3:] == ["0.50x", "3%", "40%"]
    assert lines[4] == (
        "octavo is faster than torch float16 in 1 of 2 cases; lowest ratio 0.50x "
        "(k=1000 n=2000 m=20, 0 outlier columns)"
    )
    assert lines[5] == "left out: bitsandbytes: ImportError: none"


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3-2026-01-02"),
        ("NVIDIA GeForce RTX 4090 (a/b)", "nvidia-geforce-rtx-4090-a-b-2026-01-02"),
    ],
)
def test_files_are_named_by_gpu_and_date(name: str, stem: str) -> None:
    assert gpu.name_of_results(name, "2026-01-02") == stem


def test_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(octavo, "info", lambda: {"backends": ["cpu", "cuda"]})
    monkeypatch.setattr(gpu, "machine", lambda: {"gpu": "A GPU"})
    monkeypatch.setattr(gpu, "Clock", FakeClock)
    monkeypatch.setattr(gpu, "bandwidth", lambda clock: 1e12)
    monkeypatch.setattr(gpu, "int8_peak", lambda clock: 1e13)
    words = ["--no-llama", "--no-variants", "--widths", "64", "--rows", "1", "--outliers", "0", "--seconds", "600"]
    saved = []
    once = gpu.write
    monkeypatch.setattr(gpu, "write", lambda path, fill: (once(path, fill), saved.append(path.read_text())))
    before = time.strftime("%Y-%m-%d")
    assert gpu.main([*words, "--output", str(tmp_path)]) == 0
    dates = {before, time.strftime("%Y-%m-%d")}  # two, where it ran into another day
    (stem,) = {path.stem for path in tmp_path.iterdir()}
    assert stem in {f"a-gpu-{date}" for date in dates}
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{stem}.json", f"{stem}.txt"]
    report = json.loads((tmp_path / f"{stem}.json").read_text())
    assert report["machine"] == {"gpu": "A GPU"}
    assert report["command"].startswith("bench/gpu.py --no-llama")
    assert [len(case["times"]) for case in report["cases"]] == [5, 5]
    # What was measured first is kept, should the rest take too long.
    assert [len(case["times"]) for case in json.loads(saved[0])["cases"]] == [5, 0]
    assert (tmp_path / f"{stem}.txt").read_text().strip() in capsys.readouterr().out


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
