"""int8 models of diffusers, of sentence-transformers and of accelerate's loader: tools around octavo.transformers."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("torch") is None or importlib.util.find_spec("diffusers") is None:
    pytest.skip("PyTorch or diffusers is not installed", allow_module_level=True)
if any(importlib.util.find_spec(name) is None for name in ("transformers", "accelerate", "sentence_transformers")):
    pytest.skip("transformers, accelerate or sentence-transformers is not installed", allow_module_level=True)

import accelerate
import torch
import transformers
from diffusers import UNet2DConditionModel
from model_families import relative_error
from octavo.torch import Int8Tensor, quantize_
from octavo.transformers import OctavoConfig
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer, models
from tiny_models import tiny_model, write_language_model

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
}


def unet() -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(**UNET).eval()


def image(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 7, 32, generator=generator)
    with torch.no_grad():
        found: torch.Tensor = model(x, 3, text).sample
    return found


def int8_weights(model: Any) -> set[str]:
    return {name for name, weight in model.named_parameters() if isinstance(weight, Int8Tensor)}


def test_a_model_of_diffusers(tmp_path: Path) -> None:
    """Converted in place and while loading: the same; saved, loaded, fused, and dequantized."""
    original = unet()
    original.save_pretrained(tmp_path / "float")
    expected = image(original)
    in_place = quantize_(unet(), progress=False)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "float", quantization_config=OctavoConfig())
    found = image(in_place)
    assert 1e-4 < relative_error(found, expected) < 0.05
    assert int8_weights(loaded) == int8_weights(in_place)
    assert torch.equal(image(loaded), found)
    for model, folder in ((in_place, tmp_path / "a"), (loaded, tmp_path / "b")):
        model.save_pretrained(folder)
        stored = load_file(folder / "diffusion_pytorch_model.safetensors")
        assert not int8_weights(model) & stored.keys()
        assert json.loads((folder / "config.json").read_text())["quantization_config"]["octavo"]
        again = UNet2DConditionModel.from_pretrained(folder)
        assert int8_weights(again) == int8_weights(model)
        assert torch.equal(image(again), found)
    loaded.fuse_qkv_projections()
    assert relative_error(image(loaded), found) < 0.02
    in_place.dequantize()
    assert not int8_weights(in_place)
    assert relative_error(image(in_place), expected) < 0.05


def test_layers_that_stay(tmp_path: Path) -> None:
    unet().save_pretrained(tmp_path)
    config = OctavoConfig(modules_to_not_convert=["*.attn1.*"], path="weight_only")
    model = UNet2DConditionModel.from_pretrained(tmp_path, quantization_config=config)
    assert not [name for name in int8_weights(model) if ".attn1." in name]
    assert [name for name in int8_weights(model) if ".attn2." in name]
    assert {weight.options.path for weight in model.parameters() if isinstance(weight, Int8Tensor)} == {"weight_only"}


def test_a_sentence_transformer(tmp_path: Path) -> None:
    bert = tiny_model("BertForMaskedLM").bert
    write_language_model(tmp_path / "bert", bert)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "bert")
    tokenizer.pad_token = "?"
    tokenizer.save_pretrained(tmp_path / "bert")
    parts = [models.Transformer(str(tmp_path / "bert")), models.Pooling(32, pooling_mode="mean"), models.Dense(32, 16)]
    original = SentenceTransformer(modules=parts, device="cpu")
    original.save(str(tmp_path / "st"))
    texts = ["w3 w4 w5 w6", "w7 w9"]
    expected = torch.tensor(original.encode(texts))
    config = {"quantization_config": OctavoConfig()}
    model = SentenceTransformer(str(tmp_path / "st"), device="cpu", model_kwargs=config)
    found = torch.tensor(model.encode(texts))
    assert len(int8_weights(model)) >= 12
    assert relative_error(found, expected) < 0.05
    in_place = quantize_(original, skip=["2.linear"], progress=False)  # Dense saves plain tensors
    for each, folder in ((model, tmp_path / "a"), (in_place, tmp_path / "b")):
        want = torch.tensor(each.encode(texts))
        each.save(str(folder))
        again = SentenceTransformer(str(folder), device="cpu")
        assert torch.equal(torch.tensor(again.encode(texts)), want)


@pytest.mark.parametrize("empty", [True, False])
def test_accelerate_refuses_to_load_codes(tmp_path: Path, empty: bool) -> None:
    """load_checkpoint_and_dispatch knows plain tensors only, and would leave a model's weights as they are."""
    model = tiny_model("LlamaForCausalLM")
    quantize_(model, progress=False).save_pretrained(tmp_path)
    with accelerate.init_empty_weights() if empty else contextlib.nullcontext():
        other = transformers.LlamaForCausalLM(model.config)
    before = other.model.embed_tokens.weight
    with pytest.raises(ValueError, match=r"load_checkpoint_and_dispatch: expected .*: load the folder with from_pre"):
        accelerate.load_checkpoint_and_dispatch(other, tmp_path, device_map={"": "cpu"})
    assert other.model.embed_tokens.weight is before
