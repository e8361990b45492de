"""octavo.transformers: every family of models that the guide names, scaled down, with random weights."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
import types
from collections.abc import Iterator
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

import huggingface_hub
import octavo
import safetensors.torch
import torch
import transformers
from model_families import FAMILIES, family_inputs, family_model, relative_error
from octavo import checkpoint
from octavo.torch import Int8Tensor, quantize_
from octavo.transformers import Int8Stack, OctavoConfig
from safetensors.torch import load_file, save_file
from tiny_models import tiny_inputs, tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 1000  # of test_memory


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function: family -> folder of its float32 model."""
    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            family_model(name).save_pretrained(root / name)
        return root / name

    return folder


def load(folder: Path, **options: Any) -> Any:
    """The model of a folder, by the class that its config names."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder, **options).eval()


def convert(folder: Path, **options: Any) -> Any:
    return load(folder, quantization_config=OctavoConfig(**options))


def outputs(model: Any) -> torch.Tensor:
    """The first floating-point tensor that the model gives."""
    with torch.no_grad():
        found: torch.Tensor = model(**family_inputs(model))[0]
    return found


def int8_weights(model: nn.Module) -> dict[str, Int8Tensor]:
    return {name: weight for name, weight in model.named_parameters() if isinstance(weight, Int8Tensor)}


def left_layers(model: nn.Module) -> set[str]:
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not isinstance(module.weight, Int8Tensor)
    }


@contextlib.contextmanager
def log_of_transformers(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What it and octavo log, in `caplog`: transformers' loggers do not reach pytest by themselves."""
    logger = transformers.utils.logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    try:
        yield
    finally:
        logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("name", FAMILIES)
def test_families(tmp_path: Path, folders: Any, name: str) -> None:
    """Converted while loading, by quantize_, saved and loaded: the same int8 weights, and nearly the same outputs."""
    family = FAMILIES[name]
    original, model = load(folders(name)), convert(folders(name))
    assert {re.sub(r"\d+", "#", layer) for layer in left_layers(model)} == set(family.left)
    assert not [key for key, weight in model.named_parameters() if weight.dim() == 3 and "experts" in key]
    # A head that was tied to the embedding has a weight of its own.
    tied = int8_weights(model).keys() & original.all_tied_weights_keys
    untied = [original.get_parameter(key).numel() for key in tied]
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in original.parameters()) + sum(untied)
    in_place = quantize_(load(folders(name)), progress=False)
    assert int8_weights(in_place).keys() == int8_weights(model).keys()
    model.save_pretrained(tmp_path / "a")  # before RWKV rescales its weights
    in_place.save_pretrained(tmp_path / "b")
    expected, found = outputs(original), outputs(model)
    assert 1e-4 < relative_error(found, expected) < family.error
    for other in (in_place, load(tmp_path / "a"), load(tmp_path / "b")):
        assert int8_weights(other).keys() == int8_weights(model).keys()
        assert torch.equal(outputs(other), found)
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    # A reader without octavo finds no tensor under the name of a weight that is int8.
    stored = {key.removesuffix(".codes") for key in first if key.endswith(".codes")}
    assert len(stored) == len({id(weight) for weight in int8_weights(model).values()})
    assert not stored & first.keys()

    model.dequantize()
    assert not int8_weights(model)
    assert relative_error(outputs(model), expected) < family.error
    assert {key for key, _ in model.named_parameters()} == {key for key, _ in original.named_parameters()}


def test_the_guide_names_the_families_that_are_tested() -> None:
    page = (ROOT / "docs" / "guide" / "what-works-with-what.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert named == list(FAMILIES)


def test_bytes(tmp_path: Path) -> None:
    """Half of bfloat16's, but for a scale and a sum for each row; in the model and in its file."""
    model = tiny_model("LlamaForCausalLM", hidden_size=256, intermediate_size=512, num_attention_heads=4).bfloat16()
    model.save_pretrained(tmp_path / "16")
    before = sum(layer.weight.nbytes for name, layer in model.named_modules() if "_proj" in name)
    int8 = convert(tmp_path / "16")
    after = sum(weight.int8_weight.nbytes for weight in int8_weights(int8).values())
    assert 0.5 < after / before < 0.525
    int8.save_pretrained(tmp_path / "8")
    saved = sum(t.nbytes for key, t in load_file(tmp_path / "8" / "model.safetensors").items() if "_proj" in key)
    assert saved < 0.54 * before


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "GPTNeoXForCausalLM", "MixtralForCausalLM", "BertForMaskedLM"])
def test_checkpoints_of_octavo_quantize(tmp_path: Path, folders: Any, name: str) -> None:
    """The same weights from octavo quantize as from loading; experts are apart in its files."""
    checkpoint.quantize(folders(name), tmp_path / "int8", progress=False)
    loaded, converted = load(tmp_path / "int8"), convert(folders(name))
    assert int8_weights(loaded).keys() == int8_weights(converted).keys()
    assert torch.equal(outputs(loaded), outputs(converted))


def version_1(folder: Path) -> None:
    """Rewrite what save_pretrained wrote as the first version of the format had it."""
    state = load_file(folder / "model.safetensors")
    old: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        name, _, part = key.rpartition(".")
        if f"{name}.codes" not in state:
            old[key] = tensor
            continue
        layer = name.removesuffix(".weight")
        if part == "options":
            options = json.loads(bytes(tensor.numpy()))
            options["format_version"] = 1
            del options["dtype"]
            tensor = torch.frombuffer(bytearray(json.dumps(options).encode()), dtype=torch.uint8)
        old[f"{layer}.{ {'codes': 'weight', 'options': '_extra_state'}.get(part, part) }"] = tensor
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 1
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "MixtralForCausalLM"])
def test_format_version_1_is_read(tmp_path: Path, folders: Any, name: str) -> None:
    model = convert(folders(name))
    model.save_pretrained(tmp_path)
    version_1(tmp_path)
    assert not any(key.endswith(".codes") for key in load_file(tmp_path / "model.safetensors"))
    assert torch.equal(outputs(load(tmp_path)), outputs(model))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_folders_of_bitsandbytes_are_read(tmp_path: Path, folders: Any, name: str) -> None:
    """By whoever asks for octavo, with their options where the caller gives none."""
    their_config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=4.0)
    theirs = load(folders(name), quantization_config=their_config)
    theirs.save_pretrained(tmp_path / "theirs")
    model, rows = convert(tmp_path / "theirs"), convert(tmp_path / "theirs", outliers="rows")
    their_layers = {name for name, module in theirs.named_modules() if type(module).__name__ == "Linear8bitLt"}
    assert {f"{layer}.weight" for layer in their_layers} == int8_weights(model).keys()
    assert {(w.options.outliers, w.options.threshold) for w in int8_weights(model).values()} == {("columns", 4.0)}
    assert {(w.options.outliers, w.options.threshold) for w in int8_weights(rows).values()} == {("rows", 4.0)}
    for layer in their_layers:
        assert torch.equal(model.get_submodule(layer).weight.int8_weight.codes, theirs.get_submodule(layer).weight.data)
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(outputs(load(tmp_path / "ours")), outputs(model))
    assert relative_error(outputs(model), outputs(load(folders(name)))) < 0.1


def test_config_json(tmp_path: Path, folders: Any) -> None:
    model = convert(folders("OPTForCausalLM"), scheme="zeropoint", threshold=3.0, outliers="rows")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    options = octavo.recipe("best").changed(scheme="zeropoint", threshold=3.0, outliers="rows").to_dict()
    head = {"quant_method": None, "octavo": "load with: import octavo.transformers", "format_version": 2}
    assert config == {**head, **options, "modules_to_not_convert": []}
    again = load(tmp_path)
    assert {weight.options for weight in int8_weights(again).values()} == {octavo.Options.from_dict(options)}
    assert torch.equal(outputs(again), outputs(model))
    assert octavo.transformers.OctavoConfig.from_dict(config).options() == octavo.Options.from_dict(options)


def test_options_given_at_load_are_followed(tmp_path: Path, folders: Any) -> None:
    """How a layer computes is no property of its codes; how they were made is."""
    convert(folders("LlamaForCausalLM"), threshold=3.0).save_pretrained(tmp_path)
    model = convert(tmp_path, outliers="rows")
    assert {(w.options.outliers, w.options.threshold) for w in int8_weights(model).values()} == {("rows", 3.0)}
    assert model.config.quantization_config.outliers == "rows"
    assert convert(tmp_path, path="weight_only").model.layers[0].mlp.up_proj.path == "weight_only"
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        convert(tmp_path, scheme="zeropoint")


def run(program: str, *arguments: str, **environment: str) -> str:
    """What a new process prints."""
    command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**os.environ, **environment}, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_an_import(tmp_path: Path, folders: Any) -> None:
    """PyTorch loads the entry point, which takes less than 5 ms and imports neither octavo nor Transformers."""
    convert(folders("OPTForCausalLM")).save_pretrained(tmp_path)
    program = """
        import sys, time
        import torch
        import octavo_autoload
        assert not {"octavo", "transformers"} & sys.modules.keys()
        sys.meta_path = [finder for finder in sys.meta_path if not isinstance(finder, octavo_autoload._Finder)]
        del sys.modules["octavo_autoload"]
        begin = time.process_time()
        import octavo_autoload
        octavo_autoload.init()
        assert time.process_time() - begin < 0.005
        from transformers import AutoModelForCausalLM
        from transformers.quantizers.auto import AutoQuantizationConfig
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
        config = AutoQuantizationConfig.from_pretrained(sys.argv[1])
        print(type(model.model.decoder.layers[0].fc1.weight).__name__, type(config).__name__)
    """
    assert run(program, str(tmp_path)).split() == ["Int8Tensor", "OctavoConfig"]


def test_loading_in_inference_mode(tmp_path: Path, folders: Any) -> None:
    model = convert(folders("OPTForCausalLM"))
    model.save_pretrained(tmp_path)
    inputs = tiny_inputs(model)
    with torch.inference_mode():
        loaded = type(model).from_pretrained(tmp_path)
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_without_the_entry_point(tmp_path: Path, folders: Any) -> None:
    """Transformers refuses, until octavo is imported: codes are never taken for weights."""
    convert(folders("OPTForCausalLM")).save_pretrained(tmp_path)
    program = """
        import sys
        from transformers import AutoModelForCausalLM
        try:
            AutoModelForCausalLM.from_pretrained(sys.argv[1])
        except ValueError as error:
            print(error)
        import octavo.transformers
        print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1]).model.decoder.layers[0].fc1.weight).__name__)
    """
    refused, loaded = run(program, str(tmp_path), OCTAVO_AUTOLOAD="0").splitlines()
    assert refused.startswith("The model's quantization config")
    assert loaded == "Int8Tensor"


def test_calibrated_columns(tmp_path: Path, folders: Any) -> None:
    """Their 16-bit weights go into the file by every way, and come back."""
    name = "model.layers.0.self_attn.q_proj"
    original = load(folders("LlamaForCausalLM"))
    expected = original.get_submodule(name).weight[:, [3, 5]].clone()
    setattr(original.get_submodule(name), "octavo_outlier_columns", torch.tensor([3, 5], dtype=torch.int32))  # noqa: B010
    quantize_(original, skip=["*.mlp.*", "lm_head"], progress=False).save_pretrained(tmp_path / "a")
    columns = {name: [3, 5]}
    checkpoint.quantize(
        folders("LlamaForCausalLM"),
        tmp_path / "b",
        outlier_columns=columns,
        skip=["*.mlp.*", "lm_head"],
        progress=False,
    )
    for folder in "ab":
        model = load(tmp_path / folder)
        assert left_layers(model) == {"lm_head"} | {
            f"model.layers.{i}.mlp.{p}_proj" for i in range(2) for p in ("gate", "up", "down")
        }
        layer = model.get_submodule(name)
        assert layer.outlier_columns.tolist() == [3, 5]
        assert torch.equal(layer.outlier_weight, expected)
        assert torch.equal(outputs(model), outputs(original))


def test_experts_by_index_and_at_once() -> None:
    """An Int8Stack against the dequantized parameter in whose place it is."""
    weights = torch.randn(3, 8, 5)
    stack = Int8Stack(Int8Tensor.from_float(weight, octavo.Options(path="weight_only")) for weight in weights)
    whole, x = stack.dequantize(), torch.randn(3, 4, 5)
    assert (stack.shape, stack.dtype, len(stack)) == (whole.shape, whole.dtype, 3)
    torch.testing.assert_close(x[1] @ stack[torch.tensor(1)].t(), x[1] @ whole[1].t())
    transposed = Int8Stack(weight.t() for weight in stack)
    torch.testing.assert_close(torch.bmm(x, transposed), torch.bmm(x, whole.mT))
    with pytest.raises(TypeError, match="leave this module in 16 bit with modules_to_not_convert"):
        torch.einsum("eik,enk->ein", x, stack)


def test_generation_and_pipeline(tmp_path: Path, folders: Any) -> None:
    from tiny_models import write_language_model

    model = convert(folders("LlamaForCausalLM"), outliers="rows")
    ids = torch.tensor([[5, 6, 7, 8]])
    length = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    tokens = model.generate(ids, **length)
    assert torch.equal(model.generate(ids, **length, use_cache=False), tokens)
    write_language_model(tmp_path, model)
    generate = transformers.pipeline("text-generation", model=str(tmp_path), device_map="auto")
    assert int8_weights(generate.model)
    text = generate("w5 w6 w7 w8", **length)[0]["generated_text"]
    assert text.replace(" ", "").replace("?", "w16") == "".join(f"w{i}" for i in tokens[0].tolist())


@pytest.mark.parametrize("int8", [True, False], ids=["int8", "16 bit"])
def test_device_map(tmp_path: Path, folders: Any, int8: bool) -> None:
    """All that has its place on "cpu", where something has another, accelerate takes away: here, to the CPU itself."""
    folder = folders("MixtralForCausalLM")
    original = convert(folder)
    others = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head")
    places: dict[str, Any] = {**dict.fromkeys(others, torch.device("cpu")), "model.layers.1": "cpu"}
    if int8:
        folder = tmp_path / "int8"
        original.save_pretrained(folder)
    model = load(folder, device_map=places, **({} if int8 else {"quantization_config": OctavoConfig()}))
    away = {name for name, weight in int8_weights(model).items() if weight.device.type == "meta"}
    assert away == {name for name in int8_weights(original) if name.startswith("model.layers.1.")}
    for _ in range(2):
        assert torch.equal(outputs(model), outputs(original))


def test_parts_of_a_model(tmp_path: Path, folders: Any) -> None:
    """The encoder of an int8 model, saved by itself; a base model of a causal one, and a classifier over it."""
    whole = convert(folders("T5ForConditionalGeneration"))
    whole.save_pretrained(tmp_path / "whole")
    ids = tiny_inputs(whole)["input_ids"]
    expected = whole.encoder(ids)[0]
    assert torch.equal(transformers.T5EncoderModel.from_pretrained(tmp_path / "whole")(ids)[0], expected)
    model = convert(folders("LlamaForCausalLM"))
    model.save_pretrained(tmp_path / "llama")
    model.model.save_pretrained(tmp_path / "base")
    expected = model.model(ids)[0]
    for folder in ("llama", "base"):
        assert torch.equal(transformers.AutoModel.from_pretrained(tmp_path / folder)(ids)[0], expected)
    more = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "llama", num_labels=3)
    assert torch.equal(more.model(ids)[0], expected)


def test_shards(tmp_path: Path, folders: Any) -> None:
    model = convert(folders("LlamaForCausalLM"))
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(outputs(load(tmp_path)), outputs(model))


def test_push_to_hub(tmp_path: Path, folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sent are the files that save_pretrained writes."""
    sent: dict[str, bytes] = {}

    def commit(_: Any, *, operations: Any, **more: Any) -> None:
        sent.update({one.path_in_repo: Path(one.path_or_fileobj).read_bytes() for one in operations})

    repository = types.SimpleNamespace(repo_id="somebody/int8")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: repository)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", commit)
    card = huggingface_hub.ModelCard("---\n{}\n---\n")
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: card)
    model = convert(folders("LlamaForCausalLM"))
    model.push_to_hub("somebody/int8", max_shard_size="10KB")
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert {name for name in sent if name != "README.md"} == {file.name for file in tmp_path.iterdir()}
    for file in tmp_path.iterdir():
        if file.suffix == ".safetensors":  # whose header has no order
            ours, theirs = load_file(file), safetensors.torch.load(sent[file.name])
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
        else:
            assert sent[file.name] == file.read_bytes()


def test_what_is_left(folders: Any) -> None:
    """Names, patterns, what is below them; never inside of names. The caller's config stays as it is."""
    patterns = ["decoder.layers.0.fc1", "fc2", "*.layers.1.self_attn", "c1"]
    config = OctavoConfig(modules_to_not_convert=patterns)
    model = load(folders("OPTForCausalLM"), quantization_config=config)
    kept = {f"model.decoder.layers.{i}.fc2" for i in range(2)} | {"model.decoder.layers.0.fc1"}
    kept |= {f"model.decoder.layers.1.self_attn.{p}" for p in ("q_proj", "k_proj", "v_proj", "out_proj")}
    assert left_layers(model) == kept
    assert model.config.quantization_config.modules_to_not_convert == sorted(kept)
    assert config.modules_to_not_convert == patterns


@pytest.mark.parametrize("tied", [False, True])
def test_an_int8_head(tmp_path: Path, tied: bool) -> None:
    """Tied or not, it can be resized."""
    original = tiny_model("LlamaForCausalLM", tie_word_embeddings=tied)
    original.save_pretrained(tmp_path)
    model = convert(tmp_path)
    assert left_layers(model) == set()
    model.save_pretrained(tmp_path / "int8")
    assert torch.equal(outputs(load(tmp_path / "int8")), outputs(model))
    model.resize_token_embeddings(23, mean_resizing=False)
    assert outputs(model).shape[-1] == 23
    assert relative_error(outputs(model)[..., :17], outputs(original)) < 0.05


@pytest.mark.parametrize(
    "name", ["OPTForCausalLM", "LlamaForCausalLM", "BertForMaskedLM", "T5ForConditionalGeneration"]
)
def test_a_head_when_asked_for(tmp_path: Path, folders: Any, name: str) -> None:
    """Also one that is tied: its int8 weight stands beside the embedding, which stays as it is."""
    original, model = load(folders(name)), convert(folders(name), head=True, recipe="paper")
    head = model.get_output_embeddings()
    assert isinstance(head.weight, Int8Tensor)
    assert left_layers(model) == set()
    assert torch.equal(model.get_input_embeddings().weight, original.get_input_embeddings().weight)
    in_place = quantize_(load(folders(name)), head=True, recipe="paper", progress=False)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    for other in (in_place, again):
        assert int8_weights(other).keys() == int8_weights(model).keys()
        assert torch.equal(outputs(other), outputs(model))
    assert relative_error(outputs(model), outputs(original)) < 0.1
    again.dequantize()
    assert {key for key, _ in again.named_parameters()} == {key for key, _ in original.named_parameters()}


@pytest.mark.parametrize("made_by", ["from_pretrained", "octavo quantize"])
def test_t5_in_float16(tmp_path: Path, made_by: str) -> None:
    """`wo` overflows float16, so Transformers keeps it in float32: an int8 one computes in float32, too."""
    original = tiny_model("T5ForConditionalGeneration")
    for name, parameter in original.named_parameters():
        if name.endswith("wo.weight"):
            parameter.data.mul_(3e4)
    original.save_pretrained(tmp_path / "m")
    more: dict[str, Any] = {"quantization_config": OctavoConfig(recipe="paper")}
    folder = tmp_path / "m"
    if made_by == "octavo quantize":
        folder, more = tmp_path / "int8", {}
        checkpoint.quantize(tmp_path / "m", folder, recipe="paper", progress=False)
    model = load(folder, dtype=torch.float16, **more)
    wo = [module.weight.dtype for name, module in model.named_modules() if name.endswith(".wo")]
    assert set(wo) == {torch.float32}
    assert relative_error(outputs(model), outputs(original)) < 0.08


def test_a_classifier_stays(tmp_path: Path) -> None:
    config = transformers.BertConfig(vocab_size=17, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    for kind in (transformers.BertForSequenceClassification, transformers.BertForTokenClassification):
        # The second one's head, for which the checkpoint has no weights, is made by transformers.
        model = kind.from_pretrained(tmp_path, quantization_config=OctavoConfig())
        assert left_layers(model) == {"classifier"}
        assert torch.isfinite(model(torch.tensor([[1, 2]])).logits).all()


def test_names_that_look_like_parts(tmp_path: Path) -> None:
    """Modules called "scale" and "codes": octavo's names are matched whole."""

    class Odd(transformers.PreTrainedModel):
        config_class = transformers.LlamaConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.scale = nn.Linear(16, 16)
            self.codes = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))
            self.options = nn.Parameter(torch.ones(16))
            self.post_init()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.codes(self.scale(x)) * self.options
            return found

    model = Odd(transformers.LlamaConfig())
    x = torch.randn(3, 16)
    expected = quantize_(model, progress=False)(x)
    model.save_pretrained(tmp_path)
    again = Odd.from_pretrained(tmp_path)
    assert len(int8_weights(again)) == 2
    assert torch.equal(again(x), expected)


def test_compile() -> None:
    """Without a graph break, but of a mixture of experts, whose loop over the experts needed breaks it."""
    for name, fullgraph in (("OPTForCausalLM", True), ("MixtralForCausalLM", False)):
        model = quantize_(tiny_model(name, num_hidden_layers=1), progress=False)
        expected = outputs(model)
        compiled = torch.compile(model, fullgraph=fullgraph, backend="aot_eager")
        with torch.no_grad():
            found = compiled(**tiny_inputs(model), use_cache=False)[0]
        # Sums of norms may end in another last bit, which now and then makes another code.
        assert relative_error(found, expected) < 0.02
        torch.compiler.reset()


def test_refusals(tmp_path: Path, folders: Any, caplog: pytest.LogCaptureFixture) -> None:
    folder = folders("OPTForCausalLM")
    with pytest.raises(ValueError, match=r"outliers: expected 'columns', 'rows' or 'none'.*got 'static'"):
        convert(folder, outliers="static")
    some = {"": "cpu", "model.decoder.layers.1": "disk"}
    with pytest.raises(ValueError, match="got 'disk': octavo's layers are not offloaded to it"):
        load(folder, quantization_config=OctavoConfig(), device_map=some, offload_folder=str(tmp_path))
    for wrong in ({"scheme": "int7"}, {"threshold": -1.0}, {"threshhold": 5.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            OctavoConfig(**wrong)
    with pytest.raises(ValueError, match="format_version: expected 1 to 3, got 4: update octavo"):
        OctavoConfig(format_version=4)
    with pytest.raises(TypeError, match="modules_to_not_convert: expected a sequence of names, got a string"):
        OctavoConfig(modules_to_not_convert="lm_head")

    convert(folder).save_pretrained(tmp_path / "int8")
    file = tmp_path / "int8" / "model.safetensors"
    tensors = load_file(file)
    gone = next(key for key in tensors if key.endswith("layers.0.fc1.weight.scale"))
    save_file({key: tensor for key, tensor in tensors.items() if key != gone}, file, metadata={"format": "pt"})
    with log_of_transformers(caplog), pytest.raises(RuntimeError, match="conversion of the weights"):
        load(tmp_path / "int8")
    assert "layers.0.fc1.weight: expected a tensor 'scale', got none" in caplog.text
    original = family_model("OPTForCausalLM")
    save_file({key: t.clone() for key, t in original.state_dict().items()}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"expected int8 weights, as config\.json says, got none"):
        load(tmp_path / "int8")

    original.model.decoder.layers[0].fc1.weight.data[0, 0] = torch.nan
    original.save_pretrained(tmp_path / "nan")
    with log_of_transformers(caplog), pytest.raises(RuntimeError, match="conversion of the weights"):
        convert(tmp_path / "nan")
    assert "quantize_weight: weight: expected finite values" in caplog.text


MEASURE = """
    import gc, re, sys, threading, time
    import torch, transformers
    from octavo.transformers import OctavoConfig

    def private():
        with open("/proc/self/status") as status:
            return int(re.search(r"RssAnon:\\s+(\\d+)", status.read())[1]) * 1024

    def watch():
        global peak
        while not done:
            peak = max(peak, private())
            time.sleep(0.001)

    torch.set_num_threads(1)
    # What a first load imports is not the model's memory; what it leaves behind must not be there for the next one.
    transformers.LlamaForCausalLM.from_pretrained(sys.argv[2], quantization_config=OctavoConfig())
    gc.collect()
    done, before = False, private()
    peak = before
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = transformers.LlamaForCausalLM.from_pretrained(sys.argv[1], quantization_config=OctavoConfig())
    done = True
    watcher.join()
    held = sum(getattr(t, "int8_weight", t).nbytes for t in [*model.parameters(), *model.buffers()])
    with open("/proc/self/smaps") as maps:
        mapped = sum(".safetensors" in line for line in maps)
    print(peak - before, private() - before, held, mapped)
"""


def test_memory(tmp_path: Path) -> None:
    """The 16-bit model is never in memory: 200 MB of it, in four files, converted within the int8 model and one weight.

    What is counted is private memory (RssAnon): transformers maps the files, whose pages the system takes back when it
    needs them. malloc is told to give freed memory back at once, as it does by itself for weights above 32 MB.
    """
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc/self/status, which only Linux has")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_attention_heads=16,
        num_hidden_layers=8,
        vocab_size=VOCABULARY,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.uniform_(-0.05, 0.05)
    size = sum(parameter.nbytes for parameter in model.parameters())
    largest = max(parameter.nbytes for parameter in model.parameters())
    assert size > 190e6
    model.save_pretrained(tmp_path / "model", max_shard_size="60MB")
    del model
    small = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=64, num_attention_heads=2, num_hidden_layers=1, vocab_size=VOCABULARY
    )
    transformers.LlamaForCausalLM(small).save_pretrained(tmp_path / "small")
    given_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), str(tmp_path / "model"), str(tmp_path / "small")],
        capture_output=True,
        text=True,
        env={**os.environ, **given_back},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    peak, after, held, mapped = map(int, run.stdout.split())
    print(f"16 bit {size / 1e6:.0f} MB, int8 {held / 1e6:.0f} MB; peak {peak / 1e6:.0f} MB, after {after / 1e6:.0f} MB")
    assert held < 0.53 * size
    # What is converted, its codes and their packed form, 2 weights; and the loader's own objects, measured as 10 MB.
    assert peak < held + 2 * largest + 20e6
    # That the model was seen at all: what the first load left behind, measured as up to 18 MB, may be used again.
    assert peak > held - 20e6
    assert peak < 0.75 * size
    assert after < held + 20e6
    assert mapped == 0  # what stays in 16 bit does not hold the files in memory either
