"""Int8 checkpoints of the real bitsandbytes: read, and written for it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import octavo
import pytest
from support import TORCH, make

if TORCH.missing:
    pytest.skip(TORCH.missing, allow_module_level=True)
if importlib.util.find_spec("bitsandbytes") is None:
    pytest.skip("bitsandbytes is not installed", allow_module_level=True)

import bitsandbytes
import safetensors.torch
import torch
from octavo import checkpoint
from torch import Tensor, nn

SHAPES = {"model.layers.0.fc": (24, 16), "model.layers.0.out": (16, 24)}


def tensor(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.from_numpy(make("normal", shape, "float32", seed)).to(dtype)


def their_layer(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A Linear8bitLt that has quantized a weight."""
    n, k = weight.shape
    layer = bitsandbytes.nn.Linear8bitLt(k, n, bias=bias is not None, has_fp16_weights=False)
    layer.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    return layer.to("cpu")  # type: ignore[no-any-return] # quantizes


def test_their_checkpoint_is_read(tmp_path: Path) -> None:
    layers = {name: their_layer(tensor(shape, 1), tensor(shape[:1], 2)) for name, shape in SHAPES.items()}
    state = {f"{name}.{part}": value for name, layer in layers.items() for part, value in layer.state_dict().items()}
    assert {name.rpartition(".")[2] for name in state} == {"weight", "bias", "SCB", "weight_format"}
    state["model.norm.weight"] = torch.ones(16)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")

    loaded = checkpoint.load(tmp_path)
    assert set(loaded) == {"model.norm.weight", *(f"{name}.{part}" for name in SHAPES for part in ("weight", "bias"))}
    for name, layer in layers.items():
        weight = loaded[f"{name}.weight"]
        assert isinstance(weight, octavo.Int8Weight)
        theirs: Any = layer.state_dict()
        assert torch.equal(weight.codes, theirs["weight"])
        ideal = theirs["weight"].double() * theirs["SCB"].double()[:, None] / 127
        np.testing.assert_allclose(weight.dequantize().numpy(), ideal.numpy(), rtol=3e-7)
        assert torch.equal(loaded[f"{name}.bias"], theirs["bias"])
    summary = checkpoint.inspect(tmp_path)
    assert [(layer.name, layer.format) for layer in summary.layers] == [(name, "bitsandbytes") for name in SHAPES]
    assert summary.checksums == 0


def test_another_layout_is_refused(tmp_path: Path) -> None:
    state = their_layer(tensor((8, 8), 1), None).state_dict(prefix="fc.")
    state["fc.weight_format"] += 2
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"fc\.weight: weight_format: expected 0 .row-major codes., got 2"):
        checkpoint.load(tmp_path)


def test_theirs_loads_what_is_written(tmp_path: Path) -> None:
    state = {f"{name}.weight": tensor(shape, 3, torch.bfloat16) for name, shape in SHAPES.items()}
    state["model.layers.0.fc.bias"] = tensor((24,), 4, torch.float32)
    state["lm_head.weight"] = tensor((50, 16), 5)
    model, output = tmp_path / "m", tmp_path / "out"
    model.mkdir()
    safetensors.torch.save_file(state, model / "model.safetensors")
    (model / "config.json").write_text(json.dumps({"model_type": "tiny", "vocab_size": 50}))
    checkpoint.quantize(model, output, format="bitsandbytes", progress=False, memory=600, threshold=4)

    written = safetensors.torch.load_file(output / "model.safetensors")
    for name, (n, k) in SHAPES.items():
        own = {key.removeprefix(f"{name}."): value for key, value in written.items() if key.startswith(f"{name}.")}
        theirs: Any = their_layer(state[f"{name}.weight"].float(), state.get(f"{name}.bias")).state_dict()
        assert own.keys() == theirs.keys()
        for part in own:
            assert (own[part].dtype, own[part].shape) == (theirs[part].dtype, theirs[part].shape)
        assert torch.equal(own["SCB"], theirs["SCB"])
        # They multiply by 127 / absmax where octavo divides once: codes at a tie may be one apart.
        difference = (own["weight"].int() - theirs["weight"].int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 0.01

        layer = bitsandbytes.nn.Linear8bitLt(k, n, bias="bias" in own, has_fp16_weights=False)
        layer = layer.to("cpu")  # an int8 layer, to be loaded into
        layer.load_state_dict(own)
        assert torch.equal(layer.weight.data, own["weight"])
        x = tensor((3, k), 6)
        ideal = octavo.linear(x.float(), octavo.quantize_weight(state[f"{name}.weight"]), own.get("bias"))
        np.testing.assert_allclose(layer(x).float().detach().numpy(), ideal.numpy(), atol=0.05, rtol=0.01)

    config = json.loads((output / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["load_in_8bit"], config["llm_int8_threshold"]) == ("bitsandbytes", True, 4.0)
    assert config["llm_int8_skip_modules"] == ["lm_head"]
    loaded = checkpoint.load(output)
    expected = octavo.quantize_weight(state["model.layers.0.fc.weight"])
    assert torch.equal(loaded["model.layers.0.fc.weight"].codes, expected.codes)
    assert torch.equal(loaded["model.layers.0.fc.weight"].scale, expected.scale)


def test_transformers_with_bitsandbytes(tmp_path: Path) -> None:
    """Whole models, both ways: what Transformers writes with bitsandbytes is read, what is written loads there."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=99, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, word_embed_proj_dim=64,
    )  # fmt: skip
    original = transformers.OPTForCausalLM(config).to(torch.float16).eval()
    original.save_pretrained(tmp_path / "m")
    theirs = transformers.OPTForCausalLM.from_pretrained(
        tmp_path / "m", quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True), device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = checkpoint.load(tmp_path / "theirs")
    layers = {name: weight for name, weight in loaded.items() if isinstance(weight, octavo.Int8Weight)}
    assert len(layers) == 12
    weights = original.state_dict()
    for name, weight in layers.items():
        full = name if name in weights else f"model.{name}"
        expected = octavo.quantize_weight(weights[full])
        assert (weight.codes.int() - expected.codes.int()).abs().max() <= 1
        assert torch.equal(weight.scale, expected.scale)

    checkpoint.quantize(tmp_path / "m", tmp_path / "ours", format="bitsandbytes", progress=False)
    ours = transformers.OPTForCausalLM.from_pretrained(tmp_path / "ours", device_map="cpu")
    assert sum(type(module) is bitsandbytes.nn.Linear8bitLt for module in ours.modules()) == 12
    ids = torch.randint(3, 99, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact, found = original(ids).logits.float(), ours(ids).logits.float()
    assert 0 < (found - exact).norm() < 0.04 * exact.norm()
