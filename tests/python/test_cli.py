"""octavo quantize and octavo inspect, as commands. What they do is tested in test_checkpoint*.py."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import octavo
import octavo.verify
import pytest
from octavo import checkpoint, cli
from octavo._text import format_size, parse_size
from octavo.checkpoint.files import header_bytes
from octavo.options import Options


def write_model(folder: Path) -> Path:
    """One linear layer and a head, in float32; written without PyTorch."""
    shapes = {"model.layers.0.fc.weight": (24, 16), "lm_head.weight": (50, 16)}
    folder.mkdir()
    rng = np.random.default_rng(0)
    data = b"".join(rng.standard_normal(shape, np.float32).tobytes() for shape in shapes.values())
    header = header_bytes([(name, "F32", shape) for name, shape in shapes.items()], {"format": "pt"})
    (folder / "model.safetensors").write_bytes(header + data)
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny", "vocab_size": 50}))
    return folder


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_quantize_then_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, output = write_model(tmp_path / "m"), tmp_path / "out"
    assert run("quantize", model, output, "--jobs", 2, "--memory", "1MB") == 0
    captured = capsys.readouterr()
    assert f"{output}: 1 linear layers in int8" in captured.out
    assert re.search("left as they are:\n  lm_head +skipped", captured.out)
    assert "quantize: 100%" in captured.err

    assert run("inspect", output, "--verify") == 0
    table = capsys.readouterr().out
    assert "model.layers.0.fc" in table
    assert "24 x 16" in table
    assert "all correct" in table

    assert run("inspect", output, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert [layer["name"] for layer in summary["layers"]] == ["model.layers.0.fc"]
    assert summary["verified"] is False


def test_options_reach_the_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {}

    def quantize(model: Path, output: Path, **options: Any) -> checkpoint.Report:
        given.update(options)
        return checkpoint.Report(str(output), 1, [], 2, 0, 100, 50, 0.5)

    monkeypatch.setattr(checkpoint, "quantize", quantize)
    columns = tmp_path / "columns.json"
    columns.write_text('{"a.fc": [3, 1], "a.gate": [2], "a.out": [1]}')
    words = "--recipe paper --scheme zeropoint --granularity row --threshold 4.5 --outliers static "
    words += (
        f"--include *.fc --include *.up --skip *.gate --outlier-columns {columns} --jobs 3 --memory 2GiB --quiet --json"
    )
    assert run("quantize", "m", "out", *words.split()) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == 1
    assert given == {
        "options": Options(scheme="zeropoint", granularity="row", threshold=4.5, outliers="static"),
        "include": ["*.fc", "*.up"],
        "skip": ["*.gate"],
        "layer_options": None,
        "measured": None,
        "outlier_columns": {"a.fc": [3, 1]},  # the others' are of layers that the patterns leave out
        "head": None,
        "format": "octavo",
        "jobs": 3,
        "memory": 2 * 2**30,
        "progress": False,
    }


def test_options_of_the_command_are_those_of_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe, and what is given in its place; every field has an option."""
    model = write_model(tmp_path / "m")
    words = ["--recipe", "best", "--rotation", "16", "--cap", "0.5", "--quiet"]
    assert run("quantize", model, tmp_path / "out", *words) == 0
    expected = replace(octavo.recipe("best"), rotation=16, cap=0.5)
    assert checkpoint.Checkpoint(tmp_path / "out", framework="numpy").options("model.layers.0.fc") == expected
    capsys.readouterr()
    assert run("inspect", tmp_path / "out") == 0
    assert "absmax, vector, rotation 16, outliers rows, relative 20.0, cap 0.5" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run("quantize", "--help")
    shown = capsys.readouterr().out
    assert all(f"--{field.name} " in shown for field in fields(Options))
    for wrong in ("--rotation 3", "--rotation 1.5", "--relative 0", "--cap 2", "--recipe worst"):
        with pytest.raises(SystemExit) as caught:
            run("quantize", model, "out", *wrong.split())
        assert caught.value.code == 2
        assert f"argument {wrong.split()[0]}: " in capsys.readouterr().err


def test_kept_columns_from_a_file(tmp_path: Path) -> None:
    columns = tmp_path / "columns.json"
    columns.write_text('{"model.layers.0.fc": [7, 2]}')
    assert run("quantize", write_model(tmp_path / "m"), tmp_path / "o", "--outlier-columns", columns, "--quiet") == 0
    loaded = checkpoint.load(tmp_path / "o", framework="numpy")
    assert loaded["model.layers.0.fc.weight"].outlier_columns.tolist() == [2, 7]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "nothing", "out"], "nothing: expected a checkpoint"),
        (["inspect", "nothing"], "nothing: expected a checkpoint"),
        (["quantize", "m", "full"], "full: expected a folder that is not there yet"),
        (["quantize", "m", "."], "output: expected the name of a folder to make, got '.'"),
        (["quantize", "m", ".."], "output: expected the name of a folder to make, got '..'"),
        (["quantize", "m", "out", "--include", "*.none"], "include: expected patterns of linear layers"),
        (["quantize", "m", "out", "--outlier-columns", "none.json"], "none.json"),
        (["quantize", "m", "out", "--outlier-columns", "list.json"], 'list.json: expected {"layer": [column, ...]'),
        (["quantize", "m", "out", "--outlier-columns", "bad.json"], "bad.json: expected JSON"),
    ],
)
def test_failures_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "m")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "list.json").write_text('{"fc": ["one"]}')
    (tmp_path / "bad.json").write_text("{")
    assert run(*arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"octavo {arguments[0]}: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["m"],
        ["m", "out", "--scheme", "int4"],
        ["m", "out", "--jobs", "0"],
        ["m", "out", "--memory", "lots"],
        ["m", "out", "--memory", "0"],
        ["m", "out", "--threshold", "-1"],
        ["m", "out", "--threshold", "nan"],
    ],
)
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run("quantize", *arguments)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("octavo quantize: error: ")
    assert error.endswith("(see octavo quantize --help)\n")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--format", "bitsandbytes", "--scheme", "zeropoint"],
        ["--format", "bitsandbytes", "--granularity", "row"],
        ["--format", "bitsandbytes", "--outlier-columns", "x.json"],
        ["--outliers", "static"],
    ],
)
def test_arguments_that_do_not_fit_each_other(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("quantize", "m", "out", *arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_none_of_it_needs_torch(tmp_path: Path) -> None:
    """A conversion and an inspection in a process where importing torch fails; a plan says what it needs."""
    model = write_model(tmp_path / "m")
    code = f"""
import sys
sys.modules["torch"] = None
from octavo import cli
assert cli.main(["quantize", {str(model)!r}, {str(tmp_path / "out")!r}, "--quiet"]) == 0
assert cli.main(["inspect", {str(tmp_path / "out")!r}, "--verify"]) == 0
assert cli.main(["plan", {str(model)!r}, "--gpu-memory", "1GB"]) == 1
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "octavo plan: needs PyTorch and Transformers: pip install" in result.stderr


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", "--json") == 0
    assert json.loads(capsys.readouterr().out) == octavo.info()
    assert run("info") == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"version: {octavo.__version__}" in lines
    assert f"  instruction_set: {octavo.info()['cpu']['instruction_set']}" in lines


def test_info_verifies(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What the hash is of, test_isas tests."""
    monkeypatch.setattr(octavo.verify, "verify", lambda: octavo.verify.EXPECTED)
    assert run("info", "--verify") == 0
    assert f"  hash: {octavo.verify.EXPECTED}" in capsys.readouterr().out.splitlines()
    monkeypatch.setattr(octavo.verify, "verify", lambda: "0")
    assert run("info", "--verify", "--json") == 1
    assert json.loads(capsys.readouterr().out)["verify"] == {
        "hash": "0",
        "expected": octavo.verify.EXPECTED,
        "right": False,
    }


def test_info_of_gpus(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As bindings/module.cpp describes them."""
    device = {"compute_capability": "9.0", "multiprocessors": 132, "memory": 150_000_000_000}
    devices = [{"name": f"GPU {i}", **device} for i in range(2)]
    monkeypatch.setattr(octavo, "info", lambda: {"backends": ["cpu", "cuda"], "cuda": {"devices": devices}})
    assert run("info") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == ["backends: cpu, cuda", "cuda:", "  devices:", "    0:", "      name: GPU 0"]
    assert "      memory: 150000000000" in lines
    assert run("info", "--json") == 0
    assert json.loads(capsys.readouterr().out)["cuda"]["devices"] == devices


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("inspect: first\n    second\n\nthird"), "first second third"),
        (TypeError("no\nsuch"), "TypeError: no such (OCTAVO_TRACEBACK=1 shows where)"),
        (ValueError(), "ValueError:  (OCTAVO_TRACEBACK=1 shows where)"),
        (KeyError("name"), "KeyError: 'name' (OCTAVO_TRACEBACK=1 shows where)"),
    ],
)
def test_every_failure_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, line: str
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "inspect", failing)
    monkeypatch.delenv("OCTAVO_TRACEBACK", raising=False)
    assert run("inspect", "m") == 1
    assert capsys.readouterr().err == f"octavo inspect: {line}\n"
    monkeypatch.setenv("OCTAVO_TRACEBACK", "1")
    assert run("inspect", "m") == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback (most recent call last):")
    assert "in failing" in shown
    assert shown.endswith(f"octavo inspect: {line}\n")


def test_an_interrupted_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "inspect", interrupted)
    assert run("inspect", "m") == 130
    assert capsys.readouterr().err == "octavo: interrupted\n"


def test_a_name_is_not_said_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("quantize", write_model(tmp_path / "m"), tmp_path / "int8", "--quiet") == 0
    assert run("quantize", tmp_path / "int8", tmp_path / "again") == 1
    assert capsys.readouterr().err.startswith("octavo quantize: model: expected a 16/32-bit model, got one that octavo")


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    """As in `octavo inspect MODEL | head`: no message, and the exit status that shells have for it."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "octavo.cli", "inspect", str(write_model(tmp_path / "m"))]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, "")


def test_sizes() -> None:
    for text, expected in (("24GB", 24 << 30), ("24 GiB", 24 << 30), ("0.5g", 1 << 29), ("7", 7), ("3kb", 3072)):
        assert parse_size(text) == expected
    for text in ("", "GB", "-1GB", "1PB", "1e9"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a size such as 24GB"):
            parse_size(text)
    assert (format_size(3 << 29), format_size(1 << 19)) == ("1.50 GiB", "0.50 MiB")
