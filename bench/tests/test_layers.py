"""Layers in turns: what is wrong is not timed; the tables say what was measured."""

from __future__ import annotations

import argparse
import json
import shutil
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FixedFacts
from octavo import cli
from octavo_bench import commands, turns
from octavo_bench.layers import bench, contenders, contest, overhead
from octavo_bench.layers.contest import OCTAVO, Case, Contender
from octavo_bench.progress import Progress
from octavo_bench.turns import Spread, spread, take_turns
from tiny_models import tiny_model, tiny_opt, write_language_model
from torch import Tensor


def test_turns_are_taken_one_call_at_a_time() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    found = take_turns(calls, 0, before=lambda name: order.append(f"before {name}"), least=20)
    rounds = [order[i : i + 4] for i in range(0, len(order), 4)]
    first, second = ["before a", "a"], ["before b", "b"]
    assert len(rounds) == 20
    assert all(each in (first + second, second + first) for each in rounds)
    assert 5 < rounds.count(first + second) < 15  # no call always comes behind the same one
    assert [len(values) for values in found.values()] == [20, 20]
    assert len(take_turns(calls, 60, least=1, most=3)["a"]) == 3
    order.clear()
    take_turns(calls, 0, least=20, in_order=True)
    assert order == ["a", "b"] * 20
    assert spread([1, 2, 3, 4, 5]) == Spread(3, 2, 4)


def rounded(x: Tensor) -> Tensor:
    """Each row to 8 bits and back."""
    scale = x.abs().amax(1, keepdim=True) / 127
    return (x / scale).round() * scale


@pytest.mark.parametrize("outliers", [0, 3])
def test_the_error_is_what_rounding_explains(outliers: int) -> None:
    """Of a straightforward int8 product, and of one that keeps outlier columns: within a few percent."""
    given = contest.problem(256, 64, 40, outliers)
    kept = (given.x.abs() >= 6).any(0)
    assert int(kept.sum()) == outliers
    weight = rounded(given.weight)
    y = rounded(given.x.masked_fill(kept, 0)) @ weight.T + given.x[:, kept] @ weight[:, kept].T
    assert given.error(y) == pytest.approx(given.rounding(6.0), rel=0.1)
    assert given.error(given.x @ given.weight.T) < 1e-6
    assert len(given.rows) == contest.CHECKED


def test_what_is_wrong_or_broken_is_not_timed() -> None:
    def broken(weight: Tensor) -> Any:
        raise ImportError("no such package")

    def off(weight: Tensor) -> Any:
        return lambda x: 1.01 * (x @ weight.T)

    tolerance = contenders.at_most(1e-3)
    chosen = {
        **contenders.of_octavo("float32"),
        **contenders.of_torch(["float32"]),
        "broken": Contender(broken, torch.float32, tolerance),
        "off": Contender(off, torch.float32, tolerance),
        "half": Contender(lambda weight: lambda x: (x @ weight.T).half(), torch.float32, tolerance),
        "late": Contender(off, torch.float32, tolerance, most=1),
    }
    cases, time_calls = [Case(64, 32, 2, 0), Case(64, 32, 4, 3)], partial(take_turns, seconds=0)
    contest.measure(cases, chosen, time_calls)
    for case in cases:
        assert set(case.times) == {OCTAVO, "torch float32"}
        assert case.left_out["broken"] == "ImportError: no such package"
        assert case.left_out["off"].startswith("RuntimeError: wrong: error 0.01, its arithmetic explains 0.001")
        assert case.left_out["half"] == "RuntimeError: wrong: the result is torch.float16, expected torch.float32"
        assert "late" not in case.left_out
    contest.measure(late := [Case(8, 8, 1, 0)], chosen, time_calls, deadline=0.0)
    assert late[0].left_out == {"all": contest.LATE}


def run(*words: object) -> int:
    return cli.main(["bench", *map(str, words), "--quiet", "--threads", "1", "--seconds", "0"])


def test_octavo_bench_measures_a_model(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--rows", 1, 3, "--outliers", 0, 2, "--dtypes", "float32", "--json", tmp_path / "bench.json", "--peers")
    assert run(tiny / "model", *words) == 0
    assert "octavo int8" in capsys.readouterr().out
    content = json.loads((tmp_path / "bench.json").read_text())
    cases, totals = content["tables"]
    assert [row[:4] for row in cases["rows"][:4]] == [
        ["32 x 32", 8, 1, 0], ["32 x 32", 8, 1, 2], ["32 x 32", 8, 3, 0], ["32 x 32", 8, 3, 2]
    ]  # fmt: skip
    assert [row[:3] for row in totals["rows"]] == [["1", 0, 12], ["1", 2, 12], ["3", 0, 12], ["3", 2, 12]]
    assert {"cpu", "commit", "command", "packages", "instruction_set"} <= set(content["facts"])
    assert {contenders.INT_MM, contenders.TORCHAO} <= set(cases["columns"])


def test_recipes_are_compared_with_octavo_without_outliers(tmp_path: Path) -> None:
    words = (
        "--recipes",
        "--shapes",
        "128,16",
        "--rows",
        2,
        "--outliers",
        0,
        3,
        128,
        "--json",
        tmp_path / "recipes.json",
    )
    assert run(*words) == 0
    (cases,) = json.loads((tmp_path / "recipes.json").read_text())["tables"]
    names = [
        "paper",
        "paper, cap 0.01",
        "rotation",
        "best",
        "best, no cap",
        "torch bfloat16",
        "torch float32",
    ]
    assert list(cases["columns"])[7:] == names
    for row in cases["rows"][:-1]:
        assert all(ratio > 0 for ratio in row[4:]), cases["note"]


def test_what_a_call_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is over C++ is told where a compiler is there; without one the note says so, and the rest is measured."""
    monkeypatch.setattr(overhead, "CALLS", 20)
    monkeypatch.setattr(overhead, "CHAIN", 10)
    for compiler in ("c++", "missing"):
        monkeypatch.setenv("CXX", shutil.which(compiler) or compiler)
        assert run("--overhead", "--json", tmp_path / "calls.json") == 0
        table, *others = json.loads((tmp_path / "calls.json").read_text())["tables"]
        found = {row[0]: row[1:] for row in table["rows"]}
        assert ("C++, columns" in found) == (found["octavo.linear, torch, columns"][2] is not None)
        assert ("C++, columns" in found) != ("No call of C++" in table["note"])
        assert found["Int8Linear, none"][0] > found["Python's loop alone"][0] > 0
        jitted = [row[0] for other in others for row in other["rows"]]
        assert ("octavo.jax.linear, none" in jitted) == (find_spec("jax") is not None)
    assert "C++, columns" not in found


def test_a_wrong_layer_of_octavo_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(contenders, "within", lambda threshold, **how: lambda given: 0.0)
    assert run("--shapes", "64,48", "--rows", 2) == 1
    assert "octavo bench: k=64 n=48 m=2: octavo int8: RuntimeError: wrong: error 0.0" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("--shapes", "4"), ("--hidden", "0"), ("m", "--hidden", "8"), ("--outliers", "-1")])
def test_wrong_options(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*words)
    assert ended.value.code == 2
    assert "octavo bench: error: " in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the message for machines without has no place")
def test_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--device", "cuda") == 1
    assert "sees no GPU" in capsys.readouterr().err


def on_the_gpu(*words: str) -> Any:
    """The arguments of a run on a GPU."""
    parser = argparse.ArgumentParser()
    commands.bench(parser)
    return parser.parse_args(["--device", "cuda", "--seconds", "0", *words])


def measured(groups: list[bench.Group], *words: str, peak: dict[str, float] | None = None) -> Any:
    """Groups of a GPU, measured here."""
    args = on_the_gpu(*words)
    args.device = "cpu"
    return bench.run(args, groups, lambda name: None, peak or {}, FixedFacts(), Progress(show=False))


def test_the_plan_of_a_gpu() -> None:
    groups = bench.plan(on_the_gpu())
    assert [group.name for group in groups[:4]] == [
        "4096 x 16384 tensor", "4098 x 16384 unaligned", "4096 x 16384 zeropoint", "768 x 3072"
    ]  # fmt: skip
    cases = [(case.k, case.n, case.m, case.outliers) for group in groups[3:] for case in group.cases]
    assert len(cases) == len(set(cases)) == 21 * 9 * 3
    assert (12288, 49152, 4096, 64) in cases


def test_paths_and_other_options_are_checked_and_timed() -> None:
    """As on a GPU, on the CPU: every path of octavo, and each of the variants."""
    words = ("--shapes", "64,256", "--rows", "1", "5", "--outliers", "0", "3")
    others = [bench.Group(name, known, [Case(66, 32, 40, 3)]) for name, known in of_variants().items()]
    groups = [*others, *bench.plan(on_the_gpu(*words))]
    report = measured(groups, peak={"bytes_per_second": 1e12, "int8_operations_per_second": 1e15})
    for case in (case for group in groups for case in group.cases):
        assert {*contenders.PATHS.values(), "torch float16"} <= set(case.times), case.left_out
    assert not report.failure
    (table,) = report.tables
    assert [row[:4] for row in table.rows[3:6]] == [["64 x 256", 1, 1, 0], ["64 x 256", 1, 1, 3], ["64 x 256", 1, 5, 0]]
    assert 0 < table.rows[3][-2] < 100
    assert table.rows[3][-1] > 0


def test_graphs_are_what_is_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    replayed: list[int] = []

    def captured(call: turns.Call) -> turns.Call:
        if call().shape[0] == 5:
            raise RuntimeError("cannot be captured")
        return lambda: replayed.append(1)

    monkeypatch.setattr(turns, "captured", captured)
    groups = bench.plan(on_the_gpu("--shapes", "64,32", "--rows", "1", "5", "--outliers", "0"))
    measured(groups, "--graph")
    first, second = groups[0].cases
    assert len(replayed) == 3 * len(first.times)
    assert {*contenders.PATHS.values(), "torch float16"} <= set(first.times)
    assert not second.times
    assert second.left_out["torch float16"] == "RuntimeError: cannot be captured"
    assert run("--graph") == 1
    assert "--graph: expected --device cuda, got cpu" in capsys.readouterr().err


def of_variants() -> dict[str, dict[str, Contender]]:
    return {
        name: {**contenders.of_octavo("float16", list(contenders.PATHS), **options), **contenders.of_torch(["float16"])}
        for name, options, _ in bench.VARIANTS
    }


def test_what_goes_wrong_costs_a_shape_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError("no memory")

    groups = bench.plan(on_the_gpu("--shapes", "64,32", "--rows", "1"))
    assert not measured(groups, "--limit", "1e-9").failure
    assert {why for case in groups[0].cases for why in case.left_out.values()} == {contest.LATE}
    monkeypatch.setattr(contest, "problem", fail)
    groups = bench.plan(on_the_gpu("--shapes", "64,32", "--rows", "1"))
    assert measured(groups).failure == "k=64 n=32 m=1: all: MemoryError: no memory"


def test_shapes_of_a_model(tmp_path: Path) -> None:
    """Of a Conv1D, too; the output head is none of them."""
    tiny_model("GPT2LMHeadModel").save_pretrained(tmp_path / "gpt2")
    assert bench.model_shapes(tmp_path / "gpt2") == {(32, 96): 2, (32, 32): 2, (32, 128): 2, (128, 32): 2}
    write_language_model(tmp_path / "opt", tiny_opt(layers=1, width=16))
    assert bench.model_shapes(tmp_path / "opt" / "config.json") == {(16, 16): 4, (16, 64): 1, (64, 16): 1}
    with pytest.raises(ValueError, match=r"expected a config\.json"):
        bench.model_shapes(tmp_path)
