"""octavo bench, as a command: which shapes, what is compared, and that nothing wrong is timed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="octavo bench compares with PyTorch, which is not installed")

import octavo
from octavo import checkpoint, cli
from octavo.torch import Int8Linear
from octavo_bench import bench
from octavo_bench.bench.report import Report
from octavo_bench.bench.shapes import model_shapes
from octavo_bench.measuring import contest, turns

GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 3, "vocab_size": 50}


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = octavo.get_num_threads(), torch.get_num_threads()
    yield
    octavo.set_num_threads(before[0])
    torch.set_num_threads(before[1])


def run(*arguments: object) -> int:
    return cli.main(["bench", *(str(argument) for argument in arguments)])


def config_of(folder: Path, **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps({**GPT2, **fields}))
    return path


def test_what_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--shapes 64,48 32,96 --rows 1 5 --outliers 3 --dtypes float16 float32 --threads 1 --seconds 0 --json"
    assert run(*words.split()) == 0
    captured = capsys.readouterr()
    assert "k=64 n=48: " in captured.err
    assert "%|" in captured.err
    report = json.loads(captured.out)
    assert [(case["k"], case["n"], case["m"]) for case in report["cases"]] == [
        (64, 48, 1), (64, 48, 5), (32, 96, 1), (32, 96, 5)
    ]  # fmt: skip
    for case in report["cases"]:
        assert case["outliers"] == 3
        assert {"octavo int8", "torch float16", "torch float32"} <= set(case["times"]) | set(case["left_out"])
        assert "torch bfloat16" not in case["times"]
        own = case["times"]["octavo int8"]
        assert 0 < own["lower"] <= own["median"] <= own["upper"]
        for name, factor in case["ratios"].items():
            assert factor == pytest.approx(case["times"][name]["median"] / own["median"])
        assert 0 < case["error"]["torch float32"] < case["error"]["torch float16"] < case["error"]["octavo int8"] < 0.02
    assert report["machine"]["threads"] == 1
    assert report["machine"]["packages"]["octavo"] == octavo.__version__
    assert report["totals"] == []


def test_the_layer_is_the_one_that_is_used() -> None:
    """Int8Linear with its defaults, in the first dtype; others are held to what one rounding explains."""
    layers = bench.layers(["float16", "bfloat16"])
    assert list(layers)[:3] == ["octavo int8", "torch float16", "torch bfloat16"]
    given = contest.problem(64, 48, 5, 3)
    layer = layers["octavo int8"].prepare(given.weight)
    assert type(layer) is Int8Linear
    assert (layer.threshold, layer.outliers, layer.path) == (6.0, "columns", "auto")
    assert layers["octavo int8"].dtype is torch.float16
    assert torch.equal(layer.codes, octavo.quantize_weight(given.weight).codes)
    for name, own in layers.items():
        if name.startswith("torch"):
            assert contest.check(own, own.prepare(given.weight), given)[1] == ""
            assert contest.check(own, lambda x, own=own: own.prepare(given.weight)(x) * 1.05, given)[1]


def test_a_wrong_layer_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = contest.octavo_layer

    def wrong(dtype: Any) -> Any:
        return lambda weight: lambda x: right(dtype)(weight)(x) * 1.05

    monkeypatch.setattr(contest, "octavo_layer", wrong)
    assert run("--shapes", "64,48", "--rows", "2", "--seconds", "0", "--threads", "1", "--quiet") == 1
    captured = capsys.readouterr()
    (line,) = (line for line in captured.err.splitlines() if line.startswith("octavo bench: "))
    assert line.startswith("octavo bench: k=64 n=48 m=2: octavo int8: wrong: error 0.0")
    (row,) = (line for line in captured.out.splitlines() if line.startswith("64 x 48"))
    assert "left out" in row
    assert "x  " not in row, "a ratio to a time that was not taken"


def test_the_table_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config_of(tmp_path)
    assert run(tmp_path, "--rows", "1", "3", "--seconds", "0", "--threads", "1", "--quiet") == 0
    captured = capsys.readouterr()
    assert "%|" not in captured.err
    rows = [line.split() for line in captured.out.splitlines() if " x " in line and "[" in line]
    assert [(row[0], row[2], row[3], row[4]) for row in rows] == [
        (k, n, "3", m) for k, n in (("16", "48"), ("16", "16"), ("16", "64"), ("64", "16")) for m in ("1", "3")
    ]
    totals = captured.out[captured.out.index("medians of all linear layers") :]
    assert [line.split()[:2] for line in totals.splitlines() if line[:1] in "13"] == [["1", "12"], ["3", "12"]]


def test_totals_count_every_layer() -> None:
    def case(k: int, n: int, own: float, peer: float | None) -> contest.Case:
        times = {"octavo int8": own, **({} if peer is None else {"torch bfloat16": peer})}
        return contest.Case(k, n, 4, 0, times={name: turns.Spread(t, t, t, 3) for name, t in times.items()})

    settings = bench.Settings({(8, 8): 3, (8, 16): 2}, Path("model"), rows=(4,))
    names = ["octavo int8", "torch bfloat16"]
    (total,) = Report({}, settings, names, [case(8, 8, 1.0, 2.0), case(8, 16, 10.0, 5.0)]).totals()
    assert total == {"m": 4, "layers": 5, "milliseconds": {"octavo int8": 23.0, "torch bfloat16": 16.0}}
    (total,) = Report({}, settings, names, [case(8, 8, 1.0, 2.0), case(8, 16, 10.0, None)]).totals()
    assert total["milliseconds"] == {"octavo int8": 23.0}


def test_shapes_of_a_config(tmp_path: Path) -> None:
    path = config_of(tmp_path)
    expected = {(16, 48): 3, (16, 16): 3, (16, 64): 3, (64, 16): 3}  # Conv1D: [in, out] in the file
    assert model_shapes(path) == model_shapes(tmp_path) == expected


def test_shapes_of_an_int8_checkpoint_are_those_that_are_int8(tmp_path: Path) -> None:
    from tiny_models import tiny_opt, write_language_model

    write_language_model(tmp_path / "m", tiny_opt(layers=2, width=16))
    checkpoint.quantize(tmp_path / "m", tmp_path / "int8", include=["*.fc1", "*.0.fc2"], progress=False)
    assert model_shapes(tmp_path / "m") == {(16, 16): 8, (16, 64): 2, (64, 16): 2}
    expected = {(16, 64): 2, (64, 16): 1}
    assert model_shapes(tmp_path / "int8") == model_shapes(tmp_path / "int8" / "model.safetensors") == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "config.json: expected a model's config.json, got no such file"),
        (["bad.json"], "bad.json: expected JSON"),
        (["16bit.safetensors"], "16bit.safetensors: "),
        (["unknown"], "config: expected a model_type of "),
    ],
)
def test_failures_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "bad.json").write_text("{")
    save_file({"fc.weight": torch.zeros(4, 4)}, tmp_path / "16bit.safetensors")
    config_of(tmp_path / "unknown", model_type="no such model")
    assert run(*arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("octavo bench: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the message for machines without has no place")
def test_no_gpu_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--device", "cuda", "--shapes", "8,8") == 1
    error = capsys.readouterr().err
    assert error.startswith("octavo bench: --device: expected one that is there, got cuda")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--shapes", "8"],
        ["--shapes", "8,0"],
        ["--rows", "0"],
        ["--outliers", "-1"],
        ["--dtypes", "int4"],
        ["--seconds", "nan"],
        ["--device", "tpu"],
        ["--threads", "0"],
    ],
)
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run(*arguments)
    assert exit_info.value.code == 2
    assert "octavo bench: error: " in capsys.readouterr().err


def test_shapes_are_given_one_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("model", "--shapes", "8,8") == run("--hidden", "8", "--shapes", "8,8") == 2
    assert capsys.readouterr().err == "octavo bench: MODEL, --hidden and --shapes exclude each other\n" * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: nothing to time with CUDA events")
def test_the_gpu_is_timed_from_idle_to_done() -> None:
    x = torch.ones(4096, 4096, device="cuda")
    short, long = turns.on_the_gpu(lambda: None), turns.on_the_gpu(lambda: [x @ x for _ in range(20)])
    assert 0 <= short < long
