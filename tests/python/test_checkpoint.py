"""octavo.checkpoint: what is converted and how, reading it back, and what is refused."""

from __future__ import annotations

import itertools
import json
import os
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import octavo
import pytest
from support import TORCH, make

if TORCH.missing:
    pytest.skip(TORCH.missing, allow_module_level=True)

import octavo.torch as ot
import safetensors.torch
import torch
from octavo import checkpoint, cli
from octavo.checkpoint.files import open_shard
from octavo.file_format import encode_options
from octavo.options import Options
from torch import Tensor, nn

State = dict[str, Tensor]
FC, OUT = "model.layers.0.fc", "model.layers.0.out"


def tensor(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.from_numpy(make("normal", shape, "float32", seed)).to(dtype)


def state_dict(dtype: torch.dtype = torch.bfloat16) -> State:
    """A model of two linear layers, an embedding and a head of 50 words."""
    return {
        "model.embed_tokens.weight": tensor((50, 16), dtype, 1),
        f"{FC}.weight": tensor((24, 16), dtype, 2),
        f"{FC}.bias": tensor((24,), dtype, 3),
        f"{OUT}.weight": tensor((16, 24), dtype, 4),
        "model.norm.weight": tensor((16,), torch.float32, 5),
        "lm_head.weight": tensor((50, 16), dtype, 6),
        "step": torch.tensor(3),
    }


def write_model(folder: Path, state: State | None = None, **config: Any) -> Path:
    folder.mkdir()
    safetensors.torch.save_file(state or state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny", "vocab_size": 50, **config}))
    return folder


def convert(model: Path, **options: Any) -> tuple[Path, checkpoint.Report]:
    output = model.parent / f"{model.name}-int8"
    more: dict[str, Any] = {} if "options" in options else {"recipe": "paper"}  # whose codes are those of the weight
    report = checkpoint.quantize(model, output, progress=False, **(more | options))
    assert not output.with_name(output.name + ".partial").exists()
    return output, report


def stored(output: Path) -> State:
    """All tensors, as the safetensors package reads them."""
    state: State = {}
    for path in sorted(output.glob("*.safetensors")):
        state.update(safetensors.torch.load_file(path))
    return state


def same(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype
    assert torch.equal(a, b)


# --- conversion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("scheme", "granularity"), list(itertools.product(("absmax", "zeropoint"), ("vector", "row", "tensor")))
)
def test_weights_are_those_of_quantize_weight(
    tmp_path: Path, scheme: Any, granularity: Any, dtype: torch.dtype
) -> None:
    """Whatever the blocks: a row each, or all. A layer reads them back, with its options."""
    state = state_dict(dtype)
    options = Options(scheme=scheme, granularity=granularity, outliers="rows", threshold=3.5)
    expected = octavo.quantize_weight(
        state[f"{FC}.weight"], scheme=scheme, granularity=granularity, outlier_columns=[2, 9]
    )
    for memory in (None, 1):
        model = write_model(tmp_path / f"{memory}", state)
        output, report = convert(model, options=options, memory=memory, outlier_columns={FC: [9, 2, 9]})
        got = stored(output)
        same(got[f"{FC}.weight.codes"], expected.codes)
        for part in ("scale", "zeropoint", "outlier_columns", "outlier_weight"):
            if getattr(expected, part) is not None:
                same(got[f"{FC}.weight.{part}"], getattr(expected, part))
        assert (f"{FC}.weight.zeropoint" in got) == (scheme == "zeropoint")
        assert bytes(got[f"{FC}.weight.options"].numpy()) == encode_options(options, str(dtype)[6:])
        assert not {f"{FC}.weight", f"{OUT}.weight"} & got.keys()
        for name in ("model.embed_tokens.weight", f"{FC}.bias", "model.norm.weight", "lm_head.weight", "step"):
            same(got[name], state[name])
        assert (report.layers, report.left, report.tensors) == (2, ["lm_head"], 7)
    own = {name.removeprefix(f"{FC}."): value for name, value in got.items() if name.startswith(f"{FC}.")}
    layer = ot.Int8Linear(16, 24)
    layer.load_state_dict(own)
    x = tensor((5, 16), seed=9) * 4
    same(layer.float()(x), octavo.linear(x, expected, state[f"{FC}.bias"].float(), outliers="rows", threshold=3.5))


def test_rotated_weights(tmp_path: Path) -> None:
    """Rows of 24 features are padded to 32 codes, and read back as 24."""
    state = state_dict(torch.float32)
    for granularity in ("vector", "tensor"):
        options = Options(granularity=granularity, rotation=16)  # type: ignore[arg-type]
        output, _ = convert(write_model(tmp_path / granularity, state), options=options, memory=1)
        found = checkpoint.load(output)
        for layer in (FC, OUT):
            expected = octavo.quantize_weight(state[f"{layer}.weight"], options=options)
            weight = found[f"{layer}.weight"]
            assert weight.shape == expected.shape
            same(weight.codes, expected.codes)
            same(weight.scale, expected.scale)
        summary = checkpoint.inspect(output)
        assert [layer.shape for layer in summary.layers] == [[24, 16], [16, 24]]
        assert f"absmax, {granularity}, rotation 16" in summary.as_table()


def test_one_scale_for_unusual_weights(tmp_path: Path) -> None:
    """The extremes decide a whole weight's scale: one column, constant, one-sided, zero, tiny, huge."""
    values = {
        "column": tensor((9, 1)),
        "constant": torch.full((5, 4), 0.37),
        "positive": tensor((7, 8)).abs() + 3,
        "zero": torch.zeros(4, 4),
        "tiny": tensor((5, 6)) * 1e-44,
        "huge": torch.linspace(-1, 1, 30).reshape(5, 6) * 3.4e38,
    }
    for scheme, granularity in itertools.product(("absmax", "zeropoint"), ("vector", "tensor")):
        folder = tmp_path / f"{scheme}-{granularity}"
        model = write_model(folder, {f"{name}.weight": value for name, value in values.items()})
        got = stored(convert(model, scheme=scheme, granularity=granularity, memory=1)[0])
        for name, value in values.items():
            expected = octavo.quantize_weight(value, scheme=scheme, granularity=granularity)  # type: ignore[arg-type]
            same(got[f"{name}.weight.codes"], expected.codes)
            same(got[f"{name}.weight.scale"], expected.scale)


def test_jobs_do_not_change_a_byte_nor_the_threads(tmp_path: Path) -> None:
    state = {f"layers.{i}.fc.weight": tensor((40 + i, 33), torch.float16, i) for i in range(9)}
    before = octavo.get_num_threads()
    files = []
    for jobs in (1, 3):
        output, report = convert(write_model(tmp_path / f"jobs{jobs}", state), jobs=jobs, memory=4000)
        assert report.layers == 9
        files.append((output / "model.safetensors").read_bytes())
    assert files[0] == files[1]
    assert octavo.get_num_threads() == before


# --- what becomes int8, by names and shapes; by the model: test_checkpoint_transformers.py ----------------------------


def test_what_is_a_linear_weight(tmp_path: Path) -> None:
    names = {
        "model.decoder.layers.0.self_attn.q_proj.weight": (16, 16),
        "model.layers.0.mlp.gate_proj.weight": (8, 16),
        "classifier.weight": (2, 16),
        # and what is none, or stays
        "model.decoder.embed_tokens.weight": (50, 16),
        "transformer.wte.weight": (49, 16),
        "shared.weight": (49, 16),
        "a.relative_attention_bias.weight": (32, 8),
        "lm_head.weight": (50, 16),
        "head_of_another_name.weight": (50, 16),  # by its shape
        "model.layers.0.block_sparse_moe.gate.weight": (8, 16),
        "model.norm.weight": (16,),
        "conv.weight": (16, 16, 3),
        "attention.in_proj_weight": (48, 16),
        "fc.bias": (16, 16),
        "weight": (16, 16),
        "empty.weight": (0, 16),
        "l.experts.gate_up_proj": (4, 8, 8),
    }
    output, report = convert(write_model(tmp_path / "m", {name: torch.ones(shape) for name, shape in names.items()}))
    assert set(checkpoint.Checkpoint(output).layers) == {name.removesuffix(".weight") for name in list(names)[:3]}
    assert report.reasons.keys() == {
        *("lm_head", "head_of_another_name", "model.layers.0.block_sparse_moe.gate", "l.experts.gate_up_proj")
    }
    assert "rows as the vocabulary" in report.reasons["head_of_another_name"]
    summary = checkpoint.inspect(output)
    assert summary.kept == report.reasons
    assert (summary.expert_tensors, summary.expert_bytes) == (1, 4 * 4 * 8 * 8)
    assert "quantize leaves them" in summary.as_table()
    assert report.reasons["lm_head"] in summary.as_table()


def test_patterns(tmp_path: Path) -> None:
    untied = write_model(tmp_path / "m", tie_word_embeddings=False)
    cases: list[tuple[dict[str, Any], set[str]]] = [
        ({"include": ["*.fc"]}, {FC}),
        ({"skip": ["*.fc"]}, {OUT}),
        ({"include": ["*"]}, {FC, OUT, "lm_head"}),
        ({"include": ["*"], "skip": ["model.*.out", "lm_*"]}, {FC}),
        ({"include": ["lm_head"]}, {"lm_head"}),
    ]
    for number, (patterns, layers) in enumerate(cases):
        output = tmp_path / str(number)
        report = checkpoint.quantize(untied, output, recipe="paper", progress=False, **patterns)
        assert set(checkpoint.Checkpoint(output).layers) == layers
        config = json.loads((output / "config.json").read_text())["quantization_config"]
        assert set(config["modules_to_not_convert"]) == set(report.left) | ({"lm_head"} - layers)
        assert set(report.left) >= {FC, OUT} - layers
    tied = write_model(tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"include: expected patterns of linear layers, got 'lm_head'"):
        convert(tied, include=["lm_head"])


def test_conv1d_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2's weights are [in, out]; those of the same names in another model are not; alone they could be either."""
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    state = {
        "h.0.attn.c_attn.weight": tensor((16, 48), torch.float16, 1),
        "h.0.attn.c_proj.weight": tensor((16, 16), torch.bfloat16, 2),
        "score.weight": tensor((2, 16), torch.float32, 4),  # a Linear all the same
    }
    model = write_model(tmp_path / "gpt2", state, model_type="gpt2")
    got = stored(convert(model, memory=1, outlier_columns={"h.0.attn.c_proj": [3]})[0])
    for name in state:
        expected = octavo.quantize_weight(state[name] if name == "score.weight" else state[name].T)
        same(got[f"{name}.codes"], expected.codes)
        same(got[f"{name}.scale"], expected.scale)
    same(got["h.0.attn.c_proj.weight.outlier_weight"], state["h.0.attn.c_proj.weight"].T[:, [3]])
    big_code = write_model(tmp_path / "bigcode", state, model_type="gpt_bigcode")
    expected = octavo.quantize_weight(state["h.0.attn.c_attn.weight"])
    same(stored(convert(big_code)[0])["h.0.attn.c_attn.weight.codes"], expected.codes)
    (model / "config.json").unlink()
    with pytest.raises(ValueError, match=r"h\.0\.attn\.c_\w+: expected a config\.json"):
        checkpoint.quantize(model, tmp_path / "out", recipe="paper", progress=False)


# --- files ------------------------------------------------------------------------------------------------------------


def test_companions_and_config(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    for name in ("tokenizer.json", "model.onnx", "1_Pooling/config.json", ".git/HEAD", "2_Dense/model.safetensors"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(name)
    output, _ = convert(model, threshold=5)
    files = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    assert files == {"config.json", "model.safetensors", "tokenizer.json", "1_Pooling/config.json"}
    config = json.loads((output / "config.json").read_text())
    assert config["vocab_size"] == 50
    assert config["quantization_config"] == {
        "quant_method": None,
        "octavo": "load with: import octavo.transformers",
        "format_version": 2,
        **Options(threshold=5).to_dict(),
        "modules_to_not_convert": ["lm_head"],
    }
    metadata = open_shard(output / "model.safetensors").metadata
    assert (metadata["format"], metadata["octavo.format_version"]) == ("pt", "2")
    # A sentence transformer's modules are parts of the model, whole.
    (model / "modules.json").write_text("[]")
    output = tmp_path / "sentence"
    checkpoint.quantize(model, output, recipe="paper", progress=False)
    assert (output / "2_Dense" / "model.safetensors").read_text() == "2_Dense/model.safetensors"


def test_outputs_in_the_folder_are_no_part_of_the_model(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    checkpoint.quantize(model, model / "int8", recipe="paper", progress=False)
    (model / "int8" / "onnx").mkdir()
    (model / "int8" / "onnx" / "notes.txt").touch()
    (model / "other.partial").mkdir()
    (model / "other.partial" / ".octavo-job.json").touch()
    (model / "other.partial" / "merges.txt").touch()
    checkpoint.quantize(model, model / "again", recipe="paper", progress=False)
    assert {path.name for path in (model / "again").iterdir()} == {"config.json", "model.safetensors"}


def save_sharded(model: Path, state: State, suffix: str) -> None:
    """Two shards; a layer's bias may be in another than its weight."""
    model.mkdir()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    weight_map = {}
    for number, names in enumerate((sorted(state)[::2], sorted(state)[1::2]), start=1):
        file = f"{stem}-{number:05}-of-00002.{suffix}"
        own = {name: state[name] for name in names}
        if suffix == "safetensors":
            safetensors.torch.save_file(own, model / file)
        else:
            torch.save(own, model / file)
        weight_map.update(dict.fromkeys(names, file))
    (model / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (model / "config.json").write_text(json.dumps({"model_type": "tiny", "vocab_size": 50}))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards(tmp_path: Path, suffix: str) -> None:
    state = state_dict()
    save_sharded(tmp_path / "m", state, suffix)
    output, report = convert(tmp_path / "m")
    assert report.layers == 2
    got, expected = stored(output), stored(convert(write_model(tmp_path / "whole", state))[0])
    assert got.keys() == expected.keys()
    for name in got:
        same(got[name], expected[name])
    weight_map = json.loads((output / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(weight_map) == set(got)
    for name, file in weight_map.items():
        assert name in safetensors.torch.load_file(output / file)
    assert {type(v) for v in checkpoint.load(output).values()} == {octavo.Int8Weight, Tensor}
    next((tmp_path / "m").glob(f"*-00002-of-00002.{suffix}")).unlink()
    with pytest.raises(FileNotFoundError, match=r"00002: [\w.]+: expected the shard that|expected the shard that"):
        checkpoint.quantize(tmp_path / "m", tmp_path / "out", recipe="paper", progress=False)


def test_pytorch_files(tmp_path: Path) -> None:
    """Parameters, views with an offset, transposed, strided and repeated weights: as torch.load has them."""
    base = tensor((3, 24, 16), torch.bfloat16, 8)
    state: dict[str, Any] = OrderedDict(
        {
            **state_dict(),
            "view.weight": base[1],
            "parameter.weight": nn.Parameter(tensor((6, 7), torch.float16, 9)),
            "transposed.weight": tensor((16, 24), torch.bfloat16, 10).T,
            "strided.weight": tensor((6, 8), seed=11)[:, ::2],
            "transposed_norm": tensor((16, 24), torch.float32, 11).T,
            "repeated": torch.ones(1, 4).expand(3, 4),
            "empty": torch.zeros(0, 3),
        }
    )
    torch.save(state, tmp_path / "weights.pt")
    checkpoint.quantize(
        tmp_path / "weights.pt", tmp_path / "out", skip=["lm_head"], recipe="paper", progress=False, memory=500
    )
    got = stored(tmp_path / "out")
    layers = {FC, OUT, "view", "parameter", "transposed", "strided"}
    assert {name.removesuffix(".weight.codes") for name in got if name.endswith("codes")} == layers
    for name, value in state.items():
        if name.removesuffix(".weight") in layers:
            same(got[f"{name}.codes"], octavo.quantize_weight(value.detach()).codes)
        else:
            same(got[name], value)


def test_links(tmp_path: Path) -> None:
    """Hugging Face's cache: names that link to files named after their content. Other links that lead out stay out."""
    whole, links, blobs = write_model(tmp_path / "whole"), tmp_path / "links", tmp_path / "blobs"
    links.mkdir()
    blobs.mkdir()
    (whole / "tokenizer.json").write_text("{}")
    for number, path in enumerate(sorted(whole.iterdir())):
        (blobs / f"{number:064x}").write_bytes(path.read_bytes())
        (links / path.name).symlink_to(Path("..") / "blobs" / f"{number:064x}")
    (tmp_path / "secret").write_text("secret")
    (links / "merges.txt").symlink_to(tmp_path / "secret")
    output, report = convert(links)
    assert report.not_copied == ["merges.txt"]
    assert not any(path.is_symlink() for path in output.iterdir())
    expected = convert(whole)[0]
    assert {path.name: path.read_bytes() for path in output.iterdir()} == {
        path.name: path.read_bytes() for path in expected.iterdir()
    }


def test_ties_stay(tmp_path: Path) -> None:
    embedding, shared = tensor((50, 16), torch.float16, 1), tensor((16, 16), torch.float16, 2)
    state = {
        "embed.weight": embedding,
        "head.weight": embedding,  # not quantized, whatever its name: it is the embedding
        "a.fc.weight": shared,
        "b.fc.weight": shared,
        "b.fc.bias": torch.ones(16),
    }
    (tmp_path / "m").mkdir()
    torch.save(state, tmp_path / "m" / "pytorch_model.bin")
    output, report = convert(tmp_path / "m", outlier_columns={"a.fc": [4], "b.fc": [1]})
    assert report.layers == 1
    parts = ("codes", "scale", "outlier_columns", "outlier_weight", "options")
    assert set(stored(output)) == {"embed.weight", "b.fc.bias", *(f"a.fc.weight.{part}" for part in parts)}
    loaded = checkpoint.load(output)
    assert loaded.keys() == state.keys()
    assert loaded["head.weight"] is loaded["embed.weight"]
    assert loaded["a.fc.weight"] is loaded["b.fc.weight"]
    assert loaded["a.fc.weight"].outlier_columns.tolist() == [1, 4]
    whole = checkpoint.Checkpoint(output).state_dict()
    assert whole["b.fc.weight.scale"] is whole["a.fc.weight.scale"]
    assert len(checkpoint.inspect(output).layers) == 1
    # As safetensors.torch.save_model notes two names of one tensor.
    model = nn.ModuleDict({"a": nn.Linear(8, 8, bias=False), "b": nn.Linear(8, 8, bias=False)})
    model["b"].weight = model["a"].weight
    (tmp_path / "noted").mkdir()
    safetensors.torch.save_model(model, str(tmp_path / "noted" / "model.safetensors"))
    loaded = checkpoint.load(convert(tmp_path / "noted")[0])
    assert loaded["a.weight"] is loaded["b.weight"]
    same(loaded["b.weight"].codes, octavo.quantize_weight(model["a"].weight).codes)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    state = state_dict()
    output, _ = convert(write_model(tmp_path / "m", state), scheme="zeropoint", outlier_columns={FC: [3]})
    loaded = checkpoint.load(output)
    assert set(loaded) == set(state)
    for name, value in loaded.items():
        if isinstance(value, octavo.Int8Weight):
            columns = [3] if name == f"{FC}.weight" else None
            expected = octavo.quantize_weight(state[name], scheme="zeropoint", outlier_columns=columns)
            assert (value.scheme, value.granularity) == ("zeropoint", "vector")
            x = tensor((3, value.shape[1]), torch.bfloat16, 7)
            same(octavo.linear(x, value), octavo.linear(x, expected))
        else:
            same(value, state[name])
    with pytest.raises(TypeError, match="use framework='torch'"):
        checkpoint.load(output, framework="numpy")
    halves = state_dict(torch.float16)
    loaded = checkpoint.load(convert(write_model(tmp_path / "f16", halves))[0], framework="numpy")
    assert isinstance(loaded[f"{FC}.weight"].codes, np.ndarray)
    np.testing.assert_array_equal(loaded["lm_head.weight"], halves["lm_head.weight"].numpy())
    floats = checkpoint.load(write_model(tmp_path / "float", state))
    for name in state:
        same(floats[name], state[name])


def test_version_1_is_read(tmp_path: Path) -> None:
    weight = octavo.quantize_weight(tensor((4, 6)), outlier_columns=[1])
    fields = {"format_version": 1, "scheme": "absmax", "granularity": "vector", "threshold": 6.0}
    fields |= {"outliers": "rows", "path": "auto"}
    state = {
        "fc.weight": weight.codes,
        "fc.scale": weight.scale,
        "fc.outlier_columns": weight.outlier_columns,
        "fc.outlier_weight": weight.outlier_weight,
        "fc._extra_state": torch.frombuffer(bytearray(json.dumps(fields).encode()), dtype=torch.uint8),
        "fc.bias": torch.ones(4),
    }
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(state, path)
    loaded = checkpoint.load(path)
    assert set(loaded) == {"fc.weight", "fc.bias"}
    same(loaded["fc.weight"].codes, weight.codes)
    assert checkpoint.Checkpoint(path).options("fc").outliers == "rows"
    assert checkpoint.inspect(path).layers[0].outlier_columns == 1
    del state["fc._extra_state"]
    safetensors.torch.save_file(state, path)
    with pytest.raises(ValueError, match=r"x\.safetensors: fc\.weight: expected fc\.scale and fc\._extra_state"):
        checkpoint.load(path)


def test_every_flipped_byte_of_data_is_found(tmp_path: Path) -> None:
    output, _ = convert(write_model(tmp_path / "m"))
    path = output / "model.safetensors"
    content = bytearray(path.read_bytes())
    for name, entry in checkpoint.Checkpoint(output).entries.items():
        for position in (entry.offset, entry.offset + entry.nbytes - 1):
            content[position] ^= 1
            path.write_bytes(content)
            with pytest.raises(ValueError, match=rf"model\.safetensors: {name}: expected data with CRC-32"):
                checkpoint.load(output)
            with pytest.raises(ValueError, match=rf"model\.safetensors: ({name}|.*weight: )"):
                checkpoint.Checkpoint(output, verify=False).verify()
            content[position] ^= 1
    path.write_bytes(content)
    opened = checkpoint.Checkpoint(output, verify=False)
    assert opened.verify() == opened.checksums == len(stored(output))


def test_a_file_of_bitsandbytes() -> None:
    """The state dict of a Linear8bitLt(16, 24) with `tensor` as weight and bias, saved with bitsandbytes 0.50.2."""
    path = Path(__file__).parent / "data" / "bitsandbytes-0.50.2.safetensors"
    weight, bias = tensor((24, 16), torch.float16, 1), tensor((24,), torch.float16, 2)
    loaded = checkpoint.load(path)
    assert set(loaded) == {"fc.weight", "fc.bias"}
    expected = octavo.quantize_weight(weight)
    same(loaded["fc.bias"].half(), bias)
    same(loaded["fc.weight"].scale, expected.scale)
    # It rounds another quotient than octavo, so codes at a tie may differ by one; both are half a step away.
    assert (loaded["fc.weight"].codes.int() - expected.codes.int()).abs().max() <= 1
    steps = (loaded["fc.weight"].dequantize() - weight.float()) / expected.scale[:, None]
    assert steps.abs().max() <= 0.5001


def test_inspect(tmp_path: Path) -> None:
    output, report = convert(write_model(tmp_path / "m"), outlier_columns={FC: [3, 4]})
    summary = checkpoint.inspect(output, verify=True)
    extra = len(encode_options(Options(), "bfloat16"))
    fc, out = sorted(summary.layers, key=lambda layer: layer.name)
    assert (fc.name, fc.shape, fc.outlier_columns) == (FC, [24, 16], 2)
    assert fc.bytes == 24 * 16 + 24 * 4 + 2 * 4 + 24 * 2 * 2 + extra
    assert (out.outlier_columns, out.bytes, out.bytes_16bit) == (None, 16 * 24 + 16 * 4 + extra, 2 * 16 * 24)
    others = 2 * 50 * 16 * 2 + 24 * 2 + 16 * 4 + 8
    assert (summary.other_tensors, summary.other_bytes) == (5, others)
    assert summary.bytes == fc.bytes + out.bytes + others
    # the norm would have 2 bytes an element, the counter keeps its 8
    assert summary.bytes_16bit == 2 * (2 * 24 * 16 + 2 * 50 * 16 + 24 + 16) + 8
    assert summary.ratio == summary.bytes_16bit / summary.bytes
    assert (summary.verified, summary.checksums) == (True, len(stored(output)))
    assert json.loads(summary.as_json())["layers"][0]["format"] == "octavo"
    assert FC in summary.as_table()
    assert "all correct" in summary.as_table()
    assert report.output_bytes >= summary.bytes
    float_model = checkpoint.inspect(tmp_path / "m", verify=True)
    assert (float_model.layers, float_model.verified) == ([], False)
    assert "format 16/32 bit" in float_model.as_table()
    assert "cannot be told" in float_model.as_table()


# --- what is refused --------------------------------------------------------------------------------------------------


def refuse(model: Path, match: str, error: Any = ValueError, **options: Any) -> None:
    output = model.parent / "refused"
    with pytest.raises(error, match=match):
        checkpoint.quantize(model, output, progress=False, **options)
    assert not output.exists()
    assert not (model.parent / "refused.partial").exists()


def test_non_finite_weights(tmp_path: Path) -> None:
    for value, jobs, granularity in (
        (float("nan"), 1, "vector"),
        (float("inf"), 2, "vector"),
        (float("nan"), 2, "row"),
    ):
        state = state_dict()
        state[f"{OUT}.weight"][5, 3] = value
        model = write_model(tmp_path / f"{value}{granularity}", state)
        refuse(model, r"layers\.0\.out\.weight: .*NaN or Inf", jobs=jobs, granularity=granularity)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        ({"codes": torch.zeros(24 * 16, dtype=torch.int8)}, "codes: expected rank 2"),
        ({"scale": None}, r"fc\.weight\.codes: expected model\.layers\.0\.fc\.weight\.scale"),
        ({"scale": torch.ones(23)}, "scale: expected"),
        ({"scale": torch.full((24,), -1.0)}, "scale: expected finite numbers >= 0, got -1"),
        ({"scale": torch.full((24,), torch.nan)}, "scale: expected finite numbers >= 0, got nan"),
        ({"zeropoint": torch.full((24,), 0.5)}, "zeropoint: expected integers, got 0.5"),
        ({"outlier_columns": torch.tensor([9, 3], dtype=torch.int32)}, "outlier_columns: expected ascending"),
        ({"outlier_columns": torch.tensor([3, 3], dtype=torch.int32)}, "outlier_columns: expected ascending"),
        ({"outlier_columns": torch.tensor([3, 16], dtype=torch.int32)}, r"columns in \[0, 16\), got 16"),
        ({"outlier_weight": None}, "outlier_weight: expected an array"),
        ({"outlier_weight": torch.ones(24, 2, dtype=torch.int8)}, "outlier_weight"),
        ({"options": torch.zeros(3, dtype=torch.uint8)}, "options: expected octavo's options as JSON"),
    ],
)
def test_damaged_int8_weights(tmp_path: Path, damage: State, match: str) -> None:
    """Refused by whoever opens them, before any codes are read."""
    output, _ = convert(write_model(tmp_path / "m"), scheme="zeropoint", outlier_columns={FC: [3, 9]})
    state = {name: value for name, value in stored(output).items() if name.startswith(f"{FC}.weight")}
    state |= {f"{FC}.weight.{part}": value for part, value in damage.items()}
    path = tmp_path / "damaged.safetensors"
    safetensors.torch.save_file({name: value for name, value in state.items() if value is not None}, path)
    for read in (checkpoint.load, checkpoint.inspect):
        with pytest.raises(ValueError, match=rf"damaged\.safetensors: .*{match}"):
            read(path)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"octavo has quantized|expected"):
        checkpoint.quantize(path, tmp_path / "again", recipe="paper", progress=False)


@pytest.mark.parametrize(
    "header",
    [
        {"fc.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 15]}},
        {"fc.weight": {"dtype": "F32", "shape": ["2", 2], "data_offsets": [0, 16]}},
        {"fc.weight": {"dtype": "F32", "shape": [2.0, 2], "data_offsets": [0, 16]}},
        {"fc.weight": {"dtype": "F32", "shape": [True, 4], "data_offsets": [0, 16]}},
        {"fc.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0.0, 16.0]}},
        {"fc.weight": {"dtype": "F33", "shape": [2, 2], "data_offsets": [0, 16]}},
        {"fc.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [4, 20]}},
        {"fc.weight": {"dtype": "F32", "shape": [2, 2]}},
        {"fc.weight": []},
        {"__metadata__": {"format": 3}},
        [],
        '{"fc.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}'.encode("utf-16"),
    ],
)
def test_headers_that_safetensors_refuses(tmp_path: Path, header: Any) -> None:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(16))
    refuse(path, r"model\.safetensors: expected a safetensors file")
    with pytest.raises(ValueError, match=r"model\.safetensors: expected a safetensors file"):
        checkpoint.inspect(path)


def test_truncated_files(tmp_path: Path) -> None:
    output, _ = convert(write_model(tmp_path / "m"))
    path = output / "model.safetensors"
    content = path.read_bytes()
    for damaged in (*(content[:size] for size in (0, 7, 8, 100, len(content) // 2, len(content) - 1)), content + b"x"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors.*(truncated|corrupt)"):
            checkpoint.load(output)


def test_corrupt_metadata(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for key, value in (
        ("tied", "[]"),
        ("tied", '{"a": 3}'),
        ("kept", "?"),
        ("crc32", '{"b": "0"}'),
        ("crc32", "[" * 9999),
    ):
        safetensors.torch.save_file({"a": torch.zeros(2)}, path, metadata={f"octavo.{key}": value})
        with pytest.raises(ValueError, match=r"model\.safetensors: expected (octavo\.|a checksum of every)"):
            checkpoint.inspect(path)
    safetensors.torch.save_file({"a": torch.zeros(2)}, path, metadata={"octavo.tied": '{"b": "c"}'})
    with pytest.raises(ValueError, match=r"model\.safetensors: octavo\.tied: expected tensors of this file, got 'c'"):
        checkpoint.inspect(path)


def test_pytorch_files_that_are_damaged_or_none(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    for state, match in (
        ({"epoch": 3}, r"epoch: expected a tensor, got int"),
        ({"state": {"fc.weight": torch.zeros(2, 2)}}, r"state: expected a tensor, got dict"),
        ([torch.zeros(2, 2)], "expected a state dict, got list"),
        ({"a": torch.eye(3).to_sparse()}, "a: expected a dense tensor"),
        (Path("/"), "expected a PyTorch file with a state dict, got UnpicklingError"),
    ):
        torch.save(state, path)
        refuse(path, rf"model\.pt: {match}")
    weight = tensor((30, 30), seed=3)
    torch.save({"fc.weight": weight}, path)
    content = bytearray(path.read_bytes())
    content[content.index(weight.numpy().tobytes()) + 100] ^= 1
    path.write_bytes(content)
    refuse(path, r"model\.pt: model/data/0: expected data with its CRC-32")
    for damaged in (content[:-50], b"\x80\x02ctorch", b""):
        path.write_bytes(damaged)
        refuse(path, r"model\.pt: expected a PyTorch zip file, got one that is truncated or corrupt")


def test_a_tensor_that_reaches_beyond_its_record(tmp_path: Path) -> None:
    """Else it would get the bytes of whatever comes next in the file."""
    path = tmp_path / "model.pt"
    torch.save({"fc.weight": torch.ones(3, 2), "next.weight": torch.zeros(3, 200)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content[:8] if name.endswith("data/0") else content)
    refuse(path, r"model\.pt: fc\.weight: expected a record with 24 bytes, got 8: corrupt")


def test_an_archive_that_unpacks_to_more_than_it_is(tmp_path: Path) -> None:
    """What is read of a file is bounded by its size, before anything of it is unpacked."""
    path = tmp_path / "model.bin"
    torch.save({"fc.weight": tensor((3, 2))}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    for word in ("data.pkl", "byteorder", "data/0"):
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in records.items():
                if name.endswith(word):
                    archive.writestr(name, content + bytes(1 << 26), zipfile.ZIP_DEFLATED)
                else:
                    archive.writestr(name, content)
        refuse(path, r"model\.bin: expected uncompressed records, as torch.save writes them, got .* unpacks to 6\d{7}")


def test_what_is_no_file(tmp_path: Path) -> None:
    """Refused at once: to open a pipe would wait for ever."""
    for name in ("model.safetensors", "config.json", "model.safetensors.index.json", "pytorch_model.bin"):
        model = write_model(tmp_path / name)
        if name == "pytorch_model.bin":
            (model / "model.safetensors").unlink()
        (model / name).unlink(missing_ok=True)
        os.mkfifo(model / name)
        refuse(model, rf"{name}: expected a file, got a pipe, device or socket")
        with pytest.raises(ValueError, match=rf"{name}: expected a file, got a pipe"):
            checkpoint.load(model)
        (model / name).unlink()
        (model / name).mkdir()
        refuse(model, rf"{name}: expected a file, got a folder")


def test_other_models(tmp_path: Path) -> None:
    refuse(tmp_path / "nothing", "got nothing of that name", FileNotFoundError)
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "expected one of model.safetensors", FileNotFoundError)
    refuse(write_model(tmp_path / "a", {"wte.weight": tensor((4, 4))}), "expected linear layers")
    refuse(write_model(tmp_path / "b", {"fc.weight": torch.zeros(4, 4, dtype=torch.float64)}), "fc.weight: .*F64")
    quantized = write_model(tmp_path / "c", quantization_config={"quant_method": "gptq"})
    refuse(quantized, "gptq has quantized")
    refuse(convert(write_model(tmp_path / "d"))[0], "octavo has quantized")
    clash = {"fc.weight": tensor((4, 4)), "fc.weight.scale": tensor((4,))}
    refuse(write_model(tmp_path / "e", clash), r"fc\.weight\.scale: expected a name that is free")
    # Of a pipeline, each model by itself.
    (tmp_path / "pipeline").mkdir()
    for part in ("unet", "vae"):
        write_model(tmp_path / "pipeline" / part)
    refuse(tmp_path / "pipeline", "expected one model, got a folder of several: convert each: unet, vae")


def test_adapters(tmp_path: Path) -> None:
    """Their matrices are no linear layers of a model."""
    for name in ("q_proj.lora_A", "q_proj.lora_B.default", "q_proj.lora_magnitude_vector", "k_proj.ia3_l"):
        model = write_model(tmp_path / name, {f"base_model.model.{name}.weight": tensor((4, 64))})
        refuse(model, "expected a model, got an adapter: merge it into its model first")
        refuse(model / "model.safetensors", "expected a model, got an adapter")
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    safetensors.torch.save_file({"prompt_embeddings": tensor((4, 8))}, tmp_path / "peft" / "adapter_model.safetensors")
    refuse(tmp_path / "peft", r"expected a model, got an adapter \(adapter_config\.json\)")


def test_an_index_that_does_not_fit(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    index = model / "model.safetensors.index.json"
    for content, match in (
        ('{"weight_map": {"gone.weight": "model.safetensors"}}', r"gone\.weight: expected the tensor that"),
        (
            '{"weight_map": {"gone.weight": "other.safetensors"}}',
            r"other\.safetensors: gone\.weight: expected the shard",
        ),
        ('{"weight_map": {"gone.weight": "../m/model.safetensors"}}', "expected names of files in the same folder"),
        ('{"weight_map": {"gone.weight": 3}}', "expected an index with a weight_map"),
        ("{}", "expected an index with a weight_map"),
        ("[" * 100_000, "expected JSON"),
    ):
        index.write_text(content)
        refuse(model, match, (ValueError, FileNotFoundError))


def test_names_are_escaped_and_clipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    red, long = "\x1b[31mred\x07", "x" * 100_000
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({f"{red}.weight": torch.zeros(4, 4), f"{long}.gate.weight": torch.zeros(4, 4)}, path)
    for command in (["quantize", str(path), str(tmp_path / "o"), "--quiet"], ["inspect", str(tmp_path / "o")]):
        assert cli.main(command) == 0
        shown = capsys.readouterr().out
        assert "\x1b" not in shown
        assert len(shown) < 2000
    metadata = {f"octavo.{key}": json.dumps({f"{red}{long}": f"{red}{long}"}) for key in ("kept", "measured")}
    safetensors.torch.save_file({f"{red}.weight": torch.zeros(4, 4)}, path, metadata=metadata)
    assert cli.main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "\\x1b[31mred" in shown
    assert "\x1b" not in shown
    assert len(shown) < 2000
    safetensors.torch.save_file({f"{red}{long}.weight": torch.zeros(4, 4, dtype=torch.float64)}, path)
    torch.save({f"{red}{long}": 3}, tmp_path / "model.bin")
    for file in (path, tmp_path / "model.bin"):
        with pytest.raises(ValueError, match="expected a") as caught:
            checkpoint.quantize(file, tmp_path / "out", recipe="paper", progress=False)
        assert "\x1b" not in str(caught.value)
        assert len(str(caught.value)) < 1000


def test_options(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    for options, match in (
        ({"scheme": "int4"}, "scheme"),
        ({"granularity": "column"}, "granularity"),
        ({"threshold": -1}, "threshold"),
        ({"outliers": "some"}, "outliers"),
        ({"path": "slow"}, "path"),
        ({"format": "gguf"}, "format: expected 'octavo' or 'packed' or 'bitsandbytes'"),
        ({"format": "bitsandbytes", "scheme": "zeropoint"}, "format: expected scheme absmax"),
        ({"jobs": 0}, "jobs: expected at least 1, got 0"),
        ({"memory": -5}, "memory: expected at least 1, got -5"),
        ({"include": ["*.nothing"]}, r"include: expected patterns of linear layers, got '\*\.nothing'"),
        ({"outlier_columns": {"lm_head": [1]}}, "outlier_columns: expected layers that are quantized, got 'lm_head'"),
        ({"outlier_columns": {FC: [16]}}, rf"outlier_columns of {FC}.*: expected columns in \[0, 16\), got 16"),
        ({"outliers": "static"}, "outliers: expected outlier columns of every layer for 'static'"),
    ):
        refuse(model, match, **options)
    refuse(model, "skip: expected a sequence", TypeError, skip="*.fc")
    refuse(model, "options: expected these or single ones", TypeError, options=Options(), threshold=3)
