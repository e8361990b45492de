"""`octavo quantize --format packed`: codes that are mapped, used as they lie, and shared between processes."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import octavo
import pytest
from octavo import checkpoint
from octavo import file_format as names
from octavo.checkpoint.files import open_shard
from support import TORCH

if TORCH.missing:
    pytest.skip(TORCH.missing, allow_module_level=True)
if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)
if importlib.util.find_spec("accelerate") is None:
    pytest.skip("accelerate is not installed", allow_module_level=True)

import safetensors.torch
import torch
import transformers
from octavo.transformers import OctavoConfig, loading

FILE = "model.safetensors"
SIZES = {"hidden_size": 256, "intermediate_size": 720, "num_attention_heads": 4, "num_hidden_layers": 4}
IDS = torch.arange(24).view(2, 12)
only_on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/smaps of Linux")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A 16-bit Llama and its int8 forms."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("packed")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=1000, **SIZES))
    model.bfloat16().save_pretrained(root / "model")
    found = {"model": root / "model"}
    for format in ("octavo", "packed"):
        found[format] = root / format
        checkpoint.quantize(found["model"], found[format], format=format, progress=False)  # type: ignore[arg-type]
    return found


def load(folder: Path, **more: Any) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(folder, **more).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits  # type: ignore[no-any-return]


def smaps(file: Path) -> list[dict[str, int]]:
    """What the system counts of each map of a file, in KiB; "first" and "end": its addresses."""
    found: list[dict[str, int]] = []
    lines = Path("/proc/self/smaps").read_text().splitlines()
    for line in lines:
        head, *rest = line.split()
        if not head.endswith(":"):
            first, end = (int(place, 16) for place in head.split("-"))
            found.append({"first": first, "end": end, "wanted": int(line.endswith(str(file)))})
        elif len(rest) == 2 and rest[1] == "kB":
            found[-1][head[:-1]] = int(rest[0])
    return [each for each in found if each["wanted"]]


@pytest.mark.parametrize("memory", [None, 3000])  # one block, and some of 16 rows
@pytest.mark.parametrize(
    "options", [{}, {"scheme": "zeropoint"}, {"rotation": 64}, {"granularity": "tensor", "rotation": 16}], ids=str
)
def test_the_same_weights(tmp_path: Path, options: dict[str, Any], memory: int | None) -> None:
    numbers = np.random.default_rng(0)
    a, b = (torch.from_numpy(numbers.standard_normal(shape, np.float32)) for shape in ((37, 100), (16, 64)))
    safetensors.torch.save_file({"a.weight": a, "b.weight": b.half(), "norm": torch.ones(3)}, tmp_path / FILE)
    columns = {"a": [3, 99], "b": []}
    read = {}
    for format in ("octavo", "packed"):
        more: dict[str, Any] = {"format": format, "memory": memory, "outlier_columns": columns}
        checkpoint.quantize(tmp_path / FILE, tmp_path / format, progress=False, **more, **options)
        read[format] = checkpoint.load(tmp_path / format, framework="numpy")
    for name in ("a.weight", "b.weight"):
        expected, found = (read[format][name] for format in ("octavo", "packed"))
        assert found.shape == expected.shape
        for part in ("codes", "packed", "scale", "code_sums", "zeropoint", "outlier_columns", "outlier_weight"):
            np.testing.assert_array_equal(getattr(found, part), getattr(expected, part))
    stored = open_shard(tmp_path / "packed" / FILE)
    assert stored.metadata["octavo.format_version"] == "3"
    for entry in stored.entries.values():
        if entry.name.endswith(".codes"):
            assert (entry.offset % 64, len(entry.shape)) == (0, 4)
    summary = checkpoint.inspect(tmp_path / "packed", verify=True)
    assert [layer.format for layer in summary.layers] == ["packed", "packed"]
    assert "format packed" in summary.as_table()


def test_from_pretrained(tmp_path: Path, folders: dict[str, Path]) -> None:
    """The same outputs, whoever reads it; what is saved again is as ever, also in the place of the mapped file."""
    expected, model = logits(load(folders["octavo"])), load(folders["packed"])
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(load(folders["packed"], dtype=torch.bfloat16)), expected)
    by_rows = load(folders["packed"], quantization_config=OctavoConfig(outliers="rows"))
    assert by_rows.lm_head.weight.dtype == torch.bfloat16
    assert by_rows.model.layers[0].mlp.up_proj.weight.options.outliers == "rows"
    shutil.copytree(folders["packed"], tmp_path / "own")
    model = load(tmp_path / "own")
    for folder in ("other", "own"):
        model.save_pretrained(tmp_path / folder)
        assert not [name for name in open_shard(tmp_path / folder / FILE).entries if name.endswith(names.CODE_SUMS)]
        assert torch.equal(logits(load(tmp_path / folder)), expected)
    assert torch.equal(logits(model), expected)


@only_on_linux
def test_the_file_is_used_as_it_lies(folders: dict[str, Path]) -> None:
    """One map, in which every weight lies, and nothing of it copied, or read and not used; the file stays."""
    file = folders["packed"] / FILE
    before = file.read_bytes()
    model = load(folders["packed"])
    (area,) = smaps(file)
    assert area["Rss"] < 100  # KiB
    for parameter in model.parameters():
        assert area["first"] <= parameter.data_ptr() < area["end"] or parameter.dim() == 1
    logits(model)
    (area,) = smaps(file)
    assert (area["Private_Dirty"], area["Anonymous"]) == (0, 0)
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
        model.model.layers[0].mlp.up_proj.weight.copy_(torch.zeros(720, 256))
    assert file.read_bytes() == before


@only_on_linux
def test_two_processes_share_it(folders: dict[str, Path]) -> None:
    """What one has read, the other has: of what both hold of the file, each counts half."""
    code = (
        "import sys, torch, transformers\n"
        "model = transformers.LlamaForCausalLM.from_pretrained(sys.argv[1])\n"
        "model(torch.arange(24).view(2, 12))\n"
        "print('ready', flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", code, str(folders["packed"])]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        model = load(folders["packed"])
        logits(model)
        (area,) = smaps(folders["packed"] / FILE)
        other.communicate("")
    assert area["Shared_Clean"] > 0.9 * area["Rss"] > 0
    assert area["Pss"] < 0.6 * area["Rss"]


@pytest.mark.parametrize("more", [1, 8, 16])
def test_misaligned(tmp_path: Path, folders: dict[str, Path], more: int) -> None:
    """A file of other hands, whose data begin anywhere: the same numbers."""
    shutil.copytree(folders["packed"], tmp_path / "m")
    content = (folders["packed"] / FILE).read_bytes()
    size = int.from_bytes(content[:8], "little")
    head = content[8 : 8 + size] + b" " * more
    (tmp_path / "m" / FILE).write_bytes(len(head).to_bytes(8, "little") + head + content[8 + size :])
    assert torch.equal(logits(load(tmp_path / "m")), logits(load(folders["packed"])))
    weight = checkpoint.load(tmp_path / "m")["model.layers.0.mlp.up_proj.weight"]
    expected = checkpoint.load(folders["packed"])["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(weight.packed, expected.packed)  # type: ignore[union-attr, arg-type]


def parts() -> dict[str, Any]:
    weight = octavo.quantize_weight(np.random.default_rng(0).standard_normal((20, 70), np.float32))
    options = names.encode_options(octavo.Options(), "float32", 70, 20)
    arrays = {"codes": weight.packed, "scale": weight.scale, "code_sums": weight.code_sums}
    return {**arrays, "options": np.frombuffer(options, np.uint8)}


def as_json(**changes: Any) -> Any:
    fields = {**json.loads(bytes(parts()["options"])), **changes}
    return np.frombuffer(json.dumps({n: v for n, v in fields.items() if v is not None}).encode(), np.uint8)


@pytest.mark.parametrize(
    ("part", "value", "match"),
    [
        ("codes", np.zeros((20, 70), np.int8), "codes: expected rank 4, got shape"),
        ("codes", np.zeros((2, 16, 16, 4), np.int8), "codes: expected"),
        ("codes", None, "expected a tensor 'codes', got none"),
        ("code_sums", None, "code_sums: expected an array with packed codes, got None"),
        ("code_sums", np.zeros(19, np.int32), "code_sums: expected"),
        ("code_sums", np.full(20, 8891, np.int32), r"code_sums: expected sums within \+-8890, got 8891: corrupt"),
        ("options", as_json(out_features=None), "out_features as a number, got None: corrupt"),
        ("options", as_json(in_features=-1), "in_features as a number, got -1: corrupt"),
        ("options", as_json(out_features=40), "codes: expected"),
        ("options", as_json(format_version=2, out_features=None), "codes: expected rank 2, got shape"),
        ("options", as_json(format_version=4), "format_version 1 to 3, got 4: update octavo"),
    ],
)
def test_parts_that_do_not_fit(part: str, value: Any, match: str) -> None:
    own = parts()
    weight, *_ = names.assemble(own, "w")
    assert weight.packed is own["codes"]
    changed = {name: array for name, array in {**own, part: value}.items() if array is not None}
    with pytest.raises(ValueError, match=f"w: .*{match}"):
        names.assemble(changed, "w")


def test_damage(tmp_path: Path, folders: dict[str, Path]) -> None:
    """A changed byte of the codes is found by whoever compares; a file that is cut, by everybody."""
    shutil.copytree(folders["packed"], tmp_path / "m")
    entry = next(each for name, each in open_shard(tmp_path / "m" / FILE).entries.items() if name.endswith(".codes"))
    content = bytearray((tmp_path / "m" / FILE).read_bytes())
    content[entry.offset + 5] ^= 1
    (tmp_path / "m" / FILE).write_bytes(content)
    for read in (checkpoint.load, lambda path: checkpoint.inspect(path, verify=True)):
        with pytest.raises(ValueError, match=r"codes: expected data with CRC-32"):
            read(tmp_path / "m")
    (tmp_path / "m" / FILE).write_bytes(content[:-1])
    for read in (checkpoint.load, load):
        with pytest.raises(Exception, match=r"truncated or corrupt|incomplete|Error while deserializing"):
            read(tmp_path / "m")


@only_on_linux
def test_pages_are_given_back(tmp_path: Path) -> None:
    """Of a tensor that lies in the mapped file, whole pages, which are read again; of no other memory."""
    file = tmp_path / FILE
    safetensors.torch.save_file({"a": torch.arange(3 << 20), "b": torch.ones(5)}, file)
    with safetensors.safe_open(file, "pt") as opened:
        a, elsewhere = opened.get_slice("a")[1:], torch.arange(3 << 20)
        total = int(a.sum())
        assert sum(area["Rss"] for area in smaps(file)) > 24_000  # KiB
        for tensor, files in ((a, []), (elsewhere, [str(file)]), (elsewhere[:0], [str(file)])):
            loading.give_back(files, tensor)
        assert torch.equal(elsewhere[1:], a)
        for tensor in (a, None):
            loading.give_back([str(tmp_path / ".." / tmp_path.name / FILE)], tensor)
            assert sum(area["Rss"] for area in smaps(file)) < 200
            assert int(a.sum()) == total
