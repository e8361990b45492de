"""octavo.transformers: real configurations scaled down, with random weights."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
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

import octavo
import tokenizers
import torch
import transformers
from octavo import checkpoint
from octavo.torch import Int8Linear
from octavo.transformers import Int8Experts, OctavoConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.pytorch_utils import Conv1D

# hidden 256, so that a scale and a sum for each row (8 bytes) stay small beside it
LAYERS = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
KEY_VALUES = {"num_key_value_heads": 2}
SIZES: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {"n_embd": 256, "n_layer": 2, "n_head": 4},
    "OPTForCausalLM": {**LAYERS, "ffn_dim": 1024, "word_embed_proj_dim": 256},
    "BloomForCausalLM": {"hidden_size": 256, "n_layer": 2, "n_head": 4},
    "GPTJForCausalLM": {"n_embd": 256, "n_layer": 2, "n_head": 4, "rotary_dim": 16},
    "GPTNeoXForCausalLM": {**LAYERS, "intermediate_size": 1024},
    "LlamaForCausalLM": {**LAYERS, **KEY_VALUES, "intermediate_size": 688},
    "MistralForCausalLM": {**LAYERS, **KEY_VALUES, "intermediate_size": 896},
    "Qwen2ForCausalLM": {**LAYERS, **KEY_VALUES, "intermediate_size": 1376},
    "GemmaForCausalLM": {**LAYERS, "num_key_value_heads": 1, "head_dim": 64, "intermediate_size": 2048},
    "MixtralForCausalLM": {**LAYERS, **KEY_VALUES, "intermediate_size": 896, "num_local_experts": 4},
    "Qwen3MoeForCausalLM": {
        **LAYERS,
        **KEY_VALUES,
        "head_dim": 64,
        "intermediate_size": 768,
        "moe_intermediate_size": 256,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    "BertForMaskedLM": {**LAYERS, "intermediate_size": 1024},
    "T5ForConditionalGeneration": {"d_model": 256, "d_kv": 64, "d_ff": 1024, "num_layers": 2, "num_heads": 4},
}
# Relative error of the logits, |int8 - bfloat16| / |bfloat16|: each layer adds about 1 % (of codes of 8 bits), as much
# again where a token whose router is undecided gets another expert.
LOGITS, LOGITS_OF_EXPERTS = 0.04, 0.08
EXPERTS = ("MixtralForCausalLM", "Qwen3MoeForCausalLM")
VOCABULARY = 1000


def make_model(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
    config = model_class.config_class(vocab_size=VOCABULARY, **tokens, **{**SIZES[name], **more})
    return model_class(config).to(torch.bfloat16).eval()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function: architecture -> folder of its 16-bit model."""
    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            make_model(name).save_pretrained(root / name)
        return root / name

    return folder


def load(folder: Path, **options: Any) -> Any:
    """The model of a folder, by the class that its config names."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder, **options)


def convert(folder: Path, **options: Any) -> Any:
    return load(folder, quantization_config=OctavoConfig(**options))


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(3, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids, **more).logits.float()
    return result


@contextlib.contextmanager
def log_of_transformers(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What it and octavo log, in `caplog`: transformers' loggers do not reach pytest by themselves."""
    logger = transformers.utils.logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    try:
        yield
    finally:
        logger.removeHandler(caplog.handler)


def int8_layers(model: nn.Module) -> dict[str, Int8Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}


def left_layers(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)}


def weight_bytes(model: nn.Module, names: set[str]) -> int:
    """Of the weights, biases and what belongs to them in modules of these names."""
    tensors = [
        tensor
        for name in names
        for tensor in (*model.get_submodule(name).parameters(), *model.get_submodule(name).buffers())
    ]
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())


@pytest.mark.parametrize("name", SIZES)
def test_architectures(tmp_path: Path, folders: Any, name: str) -> None:
    """Converted while loading: everything but the head, half the memory, nearly the same logits; saved and loaded."""
    original = load(folders(name))
    model = convert(folders(name))
    assert left_layers(model) <= {"lm_head", "cls.predictions.decoder"}

    linear = {layer for layer, module in original.named_modules() if type(module) in (nn.Linear, Conv1D)}
    linear -= left_layers(model)
    linear |= {layer for layer, module in original.named_modules() if hasattr(module, "is_concatenated")}
    ratio = weight_bytes(model, linear) / weight_bytes(original, linear)
    assert 0.49 < ratio <= 0.52
    if name in EXPERTS:
        assert sum(isinstance(module, Int8Experts) for module in model.modules()) == 2

    expected, found = logits(original), logits(model)
    error = ((found - expected).norm() / expected.norm()).item()
    assert 1e-4 < error < (LOGITS_OF_EXPERTS if name in EXPERTS else LOGITS)

    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert int8_layers(again).keys() == int8_layers(model).keys()
    assert torch.equal(logits(again), found)
    again.save_pretrained(tmp_path / "again")
    for file in tmp_path.glob("*.safetensors"):
        first, second = load_file(file), load_file(tmp_path / "again" / file.name)
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "GPTNeoXForCausalLM", "MixtralForCausalLM", "BertForMaskedLM"])
def test_checkpoints_of_octavo_quantize(tmp_path: Path, folders: Any, name: str) -> None:
    """The same layers from octavo quantize as from loading; experts are apart in its files."""
    checkpoint.quantize(folders(name), tmp_path / "int8", progress=False)
    loaded, converted = load(tmp_path / "int8"), convert(folders(name))
    assert int8_layers(loaded).keys() == int8_layers(converted).keys()
    assert torch.equal(logits(loaded), logits(converted))


def test_octavo_checkpoint_reads_what_is_saved(tmp_path: Path, folders: Any) -> None:
    model = convert(folders("OPTForCausalLM"), scheme="zeropoint", threshold=3.0, outliers="rows")
    model.save_pretrained(tmp_path)
    weights = checkpoint.load(tmp_path)
    layers = int8_layers(model)
    prefix = "" if set(layers) & {key.removesuffix(".weight") for key in weights} else "model."
    for name, layer in layers.items():
        weight = weights[name.removeprefix(prefix) + ".weight"]
        assert isinstance(weight, octavo.Int8Weight)
        assert torch.equal(weight.codes, layer.codes)
        assert torch.equal(weight.scale, layer.scale)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config == {
        "quant_method": None,
        "octavo": "load with: import octavo.transformers",
        "format_version": 1,
        "scheme": "zeropoint",
        "granularity": "vector",
        "threshold": 3.0,
        "outliers": "rows",
        "path": "auto",
        "modules_to_not_convert": ["lm_head"],
    }
    again = load(tmp_path)
    assert {(layer.scheme, layer.threshold, layer.outliers) for layer in int8_layers(again).values()} == {
        ("zeropoint", 3.0, "rows")
    }
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("made_by", ["save_pretrained", "octavo quantize"])
def test_without_octavo_transformers_refuses(tmp_path: Path, folders: Any, made_by: str) -> None:
    """Codes must never be taken for weights, which is what Transformers does with a method that it does not know."""
    if made_by == "save_pretrained":
        convert(folders("OPTForCausalLM")).save_pretrained(tmp_path / "int8")
    else:
        checkpoint.quantize(folders("OPTForCausalLM"), tmp_path / "int8", progress=False)
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'int8')!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 1
    assert run.stderr.rstrip().splitlines()[-1].startswith("ValueError: The model's quantization config")
    assert int8_layers(load(tmp_path / "int8"))


def test_a_config_with_the_method_is_read(tmp_path: Path, folders: Any) -> None:
    """As octavo wrote it at first."""
    convert(folders("OPTForCausalLM")).save_pretrained(tmp_path)
    expected = logits(load(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "octavo"
    del config["quantization_config"]["octavo"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(load(tmp_path)), expected)


def test_calibrated_columns_are_loaded(tmp_path: Path, folders: Any) -> None:
    """Outlier columns and their 16-bit weights, and options that differ from layer to layer: the file decides."""
    name = "model.layers.0.self_attn.q_proj"
    columns = {name: [3, 5]}
    checkpoint.quantize(
        folders("LlamaForCausalLM"), tmp_path / "int8", outlier_columns=columns, skip=["*.mlp.*"], progress=False
    )
    model = load(tmp_path / "int8")
    assert left_layers(model) == {"lm_head"} | {
        f"model.layers.{i}.mlp.{p}_proj" for i in range(2) for p in ("gate", "up", "down")
    }
    original = load(folders("LlamaForCausalLM")).get_submodule(name)
    layer = int8_layers(model)[name]
    assert layer.outlier_columns is not None
    assert layer.outlier_columns.tolist() == [3, 5]
    assert layer.outlier_weight is not None
    assert torch.equal(layer.outlier_weight, original.weight[:, [3, 5]])
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert left_layers(again) == left_layers(model)
    assert torch.equal(logits(again), logits(model))


def test_the_same_as_quantize_(folders: Any) -> None:
    """Codes, scales and sums of a loaded model are those of octavo.torch.quantize_."""
    model = convert(folders("LlamaForCausalLM"))
    expected = load(folders("LlamaForCausalLM"))
    octavo.torch.quantize_(expected, progress=False)
    for name, layer in int8_layers(expected).items():
        found = int8_layers(model)[name]
        for array in ("codes", "scale", "code_sums"):
            assert torch.equal(getattr(found, array), getattr(layer, array)), (name, array)
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize("gate", [True, False])
def test_experts_are_those_of_transformers(gate: bool) -> None:
    """Int8Experts with weight-only products against the model's own loop with the dequantized weights."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(hidden_size=32, intermediate_size=48, num_local_experts=5)
    config._experts_implementation = "eager"
    experts = MixtralExperts(config)
    if not gate:  # as models without gates have it
        experts.has_gate = False
        del experts.gate_up_proj
        experts.up_proj = nn.Parameter(torch.empty(5, 48, 32))
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.2)
    int8 = Int8Experts(experts)
    for name, parameter in list(experts.named_parameters()):
        linears = [nn.Linear(1, 1, bias=False) for _ in parameter]
        for linear, weight in zip(linears, parameter, strict=True):
            linear.weight = nn.Parameter(weight.detach())
        int8.hold(name, [Int8Linear.from_linear(linear, path="weight_only") for linear in linears])
        codes = torch.stack([octavo.dequantize(layer.int8_weight) for layer in getattr(int8, name)])
        parameter.data = codes
    x, index = torch.randn(7, 32), torch.randint(0, 6, (7, 2))  # 5: an expert of another process
    weights = torch.rand(7, 2)
    with torch.no_grad():
        found = int8(x, index, weights)
        if gate:
            expected = experts(x, index, weights)
        else:
            expected = torch.zeros_like(x)
            for token in range(7):
                for position in range(2):
                    expert = int(index[token, position])
                    if expert < 5:
                        hidden = experts.act_fn(experts.up_proj[expert] @ x[token])
                        expected[token] += weights[token, position] * (experts.down_proj[expert] @ hidden)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_generation_and_pipeline(tmp_path: Path, folders: Any) -> None:
    model = convert(folders("LlamaForCausalLM"))
    ids = torch.tensor([[5, 6, 7, 8]])
    tokens = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 8)
    with torch.no_grad():
        scores = model(ids).logits[0, -1]
    scores[2] = -torch.inf  # the end, which min_new_tokens forbids
    assert tokens[0, 4] == scores.argmax()

    model.save_pretrained(tmp_path)
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(tmp_path)
    generate = transformers.pipeline("text-generation", model=str(tmp_path), device_map="auto")
    assert int8_layers(generate.model)
    text = generate("w5 w6 w7 w8", max_new_tokens=4, min_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.replace(" ", "") == "".join(f"w{i}" for i in tokens[0].tolist())


@pytest.mark.parametrize("name", [name for name in SIZES if "Bert" not in name])
def test_every_architecture_generates(folders: Any, name: str) -> None:
    """With the cache of its keys and values: the same tokens as without, one by one."""
    config = OctavoConfig(outliers="rows")  # a token's codes do not depend on which others are in the call
    model = load(folders(name), quantization_config=config, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7, 8]])
    length = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    tokens = model.generate(ids, **length)
    assert tokens.shape[1] == 4 + (1 if model.config.is_encoder_decoder else ids.shape[1])
    assert torch.equal(model.generate(ids, **length, use_cache=False), tokens)


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "each"])
def test_device_map(tmp_path: Path, folders: Any, device_map: Any) -> None:
    folder = folders("OPTForCausalLM")
    if device_map == "each":
        names = {"model.decoder.embed_tokens", "model.decoder.embed_positions", "lm_head"}
        names |= {"model.decoder.layers.0", "model.decoder.layers.1", "model.decoder.final_layer_norm"}
        device_map = dict.fromkeys(names, "cpu")
    model = load(folder, quantization_config=OctavoConfig(), device_map=device_map)
    expected = logits(convert(folder))
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path, device_map=device_map)), expected)


@pytest.mark.parametrize("int8", [True, False], ids=["int8", "16 bit"])
@pytest.mark.parametrize("buffers", [True, False])
def test_layers_on_the_cpu_beside_a_device(tmp_path: Path, folders: Any, int8: bool, buffers: bool) -> None:
    """All that has its place on "cpu", where something has another, accelerate takes away: here, to the CPU itself."""
    original = convert(folders("MixtralForCausalLM"))
    expected = logits(original)
    others = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head") if buffers else ("",)
    places: dict[str, Any] = {**dict.fromkeys(others, torch.device("cpu")), "model.layers.1": "cpu"}
    if int8:
        original.save_pretrained(tmp_path / "int8")
        model = load(tmp_path / "int8", device_map=places, offload_buffers=buffers)
    else:
        config = OctavoConfig()
        model = load(
            folders("MixtralForCausalLM"), quantization_config=config, device_map=places, offload_buffers=buffers
        )
    away = {name for name, layer in int8_layers(model).items() if layer.weight.device.type == "meta"}
    assert away == {name for name in int8_layers(model) if name.startswith("model.layers.1.")}
    for _ in range(2):
        assert torch.equal(logits(model), expected)
    if buffers:  # of modules within others of another place Transformers does not find what was taken away
        model.save_pretrained(tmp_path / "saved")
        assert torch.equal(logits(load(tmp_path / "saved")), expected)


def test_routers_stay_by_every_way(tmp_path: Path) -> None:
    """quantize_, from_pretrained and octavo quantize leave the same layers."""
    sizes = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 48, "num_experts": 4}
    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(
        **{**LAYERS, "hidden_size": 64}, **KEY_VALUES, **sizes, intermediate_size=96, num_experts_per_tok=2,
        vocab_size=VOCABULARY,
    )  # fmt: skip
    transformers.Qwen2MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "m")
    in_place = octavo.torch.quantize_(load(tmp_path / "m"), progress=False)
    while_loading = convert(tmp_path / "m")
    checkpoint.quantize(tmp_path / "m", tmp_path / "int8", progress=False)
    routers = {f"model.layers.{i}.mlp.shared_expert_gate" for i in range(2)}
    for model in (in_place, while_loading, load(tmp_path / "int8")):
        assert left_layers(model) == routers | {"lm_head"}
        # (Experts that are stacked are no linear layers: quantize_ leaves them.)
        own = {name for name in int8_layers(model) if ".experts." not in name}
        assert len(own) == 2 * (4 + 3)
        assert not any("gate" in name.replace("gate_proj", "") for name in int8_layers(model) if "gate_up" not in name)


def test_compile(folders: Any) -> None:
    model = convert(folders("OPTForCausalLM"))
    expected = logits(model)
    ids = torch.randint(3, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found = compiled(input_ids=ids, use_cache=False).logits.float()
    # The compiler may round elsewhere between the layers.
    assert ((found - expected).norm() / expected.norm()).item() < 0.02


def test_compile_of_experts(folders: Any) -> None:
    """Their loop over the experts that a batch needs breaks the graph; the pieces are compiled."""
    model = load(folders("MixtralForCausalLM"), quantization_config=OctavoConfig(), dtype=torch.float32)
    expected = logits(model)
    ids = torch.randint(3, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        found = compiled(input_ids=ids, use_cache=False).logits.float()
    assert ((found - expected).norm() / expected.norm()).item() < 0.01
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_compile_with_inductor(tmp_path: Path, name: str) -> None:
    """The default backend, without a graph break. In float32, so that it rounds between the layers as eager does.

    One layer: a compiler works on each, and takes its time for it.
    """
    make_model(name, **({"n_layer": 1} if name == "GPT2LMHeadModel" else {"num_hidden_layers": 1})).save_pretrained(
        tmp_path
    )
    model = load(tmp_path, quantization_config=OctavoConfig(), dtype=torch.float32)
    expected = logits(model)
    ids = torch.randint(3, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        found = compiled(input_ids=ids, use_cache=False).logits.float()
    # Sums of norms may end in another last bit, which now and then makes another code.
    assert ((found - expected).norm() / expected.norm()).item() < 0.01

    if name == "LlamaForCausalLM":  # generation: three more graphs, of the prompt and of tokens after it
        length = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        tokens = model.generate(ids, **length)
        model.forward = torch.compile(model.forward)
        assert torch.equal(model.generate(ids, **length), tokens)
    torch.compiler.reset()


def test_what_is_left(folders: Any) -> None:
    """Names, patterns, what is below them; the caller's config stays as it is."""
    config = OctavoConfig(modules_to_not_convert=["decoder.layers.0.fc1", "fc2", "*.layers.1.self_attn"])
    model = load(folders("OPTForCausalLM"), quantization_config=config)
    kept = {f"model.decoder.layers.{i}.fc2" for i in range(2)} | {"model.decoder.layers.0.fc1", "lm_head"}
    kept |= {f"model.decoder.layers.1.self_attn.{p}" for p in ("q_proj", "k_proj", "v_proj", "out_proj")}
    assert left_layers(model) == kept  # lm_head: tied to the embedding
    assert model.config.quantization_config.modules_to_not_convert == sorted(kept)
    assert config.modules_to_not_convert == ["decoder.layers.0.fc1", "fc2", "*.layers.1.self_attn"]


def test_an_untied_head_is_converted_when_asked_for(tmp_path: Path) -> None:
    make_model("LlamaForCausalLM", tie_word_embeddings=False).save_pretrained(tmp_path)
    assert left_layers(convert(tmp_path)) == {"lm_head"}
    model = convert(tmp_path, modules_to_not_convert=[])
    assert left_layers(model) == set()
    model.save_pretrained(tmp_path / "int8")
    assert torch.equal(logits(load(tmp_path / "int8")), logits(model))


def test_float32_modules_of_float16_models_stay(folders: Any) -> None:
    """T5 overflows float16 in its `wo`, which transformers keeps in float32."""
    model = load(folders("T5ForConditionalGeneration"), quantization_config=OctavoConfig(), dtype=torch.float16)
    left = left_layers(model) - {"lm_head"}
    assert left
    assert all(name.endswith(".wo") for name in left)
    assert all(model.get_submodule(name).weight.dtype == torch.float32 for name in left)
    assert torch.isfinite(logits(model)).all()


def test_a_classifier_stays(tmp_path: Path) -> None:
    config = transformers.BertConfig(vocab_size=99, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path, quantization_config=OctavoConfig())
    assert left_layers(model) == {"classifier"}
    # a head that the checkpoint has no weights for is made by transformers, and nothing of the rest changes
    model = transformers.BertForTokenClassification.from_pretrained(tmp_path, quantization_config=OctavoConfig())
    assert left_layers(model) == {"classifier"}
    assert torch.isfinite(model(torch.tensor([[1, 2]])).logits).all()


def gpt_oss(folder: Path) -> Any:
    """Experts with biases, [experts, in, out], gate and up of a feature beside each other."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 192, "num_hidden_layers": 2, "head_dim": 64}
    config = transformers.GptOssConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        vocab_size=VOCABULARY, pad_token_id=0,
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config).to(torch.bfloat16).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return model


def test_transposed_experts_with_biases(tmp_path: Path) -> None:
    original = gpt_oss(tmp_path / "m")
    model = convert(tmp_path / "m")
    for old, new in zip(original.model.layers, model.model.layers, strict=True):
        old, new = old.mlp.experts, new.mlp.experts
        assert isinstance(new, Int8Experts)
        for projection in ("gate_up_proj", "down_proj"):
            for weight, layer in zip(getattr(old, projection), getattr(new, projection), strict=True):
                assert torch.equal(layer.codes, octavo.quantize_weight(weight.T.contiguous()).codes)
            assert torch.equal(getattr(new, f"{projection}_bias"), getattr(old, f"{projection}_bias"))
        # One module alone, so that an undecided router does not count.
        x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
        chosen, shares = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [1, 3]]), torch.full((5, 2), 0.5).bfloat16()
        with torch.no_grad():
            exact, got = old(x, chosen, shares).float(), new(x, chosen, shares).float()
        assert 0 < (got - exact).norm() < 0.03 * exact.norm()
    expected = logits(original)
    assert (logits(model) - expected).norm() < LOGITS_OF_EXPERTS * expected.norm()

    model.save_pretrained(tmp_path / "int8")
    again = load(tmp_path / "int8")
    assert int8_layers(again).keys() == int8_layers(model).keys()
    assert torch.equal(logits(again), logits(model))


def test_experts_of_another_layout_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Llama 4 multiplies all experts at once, in a module of its own: they stay, and a warning says so."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "intermediate_size_mlp": 64, "num_hidden_layers": 1}
    config = transformers.Llama4TextConfig(
        **sizes, head_dim=32, num_attention_heads=2, num_key_value_heads=1, num_local_experts=2, vocab_size=99,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, architectures=["Llama4ForCausalLM"], moe_layers=[0],
    )  # fmt: skip
    transformers.Llama4ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    with log_of_transformers(caplog):
        model = convert(tmp_path)
    assert "expert weights of 1 modules stay as they are" in caplog.text
    assert model.model.layers[0].feed_forward.experts.gate_up_proj.dtype == torch.bfloat16
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} <= {name.rpartition(".")[2] for name in int8_layers(model)}


def test_refusals(tmp_path: Path, folders: Any, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"outliers: expected 'columns', 'rows' or 'none'.*got 'static'"):
        convert(folders("OPTForCausalLM"), outliers="static")
    with pytest.raises(ValueError, match="device_map: expected devices for an int8 model, got 'disk'"):
        load(folders("OPTForCausalLM"), quantization_config=OctavoConfig(), device_map={"": "disk"})
    some = {"": "cpu", "model.decoder.layers.1": "disk"}
    with pytest.raises(ValueError, match="got 'disk': octavo's layers are not offloaded to it"):
        load(
            folders("OPTForCausalLM"), quantization_config=OctavoConfig(), device_map=some, offload_folder=str(tmp_path)
        )
    with pytest.raises(ValueError, match="scheme"):
        OctavoConfig(scheme="int7")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threshold"):
        OctavoConfig(threshold=-1.0)
    with pytest.raises(ValueError, match="format_version: expected 1, got 2: update octavo"):
        OctavoConfig(format_version=2)
    with pytest.raises(TypeError, match="modules_to_not_convert: expected a sequence of names, got a string"):
        OctavoConfig(modules_to_not_convert="lm_head")

    convert(folders("OPTForCausalLM")).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("layers.0.fc1.scale"))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file, metadata={"format": "pt"})
    with log_of_transformers(caplog), pytest.raises(RuntimeError, match="automatic conversion of the weights"):
        load(tmp_path)
    assert (
        "layers.0.fc1: expected an int8 weight, scale, _extra_state, got _extra_state, weight: corrupt" in caplog.text
    )

    model = make_model("OPTForCausalLM")
    model.model.decoder.layers[0].fc1.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    with log_of_transformers(caplog), pytest.raises(RuntimeError, match="automatic conversion of the weights"):
        convert(tmp_path)
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
    held = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
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
