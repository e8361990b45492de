"""Checkpoints as transformers saves them, against octavo.torch.quantize_ on the loaded model; and calibration."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from support import TORCH

if TORCH.missing:
    pytest.skip(TORCH.missing, allow_module_level=True)
if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

import octavo.torch as ot
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


def tiny_model(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    fields = {"vocab_size": 99, "max_position_embeddings": 64, **SIZES[name], **more}
    if "num_hidden_layers" not in fields and name not in ("BloomForCausalLM", "T5ForConditionalGeneration"):
        fields["num_hidden_layers"] = 2
    return model_class(model_class.config_class(**fields)).eval()


@pytest.mark.parametrize("name", SIZES)
def test_the_layers_of_quantize_(tmp_path: Path, name: str) -> None:
    """The same layers with the same arrays. The heads that only their shape gives away are named in skip."""
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "m")
    checkpoint.quantize(tmp_path / "m", tmp_path / "out", progress=False)
    ot.quantize_(model, skip=("*lm_head", "*embed_out", "cls.predictions.decoder"), progress=False)
    expected = model.state_dict()
    layers = {name for name, module in model.named_modules() if isinstance(module, ot.Int8Linear)}
    state = checkpoint.Checkpoint(tmp_path / "out").state_dict()
    found = {name.removesuffix(".scale") for name in state if name.endswith(".scale")}
    assert len(found) > 5
    # transformers stores some models without the prefix of their base model
    prefix = "" if found <= layers else f"{model.base_model_prefix}."
    assert {prefix + layer for layer in found} == layers
    for key, value in state.items():
        key = key.replace("embed_out", "lm_head")  # GPT-NeoX: renamed in files
        name_in_model = prefix + key if prefix + key in expected else key
        assert expected[name_in_model].dtype == value.dtype
        assert torch.equal(expected[name_in_model], value), key


def with_tokenizer(model: Any, folder: Path) -> Path:
    """Save the model and a tokenizer of letters."""
    model.save_pretrained(folder)
    vocabulary = {chr(97 + i): i for i in range(26)} | {"[UNK]": 26}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["OPTForCausalLM", "LlamaForCausalLM", "T5ForConditionalGeneration"])
def test_calibrate(tmp_path: Path, name: str) -> None:
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
    arguments += ["--outlier-columns", str(file), "--quiet"]
    assert cli.main(arguments) == 0
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


def test_calibrate_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = with_tokenizer(tiny_model("OPTForCausalLM"), tmp_path / "m")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"empty\.txt: expected text to calibrate with, got none"):
        checkpoint.calibrate(folder, tmp_path / "empty.txt", progress=False)
    assert cli.main(["quantize", str(folder), str(tmp_path / "out"), "--calibrate", str(tmp_path / "none.txt")]) == 1
    assert "none.txt" in capsys.readouterr().err
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=99, n_positions=32)
    gpt2 = with_tokenizer(transformers.GPT2LMHeadModel(config), tmp_path / "gpt2")
    (tmp_path / "text.txt").write_text("a b c")
    with pytest.raises(ValueError, match=r"expected a model of nn\.Linear layers, got gpt2's Conv1D"):
        checkpoint.calibrate(gpt2, tmp_path / "text.txt", progress=False)
