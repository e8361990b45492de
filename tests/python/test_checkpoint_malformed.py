"""Some hundred malformed files: quantize, inspect and load refuse each in one line, at once, and read nothing wrong."""

from __future__ import annotations

import io
import json
import pickle
import re
import shutil
import signal
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import TORCH

if TORCH.missing:
    pytest.skip(TORCH.missing, allow_module_level=True)

import safetensors.torch
import torch
from octavo import checkpoint, cli

Damage = Callable[[Path], None]
FC = "model.layers.0.fc.weight"
SHARD, INDEX, CONFIG, PICKLE = "model.safetensors", "model.safetensors.index.json", "config.json", "pytorch_model.bin"
SECONDS = 20  # what a damaged file may take at most; some milliseconds are usual


def state() -> dict[str, Any]:
    numbers = torch.Generator().manual_seed(0)
    return {
        FC: torch.randn((24, 16), generator=numbers),
        "model.layers.0.fc.bias": torch.randn(24, generator=numbers),
        "model.layers.1.fc.weight": torch.randn((16, 24), generator=numbers).half(),
        "model.norm.weight": torch.ones(16),
    }


def safe(header: Any, data: bytes = bytes(16)) -> Damage:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return lambda model: write(model / SHARD, len(text).to_bytes(8, "little") + text + data)


def write(path: Path, content: Any) -> None:
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def file(name: str, content: Any) -> Damage:
    def damage(model: Path) -> None:
        if name == PICKLE:
            (model / SHARD).unlink()
        write(model / name, content)

    return damage


def edited(name: str, edit: Callable[[bytearray], bytes | bytearray]) -> Damage:
    """A file that was right, of which `edit` made another."""

    def damage(model: Path) -> None:
        if name == PICKLE:
            torch.save(state(), model / name)
            (model / SHARD).unlink()
        write(model / name, bytes(edit(bytearray((model / name).read_bytes()))))

    return damage


def flipped(seed: int, most: int) -> Callable[[bytearray], bytearray]:
    def edit(content: bytearray) -> bytearray:
        numbers = np.random.default_rng(seed)
        for _ in range(int(numbers.integers(1, 4))):
            content[int(numbers.integers(0, min(most, len(content))))] = int(numbers.integers(0, 256))
        return content

    return edit


def entry(**changes: Any) -> Any:
    return {FC: {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}}


def pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def zipped(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return buffer.getvalue()


class Code:
    """What a pickle would run when it is loaded."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("/tmp/octavo-malformed-ran"),)


DEEP = b"[" * 200_000
HUGE = 2**63
JSONS = {
    "empty": b"",
    "word": b"model",
    "open": b'{"a": ',
    "list": [],
    "text": "model",
    "number": 3,
    "null": None,
    "utf16": json.dumps({"model_type": "tiny"}).encode("utf-16"),
    "not_utf8": b'{"a": "\xff\xfe"}',
    "deep": DEEP,
    "digits": b'{"vocab_size": ' + b"9" * 10_000 + b"}",
    "zeros": bytes(1000),
}


def cases() -> Iterator[tuple[str, Damage]]:
    """Damages that nobody may accept."""
    length = (8).to_bytes(8, "little")
    for size in (0, 1, 7, 8, 9, 50, 200, -200, -1):
        yield f"safetensors cut {size}", edited(SHARD, lambda content, size=size: content[:size])
    for size in (0, 1, 7, 10**6, 10**9, HUGE - 1, HUGE, 2**64 - 1):
        head = size.to_bytes(8, "little")
        yield f"safetensors header of {size}", edited(SHARD, lambda content, head=head: head + content[8:])
    yield "safetensors longer", edited(SHARD, lambda content: content + b"x")
    yield "safetensors twice", edited(SHARD, lambda content: content * 2)
    yield "safetensors header alone", file(SHARD, length + b"{}      "[:7])
    for name, content in JSONS.items():
        yield f"safetensors header {name}", safe(content)
        yield f"safetensors entry {name}", safe({FC: content if not isinstance(content, bytes) else content.hex()})
    shapes: tuple[Any, ...] = (
        "2", 4, None, {}, ["2", 2], [2.0, 2], [True, 4], [None], [-2, -2], [[2, 2]], [2, 3], [HUGE, 2], [2**64, 1],
        [2**32, 2**32], [2**31, 2**33, 0], [4], [],
    )  # fmt: skip
    for shape in shapes:
        if shape not in ([4], [2**31, 2**33, 0]):  # the one is right
            yield f"safetensors shape {shape}", safe(entry(shape=shape))
    offsets: tuple[Any, ...] = (
        None, "0", [0], [0, 16, 32], [16, 0], [0, 15], [0, 17], [4, 20], [-16, 0], [0.0, 16.0], ["0", "16"],
        [0, HUGE], [HUGE, HUGE + 16], [2**64 - 16, 2**64], {},
    )  # fmt: skip
    for places in offsets:
        yield f"safetensors offsets {places}", safe(entry(data_offsets=places))
    for dtype in (None, 3, "", "F33", "f32", "FLOAT", [], "F64\x00", "F" * 10**6):
        yield f"safetensors dtype {str(dtype)[:9]}", safe(entry(dtype=dtype))
    for metadata in (
        3,
        [],
        "x",
        {"format": 3},
        {"format": None},
        {"a": {}},
        {"octavo.tied": "{"},
        {"octavo.kept": "3"},
    ):
        yield f"safetensors metadata {metadata}", safe({**entry(), "__metadata__": metadata})
    for key in ("shape", "dtype", "data_offsets"):
        header = entry()
        del header[FC][key]
        yield f"safetensors without {key}", safe(header)
    second = {"b.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [8, 24]}}
    yield "safetensors overlap", safe(entry() | second, bytes(24))
    second["b.weight"]["data_offsets"] = [0, 16]
    yield "safetensors shared", safe(entry() | second)
    second["b.weight"]["data_offsets"] = [20, 36]
    yield "safetensors gap", safe(entry() | second, bytes(36))
    for value in (np.nan, np.inf):
        yield f"safetensors holds {value}", safe(entry(), np.array([1, value, 1, 1], np.float32).tobytes())
    for name, content in JSONS.items():
        if name not in ("digits",):  # a number that nobody looks at
            yield f"config {name}", file(CONFIG, content)
        yield f"index {name}", file(INDEX, content)
        yield f"index map {name}", file(INDEX, {"weight_map": content if not isinstance(content, bytes) else "x"})
    for target in (
        *("../model.safetensors", "/etc/passwd", "", ".", "..", "gone.safetensors", "model.safetensors/", "a\x00b"),
        *(3, None, [], {}, "config.json", "x" * 5000, "\ud800", "./model.safetensors", "sub/../model.safetensors"),
    ):
        yield f"index names {str(target)[:30]!a}", file(INDEX, {"weight_map": {FC: target}})
    yield "index names another tensor", file(INDEX, {"weight_map": {"other.weight": SHARD}})
    for size in (0, 1, 4, 22, 100, 500, -300, -23, -22, -1):
        yield f"torch cut {size}", edited(PICKLE, lambda content, size=size: content[:size])
    others = {
        "list": [torch.ones(2)], "number": {"a": 3}, "nested": {"a": {"b": torch.ones(2)}}, "tensor": torch.ones(2),
        "sparse": {"a": torch.eye(3).to_sparse()},
        "keys": {3: torch.ones(2)}, "code": {"a": Code()}, "none": None, "path": Path("/"),
        "object": {"a": torch.nn.Linear(2, 2)},
    }  # fmt: skip
    for name, value in others.items():
        yield f"torch {name}", file(PICKLE, pickled(value))
    for protocol in (0, 2, 5):
        yield f"torch pickle {protocol}", file(PICKLE, pickle.dumps({"a": Code()}, protocol))
    yield "torch zip of nothing", file(PICKLE, zipped({}))
    yield "torch zip of text", file(PICKLE, zipped({"model/data.pkl": b"text"}))
    yield "torch zip of code", file(PICKLE, zipped({"model/data.pkl": pickle.dumps(Code(), 2)}))
    yield "torch bomb", file(PICKLE, zipped({"model/data.pkl": bytes(1 << 26)}, zipfile.ZIP_DEFLATED))
    yield "torch text", file(PICKLE, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    yield "safetensors text", file(SHARD, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    yield "safetensors html", file(SHARD, b"<!DOCTYPE html><html><body>404</body></html>")


def chances() -> Iterator[tuple[str, Damage]]:
    """Damages that may hit what does not matter: a name, or a number that is as good as another."""
    for seed in range(60):
        yield f"safetensors header {seed}", edited(SHARD, flipped(seed, 400))
        yield f"torch {seed}", edited(PICKLE, flipped(seed, 10**9))
    for seed in range(10):
        yield f"config {seed}", edited(CONFIG, flipped(seed, 400))
    yield "config digits", file(CONFIG, JSONS["digits"])
    yield "keys twice", safe(json.dumps(entry()).encode()[:-1] + b"," + json.dumps(entry()).encode()[1:])
    yield "escapes", safe({"\x1b[2J\u202e" + "n" * 1000 + ".weight": entry()[FC]})


def run(command: str, model: Path, capsys: pytest.CaptureFixture[str]) -> int:
    """The exit status of what someone does with a folder; checks how a refusal is said."""
    if command == "load":
        try:
            checkpoint.load(model)
        except (OSError, ValueError) as error:
            return 1 if len(str(error)) < 5000 else 2
        return 0
    output = model.with_name("output")
    status = cli.main([command, str(model), *([str(output), "--quiet"] if command == "quantize" else [])])
    said = capsys.readouterr().err
    if status != 0:
        lines = re.fullmatch(rf"octavo {command}: [^\n\x1b]{{1,5000}}\n", said)
        assert lines, said[:500]
        assert "OCTAVO_TRACEBACK" not in said, said[:500]  # of an error that nobody raised on purpose
        assert not output.exists()
    shutil.rmtree(output, ignore_errors=True)
    return status


def attempts(model: Path, damage: Damage, capsys: pytest.CaptureFixture[str]) -> dict[str, int]:
    model.mkdir()
    safetensors.torch.save_file(state(), model / SHARD, metadata={"format": "pt"})
    write(model / CONFIG, {"model_type": "tiny", "vocab_size": 50})
    damage(model)
    signal.alarm(SECONDS)  # ends the test run where something waits for ever
    try:
        return {command: run(command, model, capsys) for command in ("quantize", "inspect", "load")}
    finally:
        signal.alarm(0)


@pytest.mark.parametrize(("name", "damage"), [pytest.param(*case, id=case[0]) for case in cases()])
def test_malformed(tmp_path: Path, name: str, damage: Damage, capsys: pytest.CaptureFixture[str]) -> None:
    statuses = attempts(tmp_path / "model", damage, capsys)
    holds_nan = name.startswith("safetensors holds")  # which is found where values are read
    expected = {"quantize": 1} if holds_nan else dict.fromkeys(("quantize", "inspect", "load"), 1)
    assert {command: statuses[command] for command in expected} == expected
    assert not Path("/tmp/octavo-malformed-ran").exists()


@pytest.mark.parametrize(("name", "damage"), [pytest.param(*case, id=case[0]) for case in chances()])
def test_damaged_by_chance(tmp_path: Path, name: str, damage: Damage, capsys: pytest.CaptureFixture[str]) -> None:
    del name
    statuses = attempts(tmp_path / "model", damage, capsys)
    assert statuses["inspect"] <= statuses["quantize"]  # what is inspected may still hold NaN
    assert statuses["inspect"] == statuses["load"] or statuses["quantize"] == 1
