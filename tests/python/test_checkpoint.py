"""octavo.checkpoint: what is converted and how, reading it back, and what is refused."""

from __future__ import annotations

import itertools
import json
import threading
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
from octavo import checkpoint
from octavo.checkpoint.format import Options
from octavo.checkpoint.layers import LayerChoice
from octavo.checkpoint.source import open_source
from torch import Tensor, nn

State = dict[str, Tensor]
FC = "model.layers.0.fc"


def tensor(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.from_numpy(make("normal", shape, "float32", seed)).to(dtype)


def state_dict(dtype: torch.dtype = torch.bfloat16) -> State:
    """A model of two linear layers, an embedding and a head of 50 words."""
    return {
        "model.embed_tokens.weight": tensor((50, 16), dtype, 1),
        f"{FC}.weight": tensor((24, 16), dtype, 2),
        f"{FC}.bias": tensor((24,), dtype, 3),
        "model.layers.0.out.weight": tensor((16, 24), dtype, 4),
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
    report = checkpoint.quantize(model, output, progress=False, **options)
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


class TestWeights:
    @pytest.mark.parametrize("memory", [None, 1, 3000])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize(
        ("scheme", "granularity"), list(itertools.product(("absmax", "zeropoint"), ("vector", "row", "tensor")))
    )
    def test_are_those_of_quantize_weight(
        self, tmp_path: Path, scheme: Any, granularity: Any, dtype: torch.dtype, memory: int | None
    ) -> None:
        """Whatever the blocks: one row each, or a few, or all."""
        state = state_dict(dtype)
        output, report = convert(
            write_model(tmp_path / "m", state),
            scheme=scheme,
            granularity=granularity,
            memory=memory,
            outlier_columns={FC: [9, 2, 9]},
        )
        got = stored(output)
        expected = octavo.quantize_weight(
            state[f"{FC}.weight"], scheme=scheme, granularity=granularity, outlier_columns=[2, 9]
        )
        same(got[f"{FC}.weight"], expected.codes)
        same(got[f"{FC}.scale"], expected.scale)
        same(got[f"{FC}.outlier_columns"], expected.outlier_columns)
        same(got[f"{FC}.outlier_weight"], expected.outlier_weight)
        assert (f"{FC}.zeropoint" in got) == (scheme == "zeropoint")
        if scheme == "zeropoint":
            same(got[f"{FC}.zeropoint"], expected.zeropoint)
        assert (report.layers, report.left) == (2, ["lm_head"])
        for name in ("model.embed_tokens.weight", f"{FC}.bias", "model.norm.weight", "lm_head.weight", "step"):
            same(got[name], state[name])

    def test_one_scale_for_unusual_weights(self, tmp_path: Path) -> None:
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
                same(got[f"{name}.weight"], expected.codes)
                same(got[f"{name}.scale"], expected.scale)

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"scheme": "zeropoint", "granularity": "row", "threshold": 3.5, "outliers": "rows", "path": "weight_only"},
            {"outlier_columns": {FC: [1, 5], "model.layers.0.out": [0]}, "outliers": "static"},
        ],
    )
    def test_a_layer_loads_into_int8_linear(self, tmp_path: Path, options: dict[str, Any]) -> None:
        state = state_dict(torch.float32)
        output, _ = convert(write_model(tmp_path / "m", state), **options)
        linear = nn.Linear(16, 24)
        linear.load_state_dict({"weight": state[f"{FC}.weight"], "bias": state[f"{FC}.bias"]})
        columns = options.pop("outlier_columns", {}).get(FC)
        expected = ot.Int8Linear.from_linear(linear, outlier_columns=columns, **options)
        own = {name.removeprefix(f"{FC}."): value for name, value in stored(output).items() if name.startswith(FC)}
        assert list(own.keys() ^ expected.state_dict().keys()) == []
        for name, value in expected.state_dict().items():
            same(own[name], value)  # _extra_state too, byte for byte
        layer = ot.Int8Linear(16, 24)
        layer.load_state_dict(own)
        x = tensor((5, 16), seed=9) * 4
        same(layer(x), expected(x))

    def test_jobs_do_not_change_a_byte(self, tmp_path: Path) -> None:
        state = {f"layers.{i}.fc.weight": tensor((40 + i, 33), torch.float16, i) for i in range(9)}
        files = []
        for jobs in (1, 3):
            output, report = convert(write_model(tmp_path / f"jobs{jobs}", state), jobs=jobs, memory=4000)
            assert report.layers == 9
            files.append((output / "model.safetensors").read_bytes())
        assert files[0] == files[1]

    def test_jobs_work_at_the_same_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each tensor waits for two others: with fewer than three jobs at work none would ever be done."""
        from octavo.checkpoint import convert as module

        convert_tensor, meeting = module.convert_tensor, threading.Barrier(3)

        def together(*arguments: Any) -> dict[str, str]:
            meeting.wait(timeout=60)
            return convert_tensor(*arguments)

        monkeypatch.setattr(module, "convert_tensor", together)
        state = {f"layers.{i}.fc.weight": tensor((8, 8), torch.float16, i) for i in range(6)}
        assert convert(write_model(tmp_path / "m", state), jobs=3)[1].layers == 6

    def test_threads_are_as_before(self, tmp_path: Path) -> None:
        before = octavo.get_num_threads()
        convert(write_model(tmp_path / "m"), jobs=2)
        assert octavo.get_num_threads() == before


class TestChoice:
    @pytest.mark.parametrize(
        ("name", "shape", "quantized"),
        [
            ("model.decoder.layers.0.self_attn.q_proj.weight", (16, 16), True),
            ("transformer.h.3.mlp.dense_4h_to_h.weight", (16, 64), True),
            ("encoder.layer.0.output.dense.weight", (16, 64), True),
            ("classifier.weight", (2, 16), True),
            ("model.decoder.embed_tokens.weight", (50, 16), False),
            ("bert.embeddings.word_embeddings.weight", (49, 16), False),
            ("transformer.wte.weight", (49, 16), False),
            ("wpe.weight", (16, 16), False),
            ("shared.weight", (49, 16), False),
            ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 8), False),
            ("lm_head.weight", (50, 16), False),
            ("embed_out.weight", (50, 16), False),
            ("head_of_another_name.weight", (50, 16), False),  # by its shape
            ("model.layers.0.block_sparse_moe.gate.weight", (8, 16), False),
            ("model.layers.0.mlp.gate_proj.weight", (8, 16), True),
            ("model.norm.weight", (16,), False),
            ("conv.weight", (16, 16, 3), False),
            ("attention.in_proj_weight", (48, 16), False),
            ("fc.bias", (16, 16), False),
            ("weight", (16, 16), False),
            ("empty.weight", (0, 16), False),
        ],
    )
    def test_what_is_a_linear_weight(self, name: str, shape: tuple[int, ...], quantized: bool) -> None:
        choice = LayerChoice({"vocab_size": 50})
        assert choice.layer(name, shape) == (name.removesuffix(".weight") if quantized else None)

    def test_patterns(self, tmp_path: Path) -> None:
        untied = write_model(tmp_path / "m", tie_word_embeddings=False)
        cases: list[tuple[dict[str, Any], set[str]]] = [
            ({"include": ["*.fc"]}, {FC}),
            ({"skip": ["*.fc"]}, {"model.layers.0.out"}),
            ({"include": ["*"]}, {FC, "model.layers.0.out", "lm_head"}),
            ({"include": ["*"], "skip": ["model.*.out", "lm_*"]}, {FC}),
            ({"include": ["lm_head"]}, {"lm_head"}),
        ]
        for number, (patterns, layers) in enumerate(cases):
            output = tmp_path / str(number)
            report = checkpoint.quantize(untied, output, progress=False, **patterns)
            got = {name.removesuffix(".scale") for name in stored(output) if name.endswith(".scale")}
            assert got == layers
            assert set(report.left) == {FC, "model.layers.0.out", "lm_head"} - layers
            config = json.loads((output / "config.json").read_text())["quantization_config"]
            assert set(config["modules_to_not_convert"]) == set(report.left) | {"lm_head"}

    def test_a_tied_head_is_never_quantized(self, tmp_path: Path) -> None:
        model = write_model(tmp_path / "m", tie_word_embeddings=True)
        with pytest.raises(ValueError, match=r"include: expected patterns of linear layers, got 'lm_head'"):
            convert(model, include=["lm_head"])
        assert "lm_head.scale" not in stored(convert(model, include=["*"])[0])

    def test_gpt2_is_transposed(self, tmp_path: Path) -> None:
        state = {
            "h.0.attn.c_attn.weight": tensor((16, 48), torch.float16, 1),
            "h.0.attn.c_proj.weight": tensor((16, 16), torch.bfloat16, 2),
            "h.0.mlp.c_fc.weight": tensor((16, 64), torch.float32, 3),
            "score.weight": tensor((2, 16), torch.float32, 4),  # a Linear all the same
            "wte.weight": tensor((50, 16), torch.float32, 5),
        }
        for number, memory in enumerate((None, 1, 2500)):
            model = write_model(tmp_path / f"gpt2-{number}", state, model_type="gpt2")
            got = stored(convert(model, memory=memory, outlier_columns={"h.0.attn.c_proj": [3]})[0])
            for name in state:
                if name != "wte.weight":
                    natural = state[name] if name == "score.weight" else state[name].T
                    expected = octavo.quantize_weight(natural)
                    same(got[name], expected.codes)
                    same(got[name.replace("weight", "scale")], expected.scale)
            same(got["h.0.attn.c_proj.outlier_weight"], state["h.0.attn.c_proj.weight"].T[:, [3]])
        big_code = write_model(tmp_path / "bigcode", state, model_type="gpt_bigcode")  # the same names, of nn.Linear
        same(
            stored(convert(big_code)[0])["h.0.attn.c_attn.weight"],
            octavo.quantize_weight(state["h.0.attn.c_attn.weight"]).codes,
        )

    def test_gpt2_without_a_config_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "weights.safetensors"
        safetensors.torch.save_file({"h.0.mlp.c_fc.weight": tensor((16, 64))}, path)
        with pytest.raises(ValueError, match=r"h\.0\.mlp\.c_fc: expected a config\.json"):
            checkpoint.quantize(path, tmp_path / "out", progress=False)


class TestFiles:
    def test_companions_and_config(self, tmp_path: Path) -> None:
        model = write_model(tmp_path / "m")
        (model / "tokenizer.json").write_text("{}")
        (model / "merges.txt").write_text("a b")
        (model / "model.onnx").write_text("other weights")
        (model / "1_Pooling").mkdir()
        (model / "1_Pooling" / "config.json").write_text("pooling")
        (model / ".git").mkdir()
        (model / ".git" / "HEAD").write_text("")
        output, _ = convert(model, threshold=5)
        assert {path.name for path in output.iterdir()} == {
            "config.json",
            "merges.txt",
            "model.safetensors",
            "tokenizer.json",
            "1_Pooling",
        }
        assert (output / "1_Pooling" / "config.json").read_text() == "pooling"
        config = json.loads((output / "config.json").read_text())
        assert config["vocab_size"] == 50
        assert config["quantization_config"] == {
            "quant_method": None,
            "octavo": "load with: import octavo.transformers",
            "format_version": 1,
            "scheme": "absmax",
            "granularity": "vector",
            "threshold": 5.0,
            "outliers": "columns",
            "path": "auto",
            "modules_to_not_convert": ["lm_head"],
        }
        assert "quantization_config" not in json.loads((model / "config.json").read_text())
        with safetensors.safe_open(output / "model.safetensors", "pt") as file:
            metadata = file.metadata()
        assert metadata["format"] == "pt"
        assert metadata["octavo.format_version"] == "1"
        assert (metadata["octavo.scheme"], metadata["octavo.threshold"]) == ("absmax", "5.0")

    def test_earlier_outputs_in_the_folder_are_no_part_of_the_model(self, tmp_path: Path) -> None:
        model = write_model(tmp_path / "m")
        (model / "1_Pooling").mkdir()
        (model / "1_Pooling" / "config.json").write_text('{"pooling": "mean"}')
        checkpoint.quantize(model, model / "int8", progress=False)
        (model / "int8" / "onnx").mkdir()
        (model / "int8" / "onnx" / "notes.txt").touch()
        (model / "other.partial").mkdir()
        (model / "other.partial" / ".octavo-journal").touch()
        (model / "other.partial" / "merges.txt").touch()
        checkpoint.quantize(model, model / "again", progress=False)
        assert {path.name for path in (model / "again").iterdir()} == {"config.json", "model.safetensors", "1_Pooling"}

    def test_shards(self, tmp_path: Path) -> None:
        """A layer's bias may be in another file than its weight."""
        model = tmp_path / "m"
        model.mkdir()
        state = state_dict()
        halves = (sorted(state)[:4], sorted(state)[4:])
        weight_map = {}
        for number, names in enumerate(halves, start=1):
            file = f"model-{number:05}-of-00002.safetensors"
            safetensors.torch.save_file({name: state[name] for name in names}, model / file)
            weight_map.update(dict.fromkeys(names, file))
        (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        output, report = convert(model)
        assert report.layers == 2
        whole, _ = convert(write_model(tmp_path / "whole", state))
        got, expected = stored(output), stored(whole)
        assert got.keys() == expected.keys()
        for name in got:
            same(got[name], expected[name])
        index = json.loads((output / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(got)
        for name, file in index["weight_map"].items():
            assert name in safetensors.torch.load_file(output / file)
        assert {type(v) for v in checkpoint.load(output).values()} == {octavo.Int8Weight, Tensor}

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt"])
    def test_pytorch_files(self, tmp_path: Path, name: str) -> None:
        """Parameters, views with an offset, transposed weights: as torch.load has them."""
        model = tmp_path / "m"
        model.mkdir()
        base = tensor((3, 24, 16), torch.bfloat16, 8)
        state: dict[str, Any] = OrderedDict(
            {
                **state_dict(),
                "view.weight": base[1],
                "parameter.weight": nn.Parameter(tensor((6, 7), torch.float16, 9)),
                "transposed.weight": tensor((16, 24), torch.bfloat16, 10).T,
                "transposed_norm": tensor((16, 24), torch.float32, 11).T,
                "empty": torch.zeros(0, 3),
            }
        )
        torch.save(state, model / name)
        (model / "config.json").write_text(json.dumps({"model_type": "tiny", "vocab_size": 50}))
        output = tmp_path / "out"
        checkpoint.quantize(model if name == "pytorch_model.bin" else model / name, output, progress=False, memory=500)
        got = stored(output)
        for key, value in state.items():
            layer = key.removesuffix(".weight")
            if f"{layer}.scale" in got:
                same(got[key], octavo.quantize_weight(value.detach()).codes)
            else:
                same(got[key], value)
        quantized = {key.removesuffix(".scale") for key in got if key.endswith(".scale")}
        assert quantized == {FC, "model.layers.0.out", "view", "parameter", "transposed"}

    def test_pytorch_shards(self, tmp_path: Path) -> None:
        """pytorch_model.bin.index.json and its files; a shard that is not there is named with its tensor."""
        model = tmp_path / "m"
        model.mkdir()
        state = state_dict()
        weight_map = {}
        for number, names in enumerate((sorted(state)[::2], sorted(state)[1::2]), start=1):
            file = f"pytorch_model-{number:05}-of-00002.bin"
            torch.save({name: state[name] for name in names}, model / file)
            weight_map.update(dict.fromkeys(names, file))
        (model / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (model / "config.json").write_text(json.dumps({"model_type": "tiny", "vocab_size": 50}))
        got = stored(convert(model)[0])
        expected = stored(convert(write_model(tmp_path / "whole", state))[0])
        assert got.keys() == expected.keys()
        for name in got:
            same(got[name], expected[name])
        (model / weight_map["lm_head.weight"]).unlink()
        with pytest.raises(
            FileNotFoundError, match=r"\.bin: [\w.]+: expected the shard that pytorch_model\.bin\.index"
        ):
            checkpoint.quantize(model, tmp_path / "out", progress=False)

    def test_a_folder_of_links(self, tmp_path: Path) -> None:
        """Hugging Face's cache: names that link to files named after their content."""
        whole, links, blobs = write_model(tmp_path / "whole"), tmp_path / "links", tmp_path / "blobs"
        links.mkdir()
        blobs.mkdir()
        for number, path in enumerate(sorted(whole.iterdir())):
            (blobs / f"{number:064x}").write_bytes(path.read_bytes())
            (links / path.name).symlink_to(Path("..") / "blobs" / f"{number:064x}")
        output = convert(links)[0]
        assert not any(path.is_symlink() for path in output.iterdir())
        expected = convert(whole)[0]
        assert {path.name: path.read_bytes() for path in output.iterdir()} == {
            path.name: path.read_bytes() for path in expected.iterdir()
        }

    def test_ties_stay(self, tmp_path: Path) -> None:
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
        assert set(stored(output)) == {
            "embed.weight",
            "b.fc.bias",
            *(f"a.fc.{part}" for part in ("weight", "scale", "outlier_columns", "outlier_weight", "_extra_state")),
        }
        loaded = checkpoint.load(output)
        assert loaded["head.weight"] is loaded["embed.weight"]
        assert loaded["a.fc.weight"] is loaded["b.fc.weight"]
        assert loaded["a.fc.weight"].outlier_columns.tolist() == [1, 4]
        whole = checkpoint.Checkpoint(output).state_dict()
        assert whole["b.fc.scale"] is whole["a.fc.scale"]
        same(whole["head.weight"], embedding)

    def test_ties_that_safetensors_notes(self, tmp_path: Path) -> None:
        """As safetensors.torch.save_model writes two names of one tensor."""
        model = nn.ModuleDict(
            {"a": nn.Linear(8, 8, bias=False), "b": nn.Linear(8, 8, bias=False), "c": nn.Linear(8, 8)}
        )
        model["b"].weight = model["a"].weight
        (tmp_path / "m").mkdir()
        safetensors.torch.save_model(model, str(tmp_path / "m" / "model.safetensors"))
        floats = checkpoint.load(tmp_path / "m")
        assert floats["a.weight"] is floats["b.weight"]
        output, report = convert(tmp_path / "m")
        assert (report.layers, report.left) == (2, [])
        loaded = checkpoint.load(output)
        assert loaded["a.weight"] is loaded["b.weight"]
        same(loaded["b.weight"].codes, octavo.quantize_weight(model["a"].weight).codes)
        assert set(checkpoint.Checkpoint(output).state_dict()) == {
            *(f"{layer}.{part}" for layer in "abc" for part in ("weight", "scale", "_extra_state")),
            "c.bias",
        }
        assert len(checkpoint.inspect(output).layers) == 2

    def test_stacks_of_experts_are_named(self, tmp_path: Path) -> None:
        state = {"l.fc.weight": tensor((8, 8)), "l.experts.gate_up_proj": tensor((4, 8, 8))}
        output, report = convert(write_model(tmp_path / "m", state))
        assert report.left == ["l.experts.gate_up_proj"]
        summary = checkpoint.inspect(output)
        assert (summary.other_tensors, summary.expert_tensors, summary.expert_bytes) == (1, 1, summary.other_bytes)
        assert "of experts        1" in summary.as_table()
        assert "quantize leaves them" in summary.as_table()


# --- reading ----------------------------------------------------------------------------------------------------------


class TestReading:
    def test_round_trip(self, tmp_path: Path) -> None:
        state = state_dict()
        output, _ = convert(write_model(tmp_path / "m", state), scheme="zeropoint", outlier_columns={FC: [3]})
        loaded = checkpoint.load(output)
        assert set(loaded) == set(state)
        for name, value in loaded.items():
            if isinstance(value, octavo.Int8Weight):
                columns = [3] if name == f"{FC}.weight" else None
                expected = octavo.quantize_weight(state[name], scheme="zeropoint", outlier_columns=columns)
                assert (value.scheme, value.granularity) == ("zeropoint", "vector")
                for part in ("codes", "scale", "zeropoint"):
                    same(getattr(value, part), getattr(expected, part))
                if columns:
                    same(value.outlier_weight, expected.outlier_weight)
                x = tensor((3, value.shape[1]), torch.bfloat16, 7)
                same(octavo.linear(x, value), octavo.linear(x, expected))
            else:
                same(value, state[name])

    def test_numpy(self, tmp_path: Path) -> None:
        state = state_dict(torch.float16)
        output, _ = convert(write_model(tmp_path / "m", state))
        loaded = checkpoint.load(output, framework="numpy")
        assert isinstance(loaded[f"{FC}.weight"].codes, np.ndarray)
        np.testing.assert_array_equal(loaded["lm_head.weight"], state["lm_head.weight"].numpy())
        output, _ = convert(write_model(tmp_path / "bf16"))
        with pytest.raises(TypeError, match="use framework='torch'"):
            checkpoint.load(output, framework="numpy")

    def test_a_float_checkpoint(self, tmp_path: Path) -> None:
        state = state_dict()
        loaded = checkpoint.load(write_model(tmp_path / "m", state))
        assert set(loaded) == set(state)
        for name in state:
            same(loaded[name], state[name])

    def test_every_flipped_byte_of_data_is_found(self, tmp_path: Path) -> None:
        output, _ = convert(write_model(tmp_path / "m"))
        path = output / "model.safetensors"
        content = bytearray(path.read_bytes())
        for name, entry in checkpoint.Checkpoint(output).entries.items():
            for position in (entry.offset, entry.offset + entry.nbytes - 1):
                content[position] ^= 1
                path.write_bytes(content)
                with pytest.raises(ValueError, match=rf"model\.safetensors: {name}: expected data with CRC-32"):
                    checkpoint.Checkpoint(output).tensor(name)
                content[position] ^= 1
        path.write_bytes(content)
        assert checkpoint.Checkpoint(output).verify() == len(stored(output))

    def test_a_truncated_file(self, tmp_path: Path) -> None:
        output, _ = convert(write_model(tmp_path / "m"))
        path = output / "model.safetensors"
        content = path.read_bytes()
        for size in (0, 7, 8, 100, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:size])
            with pytest.raises(ValueError, match=r"model\.safetensors.*(truncated|corrupt)"):
                checkpoint.load(output)

    def test_an_int8_weight_of_nobody(self, tmp_path: Path) -> None:
        safetensors.torch.save_file({"fc.weight": torch.zeros(4, 4, dtype=torch.int8)}, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match=r"fc\.weight: expected fc\.scale and fc\._extra_state"):
            checkpoint.load(tmp_path / "x.safetensors")

    def test_another_format_version(self, tmp_path: Path) -> None:
        extra = json.dumps({"format_version": 2}).encode()
        state = {
            "fc.weight": torch.zeros(4, 4, dtype=torch.int8),
            "fc.scale": torch.ones(4),
            "fc._extra_state": torch.frombuffer(bytearray(extra), dtype=torch.uint8),
        }
        safetensors.torch.save_file(state, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match=r"fc\._extra_state: expected format_version 1, got 2"):
            checkpoint.load(tmp_path / "x.safetensors")
        state["fc.scale"] = torch.ones(3)
        safetensors.torch.save_file(state, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match=r"fc\.scale: expected F32 \[4\] or \[1\], got F32 \[3\]"):
            checkpoint.load(tmp_path / "x.safetensors")


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


class TestInspect:
    def test_counts(self, tmp_path: Path) -> None:
        output, report = convert(write_model(tmp_path / "m"), outlier_columns={FC: [3, 4]})
        summary = checkpoint.inspect(output, verify=True)
        extra = len(Options().extra_state())
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
        table = summary.as_table()
        assert FC in table
        assert "all correct" in table
        assert report.output_bytes >= summary.bytes

    def test_a_float_checkpoint(self, tmp_path: Path) -> None:
        summary = checkpoint.inspect(write_model(tmp_path / "m", {"fc.weight": tensor((8, 8))}))
        assert (summary.layers, summary.bytes, summary.ratio) == ([], 256, 0.5)
        assert "format 16/32 bit" in summary.as_table()
        checked = checkpoint.inspect(tmp_path / "m", verify=True).as_table()
        assert "cannot be told" in checked
        assert "correct" not in checked


# --- what is refused --------------------------------------------------------------------------------------------------


class TestRefused:
    def refuse(self, model: Path, match: str, error: type[Exception] = ValueError, **options: Any) -> None:
        output = model.parent / "refused"
        with pytest.raises(error, match=match):
            checkpoint.quantize(model, output, progress=False, **options)
        assert not output.exists()
        assert not (model.parent / "refused.partial").exists()

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("jobs", [1, 2])
    def test_non_finite_weights(self, tmp_path: Path, value: float, jobs: int) -> None:
        state = state_dict()
        state["model.layers.0.out.weight"][5, 3] = value
        for granularity in ("vector", "tensor"):
            model = tmp_path / "m"
            if not model.exists():
                write_model(model, state)
            self.refuse(model, r"layers\.0\.out\.weight: .*NaN or Inf", jobs=jobs, granularity=granularity)

    def test_truncated(self, tmp_path: Path) -> None:
        model = write_model(tmp_path / "m")
        path = model / "model.safetensors"
        content = path.read_bytes()
        last = max(checkpoint.Checkpoint(model).entries.values(), key=lambda entry: entry.offset)
        path.write_bytes(content[:-1])
        self.refuse(model, rf"model\.safetensors: {last.name}: expected data up to byte .*truncated")
        path.write_bytes(content + b"x")
        self.refuse(model, r"model\.safetensors: expected \d+ bytes, got \d+")
        path.write_bytes(content[:8] + b"?" + content[9:])
        self.refuse(model, r"model\.safetensors: expected a safetensors header")

    @pytest.mark.parametrize(
        ("fields", "match"),
        [
            ({"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 15]}, "fc.weight: expected 16 bytes"),
            ({"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}, "fc.weight: expected"),
            ({"dtype": "F33", "shape": [2, 2], "data_offsets": [0, 16]}, "fc.weight: expected a dtype"),
            ({"dtype": "F32", "shape": [2, 2], "data_offsets": [4, 20]}, "fc.weight: expected data from byte"),
            ({"dtype": "F32", "shape": [2, 2]}, "data_offsets"),
            ([], "corrupt"),
        ],
    )
    def test_corrupt_headers(self, tmp_path: Path, fields: Any, match: str) -> None:
        header = json.dumps({"fc.weight": fields}).encode()
        path = tmp_path / "model.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
        self.refuse(path, match)

    @pytest.mark.parametrize("metadata", [["pt"], "pt", {"format": 3}])
    def test_corrupt_metadata(self, tmp_path: Path, metadata: Any) -> None:
        header = json.dumps({"__metadata__": metadata}).encode()
        path = tmp_path / "model.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(ValueError, match=r"model\.safetensors: .* __metadata__ as an object of strings"):
            checkpoint.inspect(path)

    @pytest.mark.parametrize("ties", ["[]", '{"a": 3}', '"a"'])
    def test_corrupt_ties(self, tmp_path: Path, ties: str) -> None:
        path = tmp_path / "model.safetensors"
        safetensors.torch.save_file({"a": torch.zeros(2)}, path, metadata={"octavo.tied": ties})
        with pytest.raises(ValueError, match=r"model\.safetensors: expected octavo\.tied as a JSON object of names"):
            checkpoint.inspect(path)

    def test_damaged_pickles_name_the_file(self, tmp_path: Path) -> None:
        """Whichever byte is wrong, the file is named, or it reads as before."""
        import zipfile

        path = tmp_path / "model.bin"
        torch.save({"fc.weight": tensor((3, 2)), "fc.bias": tensor((3,))}, path)
        with zipfile.ZipFile(path) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        pickled = next(name for name in records if name.endswith("data.pkl"))
        refused = 0
        for place in range(len(records[pickled])):
            damaged = bytearray(records[pickled])
            damaged[place] ^= 0x55
            with zipfile.ZipFile(path, "w") as archive:
                for name, content in records.items():
                    archive.writestr(name, bytes(damaged) if name == pickled else content)
            try:
                open_source(path)
            except ValueError as error:
                assert str(error).startswith(f"{path}: ")  # noqa: PT017 - of those that are refused
                refused += 1
        assert refused > 50

    def test_corrupt_pytorch_files(self, tmp_path: Path) -> None:
        model = tmp_path / "pytorch_model.bin"
        weight = tensor((30, 30), seed=3)
        torch.save({"fc.weight": weight}, model)
        content = bytearray(model.read_bytes())
        place = content.index(weight.numpy().tobytes())
        content[place + 100] ^= 1
        model.write_bytes(content)
        self.refuse(model, r"pytorch_model\.bin: fc\.weight: expected data with its CRC-32")
        model.write_bytes(content[:-50])
        self.refuse(
            model, r"pytorch_model\.bin: expected a PyTorch zip file, got the beginning of one, \d+ bytes .*trunc"
        )
        model.write_bytes(b"\x80\x02ctorch")
        self.refuse(
            model, r"pytorch_model\.bin: expected a PyTorch zip file, got something else: .*before PyTorch 1\.6"
        )

    def test_pytorch_files_that_are_no_state_dict(self, tmp_path: Path) -> None:
        path = tmp_path / "model.pt"
        for content, match in (
            ({"epoch": 3}, r"epoch: expected a tensor, got int"),
            ({"state": {"fc.weight": torch.zeros(2, 2)}}, r"state: expected a tensor, got dict"),
            ([torch.zeros(2, 2)], "expected a state dict, got list"),
            ({"fc.weight": torch.zeros(4, 4)[:, ::2]}, r"fc\.weight: expected a contiguous"),
            (Path("/"), r"expected a PyTorch file with a state dict, got (pathlib|posix)"),
        ):
            torch.save(content, path)
            self.refuse(path, match)

    def test_other_models(self, tmp_path: Path) -> None:
        self.refuse(tmp_path / "nothing", "got nothing of that name", FileNotFoundError)
        (tmp_path / "empty").mkdir()
        self.refuse(tmp_path / "empty", "expected one of model.safetensors", FileNotFoundError)
        self.refuse(write_model(tmp_path / "a", {"wte.weight": tensor((4, 4))}), "expected linear layers")
        self.refuse(
            write_model(tmp_path / "b", {"fc.weight": torch.zeros(4, 4, dtype=torch.float64)}), "fc.weight: .*F64"
        )
        quantized = write_model(tmp_path / "c", quantization_config={"quant_method": "gptq"})
        self.refuse(quantized, "gptq has quantized")
        self.refuse(convert(write_model(tmp_path / "d"))[0], "octavo has quantized")
        clash = {"fc.weight": tensor((4, 4)), "fc.scale": tensor((4,))}
        self.refuse(write_model(tmp_path / "e", clash), r"fc\.scale: expected a name that is free")

    def test_an_index_that_does_not_fit(self, tmp_path: Path) -> None:
        model = write_model(tmp_path / "m")
        index = model / "model.safetensors.index.json"
        for weight_map, match in (
            ({"gone.weight": "model.safetensors"}, r"gone\.weight: expected the tensor that"),
            ({"gone.weight": "other.safetensors"}, r"other\.safetensors: gone\.weight: expected the shard"),
            ({"gone.weight": "../m/model.safetensors"}, "expected names of files beside it"),
        ):
            index.write_text(json.dumps({"weight_map": weight_map}))
            self.refuse(model, match, (ValueError, FileNotFoundError))  # type: ignore[arg-type]
        index.write_text("{}")
        self.refuse(model, "expected an index with a weight_map")

    def test_options(self, tmp_path: Path) -> None:
        model = write_model(tmp_path / "m")
        for options, match in (
            ({"scheme": "int4"}, "scheme"),
            ({"granularity": "column"}, "granularity"),
            ({"threshold": -1}, "threshold"),
            ({"outliers": "some"}, "outliers"),
            ({"path": "slow"}, "path"),
            ({"format": "gguf"}, "format: expected 'octavo' or 'bitsandbytes'"),
            ({"format": "bitsandbytes", "scheme": "zeropoint"}, "format: expected scheme absmax"),
            ({"jobs": 0}, "jobs: expected at least 1"),
            ({"memory": 0}, "memory: expected at least 1 byte, got 0"),
            ({"memory": -5}, "memory: expected at least 1 byte, got -5"),
            ({"include": ["*.nothing"]}, r"include: expected patterns of linear layers, got '\*\.nothing'"),
            (
                {"outlier_columns": {"lm_head": [1]}},
                "outlier_columns: expected layers that are quantized, got 'lm_head'",
            ),
            ({"outlier_columns": {FC: [16]}}, rf"outlier_columns of {FC}: expected columns in \[0, 16\), got 16"),
            ({"outliers": "static"}, "outliers: expected outlier columns of every layer for 'static'"),
        ):
            self.refuse(model, match, **options)
        self.refuse(model, "skip: expected a sequence", TypeError, skip="*.fc")

    def test_an_output_that_exists(self, tmp_path: Path) -> None:
        model = write_model(tmp_path / "m")
        (tmp_path / "out").mkdir()
        checkpoint.quantize(model, tmp_path / "out", progress=False)  # empty: taken
        before = (tmp_path / "out" / "model.safetensors").read_bytes()
        with pytest.raises(FileExistsError, match="remove it or name another"):
            checkpoint.quantize(model, tmp_path / "out", progress=False, scheme="zeropoint")
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == before

    def test_no_space(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from octavo.checkpoint import convert as module

        monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
        with pytest.raises(OSError, match=r"expected \d+ bytes of free space, got 10"):
            convert(write_model(tmp_path / "m"))


def test_verify_compares_in_any_case(tmp_path: Path) -> None:
    """`verify=False` is for what is read, not for `Checkpoint.verify`."""
    output, _ = convert(write_model(tmp_path / "m"))
    entry = checkpoint.Checkpoint(output).entries[f"{FC}.weight"]
    with (output / "model.safetensors").open("r+b") as file:
        file.seek(entry.offset)
        file.write(b"damage")
    opened = checkpoint.Checkpoint(output, verify=False)
    assert opened.checksums == len(opened.entries)
    opened.weight(FC)
    with pytest.raises(ValueError, match=rf"{FC}\.weight: expected data with CRC-32"):
        opened.verify()
    with pytest.raises(ValueError, match=rf"{FC}\.weight: expected data with CRC-32"):
        checkpoint.Checkpoint(output).weight(FC)
