"""Checkpoints of models that Transformers has: the layers of octavo.torch.quantize_; and calibration."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from support import TORCH

if TORCH.missing:
    pytest.skip(TORCH.missing, allow_module_level=True)
if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)
if importlib.util.find_spec("accelerate") is None:
    pytest.skip("accelerate is not installed", allow_module_level=True)

import octavo
import octavo.torch as ot
import octavo.transformers
import safetensors.torch
import tokenizers
import torch
import transformers
from octavo import checkpoint, cli

SIZES: dict[str, dict[str, Any]] = {
    "OPTForCausalLM": {"hidden_size": 32, "ffn_dim": 64, "num_attention_heads": 4, "word_embed_proj_dim": 16},
    "LlamaForCausalLM": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "BloomForCausalLM": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "GPTNeoXForCausalLM": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4},
    "BertForMaskedLM": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4},
    "T5ForConditionalGeneration": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4}  # Conv1D, which quantize_ leaves alone


def tiny_model(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    fields = {"vocab_size": 99, "max_position_embeddings": 64, **SIZES.get(name, GPT2), **more}
    if "hidden_size" in fields and "n_layer" not in fields:
        fields.setdefault("num_hidden_layers", 2)
    return model_class(model_class.config_class(**fields)).eval()


@pytest.mark.parametrize("form", ["untied", "tied", "tied, in a file of PyTorch", "packed"])
def test_head(tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An output head becomes int8 alike in all ways to convert, unasked; a tied one gets a weight beside the table."""
    model = tiny_model("LlamaForCausalLM", tie_word_embeddings=form != "untied")
    model.save_pretrained(tmp_path / "m")
    if "PyTorch" in form:
        (tmp_path / "m" / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "m" / "pytorch_model.bin")
    words = ["quantize", str(tmp_path / "m"), str(tmp_path / "out"), "--quiet"]
    assert cli.main([*words, *(["--format", "packed"] if form == "packed" else [])]) == 0
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    while_loading = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "m", quantization_config=octavo.transformers.OctavoConfig()
    )
    table = model.model.embed_tokens.weight.detach().clone()
    ot.quantize_(model, progress=False)
    ids = torch.arange(12)[None]
    for each in (model, while_loading, loaded):
        assert isinstance(each.lm_head.weight, ot.Int8Tensor)
        assert torch.equal(each.model.embed_tokens.weight, table)
        assert torch.equal(each(ids).logits, model(ids).logits)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "lm_head" not in config["modules_to_not_convert"]
    summary = checkpoint.inspect(tmp_path / "out", verify=True)
    assert "lm_head" in [layer.name for layer in summary.layers]
    said = "an embedding; lm_head beside it is int8"
    assert (said in summary.as_table()) == (form != "untied")
    assert summary.other_tensors == 1 + 5  # the table and the norms: nothing is there twice
    assert cli.main([*words, "--head", "--format", "bitsandbytes"]) == 2
    assert "head" in capsys.readouterr().err
    (tmp_path / "m" / "config.json").unlink()
    with pytest.raises(ValueError, match="quantize: head: expected a model that Transformers has"):
        checkpoint.quantize(tmp_path / "m", tmp_path / "other", head=True, progress=False)


@pytest.mark.parametrize("how", [{"head": False}, {"rotation": 0}, {"recipe": "paper"}], ids=str)
def test_a_head_that_stays(tmp_path: Path, how: dict[str, Any]) -> None:
    """Where it is said, and where X is not rotated, in all ways to convert."""
    model = tiny_model("LlamaForCausalLM", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "m")
    words = [f"--{name}={value}" for name, value in how.items()] if "head" not in how else ["--no-head"]
    assert cli.main(["quantize", str(tmp_path / "m"), str(tmp_path / "out"), "--quiet", *words]) == 0
    config = octavo.transformers.OctavoConfig(**how)
    load = type(model).from_pretrained
    for each in (
        load(tmp_path / "out"),
        load(tmp_path / "m", quantization_config=config),
        ot.quantize_(model, progress=False, **how),
    ):
        assert each.lm_head.weight is each.model.embed_tokens.weight
        assert not isinstance(each.lm_head.weight, ot.Int8Tensor)


@pytest.mark.parametrize("tied", [False, True])
def test_columns_of_a_head_are_kept(tmp_path: Path, tied: bool) -> None:
    """Calibrated like any other layer's, in memory and from files, and in a file of columns."""
    model = tiny_model("LlamaForCausalLM", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "m")
    criterion: Any = {"relative": 1.2, "cap": 0.2}
    columns = checkpoint.calibrate(tmp_path / "m", progress=False, **criterion)
    assert columns == {n: own.tolist() for n, own in ot.calibrate_(model, progress=False, **criterion).items()}
    assert columns["lm_head"]
    checkpoint.quantize(tmp_path / "m", tmp_path / "out", outlier_columns=columns, progress=False)
    loaded = type(model).from_pretrained(tmp_path / "out")
    ot.quantize_(model, progress=False)
    ids = torch.arange(12)[None]
    for each in (loaded, model):
        weight = each.lm_head.weight
        assert weight.int8_weight.outlier_columns.tolist() == columns["lm_head"]
        assert weight.options == octavo.recipe("best", calibrated=True).keeping(columns)
        assert torch.equal(each(ids).logits, model(ids).logits)
    without = checkpoint.calibrate(tmp_path / "m", head=False, progress=False, **criterion)
    assert without == {name: own for name, own in columns.items() if name != "lm_head"}


@pytest.mark.parametrize("name", [*SIZES, "GPT2LMHeadModel"])
def test_the_layers_of_quantize_(tmp_path: Path, name: str) -> None:
    """The same layers with the same arrays, whatever they are called in the file."""
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "m")
    report = checkpoint.quantize(tmp_path / "m", tmp_path / "out", progress=False)
    loaded = type(model).from_pretrained(tmp_path / "out")
    ot.quantize_(model, progress=False)
    expected, found = (
        {name: weight for name, weight in each.named_parameters() if isinstance(weight, ot.Int8Tensor)}
        for each in (model, loaded)
    )
    if name == "T5ForConditionalGeneration":  # whoever loads it may ask for float16, beside which `wo` stays
        assert {why for layer, why in report.reasons.items() if layer.endswith(".wo")} == {
            "the model keeps it in float32"
        }
        expected = {name: weight for name, weight in expected.items() if not name.endswith(".wo.weight")}
    assert expected.keys() == found.keys()
    assert len(found) == report.layers > 5
    for each, weight in expected.items():
        for part, array in weight.parts().items():
            assert part == "options" or torch.equal(array, found[each].parts()[part]), (each, part)


def test_patterns_match_the_names_of_file_and_model(tmp_path: Path) -> None:
    """GPT-2's published files lack the prefix that the model's names have."""
    tiny_model("GPT2LMHeadModel").save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    state = {name.removeprefix("transformer."): value for name, value in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(state, file)
    for number, pattern in enumerate(("h.0.*", "transformer.h.0.*")):
        checkpoint.quantize(tmp_path / "m", tmp_path / f"{number}", include=[pattern], progress=False)
        layers = checkpoint.Checkpoint(tmp_path / f"{number}").layers
        assert layers.keys() == {f"h.0.{leaf}" for leaf in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}


def test_experts_that_a_file_has_apart(tmp_path: Path) -> None:
    """Each is a layer, which Transformers stacks again."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = tiny_model("MixtralForCausalLM", **sizes, num_hidden_layers=2, num_local_experts=3)
    model.save_pretrained(tmp_path / "m")
    report = checkpoint.quantize(tmp_path / "m", tmp_path / "out", progress=False)
    layers = checkpoint.Checkpoint(tmp_path / "out").layers
    assert sum(".experts." in layer for layer in layers) == 2 * 3 * 3
    assert (report.layers, report.left) == (18 + 2 * 4 + 1, [])  # the router is no linear layer of the model
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        exact = model(ids).logits
        found = type(model).from_pretrained(tmp_path / "out")(ids).logits
    assert 0 < (found - exact).norm() < 0.1 * exact.norm()


def test_a_model_of_diffusers(tmp_path: Path) -> None:
    """Its layers by its own config, its file under the name that diffusers looks for."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    ).eval()  # fmt: skip
    model.save_pretrained(tmp_path / "m")
    report = checkpoint.quantize(tmp_path / "m", tmp_path / "out", progress=False)
    assert (report.layers, report.left) == (sum(type(module) is torch.nn.Linear for module in model.modules()), [])
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 32)
    with torch.no_grad():
        exact = model(x, 3, text).sample
        found = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out")(x, 3, text).sample
    assert 0 < (found - exact).norm() < 0.02 * exact.norm()


def test_code_that_a_model_brings_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = with_tokenizer(tiny_model("OPTForCausalLM"), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    auto_map |= {"AutoTokenizer": [None, "own.OwnTokenizer"]}
    own = {**config, "model_type": "own", "architectures": ["OwnModel"], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(own))
    (folder / "own.py").write_text(
        "import transformers\nprint('code of the model')\n"
        "class OwnConfig(transformers.OPTConfig): model_type = 'own'\n"
        "class OwnModel(transformers.OPTForCausalLM): config_class = OwnConfig\n"
        "class OwnTokenizer(transformers.PreTrainedTokenizerFast): pass\n"
    )
    (tmp_path / "t").write_text("a b c d e f")
    arguments = ["quantize", str(folder), str(tmp_path / "out"), "--calibrate", str(tmp_path / "t"), "--quiet"]
    capsys.readouterr()
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert "brings its own code" in captured.err
    assert "--trust-remote-code" in captured.err
    assert captured.out == ""
    checkpoint.quantize(folder, tmp_path / "plain", progress=False)  # needs none of it
    assert capsys.readouterr().out == ""
    assert cli.main([*arguments, "--trust-remote-code"]) == 0
    assert "code of the model" in capsys.readouterr().out


def with_tokenizer(model: Any, folder: Path) -> Path:
    """Save the model and a tokenizer of letters."""
    model.save_pretrained(folder)
    vocabulary = {chr(97 + i): i for i in range(26)} | {"[UNK]": 26}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "name", ["OPTForCausalLM", "LlamaForCausalLM", "T5ForConditionalGeneration", "GPT2LMHeadModel"]
)
def test_calibrate(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """The columns of calibrate_ on the loaded model reach the checkpoint, by way of a file that is then read."""
    model = tiny_model(name)
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__.endswith("Norm") and module.weight is not None:
                module.weight[3] = 60  # a systematic outlier
    folder = with_tokenizer(model, tmp_path / "m")
    text = tmp_path / "text.txt"
    text.write_text(" ".join("the quick brown fox jumps over a lazy dog".replace(" ", "")) * 3)
    file = tmp_path / "columns.json"
    arguments = ["quantize", str(folder), str(tmp_path / "out"), "--calibrate", str(text)]
    arguments += ["--outlier-columns", str(file), "--quiet", "--recipe", "paper"]
    capsys.readouterr()
    assert cli.main(arguments) == 0
    assert "%|" not in capsys.readouterr().err, "a progress bar in spite of --quiet"
    columns = json.loads(file.read_text())
    # (T5 normalizes by a norm whose weight is shared by nothing, so its outliers show where the norm's output goes.)
    kept = [layer for layer, own in columns.items() if own == [3]]
    assert len(kept) >= 4, columns
    weights = checkpoint.load(tmp_path / "out")
    for layer in kept:
        assert weights[f"{layer}.weight"].outlier_columns.tolist() == [3]

    text.unlink()  # a second run reads the file
    arguments[2] = str(tmp_path / "again")
    assert cli.main(arguments) == 0
    again = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert again == (tmp_path / "out" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("patterns", [["--skip", "*.fc1"], ["--include", "*.fc1"]])
def test_calibrate_what_is_chosen(tmp_path: Path, patterns: list[str]) -> None:
    folder = with_tokenizer(tiny_model("OPTForCausalLM"), tmp_path / "m")
    (tmp_path / "t").write_text("a b c d e f")
    file = tmp_path / "columns.json"
    arguments = ["--calibrate", str(tmp_path / "t"), "--quiet", "--threshold", "0.5", "--outlier-columns", str(file)]
    assert cli.main(["quantize", str(folder), str(tmp_path / "all"), *arguments]) == 0
    of_all = json.loads(file.read_text())
    # The file of all layers serves for some, and so does a calibration.
    assert cli.main(["quantize", str(folder), str(tmp_path / "read"), *arguments, *patterns]) == 0
    file.unlink()
    assert cli.main(["quantize", str(folder), str(tmp_path / "found"), *arguments, *patterns]) == 0
    expected = {layer: own for layer, own in of_all.items() if layer.endswith(".fc1") == (patterns[0] == "--include")}
    assert json.loads(file.read_text()) == expected
    assert len(expected) < len(of_all)
    name = "model.safetensors"
    assert (tmp_path / "read" / name).read_bytes() == (tmp_path / "found" / name).read_bytes()


def test_calibrate_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = with_tokenizer(tiny_model("OPTForCausalLM"), tmp_path / "m")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"empty\.txt: expected text to calibrate with, got none"):
        checkpoint.calibrate(folder, tmp_path / "empty.txt", progress=False)
    (tmp_path / "latin.txt").write_bytes("grün".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt: expected text in UTF-8, got "):
        checkpoint.calibrate(folder, tmp_path / "latin.txt", progress=False)
    (tmp_path / "text.txt").write_text("a b c")
    for options, match in (
        ({"threshold": -1}, "^calibrate: threshold: expected a number >= 0"),
        ({"min_fraction": 2}, "^calibrate: min_fraction: expected a number in"),
        ({"batches": 0}, "^calibrate: batches: expected at least one"),
        ({"include": ["*.none"]}, r"^calibrate: include: expected patterns of linear layers, got '\*\.none'"),
    ):
        with pytest.raises(ValueError, match=match):
            checkpoint.calibrate(folder, tmp_path / "text.txt", progress=False, **options)  # type: ignore[arg-type]
    assert cli.main(["quantize", str(folder), str(tmp_path / "out"), "--calibrate", str(tmp_path / "none.txt")]) == 1
    assert "none.txt" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["safetensors", "pytorch"])
def test_calibration_from_the_disk_finds_what_calibrate_finds(tmp_path: Path, file: str) -> None:
    """The same columns as the model in memory, sequence by sequence; the text ends within a batch and a sequence."""
    model = tiny_model("LlamaForCausalLM", tie_word_embeddings=True)
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__.endswith("Norm"):
                module.weight.copy_(torch.linspace(0.1, 12, 32))
    folder = with_tokenizer(model, tmp_path / "m")
    if file == "pytorch":
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    letters = "the quick brown fox jumps over a lazy dog".replace(" ", "") * 11
    text = tmp_path / "text.txt"
    text.write_text(" ".join(letters))
    tokens = [ord(letter) - 97 for letter in letters]
    sequences = [torch.tensor([tokens[start : start + 64]]) for start in range(0, len(tokens), 64)]
    assert [sequence.shape[1] for sequence in sequences] == [64] * 5 + [43]
    expected = ot.calibrate_(model, sequences, recipe="paper", min_fraction=0.3, skip=("lm_head",), progress=False)
    found = checkpoint.calibrate(folder, text, recipe="paper", min_fraction=0.3, progress=False)
    assert found == {name: own.tolist() for name, own in expected.items()}
    assert len({tuple(own) for own in found.values()}) > 1
    fewer = ot.calibrate_(model, sequences[:4], recipe="paper", min_fraction=0.3, skip=("lm_head",), progress=False)
    assert checkpoint.calibrate(folder, text, recipe="paper", min_fraction=0.3, batches=1, progress=False) == {
        name: own.tolist() for name, own in fewer.items()
    }


def test_calibration_without_a_text(tmp_path: Path) -> None:
    """What calibrate_ finds in memory; from the shell by the criterion of a recipe. There is no tokenizer."""
    model = tiny_model("LlamaForCausalLM")
    model.save_pretrained(tmp_path / "m")
    criterion: Any = {"relative": 2.0, "cap": 0.1}
    expected = ot.calibrate_(model, progress=False, **criterion)
    assert any(map(len, expected.values()))
    found = {name: own.tolist() for name, own in expected.items()}
    assert checkpoint.calibrate(tmp_path / "m", progress=False, **criterion) == found
    words = f"quantize {tmp_path / 'm'} {tmp_path / 'q'} --recipe best --relative 2 --cap 0.1 --quiet"
    words += f" --outlier-columns {tmp_path / 'columns.json'} --calibrate"
    assert cli.main(words.split()) == 0
    assert json.loads((tmp_path / "columns.json").read_text()) == found


# What is freed goes back at once: what glibc keeps for the next time, by thread and as a heap with holes, differs from
# run to run by more than what is measured.
GIVE_BACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
PEAK = """
    import sys
    import torch
    from octavo import checkpoint

    def peak():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024

    small, large, text = sys.argv[1:]
    torch.set_num_threads(1)
    checkpoint.calibrate(small, text, progress=False)
    before = peak()
    columns = checkpoint.calibrate(large, text, progress=False)
    print(peak() - before, len(columns))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc/self/status to read the peak from")
def test_calibration_does_not_hold_the_model(tmp_path: Path) -> None:
    """Of a model of 100 MB, and its mapped files, at most two of its largest weights, of 3.6 MB, and 20 MB of the rest.

    That is activations, allocators, and transformers' objects.
    """
    name, sizes = "LlamaForCausalLM", {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8}
    large = tiny_model(name, **sizes).to(torch.bfloat16)
    size = sum(parameter.nbytes for parameter in large.parameters())
    largest = max(parameter.nbytes for parameter in large.parameters())
    assert size > 95e6
    with_tokenizer(large, tmp_path / "large")
    del large
    with_tokenizer(tiny_model(name).to(torch.bfloat16), tmp_path / "small")
    text = tmp_path / "text.txt"
    text.write_text(" ".join("the quick brown fox jumps over a lazy dog".replace(" ", "")) * 8)
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PEAK), str(tmp_path / "small"), str(tmp_path / "large"), str(text)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **GIVE_BACK},
    )
    assert run.returncode == 0, run.stderr
    peak, layers = map(int, run.stdout.split())
    print(f"model {size / 1e6:.0f} MB, largest weight {largest / 1e6:.1f} MB, peak {peak / 1e6:.1f} MB")
    assert layers == 57
    assert 0 < peak < 2 * largest + 20e6


class TestKL:
    """The dial."""

    def model(self, tmp_path: Path) -> tuple[Any, Path, Path]:
        """A model whose logits differ, its folder, and a text of 11 sequences."""
        model = tiny_model("LlamaForCausalLM")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(6 if parameter.dim() == 2 else 1)
        text = tmp_path / "text.txt"
        text.write_text(" ".join("the quick brown fox jumps over a lazy dog".replace(" ", "") * 20))
        return model, with_tokenizer(model, tmp_path / "m"), text

    def test_what_is_asked_is_kept_noted_and_loaded(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        model, folder, text = self.model(tmp_path)
        loose = checkpoint.choose_options(folder, 10.0, text, progress=False)
        asked = loose.kl / 4
        output = tmp_path / "out"
        words = ["quantize", str(folder), str(output), "--kl", str(asked), "--calibrate", str(text), "--quiet"]
        assert cli.main(words) == 0
        tight = checkpoint.choose_options(folder, asked, text, progress=False)
        ways = {str(options) for options in tight.options.values()}
        assert {str(options) for options in loose.options.values()} == {str(octavo.Options(outliers="none"))}
        assert len(ways) > 2
        assert 0 < tight.kl <= asked < loose.kl
        # The files have what was chosen ...
        opened = checkpoint.Checkpoint(output)
        int8 = {layer: options for layer, options in tight.options.items() if options is not None}
        assert {layer: opened.options(layer) for layer in opened.layers} == int8
        assert opened.measured == tight.notes()
        assert set(opened.kept) == {"lm_head", *tight.options.keys() - int8.keys()}
        capsys.readouterr()
        assert cli.main(["inspect", str(output)]) == 0
        assert f"kl             {tight.kl:.3g}\n" in capsys.readouterr().out
        # ... and whoever loads them gets the divergence that was measured, on the last third of the text.
        loaded = type(model).from_pretrained(output, dtype=torch.float32)
        letters = text.read_text().split()
        ids = torch.tensor([ord(letter) - 97 for letter in letters])
        sequences = list(ids.split(64))
        total, tokens = 0.0, 0
        with torch.no_grad():
            for sequence in sequences[2 * (len(sequences) // 3) :]:
                exact, found = (each(sequence[None]).logits[0].log_softmax(-1) for each in (model, loaded))
                total += float((exact.exp() * (exact - found)).sum())
                tokens += len(sequence)
        assert tokens == tight.tokens
        assert total / tokens == pytest.approx(tight.kl, rel=1e-3)

    def test_what_cannot_be(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        _, folder, text = self.model(tmp_path)
        for bound in (0.0, -1.0, float("inf"), float("nan")):
            with pytest.raises(ValueError, match=r"^quantize: kl: expected a number above 0, got "):
                checkpoint.choose_options(folder, bound, text, progress=False)
        (tmp_path / "short.txt").write_text("a b c")
        with pytest.raises(ValueError, match=r"short\.txt: expected text of more than"):
            checkpoint.choose_options(folder, 0.1, tmp_path / "short.txt", progress=False)
        encoder = with_tokenizer(tiny_model("BertModel", **SIZES["BertForMaskedLM"]), tmp_path / "encoder")
        with pytest.raises(ValueError, match=r"^quantize: kl: expected a model that gives logits, got BaseModel"):
            checkpoint.choose_options(encoder, 0.1, text, progress=False)
        assert cli.main(["quantize", str(folder), str(tmp_path / "out"), "--kl", "1", "--rotation", "16"]) == 2
        assert "--kl chooses the options" in capsys.readouterr().err
        output = tmp_path / "out"
        layers = {"model.layers.0.mlp.up_proj": None}
        with pytest.raises(ValueError, match="layer_options: expected a layer that becomes int8, got 16 bit for all"):
            checkpoint.quantize(folder, output, include=["*0.mlp.up_proj"], layer_options=layers, progress=False)
        with pytest.raises(ValueError, match=r"layer_options: expected layers that are quantized, got 'model\.norm'"):
            checkpoint.quantize(folder, output, layer_options={"model.norm": None}, progress=False)
