"""The benchmark scripts in bench/: what they compute from measurements, and one tiny run of each."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the benchmarks compare with PyTorch, which is not installed")
pytest.importorskip("matplotlib", reason="the benchmarks plot with matplotlib, which is not installed")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import contenders
import linear
import measure
import octavo
import targets
from octavo_bench.measuring import machine as measuring


@pytest.fixture(autouse=True)
def _threads_as_before() -> Any:
    before = octavo.get_num_threads(), torch.get_num_threads()
    yield
    octavo.set_num_threads(before[0])
    torch.set_num_threads(before[1])


def timing(median: float) -> measure.Spread:
    return measure.Spread(median, median, median, 3)


# ---------------------------------------------------------------------------------------------------------------
# Contenders


def test_the_problem_has_the_outlier_columns_asked_for() -> None:
    for outliers in (0, 2):
        given = contenders.problem(64, 32, 5, outliers)
        assert given.x.shape == (5, 64)
        assert given.weight.shape == (32, 64)
        assert len(octavo.find_outliers(given.x)) == outliers
        assert torch.equal(given.x, given.x.bfloat16().float())
        np.testing.assert_allclose(given.exact.numpy(), given.x.double().numpy() @ given.weight.double().numpy().T)


def test_rounding_predicts_the_error_of_a_plain_quantization() -> None:
    """The expected error is that of codes made here, with NumPy, and larger where outliers share the scale."""
    given = contenders.problem(512, 256, 32, 6)
    x, w = given.x.double().numpy(), given.weight.double().numpy()
    x_step, w_step = (np.abs(a).max(1, keepdims=True) / 127 for a in (x, w))
    y = (np.rint(x / x_step) * x_step) @ (np.rint(w / w_step) * w_step).T
    error = given.error(torch.from_numpy(y))
    assert given.rounding(0) == pytest.approx(error, rel=0.1)
    assert given.rounding(contenders.THRESHOLD) < 0.5 * given.rounding(0)


@pytest.mark.parametrize("outliers", [0, 3])
def test_what_octavo_and_torch_compute_is_explained_by_their_arithmetic(outliers: int) -> None:
    every = contenders.contenders()
    given = contenders.problem(96, 80, 7, outliers)
    for name in (contenders.OCTAVO, contenders.BFLOAT16, contenders.FLOAT32):
        error, why = contenders.check(every[name], every[name].prepare(given.weight), given)
        assert why == "", name
        assert 0 < error < 0.02


def test_a_wrong_result_is_not_timed() -> None:
    every = contenders.contenders()
    given = contenders.problem(96, 80, 7, 3)
    octavo_linear = every[contenders.OCTAVO]
    no_decomposition = octavo.quantize_weight(given.weight.bfloat16())
    wrong: list[contenders.Layer] = [
        lambda x: octavo.linear(x, no_decomposition, outliers="none"),
        lambda x: octavo_linear.prepare(given.weight)(x) * 1.05,
        lambda x: octavo_linear.prepare(given.weight)(x) * float("nan"),
        lambda x: octavo_linear.prepare(given.weight)(x).float(),
    ]
    for layer in wrong:
        _, why = contenders.check(octavo_linear, layer, given)
        assert why.startswith("wrong: ")


def test_a_contender_that_cannot_run_says_why() -> None:
    def absent(weight: Any) -> contenders.Layer:
        raise ImportError("No module named 'peer'\nmore")

    def fails(x: Any) -> Any:
        raise RuntimeError("no such kernel")

    peer = contenders.Contender(absent, torch.float32, lambda given: 1.0)
    given = contenders.problem(8, 8, 2, 0)
    assert contenders.prepare({"peer": peer}, given.weight) == ({}, {"peer": "ImportError: No module named 'peer'"})
    assert contenders.check(peer, fails, given)[1] == "RuntimeError: no such kernel"


def test_int_mm_is_left_out_where_its_integers_saturate(monkeypatch: pytest.MonkeyPatch) -> None:
    def exact(a: Any, b: Any) -> Any:
        return (a.double() @ b.double()).to(torch.int32)

    def saturating(a: Any, b: Any) -> Any:
        """Pairs of products of (a + 128) b are added in 16 bits, as `vpmaddubsw` does."""
        products = (a.int() + 128)[:, :, None] * b.int()[None]
        pairs = (products[:, ::2] + products[:, 1::2]).clamp(-(2**15), 2**15 - 1)
        return (pairs.sum(1) - 128 * b.int().sum(0)).to(torch.int32)

    every = contenders.contenders()
    contender = every[contenders.INT_MM]
    given = contenders.problem(32, 24, 5, 0)
    layer = contender.prepare(given.weight)
    monkeypatch.setattr(torch, "_int_mm", exact)
    assert contenders.check(contender, layer, given)[1] == ""
    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert "saturate" in contenders.check(contender, layer, given)[1]
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: exact(a, b) + (b == 127).all())
    assert "wrong integers" in contenders.check(contender, layer, given)[1]


# ---------------------------------------------------------------------------------------------------------------
# Measuring


def test_contenders_take_turns() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in ("a", "b")}
    samples = measure.take_turns(calls, 0, lambda name: order.append(f"before {name}"), least=4)
    assert order == ["before a", "a", "before b", "b"] * 4
    assert {name: len(values) for name, values in samples.items()} == {"a": 4, "b": 4}
    assert all(value >= 0 for values in samples.values() for value in values)


def test_the_spread_of_times() -> None:
    found = measure.spreads({"a": [5.0, 1.0, 2.0, 4.0, 3.0], "b": [1.0, 2.0]})
    assert found == {"a": measure.Spread(3.0, 2.0, 4.0, 5), "b": measure.Spread(1.5, 1.25, 1.75, 2)}


def test_the_facts_name_the_variables_that_change_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    monkeypatch.delenv("OCTAVO_CPU_ISA", raising=False)
    facts = measure.machine(2)
    assert facts["environment"]["ONEDNN_MAX_CPU_ISA"] == "AVX512_CORE_BF16"
    assert facts["environment"]["OCTAVO_CPU_ISA"] is None
    assert facts["threads"] == 2
    assert facts["cores"] == measuring.available_cores()
    assert facts["packages"]["octavo"] == octavo.__version__
    json.dumps(facts)


@pytest.mark.skipif(not Path("/proc/stat").is_file(), reason="no /proc/stat: what others use is not known here")
def test_what_other_programs_use_does_not_count_this_one() -> None:
    busy = "import time\nend = time.monotonic() + 30\nwhile time.monotonic() < end: pass"
    others = measure.Others()
    began = time.process_time()
    while time.process_time() - began < 0.5:
        pass
    alone = others.cores()
    with subprocess.Popen([sys.executable, "-c", busy]) as process:
        others = measure.Others()
        time.sleep(1)
        disturbed = others.cores()  # the other program has not ended, so it is not counted as our own
        process.kill()
    assert alone is not None
    assert disturbed is not None
    cores = os.cpu_count()  # /proc/stat counts all of them, also those that this process may not run on
    assert cores is not None
    assert 0 <= alone < cores
    assert 0.2 < disturbed <= cores + 0.1


# ---------------------------------------------------------------------------------------------------------------
# bench/linear.py


def test_shapes_are_each_width_and_its_feed_forward() -> None:
    args = linear.arguments(["--widths", "8", "32", "--rows", "1", "2"])
    pairs = [(8, 8), (8, 32), (32, 8), (32, 32), (32, 128), (128, 32)]
    assert linear.shapes(args) == [(k, n, m) for k, n in pairs for m in (1, 2)]
    assert linear.shapes(linear.arguments(["--shapes", "3,4,5", "6,7,8"])) == [(3, 4, 5), (6, 7, 8)]
    for word in ("3,4", "3,4,0", "a,b,c"):
        with pytest.raises(SystemExit):
            linear.arguments(["--shapes", word])


def test_the_table_shows_ratios_and_reasons() -> None:
    first = linear.Case(8, 16, 1, 0, times={contenders.OCTAVO: timing(2.0), contenders.BFLOAT16: timing(5.0)})
    second = linear.Case(8, 16, 4, 6, times={contenders.OCTAVO: timing(2.0), contenders.BFLOAT16: timing(3.0)})
    first.left_out["torchao int8"] = "ImportError: No module named 'torchao'"
    names = [contenders.OCTAVO, contenders.BFLOAT16, "torchao int8"]
    assert linear.ratio(first, contenders.BFLOAT16) == 2.5
    assert linear.ratio(first, "torchao int8") is None
    text = linear.table([first, second], names)
    assert "5.000 (2.50x)" in text
    assert "lowest ratio to torch bfloat16: 1.50x (k=8 n=16 m=4, 6 outlier columns)" in text
    assert text.endswith("left out: torchao int8: ImportError: No module named 'torchao'")


@pytest.mark.parametrize("cold", [[], ["--cold", "1"]])
def test_linear_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str], cold: list[str]) -> None:
    words = ["--shapes", "32,48,1", "32,48,5", "--seconds", "0", "--outliers", "0", "2", "--output", str(tmp_path)]
    assert linear.main([*words, *cold]) == 0
    report = json.loads((tmp_path / "linear.json").read_text())
    assert [(c["k"], c["n"], c["m"], c["outliers"]) for c in report["cases"]] == [
        (32, 48, m, outliers) for m in (1, 5) for outliers in (0, 2)
    ]
    names = set(contenders.contenders())
    for case in report["cases"]:
        assert set(case["times"]) | set(case["left_out"]) == names
        assert {contenders.OCTAVO, contenders.BFLOAT16, contenders.FLOAT32} <= set(case["times"])
        assert all(found["calls"] >= 3 and found["median"] > 0 for found in case["times"].values())
    assert report["machine"]["threads"] == 1
    assert report["machine"]["cold_mebibytes"] == (1 if cold else None)
    assert (tmp_path / "linear.txt").read_text().strip() in capsys.readouterr().out
    assert (tmp_path / "linear.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"linear.json", "linear.txt", "linear.png"}


# ---------------------------------------------------------------------------------------------------------------
# bench/targets.py

SMALL = targets.Shape(32, 48, 16, 2, 2)


def measured(shape: targets.Shape, **medians: float) -> targets.Measured:
    names = {"own": contenders.OCTAVO, "bf16": contenders.BFLOAT16, "f32": contenders.FLOAT32}
    times = {}
    for name, median in medians.items():
        who, outliers = name.split("_")
        times[f"{names[who]}, {outliers}"] = timing(median)
    return targets.Measured(shape, times, {}, {"1 thread": timing(10), "2 threads": timing(5)})


def test_targets_pass_and_miss_at_their_limits() -> None:
    found = measured(SMALL, own_6=2, own_0=1, bf16_6=4, f32_6=3.9, bf16_0=1, f32_0=0.9)
    lines = {line.what: line for line in targets.shape_lines(found)}
    assert (lines["over torch bfloat16"].measured, lines["over torch bfloat16"].verdict) == (2, "pass")
    assert lines["over torch float32"].verdict == "MISS"
    assert lines["over torch bfloat16, no outlier columns"].verdict == "pass"
    assert lines["over torch float32, no outlier columns"].verdict == "MISS"
    assert lines["over bitsandbytes, threshold 6"].verdict == "not measured"
    decomposition = lines["time with 6 outlier columns over none"]
    assert (decomposition.measured, decomposition.verdict) == (2, "MISS")
    assert "two threads over one" not in lines


def test_two_threads_and_no_decomposition_target_by_rows() -> None:
    large = targets.shape_lines(measured(targets.Shape(32, 48, 512, 1, 1), own_6=1))
    assert [(line.measured, line.verdict) for line in large if line.what == "two threads over one"] == [(2, "pass")]
    single = targets.shape_lines(measured(targets.Shape(32, 48, 1, 1, 1), own_6=1))
    assert not any("none" in line.what or "threads" in line.what for line in single)


def test_bandwidth_is_read_from_the_median() -> None:
    name = "linear/k:{}/n:{}/m:{}/outliers:{}/real_time_".format(*targets.LARGEST, targets.OUTLIERS)
    values = {"mean": 95.0, "median": 88.0}
    report = {"benchmarks": [{"name": name + key, "%bandwidth": v, "GB/s": v / 4} for key, v in values.items()]}
    line = targets.bandwidth_line(report)
    assert (line.measured, line.verdict, line.note) == (88.0, "pass", "22.0 GB/s")
    line = targets.bandwidth_line({"absent": "why"})
    assert (line.verdict, line.note) == ("not measured", "why")


def test_the_product_alone_is_read_from_the_median() -> None:
    name = "int8_matmul/k:{}/n:{}/m:{}/real_time_".format(*targets.GEMM)
    values = {"mean": 95.0, "median": 91.0}
    report = {"benchmarks": [{"name": name + key, "%vpdpbusd_zmm": v, "GOPS": 8 * v} for key, v in values.items()]}
    line = targets.gemm_line(report)
    assert (line.measured, line.verdict, line.note) == (91.0, "pass", "728 GOPS")
    assert targets.gemm_line({"absent": "why"}).verdict == "not measured"


def test_the_names_asked_for_are_those_of_the_cpp_benchmarks() -> None:
    """gemm_line and bandwidth_line find nothing where a benchmark is renamed; here is what they depend on."""
    gemm = (ROOT / "bench/cpp/bench_gemm.cpp").read_text()
    assert re.search(r'void int8_matmul\(.*BENCHMARK\(int8_matmul\)\s*->ArgNames\(\{"k", "n", "m"\}\)', gemm, re.DOTALL)
    linear = (ROOT / "bench/cpp/bench_linear.cpp").read_text()
    names = r'->ArgNames\(\{"k", "n", "m", "outliers"\}\)'
    assert re.search(r"void linear\(.*BENCHMARK\(linear\)\s*" + names, linear, re.DOTALL)
    k, n, m = targets.LARGEST
    assert re.search(rf"\{{\{{{k}\}}, \{{{n}\}}, \{{{m}, .*\}}, \{{0, {targets.OUTLIERS}\}}\}}", linear)
    shared = (ROOT / "bench/cpp/machine.cpp").read_text()
    assert 'counters["GOPS"]' in shared
    assert '"%" + peak.name' in shared


def test_targets_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--seconds", "0", "--binaries", str(tmp_path / "none"), "--output", str(tmp_path)]
    assert targets.main(words, [SMALL, targets.Shape(32, 48, 512, 1, 1)]) == 0
    report = json.loads((tmp_path / "targets.json").read_text())
    verdicts = [line["verdict"] for line in report["lines"]]
    assert set(verdicts) <= {"pass", "MISS", "not measured"}
    assert all(line["note"] for line in report["lines"] if line["measured"] is None)
    assert [line["verdict"] for line in report["lines"] if line["what"].startswith("product alone")] == ["not measured"]
    text = (tmp_path / "targets.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert text.count("\n| 32, 48, ") == len(verdicts) - 2


def test_the_scripts_run_from_the_command_line() -> None:
    for script in ("linear.py", "targets.py"):
        command = [sys.executable, str(ROOT / "bench" / script), "--help"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert "--seconds" in result.stdout
